"""What a run leaves behind: the summary, the loss curve, a sample of text."""

import json
import logging
import math
import signal
from pathlib import Path
from typing import Any

from seqtrain.data import Corpus, SyntheticCorpus, bigram_bits_per_byte
from seqtrain.report import new_figure, save_figure, write_json
from seqtrain.runtime.checkpoint import listed
from seqtrain.runtime.generate import Continuation, continue_text, open_run
from seqtrain.runtime.lease import Lease
from seqtrain.runtime.metrics import Record, count_restarts
from seqtrain.runtime.run_folder import RunFolder, read_lines
from seqtrain.runtime.settings import PretrainConfig

log = logging.getLogger("seqtrain.runtime")

# Steps at the start of a session that are left out of the mean speed: they compile and fill caches.
WARM_UP_STEPS = 1


def write_report(
    config: PretrainConfig,
    folder: RunFolder,
    corpus: Corpus | SyntheticCorpus,
    lease: Lease,
    *,
    stopped_by_signal: int = 0,
) -> dict[str, Any]:
    """Writes `summary.json` and `loss.png` from what the ranks left in `folder`; gives the summary.

    `stopped_by_signal`: number of the signal that asked this process to stop, 0 without one. A run that was stopped has
    little time left, so its summary comes without a sample of text.
    """
    outcome = json.loads(lease.current().outcome.read_text())
    records = read_lines(folder.metrics)
    # The tokens of a synthetic task are no text: nothing to compare bytes with, and nothing to read.
    bigram = math.nan if isinstance(corpus, SyntheticCorpus) else bigram_bits_per_byte(corpus)
    sample = ""
    if config.sample.tokens and not (outcome["stopped"] or isinstance(corpus, SyntheticCorpus)):
        _, model, tokenizer = open_run(folder.path)
        wish = Continuation(config.sample.prompt, config.sample.tokens, config.seed)
        sample = continue_text(model, tokenizer, wish, backend=config.kernels.backend)
    counted = records[WARM_UP_STEPS:] or records
    tokens, seconds = (sum(record[key] for record in counted) for key in ("tokens", "step_seconds"))
    summary = outcome | {
        "stopped_by_signal": (stopped_by_signal or signal.SIGTERM) if outcome["stopped"] else 0,
        "tokens_per_second": tokens / seconds if seconds else None,
        "final_loss": records[-1]["loss"] if records else None,
        "bigram_bits_per_byte": bigram if math.isfinite(bigram) else None,
        "restarts": count_restarts(folder),
        "checkpoint": str(listed(folder.checkpoints)[0].folder),
        "sample": sample,
    }
    lease.check()
    write_json(folder.summary, summary, allow_nan=False)
    if records:
        draw_loss(records, folder.loss_curve, bytes_per_token=corpus.bytes_per_token)
    return summary


def draw_loss(records: list[Record], path: Path, *, bytes_per_token: float | None) -> None:
    """Draws loss and held-out figures against the steps into `path`.

    In bits per byte where `bytes_per_token` of the training text is known, else in nats per token.
    """
    unit, factor = "nats per token", 1.0
    if bytes_per_token:
        unit, factor = "bits per byte", 1 / (math.log(2) * bytes_per_token)
    figure = new_figure(7, 4)
    axes = figure.add_subplot(title=f"{path.parent.name}: loss", xlabel="step", ylabel=f"loss ({unit})")
    finite = [record for record in records if record["loss"] is not None]
    axes.plot([r["step"] for r in finite], [factor * r["loss"] for r in finite], linewidth=1, label="training")
    scored = [record for record in records if record.get("held_out_bits_per_byte") is not None]
    if scored and bytes_per_token:
        axes.plot([r["step"] for r in scored], [r["held_out_bits_per_byte"] for r in scored], "o-", label="held out")
    lines = axes.get_lines()
    if scored := [record for record in records if record.get("held_out_accuracy") is not None]:
        right = axes.twinx()
        right.set_ylabel("accuracy on held-out rows")
        right.plot([r["step"] for r in scored], [r["held_out_accuracy"] for r in scored], "o-", color="tab:orange")
        right.get_lines()[0].set_label("held-out accuracy")
        lines = [*lines, *right.get_lines()]
    axes.legend(handles=lines)
    axes.grid(alpha=0.3)
    save_figure(figure, path)

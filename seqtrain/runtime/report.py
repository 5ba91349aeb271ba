"""What a run leaves behind: the summary and its pictures."""

import json
import logging
import math
import signal
from typing import Any

from seqtrain.data import Corpus, Mixture, SyntheticCorpus, bigram_bits_per_byte
from seqtrain.report import write_json
from seqtrain.runtime.checkpoint import listed
from seqtrain.runtime.lease import Lease
from seqtrain.runtime.metrics import count_restarts
from seqtrain.runtime.pictures import draw_figures, draw_loss
from seqtrain.runtime.run_folder import RunFolder, read_lines
from seqtrain.runtime.settings import PretrainConfig

log = logging.getLogger("seqtrain.runtime")

# Steps at the start of a session that are left out of the mean speed: they compile and fill caches.
WARM_UP_STEPS = 1


def write_report(
    config: PretrainConfig,
    folder: RunFolder,
    corpus: Corpus | SyntheticCorpus | Mixture,
    lease: Lease,
    *,
    stopped_by_signal: int = 0,
) -> dict[str, Any]:
    """Writes `summary.json`, `loss.png` and `figures.png` from what the ranks left in `folder`; gives the summary.

    `stopped_by_signal`: number of the signal that asked this process to stop, 0 without one.
    """
    outcome = json.loads(lease.current().outcome.read_text())
    records = read_lines(folder.metrics)
    # The tokens of a synthetic task are no text: nothing to compare bytes with. What is asked for behind a mask is not
    # what follows, which bigrams foretell.
    bigram = math.nan if config.data.masked else bigram_bits_per_byte(corpus)
    counted = records[WARM_UP_STEPS:] or records
    tokens, seconds = (sum(record[key] for record in counted) for key in ("tokens", "step_seconds"))
    summary = outcome | {
        "stopped_by_signal": (stopped_by_signal or signal.SIGTERM) if outcome["stopped"] else 0,
        "tokens_per_second": tokens / seconds if seconds else None,
        "final_loss": records[-1]["loss"] if records else None,
        **{key: value for key, value in (records[-1] if records else {}).items() if key.startswith("epochs/")},
        "bigram_bits_per_byte": bigram if math.isfinite(bigram) else None,
        "restarts": count_restarts(folder),
        "checkpoint": str(listed(folder.checkpoints)[0].folder),
    }
    lease.check()
    write_json(folder.summary, summary, allow_nan=False)
    if records:
        draw_loss(records, folder.loss_curve, bytes_per_token=corpus.bytes_per_token)
        draw_figures(records, folder.figures)
    folder.copy_out()
    return summary

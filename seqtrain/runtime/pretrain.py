"""Trains a language model on text or a synthetic task; without any override it runs the quickstart.

    python launch/pretrain.py data=text data.path=~/books train.sequence_length=4096
    python launch/pretrain.py 'model.layers=[gated_delta_net,sliding_attention]' model.depth=12 model.width=512
    python launch/pretrain.py run=runs/mine                      # resumes the run in that folder
    python launch/pretrain.py parallel.sequence=2 parallel.data=1    # one sequence over two workers
    python launch/pretrain.py --multirun optimizer.lr=1e-3,3e-3 seed=0,1

`output_dir` gets config.yaml, metrics.jsonl, checkpoints/, summary.json, loss.png and run.log. Ctrl-C and SIGTERM save
a checkpoint, then stop. The values of the quickstart give way to those that fit a `data=` or `model=` you choose, these
to those of `experiment=`, and all of them to what you type.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqtrain.config import launch
from seqtrain.help import command_line
from seqtrain.runtime.guard import guarded
from seqtrain.runtime.resolving import read_pretrain_config
from seqtrain.runtime.resume import what_is_kept
from seqtrain.runtime.run import run
from seqtrain.runtime.run_folder import RunFolder
from seqtrain.runtime.settings import PretrainConfig


def main(arguments: Sequence[str]) -> int:
    """Trains as `arguments` say; gives the exit status: 0, or 128 + the number of the signal that stopped it."""
    return launch("pretrain", arguments, read_pretrain_config, start, outcome)


def outcome(folder: Path) -> str:
    """What a sweep's table says of the run in `folder`: its score and its speed."""
    file = RunFolder(folder).summary
    if not file.exists():
        return ""
    summary = json.loads(file.read_text())
    score, speed = summary["held_out_bits_per_byte"], summary["tokens_per_second"]
    shown = f"held-out {score:.3f} bits per byte" if score is not None else f"loss {summary['final_loss']:.4f}"
    return f"{shown}  {speed:,.0f} tokens/s"


def start(config: PretrainConfig) -> int:
    """Trains, prints what is trained and the outcome, and returns the exit status."""
    # Under torchrun, rank 0 speaks.
    if os.environ.get("RANK", "0") == "0":
        print(announce(config), flush=True)

    def train() -> int:
        summary = run(config)
        if summary:
            print(describe(summary, config.output_dir), flush=True)
        return 128 + summary["stopped_by_signal"] if summary.get("stopped") else 0

    if config.runtime.name == "inline":
        return train()
    folder = RunFolder(Path(config.output_dir), config.checkpoint.store)
    return guarded(train, lambda: folder.log, resume=lambda: what_is_kept(folder))


def announce(config: PretrainConfig) -> str:
    """What the config was composed of, and what follows from it, in a line."""
    presets = " ".join(f"{group}={choice}" for group, choice in config.presets.items())
    train, parallel = config.train, config.parallel
    tensor = f" x {parallel.tensor}" if parallel.tensor > 1 else ""
    return (
        f"{presets}: {train.steps} steps of {train.batch_size} x {train.sequence_length} tokens on "
        f"{parallel.data} x {parallel.sequence}{tensor} ranks, {train.micro_batch_size} sequences at once"
    )


def describe(summary: dict[str, Any], output_dir: str) -> str:
    """The outcome in a few lines, and what to type to go on from it."""
    resume = command_line("pretrain", f"run={output_dir}")
    if summary["stopped"]:
        return f"stopped after step {summary['steps']}; to resume: {resume}"
    whole, trained = summary["parameters"], summary["trained_parameters"]
    some = f", {trained:,} of them trained" if trained < whole else ""
    lines = [
        f"{summary['steps']} steps, {whole:,} parameters{some}",
        f"{summary['tokens_per_second']:,.0f} tokens/s, at most {summary['peak_memory_bytes'] / 2**30:.2f} GiB a rank",
    ]
    if summary["held_out_bits_per_byte"] is not None:
        lines.append(f"held-out text: {summary['held_out_bits_per_byte']:.3f} bits per byte")
        # Of token files nothing says which bytes follow on which.
        if summary["bigram_bits_per_byte"] is not None:
            lines[-1] += f"; a byte bigram of the training text: {summary['bigram_bits_per_byte']:.3f}"
    if summary["sample"]:
        lines += ["", "a sample:", summary["sample"], ""]
        lines.append(f"more of it: {command_line('generate', f'run={output_dir}')}")
    more = f"train.steps={2 * summary['steps']}"
    start = [f"run={output_dir}", "output_dir=NEW", f"checkpoint.resume={summary['checkpoint']}", more]
    lines.append(f"a new run from its weights: {command_line('pretrain', *start)}")
    return "\n".join([*lines, f"everything else: {output_dir}"])

"""Pretrains a language model: `python launch/pretrain.py [key=value ...]`. Without overrides it runs the quickstart.

`--help` lists the config groups, `--cfg job` every key with its value, `--multirun` sweeps over comma-separated values.
"""

import sys
from typing import Any

from seqtrain.config import launch
from seqtrain.runtime import PretrainConfig, read_pretrain_config, run


def start(config: PretrainConfig) -> int:
    """Trains, prints the outcome, and returns the exit status: 0, or 128 + the signal's number after a signal."""
    summary = run(config)
    # Under torchrun, only rank 0 has a summary.
    if summary:
        print(describe(summary, config.output_dir))
    return 128 + summary["stopped_by_signal"] if summary.get("stopped") else 0


def describe(summary: dict[str, Any], output_dir: str) -> str:
    """The outcome in a few lines."""
    if summary["stopped"]:
        return (
            f"stopped after step {summary['steps']}; the same command with output_dir={output_dir} goes on from there"
        )
    lines = [
        f"{summary['steps']} steps, {summary['parameters']:,} parameters",
        f"{summary['tokens_per_second']:,.0f} tokens/s, at most {summary['peak_memory_bytes'] / 2**30:.2f} GiB a rank",
    ]
    if summary["held_out_bits_per_byte"] is not None:
        lines.append(f"held-out text: {summary['held_out_bits_per_byte']:.3f} bits per byte")
        lines[-1] += f"; a byte bigram of the training text: {summary['bigram_bits_per_byte']:.3f}"
    if summary["sample"]:
        lines += ["a sample:", *(f"    {line}" for line in summary["sample"].splitlines())]
    return "\n".join([*lines, f"everything else: {output_dir}"])


if __name__ == "__main__":
    sys.exit(launch("pretrain", read_pretrain_config, start))

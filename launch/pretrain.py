"""Pretrains a language model: `python launch/pretrain.py [key=value ...]`. Without overrides it runs the quickstart.

`--help` lists the config groups, `--cfg job` every key with its value, `--multirun` sweeps over comma-separated values.
"""

import sys

from seqtrain.config import launch
from seqtrain.runtime import read_pretrain_config, run


def start(config) -> int:
    """Trains and returns the exit status: 0, or 128 + the signal's number when a signal ended the run early."""
    summary = run(config)
    return 128 + summary["stopped_by_signal"] if summary.get("stopped_by_signal") else 0


if __name__ == "__main__":
    sys.exit(launch("pretrain", read_pretrain_config, start))

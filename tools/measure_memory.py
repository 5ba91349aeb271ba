"""Measures the peak memory of one training step over one long sequence; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("bench-memory", sys.argv[1:]))

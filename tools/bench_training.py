"""Compares the throughput of training runs that differ in a few settings; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("bench-training", sys.argv[1:]))

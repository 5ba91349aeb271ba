"""Finds the layout of a run that fits a cluster and is fastest; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("plan", sys.argv[1:]))

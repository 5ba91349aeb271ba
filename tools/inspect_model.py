"""Counts parameters, FLOPs, state and activation bytes of a model, layer by layer; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("inspect", sys.argv[1:]))

"""Simulates training steps with one sequence over many ranks; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("simulate", sys.argv[1:]))

"""Trains small models on tasks that tell layers apart; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("experiments.fidelity.run", sys.argv[1:]))

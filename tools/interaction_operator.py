"""Measures the interaction operator of mixers: rank, heads, reach; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("experiments.interaction.run", sys.argv[1:]))

"""Measures the interaction operator of mixers: rank, heads, reach; `--help` lists the settings."""

import sys

from experiments.interaction.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Trains small models on tasks that tell layers apart; `--help` lists the settings."""

import sys

from experiments.fidelity.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

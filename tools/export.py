"""Writes a run's newest checkpoint as a folder that transformers loads; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("export", sys.argv[1:]))

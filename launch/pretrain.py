"""Pretrains a language model: `python launch/pretrain.py [key=value ...]`. Without overrides it runs the quickstart."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("pretrain", sys.argv[1:]))

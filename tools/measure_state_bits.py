"""Perplexity of a model whose states are kept in few bits; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("state-bits", sys.argv[1:]))

"""Perplexity and spikes of a pretrained model by the rate of spikes; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("spikes", sys.argv[1:]))

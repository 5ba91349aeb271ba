"""Continues a prompt with a trained model: `python launch/generate.py run=FOLDER prompt=TEXT [key=value ...]`."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("generate", sys.argv[1:]))

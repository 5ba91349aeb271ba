"""Converts a pretrained Transformer: `python launch/convert.py source=FOLDER_OR_GGUF target=MIXER [key=value ...]`."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("convert", sys.argv[1:]))

"""Converts a pretrained Transformer: `python launch/convert.py source=FOLDER_OR_GGUF target=MIXER [key=value ...]`."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("convert"))

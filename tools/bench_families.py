"""Compares a training step of a pretrained family's model with transformers' own; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("bench-families"))

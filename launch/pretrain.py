"""Pretrains a language model: `python launch/pretrain.py [key=value ...]`. Without overrides it runs the quickstart."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("pretrain"))

"""Checks a hybrid language model of transformers for what goes wrong in silence; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("audit"))

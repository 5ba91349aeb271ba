"""Compares a training step with transformers' own at equal weights; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("bench-training"))

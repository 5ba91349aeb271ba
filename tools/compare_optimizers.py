"""Compares optimizers at equal steps and at equal seconds; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("compare-optimizers"))

"""Compares recipes of conversion on one teacher, tokens and seconds; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("compare-recipes"))

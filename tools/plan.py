"""Finds the layout of a run that fits a cluster and is fastest; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("plan"))

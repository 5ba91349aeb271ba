"""Compares the throughput of training runs that differ in a few settings; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("compare-settings"))

"""Measures the peak memory of one training step over one long sequence; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("bench-memory"))

"""Measures All-Scan's schedules and the patterns other systems use; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("bench-all-scan"))

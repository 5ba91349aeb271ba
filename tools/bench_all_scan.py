"""Measures All-Scan's schedules and the patterns other systems use; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("bench-all-scan", sys.argv[1:]))

"""Measures All-Scan's schedules and the patterns other systems use; `--help` lists the settings."""

import sys

from seqtrain.benchmarks.all_scan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

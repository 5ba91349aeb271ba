"""Compares the throughput of training runs that differ in a few settings; `--help` lists the settings."""

import sys

from seqtrain.benchmarks.training import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Profiles a few training steps of any run: where time and memory go; `--help` lists the keys."""

import sys

from seqtrain.profiling.throughput import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

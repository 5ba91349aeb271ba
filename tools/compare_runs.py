"""Compares runs or profiles: losses bit for bit, speed, memory, settings; `--help` lists the settings."""

import sys

from seqtrain.profiling.compare_runs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

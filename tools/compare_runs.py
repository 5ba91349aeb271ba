"""Compares runs or profiles: losses bit for bit, speed, memory, settings; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("compare", sys.argv[1:]))

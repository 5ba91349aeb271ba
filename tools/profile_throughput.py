"""Profiles a few training steps of any run: where time and memory go; `--help` lists the keys."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("profile", sys.argv[1:]))

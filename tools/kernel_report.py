"""Compiles every Triton kernel for four GPUs, none of them here, and reports the code; `--help` lists the keys."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("kernel-report", sys.argv[1:]))

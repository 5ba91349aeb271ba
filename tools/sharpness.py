"""The Hessian's largest eigenvalue and trace at a run's checkpoints, beside 2 / lr; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("sharpness", sys.argv[1:]))

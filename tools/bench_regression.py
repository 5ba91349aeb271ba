"""Door of `seqtrain.benchmarks.regression`: CPU time of this tree beside that of an earlier commit."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("bench-regression", sys.argv[1:]))

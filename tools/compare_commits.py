"""Door of `seqtrain.benchmarks.replay`: numbers of this tree against those of an earlier commit."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("compare-commits", sys.argv[1:]))

"""Door of `seqtrain.benchmarks.replay`: numbers of this tree against those of an earlier commit."""

import sys

from seqtrain.benchmarks.replay import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

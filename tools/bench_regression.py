"""Door of `seqtrain.benchmarks.regression`: CPU time of this tree beside that of an earlier commit."""

import sys

from seqtrain.benchmarks.regression import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

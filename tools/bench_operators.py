"""Times the operators against other libraries' forms, SDPA and the processor's limit; `--help` lists the settings."""

import sys

from seqtrain.benchmarks.operators import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Times the operators against other libraries' forms, SDPA and the processor's limit; `--help` lists the settings."""

import sys

from seqtrain.cli import run

if __name__ == "__main__":
    sys.exit(run("bench-operators", sys.argv[1:]))

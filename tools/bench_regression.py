"""Door of `seqtrain.benchmarks.regression`: CPU time of this tree beside that of an earlier commit."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("bench-regression"))

"""Door of `seqtrain.benchmarks.replay`: numbers of this tree against those of an earlier commit."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("compare-commits"))

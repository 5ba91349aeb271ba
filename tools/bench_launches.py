"""Times the Python around launches of Triton kernels, without a GPU; `--help` lists the keys."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("bench-launches"))

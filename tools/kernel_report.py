"""Compiles every Triton kernel for four GPUs, none of them here, and reports the code; `--help` lists the keys."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("kernel-report"))

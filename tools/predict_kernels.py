"""Predicts the time of the recurrences' Triton kernels on an H100, with the model's error; `--help` lists the keys."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("predict-kernels"))

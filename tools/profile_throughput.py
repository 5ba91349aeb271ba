"""Profiles a few training steps of any run: where time and memory go; `--help` lists the keys."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("profile"))

"""Simulates training steps with one sequence over many ranks; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("simulate"))

"""Counts parameters, FLOPs, state and activation bytes of a model, layer by layer; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("inspect"))

"""Trains small models on tasks that tell layers apart; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("experiments.fidelity.run"))

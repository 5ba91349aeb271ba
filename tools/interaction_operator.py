"""Measures the interaction operator of mixers: rank, heads, reach; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("experiments.interaction.run"))

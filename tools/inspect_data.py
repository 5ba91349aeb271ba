"""Shows rows of a run's batches as the model will see them, and counts what is odd; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("inspect-data"))

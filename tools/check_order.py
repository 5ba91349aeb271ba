"""Shows that the communication of a step can't deadlock on GPUs; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("check-order"))

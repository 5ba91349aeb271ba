"""Compares runs or profiles: losses bit for bit, speed, memory, settings; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("compare"))

"""Times the operators against other libraries' forms, SDPA and the processor's limit; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("bench-operators"))

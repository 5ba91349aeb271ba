"""Times decoding beside transformers and beside reading the weights; `--help` lists the settings."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("bench-decode"))

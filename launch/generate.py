"""Continues a prompt with a trained model: `python launch/generate.py run=FOLDER prompt=TEXT [key=value ...]`."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("generate"))

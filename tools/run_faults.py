"""Door of `experiments.faults.run`: faults at random moments of small runs, and what became of each."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("experiments.faults.run"))

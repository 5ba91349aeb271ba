"""Door of `experiments.faults.nodes`: faults of machines, on hosts made of namespaces, and what became of each."""

from seqtrain.cli import run

if __name__ == "__main__":
    raise SystemExit(run("experiments.faults.nodes"))

"""The floors of the package: imports run one way, and importing it brings in nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "seqtrain"
# From the ground up; a floor may import itself, those below it, and what lies outside the floors (config, errors, ...).
FLOORS = (
    "kernels",
    "parallel",
    "layers",
    "mixers",
    "encoders",
    ("data", "models"),
    ("runtime", "profiling", "planning", "benchmarks", "audit"),
    "convert",
)
HEAVY = ("hydra", "omegaconf", "ray", "deepspeed", "triton", "transformers", "datasets", "wandb", "matplotlib")
HEAVY += ("pyarrow", "tokenizers", "seqtrain.mixers.gla")


def level(name: str) -> int:
    """The floor a part of the package is on; -1 for what knows none of them."""
    for index, floor in enumerate(FLOORS):
        if name == floor or (isinstance(floor, tuple) and name in floor):
            return index
    return -1


def imported(path: Path) -> set[str]:
    """The parts of seqtrain a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("seqtrain.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "testing":
        return
    for name in imported(path):
        assert level(name) <= level(own), f"{own} is below {name}"


def test_importing_is_light():
    modules = "seqtrain, seqtrain.kernels, seqtrain.mixers, seqtrain.models, seqtrain.data"
    code = f"import sys, {modules}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"

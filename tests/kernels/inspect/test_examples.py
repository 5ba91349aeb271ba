"""Examples of Triton backends: all of them are found, names are unique, a child process that fails says why."""

from importlib import import_module
from pathlib import Path

import pytest

import seqtrain.kernels
from seqtrain.kernels.inspect import examples as kernel_examples

BACKENDS = sorted(path.parent.name for path in Path(seqtrain.kernels.__path__[0]).glob("*/triton.py"))


@pytest.mark.parametrize("operator", BACKENDS)
def test_every_backend_joins_the_report_by_its_examples(operator):
    examples = import_module(f"seqtrain.kernels.{operator}.triton").EXAMPLES
    assert examples
    found = kernel_examples.find_examples()
    assert all(found[example.name] is example for example in examples)


def test_two_examples_of_one_name_are_refused(monkeypatch):
    module = import_module("seqtrain.kernels.gated_norm.triton")
    monkeypatch.setattr(module, "EXAMPLES", (*module.EXAMPLES, module.EXAMPLES[0]))
    with pytest.raises(ValueError, match=f"gated_norm.triton: a second example is called '{module.EXAMPLES[0].name}'"):
        kernel_examples.find_examples()


@pytest.mark.all
def test_what_went_wrong_while_counting_is_told():
    with pytest.raises(RuntimeError, match="counting failed: KeyError: 'no such example'"):
        kernel_examples.count_in_child(["no such example"])


def test_a_process_that_compiles_does_not_count():
    assert isinstance(next(iter(kernel_examples.find_examples().values())), kernel_examples.Example)
    with pytest.raises(RuntimeError, match="start it with TRITON_INTERPRET=1"):
        kernel_examples.count_example(next(iter(kernel_examples.find_examples())))

"""The example of a new mixer: one file, which the contract suite takes as it takes the others."""

from pathlib import Path

import pytest

import seqtrain.mixers
from seqtrain.mixers import MIXERS
from tests.mixers import test_contract as contract

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_mixer"


@pytest.fixture(autouse=True)
def _qrnn_is_there(monkeypatch):
    monkeypatch.setattr(seqtrain.mixers, "__path__", [*seqtrain.mixers.__path__, str(EXAMPLE)])
    monkeypatch.delitem(vars(MIXERS), "names", raising=False)
    yield
    vars(MIXERS).pop("names", None)


def test_it_is_found_and_keeps_the_contract():
    assert "qrnn" in MIXERS.names
    for fields in ({}, {"expand": 2}):
        contract.test_chunked_equals_reference("qrnn", fields, 63)
        contract.test_any_split_in_time_equals_the_whole("qrnn", fields)
        contract.test_step_after_step_equals_forward("qrnn", fields)
        contract.test_the_future_never_changes_the_past("qrnn", fields, 40)
        contract.test_packed_documents_equal_separate_ones("qrnn", fields)
        contract.test_all_parameters_learn("qrnn", fields)
        contract.test_states_have_the_shapes_and_bytes_they_say("qrnn", fields)
        contract.test_flops_are_those_of_the_products_and_the_operators("qrnn", fields, 0)

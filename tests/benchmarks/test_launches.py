"""The Python around launches: what is timed launches what a GPU would be given."""

import json

import pytest
import torch

from seqtrain import cli
from seqtrain.kernels import gpu
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="Triton interprets in this process")


@pytest.fixture(autouse=True)
def threads():
    """The command runs backward passes on its own thread."""
    yield
    torch.autograd.set_multithreading_enabled(True)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ([], [[2, 5], [2, 5], [2, 6]]),
        (["documents=true"], [[2, 5], [2, 5], [2, 6]]),
        (["cut=true"], [[4, 9], [4, 9], [4, 10]]),
    ],
)
def test_a_call_launches_as_many_kernels_as_on_a_gpu(how, expected, tmp_path, capsys):
    settings = ["operators=[delta_rule]", "rounds=1", "calls=2", f"output_dir={tmp_path}"]
    assert cli.run("bench-launches", [*settings, *how]) == 0
    rows = json.loads((tmp_path / "bench_launches.json").read_text())["rows"]
    assert [row["launches"] for row in rows] == expected
    assert all(row["forward"] > 0 and row["both"] > 0 for row in rows)
    assert "per channel" in capsys.readouterr().out
    assert gpu.refuses("cpu") == "needs a CUDA device"


def test_a_row_is_cut_or_documents_are_packed(capsys):
    assert cli.run("bench-launches", ["documents=true", "cut=true"]) == 2
    assert capsys.readouterr().err.startswith("error: documents=true and cut=true: only a row is cut here")


def test_a_call_in_order_is_checked_once_and_one_out_of_order_each_time():
    from seqtrain.kernels import delta_rule

    q, beta = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2)
    first = delta_rule.check((q, q, q, beta))
    assert delta_rule.check((q, q, q, beta)) is first == {"B": 1, "T": 3, "H": 2, "K": 4, "V": 4}
    for wrong, complaint in (((q, q, q, q), "beta has shape"), ((q, q, q, beta.long()), "beta has dtype")):
        for _ in range(2):
            with pytest.raises(ValueError, match=f"delta_rule: {complaint}"):
                delta_rule.check(wrong)

"""The interaction operator against cases whose rank, reach and blocks are known."""

import json

import pytest
import torch

from experiments.interaction.operator import interaction, interaction_rank, mixing_blocks, whole_blocks
from seqtrain.mixers import MIXERS, LayerShape
from tests.command_cases import run_command

WIDTH, TOKENS = 8, 12


def build(name: str, heads: int = 1, width: int = WIDTH, **fields):
    torch.manual_seed(0)
    return MIXERS.get(name)(MIXERS.get(name).Config(**fields), LayerShape(width, heads)).double()


def row(tokens: int = TOKENS, width: int = WIDTH):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("attention", {}),
        ("linear_attention", {}),
        ("retnet", {}),
        ("gla", {}),
        ("delta_net", {"conv_width": 0, "activation": "none"}),
        # Two operators, of which the second only takes a mean; and softmax within blocks of tokens.
        ("mala", {"conv_width": 0}),
        ("trans_normer", {"diag_share": 1.0, "block": 6}),
        ("streaming_attention", {"window": 4, "sinks": 2}),
    ],
)
def test_mixers_of_scalar_weights_have_a_rank_of_their_heads(name, fields, heads):
    assert interaction(build(name, heads, **fields), row()).rank == heads


def test_memory_and_window_of_a_converted_layer_are_both_measured():
    mixer, x = build("linearized_attention", window=4, sinks=2, memory="gla"), row()
    memory, both = mixing_blocks(mixer, x)
    # The memory's first tokens are those that have left the window and are no sinks.
    assert bool((memory[:6] == 0).all())
    assert bool((memory[7, 2] != 0).any())
    assert bool((both.diagonal().abs().sum((0, 1)) > 0).all())


def linear_ssm(decays: list[float], frequencies: list[float]):
    """S5 with these eigenvalues, steps of one token."""
    mixer = build("s5", width=2 * len(decays), blocks=1)
    with torch.no_grad():
        mixer.decay_log.copy_(torch.tensor(decays, dtype=torch.float64).log())
        mixer.frequency.copy_(torch.tensor(frequencies, dtype=torch.float64))
        mixer.step_log.zero_()
    return mixer


@pytest.mark.parametrize(
    ("decays", "frequencies", "tokens", "rank"),
    [
        # So many different real decays, so many heads; equal ones share a head.
        ([0.1, 0.5, 1.5], [0.0, 0.0, 0.0], 16, 3),
        ([0.1, 0.5, 0.5], [0.0, 0.0, 0.0], 16, 2),
        ([0.5, 0.5, 0.5], [0.0, 0.0, 0.0], 16, 1),
        # A state that turns stands for two: itself and its conjugate.
        ([0.1, 0.1, 0.3], [0.4, 1.1, 2.0], 16, 6),
        ([0.1, 0.3, 0.3], [0.4, 2.0, 2.0], 16, 4),
        # No more than there are distances.
        ([0.1, 0.5, 1.5], [0.0, 0.0, 0.0], 2, 2),
    ],
)
def test_a_linear_ssm_needs_a_head_for_every_different_eigenvalue(decays, frequencies, tokens, rank):
    assert interaction(linear_ssm(decays, frequencies), row(tokens, 6)).rank == rank


def test_blocks_of_attention_times_the_input_give_its_output():
    mixer, x = build("attention", heads=2), row()
    [blocks] = mixing_blocks(mixer, x)
    assert blocks.shape == (TOKENS, TOKENS, WIDTH, WIDTH)
    rebuilt = mixer.out(torch.einsum("ijod,jd->io", blocks, x))
    torch.testing.assert_close(rebuilt, mixer(x[None])[0][0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("measure", [lambda *x: mixing_blocks(*x)[0], whole_blocks], ids=["mixing", "whole"])
@pytest.mark.parametrize("name", ["gated_delta_net", "mamba2", "tensor_attention", "s5"])
def test_no_block_reaches_back_from_the_future(measure, name):
    blocks = measure(build(name, blocks=1) if name == "s5" else build(name), row())
    assert bool((blocks[torch.triu_indices(TOKENS, TOKENS, 1).unbind()] == 0).all())
    assert bool((blocks.diagonal().abs().sum((0, 1)) > 0).all())


def test_the_whole_jacobian_is_the_derivative():
    mixer, x = build("gated_delta_net", heads=2), row()
    toward, step = torch.randn_like(x), 1e-5
    with torch.no_grad():
        ahead, behind = (mixer((x + sign * step * toward)[None])[0][0] for sign in (1, -1))
    found = torch.einsum("ijod,jd->io", whole_blocks(mixer, x), toward)
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


def test_rank_counts_directions_above_the_tolerance():
    blocks = torch.zeros(3, 3, 2, 2, dtype=torch.float64)
    blocks[0, 0, 0, 0], blocks[1, 0, 0, 1], blocks[2, 2, 1, 1] = 1e-3, 5e-5, 1e-10
    assert interaction_rank(blocks, tolerance=1e-9)[:2] == (3, 1)
    assert interaction_rank(blocks, tolerance=1e-2)[:2] == (2, 1)


def test_the_mixer_is_left_as_it_was():
    mixer = build("delta_net").float()
    before = {name: weight.clone() for name, weight in mixer.state_dict().items()}
    interaction(mixer, row())
    for name, weight in mixer.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])
    assert all(weight.grad is None for weight in mixer.parameters())


def test_an_operator_whose_values_are_unknown_is_named():
    mixer = build("attention")

    def unknown(*tensors, **options):
        raise AssertionError("not reached")

    mixer.forward = lambda x, state=None, *, sequence, stream=None: sequence.run(unknown, x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"^interaction: unknown isn't known to be linear in values it is given$"):
        mixing_blocks(mixer, row())


COMMAND = "experiments.interaction.run"


def test_ranks_are_the_heads_where_they_must_be(tmp_path):
    sizes = ("mixers=[attention,delta_net,s5]", "heads=[2,3]", "width=8", "tokens=10", "threads=1")
    done = run_command(COMMAND, *sizes, f"output_dir={tmp_path}")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "interaction_operator.json").read_text())
    ranks = {(row["mixer"], row["heads"]): row["found"]["rank"] for row in report["mixers"]}
    # The short convolution is off: with it, DeltaNet's neighbors would mix before the operator.
    assert ranks["attention", 2] == ranks["delta_net", 2] == 2
    assert ranks["s5", 2] == ranks["s5", 3] > 2
    assert all(len(row["found"]["reach"]) == 10 for row in report["mixers"])
    # What does not fit is skipped by name.
    assert set(report["skipped"]) == {"attention, 3 heads", "delta_net, 3 heads"}
    assert "skipped attention, 3 heads: model.width=8: must be divisible by model.heads=3" in done.out
    assert "rank = heads needed" in done.out
    for name in ("spectra.png", "reach.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

"""Models of other people's families: what transformers computes, exactly what was stored, and cut like any other."""

import json
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from seqtrain.data.batches import even_offsets
from seqtrain.errors import ConfigError
from seqtrain.mixers import WHOLE
from seqtrain.models import from_pretrained, generate, save_pretrained
from seqtrain.parallel import SequenceContext, ShardedSequence, flush_scans
from seqtrain.parallel.testing import run_ranks
from seqtrain.testing import relative_error
from tests.command_cases import refused
from tests.models.family_cases import CASES, make, make_with_pictures, our_gradients, some_tokens, their_gradients
from tests.models.tiny import assert_same_gradients

# One case of each part in the tier of changes, more in CI's; the grid by hand.
QUICK = ("qwen3_next", "falcon_h1")
CI = (
    "olmo_hybrid",
    "nemotron_h",
    "jamba",
    "gemma3_text",
    "recurrent_gemma",
    "lfm2",
    "phi3",
    "minimax",
    "bailing_hybrid",
)
TIERS = {name: () if name in QUICK else pytest.mark.all if name in CI else pytest.mark.full for name in CASES}
families = pytest.mark.parametrize("name", [pytest.param(name, marks=tier) for name, tier in TIERS.items()])
LIMIT = 1e-5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a case, and transformers' model of it."""
    made = {}

    def get(name):
        if name not in made:
            model, folder = make(name), tmp_path_factory.mktemp(name) / "model"
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return get


@families
def test_logits_and_gradients_are_those_of_transformers(saved, tmp_path, name):
    theirs, folder = saved(name)
    tokens = some_tokens(2, 70)
    theirs.zero_grad(set_to_none=True)
    expected = theirs(tokens, labels=tokens)
    expected.loss.backward()
    ours = from_pretrained(folder)
    logits, _ = ours(tokens, all_logits=True)
    assert relative_error(logits, expected.logits) < LIMIT
    (ours(tokens[:, :-1], tokens[:, 1:]) / (2 * 69)).backward()
    truth, came = their_gradients(theirs, tmp_path / "gradients"), our_gradients(ours)
    assert came.keys() == truth.keys()
    whole = max(value.norm() for value in truth.values())
    for key, value in truth.items():
        # A gradient that vanishes in exact arithmetic is rounding on either side.
        assert (came[key] - value).norm() <= LIMIT * max(value.norm(), whole / 30), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@families
def test_what_is_read_is_written_back_bit_for_bit(saved, tmp_path, name, dtype):
    theirs, folder = saved(name)
    if dtype != torch.float32:
        folder = tmp_path / "narrow"
        make(name).to(dtype).save_pretrained(folder)
    save_pretrained(from_pretrained(folder), tmp_path / "again")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        assert torch.equal(after[key], value), key
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    _, info = type(theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info


@families
@torch.no_grad()
def test_greedy_generation_is_that_of_transformers(saved, name):
    theirs, folder = saved(name)
    prompt = some_tokens(1, 20)
    expected = theirs.generate(prompt, max_new_tokens=32, do_sample=False)[:, 20:]
    assert torch.equal(generate(from_pretrained(folder), prompt, max_new_tokens=32, temperature=0), expected)


@pytest.mark.parametrize(
    "name", [pytest.param("gemma3", marks=pytest.mark.all), pytest.param("qwen3_5", marks=pytest.mark.full)]
)
@torch.no_grad()
def test_what_sees_pictures_is_carried_along(tmp_path, name):
    theirs, tokens = make_with_pictures(name), some_tokens(1, 30)
    theirs.save_pretrained(tmp_path / "model")
    ours = from_pretrained(tmp_path / "model")
    assert relative_error(ours(tokens, all_logits=True)[0], theirs(tokens).logits) < LIMIT
    ours.blocks[0].mixer_norm.weight.add_(1)
    save_pretrained(ours, tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "again"))
    assert any("vis" in key for key in before)
    assert [key for key in before if not torch.equal(before[key], after[key])] == [
        next(key for key in before if key.endswith("layers.0.input_layernorm.weight") and "vis" not in key)
    ]


def loss_and_gradients(model, tokens, labels, sequence=WHOLE):
    model.zero_grad(set_to_none=True)
    loss = model(tokens, labels, sequence=sequence)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@families
def test_packed_documents_are_separate_ones(saved, name):
    model = from_pretrained(saved(name)[1])
    tokens, edges = some_tokens(1, 91), [0, 13, 14, 60, 90]
    packed = SequenceContext(torch.tensor(edges, dtype=torch.int32))
    came = loss_and_gradients(model, tokens[:, :-1], tokens[:, 1:], packed)
    total, sums = 0, {}
    for start, end in pairwise(edges):
        loss, gradients = loss_and_gradients(model, tokens[:, start:end], tokens[:, start + 1 : end + 1])
        total = total + loss
        sums = {key: value + sums.get(key, 0) for key, value in gradients.items()}
    assert_same_gradients(came, (total, sums), LIMIT)


@families
@torch.no_grad()
def test_nothing_leaks_into_other_documents_or_the_past(saved, name):
    model = from_pretrained(saved(name)[1])
    tokens, sequence = some_tokens(1, 90), SequenceContext(torch.tensor([0, 20, 55, 90], dtype=torch.int32))
    changed = tokens.clone()
    changed[:, 30:40] = (changed[:, 30:40] + 7) % 50 + 3
    before, after = (model(row, all_logits=True, sequence=sequence)[0][0] for row in (tokens, changed))
    assert torch.equal(before[:20], after[:20])
    assert torch.equal(before[55:], after[55:])
    torch.testing.assert_close(after[20:30], before[20:30], rtol=1e-5, atol=1e-6)
    assert not torch.equal(before[30:55], after[30:55])


@pytest.mark.parametrize(
    "names",
    [
        pytest.param((*QUICK, *CI), marks=pytest.mark.all, id="CI"),
        pytest.param(sorted({*CASES} - {*QUICK, *CI}), marks=pytest.mark.full, id="others"),
    ],
)
def test_a_row_cut_over_ranks_is_the_whole_row(saved, names):
    """Two and four ranks, documents across the cuts; many families in one launch."""
    folders = {name: saved(name)[1] for name in names}
    tokens, boundaries = some_tokens(1, 92), torch.tensor([0, 13, 14, 60, 91], dtype=torch.int32)
    whole = SequenceContext(boundaries)
    truth = {
        name: loss_and_gradients(from_pretrained(folder), tokens[:, :-1], tokens[:, 1:], whole)
        for name, folder in folders.items()
    }

    def run(rank):
        found = {}
        groups = {ranks: dist.new_group(list(range(ranks))) for ranks in (2, 4)}
        for name, folder in folders.items():
            model = from_pretrained(folder)
            for ranks, group in groups.items():
                if rank >= ranks:
                    continue
                offsets = even_offsets(91, ranks)
                own = slice(offsets[rank], offsets[rank + 1])
                sequence = ShardedSequence(group=group, offsets=offsets, cu_seqlens=boundaries)
                loss, gradients = loss_and_gradients(model, tokens[:, own], tokens[:, 1:][:, own], sequence)
                flush_scans(group)
                for tensor in (loss, *gradients.values()):
                    dist.all_reduce(tensor, group=group)
                found[name, ranks] = loss, {key: value.clone() for key, value in gradients.items()}
        dist.barrier()
        return found

    for (name, ranks), came in run_ranks(4, run)[0].items():
        assert_same_gradients(came, truth[name], LIMIT, what=f"{name} on {ranks}")


@pytest.mark.parametrize(
    ("name", "key", "value", "allowed"),
    [
        ("mamba", "hidden_act", "gelu", "silu"),
        ("bamba", "hidden_act", "gelu", "silu"),
        ("nemotron_h", "mamba_hidden_act", "relu", "silu"),
        ("nemotron_h", "mlp_bias", True, False),
        ("gemma3_text", "use_bidirectional_attention", True, False),
        ("recurrent_gemma", "hidden_activation", "gelu", "gelu_pytorch_tanh"),
    ],
)
def test_what_a_family_is_not_read_with_is_named(saved, tmp_path, name, key, value, allowed):
    config = json.loads((saved(name)[1] / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved(name)[1] / "model.safetensors").read_bytes())
    with refused(f"source={tmp_path}: {key}={value} is not supported; it must be {allowed}", ConfigError):
        from_pretrained(tmp_path)


def test_a_model_that_came_from_nowhere_is_not_written(tmp_path):
    from tests.models.tiny import build

    with refused("save_pretrained: this model did not come from from_pretrained", ConfigError):
        save_pretrained(build(("gla",)), tmp_path / "model")

"""Batches as Hugging Face's collators make them, padded or packed, in every mixer: each sample as if it were alone."""

import dataclasses
import typing
from functools import partial

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from seqtrain.errors import SeqtrainError
from seqtrain.mixers import MIXERS
from seqtrain.models import ModelConfig
from seqtrain.models.huggingface import SeqtrainForCausalLM
from seqtrain.models.huggingface_config import SeqtrainConfig
from seqtrain.testing import relative_error
from tests.command_cases import refused

VOCAB = 40
# Values at which short samples pass through what an option does.
SMALL = {"window": 6, "sinks": 2, "chunk": 5, "block": 4, "state": 8, "slots": 4}


def options(name):
    """Fields of mixer `name`: the small ones, and every other choice of each field that has few."""
    fields = {field.name: field.default for field in dataclasses.fields(MIXERS.get(name).Config)}
    hints = typing.get_type_hints(MIXERS.get(name).Config)
    small = {key: value for key, value in SMALL.items() if key in fields}
    recurrences = [each for each in MIXERS.names if MIXERS.get(each).recurrence is not None]
    some = {
        "window": (0, 1, 3),
        "sinks": (0,),
        "query_group": (2,),
        "expand": (2,),
        "degree": (4,),
        "memory": recurrences,
    }
    yield small
    for field, default in fields.items():
        choices = typing.get_args(hints[field]) if typing.get_origin(hints[field]) is typing.Literal else ()
        choices = (True, False) if hints[field] is bool else some.get(field, choices)
        yield from (small | {field: choice} for choice in choices if choice != default)


def build(name="gated_delta_net", fields=None, *, group=0, **shape):
    torch.manual_seed(2)
    shape = {
        "layers": (name,),
        "depth": 1,
        "width": 32,
        "heads": 4,
        "initializer_range": 0.1,
        "groups": (group,),
        **shape,
    }
    mixers = {} if fields is None else {name: MIXERS.get(name).Config(**fields)}
    mixers |= {each: MIXERS.get(each).Config() for each in shape["layers"] if each not in mixers}
    return SeqtrainForCausalLM(SeqtrainConfig.of(ModelConfig(**shape), mixers, VOCAB, pad_token_id=0)).eval()


def tokens(count, seed):
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


SAMPLES = [tokens(length, seed=length) for length in (3, 17, 9)]
MORE = torch.stack([tokens(5, seed=row) for row in range(3)])


def padded(rows, side, length):
    """`rows` as one batch `[N,length]`, and its mask."""
    batch = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, sample in enumerate(rows):
        place = slice(len(sample)) if side == "right" else slice(length - len(sample), None)
        batch[row, place], mask[row, place] = sample, 1
    return batch, mask


def assert_alike(came, expected):
    for one, other in zip(came, expected, strict=True):
        assert relative_error(one, other) < 1e-4


def check_padding(model, alone, side):
    """A padded batch, tokens behind it without padding, one alone, and padding in the middle."""
    batch, mask = padded(SAMPLES, side, 17)
    behind, behind_mask = padded([row[3:] for row in MORE], "left", 4)
    cache, seen = None, [mask]
    parts = [[] for _ in SAMPLES]
    for given, real in ((batch, mask), (MORE[:, :2], None), (MORE[:, 2:3], None), (behind, behind_mask)):
        seen.append(torch.ones_like(given) if real is None else real)
        out = model(given, attention_mask=torch.cat(seen[1:], 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for row, logits in enumerate(out.logits):
            parts[row].append(logits[seen[-1][row].bool()])
    assert_alike([torch.cat(logits) for logits in parts], alone)


def check_packing(model, alone):
    """Samples behind each other in a row, and tokens behind the last."""
    row = torch.cat(SAMPLES)[None]
    out = model(row, position_ids=torch.cat([torch.arange(len(each)) for each in SAMPLES])[None], use_cache=True)
    last = model(MORE[2:], past_key_values=out.past_key_values)
    expected = [logits[: len(sample)] for logits, sample in zip(alone, SAMPLES, strict=True)]
    assert_alike([out.logits[0], last.logits[0]], [torch.cat(expected), alone[2][9:]])


@torch.no_grad()
def check_batches(name, fields, group):
    try:
        model = build(name, fields, group=group)
        alone = [model(torch.cat(sample)[None]).logits[0] for sample in zip(SAMPLES, MORE, strict=True)]
    except (SeqtrainError, ValueError) as error:
        # Not every choice goes with the others.
        if isinstance(error, SeqtrainError) or "groups of" in str(error):
            return
        raise
    for side in ("left", "right"):
        check_padding(model, alone, side)
    check_packing(model, alone)


@torch.no_grad()
def check_half(name, fields, dtype, limit):
    """One pass, and token by token, in a narrow dtype."""
    try:
        model = build(name, fields)
    except SeqtrainError:
        return
    given = torch.stack([tokens(10, seed=row) for row in range(2)])
    wide, cache, steps = model(given).logits, None, []
    whole = model.to(dtype)(given).logits
    for token in given.split(1, 1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert relative_error(torch.cat(steps, 1), whole) < limit
    assert relative_error(whole, wide) < limit


NARROW = [(torch.bfloat16, 0.05), (torch.float16, 0.01)]


@pytest.mark.parametrize("name", MIXERS.names)
def test_padding_and_packing_change_nothing_in_any_mixer(name):
    check_batches(name, next(options(name)), 0)


@pytest.mark.parametrize("name", MIXERS.names)
def test_every_mixer_runs_in_half_precision(name):
    for dtype, limit in NARROW:
        check_half(name, next(options(name)), dtype, limit)


@pytest.mark.full
@pytest.mark.parametrize("name", MIXERS.names)
def test_nor_with_any_option_or_group(name):
    for fields in options(name):
        for group in (0, 7):
            check_batches(name, fields, group)
        for dtype, limit in NARROW:
            check_half(name, fields, dtype, limit)


@pytest.mark.all
@pytest.mark.parametrize("name", ["attention", "intra_hybrid", "linearized_attention", "sliding_attention", "gla"])
def test_nor_in_groups(name):
    check_batches(name, next(options(name)), 7)


FLATTEN = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)


@pytest.mark.parametrize("key", ["position_ids", "seq_idx", "cu_seq_lens_q"])
@torch.no_grad()
def test_each_way_to_say_where_packed_samples_start(key):
    model = build(layers=("gated_delta_net", "attention"), depth=2)
    batch = FLATTEN([{"input_ids": sample.tolist()} for sample in SAMPLES])
    packed = model(batch["input_ids"], labels=batch["labels"], **{key: batch[key]})
    alone = [model(sample[None], labels=sample[None]) for sample in SAMPLES]
    assert_alike([packed.logits[0]], [torch.cat([each.logits[0] for each in alone])])
    mean = sum(each.loss * (len(sample) - 1) for each, sample in zip(alone, SAMPLES, strict=True)) / 26
    assert float(packed.loss) == pytest.approx(float(mean), rel=1e-5)
    # A start is no label, whether or not the collator says so.
    assert model(batch["input_ids"], labels=batch["input_ids"], **{key: batch[key]}).loss == packed.loss
    assert_alike([model(**batch).logits], [packed.logits])


ONE, MASK = SAMPLES[1][None], torch.ones(1, 17, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.tensor([[*range(9), *range(20, 28)]])}, "position_ids leave positions out"),
        ({"position_ids": torch.arange(16)[None]}, "position_ids has shape (1, 16), expected [1, 17]"),
        ({"seq_idx": torch.arange(17)}, "seq_idx has shape (17,), expected [1, 17]"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seq_lens_q=[0, 9]: expected to rise from 0 to the 17 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 17]), "cu_seq_lens_k": torch.tensor([0, 9, 17])}, "cu_seq_lens_k: "),
        ({"cu_seq_lens_q": torch.tensor([0, 17]), "attention_mask": MASK.tril(-3)}, "cu_seq_lens_q: an attention_mask"),
        ({"attention_mask": MASK[:, :9]}, "attention_mask has shape (1, 9), expected [1, 17]"),
        ({"attention_mask": MASK[None, None]}, "attention_mask has shape (1, 1, 1, 17)"),
        ({"attention_mask": MASK.cumsum(1)}, "attention_mask holds other numbers than 0 and 1; number packed"),
        ({"inputs_embeds": torch.zeros(1, 17, 32)}, "input_ids, inputs_embeds: give exactly one"),
        ({"output_attentions": True}, "output_attentions: these layers hold no attention weights"),
        ({"past_key_values": ()}, "past_key_values is a tuple, expected a StateCache"),
    ],
)
def test_what_cannot_be_followed_is_one_line(given, message):
    with refused(message, ValueError):
        build()(ONE, **given)


def test_no_sample_starts_behind_a_cache():
    model = build()
    cache = model(ONE).past_key_values
    with refused("position_ids begin anew behind a cache", ValueError):
        model(ONE, past_key_values=cache, position_ids=torch.arange(17)[None])
    with refused("can't be packed behind the 17 tokens of a cache", ValueError):
        model(ONE, past_key_values=cache, seq_idx=torch.zeros(1, 17))


class Rows(torch.utils.data.Dataset):
    """Eight rows, of which later ones have fewer labels."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = tokens(33, seed=index)
        return {"input_ids": row, "labels": row.masked_fill(torch.arange(33) < 4 * index, -100)}


@pytest.mark.all
def test_accumulation_steps_do_not_change_a_trainers_gradient(tmp_path):
    model, seen = build(), []
    fixed = {"max_steps": 1, "learning_rate": 0.0, "report_to": [], "logging_steps": 1, "use_cpu": True, "seed": 0}
    fixed |= {"save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1e9}
    for rows in (8, 2):
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        trainer = Trainer(model, TrainingArguments(str(tmp_path), **fixed, **sizes), train_dataset=Rows())
        trainer.train()
        seen.append([trainer.state.log_history[0][key] for key in ("grad_norm", "loss")])
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


def test_uneven_ranks_have_the_loss_of_all_their_tokens():
    """What each rank gives of its own tokens adds up to the mean over the tokens of all of them."""
    model, rows = build(), [Rows()[index] for index in range(8)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    items = (batch["labels"][:, 1:] != -100).sum()
    parts = [
        model(**{key: value[part] for key, value in batch.items()}, num_items_in_batch=items).loss
        for part in (slice(6), slice(6, 8))
    ]
    assert float(sum(parts)) == pytest.approx(float(model(**batch).loss), rel=1e-5)


@torch.no_grad()
def test_generation_by_embeddings_and_in_chunks():
    model = build(layers=("gated_delta_net", "attention", "sliding_attention"), depth=3)
    batch, mask = padded(SAMPLES, "left", 17)
    greedy = partial(model.generate, attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected = greedy(batch)[:, 17:]
    assert torch.equal(greedy(batch, prefill_chunk_size=5)[:, 17:], expected)
    assert torch.equal(greedy(inputs_embeds=model.get_input_embeddings()(batch)), expected)


@torch.no_grad()
def test_hidden_states_are_what_enters_blocks_and_the_head():
    model = build(layers=("gla",), depth=2)
    batch, mask = padded(SAMPLES, "left", 17)
    states = model(batch, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(SAMPLES[0][None], output_hidden_states=True).hidden_states
    assert_alike([each[0, 14:] for each in states], [each[0] for each in alone])
    assert torch.equal(states[0], model.model.embedding(batch) * mask[..., None])
    assert torch.equal(model.model.head(alone[-1]), model(SAMPLES[0][None]).logits)


def test_what_a_state_cannot_do_is_said():
    model = build()
    for given, message in (
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported with stateful models"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: these layers hold no"),
        ({"temprature": 0.5}, "temprature"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(ONE, max_new_tokens=4, do_sample=False, **given)
    with pytest.raises(TypeError, match="unexpected keyword argument 'token_type_ids'"):
        model(ONE, token_type_ids=ONE)
    with pytest.raises(ValueError, match="assistant_model: a recurrent state can't be taken back"):
        model.generate(ONE, max_new_tokens=4, do_sample=False, is_assistant=True)

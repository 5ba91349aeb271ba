"""Figures by part of the model and of the data: those of a plain loop on one rank, whatever the layout."""

import pytest
import torch

from seqtrain.data import open_corpus
from seqtrain.data.batches import IGNORED
from seqtrain.models import LanguageModel
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.runtime import pictures
from seqtrain.runtime.measures import group_of
from seqtrain.runtime.optimizers import build_optimizer, parameter_groups, set_learning_rate
from seqtrain.runtime.pictures import draw_figures
from seqtrain.runtime.schedule import learning_rate
from tests.runtime.runtime_cases import (
    change,
    grid,
    losses,
    records,
    session_for,
    short_documents,
    small_config,
    train_on,
    write_text,
)

LAYOUTS = {
    "alone": {"parallel": grid(1, 1, 0)},
    "zero 1": {"parallel": grid(2, 1, 1)},
    "sequence, zero 2": {"parallel": grid(1, 2, 2)},
    "zero 3": {"parallel": grid(2, 1, 3)},
    "zero 0": {"parallel": grid(1, 2, 0)},
    "segments": {"train": {"segment_tokens": 15}, "parallel": grid(1, 2, 3)},
}


def plainly(config) -> dict[str, float]:
    """The figures of the first step, from whole gradients and the losses of single tokens."""
    session = session_for(config)
    corpus = open_corpus(session.corpus, config.data)
    model = LanguageModel(config.model, config.mixer, corpus.vocab_size, seed=config.seed)
    sizes = {"sequence_length": config.train.sequence_length, "batch_size": config.train.batch_size}
    batch = corpus.training_batches(seed=config.seed, **sizes).at(0)
    sequence = SequenceContext(cu_seqlens=batch.cu_seqlens)
    optimizer = build_optimizer(parameter_groups(model.parameters(), 0.1), config.optimizer, finite=True, clipping=1.0)
    rate = learning_rate(config.schedule, peak=config.optimizer.lr, steps=config.train.steps, step=0)
    set_learning_rate(optimizer.param_groups, rate)
    (model(batch.tokens, batch.labels, sequence=sequence) / batch.label_count).backward()
    logits = model(batch.tokens, sequence=sequence, all_logits=True)[0][0]
    terms = torch.nn.functional.cross_entropy(logits, batch.labels[0], reduction="none").tolist()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer.step()
    found, places = {"grad_norm_l1": sum(each.abs().sum() for each in gradients.values()).item()}, {}
    for group in {group_of(name) for name in before}:
        names = [name for name in before if group_of(name) == group]
        moved = [dict(model.named_parameters())[name] - before[name] for name in names]
        found[f"grad_norm/{group}"] = torch.cat([gradients[name].flatten() for name in names]).norm().item()
        found[f"update_norm/{group}"] = torch.cat([each.flatten() for each in moved]).norm().item()
    starts, place = set(batch.cu_seqlens.tolist()), 0
    for token, loss in enumerate(terms):
        place = 0 if token in starts else place + 1
        if batch.labels[0, token] != IGNORED:
            first = 2 ** (place.bit_length() - 1) if place else 0
            name = f"{first}-{2 * first - 1}" if first > 1 else f"{first}"
            places.setdefault(f"loss_at/{name}", []).append(loss)
            source = corpus.entries[batch.sources[token // config.train.sequence_length]].name
            places.setdefault(f"loss_of/{source}", []).append(loss)
    return found | {name: sum(each) / len(each) for name, each in places.items()}


@pytest.mark.all
def test_measured_parts_are_those_of_a_plain_loop_in_every_layout(tmp_path):
    sources = (
        {"text": short_documents(tmp_path / "short"), "name": "short", "weight": 0.6},
        {"text": str(write_text(tmp_path / "words")), "name": "words", "weight": 0.4},
    )
    base = small_config(
        tmp_path,
        *("gated_delta_net", "attention"),
        data={"path": "", "sources": sources},
        train={"steps": 2, "sequence_length": 37},
        schedule={"warmup_fraction": 0.0},
        evaluation={"max_tokens": 148},
        checkpoint={"every": 0},
        metrics={"every": 1},
    )
    configs = {name: change(base, name.replace(" ", "-"), **sections) for name, sections in LAYOUTS.items()}
    silent = change(configs["alone"], "silent", metrics={"every": 0})
    train_on(*configs.values(), silent)
    expected = plainly(base)
    groups = {name for name in expected if name.startswith("update_norm/")}
    assert groups == {f"update_norm/{group}" for group in ("embedding", "mixers", "mlp", "norms")}
    assert {name for name in expected if name.startswith("loss_of/")} == {"loss_of/short", "loss_of/words"}
    for layout, config in configs.items():
        first, second = records(config)
        came = {name: first[name] for name in expected}
        assert came == pytest.approx(expected, rel=2e-4), layout
        parts = {name for name in first if name.startswith(("grad_norm/", "update_norm/", "loss_at/", "loss_of/"))}
        assert parts == {name for name in expected if "/" in name}
        squares = sum(first[name] ** 2 for name in first if name.startswith("grad_norm/"))
        assert squares**0.5 == pytest.approx(first["grad_norm"], rel=1e-5), layout
        assert second["grad_norm_l1"] != first["grad_norm_l1"]
        assert 0 < first["mfu"] < 1
        assert first["peak_memory_bytes"] > 2**20
    # To look changes nothing.
    assert losses(silent) == losses(configs["alone"])
    assert "mfu" not in records(silent)[0]


def test_every_figure_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: drawn.append(figure))
    plain = {"loss": 1.0, "lr": 0.1, "tokens_per_second": 9.0}
    measured = {
        "mfu": 0.3,
        "peak_memory_bytes": 2**30,
        "grad_norm/mlp": 1.0,
        "update_norm/mlp": 0.1,
        "loss_of/code": 2.0,
    }
    places = {"loss_at/16-31": 1.0, "loss_at/0": 4.0, "loss_at/2-3": 2.0}
    draw_figures([{"step": 1, **plain}], tmp_path / "figures.png")
    assert not drawn, "nothing was measured"
    rows = [{"step": step, **plain, **(measured | places if step % 2 == 0 else {})} for step in range(1, 9)]
    draw_figures(rows, tmp_path / "figures.png")
    [figure] = drawn
    axes = {each.get_ylabel(): each for each in figure.axes}
    assert len(axes) == 8, "the learning rate, speed, MFU, memory, two norms, the loss by place and by source"
    assert all(line.get_xydata().size for each in axes.values() for line in each.get_lines())
    last = axes["loss, nats per token"].get_lines()[-1]
    assert last.get_xydata().tolist() == [[0, 4], [2, 2], [16, 1]]


@pytest.mark.all
def test_measured_parts_of_an_optimizer_of_whole_matrices(tmp_path):
    base = small_config(tmp_path, optimizer={"name": "muon"}, train={"steps": 2}, metrics={"every": 2})
    configs = [change(base, f"{case}", parallel=grid(*case)) for case in ((1, 1, 0), (2, 1, 1), (2, 1, 3))]
    train_on(*configs)
    expected, *others = [{key: value for key, value in records(config)[1].items() if "/" in key} for config in configs]
    assert expected["update_norm/mixers"] > 0
    for came in others:
        assert came == pytest.approx(expected, rel=1e-2)

"""The stages of recipes on the runtime: errors fall, a killed training resumes to the same weights, ranks agree."""

import dataclasses
import json
import os
import random
import signal
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from seqtrain import load
from seqtrain.config import compose_config, conf_dir
from seqtrain.convert import convert, read_convert_config
from seqtrain.convert.architecture import architecture_of, student_of
from seqtrain.convert.calibrate import calibrate
from seqtrain.convert.sources import open_source
from seqtrain.convert.stages import START, ConversionManifest, Training
from seqtrain.convert.tasks import Distillation, Pair, Transfer, training_data
from seqtrain.convert.weights import load_teacher, student_on
from seqtrain.data import prepare
from seqtrain.errors import ConfigError
from seqtrain.initialization import materialize_all
from seqtrain.parallel.testing import RankError
from seqtrain.runtime import checkpoint
from seqtrain.runtime.lease import take
from seqtrain.runtime.run_folder import RunFolder
from seqtrain.runtime.worker import Session, train
from tests.command_cases import refused
from tests.convert.convert_cases import save_tokenizer
from tests.runtime.runtime_cases import losses, on_ranks

RECIPES = sorted(path.stem for path in (conf_dir() / "recipe").glob("[!_]*.yaml"))
MATRICES = ("mixer.qkv", "mixer.out", "mlp.up", "mlp.out")
# Whose losses fall in CI, too; those of the others in the tier full alone.
IN_CI = ("lolcats", "liger")
SLOW = ("halo", "priming", "quantvla", "radlads", "recall", "taylor_calibrate", "zeroth_order")
# The least rate of a stage there: published ones of 1e-5 move nothing in so few steps of so small a model.
LEAST_RATE = 3e-4
SMALL = {"sequence_length": 32, "batch_size": 2, "micro_batch_size": 2, "warmup_fraction": 0.0}


@pytest.fixture(scope="module")
def source(transformers_on_disk, tmp_path_factory):
    """A tiny model of two head groups and biases, with a tokenizer; and text for it."""
    model, _ = transformers_on_disk("qwen2")
    folder = tmp_path_factory.mktemp("training")
    model.save_pretrained(folder / "source")
    save_tokenizer(folder / "source")
    (folder / "text").mkdir()
    chance = random.Random(0)
    for number in range(6):
        words = chance.choices(["state", "scan", "delta", "gate", "key", "value"], k=200)
        (folder / "text" / f"{number}.txt").write_text(" ".join(words))
    return folder


def settings(source, place, recipe, *overrides, steps=4, **small):
    """A conversion by `recipe` with so many steps of small batches in each stage."""
    values = [f"source={source / 'source'}", f"output_dir={place}", f"recipe={recipe}", "data=text"]
    values += [f"data.path={source / 'text'}", f"data.cache_dir={source / 'cache'}", "runtime.cpus_per_worker=1"]
    values += ["layer.window=8", "verify.tokens=40", "verify.sequences=1", "verify.generate=0"]
    config = read_convert_config(compose_config("convert", [*values, *overrides]))
    stages = {
        name: dataclasses.replace(stage, **(SMALL | {"steps": steps} | small), sequence_ranks=1)
        for name, stage in config.recipe.stages.items()
    }
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, stages=stages))


def with_rates(config, change):
    """`config` with `change(rate)` in place of each of its stages' rates that is one."""

    def changed(stage):
        rates = {name: change(vars(stage)[name]) for name in ("lr", "lr_new") if vars(stage)[name]}
        return dataclasses.replace(stage, **rates)

    stages = {name: changed(stage) for name, stage in config.recipe.stages.items()}
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, stages=stages))


def only(config, name, **changes):
    """`config` with one of its stages alone, changed."""
    stages = {name: dataclasses.replace(config.recipe.stages[name], **changes)}
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, stages=stages))


def convert_alone(*configs):
    """Each conversion in one process that is not this one: DeepSpeed keeps its group for the life of a process."""
    return on_ranks(1, lambda ranks: [convert(config) for config in configs])[0]


def train_alone(*configs):
    """The trainings alone; by run, what each says of itself, the hash of its weights among it."""
    return on_ranks(1, lambda ranks: [begun(config).run()[1] for config in configs])[0]


def weights_below(place):
    """What the runs of a training left."""
    files = sorted((place / "training").glob("[0-9]-*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def begun(config):
    """The training of `config`, with all done that was done before."""
    opened = open_source(config.source)
    teacher = architecture_of(opened)
    student = student_of(teacher, config, () if config.keep == "none" else config.keep)
    manifest = ConversionManifest.open(Path(config.output_dir) / "training", {})
    pair = Pair(teacher, student, (manifest.weights(START),))
    training = Training(config, pair, manifest, opened.tokenizer(), lambda stage, what: None)
    loaded = load_teacher(opened, dtype=torch.float32)
    training.begin(loaded, student_on(loaded, student, seed=config.seed))
    return training


def session_of(training, task, *, ranks=1, sequence=1, zero=0, name="run"):
    """What `run` would give the ranks for a stage."""
    stage = dataclasses.replace(task.stage, sequence_ranks=sequence)
    parallel = dataclasses.replace(training.config.parallel, data=ranks, zero_stage=zero)
    one = dataclasses.replace(training, config=dataclasses.replace(training.config, parallel=parallel))
    config = one._settings(stage, name)
    config = dataclasses.replace(config, output_dir=f"{config.output_dir}-{ranks}-{sequence}-{zero}")
    corpus = prepare(config.data, progress=False)
    lease = take(RunFolder(Path(config.output_dir)).epochs, "test", seconds=config.runtime.lease_seconds)
    task = dataclasses.replace(task, stage=stage)
    return Session(config, corpus.folder.resolve(), "test", lease.epoch, "", corpus.content, task)


def trained(session):
    return checkpoint.find(session.folder.checkpoints).state_dict()


def corrections_left(config):
    """What `calibrate` would still fold into the output of a converted model, on what its only stage has seen."""
    again = begun(dataclasses.replace(config, output_dir=f"{config.output_dir}-again"))
    [(name, stage)] = config.recipe.stages.items()
    told = again._settings(stage, name)
    batch = training_data(told, prepare(told.data, progress=False).folder).at(0)
    tokens = batch.tokens.view(stage.batch_size, stage.sequence_length)
    student = load(f"{config.output_dir}/model").model.eval()
    found = calibrate(again.pair.load_teacher(), student, tokens, ("output",), again.pair.converted)
    return [value for layer in found.values() for value in layer["output"]]


@pytest.mark.parametrize(
    "recipe",
    # transfer_then_kl is README's, in tests/docs.
    [
        pytest.param(name, marks=pytest.mark.all if name in IN_CI else pytest.mark.full)
        for name in RECIPES
        if name != "transfer_then_kl"
    ],
)
def test_a_recipe_runs_from_beginning_to_end(source, tmp_path, recipe):
    chosen = ["target=liger_gla"] if recipe == "liger" else ["target=gla", "keep=[1]"]
    if recipe == "radlads":
        # As published: beside a window that sees the whole row, a layer has nearly nothing to learn.
        chosen.append("layer.window=0")
    config = settings(source, tmp_path, recipe, *chosen, steps=12)
    if recipe in SLOW:
        config = with_rates(config, lambda rate: max(rate, LEAST_RATE))
    # Some batches are easier than others: the same ones, and nothing learned.
    idle = with_rates(dataclasses.replace(config, output_dir=str(tmp_path / "idle")), lambda rate: 1e-12)
    report, *others = convert_alone(config, *((idle,) if recipe in SLOW else ()))
    assert [check["name"] for check in report["checks"] if not check["passed"]] == []
    assert [run["run"].split("-", 1)[1] for run in report["training"]] == list(config.recipe.stages)
    assert (report["start"] != report["end"]) == bool(config.recipe.stages)
    for number, run in enumerate(report["training"]):
        if "factors" in run:
            assert run["tokens"] == 2 * 32
            continue
        assert run["tokens"] == 12 * 2 * 32
        without = others[0]["training"][number]["loss"]["last quarter"] if others else run["loss"]["first quarter"]
        assert run["loss"]["last quarter"] < without, run
    if recipe == "quantvla":
        # Once more, nothing is left to correct.
        found = report["training"][0]["factors"]["output"]
        assert min(abs(found["least"] - 1), abs(found["largest"] - 1)) > 0.01
        assert corrections_left(config) == pytest.approx([1.0, 1.0], abs=1e-3)
    assert list((tmp_path / "training").glob("*.safetensors")) == []
    if recipe == "liger":
        # No new weights, and what the adapters learned is in the old ones.
        assert report["parameters"]["student"] == report["parameters"]["teacher"]
        assert report["training"][0]["merging_changed_logits_by"] < 1e-5


@pytest.mark.all
def test_a_model_for_others_is_trained_and_written_as_gguf(source, tmp_path):
    """What the teacher has and the student has not is in a file of its own; biases are a GGUF file's, too."""
    from seqtrain.models.gguf import open_file

    chosen = ["target=granitemoehybrid", "keep=[1]", "gguf=f32", "verify.generate=12"]
    config = settings(source, tmp_path, "transfer_then_kl", *chosen, steps=12)
    with pytest.MonkeyPatch.context() as patch:
        # Letters are no BPE.
        patch.setattr("seqtrain.models.gguf_writer._write_vocabulary", lambda writer, source: None)
        [report] = convert_alone(config)
    assert [check for check in report["checks"] if not check["passed"]] == []
    assert report["kept"] == [1]
    assert report["layers"] == ["mamba2", "attention", "mamba2"]
    for run in report["training"]:
        assert run["loss"]["last quarter"] < run["loss"]["first quarter"], run
    names = {tensor.name for tensor in open_file(tmp_path / "model.gguf").tensors}
    assert {"blk.0.ssm_in.weight", "blk.1.attn_q.bias", "blk.2.ffn_up.weight"} <= names
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "granitemoehybrid"


@pytest.mark.all
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_every_recipe_runs(source, tmp_path, part):
    """The rest of them, in one process: each trains something, and is the same model whole, in pieces and reloaded."""
    recipes = SLOW[part::3]
    chosen = ["target=gla", "keep=[1]"]
    configs = [settings(source, tmp_path / name, name, *chosen, steps=2) for name in recipes]
    for config, report in zip(configs, convert_alone(*configs), strict=True):
        assert [check["name"] for check in report["checks"] if not check["passed"]] == []
        assert [run["run"].split("-", 1)[1] for run in report["training"]] == list(config.recipe.stages)
        assert report["start"] != report["end"], config.recipe.name


@pytest.mark.all
def test_experts_are_trained(source, tmp_path):
    """All layers stay; the experts, which were alike, no longer are."""
    chosen = ["keep=[0,1,2]", "upcycle.experts=4"]
    config = settings(source, tmp_path, "transfer_then_kl", *chosen, steps=4)
    [report] = convert_alone(only(config, "kl", trainable="all", kl=0.0, ce=1.0, lr=1e-2))
    assert [check for check in report["checks"] if not check["passed"]] == []
    assert any(check["name"].startswith("at the start, the first 40 tokens") for check in report["checks"])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    up = weights["model.blocks.1.mlp.up"]
    assert not torch.allclose(up[0], up[1])


@pytest.mark.full
def test_transfer_brings_every_layer_nearer_its_teacher(source, tmp_path):
    config = settings(source, tmp_path, "transfer_then_kl", "target=gla", "keep=[1]", steps=80)
    [report] = convert_alone(only(config, "transfer"))
    start, end = (report["layer_errors"][when] for when in ("start", "end"))
    assert end[1] == start[1] == 0
    for index in (0, 2):
        assert end[index] < 0.9 * start[index]


@pytest.mark.all
def test_a_training_killed_inside_a_layer_resumes_to_the_same_weights(source, tmp_path):
    whole = settings(source, tmp_path / "whole", "transfer_then_kl", "target=gla", "checkpoint.every=5", steps=30)
    whole = only(whole, "transfer", layers_at_once=1)
    killed = dataclasses.replace(whole, output_dir=str(tmp_path / "killed"))
    second = tmp_path / "killed" / "training" / "1-transfer-layers-001-001"

    def die_in_the_second_layer(ranks):
        def watch():
            while not list((second / "checkpoints").glob("step-*/manifest.json")):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
        begun(killed).run()

    with pytest.raises(RankError):
        on_ranks(1, die_in_the_second_layer)
    manifest = json.loads((tmp_path / "killed" / "training" / "manifest.json").read_text())
    assert list(manifest["runs"]) == ["start", "1-transfer-layers-000-000"]
    expected, came = train_alone(whole, killed)
    starts = [json.loads(line)["step"] for line in (second / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[1] >= 5
    assert came == expected


@pytest.mark.full
def test_layers_one_by_one_from_kept_inputs_are_those_trained_together(source, tmp_path):
    together = only(settings(source, tmp_path / "all", "transfer_then_kl", "target=gla"), "transfer")
    alone = only(dataclasses.replace(together, output_dir=str(tmp_path / "one")), "transfer", layers_at_once=1)
    some = only(dataclasses.replace(together, output_dir=str(tmp_path / "some")), "transfer", layers=(0, 2))
    train_alone(together, alone, some)
    read = {name: weights_below(tmp_path / name) for name in ("all", "one", "some")}
    assert read["all"].keys() == read["one"].keys()
    assert read["some"].keys() == {name for name in read["all"] if not name.startswith("blocks.1.")}
    for name, value in read["all"].items():
        torch.testing.assert_close(read["one"][name], value, rtol=1e-4, atol=1e-6)
        if name in read["some"]:
            assert torch.equal(read["some"][name], value)
    assert not (tmp_path / "one" / "training" / "inputs").exists()


@pytest.mark.all
def test_a_stage_comes_to_the_same_on_any_ranks(source, tmp_path):
    """Data parallel, sequence parallel as in the long-context stage, and divided by ZeRO 3, the teacher too."""
    config = settings(source, tmp_path, "transfer_then_kl", "target=gla", "keep=[1]", micro_batch_size=1)
    training = begun(config)
    transfer, kl = config.recipe.stages.values()
    hidden = dataclasses.replace(kl, kl=0.5, ce=0.5, hidden=1.0, temperature=2.0)
    tasks = {
        "transfer": Transfer(training.pair, transfer, (0, 2)),
        "distillation": Distillation(training.pair, hidden),
    }
    meshes = {1: [(1, 1, 0)], 2: [(2, 1, 0), (2, 2, 0), (2, 1, 3)]}
    sessions = {
        (name, mesh): session_of(training, task, ranks=mesh[0], sequence=mesh[1], zero=mesh[2], name=name)
        for name, task in tasks.items()
        for each in meshes.values()
        for mesh in each
    }
    for count in meshes:
        on_ranks(count, lambda ranks, count=count: [train(s, ranks) for (_, m), s in sessions.items() if m[0] == count])
    for name in tasks:
        expected = losses(sessions[name, (1, 1, 0)].config)
        assert len(set(expected)) == transfer.steps
        for mesh in meshes[2]:
            session = sessions[name, mesh]
            assert losses(session.config) == pytest.approx(expected, rel=1e-4), (name, mesh)
            for key, value in trained(sessions[name, (1, 1, 0)]).items():
                torch.testing.assert_close(trained(session)[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.all
def test_layers_below_the_lowest_trained_one_run_once_and_not_backward(source, tmp_path):
    config = settings(source, tmp_path, "transfer_then_kl", "target=gla", "keep=[0,1]")
    training = begun(config)
    stage = dataclasses.replace(config.recipe.stages["kl"], trainable="all", layers=(2,))
    session = session_of(training, Distillation(training.pair, stage))
    work = session.task.build(session.config, session.corpus)
    moving = {name.split(".")[2] for name, parameter in work.model.named_parameters() if parameter.requires_grad}
    assert moving == {"2"}
    teacher, student = work.model.teacher, work.model.student
    calls = []
    for name, model in (("teacher", teacher), ("student", student)):
        for index, block in enumerate(model.blocks):
            block.register_forward_hook(
                lambda _, given, out, name=name, index=index: calls.append((name, index, out[0].requires_grad))
            )
    batch = work.batches.at(0)
    loss = work.model(batch.tokens, batch.labels)
    below = [("student", 0, False), ("student", 1, False)]
    assert calls == [*below, ("teacher", 2, False), ("student", 2, True)]
    # In one piece, the model is what it was.
    with torch.no_grad():
        work.model.first = 0
        torch.testing.assert_close(work.model(batch.tokens, batch.labels), loss.detach())


@pytest.mark.all
def test_a_teacher_in_eight_bits_says_nearly_the_same(source, tmp_path):
    """Its matrices are integers, the student's are not, and the loss towards it is that towards the teacher."""
    config = settings(source, tmp_path, "transfer_then_kl", "target=gla", "keep=[1]")
    training = begun(config)
    losses = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seqtrain.models.quantized.LEAST", 1)
        for kind in ("float32", "int8"):
            stage = dataclasses.replace(config.recipe.stages["kl"], teacher=kind)
            session = session_of(training, Distillation(training.pair, stage), name=kind)
            work = session.task.build(session.config, session.corpus)
            teacher = work.model.teacher
            integers = {name for name, each in teacher.named_parameters() if hasattr(each, "qdata")}
            assert integers == (
                {f"blocks.{i}.{x}.weight" for i in range(3) for x in MATRICES} if kind == "int8" else set()
            )
            assert not any(hasattr(each, "qdata") for each in work.model.student.parameters())
            batch = work.batches.at(0)
            losses[kind] = work.model(batch.tokens, batch.labels).item()
    assert losses["int8"] != losses["float32"]
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.05)


@pytest.mark.all
@pytest.mark.parametrize("teacher", ["float32", "bfloat16"])
def test_the_teacher_goes_where_the_student_goes(source, tmp_path, teacher):
    """To another device with all it has; no checkpoint holds it."""
    config = settings(source, tmp_path, "transfer_then_kl", "target=gla", "keep=[1]")
    training = begun(config)
    transfer, kl = (dataclasses.replace(stage, teacher=teacher) for stage in config.recipe.stages.values())
    tasks = [Transfer(training.begun, transfer, (0, 2)), Distillation(training.begun, kl)]
    for number, task in enumerate(tasks):
        session = session_of(training, task, name=str(number))
        work = session.task.build(session.config, session.corpus)
        expected = dict(training.pair.load_teacher().named_parameters())
        materialize_all(work.model, work.first_weights, torch.device("cpu"))
        for name, weight in work.model.teacher.named_parameters():
            assert torch.equal(weight, expected[name].to(getattr(torch, teacher))), name
        assert {f"teacher.{name}" for name in expected} <= work.frozen
        batch = work.batches.at(0)
        assert work.model(batch.tokens, batch.labels).isfinite()
        work.model.to("meta")
        assert all(tensor.is_meta for tensor in [*work.model.parameters(), *work.model.buffers()])
        # Nothing hides from that.
        parts = set(work.model.modules())
        held = [each for part in parts for each in tree_leaves(list(vars(part).values()))]
        assert {each for each in held if isinstance(each, torch.nn.Module)} <= parts
        assert all(each.is_meta for each in held if isinstance(each, torch.Tensor))


@pytest.mark.all
def test_all_weights_are_trained_by_an_optimizer_of_low_rank(source, tmp_path):
    if not find_spec("ista_daslab_optimizers"):
        pytest.skip("needs ista-daslab-optimizers")
    config = settings(source, tmp_path, "transfer_then_kl", "target=gla", "keep=[1]", steps=12)
    chosen = {"trainable": "all", "optimizer": "dct_adamw", "optimizer_rank": 4, "lr": 3e-3}
    [report] = convert_alone(only(config, "kl", **chosen))
    [run] = report["training"]
    assert run["loss"]["last quarter"] < run["loss"]["first quarter"]


@pytest.mark.all
def test_frozen_weights_are_in_memory_once_and_stay_what_they_were(source, tmp_path):
    config = settings(source, tmp_path, "transfer_then_kl", "target=gla", "keep=[1]")
    training = begun(config)
    stage = dataclasses.replace(config.recipe.stages["kl"], lr=0.0)
    session = session_of(training, Distillation(training.pair, stage))
    work = session.task.build(session.config, session.corpus)
    moving = {name for name, parameter in work.model.named_parameters() if parameter.requires_grad}
    assert moving == {f"student.{name}" for name in training.pair.new()}
    teacher = work.model.teacher
    # The same pages of the same file.
    mine, theirs = (model.blocks[0].mlp.up.weight for model in (work.model.student, teacher))
    torch.testing.assert_close(mine, theirs)
    on_ranks(1, lambda ranks: train(session, ranks))
    before, after = load_file(training.manifest.weights("start")), trained(session)
    assert after.keys() == moving
    assert not any(torch.equal(value, before[name.removeprefix("student.")]) for name, value in after.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=liger", "recipe.stages.finetune.stepz=3"], "recipe.stages.finetune.stepz"),
        (["recipe=lolcat"], "did you mean 'lolcats'"),
        (["recipe=liger", "recipe.stages.finetune.ce=0"], "kl, ce and hidden are all 0"),
        (["recipe=liger", "recipe.stages.finetune.lr=0"], "lr_new and lr are both 0"),
        (["recipe=liger", "recipe.stages.finetune.lora_targets=[]"], "lora_targets"),
        (["recipe=liger", "recipe.stages.finetune.trainable=some"], "trainable=some"),
        (["recipe=lolcats", "recipe.stages.transfer.kl=1"], "kind=transfer has no such loss"),
        (["recipe=lolcats", "recipe.stages.transfer.trainable=all"], "kind=transfer changes mixers"),
        (["recipe=lolcats", "recipe.stages.transfer.gradient_clipping=1"], "would tie a transfer's layers"),
        (["recipe=liger", "recipe.stages.finetune.layers=[1]"], "trainable=lora is for all layers"),
        (["recipe=radlads", "recipe.stages.distill.layers_at_once=1"], "only kind=transfer trains layers alone"),
        (["recipe=quantvla", "recipe.stages.calibrate.calibrations=[]"], "calibrations=[]: needs one"),
        (["recipe=quantvla", "recipe.stages.calibrate.kind=transfer"], "kind=transfer has none; leave it out"),
        (["recipe=zeroth_order", "recipe.stages.gates.sequence_ranks=2"], "runs a row in pieces, not on ranks"),
        (["recipe=radlads", "recipe.stages.distill.segment=64"], "only kind=zeroth_order runs rows in pieces"),
        (["recipe=liger", "recipe.stages.finetune.sequence_ranks=2"], "must divide the number of ranks"),
        (["recipe=liger", "parallel.data=2"], "use runtime=ray"),
        (["recipe=zeroth_order", "parallel.zero_stage=3"], "kind=zeroth_order: needs whole weights"),
    ],
)
def test_a_wrong_recipe_is_one_line(overrides, message):
    with refused(message):
        read_convert_config(compose_config("convert", ["source=unused", *overrides]))


def test_what_only_the_model_shows_to_be_wrong_is_one_line_before_training(source, tmp_path, transformers_on_disk):
    config = settings(source, tmp_path / "out", "lolcats", "target=gla", "keep=[1]")
    with pytest.raises(ConfigError, match=r"recipe.stages.transfer.layers: layer 1 was not converted"):
        convert(only(config, "transfer", layers=(0, 1)))
    without = dataclasses.replace(config, source=str(transformers_on_disk("qwen3")[1]))
    with pytest.raises(ConfigError, match="has no tokenizer to read text with"):
        convert(without)


def test_an_unfinished_training_of_another_recipe_is_left_alone(source, tmp_path):
    config = settings(source, tmp_path, "transfer_then_kl", "target=gla", "keep=[1]")
    ConversionManifest.open(tmp_path / "training", {"recipe": "another"}).choose((1,), None)
    with pytest.raises(ConfigError, match="holds an unfinished conversion of another"):
        convert(config)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_ray_s_workers_train_what_this_process_would(source, tmp_path):
    alone = settings(source, tmp_path / "inline", "transfer_then_kl", "target=gla", "keep=[1]", micro_batch_size=1)
    chosen = ["target=gla", "keep=[1]", "runtime=ray", "parallel.data=2"]
    shared = settings(source, tmp_path / "ray", "transfer_then_kl", *chosen, micro_batch_size=1)
    train_alone(alone)
    _, reports = begun(shared).run()
    assert [report["run"] for report in reports] == ["1-transfer", "2-kl"]
    expected, came = weights_below(tmp_path / "inline"), weights_below(tmp_path / "ray")
    assert came.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(came[name], value, rtol=1e-3, atol=1e-4)

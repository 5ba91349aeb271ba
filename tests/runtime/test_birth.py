"""How a run's weights begin: the same numbers however they are divided."""

import hashlib
import weakref
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqtrain.memory import AnonymousPeak
from seqtrain.parallel.mesh import form_mesh
from seqtrain.parallel.testing import run_ranks
from seqtrain.runtime.engine import Engine
from seqtrain.runtime.optimizers import parameter_groups
from seqtrain.runtime.ranks import Ranks
from seqtrain.runtime.source import build_model, first_weights
from tests.runtime.runtime_cases import change, grid, on_ranks, small_config

VOCABULARY = 60


def engine_of(config, ranks, vocabulary=VOCABULARY):
    model = build_model(config, vocabulary)
    groups = parameter_groups(model.parameters(), config.optimizer.weight_decay)
    return Engine(model, groups, config, ranks, weights=first_weights(config, model))


def first_of(ranks, configs):
    """A hash of every weight of each run before its first step."""
    found = []
    for config in configs:
        with engine_of(config, ranks).as_saved() as model, gathered(model):
            weights = {name: each.detach() for name, each in model.named_parameters()}
            found.append({n: hashlib.sha256(each.numpy().tobytes()).hexdigest() for n, each in weights.items()})
    return found


def gathered(model):
    """Holds all weights whole, in ZeRO 3 too."""
    return GatheredParameters([each for each in model.parameters() if "ds_id" in vars(each)])


@pytest.mark.all
def test_weights_are_bit_equal_on_any_number_of_ranks_in_every_stage(tmp_path):
    layers = ("gla", "mamba2", "s5", "retnet", "rwkv7")
    base = small_config(tmp_path, *layers, train={"batch_size": 12, "micro_batch_size": 1})
    found = []
    for count in (1, 2, 3, 4):
        found += on_ranks(count, first_of, [change(base, parallel=grid(count, 1, stage)) for stage in range(4)])
    assert len(found) == 10
    expected = found[0][0]
    assert len(expected) > 40
    assert all(each == expected for rank in found for each in rank)


def memory_of(ranks, config):
    """What a model of stage 3 has at most, bytes, beside the most seen at the start and until the first step's end."""
    with AnonymousPeak() as until_step:
        with AnonymousPeak() as start:
            engine = engine_of(config, ranks, vocabulary=16384)
        tokens = torch.randint(16384, (4, 64))
        logits, _ = engine.model(tokens, all_logits=True)
        engine.backward(F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum"), weight=1 / 256)
        engine.step()
    counts = [weight.ds_numel for weight in engine.module.parameters()]
    return 16 * sum(counts) / ranks.count + 4 * max(counts), start.bytes, until_step.bytes


@pytest.mark.full
def test_a_rank_of_stage_3_holds_little_more_than_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.runtime.runtime_cases.RANKS_SECONDS", 600)
    layers = ("gated_delta_net", "gated_delta_net", "gated_delta_net", "attention")
    config = small_config(tmp_path, *layers, train={"batch_size": 16, "micro_batch_size": 4, "sequence_length": 64})
    config = change(config, model={"depth": 14, "width": 1024, "heads": 8}, parallel=grid(4, 1, 3))
    for share, start, until_step in on_ranks(4, memory_of, config):
        assert start < 1.1 * share
        assert until_step < 2.2 * 1.1 * share


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, fake ones too: those that live, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return made


def born_among(config, world, *, fake):
    """The start of rank 0 among `world` that aren't there: what it may hold, bytes, and what it holds at most."""

    def start(_):
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        everyone = dist.group.WORLD
        ranks = Ranks(rank=0, count=world, device=torch.device("cpu"), group=everyone, control=everyone)
        shard = config.parallel.shard
        with form_mesh(
            everyone, sequence=1, shard=shard % world, algorithm="pipeline", device=ranks.device, timeout_seconds=20
        ) as mesh:
            model = build_model(config, 128_256)
            counts = [weight.numel() for weight in model.parameters()]
            groups = parameter_groups(model.parameters(), config.optimizer.weight_decay)
            with ExitStack() as stack:
                allocated = stack.enter_context(Allocated() if fake else AnonymousPeak())
                if fake:
                    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                    # Made for the first time, a fake parameter is one that torch can't put in another's place.
                    for shape in {weight.shape for weight in model.parameters()}:
                        nn.Parameter(torch.empty(shape))
                    allocated.peak = 0
                Engine(model, groups, config, ranks, weights=first_weights(config, model), mesh=mesh)
                held = allocated.peak if fake else allocated.bytes
        return 16 * sum(counts) / shard + 4 * max(counts), held

    return run_ranks(1, start, limit=1700)[0]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("width", "depth", "world", "shard"), [(8192, 80, 1024, 64), (4096, 32, 64, 64)])
def test_a_rank_of_many_begins_with_its_share_and_one_weight(width, depth, world, shard, tmp_path):
    """64 billion weights over 1,024 ranks in shards of 64, counted; 7 billion over 64 counted, and held in fact."""
    config = small_config(tmp_path, *["gated_delta_net"] * 3, "attention", train={"batch_size": world})
    network = {"depth": depth, "width": width, "heads": width // 128, "tie_embeddings": False}
    config = change(config, model=network, parallel={**grid(world, 1, 3), "shard": shard})
    may, held = born_among(config, world, fake=True)
    assert held <= may
    if shard == world:
        may, held = born_among(config, world, fake=False)
        assert held <= 1.1 * may

"""DeepSpeed's engine as one typed object: the environment it needs, its configuration, backward pass and step."""

import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seqtrain.data.batches import even_offsets
from seqtrain.initialization import WHOLE, Fill, materialize
from seqtrain.memory import give_back_free_memory, large_tensors_given_back
from seqtrain.models.divided import Divided
from seqtrain.models.matrices import matrices_of
from seqtrain.parallel.mesh import Mesh, Shards
from seqtrain.runtime.compilation import compile_model
from seqtrain.runtime.expert_parallel import ExpertParallel
from seqtrain.runtime.offload import offload_activations
from seqtrain.runtime.optimizer_state import OptimizerState, own_piece
from seqtrain.runtime.optimizers import OPTIMIZERS, build_optimizer, set_learning_rate
from seqtrain.runtime.ranks import Ranks, keeps_host_order
from seqtrain.runtime.restoring import IN_TRAINING
from seqtrain.runtime.settings import PretrainConfig, micro_batch, micro_batches, segments
from seqtrain.runtime.slices import WEIGHT, Piece
from seqtrain.runtime.tensor_parallel import ModelParallelUnit, mark_parts
from seqtrain.runtime.whole_matrices import WholeMatrices, place_blocks, split_groups
from seqtrain.runtime.zero import Replicas, send_matrices_in_bfloat16, share_weights, stage_3_sizes

log = logging.getLogger("seqtrain.runtime")

# Of a weight in a step: its gradient squared and in absolute value, and its change squared, each summed.
Sizes = tuple[float, float, float]
# An object or module, and the name of its function.
Place = tuple[Any, str]
# With float32 masters, and gradients summed in float32 over micro-batches and ranks.
BFLOAT16_WEIGHTS = {
    "bf16": {"enabled": True, "check_grad_overflow": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}
PARAMETERS, GRADIENTS, OPTIMIZER, BUFFERS = "parameters", "gradients", "optimizer", "buffers"


def prepare_environment(ranks: Ranks) -> None:
    """Sets what DeepSpeed reads from the environment, before it is first imported in this process.

    Without the ranks' variables it looks for MPI; without an accelerator named it may take another than torch's; its
    shared-memory collective would be compiled at the first start.
    """
    os.environ["DS_ACCELERATOR"] = ranks.device.type
    os.environ.setdefault("RANK", str(ranks.rank))
    os.environ.setdefault("LOCAL_RANK", str(ranks.device.index or 0))
    os.environ.setdefault("WORLD_SIZE", str(ranks.count))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    warnings.filterwarnings("ignore", module="deepspeed")
    # DeepSpeed calls what this torch has renamed; nothing the user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Which optimizers ZeRO runs is ours to know.
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    import_muon()
    # Reading the table would make DeepSpeed try a compiler on every operator it has.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def import_muon() -> None:
    """Imports DeepSpeed's Muon, which it asks about whatever the optimizer, without what its import would compile.

    Those functions alone would bring in torch._inductor, 1.3 s of CPU time on every rank.
    """
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_function


def _description(config: PretrainConfig, device: torch.device, divided: Divided | None, experts: Any) -> str:
    """What trains, over which ranks."""
    import deepspeed

    parallel, optimizer = config.parallel, config.optimizer
    over = f", layers over {divided.tensor.count}" if divided else ""
    over += f", experts over {experts.size()}" if experts is not None else ""
    return (
        f"DeepSpeed {deepspeed.__version__}, ZeRO {parallel.zero_stage} of {parallel.shard_ranks} ranks, "
        f"{config.train.dtype} over {parallel.data} x {parallel.sequence} (data x sequence, {device.type}){over}, "
        f"optimizer {optimizer.name} of {optimizer.implementation}"
    )


class Engine:
    """A model under training: forward, backward and step, over all ranks, with what ZeRO divides over them.

    `model` is called as the model is. `deepspeed` is DeepSpeed's engine, which nothing outside engine.py and
    optimizer_state.py needs; `optimizer_state` is what a checkpoint holds besides the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        config: PretrainConfig,
        ranks: Ranks,
        *,
        weights: Fill | None = None,
        mesh: Mesh | None = None,
        divided: Divided | None = None,
    ):
        """`groups`: the parameters to train, as `parameter_groups` gives them. Every rank builds its own.

        `weights`: what the model begins with, alike on every rank; None where it has them, and is not on the meta
        device. `mesh`: None is one of data-parallel ranks alone; of experts that others have this rank drops the
        weights. `divided`: of which the model is this rank's part.
        """
        prepare_environment(ranks)
        import deepspeed

        experts, self._divided, self._ranks = mesh.experts if mesh else None, divided, ranks
        self._expert_parallel = ExpertParallel(model, experts, divided)
        # Where a dict, the step made next adds what this rank's pieces of the weights say, by name; no weight's pieces
        # overlap, so that their sums over the ranks are those of the whole.
        self.sizes: dict[str, Sizes] | None = None
        self.module = model
        self.stage = config.parallel.zero_stage
        # Before ZeRO cuts them.
        matrices = matrices_of(model) if OPTIMIZERS[config.optimizer.name].matrix_options is not None else {}
        self._narrow = config.parallel.wire == "bfloat16"
        if self._narrow:
            send_matrices_in_bfloat16(model)
        settings = _deepspeed_config(config, ranks.device, model)
        shards = mesh.shards if mesh else None
        self._replicas = None if shards is None else Replicas(shards)
        self._masters = config.train.weights == "bfloat16"
        # In stage 3 this rank's pieces of matrices as they were before they were rounded.
        self._born: dict[nn.Parameter, Tensor] = {}
        with large_tensors_given_back():
            self._bear(weights, settings, shards)
        unit: Replicas | ModelParallelUnit | None = self._replicas
        if divided is not None and mesh is not None:
            mark_parts(divided)
            unit = ModelParallelUnit.of(mesh)
        deepspeed.utils.groups.mpu = unit
        optimizer = build_optimizer(
            self._expert_parallel.groups(split_groups(groups, matrices) if matrices else groups),
            config.optimizer,
            finite=self.stage == 0,
            clipping=config.train.gradient_clipping,
            experts=experts,
            tensor=divided.tensor.group if divided else None,
        )
        # Whether the optimizer has made its state.
        self._begun = False
        self.deepspeed = self._start_deepspeed(optimizer, settings, unit)
        if matrices:
            place_blocks(self.deepspeed.optimizer, self.stage, matrices, config.optimizer)
        compile_model(model, config.train.compile, sharded=config.parallel.sequence > 1)
        if config.train.offload_activations and ranks.device.type == "cuda":
            offload_activations(self.deepspeed)
        self.model: nn.Module = self.deepspeed
        self.optimizer_state = OptimizerState(
            self.deepspeed, self.stage, config.optimizer, self._expert_parallel, self._replicas
        )
        log.info("engine: %s", _description(config, ranks.device, divided, experts))

    def _start_deepspeed(self, optimizer: Any, settings: dict[str, Any], unit: Any) -> Any:
        """DeepSpeed's engine over the model, with the very weights that the model has."""
        import deepspeed

        model = self.module
        for weight in model.parameters():
            if not weight.requires_grad:
                # Read from the same files by every rank: what DeepSpeed takes for a rank's own is sent to none.
                vars(weight)["ds_optim_param"] = True
        if self._masters and self.stage < 3:
            self._born = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
        casting = _matrices_alone_cast() if self._masters else nullcontext()
        with self._expert_parallel.announced(model), casting, large_tensors_given_back():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=settings,
                mpu=unit,
                dist_init_required=False,
            )
        if self.stage == 3:
            share_weights(engine.optimizer)
        if self._masters:
            self._restore_masters()
            # Gradients are summed over ranks in float32, where they wait for that, too.
            engine.optimizer.get_param_comm_dtype = lambda _: torch.float32
            engine.optimizer._gradient_reduction_buffer_dtype = lambda: torch.float32
        return engine

    def _bear(self, weights: Fill | None, settings: dict[str, Any], shards: Shards | None) -> None:
        """Gives the model its weights, one at a time, and in stage 3 divides each before the next is made."""
        group = self._ranks.group if shards is None else shards.group
        rank, count = group.rank(), group.size()
        divide = _dividing(settings, shards, self._replicas) if self.stage == 3 else None

        def own(tensor: Tensor) -> slice:
            piece = -(-tensor.numel() // count)
            return slice(rank * piece, (rank + 1) * piece) if divide else WHOLE

        shape, cut = self._expert_parallel.whole_shape, self._expert_parallel.own
        for _, tensor in materialize(self.module, weights, self._ranks.device, own=own, whole_shape=shape, cut=cut):
            if divide is not None and isinstance(tensor, nn.Parameter):
                if self._masters and tensor.dim() >= 2:
                    self._born[tensor] = tensor.detach().flatten()[own(tensor)].clone()
                    tensor.data = tensor.data.bfloat16()
                divide(tensor)

    def _restore_masters(self) -> None:
        """Gives the optimizer float32 weights, of which DeepSpeed has made its own from what it had rounded."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for parameter, values in self._born.items():
            if self.stage < 3:
                safe_set_full_fp32_param(parameter, values.to(parameter.device))
            else:
                piece = vars(parameter)["ds_tensor"]
                padded = torch.nn.functional.pad(values, (0, piece.numel() - len(values)))
                safe_set_local_fp32_param(parameter, padded.to(piece.device).view_as(piece))
        self._born = {}

    def set_learning_rate(self, rate: float) -> None:
        set_learning_rate(self.deepspeed.optimizer.param_groups, rate)

    def set_passes(self, backward: int) -> None:
        """How many backward passes the next step has."""
        engine = self.deepspeed
        if backward != engine.gradient_accumulation_steps():
            engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * engine.dp_world_size * backward)
            # A step ends where their count is a multiple.
            engine.micro_steps = 0

    def backward(self, loss_sum: Tensor, *, weight: float) -> None:
        """Adds the gradients of `loss_sum` (a scalar, summed over tokens) times `weight`.

        DeepSpeed divides by the number of micro-batches and averages over all ranks, sequence-parallel ones too, so
        `weight` is `ranks * backward passes of a step / tokens of the whole batch`. A loss that isn't finite makes
        every gradient NaN: so one test, the norm of the reduced gradient, finds both and comes out alike on all ranks.
        """
        # On one thread, where autograd would take one per kind of device: gradients then come in the same order on
        # every rank, however long it waits for its neighbors' states, and DeepSpeed reduces them by order of arrival.
        with torch.autograd.set_multithreading_enabled(False):
            self.deepspeed.backward(loss_sum * torch.where(loss_sum.detach().isfinite(), weight, torch.nan))

    def step(self) -> None:
        """After every backward pass: the last of a step's changes the weights, unless a gradient isn't finite."""
        last = self.deepspeed.is_gradient_accumulation_boundary()
        if last and self._replicas is not None:
            self._replicas.average(self.deepspeed.optimizer)
        if last and not self._begun:
            # The optimizer's state is made in this step, and need not lie beside the holes that the passes have left.
            give_back_free_memory()
            self._begun = True
        self._measured_step() if last and self.sizes is not None else self.deepspeed.step()

    def _measured_step(self) -> None:
        assert self.sizes is not None
        pieces = {name: (weight, gradient) for name, weight, gradient in self._pieces() if weight.numel()}
        if not pieces:
            self.deepspeed.step()
            return
        before = [weight.clone() for weight, _ in pieces.values()]
        # Before the step, which clips.
        gradients = [gradient for _, gradient in pieces.values()]
        found = [torch._foreach_norm(gradients, 2), torch._foreach_norm(gradients, 1)]
        self.deepspeed.step()
        after = {name: weight for name, weight, _ in self._pieces(gradients=False) if weight.numel()}
        torch._foreach_sub_(before, [after[name] for name in pieces])
        found.append(torch._foreach_norm(before, 2))
        for name, row in zip(pieces, torch.stack([torch.stack(each) for each in found], 1).tolist(), strict=True):
            self.sizes[name] = (row[0] ** 2, row[1], row[2] ** 2)

    def _pieces(self, *, gradients: bool = True) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What this rank alone holds, or alone looks at, of each trained weight and of its gradient, both flat."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

        if self._replicas is not None and not self._replicas.first:
            return
        divided, ranks = self._divided, self._alike
        for name, weight in self.module.named_parameters():
            again = divided is not None and divided.tensor.rank > 0 and name not in divided.divisions
            if again or not weight.requires_grad:
                continue
            if self.stage == 0 and (gradient := weight.grad if gradients else weight) is not None:
                own = self._expert_parallel.share(name, weight.numel(), ranks)
                yield name, weight.detach().flatten()[own], gradient.flatten()[own]
            elif self.stage == 3:
                piece = safe_get_local_fp32_param(weight)
                yield name, piece.flatten(), safe_get_local_grad(weight).flatten() if gradients else piece
            elif self.stage and (held := vars(weight)["_hp_mapping"]) is not None:
                gradient = held.get_lp_grad_fragment(vars(weight)["_index_in_param_group"]) if gradients else None
                yield name, held.hp_fragment, held.hp_fragment if gradient is None else gradient.flatten()

    def last_step(self) -> tuple[float, bool]:
        """The gradient's norm before clipping in the step just made, and whether the step was taken.

        A step whose gradient isn't finite on any rank is left out on all: weights, moments and step count stay.
        """
        if self.deepspeed.optimizer.overflow:
            return float("nan"), False
        return float(self.deepspeed.get_global_grad_norm()), True

    @contextmanager
    def changed(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """In it, parameters that aren't trained may be changed, alike on every rank. A collective in stage 3."""
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(parameters, modifier_rank=0):
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In it, weights are those the model is used with: averages, where the optimizer has such. A collective."""
        changed = self.optimizer_state.average()
        try:
            yield
        finally:
            self.optimizer_state.put_back(changed)

    @contextmanager
    def as_saved(self) -> Iterator[Any]:
        """In it, the module computes with the weights that a checkpoint holds: averages, in float32, not cast.

        A collective; so is a call of the module in stage 3, which gathers it part by part, and of sharded experts.
        """
        with self.averaged():
            self.model.train(False)
            rounded = self._put_masters() if self._masters else []
            try:
                yield self.module
            finally:
                with self.optimizer_state.in_pieces():
                    for held, values in rounded:
                        held.data = values
                self.model.train()

    def _put_masters(self) -> list[tuple[Tensor, Tensor]]:
        """Puts float32 weights in place of rounded ones: whole, in stage 3 pieces. Gives what holds them, and had."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if self.stage < 3:
            rounded: list[tuple[Tensor, Tensor]] = [(parameter, parameter.data) for parameter in trained]
            for parameter in trained:
                parameter.data = safe_get_full_fp32_param(parameter)
            return rounded
        pieces = [vars(parameter)["ds_tensor"] for parameter in trained]
        rounded = [(piece, piece.data) for piece in pieces]
        with self.optimizer_state.in_pieces():
            for parameter, piece in zip(trained, pieces, strict=True):
                piece.data = safe_get_local_fp32_param(parameter).detach().view_as(piece)
        return rounded

    def shapes(self, *, besides: Collection[str] = ()) -> dict[str, list[int]]:
        """Of what `pieces` gives the pieces of, the whole shapes."""
        shapes = {name: self._whole_shape(name, weight) for name, weight in self._named(besides)}
        return {name: list(shape) for name, shape in (shapes | {n: b.shape for n, b in self._buffers()}).items()}

    def pieces(self, *, besides: Collection[str] = (), moments: bool) -> Iterator[Piece]:
        """What this rank writes of a checkpoint: of each parameter but those called `besides`, and of each buffer.

        Together the ranks' pieces are everything once: who hold the same share it out. Weights are float32, and those
        the model is used with: averages, where the optimizer has such; then `y` are those in training. `moments`:
        whether the optimizer has any. Values are views, of what the next step changes.
        """
        self.optimizer_state.link()
        for name, weight in self._named(besides):
            begin, values, share = self._own(name, weight)
            first, last = share.indices(len(values))[:2]
            if first >= last:
                continue
            held = self.optimizer_state.local(name) if moments and weight.requires_grad else {}
            own = {key: each.detach()[first:last] for key, each in held.items()}
            values = values.detach()[first:last]
            if (average := self.optimizer_state.averaged(values, own)) is not None:
                own[IN_TRAINING], values = values, average
            cuts = self._expert_parallel.cuts(name, weight.shape)
            yield Piece(name, begin + first, {WEIGHT: values, **own}, cuts)
        for name, buffer in self._buffers():
            offsets = even_offsets(buffer.numel(), self._ranks.count)
            first, last = offsets[self._ranks.rank : self._ranks.rank + 2]
            if first < last:
                yield Piece(name, first, {WEIGHT: buffer.detach().flatten()[first:last]})

    def _named(self, besides: Collection[str]) -> Iterator[tuple[str, Any]]:
        return ((name, weight) for name, weight in self.module.named_parameters() if name not in besides)

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """Those that are saved."""
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        return [(name, each) for name, each in self.module.state_dict().items() if name not in parameters]

    def _whole_shape(self, name: str, weight: Any) -> torch.Size:
        return self._expert_parallel.whole_shape(name, weight.ds_shape if self.stage == 3 else weight.shape)

    def _own(self, name: str, weight: Any) -> tuple[int, Tensor, slice]:
        """The numbers that this rank holds of a weight, flat, where they begin in it, and which of them it writes."""
        from deepspeed.utils import safe_get_local_fp32_param

        divided, replicas = self._divided, self._replicas
        share = WHOLE
        if self.stage == 3:
            begin, end = own_piece(weight)
            piece = safe_get_local_fp32_param(weight) if weight.requires_grad else weight.ds_tensor
            found = piece.flatten()[: end - begin]
        elif self.stage and weight.requires_grad:
            mapping = vars(weight)["_hp_mapping"]
            if mapping is None:
                return 0, weight.new_empty(0), WHOLE
            begin, found = mapping.lp_fragment_address.start, mapping.hp_fragment
        else:
            begin, found = 0, weight.detach().view(-1)
            share, replicas = self._expert_parallel.share(name, len(found), self._alike), None
        if divided is not None and divided.tensor.rank and name not in divided.divisions:
            # Each of the ranks that divide layers has it.
            return begin, found, slice(0, 0)
        if replicas is not None:
            share = replicas.share(len(found))
        return begin, found, share

    @property
    def _alike(self) -> Ranks:
        """This rank's place among those that have the same parts of layers."""
        count = self._divided.tensor.count if self._divided is not None else 1
        return replace(self._ranks, rank=self._ranks.rank // count, count=self._ranks.count // count)


def _deepspeed_config(config: PretrainConfig, device: torch.device, model: nn.Module) -> dict[str, Any]:
    stage, pieces = config.parallel.zero_stage, segments(config)
    optimizer = OPTIMIZERS[config.optimizer.name]
    # Where a group counts its steps, or a matrix is changed as a whole, stage 3 may not make several of one.
    one_group = bool(optimizer.numbers) or optimizer.matrix_options is not None
    return {
        "train_micro_batch_size_per_gpu": micro_batch(config),
        # A segment counts as a micro-batch: each has a backward pass of its own. Of sequences over several ranks
        # DeepSpeed is told nothing: all is over all ranks alike that have the same parts of the model.
        "gradient_accumulation_steps": pieces * micro_batches(config),
        # In stage 0 the optimizer clips, see FiniteStep.
        "gradient_clipping": config.train.gradient_clipping if stage else 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": device.type == "cuda" and config.parallel.overlaps(ordered=keeps_host_order(device)),
            **(stage_3_sizes(model, config.parallel.shard_ranks, one_group=one_group) if stage == 3 else {}),
        },
        "zero_allow_untested_optimizer": True,
        # Not `bf16.enabled` but where it is asked for (`_matrices_alone_cast`): it would round every weight, the gates'
        # decays too, before it makes its float32 copy.
        # No module is "safe" for lower precision, so that gradients and gathered weights travel in float32, but for
        # those that parallel.wire names.
        "torch_autocast": {
            "enabled": config.train.dtype != "float32",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        **(BFLOAT16_WEIGHTS if config.train.weights == "bfloat16" else {}),
        "steps_per_print": None,
    }


def _dividing(
    settings: dict[str, Any], shards: Shards | None, replicas: Replicas | None
) -> Callable[[nn.Parameter], None]:
    """Makes a whole weight, alike on all ranks, one of which each holds its piece: stage 3's, without a broadcast."""
    import deepspeed

    deepspeed.comm.init_distributed(dist_init_required=False)
    # With a module, though one without weights, it also does what saves memory in `nn.Linear`.
    zero = deepspeed.zero.Init(
        module=nn.Module(),
        data_parallel_group=None if shards is None else shards.group,
        mpu=replicas,
        config_dict_or_path=settings,
        dtype=torch.float32,
    )

    def divide(parameter: Any) -> None:
        zero._convert_to_deepspeed_param(parameter)
        parameter.partition()

    return divide


@contextmanager
def _matrices_alone_cast() -> Iterator[None]:
    """In it, DeepSpeed's bfloat16 mode leaves vectors (norms, decays) as they are: they have groups of their own.

    ZeRO 1 has the optimizer of ZeRO 2 then, as for weights of one dtype; the one that DeepSpeed takes has one dtype
    for all. ZeRO 3 puts the pieces of weights side by side by their dtype, where DeepSpeed knows one.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage3, stage_1_and_2
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    cast, choose = DeepSpeedEngine._cast_module_mixed_precision, DeepSpeedEngine._do_optimizer_sanity_check
    defragment, dtypes = stage3.defragment, stage3.get_all_comm_dtypes
    stages = stage3, stage_1_and_2

    def cast_matrices(engine: Any, dtype: torch.dtype, *_: Any) -> None:
        for parameter in engine.module.parameters():
            if parameter.dim() >= 2:
                parameter.data = parameter.data.to(dtype)

    DeepSpeedEngine._cast_module_mixed_precision = cast_matrices
    DeepSpeedEngine._do_optimizer_sanity_check = lambda *_: ZERO_OPTIMIZATION
    stage3.defragment = lambda tensors: _SideBySide(tensors, defragment)
    for stage in stages:
        stage.get_all_comm_dtypes = lambda _: {torch.float32}
    try:
        yield
    finally:
        DeepSpeedEngine._cast_module_mixed_precision, DeepSpeedEngine._do_optimizer_sanity_check = cast, choose
        stage3.defragment = defragment
        for stage in stages:
            stage.get_all_comm_dtypes = dtypes


class _SideBySide:
    """One flat buffer for each dtype of some tensors, which are moved there, as if it were one for all."""

    def __init__(self, tensors: list[Tensor], defragment: Callable[[list[Tensor]], Tensor]):
        # Where each tensor begins among all, and among those of its dtype.
        self._places: dict[int, tuple[torch.dtype, int]] = {}
        sizes: dict[torch.dtype, int] = {}
        begin = 0
        for x in tensors:
            self._places[begin] = (x.dtype, sizes.setdefault(x.dtype, 0))
            begin, sizes[x.dtype] = begin + x.numel(), sizes[x.dtype] + x.numel()
        self._flat = {dtype: defragment([x for x in tensors if x.dtype == dtype]) for dtype in sizes}

    def narrow(self, _: int, begin: int, numbers: int) -> Tensor:
        """Of consecutive tensors of one dtype, as a tensor's method has it."""
        dtype, place = self._places[begin]
        return self._flat[dtype].narrow(0, place, numbers)


def step_calls(engine: Engine) -> list[tuple[Place, Literal["optimizer", "gradients", "autograd"]]]:
    """The functions in which a step works outside the model, and what each does; they nest."""
    inner = engine.deepspeed
    calls: list[tuple[Place, Literal["optimizer", "gradients", "autograd"]]] = [
        ((inner, "step"), "optimizer"),
        ((inner, "backward"), "gradients"),
        ((torch.autograd, "backward"), "autograd"),
    ]
    # Called by the hooks of ZeRO 1 and 2 in the middle of the backward pass.
    if "reduce_ready_partitions_and_remove_grads" in dir(inner.optimizer):
        calls.append(((inner.optimizer, "reduce_ready_partitions_and_remove_grads"), "gradients"))
    return calls


def kept_collectives() -> list[Place]:
    """Those of torch's collectives that DeepSpeed's backend keeps under names of its own."""
    from deepspeed.comm import comm

    return [(comm.cdb, "all_gather_function"), (comm.cdb, "reduce_scatter_function")]


def held_tensors(engine: Engine) -> dict[str, list[Tensor]]:
    """The tensors of model and optimizer by kind: PARAMETERS to BUFFERS; some share storage, or occur twice.

    ZeRO's flat copies of the weights in float32 are the optimizer's; what else it keeps is a gradient where it is
    called one, else a buffer.
    """
    model, zero = engine.module, engine.deepspeed.optimizer
    inner = zero if isinstance(zero, torch.optim.Optimizer) else zero.optimizer
    matrices = inner.held.values() if isinstance(inner, WholeMatrices) else ()
    weights = list(model.parameters())
    own = vars(zero) if inner is not zero else {}
    return {
        # In stage 3 a weight's values lie in its partition.
        PARAMETERS: [*weights, *(vars(weight)["ds_tensor"] for weight in weights if "ds_tensor" in vars(weight))],
        GRADIENTS: [
            *(weight.grad for weight in weights if weight.grad is not None),
            *_tensors_in([value for name, value in own.items() if "grad" in name]),
        ],
        OPTIMIZER: [
            *_tensors_in([dict(state) for state in inner.state.values()]),
            *_tensors_in([each.state() for held in matrices for _, each in held.updated]),
            *_tensors_in([group["params"] for group in inner.param_groups]),
        ],
        BUFFERS: [*model.buffers(), *_tensors_in(list(own.values()))],
    }


def _tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Tensors in `value` and in the lists, tuples and dicts inside it, `depth` deep."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item, depth - 1)

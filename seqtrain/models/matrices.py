"""Which weights of a network are matrices to an optimizer that works on whole ones, and which of their rows are one."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from seqtrain.models.feed_forward import MoE
from seqtrain.models.spark import SparkMLP

# Modules, by their names in a network, whose weights make gates: decays, step sizes, shares, what is let through.
GATES = frozenset(
    ("beta", "blend", "decay", "forget", "gate", "gates", "rate", "router", "shared_gate", "step", "time_step")
)


@dataclass(frozen=True)
class Block:
    """Neighboring rows of a weight that are one matrix: a head's, a part's of a fused projection, or an expert's.

    `weight`: its name. `number`: of the block among those of the whole weight. `start`: where it begins in the weight,
    flattened, of this rank's experts where they are sharded. `gate`: its rows are numbers side by side, and no matrix.
    """

    weight: str
    number: int
    rows: int
    columns: int
    start: int
    gate: bool = False

    @property
    def numbers(self) -> int:
        return self.rows * self.columns

    @property
    def cost(self) -> int:
        """Of an update, as it grows with the sizes."""
        return self.numbers if self.gate else self.numbers * min(self.rows, self.columns)


def matrices_of(model: nn.Module) -> dict[nn.Parameter, list[Block]]:
    """The blocks of every trained weight that consists of matrices.

    Those are the weights of `nn.Linear`, cut as `seqtrain.layers.fused` says, and of experts. Embeddings, the head,
    norms, convolutions, gates (modules called as in `GATES`) and vectors are not.
    """
    found: dict[nn.Parameter, list[Block]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not GATES & set(path.split(".")):
            rows = vars(module).get("fused_rows", (module.out_features,))
            _add(found, f"{path}.weight", module.weight, rows)
        elif isinstance(module, SparkMLP):
            _add(found, f"{path}.value", module.value, (len(module.value),))
            _add(found, f"{path}.down", module.down, (len(module.down),))
        elif isinstance(module, MoE):
            first = 0 if module.group is None else module.group.rank()
            hidden, experts = module.down.shape[2], len(module.up)
            _add(found, f"{path}.up", module.up, experts * (1 + module.gated) * (hidden,), first)
            _add(found, f"{path}.down", module.down, experts * (module.down.shape[1],), first)
    return found


def _add(found: dict[nn.Parameter, list[Block]], name: str, weight: Any, rows: tuple[int, ...], part: int = 0) -> None:
    """Notes the blocks of `weight`; `part`: which of equal parts of the whole it is. Negative `rows`: a gate's."""
    # A weight that layers share is noted once.
    if not weight.requires_grad or weight in found:
        return
    start, columns, blocks = 0, weight.shape[-1], []
    for number, count in enumerate(rows, part * len(rows)):
        blocks.append(Block(name, number, abs(count), columns, start, gate=count < 0))
        start += abs(count) * columns
    assert start == weight.numel(), (name, rows, weight.shape)
    found[weight] = blocks

"""Several mixers side by side in one layer, their outputs added: Falcon-H1 (arXiv 2507.22448)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import PositiveFloat
from torch import Tensor, nn

from seqtrain.mixers import MIXERS, WHOLE, LayerShape, Mixer, MixerConfig, Past, SequenceContext, State
from seqtrain.validation import validate

# As a file says it.
BRANCHES: Any = ({"mixer": "mamba2"}, {"mixer": "attention"})


@dataclass(frozen=True)
class Branch:
    """One of the mixers, by name; `options`: those of its `Config`, or that itself.

    `in_scale`, `out_scale`: factors on what enters it and what leaves it.
    """

    mixer: str
    options: Any = None
    in_scale: PositiveFloat = 1.0
    out_scale: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        """From a file options come as a mapping, which is checked here."""
        if self.options is None or isinstance(self.options, Mapping):
            config: Any = validate(MIXERS.get(self.mixer).Config, self.options or {}, prefix=f"mixer.{self.mixer}.")
            object.__setattr__(self, "options", config)


class Parallel(Mixer):
    """`y = sum_i out_scale_i mixer_i(in_scale_i x)`."""

    class Config(MixerConfig):
        # The mixers: `{mixer: NAME, options: {KEY: VALUE}, in_scale: FACTOR, out_scale: FACTOR}` each.
        branches: tuple[Branch, ...] = BRANCHES

        def __post_init__(self) -> None:
            made = [each if isinstance(each, Branch) else validate(Branch, each) for each in self.branches]
            object.__setattr__(self, "branches", tuple(made))

    # Each branch has one of its own.
    out: Any = None

    def __init__(self, config: Config, shape: LayerShape):
        super().__init__(config, shape)
        self.branches = nn.ModuleList()
        for branch in config.branches:
            own = shape.with_heads(getattr(branch.options, "heads", 0) or shape.all_heads)
            self.branches.append(MIXERS.get(branch.mixer)(branch.options, own))
        self.causal = all(mixer.causal for mixer in self.branches)
        self.grouped = any(mixer.grouped for mixer in self.branches)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        sequence: SequenceContext = WHOLE,
        stream: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        # What enters is each branch's own to divide.
        return self.mix_into(x if stream is None else stream, x, state or {}, sequence)

    def mix_into(self, stream: Tensor, x: Tensor, past: Past, sequence: SequenceContext) -> tuple[Tensor, State]:
        added: list[Tensor] = []
        after: State = {}
        for index, (branch, mixer) in enumerate(zip(self.config.branches, self.branches, strict=True)):
            prefix = f"{index}_"
            own = {name.removeprefix(prefix): state for name, state in past.items() if name.startswith(prefix)}
            out, state = mixer(_scaled(x, branch.in_scale), own, sequence=sequence, stream=stream)
            added.append(_scaled(out, branch.out_scale))
            after |= {prefix + name: value for name, value in state.items()}
        return sum(added[1:], start=added[0]), after


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale

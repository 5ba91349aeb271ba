"""Measures what a mixer's interaction operator can do: its rank, the heads an SSM would need, how far gradients reach.

    python tools/interaction_operator.py                                    # every registered mixer
    python tools/interaction_operator.py mixers=[attention,s5] heads=[1,2,4] tokens=48

Mixers are measured as they are initialised, on random inputs, with their short convolutions off where they have the
field `conv_width`: a convolution mixes neighbors by itself and adds to the rank. Leaves a table,
`interaction_operator.json` and two pictures in `output_dir`.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from experiments.interaction.operator import Interaction, interaction
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, SeqtrainError
from seqtrain.mixers import MIXERS, LayerShape, Mixer
from seqtrain.report import LiveTable, machine, new_figure, save_figure, write_json
from seqtrain.validation import validate

TABLE = LiveTable(
    {
        "mixer": "18",
        "heads": "5d",
        "rank = heads needed": "20d",
        "for 99% energy": "15d",
        "possible": "9d",
        "reach at 1": "11.3g",
        "at the end": "11.3g",
        "halves after": ">13",
    }
)


@dataclass(frozen=True)
class Settings:
    # Names of mixers; empty: all.
    mixers: list[str] = field(default_factory=list)
    # Numbers of heads each is measured with; those that don't fit a mixer are skipped.
    heads: Annotated[list[int], Field(min_length=1)] = field(default_factory=lambda: [1, 2, 4])
    # Channels of the layer.
    width: Annotated[int, Field(gt=0)] = 16
    # Tokens of the input: blocks come from so many squared.
    tokens: Annotated[int, Field(ge=2)] = 32
    # Singular values below this share of the largest are taken for rounding.
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-9
    # Inputs and weights.
    seed: int = 0
    # True: short convolutions stay as the mixer has them.
    convolution: bool = False
    # CPU threads; 0 leaves PyTorch's own number.
    threads: Annotated[int, Field(ge=0)] = 0
    output_dir: str = "outputs/interaction_operator"


@dataclass(frozen=True)
class Measured:
    """One mixer with one number of heads."""

    mixer: str
    heads: int
    found: Interaction


def build(name: str, heads: int, settings: Settings) -> Mixer:
    """The mixer with its defaults. Raises `SeqtrainError` where it can't have so many heads."""
    kind = MIXERS.get(name)
    # Without a convolution, and without the SiLU that stands in its place: what is read is then linear in the values.
    plain = {"conv_width": 0, "activation": "none"}
    known = {key.name for key in fields(kind.Config)}
    values = {} if settings.convolution else {key: value for key, value in plain.items() if key in known}
    try:
        config: Any = validate(kind.Config, values)
    except ConfigError:
        # Mamba-2 is never without one.
        config = validate(kind.Config, {})
    torch.manual_seed(settings.seed)
    return kind(config, LayerShape(settings.width, heads))


def measure(settings: Settings) -> tuple[list[Measured], dict[str, str]]:
    """What could be measured, and why the rest could not."""
    found, skipped = [], {}
    x = torch.randn(settings.tokens, settings.width, generator=torch.Generator().manual_seed(settings.seed))
    print(TABLE.header)
    for name in settings.mixers:
        MIXERS.get(name)
    for name in settings.mixers or MIXERS.names:
        for heads in settings.heads:
            try:
                mixer = build(name, heads, settings)
                result = interaction(mixer, x, tolerance=settings.tolerance)
            except (SeqtrainError, ValueError) as error:
                skipped[f"{name}, {heads} heads"] = str(error)
                continue
            found.append(Measured(name, heads, result))
            print(line(found[-1]), flush=True)
    return found, skipped


def line(measured: Measured) -> str:
    found = measured.found
    half = f"{found.half_distance:.0f} tokens" if math.isfinite(found.half_distance) else "never"
    ranks = (found.rank, found.rank_energy, found.possible)
    return TABLE.row(measured.mixer, measured.heads, *ranks, found.reach[1], found.reach[-1], half)


def draw_spectra(found: list[Measured], tolerance: float, path: Path) -> None:
    """Singular values of the operators, one panel per number of heads: the rank is where a curve drops."""
    heads = sorted({measured.heads for measured in found})
    colors = _colors(found)
    figure = new_figure(5.5 * len(heads), 5)
    for panel, count in zip(figure.subplots(1, len(heads), sharey=True, squeeze=False)[0], heads, strict=True):
        for measured in (measured for measured in found if measured.heads == count):
            values = [max(value, 1e-17) for value in measured.found.spectrum[:64]]
            panel.plot(range(1, len(values) + 1), values, "-", color=colors[measured.mixer], label=measured.mixer)
        panel.axhline(tolerance, color="k", linestyle="--", linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel="number", title=f"{count} heads", ylim=(1e-17, 3))
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("singular value of the interaction operator, over the largest")
    figure.axes[-1].legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def _colors(found: list[Measured]) -> dict[str, Any]:
    """One color per mixer."""
    from matplotlib import colormaps

    names = dict.fromkeys(measured.mixer for measured in found)
    return {name: colormaps["tab20"](index % 20) for index, name in enumerate(names)}


def draw_reach(found: list[Measured], path: Path) -> None:
    """The gradient's norm over the distance, with the fewest heads measured of each mixer."""
    colors = _colors(found)
    figure = new_figure(8, 5.5)
    axes = figure.add_subplot(xlabel="distance, tokens", ylabel="norm of the gradient, over that at distance 1")
    fewest: dict[str, Measured] = {}
    for measured in found:
        fewest.setdefault(measured.mixer, measured)
    for name, measured in fewest.items():
        reach = measured.found.reach[1:]
        if reach[0] > 0:
            curve = [max(value / reach[0], 1e-9) for value in reach]
            axes.plot(range(1, len(reach) + 1), curve, color=colors[name], label=name)
    axes.set(yscale="log", ylim=(1e-9, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"width {settings.width}, {settings.tokens} tokens, float64, tolerance {settings.tolerance:g}\n")
    found, skipped = measure(settings)
    for what, reason in skipped.items():
        print(f"skipped {what}: {reason}")
    folder = Path(settings.output_dir)
    report = {"machine": about, "settings": asdict(settings), "skipped": skipped, "mixers": [asdict(m) for m in found]}
    write_json(folder / "interaction_operator.json", report)
    if found:
        draw_spectra(found, settings.tolerance, folder / "spectra.png")
        draw_reach(found, folder / "reach.png")
    print(f"\n{folder / 'interaction_operator.json'}, spectra.png, reach.png")
    return 0

"""How sharply a run's loss curves at its checkpoints: the Hessian's largest eigenvalue and its trace, beside 2 / lr.

    python tools/sharpness.py run=runs/mine
    python tools/sharpness.py run=runs/mine data=training rows=8 samples=16 'steps=[200,400]'
    python tools/sharpness.py run=runs/mine output_dir=outputs/sharpness_mine

The Hessian is that of the mean loss over `rows` rows, in the weights that are trained. It is never formed: its product
with a vector is the difference of two gradients, at the weights a little to either side, in float64, which needs one
derivative of the operators only. The largest eigenvalue comes from Lanczos' method, the trace from Hutchinson's. Where
the largest eigenvalue is above 2 / lr, a step of plain gradient descent would go uphill; Adam divides by the size of
the gradients, and has a bound of its own. One table, results.json and sharpness.png are written.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from seqtrain.config import read_run_config, read_settings
from seqtrain.data import Batch, HeldOutParts, open_corpus, prepare
from seqtrain.errors import ConfigError
from seqtrain.models import LanguageModel
from seqtrain.parallel.sequence import SequenceContext
from seqtrain.report import LiveTable, new_figure, save_figure, write_results
from seqtrain.runtime import checkpoint as checkpoints
from seqtrain.runtime.loading import finished_folder, open_run, place_of_run
from seqtrain.runtime.run_folder import read_lines
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.validation import FilePath

Product = Callable[[Tensor], Tensor]
# Of each weight, to either side: the error of a difference of gradients is least at the cube root of their precision.
ASIDE = torch.finfo(torch.float64).eps ** (1 / 3)


@dataclass(frozen=True)
class Settings:
    # output_dir of the run.
    run: FilePath
    # Steps of the checkpoints that are looked at; none: all there are.
    steps: tuple[int, ...] = ()
    # Whose rows the loss is of.
    data: Literal["held_out", "training"] = "held_out"
    # Rows of train.sequence_length tokens.
    rows: Annotated[int, Field(gt=0)] = 4
    # Products with the Hessian for its largest eigenvalue, at most.
    iterations: Annotated[int, Field(gt=1)] = 30
    # Relative change of the eigenvalue at which it is taken for found.
    tolerance: Annotated[float, Field(gt=0)] = 1e-3
    # Random vectors for the trace.
    samples: Annotated[int, Field(gt=1)] = 8
    seed: int = 0
    # Folder for the results.
    output_dir: FilePath = "outputs/sharpness"


@dataclass(frozen=True)
class Sharpness:
    """Of one checkpoint. `lr`: of the step after which it was written; `trace_error`: the trace's standard error."""

    step: int
    loss: float
    eigenvalue: float
    products: int
    trace: float
    trace_error: float
    lr: float | None


def main(arguments: Sequence[str]) -> int:
    """Prints the table; gives the exit status."""
    settings = read_settings(Settings, arguments)
    path = place_of_run(settings.run)
    folder = finished_folder(path, read_run_config(path).get("checkpoint", {}).get("store", ""))
    found = {each.progress.step: each for each in checkpoints.listed(folder.checkpoints)}
    if missing := [step for step in settings.steps if step not in found]:
        raise ConfigError(f"steps={missing[0]}: run={settings.run} has checkpoints of steps {sorted(found)}")
    rates = {record["step"]: record["lr"] for record in read_lines(folder.metrics)}
    config, model, _ = open_run(folder.path)
    batch = _batch(config, settings)
    columns = {"step": "8d", "loss": "9.4f", "largest": "11.4g", "products": "8d", "trace": "11.4g", "+-": "9.2g"}
    table = LiveTable(columns | {"2 / lr": "10.4g"})
    print(table.header)
    rows = []
    for step in sorted(settings.steps or found):
        found[step].load_weights(model, frozen=_frozen(model))
        rows.append(row := measure(model, batch, config, settings, step=step, lr=rates.get(step)))
        bound = 2 / row.lr if row.lr else None
        print(table.row(step, row.loss, row.eigenvalue, row.products, row.trace, row.trace_error, bound), flush=True)
    output = Path(settings.output_dir)
    write_results(output / "results.json", settings, checkpoints=[asdict(row) for row in rows])
    draw(rows, output / "sharpness.png", settings.run)
    print(f"results: {output}")
    return 0


def _frozen(model: LanguageModel) -> frozenset[str]:
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    return frozenset(frozen)


def _batch(config: PretrainConfig, settings: Settings) -> Batch:
    corpus = open_corpus(prepare(config.data).folder, config.data)
    sizes = {"sequence_length": config.train.sequence_length, "batch_size": settings.rows}
    if settings.data == "training":
        return corpus.training_batches(seed=config.seed, **sizes).at(0)
    held_out = corpus.held_out_batches(**sizes, max_tokens=0)
    if isinstance(held_out, HeldOutParts):
        raise ConfigError(f"data=held_out: run={settings.run} holds out text of several sources; use data=training")
    if held_out is None:
        raise ConfigError(f"data=held_out: run={settings.run} holds nothing out; use data=training")
    return held_out.at(0)


def measure(
    model: LanguageModel, batch: Batch, config: PretrainConfig, settings: Settings, *, step: int, lr: float | None
) -> Sharpness:
    """Of `model` as it is; it is left in float64."""
    weights = [weight for weight in model.double().parameters() if weight.requires_grad]
    sequence = SequenceContext(batch.cu_seqlens, config.kernels.backend)

    def loss() -> Tensor:
        summed: Tensor = model(batch.tokens, batch.labels, sequence=sequence)
        return summed / max(batch.label_count, 1)

    product, generator = hessian_product(loss, weights), torch.Generator().manual_seed(settings.seed)
    size = sum(weight.numel() for weight in weights)
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    eigenvalue, products = largest_eigenvalue(
        product, start, iterations=settings.iterations, tolerance=settings.tolerance
    )
    trace, error = hutchinson(product, size, samples=settings.samples, generator=generator)
    with torch.no_grad():
        value = float(loss())
    return Sharpness(step, value, eigenvalue, products, trace, error, lr)


def hessian_product(loss: Callable[[], Tensor], weights: Sequence[nn.Parameter]) -> Product:
    """`v -> H v`, the Hessian of `loss()` in `weights`, float64, as one vector; by central differences of gradients."""

    def gradient(offset: Tensor) -> Tensor:
        pieces = offset.split([weight.numel() for weight in weights])
        with torch.no_grad():
            before = [weight.clone() for weight in weights]
            for weight, piece in zip(weights, pieces, strict=True):
                weight.add_(piece.view_as(weight))
        found = torch.autograd.grad(loss(), weights, allow_unused=True)
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
        return torch.cat(
            [(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, found, strict=True)]
        )

    def product(vector: Tensor) -> Tensor:
        # So far that the largest change of a weight is `ASIDE`.
        far = ASIDE / vector.abs().max()
        return (gradient(far * vector) - gradient(-far * vector)) / (2 * far)

    return product


def largest_eigenvalue(product: Product, start: Tensor, *, iterations: int, tolerance: float) -> tuple[float, int]:
    """The largest eigenvalue of a symmetric matrix, and how many products it took (Lanczos 1950).

    `start`: not orthogonal to its vector. Three vectors are held: without orthogonalising against all, eigenvalues come
    to be found more than once, and the largest stays what it is.
    """
    vector, before = start / start.norm(), torch.zeros_like(start)
    diagonal: list[float] = []
    beside: list[float] = []
    found = last = 0.0
    for number in range(1, min(iterations, len(start)) + 1):
        new = product(vector)
        diagonal.append(float(new @ vector))
        new = new - diagonal[-1] * vector - (beside[-1] if beside else 0.0) * before
        off = torch.tensor(beside, dtype=torch.float64)
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        last, found = found, float(torch.linalg.eigvalsh(matrix)[-1])
        beside.append(float(new.norm()))
        if beside[-1] <= 1e-12 * abs(found) or (number > 2 and abs(found - last) <= tolerance * abs(found)):
            break
        vector, before = new / beside[-1], vector
    return found, number


def hutchinson(product: Product, size: int, *, samples: int, generator: torch.Generator) -> tuple[float, float]:
    """The trace of a symmetric matrix, and its standard error: the mean of `z^T H z` over random signs (1989)."""
    found = []
    for _ in range(samples):
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        found.append(float(signs @ product(signs)))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std() / samples**0.5)


def draw(rows: Sequence[Sharpness], path: Path, title: str) -> None:
    """The largest eigenvalue with 2 / lr, and the trace, against the steps."""
    figure = new_figure(10, 4)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    steps = [row.step for row in rows]
    left.plot(steps, [row.eigenvalue for row in rows], "o-", label="largest eigenvalue")
    bounds: Any = [(row.step, 2 / row.lr) for row in rows if row.lr]
    left.plot([x for x, _ in bounds], [y for _, y in bounds], "s--", color="tab:gray", label="2 / lr")
    left.set(xlabel="step", yscale="symlog", ylabel="of the Hessian of the mean loss")
    left.legend()
    right.errorbar(steps, [row.trace for row in rows], [row.trace_error for row in rows], fmt="o-", capsize=3)
    right.set(xlabel="step", ylabel="trace of the Hessian (bar: standard error)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)

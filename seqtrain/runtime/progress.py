"""The progress display: a bar on a terminal, a line now and then anywhere else."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from seqtrain.runtime.metrics import Record, Within

# Seconds between two lines where there is no terminal to draw a bar on.
QUIET_SECONDS = 10.0


class ProgressDisplay:
    """Shows the records of a run of `steps` steps on stderr; a context manager."""

    def __init__(self, *, steps: int, console: Console | None = None):
        self.steps = steps
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=steps, figures="starting")
        self._last_line = 0.0
        self._figures = "starting"
        # Steps done, the running one's parts counted.
        self._shown = 0.0

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, record: Record) -> None:
        """Moves the bar to the record's step."""
        step, self._figures = record["step"], _figures(record)
        self._shown = float(step)
        self._bar.update(self._task, completed=step, figures=self._figures)
        left = (self.steps - step) * record["step_seconds"]
        self._say(f"step {step}/{self.steps}  {self._figures}  {left:.0f} s left", last=step == self.steps)

    def show_within(self, within: Within) -> None:
        """Moves the bar to a place between two steps, where it isn't there already."""
        place = within.step + within.done / within.of
        if place <= self._shown:
            return
        self._shown = place
        part = f"part {within.done}/{within.of} of step {within.step + 1}"
        self._bar.update(self._task, completed=place, figures=f"{self._figures}  {part}")
        self._say(f"{part}  {self._figures}")

    def _say(self, line: str, *, last: bool = False) -> None:
        """A line where there is no bar, unless there was one just now."""
        now = time.monotonic()
        if not self._live and (last or now - self._last_line >= QUIET_SECONDS):
            self._last_line = now
            self.console.print(line, highlight=False)


def _figures(record: Record) -> str:
    loss = "not finite, skipped" if record["loss"] is None else f"{record['loss']:.4f}"
    figures = f"loss {loss}  {record['tokens_per_second']:,.0f} tokens/s"
    if held_out := record.get("held_out_bits_per_byte"):
        figures += f"  held-out {held_out:.4f} bits/byte"
    if (accuracy := record.get("held_out_accuracy")) is not None:
        figures += f"  held-out accuracy {accuracy:.4f}"
    return figures

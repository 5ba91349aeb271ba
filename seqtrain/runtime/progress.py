"""The progress display: a bar on a terminal, a line now and then anywhere else."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seqtrain.runtime.metrics import Record, Within

# Seconds between two lines where there is no terminal to draw a bar on.
QUIET_SECONDS = 10.0


class ProgressDisplay(Progress):
    """Shows the records of a run of `steps` steps on stderr; a context manager."""

    def __init__(self, *, steps: int, console: Console | None = None):
        console = console or Console(stderr=True)
        figures = TextColumn("{task.fields[figures]}")
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn()
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self.steps = steps
        self._figures = "starting"
        self._task = self.add_task("", total=steps, figures=self._figures)
        self._last_line = 0.0
        # Steps done, the running one's parts counted; what was said last between two steps.
        self._shown, self._part = 0.0, ""

    def show(self, record: Record) -> None:
        """Moves the bar to the record's step."""
        step, self._figures = record["step"], _figures(record)
        self._shown = float(step)
        self.update(self._task, completed=step, figures=self._figures)
        left = (self.steps - step) * record["step_seconds"]
        self._say_now_and_then(f"step {step}/{self.steps}  {self._figures}  {left:.0f} s left", last=step == self.steps)

    def show_within(self, within: Within) -> None:
        """Says what is being done between two steps; moves the bar to a place within one."""
        part = f"segment {within.done}/{within.of} of step {within.step + 1}"
        place = within.step + within.done / within.of
        if within.evaluation:
            part, place = f"evaluation {within.done}/{within.of} after step {within.step}", float(within.step)
        if part == self._part or place < self._shown or (place == self._shown and not within.evaluation):
            return
        self._part, self._shown = part, place
        self.update(self._task, completed=place, figures=f"{self._figures}  {part}")
        self._say_now_and_then(f"{part}  {self._figures}")

    def say(self, line: str) -> None:
        """A line for the user, above the bar where there is one."""
        self.console.print(line, highlight=False, markup=False)

    def _say_now_and_then(self, line: str, *, last: bool = False) -> None:
        """A line where there is no bar, unless there was one just now."""
        now = time.monotonic()
        if self.disable and (last or now - self._last_line >= QUIET_SECONDS):
            self._last_line = now
            self.say(line)


def _figures(record: Record) -> str:
    loss = "not finite, skipped" if record["loss"] is None else f"{record['loss']:.4f}"
    figures = f"loss {loss}  {record['tokens_per_second']:,.0f} tokens/s"
    if held_out := record.get("held_out_bits_per_byte"):
        figures += f"  held-out {held_out:.4f} bits/byte"
    if (accuracy := record.get("held_out_accuracy")) is not None:
        figures += f"  held-out accuracy {accuracy:.4f}"
    return figures

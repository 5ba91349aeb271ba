"""Callbacks of the training loop: how another program looks at a run from within its ranks."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

# A whole step; within one, the reading of its batches; what comes between steps.
Phase = Literal["step", "data", "evaluation", "checkpoint"]


class Callback:
    """A callback that does nothing; base of the others. One is made before the ranks start and pickled to each."""

    def begin(self, state: Any) -> None:
        """Called with the rank's `TrainState` before its first step, on all ranks."""

    def phase(self, name: Phase) -> AbstractContextManager[Any]:
        """Entered before each of a rank's phases and left after it."""
        return nullcontext()

    def end(self) -> None:
        """Called after the last step of a run that wasn't stopped, when its checkpoint is written; on all ranks."""

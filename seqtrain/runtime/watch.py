"""How another program looks on while a run trains, without the runtime knowing what it looks for."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

# A whole step; within one, the reading of its batches; what comes between steps.
Phase = Literal["step", "data", "evaluation", "checkpoint"]


class Watch(Protocol):
    """One object a rank, made by the process that starts the run and sent to all ranks: so it can be pickled."""

    def begin(self, training: Any) -> None:
        """Called with the rank's `Training` before its first step, on all ranks."""

    def during(self, phase: Phase) -> AbstractContextManager[Any]:
        """Entered before each of a rank's phases and left after it."""

    def end(self) -> None:
        """Called after the last step of a run that wasn't stopped, when its checkpoint is written; on all ranks."""


class Unwatched:
    """Nobody looks on."""

    def begin(self, training: Any) -> None:
        return

    def during(self, phase: Phase) -> AbstractContextManager[Any]:
        return nullcontext()

    def end(self) -> None:
        return


UNWATCHED = Unwatched()

"""Where the program's log goes: all of it to a file of the run, warnings to stderr too."""

import logging
import sys
from pathlib import Path

LOGGER = logging.getLogger("seqtrain")


def log_to(file: Path) -> None:
    """Appends everything the logger `seqtrain` and its children say to `file`; replaces an earlier file."""
    for handler in [h for h in LOGGER.handlers if isinstance(h, logging.FileHandler)]:
        LOGGER.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)


def warn_on_stderr() -> None:
    """Shows warnings of `seqtrain` on stderr, one line each, unless someone has set up a handler for it already."""
    if any(isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler) for h in LOGGER.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.propagate = False

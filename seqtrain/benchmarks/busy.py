"""Another process that keeps cores busy: what a shared machine does to a measurement."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WORK = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
a = torch.randn(512, 512)
print("ready", flush=True)
while True:
    a @ a
"""


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """While it lasts, a second process multiplies matrices in so many threads."""
    process = subprocess.Popen([sys.executable, "-c", _WORK, str(threads)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()

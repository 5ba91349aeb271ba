"""Peak memory is this program's own."""

import mmap
import subprocess
import sys
import time
from collections.abc import Callable

from seqtrain.memory import AnonymousPeak

CODE = """
from seqtrain.memory import peak_resident_bytes
before = peak_resident_bytes()
block = bytearray(200_000_000)
del block
print(before, peak_resident_bytes())
"""


def wait_until(holds: Callable[[], bool]) -> None:
    """Give other threads their turn until they have made `holds` true, a minute at most."""
    end = time.monotonic() + 60
    while not holds() and time.monotonic() < end:
        time.sleep(0.001)


def test_the_peak_is_that_of_this_program_alone():
    held = bytearray(b"x" * 600_000_000)  # by the parent, when it forks
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60)
    before, after = map(int, done.stdout.split())
    assert len(held) > before
    assert 150_000_000 < after - before < 300_000_000


def test_memory_without_a_file_is_counted_and_mapped_files_are_not(tmp_path):
    (tmp_path / "file").write_bytes(bytes(60_000_000))
    with AnonymousPeak() as peak:
        # Not from the heap, where memory may be left over that counted before.
        with mmap.mmap(-1, 40_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            block[:] = b"x" * 40_000_000
            # The watcher is another thread, which may not have had its turn while the block was filled.
            wait_until(lambda: peak.bytes > 35_000_000)
        with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[:: mmap.PAGESIZE]) == 0
    assert 35_000_000 < peak.bytes < 90_000_000

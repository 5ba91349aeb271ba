"""Peak memory is this program's own."""

import subprocess
import sys

CODE = """
from seqtrain.memory import peak_resident_bytes
before = peak_resident_bytes()
block = bytearray(200_000_000)
del block
print(before, peak_resident_bytes())
"""


def test_the_peak_is_that_of_this_program_alone():
    held = bytearray(b"x" * 600_000_000)  # by the parent, when it forks
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60)
    before, after = map(int, done.stdout.split())
    assert len(held) > before
    assert 150_000_000 < after - before < 300_000_000

"""What the C library does with freed memory is changed for a start, and stays as the user has asked for."""

import pytest

from seqtrain import memory


class Settings:
    """In place of glibc."""

    def __init__(self):
        self.set = []

    def mallopt(self, which, value):
        self.set.append((which, value))

    def malloc_trim(self, _):
        pass


@pytest.mark.parametrize("asked", ["", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_environment_says_of_freed_memory_stays(asked, monkeypatch):
    glibc = Settings()
    monkeypatch.setattr(memory, "_glibc", lambda: glibc)
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    if asked:
        monkeypatch.setenv(asked, "1048576")
    with memory.large_tensors_given_back(4096):
        assert glibc.set == ([] if asked else [(-3, 4096)])
    assert glibc.set == ([] if asked else [(-3, 4096), (-3, 32 * 2**20), (-1, 64 * 2**20)])

"""The native library: the one that a wheel brings for this processor, else one that is built on first use and kept.

A wheel holds a library for each level of x86-64 in `LEVELS`; none of them links PyTorch, so they fit any version of it.
Elsewhere, as in a checkout, the library is compiled for this very processor and kept in the user's cache folder, under
a hash of the sources, the flags, PyTorch's version, the compiler and the processor's features: an update, or another
machine with the same home folder, builds its own. Of processes that start together one builds; the others wait for its
lock.
"""

import ctypes
import hashlib
import logging
import tempfile
from functools import cache
from pathlib import Path

import torch

from seqtrain.kernels.native import compiler as cxx
from seqtrain.kernels.native.compiler import BUILD_SECONDS, LEVELS, NativeError

log = logging.getLogger("seqtrain.kernels")

# Where a wheel has its libraries, `LEVEL.so`; a checkout has none.
PREBUILT = Path(__file__).parent / "prebuilt"


@cache
def unavailable() -> str | None:
    """Why the native kernels can't run here, or None. Builds them if that has not been done."""
    try:
        library()
    except NativeError as error:
        log.warning("no native kernels: %s; recurrences and tensor attention run slower, in PyTorch", error)
        return str(error)
    return None


def must_build() -> bool:
    """Whether the first call would compile the kernels, which takes half a minute."""
    if any((PREBUILT / f"{level}.so").exists() for level in _levels()):
        return False
    try:
        return not _cached(cxx.find_compiler()).exists()
    except NativeError:
        return False


@cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises `NativeError`."""
    return _prebuilt() or _load(_built())


def _prebuilt() -> ctypes.CDLL | None:
    """The wheel's library for this processor, if it has one that loads."""
    path = next((x for level in _levels() if (x := PREBUILT / f"{level}.so").exists()), None)
    if path is None:
        return None
    try:
        found = _load(path)
    except NativeError as error:
        log.info("native kernels: %s %s", path.name, error)
        return None
    log.info("native kernels: the wheel's, for %s", path.stem)
    return found


def _levels() -> list[str]:
    """Those of `LEVELS` that this processor has, best first."""
    features, capability = _processor_features(), torch.backends.cpu.get_cpu_capability()
    return [level for level, (names, needed) in LEVELS.items() if capability in names and needed <= features]


def _processor_features() -> set[str]:
    """What /proc/cpuinfo lists; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _built() -> Path:
    """The library in the cache, built if it is not there."""
    compiler = cxx.find_compiler()
    try:
        path = _cached(compiler)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _build_once(compiler, path)
    except OSError as error:
        raise NativeError(f"can't be built: {error.filename or 'cache'}: {error.strerror or error}") from error
    return path


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"can't be loaded: {error}") from error


def cache_folder() -> Path:
    """Where libraries are kept."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("seqtrain")) / "native"


def _cached(compiler: str) -> Path:
    return cache_folder() / f"{_key(compiler)}.so"


def _key(compiler: str) -> str:
    """What the library depends on, hashed."""
    parts = [cxx.macros(compiler), " ".join(cxx.FLAGS), torch.__version__]
    parts += [f"{path.name}\n{path.read_text()}" for path in cxx.sources()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _build_once(compiler: str, path: Path) -> None:
    """Builds `path` unless another process has done so by the time its lock is free."""
    import filelock

    try:
        with filelock.FileLock(path.with_suffix(".lock"), timeout=BUILD_SECONDS):
            if path.exists():
                return
            log.info("native kernels: building with %s", compiler)
            # Next to the library, so that it appears complete or not at all.
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / path.name
                cxx.build(compiler, "native", built)
                built.replace(path)
    except filelock.Timeout:
        raise NativeError(f"waited {BUILD_SECONDS} s for another process to build it") from None

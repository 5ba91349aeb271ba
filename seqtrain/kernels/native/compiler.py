"""Compiles the C++ sources; standard library only, since the build of a wheel runs it where nothing is installed."""

import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent
# No -ffast-math: it would change results for infinities and reorder sums. Contraction is only a*b+c in one step.
FLAGS = ("-O3", "-std=gnu++17", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared")
# What a wheel has a library for, best first: `-march` names, what PyTorch calls processors of the level
# (ATEN_CPU_CAPABILITY lowers it), and the features that Linux lists for it.
LEVELS = {
    "x86-64-v4": (("AVX512",), {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "x86-64-v3": (("AVX512", "AVX2"), {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
}
# A build takes about ten seconds; a machine that needs longer than this is not waited for.
BUILD_SECONDS = 300


class NativeError(RuntimeError):
    """The library can't be built or loaded here; the message says why."""


def find_compiler() -> str:
    """The C++ compiler: `$CXX` if set, else the first of the usual names. Raises `NativeError`."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise NativeError(f"needs a C++ compiler ({f'CXX={asked} is not found' if asked else 'c++, g++ or clang++'})")


def sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])


def build(compiler: str, processor: str, path: Path) -> None:
    """Writes the library for a `processor` as `-march` names it. Raises `NativeError`."""
    files = [str(x) for x in sources() if x.suffix == ".cpp"]
    run([compiler, *FLAGS, f"-march={processor}", *files, "-o", str(path)])


def macros(compiler: str) -> str:
    """The compiler's macros, which name its version and what `-march=native` stands for. Raises `NativeError`."""
    return run([compiler, *FLAGS, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])


def run(command: list[str]) -> str:
    """The command's output. Raises `NativeError` with the first error it prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NativeError(f"{command[0]} took more than {BUILD_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line.lower()), lines[0])
        raise NativeError(f"can't be built: {command[0]}: {reason.strip()}")
    return done.stdout

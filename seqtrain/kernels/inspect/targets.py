"""The GPUs that kernels are inspected for, and a driver that makes Triton compile for one that is not here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seqtrain.kernels import gpu


@dataclass(frozen=True)
class Target:
    """A GPU's limits. Bytes of shared memory: `shared`, per multiprocessor (AMD: compute unit); `shared_block`, the
    most a block may use; `shared_reserved`, taken by the system for each block."""

    name: str
    device: int
    backend: str
    arch: int | str
    warp: int
    shared: int
    shared_block: int
    shared_reserved: int
    # Spilled bytes per thread that a pinned configuration may have.
    spill_limit: int
    # Prefixes of its fastest matrix instructions, of others, and of copies to shared memory that bypass registers.
    wide_matrix: tuple[str, ...]
    narrow_matrix: tuple[str, ...]
    copies: tuple[str, ...]

    def blocks(self, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
        """Blocks that fit on a multiprocessor at a time, by registers per thread, bytes of shared memory, and columns
        of tensor memory (of 512)."""
        by_shared = self.shared // (shared + self.shared_reserved) if shared else 32
        if self.backend == "hip":
            # 512 registers per lane on each of four units, shared by at most 8 waves each.
            waves = 4 * min(8, 512 // max(8, _up(registers, 8)))
            return min(waves // warps, by_shared, 16)
        threads = warps * self.warp
        by_registers = 65536 // (max(24, _up(registers, 8)) * threads)
        by_columns = 512 // tensor_columns if tensor_columns else 32
        return min(by_registers, by_shared, by_columns, 2048 // threads, 32)


def _up(x: int, step: int) -> int:
    return -(-x // step) * step


# By bulk (TMA), and by thread.
_COPIES = ("UTMALDG", "UTMASTG", "LDGSTS")
# Sources: NVIDIA's CUDA C++ programming guide, table of compute capabilities; AMD's CDNA 3 instruction set guide.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 0, "cuda", 80, 32, 167936, 166912, 1024, 64, ("HMMA",), (), ("LDGSTS",)),
        Target("sm_90", 1, "cuda", 90, 32, 233472, 232448, 1024, 0, ("HGMMA",), ("HMMA",), _COPIES),
        Target("sm_100", 2, "cuda", 100, 32, 233472, 232448, 1024, 0, ("UTCHMMA", "UTCQMMA"), ("HMMA",), _COPIES),
        Target("gfx942", 3, "hip", "gfx942", 64, 65536, 65536, 0, 64, ("v_mfma",), (), ("buffer_load", "global_load")),
    )
}
assert tuple(TARGETS) == gpu.TARGETS


class _Driver:
    """What Triton asks a driver for before a launch."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.arch, target.warp)
        self.device = target.device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device: one number per target.
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def by_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A launch's arguments by name: those in a tuple by its name and their place, compile-time ones by their own."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, gpu.Constants):
            found |= vars(value)
        elif isinstance(value, tuple):
            found |= {f"{name}[{place}]": each for place, each in enumerate(value)}
        else:
            found[name] = value
    return found


def use_target(name: str) -> None:
    """Makes this process compile (or interpret) for a target, whatever GPU it has, until the next call."""
    from triton.runtime.driver import driver

    driver.set_active(_Driver(TARGETS[name]))

"""Puts native kernels for two levels of x86-64 into a wheel built on Linux; without a compiler it stays pure Python."""

import importlib.util
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "seqtrain/kernels/native"


class NativeKernels(BuildHookInterface):
    """Compiles `PREBUILT/LEVEL.so` of seqtrain.kernels.native.build for each level."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # A checkout compiles on first use, for its own processor.
        if version == "editable" or sys.platform != "linux" or platform.machine() != "x86_64":
            return
        compiler = self.compiler()
        self.folder = tempfile.TemporaryDirectory()
        built = {level: Path(self.folder.name, f"{level}.so") for level in compiler.LEVELS}
        try:
            for level, path in built.items():
                compiler.build(compiler.find_compiler(), level, path)
        except compiler.NativeError as error:
            self.app.display_warning(f"native kernels: {error}; this wheel has none and compiles them on first use")
            return
        build_data["force_include"] |= {str(path): f"{NATIVE}/prebuilt/{path.name}" for path in built.values()}
        build_data["pure_python"] = False
        # No Python ABI is used, only C's through ctypes.
        build_data["tag"] = "py3-none-linux_x86_64"

    def finalize(self, version: str, build_data: dict[str, Any], artifact: str) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def compiler(self) -> Any:
        """The module `compiler` of the native kernels, without the package around it, which needs PyTorch."""
        spec = importlib.util.spec_from_file_location("compiler", Path(self.root, NATIVE, "compiler.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

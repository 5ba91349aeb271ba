"""The Python standard library's own sources: the corpus that is on every machine."""

import sysconfig
from pathlib import Path

from seqtrain.data.sources._files import Found, ending_in, walk
from seqtrain.data.sources.text import TextFiles
from seqtrain.errors import ConfigError

# Packages' tests are left out (distributions ship them or not), so is what is not the library's, and so are generated
# tables: the character maps in `encodings` are near-copies of one another, and a held-out one would be no test.
SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


class StandardLibrary(TextFiles):
    """Every `*.py` of the running Python's standard library, without tests, installed packages and generated tables.

    About 10 MB in 600 files. Whole files are held out, chosen by a hash of their names. `data.path` has no effect.
    """

    suffix = ".py"

    def find(self) -> tuple[Path, Found]:
        if self.part.path:
            raise ConfigError(f"{self.part.key}={self.part.path}: data.source=stdlib reads no path; use data=text")
        root = Path(sysconfig.get_path("stdlib"))
        # Written when Python was built: it holds paths and flags of one machine.
        files = walk(root, ending_in(".py"), SKIPPED).files
        return root, Found([file for file in files if not file.name.startswith("_sysconfigdata")])

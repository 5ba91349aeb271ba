"""seqtrain: training of language models on very long sequences."""

from pathlib import Path
from typing import TYPE_CHECKING

from seqtrain.hub import register_with_transformers

if TYPE_CHECKING:
    from seqtrain.runtime.loading import Loaded

__version__ = "0.1.0"

register_with_transformers()


def load(folder: str | Path) -> "Loaded":
    """The `.model`, `.tokenizer` and `.config` of a run's folder or an exported model's, as `runtime.loading.load`."""
    # Imported here, so that `import seqtrain` stays light.
    from seqtrain.runtime.loading import load

    return load(folder)

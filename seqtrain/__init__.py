"""seqtrain: training of language models on very long sequences."""

import importlib
from pathlib import Path
from typing import Any

from seqtrain.hub import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()


def load(folder: str | Path) -> Any:
    """The `.model`, `.tokenizer` and `.config` of a run's folder or an exported model's.

    Described at `seqtrain.runtime.loading.load`, which is imported only here, so that `import seqtrain` stays light.
    """
    return importlib.import_module("seqtrain.runtime.loading").load(folder)


def accelerate_hf(model: Any) -> Any:
    """Puts seqtrain's operators under the recurrent layers of a transformers model; what it returns undoes it.

    Described at `seqtrain.models.accelerate.accelerate_hf`, imported only here, so that `import seqtrain` stays light.
    """
    return importlib.import_module("seqtrain.models.accelerate").accelerate_hf(model)

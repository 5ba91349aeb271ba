"""Makes Hugging Face's Auto classes know seqtrain's models, without importing transformers itself."""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The modules of transformers that hold a registry, and what is to be entered there.
CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"


def register_with_transformers() -> None:
    """Registers the models now where transformers is there already, else as soon as it is imported."""
    for name, register in {CONFIGS: _register_config, MODELS: _register_model}.items():
        if module := sys.modules.get(name):
            register(module)
        else:
            sys.meta_path.insert(0, _ImportHook(name, register))


def _register_config(module: Any) -> None:
    config = importlib.import_module("seqtrain.models.huggingface_config").SeqtrainConfig
    module.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_model(module: Any) -> None:
    model = importlib.import_module("seqtrain.models.huggingface").SeqtrainForCausalLM
    module.AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)


class _ImportHook(MetaPathFinder):
    """Import hook: calls `act` when module `name` has been imported."""

    def __init__(self, name: str, act: Any):
        self.name = name
        self.act = act

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, self.act)
        return spec


class _CallbackLoader(Loader):
    """A loader that calls `act` with the module it has loaded."""

    def __init__(self, loader: Loader, act: Any):
        self.loader = loader
        self.act = act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.act(module)

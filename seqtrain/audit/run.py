"""Checks a hybrid language model of transformers for what goes wrong in silence.

    python tools/audit.py model=path/to/SmolLM2-135M
    python tools/audit.py model=path/to/SmolLM2-135M 'checks=[documents,cached decoding]'
    python tools/audit.py model=path/to/SmolLM2-135M/config.json accelerate=true

A folder with weights is audited with these; a folder or file with a config alone, or a model with more than
`most_parameters`, as a small random one of that config, and the first line says how small. What is found is one line
each: the check, the module in which it is first visible, and where to look. Exit status: 1 with findings, 0 without.
For functions of your own, and trainers: `seqtrain.audit.audit`.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from seqtrain.audit import CHECKS, audit, of_huggingface
from seqtrain.audit.folder import open_folder
from seqtrain.config import read_settings
from seqtrain.errors import ConfigError, unknown_name
from seqtrain.report import say


@dataclass(frozen=True)
class Settings:
    # Folder of a transformers model, or its config.json.
    model: str = ""
    # Which checks are made; all where empty.
    checks: tuple[str, ...] = ()
    # Whether seqtrain's operators are put under it first, as seqtrain.accelerate_hf does.
    accelerate: bool = False
    # Parameters up to which the folder's own weights are audited.
    most_parameters: Annotated[float, Field(gt=0)] = 5e7


def main(arguments: list[str]) -> int:
    settings = read_settings(Settings, arguments)
    if not settings.model:
        raise ConfigError("model: is required")
    for name in settings.checks:
        if name not in CHECKS:
            raise ConfigError("checks: " + unknown_name("check", name, CHECKS))
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model, about = open_folder(settings.model, settings.most_parameters)
    if settings.accelerate:
        from seqtrain.models.accelerate import accelerate_hf

        accelerate_hf(model)
    say(about)
    report = audit(of_huggingface(model), settings.checks, tell=lambda line: say(line))
    say(str(report).splitlines()[-1])
    return 1 if report.findings else 0

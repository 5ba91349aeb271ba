"""Dataclasses read from their source are the dataclasses that Python makes of it."""

from dataclasses import MISSING

import pytest

from seqtrain import schema
from seqtrain.config_reference import PAGE, write_reference
from seqtrain.encoders import ENCODERS
from seqtrain.mixers import MIXERS
from seqtrain.profiling import ProfileConfig
from seqtrain.runtime.generate import GenerateConfig
from seqtrain.runtime.run_folder import plain
from seqtrain.runtime.settings import PretrainConfig
from seqtrain.schema import definition, mixer_definition, mixer_names
from seqtrain.validation import validate

SOURCE = """
from dataclasses import dataclass, field

WIDTH = 2**4


@dataclass(frozen=True)
class Inner:
    # Of the inner one,
    # in two lines.
    width: int = WIDTH
    names: tuple[str, ...] = ("a",)


class Layer:
    @dataclass(frozen=True)
    class Config(Inner):
        inner: Inner
        needed: float
        many: dict[str, int] = field(default_factory=lambda: {"x": 1})
        depth: int = 3  # blocks
"""


def test_fields_are_read_with_their_comments(tmp_path, monkeypatch):
    (tmp_path / "shapes.py").write_text(SOURCE)
    monkeypatch.setattr(schema, "ROOT", tmp_path)
    config = definition("shapes:Layer.Config")
    keys = config.keys()
    assert list(keys) == ["width", "names", "inner", "needed", "many", "depth"]
    assert keys["width"].comment == "Of the inner one, in two lines."
    assert keys["depth"].comment == "blocks"
    assert keys["needed"].default is MISSING
    inner = {"width": 16, "names": ["a"]}
    assert config.defaults() == {**inner, "inner": inner, "many": {"x": 1}, "depth": 3}


@pytest.mark.parametrize("name", MIXERS.names)
def test_every_mixer_s_defaults_are_those_of_its_config(name):
    cls = MIXERS.get(name).Config
    found, real = mixer_definition(name).defaults(), plain(cls())
    # What they mean, where they hold configs of others, which files give in part.
    assert (plain(validate(cls, found)) if name == "parallel" else found) == real
    assert list(found) == list(real)


def test_the_programs_defaults_are_those_of_their_dataclasses():
    assert mixer_names() == sorted((*MIXERS.names, *ENCODERS.names))
    assert definition("seqtrain.profiling:ProfileConfig").defaults() == plain(ProfileConfig())
    assert definition("seqtrain.runtime.generate:GenerateConfig").defaults() == plain(GenerateConfig())
    real = plain(PretrainConfig(output_dir=""))
    assert definition("seqtrain.runtime:PretrainConfig").defaults() == {
        k: v for k, v in real.items() if k != "output_dir"
    }


def test_the_reference_is_current():
    assert PAGE.read_text() == write_reference(), "python -m seqtrain.config_reference writes it"


def test_every_key_has_a_meaning():
    targets = ["seqtrain.runtime:PretrainConfig", "seqtrain.convert:ConvertConfig", "seqtrain.profiling:ProfileConfig"]
    keys = [key for target in targets for key in definition(target).keys().values()]
    keys += [key for name in mixer_names() for key in mixer_definition(name).keys().values()]
    for key in keys:
        for each in key.nested.keys().values() if key.nested else [key]:
            assert each.comment, each.name

"""Wrong input of every kind ends in one line that names the culprit, or is taken; nothing else."""

import copy
import math
import random

import pytest
from omegaconf import OmegaConf

from seqtrain.config import _leaves, compose_config
from seqtrain.errors import ConfigError
from seqtrain.runtime.checks import check
from seqtrain.runtime.generate import GenerateConfig
from seqtrain.runtime.resolving import typed_pretrain_config
from seqtrain.validation import validate

WRONG = [-1, 0, 10**29, 10**14, 1e29, 1e308, -0.5, math.nan, math.inf, "", "x", "\0", [], ["x"], {"x": 1}, None, True]


def cases() -> list[tuple[str, object]]:
    """Every key of a training run with every wrong value, in an order that is the same each time."""
    keys = [key for key, _ in _leaves(compose_config("pretrain", ["data=selective_copy"]))]
    every = [(key, value) for key in keys for value in WRONG]
    random.Random(0).shuffle(every)
    return every


def outcome(key: str, value: object, plain: dict) -> str:
    """What is wrong with how a run with this value is refused; empty where it is refused well, or taken."""
    values = copy.deepcopy(plain)
    node, parts = values, key.split(".")
    for part in parts[:-1]:
        node = node[part]
    node[parts[-1]] = value
    try:
        check(typed_pretrain_config(values))
    except ConfigError as error:
        named = key in str(error) or any(part in str(error) for part in (parts[0] + ".", parts[-1]))
        return "" if named and "\n" not in str(error) else f"{key}={value!r}: {error}"
    except Exception as error:
        return f"{key}={value!r}: {type(error).__name__}: {error}"
    return ""


def refused_badly(count: int | None) -> list[str]:
    quick = ["data=selective_copy", "runtime=inline", "model.width=32", "model.heads=2", "model.depth=2"]
    plain = OmegaConf.to_container(compose_config("pretrain", [*quick, "output_dir=unused"]), resolve=True)
    return [found for key, value in cases()[:count] if (found := outcome(key, value, plain))]


@pytest.mark.all
def test_a_sample_of_wrong_values_is_one_line_each():
    assert refused_badly(200) == []


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_every_wrong_value_of_every_key_is_one_line():
    assert refused_badly(None) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**23, 2**53, -(2**53)])
def test_a_number_that_is_none_is_named(value):
    with pytest.raises(ConfigError, match=r"^x\.temperature=.*: must be a finite number below"):
        validate(GenerateConfig, {"temperature": value}, prefix="x.")

"""The registry takes its names from files and helps with misspelt ones."""

import sys
from textwrap import dedent

import pytest

from seqtrain.errors import ConfigError
from seqtrain.registry import Registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "_parts.py").write_text("raise RuntimeError('shared parts are not entries')")
    (folder / "cat.py").write_text(
        dedent("""
            from collections import OrderedDict

            class Base(OrderedDict): ...
        """)
    )
    (folder / "broken.py").write_text("raise RuntimeError('imported too early')")
    monkeypatch.syspath_prepend(tmp_path)
    yield "zoo"
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]


def test_a_file_is_an_entry_and_is_imported_when_asked_for(package):
    registry = Registry("animal", package, dict)
    assert registry.names == ("broken", "cat")
    assert registry.get("cat").__name__ == "Base"


def test_an_unknown_name_lists_the_nearest(package):
    with pytest.raises(ConfigError, match="animal 'cta' is unknown; did you mean 'cat'\\? Known: broken, cat"):
        Registry("animal", package, dict).get("cta")

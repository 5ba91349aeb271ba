"""What the tests of conversion share."""

import pytest

from tests.convert.convert_cases import make_transformer


@pytest.fixture(scope="session")
def transformers_on_disk(tmp_path_factory):
    """Maker of `(model, folder)` by kind; each is made once."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("sources") / kind
            model = make_transformer(kind)
            model.save_pretrained(folder)
            made[kind] = model, folder
        return made[kind]

    return make

"""What commands make of damaged files: one line that names the culprit, in time, and nothing left behind."""

import pytest

from tests.hostile.bases import BASES
from tests.hostile.hostile_cases import made, try_case


def taken_badly(name: str, count: int) -> list[str]:
    with made(BASES) as find:
        return [wrong for number in range(count) if (wrong := try_case(BASES[name], find(name), number, name))]


@pytest.mark.all
@pytest.mark.parametrize("name", BASES)
def test_a_sample_of_damaged_files_is_one_line_each(name):
    assert taken_badly(name, 3) == []


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", BASES)
def test_damaged_files_are_one_line_each(name):
    assert taken_badly(name, 100) == []

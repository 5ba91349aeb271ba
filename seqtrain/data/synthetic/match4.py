"""Match4: whether a quadruple adds up, the next after Match3 (Sanford et al. 2023, arXiv 2306.02896)."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from seqtrain.data.synthetic.match3 import Match3


class Match4(Match3):
    """Is there a triple of numbers that adds up with the query to 0 mod M? As Match3 otherwise."""

    terms = 3

    @dataclass(frozen=True)
    class Config(Match3.Config):
        # M: numbers and sums are taken modulo it.
        modulus: Annotated[int, Field(gt=2)] = 64
        # Numbers before the queries. A row with few has few sums of triples, and more queries whose answer is no.
        numbers: Annotated[int, Field(gt=0)] = 4

"""ListOps (Nangia and Bowman 2018, arXiv 1804.06028): nested operations on lists of digits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from seqtrain.data.synthetic._base import Task, nothing_asked

# The paper's: with this chance an argument is an operation, else a digit.
OPERATION_CHANCE = 0.25
FILLING, CLOSE, FIRST_OPERATION, FIRST_DIGIT = 0, 1, 2, 6
# In the order of their ids: minimum, maximum, median (rounded down), sum modulo 10.
OPERATIONS: tuple[Callable[[list[int]], int], ...] = (
    min,
    max,
    lambda arguments: int(np.median(arguments)),
    lambda arguments: sum(arguments) % 10,
)


class ListOps(Task):
    """An operation on digits and further operations; at its last token the answer is its value, a digit.

    The published grammar: each argument is an operation with chance 1/4 and a digit otherwise, and an operation has
    two arguments or more, all numbers and all four operations equally likely. Expressions that don't fit into the row
    are drawn again; shorter ones stand at its end. Ids: filling, the closing bracket, `[MIN [MAX [MED [SM`, ten digits.
    """

    @dataclass(frozen=True)
    class Config:
        # Most arguments of an operation (5 in the paper, 10 in the Long Range Arena).
        arguments: Annotated[int, Field(ge=2, le=100)] = 5
        # Most operations inside one another (20 in the paper, 10 in the Long Range Arena).
        depth: Annotated[int, Field(ge=1, le=100)] = 20
        # Fewest tokens of an expression.
        tokens: Annotated[int, Field(ge=4)] = 4

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size, self.chance = FIRST_DIGIT + 10, 0.1
        # Twice the least: expressions far longer than usual are rare, and finding one would take long.
        self.shortest = max(8, 2 * config.tokens)

    def example(self, length: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        while True:
            expression: list[int] = []
            value = self._operation(expression, 1, length, draw)
            if self.config.tokens <= len(expression) <= length:
                break
        tokens, labels = np.full(length, FILLING, dtype=np.int64), nothing_asked(length)
        tokens[-len(expression) :] = expression
        labels[-1] = FIRST_DIGIT + value
        return tokens, labels

    def _operation(self, tokens: list[int], depth: int, length: int, draw: np.random.Generator) -> int:
        """Appends an operation to `tokens` and gives its value; one that is too long already need not be finished."""
        operation = int(draw.integers(len(OPERATIONS)))
        tokens.append(FIRST_OPERATION + operation)
        values = []
        for _ in range(draw.integers(2, self.config.arguments, endpoint=True)):
            if len(tokens) > length:
                return 0
            if depth < self.config.depth and draw.random() < OPERATION_CHANCE:
                values.append(self._operation(tokens, depth + 1, length, draw))
            else:
                values.append(int(draw.integers(10)))
                tokens.append(FIRST_DIGIT + values[-1])
        tokens.append(CLOSE)
        return OPERATIONS[operation](values)

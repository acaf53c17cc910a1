"""The settings that exactness is tested over."""

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

#: `FDG_FULL=1` in the environment: every setting on every model.
FULL = os.environ.get("FDG_FULL", "0") not in ("", "0")

ORDERS = ("forward_first", "update_first")
OPTIMIZERS = ("sgd", "adam")
SHRINKS = (1.0, 0.5)


class Setting(NamedTuple):
    K: int
    delay: int
    order: str
    shrink: float
    optimizer: str

    def make_optimizer(self) -> keras.optimizers.Optimizer:
        if self.optimizer == "adam":
            return keras.optimizers.Adam(0.01)
        return keras.optimizers.SGD(0.05, momentum=0.9)

    @property
    def rule(self) -> dict[str, Any]:
        """What the library and the reference take by the same names."""
        return {
            "delay": self.delay,
            "shrink": self.shrink,
            "order": self.order,
        }

    def __str__(self) -> str:
        return "-".join(map(str, ("K" + str(self.K), *self[1:])))


def complete() -> list[Setting]:
    """All 128 settings."""
    return [
        Setting(*values)
        for values in itertools.product(
            (1, 2, 3, 4), (0, 1, 2, 3), ORDERS, SHRINKS, OPTIMIZERS
        )
    ]


def distinct() -> list[Setting]:
    """The settings that differ: all but repetitions of the same training.

    One stage has no hop, so delay, order and shrink change nothing; without
    a delay no update can come before its forward.
    """
    return [
        s
        for s in complete()
        if (s.K > 1 or s[1:4] == (2, "forward_first", 0.5))
        and (s.delay > 0 or s.order == "forward_first")
    ]


def covering(candidates: Sequence[tuple], strength: int) -> list[tuple]:
    """Few of the candidates that show all that they show in combination.

    Every combination of values of any `strength` factors (positions in the
    tuples) that occurs among the candidates occurs among the chosen ones.
    """

    def shown(values: tuple) -> set[tuple]:
        return set(itertools.combinations(enumerate(values), strength))

    missing = set().union(*map(shown, candidates))
    chosen = []
    while missing:
        best = max(candidates, key=lambda c: len(shown(c) & missing))
        chosen.append(best)
        missing -= shown(best)
    return chosen


def pairwise(*factors: Sequence[Any]) -> list[tuple]:
    """Few tuples that show every pair of values of every two factors."""
    return covering(list(itertools.product(*factors)), 2)

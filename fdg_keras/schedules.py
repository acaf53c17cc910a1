"""Schedules: in which order the stages of a pipeline run their passes.

A schedule is, for each stage, a sequence of passes: `("F", i)`, a forward, or
`("B", i)`, a backward with its update, of unit i. A unit is what travels at
once: a batch, or one of the micro-batches of a batch, counted on from batch to
batch. Neighbours run the units of a kind in the same order, so that first in,
first out is all that links between them need.

Only `Delayed` is what the library trains by. The others are there to be
compared with, by `simulation.simulate`.
"""

import numbers
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from fdg_keras.delays import ORDERS, Order, link_capacity, stage_delay

Pass = tuple[Literal["F", "B"], int]
#: How micro-batches are ordered.
FLUSHES = ("gpipe", "1f1b")


@runtime_checkable
class Schedule(Protocol):
    """What a simulation asks of a schedule; K is `splits`."""

    @property
    def micro_batches(self) -> int:
        """Returns M, into how many units a batch is divided."""

    @property
    def capacity(self) -> int:
        """Returns how many units fit in a link."""

    def tick(self, stage: int, splits: int, tick: int) -> list[Pass]:
        """Returns what a stage runs at a tick, of which each has a batch."""

    def fill(self, splits: int) -> int:
        """Returns after how many ticks every stage runs both passes."""

    def in_flight(self, stage: int, splits: int) -> int:
        """Returns of how many units at most a stage awaits the backward."""

    def versions(self, stage: int, splits: int) -> int:
        """Returns with how many versions of the weights these were run."""


@dataclass(frozen=True)
class Delayed:
    """Delayed gradients: stage k runs B(t - d_k) at the tick of F(t).

    See `delays`. `delay=0` is locked back-propagation, one stage at a time;
    1 is the schedule of DDG and PipeDream; 2 is FDG.

    Attributes:
        delay: Batches of delay per hop.
        order: Whether F or B comes first in a tick.

    Raises:
        ValueError: If one of them is out of range.
    """

    delay: int = 2
    order: Order = "forward_first"

    def __post_init__(self) -> None:
        check_whole("delay", self.delay, "the batches of delay per hop", 0)
        if self.order not in ORDERS:
            raise ValueError(
                f"Expected `order` to be one of {ORDERS}. Received: "
                f"order={self.order!r}"
            )

    @property
    def micro_batches(self) -> int:
        """Batches travel whole."""
        return 1

    @property
    def capacity(self) -> int:
        """See `delays.link_capacity`."""
        return link_capacity(self.delay)

    def tick(self, stage: int, splits: int, tick: int) -> list[Pass]:
        """Returns one or two passes, as `delays.timeline` has them."""
        late = stage_delay(stage, splits, self.delay)
        if tick < late:
            return [("F", tick)]
        if late and self.order == "update_first":
            return [("B", tick - late), ("F", tick)]
        return [("F", tick), ("B", tick - late)]

    def fill(self, splits: int) -> int:
        """Returns d_0."""
        return stage_delay(0, splits, self.delay)

    def in_flight(self, stage: int, splits: int) -> int:
        """Returns d_k + 1, or d_k if the update comes first."""
        late = stage_delay(stage, splits, self.delay)
        return late if late and self.order == "update_first" else late + 1

    def versions(self, stage: int, splits: int) -> int:
        """Each batch in flight has seen an update more."""
        return self.in_flight(stage, splits)


@dataclass(frozen=True)
class Flushed:
    """Micro-batches, and one update for all of them: as on one device.

    All stages wait at the end of each batch, until the last of its gradients
    has come. With equal stages they wait (K-1) / (M+K-1) of the time.

    Attributes:
        micro_batches: M, the parts of a batch.
        order: `"gpipe"` runs all forwards, then all backwards (Huang et al.
            2019); `"1f1b"` a backward as soon as it can, which keeps fewer
            forwards (PipeDream-Flush; Narayanan et al. 2021).

    Raises:
        ValueError: If one of them is out of range.
    """

    micro_batches: int = 8
    order: Literal["gpipe", "1f1b"] = "gpipe"

    def __post_init__(self) -> None:
        check_whole("micro_batches", self.micro_batches, "parts of a batch", 1)
        if self.order not in FLUSHES:
            raise ValueError(
                f"Expected `order` to be one of {FLUSHES}. Received: "
                f"order={self.order!r}"
            )

    @property
    def capacity(self) -> int:
        """Returns M, of which more are never on their way."""
        return self.micro_batches

    def tick(self, stage: int, splits: int, tick: int) -> list[Pass]:
        """Returns the `2 * M` passes of a batch."""
        count = self.micro_batches
        ahead = self.in_flight(stage, splits) - 1
        passes: list[Pass] = []
        for i in range(count + ahead):
            if i < count:
                passes.append(("F", tick * count + i))
            if i >= ahead:
                passes.append(("B", tick * count + i - ahead))
        return passes

    def fill(self, splits: int) -> int:
        """Every batch fills and flushes."""
        return 0

    def in_flight(self, stage: int, splits: int) -> int:
        """Returns M, or for `"1f1b"` K - k if that is less."""
        if self.order == "gpipe":
            return self.micro_batches
        return min(self.micro_batches, splits - stage)

    def versions(self, stage: int, splits: int) -> int:
        """Nothing is updated while a batch is in flight."""
        return 1


def check_whole(name: str, value: Any, meaning: str, least: int) -> None:
    """Checks a count.

    Args:
        name: Of the argument.
        value: What it got.
        meaning: What it counts.
        least: The smallest number allowed.

    Raises:
        ValueError: If it is no whole number, or less than that.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(
            f"Expected `{name}` to be {meaning}, a whole number from {least} "
            f"on. Received: {name}={value!r}"
        )

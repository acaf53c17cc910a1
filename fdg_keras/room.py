"""Which cuts fit in memory; and if none does, why, and what would."""

import itertools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fdg_keras import delays
from fdg_keras.balancing import best_ends
from fdg_keras.homes import Home
from fdg_keras.memory import Ledger
from fdg_keras.resources import ALLOCATED, Stash
from fdg_keras.stage_plans import StagePlan

_MIB = 2**20

# Of stages times the square of layers: cuts of more take long to find.
_WORK = 2e8


def check_limit(limit: Any, devices: Sequence[str]) -> None:
    """Checks that a memory limit is one, before anything is measured.

    Raises:
        ValueError: If it is neither `None` nor what `Room` takes.
    """
    if limit is not None:
        _limits(limit, [devices.count(name) for name in devices])


def holds(limit: Any, stages: Sequence[StagePlan]) -> bool:
    """Whether stages are within a limit, as `Room` takes it."""
    if limit is None:
        return True
    count = len(stages)
    limits = np.broadcast_to(np.array(limit, float), count)
    # One number is for all that is on a device.
    devices = [stage.device for stage in stages]
    owners = devices if np.ndim(limit) == 0 else list(map(str, range(count)))
    used: dict[str, int] = {}
    for owner, stage in zip(owners, stages):
        used[owner] = used.get(owner, 0) + (stage.peak_bytes or 0)
    return all(used[o] <= most for o, most in zip(owners, limits))


class Room:
    """Which cuts fit in memory.

    Args:
        ledger: Of the model.
        ends: Positions at which a stage may end, the last node's included.
        splits: Number of stages.
        limit: Bytes that a device may hold, divided into equal parts for the
            stages that it has; or a number for each stage; `None` stands for
            no limit.
        devices: Of each stage. Default: one for each.
        home: What waits on these devices. Default: nothing.

    Raises:
        ValueError: If `limit` is none of these.
    """

    def __init__(
        self,
        ledger: Ledger,
        ends: np.ndarray,
        splits: int,
        limit: Any,
        devices: Sequence[str] | None = None,
        home: Home | None = None,
    ):
        self._ledger = ledger
        self._home = home
        self._ends = ends
        self._limit = limit
        self._starts = np.array([0, *(end + 1 for end in ends[:-1])])
        names = list(devices) if devices else [str(k) for k in range(splits)]
        self._stages_of = [names.count(name) for name in names]
        self._limits = (
            None if limit is None else _limits(limit, self._stages_of)
        )

    @property
    def excess(self) -> Callable[[int, int], np.ndarray] | None:
        """By how much stages are too large, as `planning.balance` asks."""
        if self._limits is None:
            return None
        return self._excess_of(self._ledger, self._limits)

    def refusal(self, note: str = "") -> str:
        """Returns why no cuts fit, and what would.

        Args:
            note: What else is to be said of how memory was counted.
        """
        limits = self._limits or []
        worst, k = self._smallest(self._ledger, limits)
        fits = list(self._ways_out(self._ledger, limits))
        if not fits and self._ledger.stash != "replay":
            replayed = self._ledger.otherwise("replay")
            fits = [
                f'stash="replay" and {way}'
                for way in self._ways_out(replayed, limits)
            ]
        shares = self._stages_of[k]
        if self._ledger.stash == "selective":
            note += (
                ' What `stash="selective"` keeps was counted layer by layer, '
                "which may be more than it is of whole stages."
            )
        return (
            f"The model does not fit{' in equal parts' if shares > 1 else ''}: "
            f"with the cuts that come closest, stage {k} of {len(limits)} "
            f"needs {_size(limits[k] + worst)}, "
            f"{_size(worst)} more than its limit of {_size(limits[k])}"
            + (
                f", an equal part for each of {shares} stages of its device"
                if shares > 1
                else ""
            )
            + ". What would fit: "
            + ("; ".join(fits) or self._nothing())
            + f".{note} Received: memory_limit={self._limit!r}"
        )

    def _ways_out(
        self, ledger: Ledger, limits: Sequence[float]
    ) -> Iterator[str]:
        """Yields what would fit, if it alone were otherwise than in a ledger.

        Not `"selective"`: what it keeps is only known well of whole stages.
        """

        def fits(other: Ledger, more: int = 0) -> bool:
            others = [*limits, *[limits[-1]] * more]
            return self._smallest(other, others)[0] <= 0

        less: dict[str, tuple[Stash, ...]] = {
            "current": ("replay",),
            "replay": (),
        }
        for stash in less.get(ledger.stash, ("current", "replay")):
            if fits(ledger.otherwise(stash)):
                yield f'stash="{stash}"'
        for batch_size in self._batches(ledger):
            try:
                other = ledger.otherwise(ledger.stash, batch_size)
            except (ValueError, tf.errors.OpError):
                continue  # The model is made for some batches alone.
            if fits(other):
                yield f"batch_size={batch_size}"
                break
        for splits in self._splits(len(limits)):
            if fits(ledger, splits - len(limits)):
                yield f"splits={splits} on as many devices"
                break

    def _batches(self, ledger: Ledger) -> list[int]:
        """Returns which smaller batches are tried, down to one sample."""
        if ledger.batch_is_fixed:
            return []
        most = ledger.batch_size
        return [most // 2**n for n in range(1, most.bit_length())]

    def _splits(self, splits: int) -> list[int]:
        """Returns which numbers of more stages are tried."""
        if max(self._stages_of) > 1:
            return []  # More stages on the same devices leave less to each.
        most = len(self._ends)
        found = {splits + 1, splits + 2, splits + 4, most}
        found.update(splits * 2**n for n in range(1, most.bit_length()))
        return sorted(n for n in found if n <= most and n * most**2 <= _WORK)

    def _nothing(self) -> str:
        """Says what was tried."""
        tried = []
        if self._ledger.stash != "replay":
            tried.append('stash="replay"')
        if batches := self._batches(self._ledger):
            tried.append(f"batch_size down to {batches[-1]}")
        if more := self._splits(len(self._stages_of)):
            tried.append(f"splits up to {more[-1]}")
        return f"nothing that was tried ({', '.join(tried) or 'there is none'})"

    def _smallest(
        self, ledger: Ledger, limits: Sequence[float]
    ) -> tuple[float, int]:
        """Returns the excess that cannot be avoided, and whose it is."""
        ends = best_ends(
            len(self._ends), len(limits), self._excess_of(ledger, limits)
        )
        assert ends is not None  # nothing is infinitely large
        excess = self._excess_of(ledger, limits)
        found = [
            float(excess(k, b)[a])
            for k, (a, b) in enumerate(itertools.pairwise([0, *ends]))
        ]
        worst = max(found)
        return worst, found.index(worst)

    def _excess_of(
        self, ledger: Ledger, limits: Sequence[float]
    ) -> Callable[[int, int], np.ndarray]:
        columns = _Columns(ledger, self._starts, self._ends)
        splits, delay = len(limits), ledger.delay
        late, ahead = (
            [count(k, splits, delay) for k in range(splits)]
            for count in (delays.stage_delay, delays.fed_ahead)
        )

        def excess(k: int, j: int) -> np.ndarray:
            there, each, fed = columns(j)
            found = there[:j] + late[k] * each[:j] - limits[k]
            found += ahead[k] * fed[:j]
            if self._home is not None:
                stop = int(self._ends[j - 1]) + 1
                waits = self._home.charge(k, self._starts[:j], stop)
                found += ALLOCATED * waits
            return found

        return excess


class _Columns:
    """`Ledger.columns`, one at a time, for as long as it is asked for."""

    def __init__(self, ledger: Ledger, starts: np.ndarray, ends: np.ndarray):
        self._begin = lambda: ledger.columns(starts, [int(e) for e in ends])
        self._columns = self._begin()
        self._at = 0
        self._last = (starts, starts, starts)

    def __call__(self, j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the column of the pieces up to j, from 1."""
        if j < self._at:
            self._columns, self._at = self._begin(), 0
        while self._at < j:
            self._last = next(self._columns)
            self._at += 1
        return self._last


def _limits(limit: Any, stages_of: Sequence[int]) -> list[float]:
    """Returns bytes for each stage.

    Args:
        limit: As of `Room`.
        stages_of: How many stages the device of each stage has.
    """
    each = isinstance(limit, (list, tuple)) or np.ndim(limit) == 1
    found = list(limit) if each else [limit] * len(stages_of)
    if len(found) != len(stages_of) or not all(map(_is_limit, found)):
        raise ValueError(
            "Expected `memory_limit` to be the bytes that a device may hold, "
            f"or a list of {len(stages_of)} such numbers, one for each stage. "
            f"Received: {limit!r}"
        )
    return [
        float(one) / (1 if each else count)
        for one, count in zip(found, stages_of)
    ]


def _is_limit(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and (0 < value < 2**63 or value == math.inf)


def _size(count: float) -> str:
    if count < _MIB:
        return f"{math.ceil(count):,} bytes"
    return f"{count / _MIB:,.1f} MiB"

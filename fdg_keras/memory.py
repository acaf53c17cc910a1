"""The bytes that stages hold, for any cut, from profiles of single nodes."""

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fdg_keras import delays
from fdg_keras.balancing import best_ends
from fdg_keras.costs import crossing
from fdg_keras.crossing import OF_THE_FORWARD, Stash
from fdg_keras.plans import StagePlan
from fdg_keras.profiles import Profile
from fdg_keras.profiling import batch_spec, needs_gradient, size_of
from fdg_keras.slicing import Graph

_MIB = 2**20


class Ledger:
    """Counts bytes of any range of nodes, were it a stage.

    What a stage keeps of a batch from its forward to its backward is made up
    of what the backwards of its nodes read. A value that two of them read is
    kept once, and it is kept by each stage that reads it. What `"selective"`
    keeps is not a sum over nodes: it is counted as `"exact"`, which is more.

    Args:
        graph: The model.
        profiles: Of its nodes.
        batch_size: Samples in a batch.
        delay: Batches of delay per hop.
        stash: The stash mode.
        slots: Bytes of the optimizer's slots for a byte of trainable weights.
    """

    def __init__(
        self,
        graph: Graph,
        profiles: Sequence[Profile],
        batch_size: int,
        delay: int,
        stash: Stash,
        slots: float,
    ):
        self._graph, self._profiles = graph, profiles
        self._batch_size, self._delay = batch_size, delay
        self._stash, self._slots = stash, slots
        sizes = [size_of(batch_spec(s, batch_size)) for s in graph.symbols]
        needed = needs_gradient(graph)
        self._reads = _reads(graph, profiles, sizes, stash)
        trainable = [node.trainable_variables for node in graph.nodes]
        #: Bytes of trainable weights, by the first node that uses them.
        self.weights: np.ndarray = _by_first_node(trainable)
        self._weights_read = _by_first_node(
            itertools.compress(weights, found.keeps_weights)
            for weights, found in zip(trainable, profiles)
        )
        self._state = _by_first_node(
            [v for v in node.variables if not v.trainable]
            for node in graph.nodes
        )
        #: Bytes of a batch that cross the cut after each node.
        self.sent = crossing(graph, sizes)
        #: Likewise of their gradients, which cross it the other way.
        self.returned = crossing(
            graph,
            [
                size * (need and tf.as_dtype(symbol.dtype).is_floating)
                for size, need, symbol in zip(sizes, needed, graph.symbols)
            ],
        )
        # While its backward runs, a node's values have gradients beside them.
        self._running = np.array(
            [
                2.0 * sum(sizes[v] for v in (*node.inputs, *node.outputs))
                for node in graph.nodes
            ]
        )

    def otherwise(self, stash: Stash, shrunk: int = 1) -> "Ledger":
        """Returns the same model's with another mode, or smaller batches.

        Args:
            stash: The mode.
            shrunk: What to divide the batch by.
        """
        profiles = [
            dataclasses.replace(p, keeps_bytes=p.keeps_bytes // shrunk)
            for p in self._profiles
        ]
        return Ledger(
            self._graph,
            profiles,
            self._batch_size // shrunk,
            self._delay,
            stash,
            self._slots,
        )

    @property
    def stash(self) -> Stash:
        """The stash mode."""
        return self._stash

    @property
    def delay(self) -> int:
        """Batches of delay per hop."""
        return self._delay

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self._batch_size

    def sized(
        self, stage: StagePlan, start: int, stop: int, k: int, splits: int
    ) -> StagePlan:
        """Returns a stage with its bytes.

        Args:
            stage: Without.
            start: Its first node.
            stop: The one after its last node.
            k: Its index.
            splits: K.
        """
        late = delays.stage_delay(k, splits, self._delay)
        last = stop - 1
        return dataclasses.replace(
            stage,
            sends_bytes=int(self.sent[last]),
            stash_bytes=int(self.in_flight(start, late)[last]),
            peak_bytes=int(self.peak(start, late)[last]),
        )

    def stashed(self, start: int) -> np.ndarray:
        """Returns bytes that a stage keeps of one batch.

        Args:
            start: The stage's first node.

        Returns:
            `[nodes]`, by its last node; nothing before `start`.
        """
        at, sizes, since, made = self._reads
        # Not if a node of the stage has read it before, or has made it again.
        counts = (at >= start) & (since < start) & (made < start)
        kept = np.bincount(at[counts], sizes[counts], len(self._running))
        return np.cumsum(kept)

    def in_flight(self, start: int, late: int) -> np.ndarray:
        """Returns the bytes in a stage's stash, between F and B of a tick.

        Those of d_k + 1 batches and, with `stash="exact"` or `"selective"`, of
        d_k copies of the weights that backwards read.

        Args:
            start: The stage's first node.
            late: Its delay d_k, in batches.

        Returns:
            `[nodes]`, by its last node; nothing before `start`.
        """
        copies = late if self._stash in OF_THE_FORWARD else 0
        return (late + 1) * self.stashed(start) + copies * _since(
            self._weights_read, start
        )

    def peak(self, start: int, late: int) -> np.ndarray:
        """Returns all bytes that a stage holds at most.

        Weights, their gradients, slots and state; the stash; links in both
        directions; and the largest node, while it runs.

        Args:
            start: The stage's first node.
            late: Its delay d_k, in batches.

        Returns:
            `[nodes]`, by its last node; nothing before `start`.
        """
        weights = _since(self.weights, start)
        links = delays.link_capacity(self._delay) * self.returned
        if start:
            links = links + (
                delays.link_capacity(self._delay) * self.sent[start - 1]
            )
        running = self._running.copy()
        running[:start] = 0.0
        return (
            weights * (2.0 + self._slots)
            + _since(self._state, start)
            + self.in_flight(start, late)
            + links
            + np.maximum.accumulate(running)
        )


class Room:
    """Which cuts fit in memory.

    Args:
        ledger: Of the model.
        ends: Positions at which a stage may end, the last node's included.
        splits: Number of stages.
        limit: Bytes that a stage may hold, or one number for each; `None`
            stands for no limit.

    Raises:
        ValueError: If `limit` is none of these.
    """

    def __init__(
        self, ledger: Ledger, ends: np.ndarray, splits: int, limit: Any
    ):
        self._ledger = ledger
        self._ends = ends
        self._limits = None if limit is None else _limits(limit, splits)

    @property
    def excess(self) -> Callable[[int, int], np.ndarray] | None:
        """By how much stages are too large, as `planning.balance` asks."""
        if self._limits is None:
            return None
        return self._excess_of(self._ledger, self._limits)

    def refusal(self) -> str:
        """Returns why no cuts fit, and what would."""
        limits = self._limits or []
        worst, k = self._smallest(self._ledger, limits)
        fits = [
            text
            for text, ledger, splits in self._ways_out(len(limits))
            if self._smallest(ledger, [*limits, *limits[-1:] * splits])[0] <= 0
        ]
        needs = limits[k] + worst
        return (
            f"The model does not fit: with the cuts that come closest, stage "
            f"{k} of {len(limits)} needs {needs / _MIB:,.1f} MiB, "
            f"{worst / _MIB:,.1f} MiB more than its limit of "
            f"{limits[k] / _MIB:,.1f} MiB. What would fit: "
            + (
                "; ".join(fits)
                or "none of more stages, another stash mode or a smaller batch"
            )
            + "."
        )

    def _ways_out(self, splits: int) -> Iterator[tuple[str, Ledger, int]]:
        """Yields what else may be tried, and how many stages it adds."""
        ledger = self._ledger
        if ledger.stash != "replay":
            yield 'stash="replay"', ledger.otherwise("replay"), 0
        for factor in (2, 4, 8, 16):
            if ledger.batch_size >= factor:
                yield (
                    f"batch_size={ledger.batch_size // factor}",
                    ledger.otherwise(ledger.stash, factor),
                    0,
                )
        for more in (1, 2, 4):
            if splits + more <= len(self._ends):
                yield f"splits={splits + more}", ledger, more

    def _smallest(
        self, ledger: Ledger, limits: Sequence[float]
    ) -> tuple[float, int]:
        """Returns the excess that cannot be avoided, and whose it is."""
        excess = self._excess_of(ledger, limits)
        # Shifted: what a search for the smallest compares begins at 0.
        shift = max(limits)
        ends = best_ends(
            len(self._ends), len(limits), lambda k, j: excess(k, j) + shift
        )
        assert ends is not None  # nothing is infinite
        found = [
            float(excess(k, b)[a])
            for k, (a, b) in enumerate(itertools.pairwise([0, *ends]))
        ]
        k = int(np.argmax(found))
        return found[k], k

    def _excess_of(
        self, ledger: Ledger, limits: Sequence[float]
    ) -> Callable[[int, int], np.ndarray]:
        starts = [0, *(end + 1 for end in self._ends[:-1])]

        @functools.cache
        def peaks(k: int) -> np.ndarray:
            late = delays.stage_delay(k, len(limits), ledger.delay)
            return np.stack(
                [ledger.peak(start, late)[self._ends] for start in starts]
            )

        return lambda k, j: peaks(k)[:j, j - 1] - limits[k]


def _limits(limit: Any, splits: int) -> list[float]:
    limits = [limit] * splits if isinstance(limit, numbers.Real) else limit
    try:
        found = [float(one) for one in limits]
    except (TypeError, ValueError):
        found = []
    if len(found) != splits or not all(one > 0 for one in found):
        raise ValueError(
            "Expected `memory_limit` to be the bytes that a stage may hold, or "
            f"{splits} such numbers, one for each stage. Received: {limit!r}"
        )
    return found


def _reads(
    graph: Graph,
    profiles: Sequence[Profile],
    sizes: Sequence[int],
    stash: Stash,
) -> tuple[np.ndarray, ...]:
    """Returns what backwards read, as columns of a table.

    Returns:
        The node that reads, in order; bytes; the node that read the same
        before; the node that made it, if whatever makes it anew need not keep
        it. -1 where there is none.
    """
    rows = []
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    same: dict[int, int] = {}  # as a view, and what it is a view of

    def add(position: int, value: int) -> None:
        value = same.get(value, value)
        origin = made.get(value, -1) if stash == "replay" else -1
        rows.append((position, sizes[value], last.get(value, -1), origin))
        last[value] = position

    for position, (node, found) in enumerate(zip(graph.nodes, profiles)):
        inputs = list(dict.fromkeys(node.inputs))
        for value, of in zip(node.outputs, found.views):
            if of is not None:
                same[value] = same.get(inputs[of], inputs[of])
        for value, keeps in zip(inputs, found.keeps_inputs):
            if keeps or stash == "replay":
                add(position, value)
        made.update((value, position) for value in node.outputs)
        if stash == "replay":
            continue  # The forward is run again.
        for value, keeps in zip(node.outputs, found.keeps_outputs):
            if keeps:
                add(position, value)
        rows.append((position, found.keeps_bytes, -1, -1))
    return tuple(np.array(rows, int).reshape(-1, 4).T)


def _by_first_node(variables: Iterable[Iterable[keras.Variable]]) -> np.ndarray:
    """Returns the bytes of the variables of each node that none has before."""
    seen: set[int] = set()
    counts = []
    for mine in variables:
        new = {id(v): v for v in mine if id(v) not in seen}
        seen.update(new)
        specs = [tf.TensorSpec(v.shape, v.dtype) for v in new.values()]
        counts.append(float(sum(map(size_of, specs))))
    return np.array(counts)


def _since(counts: np.ndarray, start: int) -> np.ndarray:
    counts = counts.copy()
    counts[:start] = 0.0
    return np.cumsum(counts)

"""The bytes that stages hold, for any cut, from profiles of single nodes."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from fdg_keras import delays
from fdg_keras.costs import crossing, passing
from fdg_keras.crossing import OF_THE_FORWARD, Stash
from fdg_keras.profiles import Profile
from fdg_keras.profiling import Profiler, needs_gradient
from fdg_keras.reads import (
    by_first_node_of,
    by_last_node,
    fed,
    inputs_read,
    reads,
    reads_if_cheap_runs_again,
)
from fdg_keras.resources import ALLOCATED, StageBytes
from fdg_keras.slicing import Graph, first_uses
from fdg_keras.specs import size_of


class Ledger:
    """Counts bytes of any range of nodes, were it a stage.

    What a stage keeps of a batch from its forward to its backward is made up
    of what the backwards of its nodes read. A value that two of them read is
    kept once, and it is kept by each stage that reads it. With `"replay"` only
    inputs are kept, if anything that the backward reads depends on them; the
    rest comes back while it runs. What `"selective"` keeps is not a sum over
    nodes: what is counted is that all that is cheap is computed again, or
    nothing, whichever is less.

    Args:
        profiler: Of the model's nodes, for a batch.
        delay: Batches of delay per hop.
        stash: The stash mode.
        slots: Bytes of the optimizer's slots for a byte of trainable weights.
        of_loss: Bytes that the loss has at once, of the outputs of a sample.
    """

    def __init__(
        self,
        profiler: Profiler,
        delay: int,
        stash: Stash,
        slots: float,
        of_loss: float = 0.0,
    ):
        self._profiler, self._delay = profiler, delay
        self._stash, self._slots, self._of_loss = stash, slots, of_loss
        graph, profiles = profiler.graph, profiler.untimed()
        self._profiles, sizes = profiles, profiler.sizes
        needed = needs_gradient(graph)
        self._tables = _tables(graph, profiles, sizes, stash)
        self._fed = fed(graph, sizes)
        trainable = [node.trainable_variables for node in graph.nodes]
        #: Bytes of trainable weights, by the first node that uses them.
        self.weights: np.ndarray = _by_first_node(trainable)
        # A layer that is called again makes another gradient.
        self._gradients = np.array(
            [float(sum(map(_bytes_of, weights))) for weights in trainable]
        )
        # As they were at a forward, where they are kept.
        self._copies = np.zeros(len(trainable))
        if stash in OF_THE_FORWARD:
            self._copies = _by_first_node(
                itertools.compress(weights, found.keeps_weights)
                for weights, found in zip(trainable, profiles)
            )
        self._state = _by_first_node(
            [v for v in node.variables if not v.trainable]
            for node in graph.nodes
        )
        #: Bytes of weights, slots and state, likewise.
        self.resting: np.ndarray = self.weights * (1.0 + slots) + self._state
        # An update makes two tensors or more of each weight, if it has slots.
        # Dense layers, of which little else is to be seen, have as many bytes
        # as their weights at once by that; plain SGD a fifth of it.
        self._updating = self.weights * (slots > 0)
        #: Bytes of a batch that cross the cut after each node.
        self.sent = crossing(graph, sizes)
        #: Likewise of their gradients, which cross it the other way.
        gradients = [
            size * (need and tf.as_dtype(symbol.dtype).is_floating)
            for size, need, symbol in zip(sizes, needed, graph.symbols)
        ]
        self.returned = crossing(graph, gradients)
        # While a node's backward runs, there are also the gradients of what
        # passes it by, which nodes after it have read.
        self._running = passing(graph, gradients) + [
            found.running_bytes for found in profiles
        ]
        # The loss runs between the last node's forward and its backward.
        loss = of_loss * profiler.batch_size
        self._running[-1] = max(self._running[-1], loss)

    def otherwise(
        self, stash: Stash, batch_size: int | None = None
    ) -> "Ledger":
        """Returns the same model's with another mode, or other batches.

        Args:
            stash: The mode.
            batch_size: Samples in a batch. Default: as many as now.

        Raises:
            ValueError: If the model cannot have such batches.
        """
        profiler = self._profiler.of_batch(batch_size or self.batch_size)
        return Ledger(profiler, self._delay, stash, self._slots, self._of_loss)

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
        return self._profiler.batch_size

    @property
    def batch_is_fixed(self) -> bool:
        """Whether the model says how large a batch is."""
        graph = self._profiler.graph
        shapes = [graph.symbols[v].shape for v in graph.inputs]
        return any(shape and shape[0] is not None for shape in shapes)

    def unsized(self, start: int, stop: int) -> int:
        """Returns how many tensors of a stage have no known size."""
        return sum(found.unsized for found in self._profiles[start:stop])

    def sized(self, start: int, stop: int) -> StageBytes:
        """Returns the bytes of a stage.

        Args:
            start: Its first node.
            stop: The one after its last node.
        """
        last = stop - 1
        kept, again = self._stashes(start)
        return StageBytes(
            batch=int(kept[last]),
            again=int(again[last]),
            copies=int(_since(self._copies, start)[last]),
            weights=int(_since(self.weights, start)[last]),
            gradients=int(_since(self._gradients, start)[last]),
            slots=int(self._slots * _since(self.weights, start)[last]),
            updating=int(_since(self._updating, start)[last]),
            state=int(_since(self._state, start)[last]),
            links=int(self._links(start)[last]),
            fed=int(self._inputs(start)[last]),
            returned=int(self.returned[last]),
            running=int(self._running[start:stop].max()),
        )

    def stashed(self, start: int) -> np.ndarray:
        """Returns bytes that a stage keeps of one batch.

        Args:
            start: The stage's first node.

        Returns:
            `[nodes]`, by its last node; nothing before `start`.
        """
        return self._stashes(start)[0]

    def _stashes(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns bytes that are kept, and that a backward makes again."""
        count = len(self._running)
        return self._chosen(
            *(by_last_node(table, start, count) for table in self._tables)
        )

    def _chosen(
        self, kept: np.ndarray, again: np.ndarray, read: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._stash == "selective":
            kept = np.minimum(kept, read)
            again = read - kept
        return kept, again

    def _links(self, start: int) -> np.ndarray:
        sent = self.sent[start - 1] if start else 0.0
        return delays.link_capacity(self._delay) * (self.returned + sent)

    def _inputs(self, start: int) -> np.ndarray:
        return by_last_node(self._fed, start, len(self._running))

    def peak(self, start: int, late: int, ahead: int) -> np.ndarray:
        """Returns all bytes that a stage holds at most, in a backward.

        Weights, their gradients, slots, state, and what updates need; the
        stash, and of a batch what the backward makes again; links in both
        directions; inputs that wait; and the largest node, while it runs. In
        blocks of the allocator, `ALLOCATED` for each byte.

        Args:
            start: The stage's first node.
            late: Its delay d_k, in batches.
            ahead: How many batches of inputs wait for it.

        Returns:
            `[nodes]`, by its last node; nothing before `start`.
        """
        running = self._running.copy()
        running[:start] = 0.0
        kept, again = self._stashes(start)
        return ALLOCATED * (
            _since(self.resting + self._gradients + self._updating, start)
            + (late + 1) * kept
            + late * _since(self._copies, start)
            + again
            + self._links(start)
            + ahead * self._inputs(start)
            + np.maximum.accumulate(running)
        )

    def columns(
        self, starts: np.ndarray, stops: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields the peaks of stages that end at a node, for each such node.

        The same as `peak`, by the first node instead of the last: a table for
        all pairs of nodes would not fit in memory.

        Args:
            starts: Nodes at which a stage may begin, in order.
            stops: Last nodes of stages, in order.

        Yields:
            `[starts]` three times: bytes without delay, and how many each
            batch of delay adds, and each batch of inputs that waits. They hold
            for starts that are not after the stop.
        """
        count = len(self._running)
        there = self.resting + self._gradients + self._updating
        done, copied = (
            np.concatenate([[0.0], np.cumsum(each)])
            for each in (there, self._copies)
        )
        capacity = delays.link_capacity(self._delay)
        sent = np.concatenate([[0.0], self.sent])[starts]
        tables = zip(
            *(
                by_first_node_of(table, count, stops)
                for table in (*self._tables, self._fed)
            )
        )
        running = np.zeros(count)
        before = 0
        for stop in stops:
            for node in range(before, stop + 1):
                here = running[: node + 1]
                np.maximum(here, self._running[node], out=here)
            before = stop + 1
            *found, inputs = (each[starts] for each in next(tables))
            kept, again = self._chosen(*found)
            yield (
                ALLOCATED
                * (
                    done[stop + 1]
                    - done[starts]
                    + kept
                    + again
                    + capacity * (self.returned[stop] + sent)
                    + running[starts]
                ),
                ALLOCATED * (kept + copied[stop + 1] - copied[starts]),
                ALLOCATED * inputs,
            )


def _tables(
    graph: Graph,
    profiles: Sequence[Profile],
    sizes: Sequence[int],
    stash: Stash,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what is kept, and what a backward makes again or reads in all.

    Each as rows of `reads`; empty where the mode has no need of it.
    """
    read = reads(graph, profiles, sizes, made_within=False)
    none = read[:0]
    if stash == "replay":
        again = reads(graph, profiles, sizes, made_within=True)
        return inputs_read(graph, profiles, sizes), again, none
    if stash == "selective":
        return reads_if_cheap_runs_again(graph, profiles, sizes), none, read
    return read, none, none


def _by_first_node(variables: Iterable[Iterable[keras.Variable]]) -> np.ndarray:
    """Returns the bytes of the variables of each node that none has before."""
    return np.array(
        [float(sum(map(_bytes_of, new))) for new in first_uses(variables)]
    )


def _bytes_of(variable: keras.Variable) -> int:
    return size_of(tf.TensorSpec(variable.shape, variable.dtype))


def _since(counts: np.ndarray, start: int) -> np.ndarray:
    counts = counts.copy()
    counts[:start] = 0.0
    return np.cumsum(counts)

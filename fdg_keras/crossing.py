"""What crosses from a forward to its backward, and what of it is kept.

Every tensor that a gradient operation reads and a forward operation made
crosses. Cutting the graph at a set of such tensors, or of tensors they can be
computed from, gives two functions, and the tensors of that set are the stash.
The stash mode decides where to cut:

    mode         kept for each batch in flight     weights of the backward
    "exact"      all crossing tensors              those of the forward
    "selective"  the fewest bytes that these are   those of the forward
                 cheaply made of
    "current"    crossing activations              today's
    "replay"     the stage's inputs and state      today's, forward run again

Knows nothing of Keras or of threads.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tensorflow as tf

from fdg_keras import recompute
from fdg_keras.liveness import most_alive
from fdg_keras.subgraphs import ancestors, tensor_bytes

Stash = Literal["exact", "selective", "current", "replay"]
STASHES = ("exact", "selective", "current", "replay")

#: The modes in which the backward uses the weights of its forward.
OF_THE_FORWARD = ("exact", "selective")

# What Keras takes for a batch if nobody says.
_BATCH_SIZE = 32

# Types of operations that read no more of a tensor than its shape.
_SHAPES = ("Rank", "Shape", "ShapeN", "Size")


@dataclass(frozen=True)
class StashBytes:
    """How many bytes a stash takes. Tensors that share memory count once.

    Attributes:
        batch: What each batch in flight has for itself: activations, state
            that changes, and what was computed from weights.
        weights: Weights as they were at the forward. Today's are there anyway,
            so that this is the price of an update between F and B.
        unsized: How many tensors are not counted, because their size is not
            known: what a loop of unknown length keeps for its gradient
            (`variant`), strings.
    """

    batch: int
    weights: int
    unsized: int = 0

    def total(self, batches: int, updates: int) -> int:
        """Returns the bytes of so many batches, and updates between them.

        Args:
            batches: `delays.in_flight` for the most a stage holds.
            updates: `delays.staleness`.
        """
        return batches * self.batch + updates * self.weights


class Crossing:
    """The tensors between a forward and its backward, in one graph.

    Args:
        graph: Holds both.
        forward: Names of the forward's operations, arguments included.
        weights: Arguments to differentiate by.
        state: Arguments that stand for other variables.
        inputs: The other arguments, `[B, ...]`.
        fetches: What the backward computes: gradients by weights, and others.
        constant: Names of weights and state that training does not change.
        given: What the backward is given beside the stash.

    Attributes:
        forward: As given, and the operations that tell the backward the shape
            of a tensor of which it reads no more than that.
    """

    def __init__(
        self,
        graph: Any,
        forward: Collection[str],
        weights: Sequence[tf.Tensor],
        state: Sequence[tf.Tensor],
        inputs: Sequence[tf.Tensor],
        fetches: Sequence[Sequence[Any]],
        constant: Collection[str],
        given: Sequence[tf.Tensor],
    ):
        self._graph = graph
        self._weights, self._state, self._inputs = weights, state, inputs
        self._by_weights, others = (
            tf.nest.flatten(found, expand_composites=True) for found in fetches
        )
        self._fetches = [*self._by_weights, *others]
        self._given = given
        self._constant = constant
        self.forward = {*forward, *self._shapes(forward)}
        self._sized: dict[int, dict[str, int | None]] = {}

    def _shapes(self, forward: Collection[str]) -> list[str]:
        """Returns what only asks the forward for shapes, and may join it."""
        asks, read = [], set()
        for op in self._graph.get_operations():
            if op.name in forward:
                continue
            if op.type in _SHAPES and all(
                t.op.name in forward for t in op.inputs
            ):
                asks.append(op)
            else:
                read |= {t.name for t in op.inputs}
        return [
            op.name for op in asks if not any(t.name in read for t in op.inputs)
        ]

    def kept(self, stash: Stash) -> list[tf.Tensor]:
        """Returns the tensors to stash, in a fixed order."""
        if stash == "replay":
            cut = {t.name for t in [*self._state, *self._inputs]}
            cut |= {
                t.name
                for op in self._operations()
                if op.op_def.is_stateful
                for t in op.outputs
            }
        elif stash == "current":
            cut = self._read_backward(self._varying(free=self._weights))
        else:
            varying = self._varying()
            cut = self._read_backward(varying)
            if stash == "selective":
                cut = self._cheapest(cut, varying)
        kept, _ = ancestors(self._fetches, cut, past=self.forward)
        return kept

    def _operations(self) -> list[tf.Operation]:
        """Returns the forward's operations, in topological order."""
        operations = self._graph.get_operations()
        return [op for op in operations if op.name in self.forward]

    def _varying(self, free: Sequence[tf.Tensor] = ()) -> list[tf.Operation]:
        """Returns the forward's operations that the backward cannot repeat.

        Operations that depend on nothing but constants and on `free` arguments
        are left out: the backward computes them itself. One with a state (it
        draws a random number, say) is not: it would make another.
        """
        arguments = [*self._weights, *self._state, *self._inputs]
        fixed = {t.name for t in arguments} - {t.name for t in free}
        varying: dict[str, tf.Operation] = {}
        for op in self._operations():
            if (
                op.op_def.is_stateful
                or any(t.name in fixed for t in op.outputs)
                or any(t.op.name in varying for t in op.inputs)
            ):
                varying[op.name] = op
        return list(varying.values())

    def _read_backward(self, operations: Sequence[tf.Operation]) -> set[str]:
        """Returns the names of their tensors that the backward reads."""
        made = {t.name for op in operations for t in op.outputs}
        return {
            t.name
            for op in self._graph.get_operations()
            if op.name not in self.forward
            for t in op.inputs
            if t.name in made
        }

    def _cheapest(
        self, needed: set[str], operations: Sequence[tf.Operation]
    ) -> set[str]:
        # Which cut is best hardly depends on the size of the batch.
        known = [t.shape[0] for t in self._inputs if t.shape.rank]
        sizes = self._sizes(next(filter(None, known), _BATCH_SIZE))
        return recompute.cheapest(
            operations, needed, sizes, self._constant
        ).kept

    def _sizes(self, batch_size: int) -> dict[str, int | None]:
        if batch_size not in self._sized:
            arguments = [*self._weights, *self._state, *self._inputs]
            self._sized[batch_size] = tensor_bytes(
                self._graph, arguments, self._operations(), batch_size
            )
        return self._sized[batch_size]

    def stash_bytes(self, stash: Stash, batch_size: int) -> StashBytes:
        """Returns how many bytes a stash takes.

        Exact if no dimension is unknown but the first ones, which are taken
        for the batch's; other unknown dimensions count as much.

        Args:
            stash: What is kept.
            batch_size: Samples of a batch.
        """
        owners = self.owners(stash, batch_size)
        weights = {t.name for t in self._weights}
        return StashBytes(
            sum(n or 0 for name, n in owners.items() if name not in weights),
            sum(n or 0 for name, n in owners.items() if name in weights),
            sum(n is None for n in owners.values()),
        )

    def is_cheap(self, batch_size: int) -> bool:
        """Whether `"selective"` may run all of the forward again."""
        sizes = self._sizes(batch_size)
        arguments = [*self._weights, *self._state, *self._inputs]
        given = {t.op.name for t in arguments}
        return all(
            recompute.moved(op, sizes) < math.inf
            for op in self._varying()
            if op.name not in given
        )

    def running_bytes(self, made: Sequence[tf.Tensor], batch_size: int) -> int:
        """Returns what the forward, or the backward, has at once.

        Beside what `"exact"` keeps, and gradients by weights.

        Args:
            made: What the forward makes for others.
            batch_size: Samples of a batch.
        """
        arguments = [*self._weights, *self._state, *self._inputs]
        kept = self.kept("exact")
        sizes = tensor_bytes(
            self._graph,
            [*arguments, *self._given],
            [t.op for t in (*self._fetches, *made, *kept)],
            batch_size,
        )
        before = {t.name for t in (*arguments, *kept)}
        by_weights = {recompute.owner(t).name for t in self._by_weights}
        # Each result has memory of its own: TensorFlow hands on that of some
        # arguments, but runs operations at once, and the two about even out.
        backward = most_alive(
            self._fetches, self._given, before, sizes, by_weights, self.forward
        )
        stashed = {recompute.owner(t).name for t in kept}
        forward = most_alive(
            [*made, *kept],
            [t for t in self._inputs if t.name not in stashed],
            {t.name for t in arguments},
            sizes,
            stashed,
            in_place=recompute.CHEAP,
        )
        return max(forward, backward)

    def owners(self, stash: Stash, batch_size: int) -> dict[str, int | None]:
        """Returns the bytes of the tensors whose memory a stash holds.

        `None` if unknown. What training does not change is left out: it is not
        held for the stash.
        """
        sizes = self._sizes(batch_size)
        owners = {recompute.owner(t).name for t in self.kept(stash)}
        return {name: sizes[name] for name in owners - {*self._constant}}


@dataclass(frozen=True)
class Kept:
    """Whose memory a backward reads.

    Attributes:
        weights: For each weight whether its is read.
        inputs: For each input.
        outputs: For each output.
        views: For each output the input whose memory it is, if it is one's.
        other_bytes: Of what is none of these.
        unsized: How many tensors are of unknown size, and not counted.
        cheap: Whether `"selective"` may run all of the forward again.
    """

    weights: tuple[bool, ...]
    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]
    views: tuple[int | None, ...]
    other_bytes: int
    unsized: int
    cheap: bool


def kept_by(
    crossing: Crossing | None,
    stash: Stash,
    weights: Sequence[tf.Tensor],
    inputs: Sequence[tf.Tensor],
    outputs: Sequence[tf.Tensor],
    batch_size: int,
) -> Kept:
    """Returns what is kept, and whose memory it is.

    Args:
        crossing: `None` if there is no backward.
        stash: The stash mode.
        weights: Of the forward.
        inputs: Likewise.
        outputs: Likewise.
        batch_size: Samples of a batch.
    """
    found: dict[str, int | None] = {}
    if crossing is not None:
        found = crossing.owners(stash, batch_size)
    made = [recompute.owner(t).name for t in outputs]
    given = [t.name for t in inputs]
    named = {*given, *made, *(t.name for t in weights)}
    return Kept(
        weights=tuple(t.name in found for t in weights),
        inputs=tuple(name in found for name in given),
        outputs=tuple(name in found for name in made),
        views=tuple(
            given.index(name) if name in given else None for name in made
        ),
        other_bytes=sum(
            size or 0 for name, size in found.items() if name not in named
        ),
        unsized=sum(size is None for size in found.values()),
        cheap=crossing is not None and crossing.is_cheap(batch_size),
    )

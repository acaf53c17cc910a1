"""How much memory a part of a graph has at once while it runs."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import tensorflow as tf

from fdg_keras import recompute
from fdg_keras.subgraphs import ancestors


def most_alive(
    fetches: Sequence[tf.Tensor],
    given: Sequence[tf.Tensor],
    before: Collection[str],
    sizes: Mapping[str, int | None],
    uncounted: Collection[str],
    past: Collection[str] = (),
    in_place: Collection[str] = (),
) -> int:
    """Returns the most bytes that are alive at once in a part of a graph.

    Operations run one after the other, in the order in which they were traced.
    A tensor lives from the operation that makes it to the last that reads it;
    one that is given, or fetched, to the end. What an operation needs within
    itself (a loop its turns, a convolution its workspace) is not counted.

    Args:
        fetches: What is computed, tensors of one graph.
        given: What it is computed of, and counted.
        before: Names of what else is there before, and not counted.
        sizes: Bytes by the tensor's name; what is unknown takes none.
        uncounted: Names of tensors whose memory, made here, is not counted.
        past: As of `subgraphs.ancestors`.
        in_place: Types of operations whose result may have the memory of an
            argument as large that nobody else reads any more.
    """
    _, names = ancestors(fetches, {*before, *(t.name for t in given)}, past)
    operations = [
        op for op in fetches[0].graph.get_operations() if op.name in names
    ]
    reads = [{recompute.owner(t).name for t in op.inputs} for op in operations]
    left = Counter(name for found in reads for name in found)
    left.update(recompute.owner(t).name for t in (*given, *fetches))
    alive = {t.name: sizes[t.name] or 0 for t in given}
    most = sum(alive.values())
    for op, found in zip(operations, reads):
        made = [t.name for t in op.outputs if recompute.owner(t) is t]
        left.subtract(found)
        for name in made:
            if name not in uncounted:
                alive[name] = sizes[name] or 0
                if op.type in in_place:
                    _take_over(alive, alive[name], found, left)
        most = max(most, sum(alive.values()))
        for name in (*found, *made):
            if left[name] <= 0:
                alive.pop(name, None)
    return most


def _take_over(
    alive: dict[str, int],
    size: int,
    candidates: Collection[str],
    left: Mapping[str, int],
) -> None:
    """Ends the life of a candidate of that size that nobody reads any more."""
    for name in candidates:
        if left[name] <= 0 and alive.get(name) == size:
            del alive[name]
            return

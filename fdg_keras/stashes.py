"""What whole stages stash, where profiles of single nodes do not tell."""

from collections.abc import Sequence

from fdg_keras.boundaries import Boundary
from fdg_keras.crossing import Stash, StashBytes
from fdg_keras.slicing import Graph, Slice
from fdg_keras.specs import batch_spec
from fdg_keras.stages import Stage


def traced_stashes(
    graph: Graph,
    slices: Sequence[Slice],
    device: str,
    batch_size: int,
    stash: Stash,
) -> list[StashBytes]:
    """Traces all stages, and returns the bytes of their stashes.

    As `Pipeline` does, but that all floating outputs of the model are taken to
    be in the loss.

    Args:
        graph: The model.
        slices: Its parts.
        device: Any; nothing runs.
        batch_size: Samples in a batch. Other unknown sizes are taken as 1.
        stash: The stash mode.
    """
    stages = [
        Stage(k, part, device, training=True, jit_compile=False)
        for k, part in enumerate(slices)
    ]
    boundary = Boundary()
    for stage in stages:
        feeds = [
            batch_spec(graph.symbols[value], batch_size)
            for value in stage.slice.feeds
        ]
        boundary = stage.trace(boundary, feeds)
    sent = boundary.floating(boundary.specs)
    has_gradient = [spec.dtype.is_floating for spec in sent]
    for stage in reversed(stages):
        upstream = stages[: stage.index]
        has_gradient = stage.cut(
            has_gradient, stash, any(s.weights for s in upstream)
        )
    return [stage.stash_bytes(stash, batch_size) for stage in stages]

"""The best cuts of those that fit in memory, and the stages that they make."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from fdg_keras.crossing import StashBytes
from fdg_keras.delays import fed_ahead, stage_delay
from fdg_keras.homes import Home
from fdg_keras.memory import Ledger
from fdg_keras.planning import balance, make_plan
from fdg_keras.resources import StageBytes
from fdg_keras.room import Room, holds
from fdg_keras.slicing import Graph, cut_graph
from fdg_keras.stage_plans import StagePlan
from fdg_keras.stashes import traced_stashes

_NOT_BY_STAGES = (
    ' The cuts that fit by what `stash="selective"` keeps of each layer do not '
    'by what it keeps of stages; here it counts as much as "exact".'
)


class Cutter:
    """Cuts a model where it is best, within its devices' memory.

    Args:
        graph: The model.
        ledger: Its bytes.
        ends: Positions at which a stage may end, the last node's included.
        names: The device of each stage.
        limit: As `Room` takes it.
    """

    def __init__(
        self,
        graph: Graph,
        ledger: Ledger,
        ends: np.ndarray,
        names: Sequence[str],
        limit: Any,
    ):
        self._graph, self._ledger = graph, ledger
        self._ends, self._names, self._limit = ends, names, limit
        self._home = Home(graph, names, ledger.resting)

    def cuts(
        self,
        costs: tuple[np.ndarray, np.ndarray],
        ledger: Ledger | None = None,
        note: str = "",
    ) -> list[int]:
        """Returns the best cuts that fit by what is known of layers.

        Args:
            costs: As `balance` takes them, `nodes` and `cuts`.
            ledger: By which they are to fit. Default: the model's own.
            note: What a refusal adds to how memory was counted.

        Raises:
            ValueError: If none fits; it says what would.
        """
        shared = len(set(self._names)) < len(self._names)
        if self._limit is not None and shared:
            # Stages of one device may fit although one needs more than others.
            best = balance(self._ends, *costs) or []
            if holds(self._limit, self._stages(best)):
                return best
        room = Room(
            ledger or self._ledger,
            self._ends,
            len(self._names),
            self._limit,
            self._names,
            self._home,
        )
        found = balance(self._ends, *costs, room.excess)
        if found is None:
            raise ValueError(room.refusal(note))
        return found

    def stages(self, costs: tuple[np.ndarray, np.ndarray]) -> list[StagePlan]:
        """Returns the stages of the best cuts that fit, with their bytes.

        Args:
            costs: As of `cuts`.

        Raises:
            ValueError: As of `cuts`.
        """
        found = self._stages(self.cuts(costs))
        selective = self._ledger.stash == "selective"
        if selective and not holds(self._limit, found):
            # Now and then it keeps a little more of a whole stage than of its
            # layers, but never more than "exact".
            exact = self._ledger.otherwise("exact")
            found = self._stages(self.cuts(costs, exact, _NOT_BY_STAGES))
        return found

    def _stages(self, cuts: Sequence[int]) -> list[StagePlan]:
        slices = cut_graph(self._graph, cuts)
        starts = [0, *(p + 1 for p in cuts), len(self._graph.nodes)]
        ledger, count = self._ledger, len(self._names)
        sizes = [ledger.sized(a, b) for a, b in itertools.pairwise(starts)]
        if ledger.stash == "selective":
            kept = traced_stashes(
                self._graph,
                slices,
                self._names[0],
                ledger.batch_size,
                ledger.stash,
            )
            sizes = [_selective(*each) for each in zip(sizes, kept)]
        sizes = [
            dataclasses.replace(size, home=waits)
            for size, waits in zip(sizes, self._home.beside(starts))
        ]
        bare = make_plan(self._graph, slices, self._names)
        return [
            _sized(
                stage,
                size,
                ledger.sent[end - 1],
                stage_delay(k, count, ledger.delay),
                fed_ahead(k, count, ledger.delay),
            )
            for k, (stage, size, end) in enumerate(
                zip(bare.stages, sizes, starts[1:])
            )
        ]


def _selective(counted: StageBytes, kept: StashBytes) -> StageBytes:
    """Returns a stage with what `"selective"` really keeps.

    The rest of the batch comes back in its backward.
    """
    return dataclasses.replace(
        counted,
        batch=kept.batch,
        again=max(counted.batch + counted.again - kept.batch, 0),
        copies=kept.weights,
    )


def _sized(
    stage: StagePlan, size: StageBytes, sent: float, late: int, ahead: int
) -> StagePlan:
    return dataclasses.replace(
        stage,
        sends_bytes=int(sent),
        stash_bytes=size.stash(late),
        peak_bytes=size.peak(late, ahead),
        bytes=size,
    )

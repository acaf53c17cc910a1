"""What waits where a model came from, while stages elsewhere train it."""

import itertools
from collections.abc import Sequence

import numpy as np

from fdg_keras import _keras
from fdg_keras.placement import is_here
from fdg_keras.slicing import Graph


class Home:
    """Bytes of a model's own variables, beside those of its stages.

    A stage trains copies, but of variables that live on its device. Those of
    the model wait for them where the model was made, with the optimizer's
    slots: often on the device of the first stage.

    Args:
        graph: The model.
        devices: Of each stage.
        resting: Bytes `[nodes]` of weights, slots and other variables, by the
            first node that uses them.
    """

    def __init__(
        self, graph: Graph, devices: Sequence[str], resting: np.ndarray
    ):
        self._devices = list(devices)
        # Where a worker may be lost, variables at home are not trained there.
        self._trained_here = all(map(is_here, devices))
        places = [
            _keras.get_storage(node.variables[0]).device
            if node.variables
            else None
            for node in graph.nodes
        ]
        self._done = {
            device: np.concatenate(
                [[0.0], np.cumsum(resting * [p == device for p in places])]
            )
            for device in set(devices)
        }

    def beside(self, edges: Sequence[int]) -> list[int]:
        """Returns what waits on the device of each stage.

        Where several are on a device, it counts for the first of them.

        Args:
            edges: The first node of each stage, and the number of nodes.
        """
        found = []
        for k, device in enumerate(self._devices):
            done = self._done[device]
            waits = done[-1] * (device not in self._devices[:k])
            if waits and self._trained_here:
                waits -= sum(
                    done[b] - done[a]
                    for other, (a, b) in zip(
                        self._devices, itertools.pairwise(edges)
                    )
                    if other == device
                )
            found.append(int(waits))
        return found

    def at_most(
        self, splits: int, k: int, starts: np.ndarray, stop: int
    ) -> np.ndarray | float:
        """Returns what waits beside stage k, whatever the others are.

        Args:
            splits: Number of stages. Those beyond the devices that are known
                are elsewhere.
            k: The stage.
            starts: Nodes at which it may begin.
            stop: The node after its last.
        """
        if k >= len(self._devices):
            return 0.0
        device = self._devices[k]
        if device in self._devices[:k]:
            return 0.0
        done = self._done[device]
        if not self._trained_here:
            return float(done[-1])
        if self._devices == [device] * splits:
            return 0.0
        return done[-1] - (done[stop] - done[starts])

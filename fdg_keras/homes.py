"""What waits where a model came from, while stages elsewhere train it."""

import itertools
from collections.abc import Sequence
from typing import Any

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

        Where several are on a device, each has an equal part of it.

        Args:
            edges: The first node of each stage, and the number of nodes.
        """
        waits = dict.fromkeys(self._devices, 0.0)
        for k, (a, b) in enumerate(itertools.pairwise(edges)):
            waits[self._devices[k]] += float(self.charge(k, a, b))
        return [
            int(waits[device] / self._devices.count(device))
            for device in self._devices
        ]

    def charge(self, k: int, start: Any, stop: int) -> Any:
        """Returns the bytes by which stage k adds to what waits on its device.

        Those of all stages of a device together are what waits there. It can be
        less than nothing: what a stage trains in place does not wait.

        Args:
            k: The stage. Those beyond the devices that are known are elsewhere.
            start: Its first node, or an array of such.
            stop: The node after its last.
        """
        if k >= len(self._devices):
            return 0.0
        device = self._devices[k]
        done = self._done[device]
        part = done[-1] / self._devices.count(device)
        return part - self._trained_here * (done[stop] - done[start])

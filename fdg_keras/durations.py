"""How long the stages of any cut take: layers, updates and handing over."""

import dataclasses
import itertools
import os
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from fdg_keras.delays import stage_delay
from fdg_keras.expectations import TICK_S
from fdg_keras.memory import Ledger
from fdg_keras.placement import host_of
from fdg_keras.profiling import Profiler
from fdg_keras.rates import UpdateRate, transfer_rate, update_rate
from fdg_keras.slicing import Graph
from fdg_keras.stage_plans import StagePlan


class Kind:
    """What is found of devices that are alike, by one of them.

    Attributes:
        profiler: Of the model's nodes.
        profiles: What it has found, without times until `measure` is called.
        update: Of the optimizer, if there is one.
    """

    def __init__(
        self,
        graph: Graph,
        optimizer: keras.optimizers.Optimizer | None,
        device: str,
        batch_size: int,
        jit_compile: bool,
        measure: bool,
        cache_dir: str | os.PathLike | None,
    ):
        self.profiler = Profiler(
            graph, batch_size, device, jit_compile, cache_dir
        )
        self.profiles = self.profiler.untimed()
        self.update: UpdateRate | None = None
        if optimizer is not None:
            self.update = update_rate(optimizer, device, measure)

    def measure(self) -> None:
        """Adds times to the profiles."""
        self.profiles = self.profiler.timed()

    @property
    def slots(self) -> float:
        """Bytes of the optimizer's slots for a byte of trainable weights."""
        return self.update.slots if self.update else 0.0

    def seconds(self, ledger: Ledger) -> np.ndarray:
        """Returns seconds `[nodes, 2]` of each forward and backward."""
        backward = np.array([p.backward_s for p in self.profiles])
        if self.update:
            backward = backward + self.update.seconds * ledger.weights
        forward = np.array([p.forward_s for p in self.profiles])
        return np.stack([forward, backward], -1)

    def again(self, cheap_only: bool) -> np.ndarray:
        """Returns seconds `[nodes]` of forwards that a backward runs again."""
        return np.array(
            [
                p.forward_s * (p.backward_s > 0 and (p.cheap or not cheap_only))
                for p in self.profiles
            ]
        )


class Times:
    """How long stages take, of devices that may differ.

    Args:
        kinds: What was found of each stage's device.
        ledger: Of the model.
        paid: Seconds `[K, nodes]` that each of two stages pays for the cut
            between them, by the first of the two.

    Attributes:
        nodes: Seconds `[K, nodes]` of each node in each stage.
        paid: As given.
        whole_s: Of all nodes on the fastest device, by back-propagation.
    """

    def __init__(self, kinds: Sequence[Kind], ledger: Ledger, paid: np.ndarray):
        self._times = np.array([kind.seconds(ledger) for kind in kinds])
        self.whole_s = float(self._times.sum((1, 2)).min())
        selective = ledger.stash == "selective"
        self._again = np.array([kind.again(selective) for kind in kinds])
        if selective:
            for k in range(len(kinds)):
                # With nothing in flight, nothing is run again.
                if not stage_delay(k, len(kinds), ledger.delay):
                    self._again[k] = 0.0
        if ledger.stash in ("selective", "replay"):
            self._times[..., 1] += self._again
        self.nodes = self._times.sum(-1)
        self.paid = paid

    def of(self, stage: StagePlan, k: int, a: int, b: int) -> StagePlan:
        """Returns stage k, the nodes a to b, with its times."""
        forward, backward = self._times[k, a:b].sum(0) + TICK_S / 2
        sends = self.paid[k, b - 1]
        returns = self.paid[k - 1, a - 1] if k else 0.0
        return dataclasses.replace(
            stage,
            costs=tuple(map(float, self.nodes[k, a:b])),
            forward_s=float(forward + sends),
            backward_s=float(backward + returns),
            again_s=float(self._again[k, a:b].sum()),
            sends_s=float(sends),
            returns_s=float(returns),
        )


def handing_over(names: Sequence[str], ledger: Ledger) -> np.ndarray:
    """Returns seconds `[K, nodes]` that two stages pay for a cut, each."""
    paid = np.zeros([len(names), len(ledger.sent)])
    # Who sends waits for it: the stage before the cut for activations, the one
    # after it for gradients. What each is charged is the larger of the two.
    bytes_ = np.maximum(ledger.sent, ledger.returned)
    for k, (here, there) in enumerate(itertools.pairwise(names)):
        if here != there and not share_memory(here, there):
            latency, for_a_byte = transfer_rate(here, there)
            paid[k] = latency + for_a_byte * bytes_
    return paid


def share_memory(a: str, b: str) -> bool:
    """Whether a tensor goes from one device to the other as it is."""
    return host_of(a) == a and host_of(b) == b and _task(a) == _task(b)


def _task(device: str) -> tuple:
    spec = tf.DeviceSpec.from_string(device)
    return spec.job, spec.replica, spec.task

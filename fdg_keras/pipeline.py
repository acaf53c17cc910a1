"""All stages with their links and compiled loops, for one kind of batch."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import _keras, delays
from fdg_keras.boundaries import Boundary
from fdg_keras.checks import check_gradients
from fdg_keras.clocks import check_clock
from fdg_keras.corrections import Correction
from fdg_keras.crossing import Stash
from fdg_keras.data import Spec
from fdg_keras.delays import Order
from fdg_keras.feeds import Feed
from fdg_keras.links import Link, Ports
from fdg_keras.loops import Loop
from fdg_keras.objective import Objective
from fdg_keras.placement import host_of
from fdg_keras.probes import Probe, Recorder
from fdg_keras.slicing import Graph, Slice
from fdg_keras.specs import batch_spec, size_of
from fdg_keras.stages import Stage
from fdg_keras.transforms import GradientTransformer
from fdg_keras.updates import Update

# The feeder itself sees to it that few batches wait in its links; outputs of
# `predict` are kept anyway.
_UNBOUNDED = 2**30


@dataclass(frozen=True)
class Settings:
    """How a pipeline trains. See `Trainer`."""

    delay: int
    order: Order
    stash: Stash
    transform: GradientTransformer
    corrections: tuple[Correction, ...] = ()


class Pipeline:
    """The stages of a model, compiled for one kind of batch.

    Build it with the stages' variables on their devices.

    Args:
        graph: The model.
        slices: Its parts.
        devices: Where they run.
        settings: How to train; `None` if not training.
        optimizers: One for each stage; empty if not training.
        objective: Loss and metrics; `None` hands out the outputs instead.
        spec: Of the batches.
        jit_compile: Whether XLA compiles forwards, backwards and updates.
        probed: Whether loops measure what `StageStatistics` are made of.
    """

    def __init__(
        self,
        graph: Graph,
        slices: Sequence[Slice],
        devices: Sequence[str],
        settings: Settings | None,
        optimizers: Sequence[keras.optimizers.Optimizer],
        objective: Objective | None,
        spec: Spec,
        jit_compile: bool,
        probed: bool = False,
    ):
        check_clock(
            "Stages read the clock to tell who waits for whom",
            "a program without it: on CPUs runs of one seed are the same to "
            "the bit anyway; or a `fit` with `emulate=True` and without "
            "validation",
        )
        self._graph = graph
        self._settings = settings
        self._optimizers = optimizers
        training = settings is not None
        # A loss, or a layer's own, may undo a softmax: of what `predict` hands
        # out there is none.
        scored = [True] * (len(slices) - 1) + [objective is not None]
        parts = enumerate(zip(slices, devices, scored))
        self.stages = [
            Stage(k, part, device, training, jit_compile, scores)
            for k, (part, device, scores) in parts
        ]
        self._objective = objective
        self._input_at = {v: i for i, v in enumerate(graph.inputs)}
        self._spec = spec
        self._probed = probed
        self.closed = False
        gradients = self._trace()
        if settings is not None:
            check_gradients(
                self.stages, [s.pair.weight_has_gradient for s in self.stages]
            )
        self.ports = self._connect(gradients)
        self.loops = [
            self.make_loop(stage, ports)
            for stage, ports in zip(self.stages, self.ports)
        ]
        self.feed = Feed(
            [
                (ports.feeds, self._positions(stage))
                for stage, ports in zip(self.stages, self.ports)
                if ports.feeds is not None
            ],
            self.ports[-1].targets,
        )

    # -- Building -------------------------------------------------------------

    def _trace(self) -> list[list[bool]]:
        """Traces all stages; returns what of the sent has a gradient."""
        boundary = Boundary()
        for stage in self.stages:
            feeds = [self._spec.inputs[i] for i in self._positions(stage)]
            boundary = stage.trace(boundary, feeds)
            if self._settings is not None:
                self._check_reads(f"Stage {stage.index}", stage.read)
        has_gradient = self._gradients_of_loss(boundary)
        found = [has_gradient]
        for stage in reversed(self.stages):
            upstream = self.stages[: stage.index]
            has_gradient = stage.cut(
                has_gradient,
                self._stash(stage),
                input_gradients=any(s.weights for s in upstream),
            )
            found.insert(0, has_gradient)
        return found[1:]

    def _stash(self, stage: Stage) -> Stash:
        """Returns what a stage keeps from a forward to its backward."""
        settings = self._settings
        if settings is None:
            return "exact"
        late = delays.stage_delay(stage.index, len(self.stages), settings.delay)
        # Where B follows F in the same tick, running operations again would
        # save nothing.
        if settings.stash == "selective" and not late:
            return "exact"
        return settings.stash

    def _gradients_of_loss(self, boundary: Boundary) -> list[bool]:
        """Returns which outputs the compiled loss depends on."""
        objective = self._objective
        none = [False] * len(boundary.floating(boundary.specs))
        if objective is None:
            return none
        found: list[bool] = []
        training = self._settings is not None

        @tf.function(autograph=False)
        def probe(sent: Any, own_loss: Any, targets: Any) -> None:
            gradients = objective.update(
                boundary, sent, own_loss, targets, training
            )
            found.extend(g is not None for g in gradients)

        with objective.fitting():
            traced = probe.get_concrete_function(
                list(boundary.specs[: len(boundary.specs) - boundary.has_loss]),
                boundary.specs[-1] if boundary.has_loss else None,
                list(objective.target_specs),
            )
        if not training:
            return none
        self._check_reads("The loss or a metric", traced.graph.variables)
        return found

    def _check_reads(self, where: str, read: Sequence[tf.Variable]) -> None:
        assert self._objective is not None
        self._objective.check_reads(where, read)

    def _connect(self, gradients: list[list[bool]]) -> list[Ports]:
        """Makes the links, each on its consumer's device."""
        capacity = self.capacity
        ports = [Ports() for _ in self.stages]
        for stage in self.stages:
            mine, k = ports[stage.index], stage.index
            if stage.slice.feeds:
                specs = [self._spec.inputs[i] for i in self._positions(stage)]
                mine.feeds = Link(specs, _UNBOUNDED, stage.device, f"feeds_{k}")
            if stage is self.stages[-1]:
                continue
            after, theirs = self.stages[k + 1], ports[k + 1]
            sent = stage.outgoing
            mine.activations_out = theirs.activations_in = Link(
                sent.specs, capacity, after.device, f"activations_{k + 1}"
            )
            # Who has no use for gradients would never take them out.
            if any(gradients[k]) and stage.has_backward:
                floating = sent.floating(sent.specs)
                specs = [s for s, g in zip(floating, gradients[k]) if g]
                mine.gradients_in = theirs.gradients_out = Link(
                    specs, capacity, stage.device, f"gradients_{k}"
                )
        final = self.stages[-1]
        if self._objective is not None:
            ports[-1].targets = Link(
                self._objective.target_specs,
                _UNBOUNDED,
                final.device,
                "targets",
            )
        else:
            ports[-1].activations_out = Link(
                final.outgoing.specs, _UNBOUNDED, final.device, "outputs"
            )
        return ports

    def make_loop(self, stage: Stage, ports: Ports) -> Loop:
        """Compiles the loop of a stage on given links."""
        settings = self._settings
        objective = self._objective if stage is self.stages[-1] else None
        if settings is None:
            return Loop(stage, ports, Update(stage.weights), objective)
        k, splits = stage.index, len(self.stages)
        late = delays.stage_delay(k, splits, settings.delay)
        update = Update(
            stage.weights,
            self._optimizers[k],
            delays.staleness(k, splits, settings.delay, settings.order),
            settings.corrections,
            functools.partial(
                tf.function,
                jit_compile=stage.jit_compile or None,
                autograph=False,
            ),
        )
        return Loop(
            stage,
            ports,
            update,
            objective,
            settings.transform,
            late,
            settings.order,
            self._probe(stage, ports, late),
        )

    def _probe(self, stage: Stage, ports: Ports, late: int) -> Probe:
        if not self._probed:
            return Probe()
        return Recorder(
            host_of(stage.device),
            stage.device,
            [_keras.get_storage(v) for v in stage.weights],
            ports.activations_in or ports.feeds,
            ports.gradients_in,
            late,
        )

    @property
    def capacity(self) -> int:
        """Batches that fit in a link between stages."""
        return delays.link_capacity(self.delay)

    @property
    def delay(self) -> int:
        """Batches of delay per hop; forwards alone run ahead by one."""
        return self._settings.delay if self._settings else 1

    def held_bytes(self, batch_size: int) -> list[tuple[int, int]]:
        """Returns what each stage sends of a batch, and stashes at most.

        Args:
            batch_size: Samples of a batch.
        """
        settings = self._settings
        assert settings is not None  # It trains.
        found = []
        for k, stage in enumerate(self.stages):
            specs = stage.outgoing.specs if stage is not self.stages[-1] else ()
            sent = sum(size_of(batch_spec(s, batch_size)) for s in specs)
            how = (k, len(self.stages), settings.delay, settings.order)
            batches, updates = delays.in_flight(*how), delays.staleness(*how)
            stash = stage.stash_bytes(settings.stash, batch_size)
            found.append((sent, stash.total(batches, updates)))
        return found

    def _positions(self, stage: Stage) -> list[int]:
        return [self._input_at[v] for v in stage.slice.feeds]

    def output(self) -> list[tf.Tensor]:
        """Returns the outputs of the next batch, for `predict`.

        They are there once `end` was called for that batch.
        """
        outputs = self.ports[-1].activations_out
        assert outputs is not None
        return outputs.dequeue()

    def forget_outputs(self) -> None:
        """Drops what nobody has taken, because predicting was stopped."""
        outputs = self.ports[-1].activations_out
        while outputs is not None and outputs.size():
            outputs.dequeue()

    def close(self) -> None:
        """Closes all links; wakes everything that waits for one."""
        self.closed = True
        for link in self._links():
            # A device that is gone must not keep the others waiting.
            with contextlib.suppress(tf.errors.OpError):
                link.close()

    def reopen(self) -> None:
        """Undoes `close`, when nobody waits for a link any more.

        With a device gone it stays closed, and is to be built anew.
        """
        with contextlib.suppress(tf.errors.OpError):
            for link in self._links():
                link.reopen()
            self.closed = False

    def _links(self) -> list[Link]:
        """Returns all links, each once."""
        links = [link for loop in self.loops for link in loop.links]
        return list({id(link): link for link in links}.values())

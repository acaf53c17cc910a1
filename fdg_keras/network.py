"""Stages and the wires between them: what happens when.

Knows times only, in seconds. A stage runs its passes one after the other; a
pass starts when its input is there and a processor is free.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence


class Wire:
    """One direction of a cut: a bounded queue that transfers fill.

    Args:
        transfer_s: Seconds that a unit occupies the wire.
        latency_s: Seconds until it is there then.
        capacity: How many units fit, those on their way included.
    """

    def __init__(self, transfer_s: float, latency_s: float, capacity: int):
        self._transfer_s = transfer_s
        self._latency_s = latency_s
        self._free_at = 0.0
        #: When each unit comes or came that was not taken out yet.
        self.arrivals: deque[float] = deque()
        #: Since when each free place is free. It is taken as a transfer is
        #: asked for, until the reader begins with what came.
        self.room = deque([0.0] * capacity)
        #: The reader while it waits for a unit to be sent, and the writer
        #: while it waits for room.
        self.reader: Stage | None = None
        self.writer: Stage | None = None

    def send(self, at: float) -> float:
        """Puts a unit in, where there is room; returns when."""
        sent = max(at, self.room.popleft())
        self._free_at = max(sent, self._free_at) + self._transfer_s
        self.arrivals.append(self._free_at + self._latency_s)
        return sent


class Stage:
    """A stage: its clock, and what it did with its time since `measure`.

    Args:
        index: k.
        cores: When each processor of its device is free, as a heap. Stages of
            the same device share it.

    Attributes:
        passes: What it will run: `"F"` or `"B"`, and seconds.
        reads: The wire each of them has its input from, if any.
        writes: The wire each of them sends to, if any.
        now: When it ended what it did last.
        started: How many passes it has run in all.
        computed: Seconds it ran passes.
        waited: Seconds it waited for input, by kind of pass.
        queued: Seconds it waited for a processor.
        blocked: Seconds it waited for room in a wire.
    """

    def __init__(self, index: int, cores: list[float]):
        self.index = index
        self.cores = cores
        self.passes: Iterator[tuple[str, float]] = iter(())
        self.reads: dict[str, Wire | None] = {"F": None, "B": None}
        self.writes: dict[str, Wire | None] = {"F": None, "B": None}
        self.kind, self.seconds = "F", 0.0  # of the pass it is at
        self.now = 0.0
        self.started = 0
        self.measure()

    def measure(self) -> None:
        """Begins to measure anew."""
        self._since = self.now
        self.computed = self.queued = self.blocked = 0.0
        self.waited = {"F": 0.0, "B": 0.0}

    @property
    def measured_s(self) -> float:
        """How long it has measured."""
        return self.now - self._since


def connect(
    before: Stage, after: Stage, activations: Wire, gradients: Wire
) -> None:
    """Connects neighbours in both directions."""
    before.writes["F"] = after.reads["F"] = activations
    after.writes["B"] = before.reads["B"] = gradients


class Network:
    """Connected stages, which run all their passes once.

    Args:
        stages: In order of their index.
        shared: Whether any of them share a device.
    """

    def __init__(self, stages: Sequence[Stage], shared: bool):
        self._stages = stages
        # Passes whose input has been sent, by when it is there. Stages that
        # share processors are served in that order. For others any order gives
        # the same times, and a stack is quicker.
        self._queue: list[tuple[float, int]] = []
        self._put: Callable = heapq.heappush if shared else list.append
        self._take: Callable = heapq.heappop if shared else list.pop

    def run(self) -> None:
        """Runs until every stage has ended or waits for another for good."""
        for stage in self._stages:
            self._go_on(stage)
        while self._queue:
            ready, index = self._take(self._queue)
            self._pass(self._stages[index], ready)

    def _pass(self, stage: Stage, ready: float) -> None:
        """Runs the pass a stage is at, whose input is there at `ready`."""
        start = max(ready, stage.cores[0])
        stage.waited[stage.kind] += ready - stage.now
        stage.queued += start - ready
        stage.computed += stage.seconds
        stage.started += 1
        stage.now = start + stage.seconds
        heapq.heapreplace(stage.cores, stage.now)
        wire = stage.reads[stage.kind]
        if wire is not None:
            wire.arrivals.popleft()
            wire.room.append(start)
            if wire.writer is not None:
                writer, wire.writer = wire.writer, None
                self._hand_on(writer)
        self._hand_on(stage)

    def _hand_on(self, stage: Stage) -> None:
        """Sends what a pass made, and goes on, if there is room."""
        wire = stage.writes[stage.kind]
        if wire is not None:
            if not wire.room:
                wire.writer = stage
                return
            sent = wire.send(stage.now)
            stage.blocked += sent - stage.now
            stage.now = sent
            if wire.reader is not None:
                reader, wire.reader = wire.reader, None
                self._await_input(reader)
        self._go_on(stage)

    def _go_on(self, stage: Stage) -> None:
        """Goes to the next pass, if there is any."""
        following = next(stage.passes, None)
        if following is not None:
            stage.kind, stage.seconds = following
            self._await_input(stage)

    def _await_input(self, stage: Stage) -> None:
        """Queues the pass a stage is at, once its input has been sent."""
        wire = stage.reads[stage.kind]
        if wire is None:
            self._put(self._queue, (stage.now, stage.index))
        elif wire.arrivals:
            ready = max(stage.now, wire.arrivals[0])
            self._put(self._queue, (ready, stage.index))
        else:
            wire.reader = stage

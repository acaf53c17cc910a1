"""What stages cost, what connects devices, and the memory that it takes.

Seconds and bytes for one batch: what a simulation starts from.
"""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from fdg_keras.schedules import Delayed, Schedule, check_whole

Stash = Literal["exact", "selective", "current", "replay"]
STASHES = ("exact", "selective", "current", "replay")

#: Bytes that an allocator hands out for a byte of tensors. TensorFlow's gives
#: blocks of up to twice what it is asked for. What it counted for the stages of
#: several networks was 0.92 to 1.15 times the sum of the tensors that are known
#: of (`scripts/bench_memory.py` measures some of them).
ALLOCATED = 1.05

# Sums and squares of amounts up to this are still numbers, and so are quotients
# by what is no less than its inverse.
_MOST = 1e100


@dataclass(frozen=True)
class Cost:
    """What a stage costs for one batch.

    Attributes:
        forward_s: Seconds of a forward.
        backward_s: Seconds of a backward with its update.
        sends: Bytes of activations over the cut after it.
        gradient_sends: Bytes of gradients over the cut before it.
        stash: Bytes kept from a forward to its backward, weights aside.
        inputs: Those of them that `stash="replay"` keeps.
        weights: Bytes of all weights.
        slots: Bytes of the optimizer's slots, and of whatever else is there
            once.
        again_s: Seconds by which `stash="replay"` makes a backward longer.
            Default: those of the forward.
        copies: Bytes of the weights that a backward reads, of which a stage
            may keep several versions. Default: all weights.
        running: Bytes that passes need while they run.

    Raises:
        ValueError: If one is negative, or beyond reason (1e100).
    """

    forward_s: float
    backward_s: float
    sends: float = 0.0
    gradient_sends: float = 0.0
    stash: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    slots: float = 0.0
    again_s: float | None = None
    copies: float | None = None
    running: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None and one.default is None:
                continue
            value = check_number(one.name, value, "seconds or bytes, 0 or more")
            object.__setattr__(self, one.name, value)


@dataclass(frozen=True)
class StageBytes:
    """What the memory of a stage is made of, in bytes.

    Attributes:
        batch: Kept of each batch from its forward to its backward, weights
            aside.
        again: What a backward makes again of its batch, and has while it runs.
        copies: Weights as they were at a forward, for each update since.
        weights: Trainable weights.
        gradients: By them: of a layer that is called several times, each time
            one, until they are added up.
        slots: Of the optimizer.
        updating: What updates have besides while they run.
        state: All other variables.
        links: What fits in the two links that it reads.
        fed: A batch of those of the model's inputs that it reads.
        returned: A batch's gradients over the cut after it.
        running: What passes have at once beside that, where they have most:
            gradients, and whatever else a layer computes with.
        home: Weights, slots and other variables of stages on other devices,
            which wait here, where the model came from, to be brought home.
    """

    batch: int
    again: int
    copies: int
    weights: int
    gradients: int
    slots: int
    updating: int
    state: int
    links: int
    fed: int
    returned: int
    running: int
    home: int = 0

    def stash(self, late: int) -> int:
        """Returns what is kept between F and B of a tick.

        Args:
            late: The stage's delay d_k, in batches.
        """
        return (late + 1) * self.batch + late * self.copies

    def peak(self, late: int, ahead: int) -> int:
        """Returns all that a stage holds at most, in a backward.

        In blocks of the allocator, `ALLOCATED` for each byte.

        Args:
            late: Likewise.
            ahead: How many batches of inputs wait for it.
        """
        there = self.weights + self.gradients + self.slots + self.state
        there += self.updating + self.links + ahead * self.fed
        held = self.stash(late) + self.again + self.running
        return int(ALLOCATED * (there + held + self.home))


@dataclass(frozen=True)
class Cable:
    """What connects two devices, in either direction at once.

    Attributes:
        bytes_per_s: Bandwidth. 100 Gbit/s are 12.5e9.
        latency_s: Seconds until the last byte that was sent is there; the next
            transfer may begin meanwhile.

    Raises:
        ValueError: If there is no bandwidth (less than 1e-100), or the latency
            is negative.
    """

    bytes_per_s: float = math.inf
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        rate = _real(self.bytes_per_s)
        if rate is None or not rate >= 1 / _MOST:
            raise ValueError(
                f"Expected `bytes_per_s` to be above 0, {1 / _MOST:g} at "
                f"least. Received: bytes_per_s={self.bytes_per_s!r}"
            )
        latency_s = check_number(
            "latency_s", self.latency_s, "seconds, 0 or more"
        )
        object.__setattr__(self, "bytes_per_s", rate)
        object.__setattr__(self, "latency_s", latency_s)


def peak_bytes(
    costs: Sequence[Cost],
    schedule: Schedule = Delayed(),  # noqa: B008 (immutable)
    stash: Stash = "exact",
    capacity: int | None = None,
) -> list[float]:
    """Returns the bytes that each stage needs at most.

    Slots, the weights, a gradient for each of them; in each of the two links
    that it reads as many units as fit; what passes need while they run; and,
    for n units in flight, one of them a 1/M of the batch,

        "exact"     n / M * stash + (versions - 1) * copies
        "selective" the same, of a smaller `stash`
        "current"   n / M * stash
        "replay"    n / M * inputs + 1 / M * stash

    where with delayed gradients n and the versions of the weights are d_k + 1.
    All of it in blocks of the allocator, `ALLOCATED` for each byte.

    Args:
        costs: One for each stage.
        schedule: As in `simulate`.
        stash: Likewise.
        capacity: Likewise.

    Raises:
        ValueError: If `stash` or `capacity` is out of range.
    """
    if stash not in STASHES:
        raise ValueError(
            f"Expected `stash` to be one of {STASHES}. Received: "
            f"stash={stash!r}"
        )
    if capacity is None:
        capacity = schedule.capacity
    check_whole("capacity", capacity, "the units that fit in a link", 1)
    found = []
    count = len(costs)
    unit = 1 / schedule.micro_batches
    for k, cost in enumerate(costs):
        kept = schedule.in_flight(k, count) * unit
        received = costs[k - 1].sends if k else 0.0
        received += costs[k + 1].gradient_sends if k < count - 1 else 0.0
        copies = cost.weights if cost.copies is None else cost.copies
        total = cost.slots + 2 * cost.weights + cost.running
        total += capacity * unit * received
        if stash == "replay":
            total += kept * cost.inputs + unit * cost.stash
        else:
            total += kept * cost.stash
        if stash in ("exact", "selective"):
            total += (schedule.versions(k, count) - 1) * copies
        found.append(ALLOCATED * total)
    return found


def check_number(name: str, value: Any, meaning: str) -> Any:
    """Checks an amount; arguments as of `schedules.check_whole`.

    Returns:
        The number, as Python's own if it is one of NumPy's: sums of their short
        types are as short.

    Raises:
        ValueError: If it is no number, negative, or beyond reason.
    """
    real = _real(value)
    if real is None or not 0 <= real <= _MOST:
        raise ValueError(
            f"Expected `{name}` to be {meaning}, and at most {_MOST:g}. "
            f"Received: {name}={value!r}"
        )
    return real


def _real(value: Any) -> Any:
    """Returns a number, as Python's own if it is NumPy's; `None` if none."""
    if isinstance(value, numbers.Real) and hasattr(value, "item"):
        value = value.item()
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return value if real else None

"""`Plan`: which layers are where, what they cost, and how to look at it."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from fdg_keras.delays import fed_ahead
from fdg_keras.plan_pictures import Bar, draw
from fdg_keras.plan_records import VERSION, check_plan
from fdg_keras.resources import Cost, StageBytes
from fdg_keras.stage_plans import StagePlan

_MIB = 2**20

#: What goes without saying in a device's name.
HERE = "/job:localhost/replica:0/task:0/device:"


# How the note begins that times are of other devices.
_ELSEWHERE = "What is expected here was measured for"


@dataclass(frozen=True)
class Plan:
    """Which layers are where, and what that costs. `print` it to see a table.

    Attributes:
        stages: In order.
        batch_size: Samples in the batch that times and bytes are of.
        delay: Batches of delay per hop that bytes are of.
        stash: The stash mode that bytes are of.
        step_s: Expected seconds of a training step.
        whole_s: The same on the fastest device alone, by back-propagation.
        measured_step_s: Measured seconds of such a tick, waiting included.
        measured_on: The devices that times are of, one for each stage, if they
            are not those of the stages.
        notes: What a reader should know, a sentence or two each.
        advice: What the run that it is of says of it: which cut to move, and
            settings that differ.
    """

    stages: tuple[StagePlan, ...]
    batch_size: int | None = None
    delay: int | None = None
    stash: str | None = None
    step_s: float | None = None
    whole_s: float | None = None
    measured_step_s: float | None = None
    measured_on: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    advice: str | None = None

    @property
    def cuts(self) -> tuple[int, ...]:
        """How many layers and operations come before each cut."""
        counts = [len(stage.layers) for stage in self.stages[:-1]]
        return tuple(sum(counts[: i + 1]) for i in range(len(counts)))

    @property
    def speed_up(self) -> float | None:
        """Expected steps per second, over those of one device."""
        if not self.step_s or self.whole_s is None:
            return None
        return self.whole_s / self.step_s

    def on(self, devices: Sequence[str]) -> "Plan":
        """Returns the same plan for other devices, one for each stage.

        A note says so, if times are known: they are those of the old ones.

        Raises:
            ValueError: If they are not as many names as stages.
        """
        before = [stage.device for stage in self.stages]
        if (
            not isinstance(devices, Sequence)
            or isinstance(devices, str)
            or not all(isinstance(name, str) for name in devices)
            or len(devices) != len(before)
        ):
            raise ValueError(
                "Expected `devices` to be a list of names, one for each of "
                f"the {len(before)} stages. Received: devices={devices!r}"
            )
        if before == list(devices):
            return self
        origin = self.measured_on or tuple(before)
        if self.step_s is None or origin == tuple(devices):
            origin = ()
        notes = tuple(n for n in self.notes if not n.startswith(_ELSEWHERE))
        if origin:
            there, here = (
                ", ".join(name.removeprefix(HERE) for name in names)
                for names in (origin, devices)
            )
            notes += (f"{_ELSEWHERE} {there}, but the stages are on {here}.",)
        stages = tuple(
            dataclasses.replace(stage, device=device)
            for stage, device in zip(self.stages, devices)
        )
        return dataclasses.replace(
            self, stages=stages, notes=notes, measured_on=origin
        )

    def as_costs(self) -> list[Cost]:
        """Returns the stages as `fdg_keras.simulation.simulate` takes them.

        They are those of the plan's `stash`: give the simulation the same, and
        `Delayed(plan.delay)`. Handing over is left out: it is what a `Cable` is
        there for.

        Raises:
            ValueError: If the plan was not measured.
        """
        found = []
        returned = 0
        replays = self.stash == "replay"
        for k, stage in enumerate(self.stages):
            size = stage.bytes
            if size is None or stage.forward_s is None:
                raise ValueError(
                    "Expected a plan that was measured, as `fdg_keras.plan` "
                    "makes it. Received: a plan without times"
                )
            again_s = stage.again_s or 0.0
            waiting = fed_ahead(k, len(self.stages), self.delay or 0) * size.fed
            backward_s = (stage.backward_s or 0.0) - (stage.returns_s or 0.0)
            found.append(
                Cost(
                    forward_s=stage.forward_s - (stage.sends_s or 0.0),
                    backward_s=backward_s - again_s * replays,
                    sends=stage.sends_bytes or 0,
                    gradient_sends=returned,
                    stash=size.again if replays else size.batch,
                    inputs=size.batch if replays else 0,
                    weights=size.weights,
                    slots=size.slots
                    + size.state
                    + size.home
                    + waiting
                    + size.updating
                    + size.gradients
                    - size.weights,
                    again_s=again_s,
                    copies=size.copies,
                    running=size.running + (0 if replays else size.again),
                )
            )
            returned = size.returned
        return found

    def __str__(self) -> str:
        columns = [column for column in self._columns() if any(column[2])]
        lines = []
        for row in zip(*([title, *cells] for title, _, cells in columns)):
            padded = [
                cell.rjust(width) if right else cell.ljust(width)
                for cell, (title, right, cells) in zip(row, columns)
                for width in [max(map(len, [title, *cells]))]
            ]
            lines.append("  ".join(padded).rstrip())
        lines += [*self._expectation(), *self.notes]
        return "\n".join([*lines, self.advice] if self.advice else lines)

    def _columns(self) -> list[tuple[str, bool, list[str]]]:
        """Returns title, whether it has numbers, and cells; "" is unknown."""
        stages = self.stages
        total = sum(stage.operations for stage in stages) or 1.0
        return [
            ("stage", True, [str(k) for k in range(len(stages))]),
            ("device", False, [s.device.removeprefix(HERE) for s in stages]),
            ("from", False, [s.layers[0] for s in stages]),
            ("to", False, [s.layers[-1] for s in stages]),
            ("layers", True, [str(len(s.layers)) for s in stages]),
            ("parameters", True, [f"{s.parameters:,}" for s in stages]),
            (
                "work %",
                True,
                [f"{100 * s.operations / total:.0f}" for s in stages],
            ),
            (
                "sends",
                True,
                [*(f"{s.sends:,}" for s in stages[:-1]), "-"],
            ),
            ("forward ms", True, [_ms(s.forward_s) for s in stages]),
            ("backward ms", True, [_ms(s.backward_s) for s in stages]),
            ("measured ms", True, [_ms(s.measured_s) for s in stages]),
            (
                "busy %",
                True,
                [_share(s.computing_s, self.step_s) for s in stages],
            ),
            (
                "measured %",
                True,
                [_share(s.measured_s, self.measured_step_s) for s in stages],
            ),
            ("sends MiB", True, [_mib(s.sends_bytes) for s in stages]),
            ("stash MiB", True, [_mib(s.stash_bytes) for s in stages]),
            ("peak MiB", True, [_mib(s.peak_bytes) for s in stages]),
        ]

    def _expectation(self) -> list[str]:
        lines = []
        if self.step_s and self.whole_s:
            lines.append(
                f"Expected: {1 / self.step_s:.3g} steps/s of {self.batch_size} "
                f"samples, {self.whole_s / self.step_s:.2f} times the "
                f"{1 / self.whole_s:.3g} steps/s of one device"
            )
        if self.measured_step_s:
            lines.append(f"Measured: {1 / self.measured_step_s:.3g} steps/s")
        return lines

    def to_json(self) -> str:
        """Returns the plan as text, for `from_json`."""
        return json.dumps(
            {"version": VERSION, **dataclasses.asdict(self)}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Returns the plan that `to_json` wrote, here or elsewhere.

        Its devices are a proposal: a `Trainer` takes its own `devices`.

        Raises:
            ValueError: If `text` is not such a plan.
        """
        try:
            record = json.loads(text)
            check_plan(record)
            del record["version"]
            stages = tuple(map(_stage, record.pop("stages")))
            for name in ("notes", "measured_on"):
                record[name] = tuple(record[name])
            return cls(stages=stages, **record)
        except (
            *(ValueError, TypeError, KeyError, AttributeError),
            RecursionError,  # of thousands of brackets
        ) as error:
            raise ValueError(
                "Expected the text that `Plan.to_json` returns, of this "
                f"version of fdg_keras; {error}. Received: {str(text)[:80]!r}"
            ) from error

    def plot(self) -> Image.Image:
        """Draws the stages as bars, as long as a tick of theirs.

        Returns:
            A picture, 900 pixels wide: for each stage its forward, its backward
            and its handing over in a frame that is the expected step, or its
            share of the work if no times are known; and its peak memory, if
            that is known. After training, a thin bar below is what it was
            measured to compute. It leaves the frame if that is longer.
        """
        return _draw(self)


def _stage(record: dict[str, Any]) -> StagePlan:
    for name in ("layers", "costs", "counts"):
        record[name] = tuple(record[name])
    if record["bytes"] is not None:
        record["bytes"] = StageBytes(**record["bytes"])
    return StagePlan(**record)


def _share(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.0f}" if part is not None and whole else ""


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / _MIB:,.1f}"


def _draw(plan: Plan) -> Image.Image:
    stages = plan.stages
    known = all(stage.tick_s is not None for stage in stages)
    parts = [s.parts if known else (s.operations,) for s in stages]
    whole = max(*map(sum, parts), plan.step_s or 0.0) or 1.0
    bars = [
        Bar(
            name=f"stage {k}",
            parts=lengths,
            seen=stage.measured_s if known else None,
            text=f"{100 * sum(lengths[:2]) / whole:.0f} %"
            + ("" if memory is None else f", {_mib(memory)} MiB"),
            span=f"{stage.layers[0]} to {stage.layers[-1]}",
        )
        for k, (stage, lengths) in enumerate(zip(stages, parts))
        for memory in [stage.peak_bytes]
    ]
    if not known:
        legend = f"{len(stages)} stages, of a forward of one sample"
        return draw("Estimated operations", legend, bars, whole)
    title = f"A step of {plan.batch_size} samples: {_ms(whole)} ms expected"
    if plan.measured_step_s:
        title += f", {_ms(plan.measured_step_s)} ms measured"
    legend = "blue: forward, orange: backward and update, "
    if any(lengths[2:] for lengths in parts):
        legend += "grey: handing over, "
    if any(bar.seen is not None for bar in bars):
        legend += "black: measured, "
    legend += "frame: expected step (100 %)"
    return draw(title, legend, bars, whole)

"""`StagePlan`: what a plan says of one stage."""

from dataclasses import dataclass

from fdg_keras.resources import StageBytes


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Times and bytes are `None` where they are not known: a `Trainer` that cuts
    by itself knows neither, a plan that was not measured has no times.

    Attributes:
        device: Full TensorFlow name of the device.
        layers: Names of its layers and operations in order, `outer/inner`
            within nested models.
        parameters: Number of parameters, trainable and not.
        counts: Those of each of its layers; what layers share is the first's.
        operations: Estimated operations of a forward, for one sample.
        sends: Elements it sends over the cut, for one sample.
        costs: What each of its layers costs: seconds of forward and backward
            for a batch, or else its estimated operations.
        forward_s: Seconds of a batch's forward, sending included.
        backward_s: Seconds of a batch's backward, with the update and with
            sending, and with what the stash mode runs again of the forward.
        again_s: Seconds that `"selective"` runs its forward again, if that is
            the plan's stash mode; else those that `"replay"` does.
        sends_s: Those of `forward_s` that handing over to the next stage takes.
        returns_s: Likewise of `backward_s`, to the stage before.
        sends_bytes: What crosses the cut after it with a batch.
        stash_bytes: What it keeps of all batches between their forward and
            their backward.
        peak_bytes: All that it holds at most: weights and their copies, slots,
            stash, links, and what a backward needs while it runs.
        bytes: What these are made of.
        measured_s: Seconds that it computed in a tick of `fit`; its first epoch
            does not count if there were others.
    """

    device: str
    layers: tuple[str, ...]
    parameters: int
    operations: float
    sends: int
    costs: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    forward_s: float | None = None
    backward_s: float | None = None
    again_s: float | None = None
    sends_s: float | None = None
    returns_s: float | None = None
    sends_bytes: int | None = None
    stash_bytes: int | None = None
    peak_bytes: int | None = None
    bytes: StageBytes | None = None
    measured_s: float | None = None

    @property
    def tick_s(self) -> float | None:
        """Seconds of a forward and a backward, if they are known."""
        if self.forward_s is None or self.backward_s is None:
            return None
        return self.forward_s + self.backward_s

    @property
    def computing_s(self) -> float | None:
        """Those of `tick_s` without handing over, as `measured_s` counts."""
        if self.tick_s is None:
            return None
        return self.tick_s - (self.sends_s or 0.0) - (self.returns_s or 0.0)

    @property
    def parts(self) -> tuple[float, ...]:
        """Seconds of forward, of backward, and of handing over if any.

        What is not known counts as 0.
        """
        sends_s, returns_s = self.sends_s or 0.0, self.returns_s or 0.0
        parts = (
            (self.forward_s or 0.0) - sends_s,
            (self.backward_s or 0.0) - returns_s,
        )
        return (*parts, sends_s + returns_s) if sends_s + returns_s else parts

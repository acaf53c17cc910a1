"""How fast a device updates weights, and hands tensors to another one."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from fdg_keras import _keras
from fdg_keras.optimizers import made_again

_ROUNDS = 5
_TURNS = 4
# Weights of about this size, 16 MiB, do not fit in a processor's own cache.
_SIDE = 2048


@dataclass(frozen=True)
class UpdateRate:
    """What an update costs for each byte of trainable weights.

    Attributes:
        seconds: That pass.
        slots: Bytes of slots that the optimizer keeps.
    """

    seconds: float
    slots: float


def update_rate(
    optimizer: keras.optimizers.Optimizer, device: str, measure: bool
) -> UpdateRate:
    """Makes an optimizer like the given one, and updates a matrix with it.

    Args:
        optimizer: As the model was compiled with; it is not changed.
        device: Full TensorFlow name.
        measure: Whether to take the time; if not it is 0.
    """
    with tf.device(device):
        variable = keras.Variable(tf.zeros([_SIDE, _SIDE]), name="weights")
        mine = made_again(optimizer)
        mine.loss_scale_factor = None
        mine.build([variable])
        gradient = tf.fill([_SIDE, _SIDE], 1e-3)
    size = 4 * _SIDE * _SIDE
    slots = sum(
        slot.value.dtype.size * int(tf.size(slot.value))
        for slot in _keras.slots_of(mine).values()
    )
    if not measure:
        return UpdateRate(0.0, slots / size)

    def update(turn: tf.Tensor) -> list[tf.Tensor]:
        mine.apply([gradient], [variable])
        return [turn + 1]

    @tf.function(autograph=False)
    def loop() -> None:
        tf.while_loop(lambda turn: turn < _TURNS, update, [0])

    loop()  # traces
    return UpdateRate(_median(loop) / _TURNS / size, slots / size)


def transfer_rate(source: str, target: str) -> tuple[float, float]:
    """Measures how long a tensor takes from one device to another.

    Returns:
        Seconds for a tensor of no size, and for each byte more.
    """
    count = _SIDE * _SIDE
    with tf.device(source):
        tensors = [tf.ones([n]) for n in (1, count)]

    def send(tensor: tf.Tensor) -> None:
        with tf.device(target):
            tf.identity(tensor)[-1].numpy()  # waits until it is there

    small, large = (_median(functools.partial(send, t)) for t in tensors)
    return small, max(large - small, 0.0) / (4 * count)


def _median(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

"""The clock that TensorFlow reads, here and on other machines."""

import time

import tensorflow as tf

from fdg_keras.placement import host_of

# Of so many readings the one that took least time is the best.
_READINGS = 8


def check_clock(reader: str, advice: str) -> None:
    """Refuses to trace what TensorFlow would refuse to run.

    Args:
        reader: Who reads the clock, and what for: begins a sentence.
        advice: What to do instead: ends one.

    Raises:
        ValueError: If operations must be deterministic.
    """
    try:
        tf.timestamp()
    except tf.errors.FailedPreconditionError as error:
        raise ValueError(
            f"{reader}. TensorFlow does not allow that after "
            "`tf.config.experimental.enable_op_determinism()`. Expected "
            f"{advice}. Received: {error.message}"
        ) from error


def offset_of(device: str) -> float:
    """Returns by how many seconds the clock of a device's machine is ahead.

    A clock is read over the network, half way between question and answer if
    both take the same time. What is within that uncertainty counts as none, so
    that workers of one machine have one clock.

    Args:
        device: Full TensorFlow name. A device of this process is not ahead.
    """
    if tf.DeviceSpec.from_string(device).job in (None, "localhost"):
        return 0.0
    readings = []
    for _ in range(_READINGS):
        asked = time.time()
        with tf.device(host_of(device)):
            read = float(tf.timestamp())
        answered = time.time()
        readings.append((answered - asked, read - (asked + answered) / 2))
    took, offset = min(readings)
    return offset if abs(offset) > took / 2 else 0.0

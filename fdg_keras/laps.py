"""How long layers take in a step: laps through their forwards and backwards.

A layer that is run over and over finds its weights, its batch and its own code
in the processor's cache, where a step does not leave them: the small layers of
a MobileNet take two to four times as long in a step. So all are run as in a
step, the forward of each and then the backward of each, from the last to the
first, on what the others have made; and a clock is read before and after each,
on the machine that computes.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from fdg_keras.clocks import check_clock
from fdg_keras.pieces import Piece
from fdg_keras.placement import host_of
from fdg_keras.profiles import Profile

# Laps are run for about this many seconds, but so many at least and at most.
# The mean of the middle half of them counts, without a slow moment of the
# machine. A single reading of the clock is good to a microsecond.
_SECONDS = 2.0
_LEAST_LAPS = 9
_MOST_LAPS = 1000

# Shortest time that is told, in seconds: no time at all is that of what is not
# run, such as the backward of what has none.
_LEAST_S = 1e-9

_TOO_LARGE = tf.errors.ResourceExhaustedError, MemoryError
# What a layer fails with that is given what it cannot take.
_NOT_TAKEN = tf.errors.InvalidArgumentError, tf.errors.UnimplementedError


def timed(pieces: Sequence[Piece], device: str) -> list[Profile]:
    """Measures pieces of a model in one step; returns a profile of each.

    What does not fit on the device at once is measured in two halves, and so is
    what does not take what the layers before it make of a batch of samples.

    Args:
        pieces: In the order of the model, one or more.
        device: Where they run, a full TensorFlow name.

    Raises:
        ValueError: If one alone needs more memory than there is, or does not
            take samples; or if TensorFlow does not allow to read the clock.
    """
    check_clock(
        "Layers are measured by the clock",
        "`measure=False`, or a plan that another program has made",
    )
    try:
        return _Laps(pieces, device).run()
    except (*_TOO_LARGE, *_NOT_TAKEN) as error:
        half = len(pieces) // 2
        if not half:
            raise ValueError(_refused(pieces[0], device, error)) from error
    return [*timed(pieces[:half], device), *timed(pieces[half:], device)]


def _refused(piece: Piece, device: str, error: Exception) -> str:
    """Returns what to say of a piece that cannot be run alone."""
    if isinstance(error, _TOO_LARGE):
        return (
            f"{piece.node.name!r} alone needs more memory than {device} has. "
            "Expected a `batch_size` with which each layer fits; "
            "`measure=False` tells the bytes of a plan without running it. "
            f"Received: batch_size={piece.batch_size}"
        )
    return (
        f"{piece.node.name!r} does not take what stands for a batch while "
        "layers are measured: floats from 0 to 1, and else zeros. Expected a "
        "layer that does; or `measure=False`, which runs nothing. Received: "
        f"{error}"
    )


class _Laps:
    """Forwards and backwards of pieces in a compiled loop, each with a clock.

    Args:
        pieces: In the order of the model.
        device: Where they run.
    """

    def __init__(self, pieces: Sequence[Piece], device: str):
        self._pieces = pieces
        self._device, self._host = device, host_of(device)
        with tf.device(device):
            self._variables = [
                [
                    tf.identity(v.value)
                    for v in (*piece.stage.weights, *piece.stage.state)
                ]
                for piece in pieces
            ]
            self._samples = {
                value: _sample(spec)
                for piece in pieces
                for value, spec in zip(piece.inputs, piece.specs)
            }
        with tf.device(self._host):
            self._loop = tf.function(
                self._laps, autograph=False
            ).get_concrete_function(tf.TensorSpec((), tf.int32))

    def run(self) -> list[Profile]:
        """Returns the profiles."""
        self._timed(1)  # initializes kernels
        _, once, _ = self._timed(1)
        laps = int(min(max(_SECONDS / once, _LEAST_LAPS), _MOST_LAPS))
        times, seconds, processor = self._timed(laps)
        ordered = np.sort(times, axis=0)
        skipped = laps // 4
        middle = ordered[skipped : laps - skipped].mean(0)
        *measured, idle, _ = middle
        busy = processor / seconds
        count = len(self._pieces)
        profiles = []
        for piece, forward, backward in zip(
            self._pieces, measured[:count], measured[count:]
        ):
            forward_s = max(forward - idle, _LEAST_S)
            backward_s = 0.0
            if piece.stage.has_backward:
                backward_s = max(backward - idle, _LEAST_S)
            profiles.append(
                dataclasses.replace(
                    piece.untimed,
                    forward_s=forward_s,
                    backward_s=backward_s,
                    processor_s=(forward_s + backward_s) * busy,
                )
            )
        return profiles

    def _timed(self, laps: int) -> tuple[np.ndarray, float, float]:
        """Returns seconds `[laps, parts]`, all of them, and those of cores."""
        processor, start = time.process_time(), time.perf_counter()
        times = self._loop(tf.constant(laps)).numpy()
        seconds = time.perf_counter() - start
        return times, seconds, time.process_time() - processor

    def _laps(self, laps: tf.Tensor) -> tf.Tensor:
        """Returns seconds `[laps, 2 * pieces + 2]`.

        Of forwards, of backwards (0 if there is none), and what the clock shows
        of nothing; and in the last column what was read, which means nothing.
        """

        def body(lap: tf.Tensor, times: tf.TensorArray) -> list[Any]:
            return [lap + 1, times.write(lap, tf.stack(self._lap(lap)))]

        return tf.while_loop(
            lambda lap, _: lap < laps,
            body,
            [0, tf.TensorArray(tf.float64, laps)],
            parallel_iterations=1,
        )[1].stack()

    def _lap(self, lap: tf.Tensor) -> list[tf.Tensor]:
        clock = _Clock(self._device, self._host, lap)
        values = dict(self._samples)
        forwards, ends = [], []
        for piece, variables in zip(self._pieces, self._variables):
            arguments = [*variables, *(values[v] for v in piece.inputs)]
            (outputs, *_, made), given, seconds = clock.time(
                piece.stage.pair.forward, arguments
            )
            forwards.append(seconds)
            ends.append((outputs, piece.stage.pair.stash(given, made)))
            made_here = zip(piece.node.outputs, outputs)
            for value, output in itertools.compress(made_here, piece.floating):
                # One of other rows or another dtype than planned does not fit
                # the next; and no whole number may be out of its range.
                sample = self._samples.get(value)
                if sample is not None and _alike(sample, output):
                    values[value] = output
        gradients: dict[int, tf.Tensor] = {}
        backwards = []
        for piece, (outputs, stash) in reversed([*zip(self._pieces, ends)]):
            pair = piece.stage.pair
            if pair.backward is None:
                backwards.append(tf.zeros([], tf.float64))
                continue
            # Of what has no gradient from behind, half the square is the loss.
            made_here = zip(piece.node.outputs, outputs)
            above = [
                gradients.get(value, output)
                for value, output in itertools.compress(
                    made_here, piece.floating
                )
            ]
            (_, below), _, seconds = clock.time(pair.backward, [*above, *stash])
            backwards.append(seconds)
            asked = itertools.compress(piece.inputs, pair.input_has_gradient)
            gradients.update(
                (value, gradient)
                for value, gradient in zip(asked, below)
                if values[value] is not self._samples[value]
            )
        *_, idle = clock.time(lambda nothing: [nothing], [tf.zeros([])])
        read = tf.cast(tf.add_n(clock.read), tf.float64)
        return [*forwards, *reversed(backwards), idle, read]


class _Clock:
    """Runs one function after another, and takes the time of each.

    Args:
        device: Where the functions run.
        host: The processor beside it, which has the clock.
        begin: What to wait for before the first.

    Attributes:
        read: Numbers that depend on all that the functions return. Somebody
            must want them: what nobody reads, TensorFlow does not compute.
    """

    def __init__(self, device: str, host: str, begin: tf.Tensor):
        self._device, self._host = device, host
        self._done = begin
        self.read: list[tf.Tensor] = []

    def time(
        self, function: Callable[..., Any], tensors: Sequence[tf.Tensor]
    ) -> tuple[Any, list[tf.Tensor], tf.Tensor]:
        """Returns what a function returns, what it was given, and seconds."""
        with tf.device(self._host), tf.control_dependencies([self._done]):
            start = tf.timestamp()
        with tf.device(self._device), tf.control_dependencies([start]):
            given = [tf.identity(t) for t in tensors]
        results = function(*given)
        with tf.device(self._device):
            made = [
                tf.identity(t)
                for t in tf.nest.flatten(results, expand_composites=True)
            ]
            with tf.control_dependencies(made):
                # A device that works behind the processor's back has come so
                # far when this number arrives there.
                last = _first(made[0])
        with (
            tf.device(self._host),
            tf.control_dependencies([tf.identity(last)]),
        ):
            stop = tf.timestamp()
        with tf.device(self._device), tf.control_dependencies([stop]):
            self._done = tf.add_n([_first(t) for t in made])
        self.read.append(self._done)
        return results, given, stop - start


def _alike(a: tf.Tensor, b: tf.Tensor) -> bool:
    return bool(a.dtype == b.dtype and a.shape == b.shape)


def _first(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a number that is known when the whole tensor is."""
    if tensor.dtype == tf.variant:
        return tf.constant(0.0)
    first = tf.reshape(tensor, [-1])[:1]
    if tensor.dtype == tf.string:
        first = tf.strings.length(first)
    return tf.reduce_sum(tf.cast(first, tf.float32))


def _sample(spec: tf.TensorSpec) -> tf.Tensor:
    """Returns what may stand for a value: no index is out of any range."""
    if spec.dtype.is_floating:
        # From 0 to 1: an `Embedding` takes whole numbers as floats, too.
        values = tf.random.stateless_uniform(spec.shape, [1, 2])
        return tf.cast(values, spec.dtype)
    return tf.zeros(spec.shape, spec.dtype)

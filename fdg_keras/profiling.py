"""How long a model's layers take: measured one by one, repeated ones once.

A layer is measured as a stage of its own: the forward and the backward that
the engine would run, called over and over in a compiled loop. What is found
of Keras' own layers is kept on disk, so that a plan of the same layers need not
measure again. Code that is not Keras' may be another one tomorrow: what it is
in is measured by each plan.
"""

import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from fdg_keras.keys import key_of, where
from fdg_keras.profiles import Profile, ProfileCache
from fdg_keras.slicing import Graph, Node, Slice
from fdg_keras.specs import as_traced, batch_spec, shape_of, size_of
from fdg_keras.stages import Boundary, Stage

# A loop lasts about this many seconds; the median of so many, of all pieces in
# turns, counts. So a slow moment of the machine does not strike one piece.
_LOOP_S = 0.02
_ROUNDS = 7


class Profiler:
    """Finds what each node takes on a device, for a batch.

    Nodes that compute the same, the blocks of a deep network, are looked at
    once, in order: what a node is given has the shape that the ones before it
    make of the batch, which symbols do not tell where rows are not samples.
    Updates are not measured.

    Args:
        graph: The model.
        batch_size: Samples in a batch, at least 1. Other unknown sizes are
            taken as 1.
        device: Where to run, a full TensorFlow name.
        jit_compile: Whether XLA compiles forward and backward.
        cache_dir: Where profiles are kept. Default: `FDG_KERAS_CACHE` in the
            environment, or else `fdg_keras` in the user's folder for caches.

    Attributes:
        graph: As given.
        batch_size: As given.
        specs: Shape and dtype of each of the graph's values.

    Raises:
        ValueError: If the model cannot have such a batch.
    """

    def __init__(
        self,
        graph: Graph,
        batch_size: int,
        device: str,
        jit_compile: bool = False,
        cache_dir: str | os.PathLike | None = None,
    ):
        self.graph, self.batch_size = graph, batch_size
        self._others = {batch_size: self}
        self._elsewhere = (device, jit_compile, cache_dir)
        needed = needs_gradient(graph)
        setting = (batch_size, jit_compile, *where(device))
        how = (batch_size, device, jit_compile)
        self._cache = ProfileCache(cache_dir)
        self._keys: list[str] = []
        self._lasting: dict[str, bool] = {}
        self._found: dict[str, Profile] = {}
        self._pieces: dict[str, _Piece] = {}
        self.specs = [batch_spec(s, batch_size) for s in graph.symbols]
        for node in graph.nodes:
            asked = any(needed[v] for v in node.inputs)
            key, lasts = key_of(node, self.specs, asked, setting)
            self._keys.append(key)
            if key not in self._lasting:
                self._lasting[key] = lasts
                known = _cached(self._cache, key, node) if lasts else None
                if known is not None:
                    self._found[key] = known
                else:
                    self._pieces[key] = _Piece(node, self.specs, asked, *how)
            for value, shape in zip(node.outputs, self._untimed(key).shapes):
                self.specs[value] = as_traced(self.specs[value], shape)

    def of_batch(self, batch_size: int) -> "Profiler":
        """Returns what finds the same for another batch."""
        if batch_size not in self._others:
            self._others[batch_size] = Profiler(
                self.graph, batch_size, *self._elsewhere
            )
        return self._others[batch_size]

    @property
    def open_symbols(self) -> list[Any]:
        """The symbols of sizes that neither they nor a batch tell."""
        made = {
            value: shape
            for node, key in zip(self.graph.nodes, self._keys)
            for value, shape in zip(node.outputs, self._untimed(key).shapes)
        }
        found = []
        for value, symbol in enumerate(self.graph.symbols):
            shape = made.get(value) or symbol.shape
            pairs = zip(symbol.shape[1:], shape[1:])
            if any(a is None and b is None for a, b in pairs):
                found.append(symbol)
        return found

    @property
    def sizes(self) -> list[int]:
        """Bytes of each of the graph's values."""
        return list(map(size_of, self.specs))

    def untimed(self) -> list[Profile]:
        """Returns a profile for each node, without measuring any.

        What is not known from before has times of 0.
        """
        return [self._untimed(key) for key in self._keys]

    def _untimed(self, key: str) -> Profile:
        if key in self._pieces:
            return self._pieces[key].untimed
        return self._found[key]

    def timed(self) -> list[Profile]:
        """Returns a profile for each node, and keeps what was measured.

        Raises:
            ValueError: If a node needs more memory than there is.
        """
        times: dict[str, list[Profile]] = {key: [] for key in self._pieces}
        idle = None
        for _ in range(_ROUNDS if times else 0):
            with tf.device(self._elsewhere[0]):
                idle = idle or _Loop(tf.identity, [tf.zeros([])])
                of_loop = idle.run()
            for key, piece in self._pieces.items():
                times[key].append(piece.run(*of_loop))
        for key, profiles in times.items():
            self._found[key] = _median(profiles)
            if self._lasting[key]:
                self._cache.write(key, self._found[key])
        self._pieces.clear()
        return [self._found[key] for key in self._keys]


def description(device: str) -> str:
    """Returns what is the same for devices that compute equally fast."""
    return repr(where(device))


def _cached(cache: ProfileCache, key: str, node: Node) -> Profile | None:
    """Returns what is known of a node from before, if anything."""
    found = cache.read(
        key,
        inputs=len(set(node.inputs)),
        outputs=len(node.outputs),
        weights=len(node.trainable_variables),
    )
    if found is None or not all(
        tf.TensorShape(shape).is_compatible_with(symbol.shape)
        for shape, symbol in zip(found.shapes, node.call.outputs)
    ):
        return None
    return found


class _Piece:
    """One node as a stage, ready to be run over and over."""

    def __init__(
        self,
        node: Node,
        of_values: Sequence[tf.TensorSpec],
        wanted: bool,
        batch_size: int,
        device: str,
        jit_compile: bool,
    ):
        values = tuple(dict.fromkeys(node.inputs))
        specs = tuple(of_values[value] for value in values)
        part = Slice((node,), (), values, node.outputs)
        stage = Stage(0, part, device, True, jit_compile)
        outgoing = stage.trace(Boundary(values, specs=specs), [])
        sent = outgoing.specs[: len(node.outputs)]  # without masks
        floating = [spec.dtype.is_floating for spec in sent]
        stage.cut(floating, "exact", wanted)
        self._stage, self._specs = stage, specs
        self._name, self._batch_size = node.name, batch_size
        self._floating = floating
        kept = stage.kept("exact", batch_size)
        selected = stage.kept("selective", batch_size)
        replayed = stage.stash_bytes("replay", batch_size)
        #: What is known without measuring.
        self.untimed = Profile(
            forward_s=0.0,
            backward_s=0.0,
            processor_s=0.0,
            keeps_inputs=kept.inputs,
            keeps_outputs=kept.outputs[: len(node.outputs)],
            keeps_weights=tuple(
                any(
                    v is w
                    for w in itertools.compress(stage.weights, kept.weights)
                )
                for v in node.trainable_variables
            ),
            keeps_bytes=kept.other_bytes,
            selects_inputs=selected.inputs,
            selects_outputs=selected.outputs[: len(node.outputs)],
            selects_bytes=selected.other_bytes,
            running_bytes=stage.running_bytes(batch_size),
            views=kept.views[: len(node.outputs)],
            unsized=kept.unsized,
            cheap=kept.cheap,
            replays=replayed.batch + replayed.unsized > 0,
            shapes=tuple(shape_of(spec) for spec in sent),
        )

    @functools.cached_property
    def _loops(self) -> list["_Loop"]:
        stage, pair = self._stage, self._stage.pair
        with tf.device(stage.device):
            variables = [*stage.weights, *stage.state]
            arguments = [
                *(tf.identity(v.value) for v in variables),
                *map(_sample, self._specs),
            ]
            outputs, *_, made = pair.forward(*arguments)
            # How many rows there are may only be known by now.
            given = [
                _sample(tf.TensorSpec(t.shape, t.dtype))
                for t in itertools.compress(outputs, self._floating)
            ]
        loops = [_Loop(pair.forward, arguments)]
        if pair.backward is not None:
            kept = pair.stash(arguments, made)
            loops.append(_Loop(pair.backward, [*given, *kept]))
        return loops

    def run(self, idle_s: float, idle_processor_s: float) -> Profile:
        """Measures once.

        Args:
            idle_s: Seconds that a turn of a loop takes by itself.
            idle_processor_s: Those of all cores.

        Raises:
            ValueError: If it needs more memory than there is.
        """
        try:
            times = [loop.run() for loop in self._loops]
        except (tf.errors.ResourceExhaustedError, MemoryError) as error:
            raise ValueError(
                f"{self._name!r} alone needs more memory than "
                f"{self._stage.device} has. Expected a `batch_size` with which "
                "each layer fits; `measure=False` tells the bytes of a plan "
                f"without running it. Received: batch_size={self._batch_size}"
            ) from error
        seconds = [max(one - idle_s, 0.0) for one, _ in times]
        return dataclasses.replace(
            self.untimed,
            forward_s=seconds[0],
            backward_s=sum(seconds[1:]),
            processor_s=sum(
                max(processor - idle_processor_s, 0.0) for _, processor in times
            ),
        )


class _Loop:
    """A function of tensors in a compiled loop."""

    def __init__(self, function: Callable, arguments: Sequence[tf.Tensor]):
        self._arguments = list(arguments)

        def body(i: tf.Tensor, total: tf.Tensor) -> list[tf.Tensor]:
            # Each turn waits for the one before, and reads its arguments anew.
            with tf.control_dependencies([total]):
                tensors = [tf.identity(t) for t in self._arguments]
            results = tf.nest.flatten(
                function(*tensors), expand_composites=True
            )
            # What nobody reads, TensorFlow would not compute.
            return [i + 1, total + tf.add_n([_first(t) for t in results])]

        def loop(turns: tf.Tensor) -> Any:
            return tf.while_loop(
                lambda i, _: i < turns, body, [0, 0.0], parallel_iterations=1
            )[1]

        self._loop = tf.function(loop, autograph=False).get_concrete_function(
            tf.TensorSpec((), tf.int32)
        )
        self._time(1)  # initializes kernels
        once, _ = self._time(1)
        self._turns = int(min(max(_LOOP_S / max(once, 1e-6), 1), 1000))

    def run(self) -> tuple[float, float]:
        """Returns seconds per turn: that passed, and of all cores."""
        seconds, processor = self._time(self._turns)
        return seconds / self._turns, processor / self._turns

    def _time(self, turns: int) -> tuple[float, float]:
        count = tf.constant(turns)
        processor = time.process_time()
        start = time.perf_counter()
        self._loop(count).numpy()
        seconds = time.perf_counter() - start
        return seconds, time.process_time() - processor


def _median(profiles: Sequence[Profile]) -> Profile:
    return dataclasses.replace(
        profiles[0],
        **{
            name: statistics.median(getattr(one, name) for one in profiles)
            for name in ("forward_s", "backward_s", "processor_s")
        },
    )


def _first(tensor: tf.Tensor) -> tf.Tensor:
    """Returns a number that is known when the whole tensor is."""
    if tensor.dtype == tf.variant:
        return tf.constant(0.0)
    return tf.reduce_sum(tf.cast(tf.reshape(tensor, [-1])[:1], tf.float32))


def _sample(spec: tf.TensorSpec) -> tf.Tensor:
    """Returns what may stand for a value: no index is out of any range."""
    if spec.dtype.is_floating:
        values = tf.random.stateless_normal(spec.shape, [1, 2])
        return tf.cast(values, spec.dtype)
    return tf.zeros(spec.shape, spec.dtype)


def needs_gradient(graph: Graph) -> list[bool]:
    """Returns for each value whether trainable weights lie before it."""
    needed = [False] * len(graph.symbols)
    for node in graph.nodes:
        found = any(needed[v] for v in node.inputs) or any(
            v.trainable for v in node.variables
        )
        for value in node.outputs:
            needed[value] = found
    return needed

"""How long a model's layers take, and what they keep: alike ones once.

A layer is measured as a stage of its own: the forward and the backward that
the engine would run. What is found of Keras' own layers is kept on disk, so
that a plan of the same layers need not measure again. Code that is not Keras'
may be another one tomorrow: what it is in is measured by each plan. If anything
is measured, then all is, together: how long a layer takes depends on what runs
before it, and the machine is not today what it was yesterday.
"""

import os
from typing import Any

import tensorflow as tf

from fdg_keras import laps
from fdg_keras.keys import key_of, where
from fdg_keras.pieces import Piece
from fdg_keras.profiles import Profile, ProfileCache
from fdg_keras.slicing import Graph, Node
from fdg_keras.specs import as_traced, batch_spec, size_of


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
        self._cache = ProfileCache(cache_dir)
        self._keys: list[str] = []
        self._lasting: dict[str, bool] = {}
        self._found: dict[str, Profile] = {}
        self._pieces: dict[str, Piece] = {}  # of what is not known
        self._first: dict[str, tuple[Node, bool]] = {}
        self.specs = [batch_spec(s, batch_size) for s in graph.symbols]
        for node in graph.nodes:
            asked = any(needed[v] for v in node.inputs)
            key, lasts = key_of(node, self.specs, asked, setting)
            self._keys.append(key)
            if key not in self._lasting:
                self._lasting[key] = lasts
                self._first[key] = node, asked
                known = _cached(self._cache, key, node) if lasts else None
                if known is not None:
                    self._found[key] = known
                else:
                    self._pieces[key] = self._piece(key)
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

    def _piece(self, key: str) -> Piece:
        node, asked = self._first[key]
        device, jit_compile, _ = self._elsewhere
        how = self.batch_size, device, jit_compile
        return Piece(node, self.specs, asked, *how)

    def _untimed(self, key: str) -> Profile:
        if key in self._pieces:
            return self._pieces[key].untimed
        return self._found[key]

    def timed(self) -> list[Profile]:
        """Returns a profile for each node, and keeps what was measured.

        Raises:
            ValueError: If a node needs more memory than there is.
        """
        if self._pieces:
            pieces = {
                key: self._pieces.get(key) or self._piece(key)
                for key in self._first
            }
            found = laps.timed([*pieces.values()], self._elsewhere[0])
            for key, profile in zip(pieces, found):
                self._found[key] = profile
                if self._lasting[key]:
                    self._cache.write(key, profile)
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

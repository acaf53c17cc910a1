"""One node of a model as a stage of its own, to be measured."""

import itertools
from collections.abc import Sequence

import tensorflow as tf

from fdg_keras.boundaries import Boundary
from fdg_keras.profiles import Profile
from fdg_keras.slicing import Node, Slice
from fdg_keras.specs import shape_of
from fdg_keras.stages import Stage


class Piece:
    """A node's forward and backward, as the engine would run them.

    Args:
        node: Of the model.
        of_values: Shape and dtype of each of the model's values.
        wanted: Whether the gradient by its inputs is asked for.
        batch_size: Samples in a batch.
        device: Where to run, a full TensorFlow name.
        jit_compile: Whether XLA compiles forward and backward.

    Attributes:
        node: As given.
        stage: It alone.
        inputs: Its values, each once.
        specs: Theirs.
        batch_size: As given.
        floating: For each of its outputs whether it may have a gradient.
        untimed: What is known without measuring.
    """

    def __init__(
        self,
        node: Node,
        of_values: Sequence[tf.TensorSpec],
        wanted: bool,
        batch_size: int,
        device: str,
        jit_compile: bool,
    ):
        self.node, self.batch_size = node, batch_size
        self.inputs = tuple(dict.fromkeys(node.inputs))
        self.specs = tuple(of_values[value] for value in self.inputs)
        part = Slice((node,), (), self.inputs, node.outputs)
        self.stage = stage = Stage(0, part, device, True, jit_compile)
        outgoing = stage.trace(Boundary(self.inputs, specs=self.specs), [])
        sent = outgoing.specs[: len(node.outputs)]  # without masks
        self.floating = [spec.dtype.is_floating for spec in sent]
        stage.cut(self.floating, "exact", wanted)
        kept = stage.kept("exact", batch_size)
        selected = stage.kept("selective", batch_size)
        replayed = stage.stash_bytes("replay", batch_size)
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

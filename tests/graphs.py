"""Random models to slice.

`recipes()` draws what a model is made of, as plain data, so that a failing
example is printed as something that can be pasted into a test; `build` makes
the model, with data to train on. A recipe is a list of steps, each applied to
any of the tensors made before it. So there are branches, skips over whatever
lies between, layers and models that are used several times, masks, tensors of
integers and of booleans that are made early and used late, several inputs and
several outputs.

Models are made such that two correct computations agree: all values stay
moderate; normalizations have a large epsilon, because the last batch has few
samples; nothing is compared or rounded near zero, where tensors may be by
construction; and in every row something is not masked.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import zoo
from hypothesis import strategies as st
from keras import layers, ops

BATCH_SIZE = 5
CLASSES = 3
VOCABULARY = 9

#: Steps in time, pixels and features are at most about so many.
LARGE = 12

#: Ranks of tensors, batch included.
VECTOR, SEQUENCE, IMAGE = 2, 3, 4
ANY = 0

INPUTS = ("vector", "sequence", "image", "tokens", "masked")
HEADS = ("classes", "values", "plain")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        kind: Of `KINDS`.
        size: Of what is made; odd and even sizes choose variants, too.
        a: Which tensor it works on, counted back from the latest one.
        b: Which other one, for steps that join two.
    """

    kind: str
    size: int = 3
    a: int = 0
    b: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a model is made of.

    Attributes:
        inputs: Of `INPUTS`.
        steps: In order. What no output needs is left out of the model.
        outputs: Pairs of one of `HEADS` and a tensor, counted back. One more
            head of classes is put on the last tensor.
        named: Whether inputs and outputs, if several, are dictionaries.
        samples: To train on.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, int], ...] = ()
    named: bool = False
    samples: int = 2 * BATCH_SIZE + 3


def recipes() -> st.SearchStrategy[Recipe]:
    """Draws recipes. Short last batches have three samples or four."""
    # Mostly of the latest tensors, or models would be wide and shallow.
    back = st.sampled_from([0, 0, 0, 0, 1, 2, 3, 5, 8])
    # What is joined to them is older: it skips what lies between.
    far_back = st.sampled_from([1, 2, 3, 5, 8, 0])
    # What is shared leaves fewer places to cut at: it is drawn more often.
    kinds = sorted(KINDS) + 2 * sorted(k for k in KINDS if "shared" in k)
    steps = st.builds(
        Step, st.sampled_from(kinds), st.integers(3, 6), back, far_back
    )
    return st.builds(
        Recipe,
        st.lists(st.sampled_from(INPUTS), min_size=1, max_size=3).map(tuple),
        st.lists(steps, min_size=1, max_size=10).map(tuple),
        st.lists(
            st.tuples(st.sampled_from(HEADS), st.integers(0, 9)), max_size=2
        ).map(tuple),
        st.booleans(),
        st.sampled_from([2 * BATCH_SIZE + 3, 3 * BATCH_SIZE + 4]),
    )


def build(recipe: Recipe) -> zoo.Case:
    """Returns the model, the same each time, uncompiled, and its data.

    `cuts` are left empty: which ones are legal depends on the graph.
    """
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)
    making = _Making()
    random = np.random.RandomState(len(recipe.steps))
    inputs, x = {}, {}
    for n, kind in enumerate(recipe.inputs):
        name = f"in_{n}"
        inputs[name], x[name] = making.start(kind, name, recipe, random)
    for step in recipe.steps:
        making.take(step)
    outputs, y, losses = {}, {}, {}
    for n, (kind, i) in enumerate((*recipe.outputs, ("classes", 0))):
        name = f"out_{n}"
        output = making.head(kind, making.pick(ANY, i), name)
        shape = (recipe.samples, *output.shape[1:])
        outputs[name] = output
        if kind == "classes":
            y[name] = random.randint(0, CLASSES, shape[:1]).astype("int32")
            losses[name] = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True
            )
        else:
            y[name] = random.standard_normal(shape).astype(
                keras.config.floatx()
            )
            losses[name] = keras.losses.Huber()

    def packed(found: dict) -> Any:
        values = list(found.values())
        if len(values) == 1:
            return values[0]
        return found if recipe.named else values

    return zoo.Case(
        model=keras.Model(packed(inputs), packed(outputs)),
        cuts={},
        x=packed(x),
        y=packed(y),
        loss=packed(losses),
        metrics=None,
    )


class _Making:
    """A model in the making.

    Attributes:
        found: Float tensors `[B, ...]` made so far.
        tokens: Integer tensors `[B, T]`.
        flags: Boolean tensors.
        once: Layers and models that are used again.
    """

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.tokens: list[Any] = []
        self.flags: list[Any] = []
        self.once: dict[Any, Any] = {}
        self._names = 0

    def start(
        self, kind: str, name: str, recipe: Recipe, random: Any
    ) -> tuple[Any, np.ndarray]:
        """Adds an input; returns it and its data."""
        n = recipe.samples
        if kind == "tokens":
            symbol = keras.Input((4,), dtype="int32", name=name)
            self.tokens.append(symbol)
            x = random.randint(0, VOCABULARY, (n, 4)).astype("int32")
            x[:, 0] = 1 + x[:, 0] % (VOCABULARY - 1)  # 0 is masked
            if not self.found:
                self.found.append(self.embed(symbol, 4))
            return symbol, x
        shape = {"vector": (6,), "image": (4, 4, 2)}.get(kind, (5, 3))
        symbol = keras.Input(shape, name=name)
        x = random.standard_normal((n, *shape)).astype(keras.config.floatx())
        if kind == "masked":
            x[:, 1:][random.rand(n, 4) < 0.4] = 0
            self.found.append(self.layer(layers.Masking)(symbol))
        else:
            self.found.append(symbol)
        return symbol, x

    def take(self, step: Step) -> None:
        """Takes a step, and adds what it makes to `found`."""
        rank, make = KINDS[step.kind]
        made = make(self, self.pick(rank, step.a), step)
        self.found.extend(made if isinstance(made, (list, tuple)) else [made])

    def head(self, kind: str, a: Any, name: str) -> Any:
        """Makes an output."""
        if kind == "plain":
            return a
        if kind == "values":
            # A layer, because operations lose the mask that the loss heeds.
            small = self.layer(layers.Activation, "tanh")(a)
            return layers.Dense(2, name=name)(small)
        vector = ops.tanh(self.as_rank(VECTOR, a))
        return layers.Dense(CLASSES, name=name)(vector)

    # -- Parts of steps -------------------------------------------------------

    def layer(self, kind: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns a new layer with a name of its own."""
        return kind(*args, name=self.name(kind.__name__.lower()), **kwargs)

    def name(self, prefix: str) -> str:
        self._names += 1
        return f"{prefix}_n{self._names}"

    def dense(self, a: Any, size: int, activation: str = "tanh") -> Any:
        return self.layer(layers.Dense, size, activation)(a)

    def seed(self) -> int:
        self._names += 1
        return self._names

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.once:
            self.once[key] = make()
        return self.once[key]

    def pick(self, rank: int, back: int) -> Any:
        """Returns a tensor made before, of this rank."""
        fitting = [t for t in self.found if rank in (ANY, len(t.shape))]
        if fitting:
            return fitting[-1 - back % len(fitting)]
        return self.as_rank(rank, self.pick(ANY, back))

    def as_rank(self, rank: int, a: Any) -> Any:
        """Returns a tensor of this rank made of another one."""
        now = len(a.shape)
        if now == rank:
            return a
        if rank == VECTOR:
            pools = {
                SEQUENCE: layers.GlobalAveragePooling1D,
                IMAGE: layers.GlobalAveragePooling2D,
            }
            return self.layer(pools[now])(a)
        if rank == SEQUENCE:
            if now == VECTOR:
                return self.layer(layers.RepeatVector, 3)(a)
            shape = (a.shape[1] * a.shape[2], a.shape[3])
            return self.layer(layers.Reshape, shape)(a)
        if now == VECTOR:
            wide = self.dense(a, 18)
            return self.layer(layers.Reshape, (3, 3, 2))(wide)
        return self.layer(layers.Reshape, (*a.shape[1:], 1))(a)

    def other(self, a: Any, step: Step) -> Any:
        """Returns the second tensor of a step, in the shape of `a`."""
        b = self.pick(ANY, step.b)
        if a.shape == b.shape:
            return b
        b = self.dense(self.as_rank(VECTOR, b), a.shape[-1])
        if len(a.shape) > VECTOR:
            ones = (1,) * (len(a.shape) - 2)
            b = self.layer(layers.Reshape, (*ones, a.shape[-1]))(b)
            b = b + ops.zeros_like(a)
        return b

    def embed(self, tokens: Any, size: int) -> Any:
        return self.layer(
            layers.Embedding, VOCABULARY, size, mask_zero=size % 2 == 0
        )(tokens)

    def narrow(self, a: Any) -> Any:
        return a[..., ::2] if a.shape[-1] > LARGE else a


# -- Steps --------------------------------------------------------------------

#: For each kind the rank it needs, and what takes the step.
KINDS: dict[str, tuple[int, Callable[[_Making, Any, Step], Any]]] = {}


def _kind(rank: int) -> Callable:
    def register(make: Callable) -> Callable:
        KINDS[make.__name__.strip("_")] = (rank, make)
        return make

    return register


def _simple(rank: int, **kinds: Callable[[Step], tuple]) -> None:
    """Registers layers that take one tensor: a class and its arguments."""

    def maker(describe: Callable[[Step], tuple]) -> Callable:
        def make(m: _Making, a: Any, s: Step) -> Any:
            kind, *args = describe(s)
            kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
            if "seed" in kwargs:
                kwargs["seed"] = m.seed()
            return m.layer(kind, *args, **kwargs)(a)

        return make

    for name, describe in kinds.items():
        KINDS[name] = (rank, maker(describe))


_simple(
    ANY,
    dense=lambda s: (layers.Dense, s.size, "tanh" if s.size % 2 else "relu"),
    dense_l2=lambda s: (
        layers.Dense,
        s.size,
        {"kernel_regularizer": keras.regularizers.L2(0.05)},
    ),
    dense_activity=lambda s: (
        layers.Dense,
        s.size,
        {"activity_regularizer": keras.regularizers.L2(0.05)},
    ),
    frozen=lambda s: (layers.Dense, s.size, "tanh", {"trainable": False}),
    batch_norm=lambda s: (
        layers.BatchNormalization,
        {"momentum": 0.8, "epsilon": 0.05},
    ),
    layer_norm=lambda s: (layers.LayerNormalization, {"epsilon": 0.05}),
    dropout=lambda s: (layers.Dropout, 0.3, {"seed": 0}),
    noise=lambda s: (layers.GaussianNoise, 0.1, {"seed": 0}),
    gelu=lambda s: (layers.Activation, "gelu"),
    silu=lambda s: (layers.Activation, "silu" if s.size % 2 else "swish"),
    dense_silu=lambda s: (layers.Dense, s.size, "silu"),
    leaky=lambda s: (layers.LeakyReLU,),
    identity=lambda s: (
        (layers.Identity,) if s.size % 2 else (layers.Activation, "linear")
    ),
    rescaling=lambda s: (layers.Rescaling, 0.8, 0.1),
    mean_square=lambda s: (zoo.MeanSquare,),
)
_simple(
    VECTOR,
    repeat=lambda s: (layers.RepeatVector, s.size - 1),
    unit_norm=lambda s: (layers.LayerNormalization, {"epsilon": 0.1}),
)
_simple(
    SEQUENCE,
    conv1d=lambda s: (
        layers.Conv1D,
        s.size,
        3,
        1 + s.size % 2,
        "same",
        {"activation": "tanh"},
    ),
    lstm=lambda s: (layers.LSTM, s.size, {"return_sequences": s.size % 2 > 0}),
    gru=lambda s: (
        layers.GRU,
        s.size,
        {"return_sequences": s.size % 2 > 0, "dropout": 0.2, "seed": 0},
    ),
    simple_rnn=lambda s: (layers.SimpleRNN, s.size, {"go_backwards": True}),
    max_pool1d=lambda s: (layers.MaxPooling1D, 2, {"padding": "same"}),
    mean_pool1d=lambda s: (layers.AveragePooling1D, 2, {"padding": "same"}),
    mean_of_steps=lambda s: (layers.GlobalAveragePooling1D,),
    max_of_steps=lambda s: (layers.GlobalMaxPooling1D,),
    flatten=lambda s: (layers.Flatten,),
    permute=lambda s: (layers.Permute, (2, 1)),
    spatial_dropout=lambda s: (layers.SpatialDropout1D, 0.3, {"seed": 0}),
    pad=lambda s: (layers.ZeroPadding1D, 1),
)
_simple(
    IMAGE,
    conv2d=lambda s: (
        layers.Conv2D,
        s.size,
        3,
        1 + s.size % 2,
        "same",
        {"activation": "relu"},
    ),
    depthwise=lambda s: (layers.DepthwiseConv2D, 3, 1, "same"),
    separable=lambda s: (layers.SeparableConv2D, s.size, 3, 1, "same"),
    max_pool2d=lambda s: (layers.MaxPooling2D, 2, {"padding": "same"}),
    mean_pool2d=lambda s: (layers.AveragePooling2D, 2, {"padding": "same"}),
    mean_of_pixels=lambda s: (layers.GlobalAveragePooling2D,),
)


@_kind(ANY)
def _add(m: _Making, a: Any, s: Step) -> Any:
    return m.layer(layers.Add)([a, m.other(a, s)])


@_kind(ANY)
def _average(m: _Making, a: Any, s: Step) -> Any:
    return m.layer(layers.Average)([a, m.other(a, s)])


@_kind(ANY)
def _multiply(m: _Making, a: Any, s: Step) -> Any:
    gate = m.layer(layers.Activation, "sigmoid")(m.other(a, s))
    return m.layer(layers.Multiply)([a, gate])


@_kind(ANY)
def _concatenate(m: _Making, a: Any, s: Step) -> Any:
    return m.narrow(m.layer(layers.Concatenate)([a, m.other(a, s)]))


@_kind(ANY)
def _raw(m: _Making, a: Any, s: Step) -> Any:
    return a * 0.5 - m.other(a, s) / 2


@_kind(ANY)
def _raw_mean(m: _Making, a: Any, s: Step) -> Any:
    return a - ops.mean(ops.abs(a), axis=-1, keepdims=True)


@_kind(ANY)
def _raw_slice(m: _Making, a: Any, s: Step) -> Any:
    return a[..., 1:] if a.shape[-1] > 3 else a + 0.1


@_kind(ANY)
def _raw_concatenate(m: _Making, a: Any, s: Step) -> Any:
    b = ops.concatenate([m.other(a, s), ops.tanh(a)], axis=-1)
    return m.narrow(b)


@_kind(ANY)
def _split(m: _Making, a: Any, s: Step) -> Any:
    """An operation with two outputs."""
    return ops.split(m.dense(a, 6), 2, axis=-1)


@_kind(ANY)
def _gate(m: _Making, a: Any, s: Step) -> Any:
    """A boolean tensor, used at once and maybe again."""
    b = m.other(a, s)
    fitting = [flag for flag in m.flags if flag.shape == a.shape]
    if not fitting or s.size % 2:
        m.flags.append(a > 0.123)
        fitting = [m.flags[-1]]
    return ops.where(fitting[0], 0.5 * a, b)


@_kind(ANY)
def _tokens(m: _Making, a: Any, s: Step) -> Any:
    """An integer tensor, used at once and maybe again; none of it is 0."""
    vector = m.as_rank(VECTOR, a)[:, :5]
    rounded = ops.floor(2 * ops.tanh(vector) + 3.377)
    m.tokens.append(ops.cast(rounded, "int32"))
    return m.embed(m.tokens[-1], s.size)


@_kind(ANY)
def _embed(m: _Making, a: Any, s: Step) -> Any:
    """An integer tensor of before, or a new one."""
    if not m.tokens:
        return _tokens(m, a, s)
    return m.embed(m.tokens[s.b % len(m.tokens)], s.size)


@_kind(ANY)
def _one_hot(m: _Making, a: Any, s: Step) -> Any:
    if not m.tokens:
        return _tokens(m, a, s)
    tokens = m.tokens[s.b % len(m.tokens)]
    return m.dense(ops.one_hot(tokens, VOCABULARY), s.size)


@_kind(ANY)
def _shared_dense(m: _Making, a: Any, s: Step) -> Any:
    """On two tensors at once, or twice on one; and maybe again later.

    Each of its calls adds a loss, its kernel one for all.
    """
    width = a.shape[-1]
    l2 = keras.regularizers.L2(0.05)
    dense = m.shared(
        ("dense", width),
        lambda: m.layer(
            layers.Dense,
            width,
            "tanh",
            kernel_regularizer=l2,
            activity_regularizer=l2,
        ),
    )
    if s.size % 2:
        return m.layer(layers.Subtract)([dense(a), dense(m.other(a, s))])
    return dense(dense(a))


@_kind(ANY)
def _shared_embed(m: _Making, a: Any, s: Step) -> Any:
    """The rows of one table for two tensors of integers, or twice for one."""
    made = [] if m.tokens else [_tokens(m, a, s)]
    embed = m.shared("embed", lambda: m.layer(layers.Embedding, VOCABULARY, 4))
    pooled = [
        m.layer(layers.GlobalAveragePooling1D)(embed(m.tokens[i]))
        for i in (-1, s.b % len(m.tokens))
    ]
    return [*made, m.layer(layers.Concatenate)(pooled)]


@_kind(ANY)
def _shared_dropout(m: _Making, a: Any, s: Step) -> Any:
    """What is shared here is a seed."""
    return m.shared(
        "dropout", lambda: m.layer(layers.Dropout, 0.2, seed=m.seed())
    )(a)


@_kind(ANY)
def _shared_activation(m: _Making, a: Any, s: Step) -> Any:
    """Nothing to train, so it may be cut between the uses."""
    relu = m.shared("relu", lambda: m.layer(layers.ReLU, negative_slope=0.2))
    return relu(a) - relu(m.other(a, s))


def _block(m: _Making, shape: tuple, size: int) -> keras.Model:
    return m.layer(
        keras.Sequential,
        [
            keras.Input(shape),
            layers.Dense(size, use_bias=False, name="wide"),
            layers.BatchNormalization(epsilon=0.05, name="norm"),
            layers.ReLU(name="relu"),
            layers.Dropout(0.2, seed=m.seed(), name="drop"),
        ],
    )


@_kind(ANY)
def _nested(m: _Making, a: Any, s: Step) -> Any:
    return _block(m, a.shape[1:], s.size)(a)


@_kind(ANY)
def _nested_shared(m: _Making, a: Any, s: Step) -> Any:
    shape = a.shape[1:]
    block = m.shared(("block", shape), lambda: _block(m, shape, 4))
    if s.size % 2:
        return block(a)
    return m.layer(layers.Maximum)([block(a), block(m.other(a, s))])


@_kind(ANY)
def _nested_branches(m: _Making, a: Any, s: Step) -> Any:
    """Two inputs, two outputs, and a model within the model."""
    shape = a.shape[1:]
    left, right = keras.Input(shape), keras.Input(shape)
    both = layers.Add(name="add")([left, right])
    low = layers.Dense(s.size, "tanh", name="low")(both)
    high = _block(m, low.shape[1:], 5)(low)
    inner = m.layer(keras.Model, [left, right], [low, high * 0.5])
    return inner([a, m.other(a, s)])


@_kind(SEQUENCE)
def _attention(m: _Making, a: Any, s: Step) -> Any:
    value = m.pick(SEQUENCE, s.b)
    attend = m.layer(
        layers.MultiHeadAttention, 2, 2, dropout=0.2, seed=m.seed()
    )
    return attend(a, value=value)


@_kind(SEQUENCE)
def _bidirectional(m: _Making, a: Any, s: Step) -> Any:
    inner = layers.GRU(2, return_sequences=s.size % 2 > 0)
    return m.layer(layers.Bidirectional, inner)(a)


@_kind(SEQUENCE)
def _lstm_states(m: _Making, a: Any, s: Step) -> Any:
    """Several outputs of a layer, and tensors as keyword arguments."""
    whole, h, c = m.layer(
        layers.LSTM, s.size, return_sequences=True, return_state=True
    )(a)
    decoder = m.layer(layers.LSTM, s.size, return_sequences=True)
    return [whole, h, decoder(m.pick(SEQUENCE, s.b), initial_state=[h, c])]


@_kind(SEQUENCE)
def _each_step(m: _Making, a: Any, s: Step) -> Any:
    return m.layer(layers.TimeDistributed, layers.Dense(s.size, "tanh"))(a)


@_kind(SEQUENCE)
def _last_step(m: _Making, a: Any, s: Step) -> Any:
    return a[:, -1]


@_kind(SEQUENCE)
def _up1d(m: _Making, a: Any, s: Step) -> Any:
    return a if a.shape[1] > LARGE / 2 else m.layer(layers.UpSampling1D)(a)


@_kind(IMAGE)
def _up2d(m: _Making, a: Any, s: Step) -> Any:
    return a if a.shape[1] > LARGE / 2 else m.layer(layers.UpSampling2D)(a)


@_kind(IMAGE)
def _rows(m: _Making, a: Any, s: Step) -> Any:
    """An image as a sequence of its rows."""
    shape = (a.shape[1], a.shape[2] * a.shape[3])
    return m.narrow(m.narrow(m.layer(layers.Reshape, shape)(a)))


@_kind(SEQUENCE)
def _as_image(m: _Making, a: Any, s: Step) -> Any:
    return m.as_rank(IMAGE, a)

"""Which of a forward's tensors to keep, and which to compute again.

What is expensive is kept: products of matrices, convolutions, loops, calls of
functions, random numbers, and whatever has an effect or is not known here.
What passes once through memory is cheap: arithmetic on elements, casts, sums,
normalizations, pads, transpositions. Of the forward's cheap operations those
are run again in the backward that save the most memory.

The extra work is bounded in two ways. Each cheap operation is run at most once
more, an expensive one never. And running again must pay: for every byte that
is not kept, at most `MOVED_PER_BYTE` bytes are read and written once more.
Both hold by construction, because the choice minimizes

    bytes kept + bytes read and written again / MOVED_PER_BYTE

and keeping all that the backward reads is among the choices.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import tensorflow as tf

from fdg_keras import mincut


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


#: How many bytes may be read and written again to keep one byte less.
#: In a ResNet seven are, in a transformer five.
MOVED_PER_BYTE = 16

# Types of operations that hand on what they get under another name or shape:
# the same memory.
VIEWS = _types(
    """
    EnsureShape ExpandDims Identity IdentityN PreventGradient Reshape Snapshot
    Squeeze StopGradient
    """
)

# That read no elements, but only the shape or a few numbers.
SMALL = _types(
    """
    BroadcastArgs BroadcastGradientArgs Const Range Rank Shape ShapeN Size
    """
)

# That pass through memory about once. Nothing here has a state, draws a random
# number, calls a function, or fails where it has not failed before.
CHEAP = _types(
    """
    Abs Acos Acosh Add AddN AddV2 All Any ApproximateEqual ArgMax ArgMin Asin
    Asinh Atan Atan2 Atanh AvgPool AvgPool3D BatchToSpaceND BiasAdd BroadcastTo
    Cast Ceil ClipByValue Complex ComplexAbs ConcatV2 Conj Cos Cosh Cumprod
    Cumsum DepthToSpace Digamma Div DivNoNan Elu Equal Erf Erfc Exp Expm1 Fill
    Floor FloorDiv FloorMod FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3
    GatherNd GatherV2 Greater GreaterEqual Imag Inv InvertPermutation IsFinite
    IsInf IsNan L2Loss LRN LeakyRelu Less LessEqual Lgamma Log Log1p LogSoftmax
    LogicalAnd LogicalNot LogicalOr Max MaxPool MaxPool3D MaxPoolV2 Maximum Mean
    Min Minimum MirrorPad Mod Mul MulNoNan Neg NextAfter NotEqual OneHot
    OnesLike Pack Pad PadV2 Pow Prod Real RealDiv Reciprocal Relu Relu6
    ResizeBilinear ResizeNearestNeighbor ReverseV2 Rint Roll Round Rsqrt Select
    SelectV2 Selu Sigmoid Sign Sin Sinh Slice Softmax Softplus Softsign
    SpaceToBatchND SpaceToDepth Split SplitV Sqrt Square SquaredDifference
    StridedSlice Sub Sum Tan Tanh Tile Transpose TruncateDiv TruncateMod Unpack
    Where Xdivy Xlogy ZerosLike
    """
)


def owner(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the tensor whose memory this one shares, maybe itself."""
    while tensor.op.type in VIEWS:
        index = tensor.value_index if tensor.op.type == "IdentityN" else 0
        tensor = tensor.op.inputs[index]
    return tensor


def moved(operation: tf.Operation, sizes: Mapping[str, int | None]) -> float:
    """Returns the bytes an operation reads and writes.

    Infinite if it may not be run again: it is expensive, or it reads what is
    of unknown size.
    """
    if operation.type in SMALL:
        return 0.0
    if operation.type not in CHEAP | VIEWS:
        return math.inf
    read = [sizes[name] for name in {t.name for t in operation.inputs}]
    if None in read:
        return math.inf
    if operation.type in VIEWS:
        return 0.0
    # What has no size in spite of sized inputs is what cuDNN keeps for itself.
    written = [sizes[t.name] for t in operation.outputs]
    return float(sum(size or 0 for size in read + written))


def cheapest(
    operations: Sequence[tf.Operation],
    needed: Collection[str],
    sizes: Mapping[str, int | None],
    free: Collection[str],
) -> mincut.Choice:
    """Returns what to keep for the backward, and what to run again in it.

    Args:
        operations: Those of the forward, in order. What they read and none of
            them made is there in the backward anyway.
        needed: Names of the tensors that the backward reads.
        sizes: Bytes of each tensor, by its name; `None` if unknown. A tensor
            of unknown size is kept only if the backward reads it.
        free: Names of tensors that cost nothing to keep.
    """

    def cost(tensor: tf.Tensor) -> float:
        size = 0 if tensor.name in free else sizes[tensor.name]
        if size is None:
            return 0 if tensor.name in needed else math.inf
        return size

    made = {t.name for op in operations for t in op.outputs}
    steps = [
        mincut.Step(
            {t.name for t in op.inputs} & made,
            {t.name: cost(t) for t in op.outputs},
            moved(op, sizes) / MOVED_PER_BYTE,
        )
        for op in operations
    ]
    return mincut.cheapest(steps, needed)

"""How tests compare trained models."""

import keras
import numpy as np

#: Largest error of a tensor, relative to its largest entry.
TOLERANCE = 1e-5

#: Tensors smaller than this are held against this instead: a bias that is
#: almost zero is a difference of larger numbers, in float32.
SMALL = 1e-3


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """`max |a - b| / max(SMALL, max |b|)`."""
    difference = np.max(np.abs(actual - expected), initial=0.0)
    return float(difference / max(SMALL, np.max(np.abs(expected), initial=0.0)))


def errors(actual: keras.Model, expected: keras.Model) -> list[float]:
    """Error of each variable: weights, BatchNorm statistics, seeds."""
    return [
        # In float64, because seeds are unsigned integers.
        relative_error(a.numpy().astype("float64"), e.numpy().astype("float64"))
        for a, e in zip(actual.variables, expected.variables, strict=True)
    ]


def assert_same_weights(
    actual: keras.Model,
    expected: keras.Model,
    context: str = "",
    tolerance: float = TOLERANCE,
) -> None:
    """Every variable of the models equals within a tolerance."""
    found = errors(actual, expected)
    worst = int(np.argmax(found))
    # Written so that NaN fails.
    assert found[worst] <= tolerance, (
        f"{actual.variables[worst].path} is off by {found[worst]:.2g} of its "
        f"largest entry, {sum(not e <= tolerance for e in found)} of "
        f"{len(found)} variables are off{context}"
    )


def assert_identical_weights(actual: keras.Model, expected: keras.Model):
    """Every variable of the models equals bit for bit."""
    for a, e in zip(actual.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), e.numpy(), err_msg=a.path)

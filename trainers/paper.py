"""What the paper reports, to be put beside ours.

Source: Zhuang, Wang, Liu, Lin, "Fully Decoupled Neural Network Learning Using
Delayed Gradients" (arXiv 1906.09108), section V: the tables of test errors and
of times. Test errors are medians of three runs of 300 epochs; those of other
methods are the authors' own runs where they give them. Times are of GPUs.
"""

from typing import NamedTuple

from trainers.methods import Variant


class Figures(NamedTuple):
    """What is reported of a run; `None` is not.

    Attributes:
        test_error: In %.
        seconds: Of an epoch.
        utilisation: Of each GPU, in %.
    """

    test_error: float | None = None
    seconds: float | None = None
    utilisation: tuple[int, ...] | None = None


#: In %, by data set, network, method, number of devices and `shrink`.
_ERRORS = {
    ("cifar10", "resnet20"): {
        ("bp", 1, 1.0): 7.78,
        ("fdg", 2, 1.0): 7.92,
        ("fdg", 2, 0.2): 7.23,
    },
    ("cifar10", "resnet56"): {
        ("bp", 1, 1.0): 6.19,
        # The table of two modules has 6.63, that of two to four this.
        ("ddg", 2, 1.0): 6.60,
        ("ddg", 3, 1.0): 6.50,
        ("ddg", 4, 1.0): 6.61,
        ("dgl", 2, 1.0): 6.77,
        ("dgl", 3, 1.0): 8.88,
        ("dgl", 4, 1.0): 9.65,
        ("fr", 2, 1.0): 6.07,
        ("fr", 3, 1.0): 6.33,
        ("fr", 4, 1.0): 6.48,
        ("fdg", 2, 1.0): 6.20,
        ("fdg", 3, 1.0): 6.20,
        ("fdg", 4, 1.0): 6.83,
        ("fdg", 2, 0.5): 5.90,
        ("fdg", 3, 0.5): 6.08,
        ("fdg", 4, 0.5): 6.14,
    },
    ("cifar10", "resnet110"): {
        ("bp", 1, 1.0): 5.79,
        ("ddg", 2, 1.0): 6.26,
        ("dgl", 2, 1.0): 6.26,
        ("fr", 2, 1.0): 5.76,
        ("fdg", 2, 1.0): 5.79,
        ("fdg", 2, 0.5): 5.73,
    },
    ("cifar10", "resnet18"): {
        ("bp", 1, 1.0): 4.87,
        ("ddg", 2, 1.0): 5.00,
        ("dgl", 2, 1.0): 5.21,
        ("fr", 2, 1.0): 4.80,
        ("fdg", 2, 1.0): 4.82,
        ("fdg", 2, 0.8): 4.79,
    },
    ("cifar10", "wrn28_10"): {
        ("bp", 1, 1.0): 4.01,
        ("fdg", 2, 1.0): 4.13,
        ("fdg", 2, 0.7): 3.85,
    },
    ("cifar100", "resnet56"): {
        ("bp", 1, 1.0): 27.68,
        ("fdg", 2, 1.0): 27.87,
        ("fdg", 2, 0.4): 27.49,
    },
    ("cifar100", "resnet110"): {
        ("bp", 1, 1.0): 25.82,
        ("fdg", 2, 1.0): 25.73,
        ("fdg", 2, 0.5): 25.43,
    },
    ("cifar100", "resnet18"): {
        ("bp", 1, 1.0): 22.35,
        ("fdg", 2, 1.0): 22.78,
        ("fdg", 2, 0.5): 22.18,
    },
    ("cifar100", "wrn28_10"): {
        ("bp", 1, 1.0): 19.6,
        ("fdg", 2, 1.0): 20.28,
        ("fdg", 2, 0.6): 19.08,
    },
}

#: Seconds of an epoch on CIFAR-10, by network, method and number of devices.
_SECONDS = {
    "wrn28_10": {
        ("bp", 1): 219.1,
        ("ddg", 2): 160.3,
        ("ddg", 3): 139.3,
        ("ddg", 4): 133.9,
        ("fr", 2): 208.2,
        ("fr", 3): 173.4,
        ("fr", 4): 151.9,
        ("dgl", 2): 118.4,
        ("dgl", 3): 82.6,
        ("dgl", 4): 72.4,
        ("dp", 2): 126.9,
        ("dp", 3): 102.1,
        ("dp", 4): 84.0,
        ("fdg", 2): 118.3,
        ("fdg", 3): 89.6,
        ("fdg", 4): 74.1,
    },
    "resnet56": {
        ("bp", 1): 30.2,
        ("fdg", 2): 29.6,
        ("fdg", 3): 27.0,
        ("fdg", 4): 27.3,
    },
}

#: In %, of each GPU, likewise.
_UTILISATION = {
    ("wrn28_10", "fdg", 2): (96, 80),
    ("wrn28_10", "fdg", 3): (80, 87, 72),
    ("wrn28_10", "fdg", 4): (67, 87, 74, 46),
    ("resnet56", "fdg", 4): (38, 29, 17, 10),
}


def figures(variant: Variant) -> Figures:
    """Returns what the paper reports of a method, network and data set.

    It knows nothing of corrections and the like, so that for a variant with
    other settings than `splits` and `shrink` it reports nothing.
    """
    recipe = variant.recipe
    if variant.settings - {"splits", "shrink", "emulate"} or recipe.corrections:
        return Figures()
    at = variant.method, variant.stages
    errors = _ERRORS.get((recipe.dataset, recipe.model), {})
    error = errors.get((*at, recipe.shrink))
    if recipe.dataset != "cifar10":
        return Figures(error)
    return Figures(
        error,
        _SECONDS.get(recipe.model, {}).get(at),
        _UTILISATION.get((recipe.model, *at)),
    )

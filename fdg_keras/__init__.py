"""Fully decoupled training of Keras models with delayed gradients.

`fdg_keras.fit(model, x, y, splits=4)` slices a compiled Keras model into
stages on several devices and trains them without forward, backward or update
locking: "Fully Decoupled Neural Network Learning Using Delayed Gradients"
(Zhuang et al., IEEE TNNLS 2021, arXiv 1906.09108).
"""

import keras as _keras_package

if _keras_package.backend.backend() != "tensorflow":
    raise ImportError(
        "fdg_keras runs on TensorFlow. Set the environment variable "
        "KERAS_BACKEND=tensorflow before Keras is imported. Received: "
        f"backend {_keras_package.backend.backend()!r}."
    )

from fdg_keras import callbacks as callbacks
from fdg_keras.cluster import connect_to_cluster
from fdg_keras.corrections import (
    Correction,
    DelayCompensation,
    LearningRateRescheduling,
    WeightPrediction,
)
from fdg_keras.planner import plan
from fdg_keras.plans import Plan
from fdg_keras.stage_plans import StagePlan
from fdg_keras.trainer import Trainer, fit
from fdg_keras.transforms import GradientShrinking, GradientTransformer

__version__ = "0.1.0"

__all__ = [
    "Correction",
    "DelayCompensation",
    "GradientShrinking",
    "GradientTransformer",
    "LearningRateRescheduling",
    "Plan",
    "StagePlan",
    "Trainer",
    "WeightPrediction",
    "connect_to_cluster",
    "fit",
    "plan",
]

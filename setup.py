"""Packaging of fdg_keras."""

import pathlib

import setuptools

README = pathlib.Path(__file__).parent / "README.md"

# TensorFlow 2.21 does not depend on TensorBoard, whose writer it needs for
# `tf.summary`. Keras is held to the minor release whose private names were
# tested (`fdg_keras/_keras.py`).
INSTALL_REQUIRES = [
    "tensorflow>=2.21,<2.22",
    "keras>=3.15,<3.16",
    "absl-py>=2.1,<3",
    "numpy>=1.26,<3",
    "scipy>=1.11,<2",
    "tensorboard>=2.20,<2.22",
]

DATASETS = [
    "tensorflow-datasets>=4.9.9,<5",
    # Imported by tensorflow-datasets, but missing from its requirements.
    "importlib_resources>=6.4,<8",
    # The digits that `trainers/digits.py` learns.
    "scikit-learn>=1.5,<2",
]

TEST = [
    "hypothesis>=6.100,<7",
    "psutil>=6,<8",
    "pytest>=8.2,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.6,<4",
    "scikit-learn>=1.5,<2",
]

# The formatter's output changes between minor releases.
DEV = [*TEST, "mypy>=2.4,<2.5", "ruff>=0.17,<0.18"]

setuptools.setup(
    name="fdg_keras",
    version="0.1.0",
    description="Fully decoupled, pipelined training of Keras models on "
    "several devices, with delayed gradients",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["fdg_keras", "fdg_keras.*"]),
    package_data={"fdg_keras": ["py.typed"]},
    install_requires=INSTALL_REQUIRES,
    extras_require={
        "cuda": ["tensorflow[and-cuda]>=2.21,<2.22"],
        "datasets": DATASETS,
        "test": TEST,
        "dev": DEV,
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

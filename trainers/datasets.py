"""The data of the training scripts, by name, from tensorflow-datasets.

An epoch's batches depend on the seed and the number of the epoch alone. So two
runs with one seed see the same batches, and a run that is resumed sees those
that it would have seen.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import tensorflow as tf
import tensorflow_datasets as tfds

from trainers import augmentation
from trainers.augmentation import fold
from trainers.digits_builder import Digits

#: Records that are shuffled among themselves where a data set is too large for
#: memory: about half a gigabyte of ImageNet.
CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Description:
    """What tells one data set from another.

    Attributes:
        image_shape: `(height, width, channels)`.
        num_classes: Number of classes.
        mean: Of each channel, in 0 ... 1; subtracted.
        std: Standard deviation of each channel; divided by.
        peak: The largest value of a pixel.
        pad: By how many pixels an image may be moved in training.
        flip: Whether it may be mirrored.
        test: The name of the split for testing.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    peak: float = 255.0
    pad: int = 0
    flip: bool = False
    test: str = "test"

    def normalize(self, images: tf.Tensor) -> tf.Tensor:
        """Returns images as float32, with mean 0 and deviation 1."""
        images = tf.cast(images, tf.float32) / self.peak
        return (images - self.mean) / self.std


DATASETS = {
    "cifar10": Description(
        (32, 32, 3),
        10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        pad=4,
        flip=True,
    ),
    "cifar100": Description(
        (32, 32, 3),
        100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        pad=4,
        flip=True,
    ),
    "imagenet2012": Description(
        (augmentation.SIDE, augmentation.SIDE, 3),
        1000,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        test="validation",
    ),
    "mnist": Description((28, 28, 1), 10, pad=2),
    "digits": Description((8, 8, 1), 10, peak=16.0),
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches of images, float32 `[B, H, W, C]`, and labels, int64 `[B]`.

    Attributes:
        description: Of the data set.
        steps_per_epoch: Batches in an epoch of training; the last one may be
            short.
        training: From the first epoch, counted from 0, and the number of all
            epochs to the batches of the epochs from the first on, one epoch
            after the other.
        test: The batches to test on.
    """

    description: Description
    steps_per_epoch: int
    training: Callable[[int, int], tf.data.Dataset]
    test: tf.data.Dataset


def load(
    name: str,
    batch_size: int,
    seed: int = 0,
    data_dir: str | None = None,
    download: bool = False,
    limit: int | None = None,
) -> Data:
    """Loads a data set.

    Args:
        name: A name in `DATASETS`.
        batch_size: Images in a batch.
        seed: Of shuffling and augmentation.
        data_dir: Folder of prepared data sets. Default: the environment
            variable TFDS_DATA_DIR, or `~/tensorflow_datasets`.
        download: Whether to fetch and prepare a data set that is not there.
            Without it there is no access to the network. The digits are
            prepared in any case, as they come with scikit-learn.
        limit: Images of each split to use at most. Default: all.

    Returns:
        The `Data`.

    Raises:
        ValueError: If there is no such data set, or it is not prepared.
    """
    if name not in DATASETS:
        raise ValueError(
            f"Expected the data set to be one of {sorted(DATASETS)}. "
            f"Received: {name!r}"
        )
    description = DATASETS[name]
    folder = data_dir or os.environ.get("TFDS_DATA_DIR")
    folder = os.path.expanduser(folder or "~/tensorflow_datasets")
    builder = tfds.builder_from_directory(_prepared(name, folder, download))

    def count(split: str) -> int:
        examples = builder.info.splits[split].num_examples
        return min(examples, limit or examples)

    make = _streamed if name == "imagenet2012" else _in_memory
    counts = count("train"), count(description.test)
    # Images stay in host memory: the devices are for the stages.
    with tf.device("CPU:0"):
        return make(builder, description, *counts, batch_size, seed)


def _prepared(name: str, data_dir: str, download: bool) -> str:
    """Returns the folder of a prepared data set, looked for without tfds.

    A builder of tfds that finds nothing may ask the network, and hang.
    """
    directory = _find(name, data_dir)
    if directory is None and (download or name == Digits.name):
        tfds.builder(name, data_dir=data_dir).download_and_prepare()
        directory = _find(name, data_dir)
    if directory is None:
        by_hand = (
            " (its archives are fetched by hand: see "
            "https://www.tensorflow.org/datasets/catalog/imagenet2012)"
            if name == "imagenet2012"
            else ""
        )
        raise ValueError(
            f"Expected {name!r} to be prepared in the folder of data sets. "
            f"Where there is a network, add --download{by_hand}. Where there "
            f"is none, prepare it elsewhere, copy its folder {name}, and name "
            f"the folder it lies in: --data_dir=... Received: {data_dir}"
        )
    return directory


def _find(name: str, data_dir: str) -> str | None:
    """Returns the folder of the latest version that is prepared."""
    pattern = os.path.join(data_dir, name, "*", "dataset_info.json")
    folders = [os.path.dirname(path) for path in tf.io.gfile.glob(pattern)]
    # Others are being prepared, or were when somebody lost patience.
    versions = {
        tfds.core.Version(os.path.basename(folder)): folder
        for folder in folders
        if tfds.core.Version.is_valid(os.path.basename(folder))
    }
    return versions[max(versions)] if versions else None


def _in_memory(
    builder: tfds.core.DatasetBuilder,
    description: Description,
    train_count: int,
    test_count: int,
    batch_size: int,
    seed: int,
) -> Data:
    def read(split: str, count: int) -> Callable:
        examples = builder.as_dataset(split=f"{split}[:{count}]", batch_size=-1)
        images, labels = examples["image"], examples["label"]
        return lambda indices: (
            tf.gather(images, indices),
            tf.gather(labels, indices),
        )

    trained = read("train", train_count)
    tested = read(description.test, test_count)

    def epoch_of(epoch: tf.Tensor) -> tf.data.Dataset:
        epoch_seed = fold((seed, 0), epoch)
        order = tf.random.experimental.stateless_shuffle(
            tf.range(train_count), epoch_seed
        )

        def batch_of(number: tf.Tensor, indices: tf.Tensor) -> tuple:
            images, labels = trained(indices)
            images = augmentation.crop_and_flip(
                images,
                fold(epoch_seed, number),
                description.pad,
                description.flip,
            )
            return description.normalize(images), labels

        batches = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
        return batches.enumerate().map(batch_of)

    def test_batch_of(indices: tf.Tensor) -> tuple:
        images, labels = tested(indices)
        return description.normalize(images), labels

    test = tf.data.Dataset.range(test_count).batch(batch_size)
    return Data(
        description,
        math.ceil(train_count / batch_size),
        functools.partial(_epochs, epoch_of),
        test.map(test_batch_of).prefetch(2),
    )


def _streamed(
    builder: tfds.core.DatasetBuilder,
    description: Description,
    train_count: int,
    test_count: int,
    batch_size: int,
    seed: int,
) -> Data:
    def examples(serialized: tf.Tensor) -> tuple:
        # JPEG until it is known which part of an image is wanted.
        decoders = {"image": tfds.decode.SkipDecoding()}
        found = builder.info.features.deserialize_example(
            serialized, decoders=decoders
        )
        return found["image"], found["label"]

    def files(split: str) -> tf.Tensor:
        return tf.constant(
            [os.fspath(path) for path in builder.info.splits[split].filepaths]
        )

    train_files, test_files = files("train"), files(description.test)

    def epoch_of(epoch: tf.Tensor) -> tf.data.Dataset:
        epoch_seed = fold((seed, 0), epoch)
        shuffle = tf.random.experimental.stateless_shuffle
        order = shuffle(train_files, epoch_seed)

        def example_of(number: tf.Tensor, record: tf.Tensor) -> tuple:
            jpeg, label = examples(record)
            image = augmentation.random_part(jpeg, fold(epoch_seed, number))
            return description.normalize(image), label

        records = _records(order).take(train_count)
        chunks = records.batch(CHUNK).enumerate()
        records = chunks.map(
            lambda number, chunk: shuffle(chunk, fold(epoch_seed, number))
        ).unbatch()
        return _decoded(records.enumerate(), example_of, batch_size)

    def test_example_of(record: tf.Tensor) -> tuple:
        jpeg, label = examples(record)
        return description.normalize(augmentation.centre(jpeg)), label

    test = _records(test_files).take(test_count)
    return Data(
        description,
        math.ceil(train_count / batch_size),
        functools.partial(_epochs, epoch_of),
        _decoded(test, test_example_of, batch_size).prefetch(2),
    )


def _epochs(
    epoch_of: Callable[[tf.Tensor], tf.data.Dataset],
    first_epoch: int,
    epochs: int,
) -> tf.data.Dataset:
    numbers = tf.data.Dataset.range(first_epoch, epochs)
    # The next epoch's first batches are made while this one's are trained.
    return numbers.flat_map(epoch_of).prefetch(4)


def _records(files: tf.Tensor) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(files).interleave(
        tf.data.TFRecordDataset,
        cycle_length=16,
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def _decoded(
    records: tf.data.Dataset, example_of: Callable, batch_size: int
) -> tf.data.Dataset:
    examples = records.map(example_of, num_parallel_calls=tf.data.AUTOTUNE)
    return examples.batch(batch_size)

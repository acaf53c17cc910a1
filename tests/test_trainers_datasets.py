"""The data of the training scripts: the same in every run, and offline."""

import os
import pathlib
import socket

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from trainers import augmentation, datasets

CIFAR = pathlib.Path(
    os.environ.get("TFDS_DATA_DIR")
    or pathlib.Path(__file__).parents[2] / "shared" / "tfds"
)


def store(data_dir, name, test, shape, count, jpeg=False):
    """Prepares a data set of random images, as tfds would have."""
    rng = np.random.default_rng(0)

    def examples(number):
        for i in range(number):
            image = rng.integers(0, 256, shape).astype("uint8")
            yield i, {"image": image, "label": i % 10}

    tfds.dataset_builders.store_as_tfds_dataset(
        name,
        "1.0.0",
        tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(
                    shape=(None, None, 3) if jpeg else shape,
                    encoding_format="jpeg" if jpeg else "png",
                ),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        ),
        {"train": examples(count), test: examples(6)},
        data_dir=data_dir,
        download_config=tfds.download.DownloadConfig(num_shards=2),
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    store(folder, "cifar10", "test", (32, 32, 3), 20)
    store(folder, "imagenet2012", "validation", (260, 300, 3), 20, jpeg=True)
    datasets.load("digits", 32, data_dir=folder)
    return str(folder)


def batches(dataset):
    return [(x.numpy(), y.numpy()) for x, y in dataset]


def assert_equal_batches(found, expected):
    assert len(found) == len(expected)
    for (x, y), (x_expected, y_expected) in zip(found, expected):
        np.testing.assert_array_equal(y, y_expected)
        np.testing.assert_array_equal(x, x_expected)


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012", "digits"])
def test_batches_depend_on_seed_and_epoch_alone(data_dir, name):
    def load(seed):
        return datasets.load(name, 8, seed, data_dir, limit=18)

    data = load(1)
    whole = batches(data.training(0, 3))
    assert data.steps_per_epoch == 3
    assert [len(y) for _, y in whole] == 3 * [8, 8, 2]
    shape = data.description.image_shape
    assert whole[0][0].shape == (8, *shape)
    assert whole[0][0].dtype == np.float32
    # Again, whatever the global seed is; and resumed.
    tf.random.set_seed(0)
    assert_equal_batches(batches(load(1).training(0, 3)), whole)
    assert_equal_batches(batches(load(1).training(1, 3)), whole[3:])
    assert_equal_batches(batches(load(1).training(2, 3)), whole[6:])
    # Every epoch has its own order, and images of its own.
    first, second = (
        np.concatenate([x.mean((1, 2, 3)) for x, _ in whole[e : e + 3]])
        for e in (0, 3)
    )
    assert not np.array_equal(first, second)
    other = batches(load(2).training(0, 1))
    assert not np.array_equal(other[0][0], whole[0][0])


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_an_epoch_has_every_image_once(data_dir, name):
    data = datasets.load(name, 8, 0, data_dir)
    for epoch in (0, 1):
        labels = [y for _, y in batches(data.training(epoch, epoch + 1))]
        assert sorted(np.concatenate(labels)) == sorted(2 * list(range(10)))
    assert sum(len(y) for _, y in batches(data.test)) == 6


def test_images_of_the_test_are_only_normalized(data_dir):
    data = datasets.load("cifar10", 4, 0, data_dir)
    (x, _), (rest, _) = batches(data.test)
    stored = tfds.builder_from_directory(f"{data_dir}/cifar10/1.0.0")
    images = [e["image"] for e in stored.as_dataset("test").as_numpy_iterator()]
    means = np.array([0.4914, 0.4822, 0.4465], "float32")
    deviations = np.array([0.2470, 0.2435, 0.2616], "float32")
    np.testing.assert_allclose(
        np.concatenate([x, rest]),
        (np.stack(images) / 255.0 - means) / deviations,
        rtol=1e-4,
        atol=1e-5,
    )


def test_digits_are_those_of_scikit_learn(data_dir):
    import sklearn.datasets

    data = datasets.load("digits", 64, 0, data_dir)
    train = batches(data.training(0, 1))
    test = batches(data.test)
    images = np.concatenate([x for x, _ in train + test])
    labels = np.concatenate([y for _, y in train + test])
    expected = sklearn.datasets.load_digits()

    def ordered(images, labels):
        rows = np.column_stack([images.reshape(len(images), 64), labels])
        return rows[np.lexsort(rows.T)]

    np.testing.assert_array_equal(
        ordered(images * 16, labels), ordered(expected.images, expected.target)
    )
    # One fifth for testing, with the same share of each class.
    share = np.bincount(np.concatenate([y for _, y in test])) / 360
    np.testing.assert_allclose(
        share, np.bincount(expected.target) / 1797, atol=0.003
    )


def test_digits_are_split_alike_everywhere(data_dir, tmp_path):
    again = datasets.load("digits", 32, data_dir=str(tmp_path))
    assert_equal_batches(
        batches(again.test),
        batches(datasets.load("digits", 32, data_dir=data_dir).test),
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_unprepared_data_are_an_error_without_a_network(
    tmp_path, monkeypatch, name
):
    def never(*_, **__):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket, "socket", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    monkeypatch.setattr(tfds, "builder", never)
    with pytest.raises(
        ValueError,
        match=rf"{name}.*--download.*--data_dir=.*Received: {tmp_path}",
    ):
        datasets.load(name, 8, data_dir=str(tmp_path))


def test_what_was_prepared_by_half_is_not_there(tmp_path):
    half = tmp_path / "mnist" / "incomplete.X1Y2Z3_3.0.1"
    half.mkdir(parents=True)
    (half / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="'mnist' to be prepared"):
        datasets.load("mnist", 8, data_dir=str(tmp_path))


def test_unknown_name_is_an_error():
    with pytest.raises(ValueError, match=r"cifar10.*Received: 'svhn'"):
        datasets.load("svhn", 8)


@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_cut_out_of_the_padded_image(flip):
    image = np.arange(1, 13, dtype="uint8").reshape(3, 4, 1)
    padded = np.pad(image, [(1, 1), (1, 1), (0, 0)])
    cuts = {
        padded[i : i + 3, j : j + 4].tobytes()
        for i in range(3)
        for j in range(3)
    }
    if flip:
        padded = padded[:, ::-1]
        cuts |= {
            padded[i : i + 3, j : j + 4].tobytes()
            for i in range(3)
            for j in range(3)
        }
    found = augmentation.crop_and_flip(
        np.stack([image] * 500), (1, 2), pad=1, flip=flip
    )
    # In 500 images, all there are.
    assert {crop.tobytes() for crop in found.numpy()} == cuts


def test_the_centre_of_a_photograph():
    rng = np.random.default_rng(0)
    photograph = rng.integers(0, 256, (256, 300, 3)).astype("uint8")
    jpeg = tf.io.encode_jpeg(photograph)
    expected = tf.io.decode_jpeg(jpeg)[16:240, 38:262]
    np.testing.assert_allclose(augmentation.centre(jpeg), expected, atol=1e-3)
    # The shorter side becomes 256, whichever it is.
    tall = tf.io.encode_jpeg(np.full((400, 128, 3), 77, "uint8"))
    np.testing.assert_array_equal(
        augmentation.centre(tall), np.full((224, 224, 3), 77)
    )


def test_a_random_part_of_a_photograph():
    ramp = np.zeros((200, 300, 3), "uint8")
    ramp[:, :, 0] = np.arange(200)[:, None]
    ramp[:, :, 1] = (np.arange(300) * 255 / 299)[None]
    jpeg = tf.io.encode_jpeg(ramp, quality=100)
    areas, mirrored = [], []
    for seed in range(40):
        part = augmentation.random_part(jpeg, (seed, 0)).numpy()
        assert part.shape == (224, 224, 3)
        rows, columns = part[:, :, 0].mean(1), part[:, :, 1].mean(0)
        height = (rows[-1] - rows[0]) / 200
        width = (columns[-1] - columns[0]) / 255
        areas.append(height * abs(width))
        mirrored.append(width < 0)
        assert 3 / 4 - 0.1 < 1.5 * abs(width) / height < 4 / 3 + 0.1
    assert 0.05 < min(areas) < 0.2
    assert 0.6 < max(areas) < 0.9
    assert 10 < sum(mirrored) < 30


@pytest.mark.skipif(
    not (CIFAR / "cifar10").is_dir(), reason="needs CIFAR-10, prepared"
)
def test_cifar_is_normalized():
    data = datasets.load("cifar10", 500, data_dir=str(CIFAR), limit=5000)
    images = np.concatenate([x for x, _ in batches(data.test)])
    np.testing.assert_allclose(images.mean((0, 1, 2)), 0, atol=0.05)
    np.testing.assert_allclose(images.std((0, 1, 2)), 1, atol=0.05)

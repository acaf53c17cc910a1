"""Random changes of images, each a function of its seed.

All are stateless, so that a batch depends on seed, epoch and its number alone:
the same in every run, and the same when a run is resumed.
"""

import tensorflow as tf

#: Side of ImageNet's images as the networks see them, in pixels; and the
#: shorter side that an image is brought to before its centre is tested.
SIDE, TEST_SIDE = 224, 256


def fold(seed: tf.Tensor, number: int | tf.Tensor) -> tf.Tensor:
    """Returns a seed `[2]` for one of many uses of a seed `[2]`.

    Args:
        seed: int64 `[2]`, for stateless operations.
        number: An integer that tells the use: an epoch, a batch.
    """
    return tf.random.experimental.stateless_fold_in(
        seed, tf.cast(number, tf.int64)
    )


def crop_and_flip(
    images: tf.Tensor, seed: tf.Tensor, pad: int, flip: bool
) -> tf.Tensor:
    """Moves each image by up to `pad` pixels, and mirrors half of them.

    Args:
        images: `[B, H, W, C]`, of any dtype.
        seed: `[2]`.
        pad: Zeros on each side, out of which an image is cut in its own size.
        flip: Whether to mirror images, left to right, with probability 1/2.

    Returns:
        The same shape and dtype.
    """
    count = tf.shape(images)[0]
    height, width = images.shape[1:3]
    moves = tf.random.stateless_uniform(
        (2, count, 1), fold(seed, 0), 0, 2 * pad + 1, tf.int32
    )
    rows = moves[0] + tf.range(height)
    columns = moves[1] + tf.range(width)
    if flip:
        mirrored = tf.random.stateless_uniform(
            (count, 1), fold(seed, 1), 0, 2, tf.int32
        )
        columns = tf.where(mirrored > 0, columns[:, ::-1], columns)
    images = tf.pad(images, [[0, 0], [pad, pad], [pad, pad], [0, 0]])
    images = tf.gather(images, rows, axis=1, batch_dims=1)
    return tf.gather(images, columns, axis=2, batch_dims=1)


def random_part(jpeg: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Cuts a random part out of a photograph, as is usual for ImageNet.

    The part has 8 to 100 % of the area, and sides in a ratio of 3:4 to 4:3; it
    is brought to `SIDE` and mirrored with probability 1/2.

    Args:
        jpeg: The photograph, a string scalar.
        seed: `[2]`.

    Returns:
        float32 `[224, 224, 3]` in 0 ... 255.
    """
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.image.extract_jpeg_shape(jpeg),
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        fold(seed, 0),
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3)
    image = tf.image.resize(image, (SIDE, SIDE))
    return tf.image.stateless_random_flip_left_right(image, fold(seed, 1))


def centre(jpeg: tf.Tensor) -> tf.Tensor:
    """Brings the shorter side to `TEST_SIDE`, and cuts out the centre.

    Args:
        jpeg: A photograph, a string scalar.

    Returns:
        float32 `[224, 224, 3]` in 0 ... 255.
    """
    image = tf.image.decode_jpeg(jpeg, channels=3)
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    scale = TEST_SIDE / tf.reduce_min(shape)
    size = tf.cast(tf.round(shape * scale), tf.int32)
    image = tf.image.resize(image, size)
    return tf.image.resize_with_crop_or_pad(image, SIDE, SIDE)

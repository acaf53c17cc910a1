"""A browser without a window, for tests of what is to be looked at."""

import pathlib
import shutil
import subprocess
import tempfile

import numpy as np
import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: `apt-get install chromium`"
)


def browse(url, *arguments, milliseconds=4000):
    """Opens a page; returns what Chromium prints.

    Args:
        url: Of the page.
        *arguments: What to do with it.
        milliseconds: How long the page may take, by its own clock.
    """
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--virtual-time-budget={milliseconds}",
                *arguments,
                url,
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout


def screenshot(url, path, size=(1200, 1600), dark=False, **options):
    """Returns the page's pixels, `[H, W, 3]`, and keeps them in a PNG file."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    where = f"--screenshot={path}"
    window = f"--window-size={size[0]},{size[1]}"
    browse(url, where, window, scheme, **options)
    assert pathlib.Path(path).exists()
    return np.asarray(Image.open(path).convert("RGB"))


def colours(pixels, at_least=20):
    """The colours that many pixels have, the most frequent one first."""
    packed = pixels.astype("int64") @ [1 << 16, 1 << 8, 1]
    counts = np.bincount(packed.ravel())
    ordered = np.argsort(-counts, kind="stable")[: (counts >= at_least).sum()]
    return [(c >> 16, c >> 8 & 255, c & 255) for c in ordered.tolist()]

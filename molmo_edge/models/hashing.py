"""Hashes under which vLLM's caches know the images of a request."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def digest(images: Iterable[npt.NDArray[np.uint8]], *facts: object) -> str:
    """Hash RGB pixels, (height, width, 3) uint8 each, and what else decides the model's input.

    Pixels, so mode and palette cannot make two images collide; cryptographic, so that nobody can
    construct another image with the same hash. BLAKE2b takes 6 times as long.
    """
    from blake3 import blake3

    hashed = blake3()
    for pixels in images:
        hashed.update(np.ascontiguousarray(pixels).data)
        hashed.update(repr(pixels.shape).encode())
    hashed.update(repr(facts).encode())
    return hashed.hexdigest()


class ImageHasher:
    """Hashes for one engine: for a request that reuses nothing a number will do, at no cost."""

    def __init__(self) -> None:
        self._number = itertools.count()

    def __call__(
        self, reuse: object, images: Iterable[npt.NDArray[np.uint8]], *facts: object
    ) -> str:
        return digest(images, *facts) if reuse else f"image-{next(self._number)}"

"""Sizes of a convolution."""

from __future__ import annotations

from typing import NamedTuple


class Geometry(NamedTuple):
    """Sizes of a convolution with a square kernel.

    Attributes:
        kernel: its side, pixels.
        stride: pixels between its places.
        padding: zeros around the image.
        height: of the image.
        width: of the image.
    """

    kernel: int
    stride: int
    padding: int
    height: int
    width: int

    @property
    def places(self) -> tuple[int, int]:
        """Height and width of the output."""
        rows, columns = (size + 2 * self.padding - self.kernel for size in (self.height, self.width))
        return rows // self.stride + 1, columns // self.stride + 1

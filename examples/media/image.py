"""Measures of a picture, by the same sums twice: over whole arrays, and number by number.

The sums are integers until the last step, so both ways give the same hash, bit by bit.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LONGEST_SIDE = 1200
"""Pictures are shrunk to this many pixels before they are measured."""

SHORTEST_SIDE = 16
HASH_ROWS, HASH_COLUMNS = 8, 9
BLUR_SCALE = 256
"""The sum of the 5 x 5 binomial kernel: blurred values are this many times too large, and whole."""


class ImageMeasures(TypedDict):
    """A picture in numbers: ``hash`` stays close for pictures that look alike, ``edges`` is the mean gradient."""

    width: int
    height: int
    hash: str
    brightness: float
    edges: float


def measure(path: Path, *, accelerated: bool) -> ImageMeasures:
    """Measure the picture, by whole arrays when ``accelerated``."""
    with Image.open(path) as image:
        width, height = image.size
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        luma = image.convert("L")
    luma = luma.resize((max(luma.width, SHORTEST_SIDE), max(luma.height, SHORTEST_SIDE)))
    values = np.asarray(luma, dtype=np.int32)
    means, edges = _by_array(values) if accelerated else _by_number(values.tolist())
    return ImageMeasures(
        width=width,
        height=height,
        hash=_difference_hash(means),
        brightness=sum(map(sum, means)) / (HASH_ROWS * HASH_COLUMNS * BLUR_SCALE),
        edges=edges / BLUR_SCALE,
    )


def _by_array(luma: NDArray[np.int32]) -> tuple[list[list[float]], float]:
    blurred = _blur_columns(_blur_columns(luma).T).T
    top, middle, bottom = blurred[:-2], blurred[1:-1], blurred[2:]
    smooth, change = top + 2 * middle + bottom, bottom - top
    across = (smooth[:, 2:] - smooth[:, :-2]).astype(np.float64)
    down = (change[:, :-2] + 2 * change[:, 1:-1] + change[:, 2:]).astype(np.float64)
    edges = float(np.sqrt(across * across + down * down).mean())
    rows, columns = _cuts(blurred.shape[0], HASH_ROWS), _cuts(blurred.shape[1], HASH_COLUMNS)
    sums = np.add.reduceat(np.add.reduceat(blurred.astype(np.int64), rows[:-1], 0), columns[:-1], 1)
    areas = np.outer(np.diff(rows), np.diff(columns))
    means: list[list[float]] = (sums / areas).tolist()
    return means, edges


def _blur_columns(values: NDArray[np.int32]) -> NDArray[np.int32]:
    v = np.pad(values, ((2, 2), (0, 0)), mode="edge")
    blurred: NDArray[np.int32] = v[:-4] + 4 * v[1:-3] + 6 * v[2:-2] + 4 * v[3:-1] + v[4:]
    return blurred


def _by_number(luma: list[list[int]]) -> tuple[list[list[float]], float]:
    rows = [_blur_line(row) for row in luma]
    columns = [_blur_line(list(column)) for column in zip(*rows, strict=True)]
    blurred = [list(row) for row in zip(*columns, strict=True)]
    edges = math.fsum(map(_edges_of_row, blurred, blurred[1:], blurred[2:]))
    edges /= (len(blurred) - 2) * (len(blurred[0]) - 2)
    rows_between, columns_between = _cuts(len(blurred), HASH_ROWS), _cuts(len(blurred[0]), HASH_COLUMNS)
    means = [
        [_mean([row[left:right] for row in blurred[above:below]]) for left, right in pairwise(columns_between)]
        for above, below in pairwise(rows_between)
    ]
    return means, edges


def _blur_line(line: list[int]) -> list[int]:
    v = [line[0], line[0], *line, line[-1], line[-1]]
    return [a + 4 * b + 6 * c + 4 * d + e for a, b, c, d, e in zip(v, v[1:], v[2:], v[3:], v[4:], strict=False)]


def _edges_of_row(top: list[int], middle: list[int], bottom: list[int]) -> float:
    smooth = [a + 2 * b + c for a, b, c in zip(top, middle, bottom, strict=True)]
    change = [c - a for a, c in zip(top, bottom, strict=True)]
    across = [right - left for left, right in zip(smooth, smooth[2:], strict=False)]
    down = [left + 2 * here + right for left, here, right in zip(change, change[1:], change[2:], strict=False)]
    return math.fsum(math.sqrt(x * x + y * y) for x, y in zip(across, down, strict=True))


def _mean(box: list[list[int]]) -> float:
    return sum(map(sum, box)) / (len(box) * len(box[0]))


def _cuts(length: int, parts: int) -> list[int]:
    """Where to cut a length into almost equal parts: ``parts + 1`` places, both ends included."""
    return [length * part // parts for part in range(parts + 1)]


def _difference_hash(means: list[list[float]]) -> str:
    bits = [left < right for row in means for left, right in pairwise(row)]
    return f"{sum(bit << n for n, bit in enumerate(bits)):016x}"

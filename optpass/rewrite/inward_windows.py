"""FreeSwim's inward windows: as many neighbours for every token of a grid, and tiles of tokens that share most of them.

Along an axis of ``size`` tokens, the token at p sees the 2·radius + 1 from p − radius on; at a border the window is
shifted inward and stays as wide. Both axes are independent of each other, and every frame has the same windows.

Source: FreeSwim, arXiv 2511.14712, in the released form. Tiles are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Tokens in tiles, with all that they see: numbers of ``queries`` [tiles, tile] and ``keys`` [tiles, reach], and
    ``seen`` [tiles, tile, reach], which of these keys are in a query's window. Tiles overlap where they do not fit."""

    queries: Tensor
    keys: Tensor
    seen: Tensor


def along(size: int, tile: int, radius: int) -> Tiles:
    """Of one axis, in tiles of at most ``tile`` tokens."""
    tile, reach, width = min(tile, size), min(size, tile + 2 * radius), min(size, 2 * radius + 1)
    first = torch.tensor([*range(0, size - tile, tile), size - tile])
    queries = first[:, None] + torch.arange(tile)
    keys = (first - radius).clamp(0, size - reach)[:, None] + torch.arange(reach)
    begin = (queries - radius).clamp(0, size - width)[:, :, None]
    seen = (keys[:, None] >= begin) & (keys[:, None] < begin + width)
    return Tiles(queries, keys, seen)


def over(sizes: tuple[int, int], tile: tuple[int, int], radius: tuple[int, int]) -> Tiles:
    """Of a grid of rows and columns, numbered row by row."""
    rows, columns = (along(*each) for each in zip(sizes, tile, radius, strict=True))
    count = len(rows.queries) * len(columns.queries)

    def numbers(one: Tensor, other: Tensor) -> Tensor:
        return (one[:, None, :, None] * sizes[1] + other[None, :, None, :]).reshape(count, -1)

    queries, keys = numbers(rows.queries, columns.queries), numbers(rows.keys, columns.keys)
    both = rows.seen[:, None, :, None, :, None] & columns.seen[None, :, None, :, None, :]
    return Tiles(queries, keys, both.reshape(count, queries.shape[1], keys.shape[1]))


def neighbours(sizes: tuple[int, int], radius: tuple[int, int]) -> Tensor:
    """Which tokens see which, [tokens, tokens]."""
    return over(sizes, sizes, radius).seen[0]


def in_frames(numbers: Tensor, frames: int, size: int) -> Tensor:
    """``numbers`` [tiles, n] of tokens of a frame of ``size``, in all frames: [tiles, frames · n]."""
    offsets = torch.arange(frames) * size
    return (numbers[:, None] + offsets[:, None]).flatten(1)

"""All inputs of a step that come from the CPU as one array, so that one copy sends them.

Columns are the ``B`` rows of a batch. Rows are ``W`` page ids, the count of pages, both tokens' positions, and the
action: its index, or two float32 in each int64.
"""
from typing import Optional, Tuple

import numpy as np
import torch

from ..cache.pages import SCRATCH_PAGE
from .weights import Geometry

LEAST_PAGES = 16
"""Pages of the shortest window. Longer ones double, so that few CUDA graphs are captured while contexts grow."""

Unpacked = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def pack(geometry: Geometry, rows: Tuple[np.ndarray, np.ndarray], pages: np.ndarray,
         positions: Tuple[np.ndarray, np.ndarray], action: Optional[np.ndarray], longest: int) -> np.ndarray:
    """Pack contexts (tables ``[B, R]`` and counts ``[B]``, ``longest`` at the most), the page that each row writes
    ``[B]``, rotary positions of both tokens, and actions ``[B]`` or ``[B, A]``, or None if these are on the device."""
    tables, counts = rows
    width = pages_of_window(geometry, longest)
    numbers = np.zeros((width + 3 + geometry.action_rows, len(counts)), dtype=np.int64)
    numbers[:width - 1], numbers[width - 1], numbers[width] = tables.T[:width - 1], pages, counts
    if geometry.rotary:
        repeats = geometry.rotary_positions
        numbers[width + 1], numbers[width + 2] = positions[0] % repeats, positions[1] % repeats
    else:
        numbers[width + 1], numbers[width + 2] = np.maximum(2 * counts - 1, 0), 2 * counts
    if action is None:
        return numbers
    if not geometry.continuous:
        numbers[width + 3] = np.asarray(action).reshape(-1)
    else:
        padded = np.zeros((len(counts), 2 * geometry.action_rows), dtype=np.float32)
        padded[:, :geometry.action_size] = np.asarray(action).reshape(len(counts), -1)
        numbers[width + 3:] = padded.view(np.int64).T
    return numbers


def unpack(geometry: Geometry, numbers: torch.Tensor) -> Unpacked:
    """Tables ``[B, W]``, counts ``[B]``, positions ``[2, B]`` and actions of what :func:`pack` made."""
    width = len(numbers) - 3 - geometry.action_rows
    action = numbers[width + 3]
    if geometry.continuous:
        pairs = numbers[width + 3:].T.clone(memory_format=torch.contiguous_format)
        action = pairs.view(torch.float32)[:, :geometry.action_size]
    return numbers[:width].T, numbers[width], numbers[width + 1:width + 3], action


def filler(geometry: Geometry, count: int) -> np.ndarray:
    """A column ``[N, 1]`` of packed numbers for rows that only pad a batch, and write to the scratch page."""
    column = np.zeros((count, 1), dtype=np.int64)
    width = count - 3 - geometry.action_rows
    column[width - 1], column[width] = SCRATCH_PAGE, 1
    return column


def pages_of_window(geometry: Geometry, longest: int) -> int:
    """The width of a window for contexts of at most ``longest`` pages, with the page that the step writes."""
    pages = LEAST_PAGES
    while pages <= longest:
        pages *= 2
    return min(pages, geometry.window_pages)

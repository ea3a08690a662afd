"""Timesteps of a batch's ``B`` rows, from the ``start_pos`` that LightZero passes, and rotary positions by them."""
from typing import Any, Sequence, Tuple

import numpy as np

Positions = Tuple[np.ndarray, np.ndarray]
"""Of an action and an observation, ``[B]`` each."""

NODE_OFFSETS, REANALYSIS_OFFSETS = (1, 2), (3, 3)
"""Positions of a node's action and observation, less twice its timestep. In LightZero's reanalysis both have the
action's, one step later."""


def timesteps_of(start_pos: Any, rows: int) -> np.ndarray:
    """LightZero's ``start_pos``, a number for all or one for each row, as ``[B]``."""
    if np.ndim(start_pos) == 0:
        return np.full(rows, int(start_pos), dtype=np.int64)
    return np.asarray(start_pos[:rows], dtype=np.int64).reshape(rows, -1)[:, 0]


def reanalysis_timesteps_of(start_pos: Any, rows: int) -> np.ndarray:
    """Timesteps ``[batch, unroll]``, with the 0 that LightZero appends to each sequence, flattened to ``[B]``; or
    ``[B]`` already."""
    if np.ndim(start_pos) > 0 and np.size(start_pos) != rows:
        start_pos = np.pad(start_pos, ((0, 0), (0, 1)))
    return timesteps_of(start_pos if np.ndim(start_pos) == 0 else np.ravel(start_pos), rows)


def observed_at(timesteps: Any) -> Any:
    """Positions of roots' observations."""
    return 2 * timesteps


def root_positions(timesteps: np.ndarray, counts: np.ndarray) -> Positions:
    """Positions of the actions that led to roots, and of their observations. Where an episode begins (a count of 0)
    there is no action, nor a position below 0."""
    return observed_at(timesteps) - (counts > 0), observed_at(timesteps)


def node_positions(timesteps: np.ndarray, depths: Sequence[int], in_reanalysis: bool = False) -> Positions:
    """Positions of both tokens of nodes at ``depths [B]`` below roots at ``timesteps [B]``, 0 without depths."""
    offsets = REANALYSIS_OFFSETS if in_reanalysis else NODE_OFFSETS
    after = timesteps + (np.asarray(depths, dtype=np.int64) if len(depths) else 0)
    return 2 * after + offsets[0], 2 * after + offsets[1]

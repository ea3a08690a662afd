"""The arrays of a search's trees and the rules by which they grow, on a CPU and on a GPU. Imports neither numba nor
torch.

Shapes: ``B`` rows (trees); ``N`` nodes, of which 0 is the root and ``s + 1`` is added by simulation ``s``; ``S`` slots
for a node's children: one for each action, or, where trees are sampled, for each action drawn; ``A`` numbers of a drawn
action (0 unless sampled); ``R`` pages of a context; ``P`` policy logits.
"""
from typing import Any, Dict, NamedTuple, Sequence, Tuple

import numpy as np


class Tree(NamedTuple):
    """The trees of a search, as numpy arrays or as tensors on a GPU. The next search overwrites them."""
    visits: Any  # [B, N]
    value_sum: Any  # [B, N]
    reward: Any  # [B, N], of the step to the node
    prior: Any  # [B, N, S]
    child: Any  # [B, N, S], node in each slot; -1: none yet
    order: Any  # [B, N, S], slots in the order in which scores are compared, then -1; equal draws share a slot
    draws: Any  # [B, N, S, A], actions in the order of ``order``
    low: Any  # [B], least quality so far
    high: Any  # [B], greatest quality so far
    path: Any  # [B, N], nodes from the root to the newest one
    depth: Any  # [B], steps of that path
    action: Any  # [B], its last step: a slot, or where trees are sampled an index into ``draws``
    tables: Any  # [B, N, R], page ids of each node's context
    counts: Any  # [B, N], pages of it
    scores: Any = None  # [B, S], of the last node that was scored; on a CPU


class Rules(NamedTuple):
    """The configuration of a LightZero search."""
    base: np.float32
    init: np.float32
    discount: np.float32
    delta: np.float32  # the least width of a range of values
    two_players: bool
    sampled: bool = False
    continuous: bool = False
    draws_ties: bool = True  # draw among equal scores; else take the first
    index_for_depth: bool = False  # a node's index stands for its depth


# LightZero's numbers, which both devices calculate with.
FAR = 1e6
"""LightZero's stand-in for infinity: all scores are closer to 0."""
NEAR = 1e-6
"""Scores within this distance of the best are ties; it is also added to a sum of weights that may be 0."""
MOST_DRAWN = 4.0
"""Drawn actions are clipped to plus or minus this number before tanh."""
DECIMALS = 1e6
"""Actions that are equal after rounding to six decimals are one action: LightZero compares printed actions."""

TIE, ACTION = 0, 1
"""Purposes of random draws: one of several children with equal scores, and the actions of a node."""

FLOATS = 'value_sum', 'reward', 'prior', 'draws', 'low', 'high'
"""Fields in float32; all others are int32."""


def tree_shapes(rows: int, simulations: int, slots: int, context_pages: int,
                action_size: int = 0) -> Dict[str, Tuple[int, ...]]:
    """The shape of each array but ``scores``, for searches of one size."""
    row, node, slot = (rows, ), (rows, simulations + 1), (rows, simulations + 1, slots)
    return dict(
        visits=node, value_sum=node, reward=node, prior=slot, child=slot, order=slot, draws=slot + (action_size, ),
        low=row, high=row, path=node, depth=row, action=row, tables=node + (context_pages, ), counts=node
    )


def padded(lists: Sequence[Sequence[Any]], width: int, filler: Any, dtype: Any) -> np.ndarray:
    """Lists of numbers as one array ``[B, width]``."""
    array = np.full((len(lists), width), filler, dtype)
    lengths = {len(numbers) for numbers in lists}
    if len(lengths) == 1:  # as almost always
        array[:, :lengths.pop()] = lists
        return array
    for row, numbers in enumerate(lists):
        array[row, :len(numbers)] = numbers
    return array

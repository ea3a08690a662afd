"""The inputs of compiled functions: a model as tables of sizes and addresses, and the rows of a batch.

Weights are read at their addresses, so a change in place is seen at once. Whoever holds a network compares addresses,
since a tensor may move.
"""
from typing import NamedTuple

import numpy as np

LINEAR, GELU, RELU, TANH, SIM_NORM, EXPONENTIAL, CLAMPED_EXPONENTIAL, LAYER_NORM, STANDARDIZE, SCALE = range(10)
"""Kinds of operations. The last two are a BatchNorm."""

KIND, INPUTS, OUTPUTS, WEIGHT, BIAS = range(5)
"""Columns of an operation. As WEIGHT, a SimNorm has the size of its groups; as WEIGHT and BIAS, STANDARDIZE has means
and variances."""

(NORM1_WEIGHT, NORM1_BIAS, QUERY_WEIGHT, QUERY_BIAS, KEY_WEIGHT, KEY_BIAS, VALUE_WEIGHT, VALUE_BIAS, PROJ_WEIGHT,
 PROJ_BIAS, NORM2_WEIGHT, NORM2_BIAS, WIDEN_WEIGHT, WIDEN_BIAS, NARROW_WEIGHT, NARROW_BIAS) = range(16)
"""Columns of a transformer block."""


WIDTH, ROWS = 8, 64
"""Rows side by side in a vector, and rows that are computed together, at the most: their activations fit into a core's
own cache, and each weight is read once for all of them."""


class Network(NamedTuple):
    embed: int
    heads: int
    mlp_width: int
    widest: int  # the largest input or output of an operation
    policy: int  # numbers that the policy head predicts
    rotary: int  # positions that there are factors for; 0 with learned ones
    discrete: bool
    eps: float
    position_table: int  # address of learned embeddings [positions, E], or of rotary factors [positions, D / 2, 2]
    actions: int  # address of the embeddings of discrete actions [A, E]
    norm_weight: int
    norm_bias: int
    blocks: np.ndarray  # [L, 16] addresses
    continuous: np.ndarray  # from here on programs, lists of operations [N, 5]; this one embeds continuous actions
    rewards: np.ndarray
    observations: np.ndarray
    value: np.ndarray
    trunk: np.ndarray  # the layers that both parts of the policy head share
    first: np.ndarray  # from there to the logits, or to the means of continuous actions
    second: np.ndarray  # from there to their deviations; empty for discrete actions
    encoder: np.ndarray  # encodes vectors; empty where torch encodes the observations


class PagedNetwork(NamedTuple):
    """A model, and the pages that it steps over."""
    network: Network
    shift: np.ndarray  # as :class:`.weights.Weights` has it; with rotary positions zeros [1, L, 2, E]
    slab: np.ndarray  # as :class:`.slab.Slab` has it


_NOTHING = np.zeros((0, 0), np.float32)


class Batch(NamedTuple):
    """Inputs and outputs of a step, row by row: C-contiguous arrays, float32 unless stated. ``[0, 0]``: not used."""
    tables: np.ndarray  # [B, R] int64, of the contexts
    counts: np.ndarray  # [B] int64
    pages: np.ndarray  # [B] int64, what is written
    positions: np.ndarray  # [2, B] int64, rotary positions of the two tokens
    actions: np.ndarray = _NOTHING  # [B, 1] indices, or [B, A]
    observations: np.ndarray = _NOTHING  # [B, O], to be encoded
    latent: np.ndarray = _NOTHING  # [B, E]
    sequence: np.ndarray = _NOTHING  # [B, E], what heads predict from
    reward: np.ndarray = _NOTHING  # [B]
    value: np.ndarray = _NOTHING  # [B], or logits [B, S] of a root
    policy: np.ndarray = _NOTHING  # [B, P] logits

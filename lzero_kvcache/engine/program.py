"""A model as tables of sizes and of addresses, for compiled functions.

Weights are read where they lie: what changes in place is seen at once. Storage that moves is not; whoever holds a
network compares the addresses of its weights.
"""
from typing import NamedTuple

import numpy as np

LINEAR, GELU, RELU, TANH, SIM_NORM, EXPONENTIAL, CLAMPED_EXPONENTIAL, LAYER_NORM, STANDARDIZE, SCALE = range(10)
"""Kinds of operations. The last two are a BatchNorm."""

KIND, INPUTS, OUTPUTS, WEIGHT, BIAS = range(5)
"""Columns of an operation. A SimNorm has the size of its groups in place of a weight; what standardizes, means and
variances."""

(NORM1_WEIGHT, NORM1_BIAS, QUERY_WEIGHT, QUERY_BIAS, KEY_WEIGHT, KEY_BIAS, VALUE_WEIGHT, VALUE_BIAS, PROJ_WEIGHT,
 PROJ_BIAS, NORM2_WEIGHT, NORM2_BIAS, WIDEN_WEIGHT, WIDEN_BIAS, NARROW_WEIGHT, NARROW_BIAS) = range(16)
"""Columns of a transformer block."""


class Network(NamedTuple):
    embed: int
    heads: int
    inner: int  # width of the MLPs
    widest: int  # of all inputs and outputs of the programs
    policy: int  # numbers that the policy head predicts
    rotary: int  # positions that there are factors for; 0 with learned ones
    discrete: bool
    eps: float
    places: int  # address of learned embeddings [positions, E], or of rotary factors [positions, D / 2, 2]
    actions: int  # address of the embeddings of discrete actions [A, E]
    norm_weight: int
    norm_bias: int
    blocks: np.ndarray  # [L, 16] addresses
    continuous: np.ndarray  # from here on programs [N, 5]: the embedding of continuous actions
    rewards: np.ndarray
    observations: np.ndarray
    value: np.ndarray
    trunk: np.ndarray  # what both parts of the policy head begin with
    first: np.ndarray  # logits, or mu
    second: np.ndarray  # sigma, or nothing
    encoder: np.ndarray  # of vectors; or nothing, where observations are encoded by torch

"""Kernels that draw the actions of a node in sampled trees: the same as in :mod:`.tree`, from the same random numbers.
Importing it imports Triton. Each program has a row; shapes are those of :mod:`.tree_arrays`.
"""
import triton
import triton.language as tl

from ..engine.kernel_launch import wait
from .tree_arrays import ACTION, DECIMALS, MOST_DRAWN, NEAR
from .tree_kernels import mended

UNIT = tl.constexpr(2.0 ** -32)
CIRCLE = tl.constexpr(6.283185307179586)
_NEAR, _MOST, _DECIMALS = tl.constexpr(NEAR), tl.constexpr(MOST_DRAWN), tl.constexpr(DECIMALS)
_ACTION = tl.constexpr(ACTION)
WHOLE = tl.constexpr(2.0 ** 52)  # adding it to a smaller float64 rounds that to an integer, half to even


@triton.jit
def _words(key, row, node, index):
    same = index * 0
    first, second, _c, _d = tl.philox(key, row + same, node + same, index, same + _ACTION)
    return first.to(tl.float64), second.to(tl.float64)


@triton.jit
def _is_negative(number):
    return number.to(tl.int32, bitcast=True) < 0  # as -0.0 is


@triton.jit
def _tanh(number):
    power = tl.exp(-2.0 * tl.abs(number.to(tl.float64)))
    size = ((1.0 - power) / (1.0 + power)).to(tl.float32)
    return tl.where(_is_negative(number), -size, size)


@triton.jit
def _decimals(number):
    """An integer that is equal for numbers which C prints with the same six decimals."""
    whole = (tl.abs(number.to(tl.float64)) * _DECIMALS + WHOLE) - WHOLE
    return 2 * whole.to(tl.int32) + _is_negative(number).to(tl.int32)


@triton.jit
def draw_continuous(draws, order, prior, key_at, simulation_at, policy, policy_step, nodes, slots, action_size,
                    SLOTS: tl.constexpr, POLICY: tl.constexpr, OVERLAP: tl.constexpr):
    """Draw the newest node's actions: tanh of normal draws, by means and then deviations ``[B, 2A]``. Equal draws share
    a slot, and all slots have the same prior."""
    wait(OVERLAP)
    row = tl.program_id(0)
    node, key = tl.load(simulation_at + row), tl.load(key_at)
    index = tl.arange(0, SLOTS)
    there = index < slots
    at = (row * nodes + node) * slots + index
    same = there[:, None] & there[None, :]
    for part in range(action_size):
        first, second = _words(key, row, node, index * action_size + part)
        radius = tl.sqrt(-2.0 * tl.log((first + 1.0) * UNIT))
        normal = (radius * tl.cos(second * CIRCLE * UNIT)).to(tl.float32)
        mean = mended(tl.load(policy + row * policy_step + part))
        drawn = normal * mended(tl.load(policy + row * policy_step + action_size + part)) + mean
        drawn = tl.where(drawn > _MOST, _MOST, drawn)
        drawn = _tanh(tl.where(drawn < -_MOST, -_MOST, drawn))
        tl.store(draws + at * action_size + part, drawn, mask=there)
        decimals = _decimals(drawn)
        same = same & (decimals[:, None] == decimals[None, :])
    shared = tl.min(tl.where(same, index[None, :], SLOTS), 1)
    children = tl.sum((there & (shared == index)).to(tl.float32), 0)
    tl.store(order + at, shared, mask=there)
    tl.store(prior + at, tl.div_rn(children * 0 + 1, children) + index * 0., mask=there)


@triton.jit
def draw_discrete(draws, order, prior, key_at, simulation_at, policy, policy_step, nodes, slots, actions,
                  SLOTS: tl.constexpr, POLICY: tl.constexpr, OVERLAP: tl.constexpr):
    """Draw the newest node's actions without replacement, by logits ``[B, P]``: those with the largest u ** (1 / p)."""
    wait(OVERLAP)
    row = tl.program_id(0)
    node, key = tl.load(simulation_at + row), tl.load(key_at)
    index, action = tl.arange(0, SLOTS), tl.arange(0, POLICY)
    there, known = index < slots, action < actions
    logits = mended(tl.load(policy + row * policy_step + action, mask=known, other=0.))
    powers = tl.where(known, tl.exp(logits.to(tl.float64)).to(tl.float32), 0.)
    share = (powers.to(tl.float64) / (tl.sum(powers, 0).to(tl.float64) + _NEAR)).to(tl.float32)
    first, second = _words(key, row, node, action)
    rank = tl.exp(tl.log((first + second * UNIT) * UNIT) / tl.where(known, share, 1.).to(tl.float64))
    rank = tl.where(known, tl.where(rank >= 0, rank, 0.), -2.)  # of logits too large for float32 there is no rank
    at = (row * nodes + node) * slots
    for drawn in range(slots):
        best = tl.min(tl.where(rank == tl.max(rank, 0), action, POLICY), 0)
        tl.store(draws + at + drawn, best.to(tl.float32))
        rank = tl.where(action == best, -1., rank)
    tl.store(order + at + index, index, mask=there)
    many = (index * 0 + slots).to(tl.float32)
    tl.store(prior + at + index, tl.div_rn(many * 0 + 1, many), mask=there)

"""Reward and value as numbers, and policy logits, in one Triton kernel. Importing it imports Triton."""
from typing import Any

import torch
import triton
import triton.language as tl

from .kernel_launch import launch, wait


@triton.jit
def _number(logits, size, SIZE: tl.constexpr):
    """The mean of a support, then the inverse value rescaling: ``weights.to_scalar``."""
    index = tl.arange(0, SIZE)
    numbers = tl.load(logits + index, mask=index < size, other=-float('inf'))
    powers = tl.exp(numbers - tl.max(numbers, 0))
    mean = (tl.sum(powers * (index - (size - 1) // 2), 0) / tl.sum(powers, 0)).to(tl.float64)
    root = (tl.sqrt(tl.abs(mean) * 0.004 + 1.004004) - 1) * 500
    number = tl.where(mean < 0, 1 - root * root, root * root - 1)
    return tl.where(mean == 0, 0., number).to(tl.float32)


@triton.jit
def _for_search(rewards, values, policy, out, support, actions, SUPPORT: tl.constexpr, ACTIONS: tl.constexpr,
                OVERLAP: tl.constexpr):
    wait(OVERLAP)
    row = tl.program_id(0)
    at, action = out + row * (2 + actions), tl.arange(0, ACTIONS)
    tl.store(at, _number(rewards + row * support, support, SUPPORT))
    tl.store(at + 1, _number(values + row * support, support, SUPPORT))
    logits = tl.load(policy + row * actions + action, mask=action < actions, other=0.)
    tl.store(at + 2 + action, logits, mask=action < actions)


def for_search(output: Any, out: torch.Tensor) -> torch.Tensor:
    """Reward and value as numbers, and policy logits, into ``out [B, 2 + P]``; see :meth:`.step.Engine.for_search`."""
    parts = [part.contiguous() for part in (output.logits_rewards, output.logits_value, output.logits_policy)]
    support, actions = parts[0].shape[-1], parts[2].shape[-1]
    sizes = triton.next_power_of_2(support), triton.next_power_of_2(actions)
    launch(_for_search, (len(out), ), *parts, out, support, actions, *sizes, num_warps=4)
    return out

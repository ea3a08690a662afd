"""Products with a model's weights on a GPU, and what follows on them: the bias, a residual, a norm and GELU.

A product of few rows is as long as the reading of its weights: its inner dimension is split over programs, and the
kernel that follows adds their parts. ``B`` rows, ``K`` inputs, ``N`` outputs, ``S`` parts. Importing it imports Triton.
"""
import dataclasses
from typing import Any, NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl

from .overlap import launch, wait
from .weights import Chain, Function, Linear, Norm, Weights, gelu


class Tiling(NamedTuple):
    """How a product is divided among programs."""
    rows: int
    outputs: int
    inputs: int
    parts: int
    warps: int
    stages: int


def tiling_of(rows: int, outputs: int) -> Tiling:
    """The fastest of those that were tried on an H100 (docs/results.md)."""
    if rows <= 16:
        return Tiling(16, 32, 64, 8, 4, 4)
    if rows <= 128:
        return Tiling(64, 64, 32, 8, 4, 3)
    return Tiling(64, 64, 32, 4, 4, 3) if outputs > 1024 else Tiling(128, 64, 64, 4, 8, 3)


PRECISIONS = {'float32': 'tf32x3', 'tf32': 'tf32', 'bfloat16': 'tf32'}
"""How tensor cores multiply float32, for each of ``kv_cache_cfg.matmul``: the first is as exact as float32; for
bfloat16 it makes no difference."""


@triton.jit
def _multiply(x, weight, parts, rows, outputs, inputs,
              ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr,
              PRECISION: tl.constexpr, OVERLAP: tl.constexpr):
    """``x [B, K]`` times ``weight [N, K]``, transposed: a part of the sum for each program of the last axis."""
    wait(OVERLAP)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    share = tl.cdiv(inputs, PARTS * INPUTS) * INPUTS
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(part * share, min((part + 1) * share, inputs), INPUTS):
        index = begin + tl.arange(0, INPUTS)
        left_mask = (row < rows)[:, None] & (index < inputs)[None, :]
        right_mask = (output < outputs)[None, :] & (index < inputs)[:, None]
        left = tl.load(x + row[:, None] * inputs + index[None, :], mask=left_mask, other=0.0)
        right = tl.load(weight + output[None, :] * inputs + index[:, None], mask=right_mask, other=0.0)
        total = tl.dot(left.to(right.dtype), right, total, input_precision=PRECISION)
    place = (part * rows + row)[:, None] * outputs + output[None, :]
    tl.store(parts + place, total, mask=(row < rows)[:, None] & (output < outputs)[None, :])


@triton.jit
def _finish(parts, bias, residual, chosen, norm_weight, norm_bias, out, normed, rows, outputs, eps,
            PARTS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, CHOSEN: tl.constexpr, NORM: tl.constexpr,
            GELU: tl.constexpr, LANES: tl.constexpr, OVERLAP: tl.constexpr):
    """Add the parts of a row, its bias and a row of ``residual``, its own or the one that is ``chosen [B]``, which is
    ``out``; then its norm, for which a program has the whole row, and GELU."""
    wait(OVERLAP)
    row = tl.program_id(0)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    there = lane < outputs
    total = tl.zeros((LANES, ), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * rows + row) * outputs + lane, mask=there, other=0.0)
    if BIAS:
        total += tl.load(bias + lane, mask=there, other=0.0)
    if RESIDUAL:
        other = tl.load(chosen + row) if CHOSEN else row
        total += tl.load(residual + other * outputs + lane, mask=there, other=0.0)
        tl.store(out + row * outputs + lane, total, mask=there)
    if NORM:
        mean = tl.sum(tl.where(there, total, 0.0), 0) / outputs
        from_mean = tl.where(there, total - mean, 0.0)
        scale = tl.rsqrt(tl.sum(from_mean * from_mean, 0) / outputs + eps)
        weight = tl.load(norm_weight + lane, mask=there, other=0.0)
        total = from_mean * scale * weight + tl.load(norm_bias + lane, mask=there, other=0.0)
    if GELU:  # the approximation by tanh, as in PyTorch
        twice = 1.5957691216057308 * (total + 0.044715 * total * total * total)
        total = total / (1 + tl.exp(-twice))
    tl.store(normed + row * outputs + lane, total, mask=there)


def computed_in(weights: Weights, matmul: str) -> Weights:
    """The same weights, whose products are computed in 'tf32' or in 'bfloat16'; for the latter matrices are copied."""

    def changed(function: Function) -> Function:
        if isinstance(function, Chain):
            return Chain(tuple(map(changed, function.functions)))
        if not isinstance(function, Linear):
            return function
        weight = function.weight.bfloat16() if matmul == 'bfloat16' else function.weight
        return dataclasses.replace(function, weight=weight, matmul=matmul)

    layers = [
        layer._replace(qkv=changed(layer.qkv), proj=changed(layer.proj), mlp=changed(layer.mlp))
        for layer in weights.layers
    ]
    return weights._replace(
        layers=layers, rewards=changed(weights.rewards), observations=changed(weights.observations),
        policy=changed(weights.policy), value=changed(weights.value)
    )


def apply(function: Function, x: torch.Tensor) -> torch.Tensor:
    """A function of the model's weights of ``x [B, K]``."""
    functions = list(function.functions if isinstance(function, Chain) else (function, ))
    while functions:
        first, norm = functions.pop(0), None
        if isinstance(first, Linear) and functions and _is_plain(functions[0]):
            norm = functions.pop(0)
        then_gelu = functions[:1] == [gelu]
        if isinstance(first, Linear):
            x = _product(x, first, None, norm, then_gelu)[1]
        elif _is_plain(first):
            x = _finished(x[None].contiguous(), None, None, None, first, then_gelu)[1]
        else:
            x, then_gelu = first(x), False
        del functions[:then_gelu]
    return x


def residual_norm(function: Function, x: torch.Tensor, residual: torch.Tensor,
                  norm: Function) -> Tuple[torch.Tensor, torch.Tensor]:
    """``residual [B, N]`` plus a function of ``x [B, K]``, and the norm of that."""
    *before, last = function.functions if isinstance(function, Chain) else (function, )
    x = apply(Chain(tuple(before)), x)
    if isinstance(last, Linear) and _is_plain(norm):
        return _product(x, last, residual, norm)
    total = residual + apply(last, x)
    return total, norm(total)


def place_norm(x: torch.Tensor, places: torch.Tensor, positions: torch.Tensor,
               norm: Function) -> Tuple[torch.Tensor, torch.Tensor]:
    """``x [B, N]`` plus the rows of ``places`` at positions ``[B]``, and the norm of that."""
    if _is_plain(norm):
        return _finished(x[None].contiguous(), None, places, positions, norm)
    total = x + places[positions]
    return total, norm(total)


def _is_plain(norm: Function) -> bool:
    return isinstance(norm, Norm) and norm.weight is not None and norm.bias is not None


def _product(x: torch.Tensor, layer: Linear, residual: Optional[torch.Tensor], norm: Any,
             then_gelu: bool = False) -> Tuple[torch.Tensor, torch.Tensor]:
    (rows, inputs), outputs = x.shape, len(layer.weight)
    tiling = tiling_of(rows, outputs)
    parts = x.new_empty(tiling.parts, rows, outputs)
    grid = triton.cdiv(outputs, tiling.outputs), triton.cdiv(rows, tiling.rows), tiling.parts
    launch(
        _multiply, grid, x, layer.weight, parts, rows, outputs, inputs, ROWS=tiling.rows, OUTPUTS=tiling.outputs,
        INPUTS=tiling.inputs, PARTS=tiling.parts, PRECISION=PRECISIONS[layer.matmul], num_warps=tiling.warps,
        num_stages=tiling.stages
    )
    return _finished(parts, layer.bias, residual, None, norm, then_gelu)


def _finished(parts: torch.Tensor, bias: Optional[torch.Tensor], residual: Optional[torch.Tensor],
              chosen: Optional[torch.Tensor], norm: Any, then_gelu: bool = False) -> Tuple[torch.Tensor, torch.Tensor]:
    """The sum with the residual, if there is one, and what follows on it."""
    count, rows, outputs = parts.shape
    normed = parts.new_empty(rows, outputs)
    out = normed if residual is None else torch.empty_like(normed)
    lanes = triton.next_power_of_2(outputs) if norm is not None else min(1024, triton.next_power_of_2(outputs))
    weight, shift, eps = (out, out, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    launch(
        _finish, (rows, triton.cdiv(outputs, lanes)), parts, out if bias is None else bias,
        out if residual is None else residual, out if chosen is None else chosen, weight, shift, out, normed, rows,
        outputs, eps, PARTS=count, BIAS=bias is not None, RESIDUAL=residual is not None,
        CHOSEN=chosen is not None, NORM=norm is not None, GELU=then_gelu, LANES=lanes,
        num_warps=4 if lanes <= 1024 else 8
    )
    return out, normed

"""Linear layers on a GPU in Triton: products with weights (split-K), then bias, residual, norm and GELU in one kernel.

A product of few rows takes as long as reading its weights. So its inner dimension is split over programs, and the next
kernel adds their parts. ``B`` rows, ``K`` inputs, ``N`` outputs, ``S`` parts. Importing it imports Triton.
"""
import dataclasses
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl

from .kernel_launch import launch, wait
from .weights import Chain, Function, Linear, Norm, Weights, gelu


class Tiling(NamedTuple):
    """How a product is split over programs: block sizes, and parts of the inner dimension."""
    rows: int
    outputs: int
    inputs: int
    parts: int
    warps: int
    stages: int


def tiling_of(rows: int, outputs: int, inputs: int, matmul: str) -> Tiling:
    """One of the fastest that were tried in searches on an H200 (docs/results.md)."""
    of_rows, of_outputs = 16 if rows <= 16 else 64, 32 if rows <= 128 else 64
    if matmul != 'float32':
        of_inputs, stages, programs = 64, 4, 264
    elif rows <= 16:
        of_inputs, stages, programs = 64, 3, 264
    else:
        of_inputs, stages, programs = 32, 4 if rows <= 128 else 3, 400
    blocks = triton.cdiv(rows, of_rows) * triton.cdiv(outputs, of_outputs)
    parts = max(1, min(programs // blocks, inputs // of_inputs, 16))
    share = triton.cdiv(inputs, parts * of_inputs) * of_inputs
    return Tiling(of_rows, of_outputs, of_inputs, triton.cdiv(inputs, share), 4, stages)


PRECISIONS = {'float32': 'halves', 'tf32': 'tf32', 'bfloat16': 'tf32'}
"""How products are computed for each value of ``kv_cache_cfg.matmul``: from halves of float32, or with Triton's
``input_precision``, which bfloat16 ignores."""


@triton.jit
def _halves(x, SCALE: tl.constexpr):
    """``x`` times a power of two, as the sum of two float16: to 22 bits or to 2^-25, whichever is coarser."""
    scaled = x * SCALE
    high = scaled.to(tl.float16)
    return high, (scaled - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _sum(x, weight, row, output, rows, outputs, first, last, inputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
         INPUTS: tl.constexpr, PRECISION: tl.constexpr):
    """A block of the product over inputs ``first`` to ``last``. Tensor cores add with fewer bits than float32 has, so
    that from halves they add the products of few inputs only."""
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(first, last, INPUTS):
        index = begin + tl.arange(0, INPUTS)
        left_mask = (row < rows)[:, None] & (index < inputs)[None, :]
        right_mask = (output < outputs)[None, :] & (index < inputs)[:, None]
        left = tl.load(x + row[:, None] * inputs + index[None, :], mask=left_mask, other=0.0)
        right = tl.load(weight + output[None, :] * inputs + index[:, None], mask=right_mask, other=0.0)
        if PRECISION == 'halves':
            left, left_low = _halves(left, 64)
            right, right_low = _halves(right, 4096)
            total += tl.dot(left, right, tl.dot(left, right_low, tl.dot(left_low, right)))
        else:
            total = tl.dot(left.to(right.dtype), right, total, input_precision=PRECISION)
    if PRECISION == 'halves':
        total *= 1 / (64 * 4096)
    return total


@triton.jit
def _multiply(x, x2, weight, weight2, outputs, outputs2, parts, start2, step, rows, inputs,
              ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr,
              PRECISION: tl.constexpr, BOTH: tl.constexpr, OVERLAP: tl.constexpr):
    """``x [B, K]`` times ``weight [N, K]``, transposed; each program of the last axis writes one part of the sum, to
    rows of ``step`` numbers. With ``BOTH``, a second product's columns begin at ``start2``."""
    wait(OVERLAP)
    block, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    place = (part * rows + row) * step
    if BOTH:
        blocks = tl.cdiv(outputs, OUTPUTS)
        second = block >= blocks
        x, weight = tl.where(second, x2, x), tl.where(second, weight2, weight)
        place += tl.where(second, start2, 0)
        block -= tl.where(second, blocks, 0)
        outputs = tl.where(second, outputs2, outputs)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    share = tl.cdiv(inputs, PARTS * INPUTS) * INPUTS
    first, last = part * share, min((part + 1) * share, inputs)
    total = _sum(x, weight, row, output, rows, outputs, first, last, inputs, ROWS, OUTPUTS, INPUTS, PRECISION)
    if PRECISION == 'halves':
        if tl.max((total - total != 0).to(tl.int32)) > 0:  # numbers beyond the range of float16
            total = _sum(x, weight, row, output, rows, outputs, first, last, inputs, ROWS, OUTPUTS, INPUTS, 'tf32x3')
    tl.store(parts + place[:, None] + output[None, :], total, mask=(row < rows)[:, None] & (output < outputs)[None, :])


@triton.jit
def _finish(parts, bias, bias2, residual, chosen, norm_weight, norm_weight2, norm_bias, norm_bias2, out, normed,
            normed2, outputs, outputs2, start2, step, rows, eps, PARTS: tl.constexpr, BIAS: tl.constexpr,
            RESIDUAL: tl.constexpr, CHOSEN: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, LANES: tl.constexpr,
            BOTH: tl.constexpr, OVERLAP: tl.constexpr):
    """Add the parts of a row, the bias, and a row of ``residual`` (the same row, or row ``chosen [B]``) and write that
    to ``out``; then apply the norm, for which a program has the whole row, and GELU, and write to ``normed``."""
    wait(OVERLAP)
    row, block = tl.program_id(0), tl.program_id(1)
    place = parts + row * step
    if BOTH:
        blocks = tl.cdiv(outputs, LANES)
        second = block >= blocks
        bias, normed = tl.where(second, bias2, bias), tl.where(second, normed2, normed)
        norm_weight = tl.where(second, norm_weight2, norm_weight)
        norm_bias = tl.where(second, norm_bias2, norm_bias)
        place += tl.where(second, start2, 0)
        block -= tl.where(second, blocks, 0)
        outputs = tl.where(second, outputs2, outputs)
    lane = block * LANES + tl.arange(0, LANES)
    there = lane < outputs
    total = tl.zeros((LANES, ), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(place + part * rows * step + lane, mask=there, other=0.0)
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
    """The same weights with products in 'tf32' or 'bfloat16'; for 'bfloat16' matrices are copied."""
    if matmul == 'float32':
        return weights

    def changed(function: Any) -> Any:
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


class _Stage(NamedTuple):
    """Functions that two launches compute: a product, then a norm and GELU if there are any. Or a norm alone."""
    linear: Optional[Linear]
    norm: Any
    then_gelu: bool


def apply(function: Function, x: torch.Tensor) -> torch.Tensor:
    """A function of :class:`.weights.Weights`, applied to ``x [B, K]``."""
    return _run(_stages(function), x)


def apply_both(first: Function, second: Function, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Two functions of ``x [B, K]``; while their stages are alike, one launch computes both."""
    left, right = _stages(first), _stages(second)
    both = x, x
    while left and right and _are_alike(left[0], right[0]) and (left[0].linear or both[0] is both[1]):
        stages = left.pop(0), right.pop(0)
        both = _finished(_parts(both, stages), stages)  # type: ignore[assignment]
    return _run(left, both[0]), _run(right, both[1])


def multiply(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """``x [B, K]`` times the weights, in parts ``[S, B, N]``; the caller adds them, and the bias."""
    return _multiplied((x, ), (_Stage(layer, None, False), ))


def residual_norm(function: Function, x: torch.Tensor, residual: torch.Tensor,
                  norm: Function) -> Tuple[torch.Tensor, ...]:
    """``residual [B, N]`` plus a function of ``x [B, K]``, and the norm of that."""
    *before, last = function.functions if isinstance(function, Chain) else (function, )
    x = apply(Chain(tuple(before)), x)
    if isinstance(last, Linear) and _is_plain(norm):
        return _finished(multiply(last, x), (_Stage(last, norm, False), ), residual)
    total = residual + apply(last, x)
    return total, norm(total)


def position_norm(x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor,
               norm: Function) -> Tuple[torch.Tensor, ...]:
    """``x [B, N]`` plus the rows of ``table`` at positions ``[B]``, and the norm of that."""
    if _is_plain(norm):
        return _finished(x[None].contiguous(), (_Stage(None, norm, False), ), table, positions)
    total = x + table[positions]
    return total, norm(total)


def _is_plain(norm: Function) -> bool:
    return isinstance(norm, Norm) and norm.weight is not None and norm.bias is not None


def _stages(function: Function) -> List[Any]:
    """The functions of a chain, grouped into stages; those that no stage has stay as they are."""
    functions = list(function.functions if isinstance(function, Chain) else (function, ))
    stages: List[Any] = []
    while functions:
        first, linear, norm = functions.pop(0), None, None
        if isinstance(first, Linear):
            linear = first
            norm = functions.pop(0) if functions and _is_plain(functions[0]) else None
        elif _is_plain(first):
            norm = first
        else:
            stages.append(first)
            continue
        then_gelu = functions[:1] == [gelu]
        del functions[:then_gelu]
        stages.append(_Stage(linear, norm, then_gelu))
    return stages


def _are_alike(*stages: Any) -> bool:
    """Whether one launch can compute both products, and another one what follows on them."""
    if not all(isinstance(stage, _Stage) for stage in stages):
        return False
    one, other = [
        (linear and (linear.weight.shape[1], linear.weight.dtype, linear.matmul, linear.bias is None),
         norm and norm.eps, then_gelu) for linear, norm, then_gelu in stages
    ]
    return one == other


def _run(stages: List[Any], x: torch.Tensor) -> torch.Tensor:
    for stage in stages:
        if not isinstance(stage, _Stage):
            x = stage(x)
        else:
            x = _finished(_parts((x, ), (stage, )), (stage, ))[0]
    return x


def _parts(xs: Sequence[torch.Tensor], stages: Sequence[_Stage]) -> torch.Tensor:
    """What :func:`_finished` finishes: products in parts, or for norms alone the one input that they share."""
    return _multiplied(xs, stages) if stages[0].linear else xs[0][None].contiguous()


def _multiplied(xs: Sequence[torch.Tensor], stages: Sequence[_Stage]) -> torch.Tensor:
    """The products of a stage, or of two side by side, in parts ``[S, B, N]``."""
    layers = [stage.linear for stage in stages if stage.linear is not None]
    sizes = [len(layer.weight) for layer in layers]
    (rows, inputs), layer = xs[0].shape, layers[0]
    tiling = tiling_of(rows, sum(sizes), inputs, layer.matmul)
    start2 = _aligned(sizes[0])
    end = sizes[0] if len(sizes) == 1 else start2 + sizes[1]
    parts = xs[0].new_empty(tiling.parts, rows, _aligned(end))
    blocks = sum(triton.cdiv(size, tiling.outputs) for size in sizes)
    launch(
        _multiply, (blocks, triton.cdiv(rows, tiling.rows), tiling.parts), xs[0], xs[-1], layer.weight,
        layers[-1].weight, sizes[0], sizes[-1], parts, start2, parts.stride(1), rows, inputs, ROWS=tiling.rows,
        OUTPUTS=tiling.outputs, INPUTS=tiling.inputs, PARTS=tiling.parts, PRECISION=PRECISIONS[layer.matmul],
        BOTH=len(stages) == 2, num_warps=tiling.warps, num_stages=tiling.stages
    )
    return parts[:, :, :end]


def _finished(parts: torch.Tensor, stages: Sequence[_Stage], residual: Optional[torch.Tensor] = None,
              chosen: Optional[torch.Tensor] = None) -> Tuple[torch.Tensor, ...]:
    """Finish stages whose products are ``parts [S, B, N]``. Returns their results; with a residual, the sum and its
    norm."""
    count, rows, end = parts.shape
    sizes = [end if stage.linear is None else len(stage.linear.weight) for stage in stages]
    start2 = 0 if stages[0].linear is None else _aligned(sizes[0])
    results = [parts.new_empty(rows, size) for size in sizes]
    out = results[0] if residual is None else torch.empty_like(results[0])
    biases = [None if stage.linear is None else stage.linear.bias for stage in stages]
    norm, norm2 = stages[0].norm, stages[-1].norm
    lanes = triton.next_power_of_2(max(sizes))
    lanes = lanes if norm is not None else min(1024, lanes)
    weights = (out, out, out, out) if norm is None else (norm.weight, norm2.weight, norm.bias, norm2.bias)
    launch(
        _finish, (rows, sum(triton.cdiv(size, lanes) for size in sizes)), parts,
        out if biases[0] is None else biases[0], out if biases[-1] is None else biases[-1],
        out if residual is None else residual, out if chosen is None else chosen, *weights, out, results[0],
        results[-1], sizes[0], sizes[-1], start2, parts.stride(1), rows,
        0.0 if norm is None else norm.eps, PARTS=count, BIAS=biases[0] is not None, RESIDUAL=residual is not None,
        CHOSEN=chosen is not None, NORM=norm is not None, GELU=stages[0].then_gelu, LANES=lanes, BOTH=len(stages) == 2,
        num_warps=4 if lanes <= 1024 else 8
    )
    return tuple(results) if residual is None else (out, results[0])


def _aligned(size: int) -> int:
    """Rounded up to 16 numbers, so that vector loads are aligned. A second product begins at this column."""
    return -(-size // 16) * 16

"""Linear layers of few rows at the speed of a GPU's memory. Importing it imports Triton.

Weights are split along their inputs over programs, since outputs alone are too few to keep a GPU busy; a second launch
adds the parts and the bias. Three products of tf32 are as exact as one of float32.
"""
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

MOST_ROWS = 256
"""Beyond, nothing was measured (docs/results.md)."""

LEAST_INPUTS = 512
"""Below, a product is too short to be split."""


def sizes(rows: int, outputs: int) -> Tuple[int, int, int, int]:
    """Rows and outputs of a program, inputs that it reads together, and into how many parts inputs are split; chosen by
    measurement (docs/results.md)."""
    if rows <= 64:
        return max(16, triton.next_power_of_2(rows)), 32, 64, 4
    return 64, 64, 32, 4 if outputs <= 1024 else 2


@triton.jit
def _product(x, weight, parts, rows, outputs, inputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,  # type: ignore[no-untyped-def]
             INPUTS: tl.constexpr, PARTS: tl.constexpr):
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    size = inputs // PARTS
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(0, size, INPUTS):
        k = part * size + begin + tl.arange(0, INPUTS)
        a = tl.load(x + m[:, None] * inputs + k[None, :], mask=m[:, None] < rows, other=0.)
        b = tl.load(weight + n[None, :] * inputs + k[:, None], mask=n[None, :] < outputs, other=0.)
        total = tl.dot(a, b, total, input_precision='tf32x3')
    at = (part * rows + m[:, None]) * outputs + n[None, :]
    tl.store(parts + at, total, mask=(m[:, None] < rows) & (n[None, :] < outputs))


@triton.jit
def _add(parts, bias, out, numbers, outputs, PARTS: tl.constexpr, BIASED: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = at < numbers
    total = tl.zeros((SIZE, ), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * numbers + at, mask=there, other=0.)
    if BIASED:
        total += tl.load(bias + at % outputs, mask=there, other=0.)
    tl.store(out + at, total, mask=there)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether :func:`linear` is for such a layer and so many rows."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    _rows, _outputs, together, count = sizes(rows, outputs)
    return (rows <= MOST_ROWS and inputs >= LEAST_INPUTS and inputs % (together * count) == 0 and outputs >= 32
            and x.dtype == weight.dtype == torch.float32 and x.is_contiguous() and weight.is_contiguous())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """``F.linear``."""
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    rows_each, outputs_each, together, count = sizes(rows, outputs)
    parts, out = x.new_empty(count, rows, outputs), x.new_empty(x.shape[:-1] + (outputs, ))
    _product[triton.cdiv(outputs, outputs_each), triton.cdiv(rows, rows_each), count](
        x, weight, parts, rows, outputs, inputs, rows_each, outputs_each, together, count, num_warps=4, num_stages=4
    )
    _add[triton.cdiv(out.numel(), 512), ](
        parts, weight if bias is None else bias, out, out.numel(), outputs, count, bias is not None, 512
    )
    return out

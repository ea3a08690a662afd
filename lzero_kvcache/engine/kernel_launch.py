"""Launching Triton kernels with programmatic dependent launch, on GPUs that have it (Hopper and later): the programs of
a kernel start while the kernel before it ends, and wait for its memory. That saves about a microsecond per launch. Also
a probe that tells whether kernels run. Importing it imports Triton.
"""
from contextlib import nullcontext
from typing import Any, Tuple

import torch
import triton
import triton.language as tl


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """The first statement of a kernel; before it, no memory of other kernels may be read, and none written."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch(kernel: Any, grid: Tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel that begins with :func:`wait`."""
    if can_overlap(kernel):
        options['launch_pdl'] = True
    kernel[grid](*args, OVERLAP='launch_pdl' in options, **options)


def can_overlap(kernel: Any) -> bool:
    """Whether GPU and Triton support it, and the kernel is not interpreted."""
    compiled = isinstance(kernel, triton.runtime.JITFunction) and hasattr(tl.extra.cuda, 'gdc_wait')
    return compiled and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@triton.jit
def _probe(ones, out, seed, OVERLAP: tl.constexpr):
    """Write a third, sixteen times, by operations that some versions of Triton, and some cards, lack."""
    wait(OVERLAP)
    index = tl.arange(0, 16)
    square = tl.load(ones + index[:, None] * 16 + index[None, :])
    half = square.to(tl.float16)
    total = tl.sum(tl.dot(half, half, tl.dot(square, square, input_precision='tf32x3')), 0)  # 512 each
    word, _b, _c, _d = tl.philox(tl.load(seed), index, index, index, 0)
    number = tl.umulhi(word, index.to(tl.uint32) * 0 + 3).to(tl.int32)
    tl.store(out + index, tl.where(number < 3, tl.div_rn(total, tl.full((16, ), 1536., tl.float32)), 0.))


def probe(device: torch.device) -> None:
    """Compile and launch a kernel, and check its output; an error where any of that fails."""
    with torch.cuda.device(device) if device.type == 'cuda' else nullcontext():
        ones, out = torch.ones(16, 16, device=device), torch.zeros(16, device=device)
        seed = torch.ones(1, dtype=torch.int64, device=device)
        launch(_probe, (1, ), ones, out, seed, num_warps=1, enable_fp_fusion=False)
    if out.tolist() != torch.full((16, ), 1 / 3).tolist():
        raise RuntimeError(f'a kernel wrote {out.tolist()} in place of thirds')

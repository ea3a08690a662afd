"""Kernels of which one begins while the one before it ends, on GPUs that can (Hopper's and later): its programs are
there early, and wait. Between launches that last some microseconds each, that saves one of them. Importing it imports
Triton.
"""
from typing import Any, Tuple

import torch
import triton
import triton.language as tl


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """What a kernel begins with: only after it may memory of other kernels be read, or any be written."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch(kernel: Any, grid: Tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel that begins with :func:`wait`."""
    if can_overlap(kernel):
        options['launch_pdl'] = True
    kernel[grid](*args, OVERLAP='launch_pdl' in options, **options)


def can_overlap(kernel: Any) -> bool:
    """Whether GPU, Triton and the way in which a kernel is run allow it."""
    compiled = isinstance(kernel, triton.runtime.JITFunction) and hasattr(tl.extra.cuda, 'gdc_wait')
    return compiled and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)

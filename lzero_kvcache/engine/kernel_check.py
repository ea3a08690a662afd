"""Whether a GPU runs Triton's kernels. Triton comes with torch, but needs a C compiler, and a card and a driver that it
supports; what is missing shows only when a kernel is compiled or launched.
"""
import importlib.util
from typing import Callable, Dict, Optional

import torch

Probe = Callable[[torch.device], None]
"""Launches kernels on a device, and raises an error where that fails."""


def launch_one(device: torch.device) -> None:
    """A small kernel of operations that some versions of Triton, and some cards, lack."""
    from .kernel_launch import probe

    probe(device)


class KernelCheck:
    """Tries once on each device whether kernels run, for one model."""

    def __init__(self, probe: Probe = launch_one) -> None:
        self._probe = probe
        self._known: Dict[torch.device, Optional[str]] = {}

    def why_not(self, device: torch.device) -> Optional[str]:
        """The reason in words for the log; None where kernels run."""
        if device not in self._known:
            self._known[device] = self._try(device)
        return self._known[device]

    def _try(self, device: torch.device) -> Optional[str]:
        if importlib.util.find_spec('triton') is None:
            return 'triton is not installed (pip install triton)'
        try:
            self._probe(device)
        except Exception as error:  # Triton's, and its compiler's, have types of their own
            first_line = str(error).split('\n', maxsplit=1)[0]
            return f'triton runs no kernel on {device} ({type(error).__name__}: {first_line})'
        return None

"""Numbers to the device and back."""
from typing import List

import numpy as np
import torch


class Pinned:
    """Memory on the CPU that a device copies from while the CPU goes on. An event guards it: it is not written again
    before the last copy is done, also where the step that began the copy was interrupted."""

    def __init__(self, memory: torch.Tensor, device: torch.device) -> None:
        is_gpu = device.type == 'cuda'
        self.memory = memory.pin_memory() if is_gpu else memory
        self.sent = self.memory.to(device, copy=True)
        self._copied = torch.cuda.Event() if is_gpu else None

    def writable(self) -> np.ndarray:
        """The memory, once it may be written."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.memory.numpy()

    def send(self) -> None:
        """Begin to copy it to ``sent``."""
        try:
            self.sent.copy_(self.memory, non_blocking=True)
        finally:  # an interrupt may come between
            if self._copied is not None:
                self._copied.record(torch.cuda.current_stream(self.sent.device))


def to_cpu(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to the CPU; from a GPU to pinned memory, which takes a fraction of the time."""
    if not tensor.is_cuda:
        return tensor.numpy()
    copy = tensor.to('cpu', non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copy.numpy()


def send(device: torch.device, *arrays: np.ndarray) -> List[torch.Tensor]:
    """Several arrays in one copy to a device, those with wider numbers first."""
    parts = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == 'cpu':
        return parts
    sent = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts]).to(device, non_blocking=True)
    pieces = sent.split([part.numel() * part.element_size() for part in parts])
    return [piece.view(part.dtype).view(part.shape) for piece, part in zip(pieces, parts)]

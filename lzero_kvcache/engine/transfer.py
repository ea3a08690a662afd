"""Numbers to the device and back."""
from typing import List

import numpy as np
import torch


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

"""The tensor that holds every page. Page ids are int64, on the slab's device."""
from typing import Optional

import torch

from ..config import MIB


def megabytes(*tensors: torch.Tensor) -> float:
    """MiB that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB


class Slab:
    """All pages in one tensor ``[pages, 2, layers, 2, heads, head_dim]``: for each page its two tokens (action,
    observation), for each layer key and value. It is allocated at first use, where the weights are then."""

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.page_shape = (2, layers, 2, heads, head_dim)
        self.dtype = dtype  # of storage; what is read comes back in float32
        self.data: Optional[torch.Tensor] = None

    @property
    def page_bytes(self) -> int:
        """Bytes that one page takes."""
        return torch.Size(self.page_shape).numel() * torch.empty((), dtype=self.dtype).element_size()

    @property
    def memory_mb(self) -> float:
        """MiB that are allocated now."""
        return 0.0 if self.data is None else megabytes(self.data)

    @property
    def address(self) -> int:
        """Where the pages are; it changes when the slab moves or grows."""
        return 0 if self.data is None else self.data.data_ptr()

    def ensure(self, pages: int, device: torch.device) -> None:
        """Have room for so many pages on a device; what is stored comes along. Where memory runs out, the
        ``RuntimeError`` leaves the slab as it was."""
        data = self.data
        if data is not None and data.shape[0] >= pages and data.device == device:
            return
        kept = 0 if data is None else data.shape[0]
        # Zeros, not empty: a masked token has weight 0, and 0 x nan is nan.
        grown = torch.zeros((max(pages, kept),) + self.page_shape, dtype=self.dtype, device=device)
        if data is not None:
            grown[:kept].copy_(data)
        self.data = grown

    def read(self, tables: torch.Tensor, out: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Gather pages ``[B, W]`` into one window of tokens for each row ``[B, 2W, layers, 2, heads * head_dim]``,
        float32, in new memory or in ``out``, of as many pages or more."""
        assert self.data is not None
        ids = tables.reshape(-1)
        rows = torch.index_select(self.data, 0, ids, out=None if out is None else out[:len(ids)])
        _, layers, _, heads, head_dim = self.page_shape
        window = rows.view(tables.shape[0], 2 * tables.shape[1], layers, 2, heads * head_dim)
        return window.to(torch.float32)

    def write(self, pages: torch.Tensor, tokens: torch.Tensor) -> None:
        """Overwrite distinct pages ``[B]`` with keys and values ``[B, 2, layers, 2, heads * head_dim]``."""
        assert self.data is not None
        self.data.index_copy_(0, pages, tokens.reshape((-1,) + self.page_shape).to(self.dtype))

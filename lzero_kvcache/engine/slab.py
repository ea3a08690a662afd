"""The tensor that holds every page. Knows tensors and page ids; no keys, no pools, no transformer."""
from typing import Any, Dict, Optional

import torch

MIB = 1024 * 1024


class Slab:
    """
    Overview:
        All pages in one tensor ``[pages, 2, layers, 2, heads, head_dim]``: for each page its two tokens (action,
        observation), for each layer key and value. It is allocated at first use, where the weights are then.
    Arguments:
        - layers (:obj:`int`): Transformer layers.
        - heads (:obj:`int`): Attention heads.
        - head_dim (:obj:`int`): Width of a head.
        - dtype (:obj:`torch.dtype`): Storage type; what is read comes back in float32.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.page_shape = (2, layers, 2, heads, head_dim)
        self.dtype = dtype
        self.data: Optional[torch.Tensor] = None
        self._kept: Optional[torch.Tensor] = None

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_kept': None}

    @property
    def page_bytes(self) -> int:
        """Bytes that one page takes."""
        return torch.Size(self.page_shape).numel() * torch.empty((), dtype=self.dtype).element_size()

    @property
    def memory_mb(self) -> float:
        """MiB that are allocated now."""
        return 0.0 if self.data is None else self.data.numel() * self.data.element_size() / MIB

    @property
    def address(self) -> int:
        """Where the pages are; it changes when the slab moves or grows."""
        return 0 if self.data is None else self.data.data_ptr()

    def ensure(self, pages: int, device: torch.device) -> None:
        """
        Overview:
            Have room for ``pages`` pages on ``device``; what is stored comes along.
        Arguments:
            - pages (:obj:`int`): Pages that must be there.
            - device (:obj:`torch.device`): Where.
        Raises:
            - RuntimeError: Memory ran out; the slab is as it was.
        """
        data = self.data
        if data is not None and data.shape[0] >= pages and data.device == device:
            return
        kept = 0 if data is None else data.shape[0]
        # Zeros, not empty: a masked token has weight 0, and 0 x nan is nan.
        grown = torch.zeros((max(pages, kept),) + self.page_shape, dtype=self.dtype, device=device)
        if data is not None:
            grown[:kept].copy_(data)
        self.data = grown

    def read(self, tables: torch.Tensor) -> torch.Tensor:
        """
        Overview:
            Gather pages into one window of tokens for each row.
        Arguments:
            - tables (:obj:`torch.Tensor`): Page ids ``[B, W]``, int64, on the slab's device.
        Returns:
            - window (:obj:`torch.Tensor`): ``[B, 2W, layers, 2, heads * head_dim]``, float32, to write on; until the \
                next call.
        """
        assert self.data is not None
        pages = tables.reshape(-1)
        rows = torch.index_select(self.data, 0, pages, out=self._room(len(pages)))
        _, layers, _, heads, head_dim = self.page_shape
        window = rows.view(tables.shape[0], 2 * tables.shape[1], layers, 2, heads * head_dim)
        return window.to(torch.float32)

    def _room(self, pages: int) -> Optional[torch.Tensor]:
        """On a CPU new memory for a long window takes several times as long as the gather: the last one's is kept."""
        assert self.data is not None
        if self.data.device.type != 'cpu':
            return None
        if self._kept is None or len(self._kept) < pages:
            self._kept = self.data.new_empty((pages,) + self.page_shape)
        return self._kept[:pages]

    def write(self, pages: torch.Tensor, tokens: torch.Tensor) -> None:
        """
        Overview:
            Overwrite whole pages.
        Arguments:
            - pages (:obj:`torch.Tensor`): Distinct page ids ``[B]``, int64, on the slab's device.
            - tokens (:obj:`torch.Tensor`): Keys and values ``[B, 2, layers, 2, heads * head_dim]``.
        """
        assert self.data is not None
        self.data.index_copy_(0, pages, tokens.reshape((-1,) + self.page_shape).to(self.dtype))

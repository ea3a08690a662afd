"""Nodes whose contexts are found by their place in a search: the tree is LightZero's, node by node."""
import time
from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterator, Sequence

import numpy as np
import torch

from ..cache.nodes import NodeTable
from ..engine.transfer import to_cpu
from .served import Served
from .steps import Steps
from .timesteps import steps_after


class NodesByPlace(Steps):
    """Simulations of a search by node."""

    @contextmanager
    def search_by_node(self, simulations: int) -> Iterator[Callable[..., np.ndarray]]:
        """A context for a search from the roots that were just served; gives :meth:`expand` for it."""
        served = self.open.searched()
        assert served.roots is not None
        start = time.perf_counter()
        served.searches += 1
        try:
            with self._manager.lease() as lease:
                lease.hold(served.roots[0])
                nodes = NodeTable(served.roots, lease.allocate(simulations * len(served.env_ids)))
                self._manager.count_nodes(nodes.pages.size)
                yield partial(self.expand, served, nodes)
        finally:
            served.searches -= 1
        self.timings['search'].record(time.perf_counter() - start)

    @torch.no_grad()
    def expand(self, served: Served, nodes: NodeTable, simulation: int, path: np.ndarray, columns: np.ndarray,
               actions: np.ndarray, depths: Sequence[int]) -> np.ndarray:
        """One simulation of a search by node; one copy to the device, one back.

        ``path [B]`` and ``columns [B]`` are the index in the search path and the row of each node, ``depths [B]`` what
        LightZero's tree passes as such. Returns reward, value and policy logits ``[B, 2 + P]``; 0 for what is skipped.
        """
        start = time.perf_counter()
        contexts, pages = nodes.expand(simulation, path, columns), nodes.pages[simulation]
        result = self._step(
            self._weights_of(served), contexts, pages, steps_after(served.timesteps, depths), actions, None,
            nodes.longest(simulation)
        )
        self._manager.count_queries('recur', len(pages), len(pages), by_node=True)
        assert result.search is not None  # the actions came from the CPU
        predicted = to_cpu(result.search)
        if served.trace is not None:
            served.trace.note_node(path, actions, depths, result.output)
        what = 'A reward, value or policy'
        kept = self._guard.finite(predicted, what, served.mode, served.env_ids, served.timesteps)
        self.timings['step'].record(time.perf_counter() - start)
        return predicted if len(kept) == len(predicted) else np.nan_to_num(predicted, posinf=0.0, neginf=0.0)

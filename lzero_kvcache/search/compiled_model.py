"""One model on the CPU for compiled functions, and the threads that run them. The first call
imports the modules that compile."""
import threading
import time
from functools import partial
from typing import Any, Callable, ContextManager, Dict, List, Sequence, Set, Tuple

import numpy as np
import torch

from ..engine.memory import MemoryPool
from ..engine.program import WIDTH, Batch, PagedNetwork
from ..engine.weights import Source

LEAST_COLUMNS = 128
"""Columns of a product for each thread, at least, where rows are too few for two threads."""


class CompiledModel:
    """Addresses of one model's weights, and working memory for its steps."""

    def __init__(self, read_network: Callable[[], Tuple[Any, Any]], source: Source) -> None:
        self._read_network, self._source = read_network, source
        self._network: Any = None  # what ``read_network`` returned, and the addresses it was read for
        self.memory = MemoryPool()
        self._compiled: Set[Any] = set()  # functions that were called, and whether threads helped

    def __getstate__(self) -> Dict[str, Any]:
        """Copies read their own weights' addresses."""
        return {**self.__dict__, '_network': None, '_compiled': set()}

    def network_at(self, addresses: Tuple[int, ...]) -> Tuple[Any, Any]:
        """The network, which is read again when an address has changed, and an object that keeps its memory alive: the
        caller must hold that for as long as it uses the network."""
        known = self._network
        if known is None or known[1] != addresses:
            self._network = known = self._read_network(), addresses
        return known[0]

    def shift(self) -> np.ndarray:
        """``Weights.shift``, or zeros with rotary positions."""
        shift, geometry = self._source.shift(), self._source.geometry
        if shift is None:
            return np.zeros((1, geometry.layers, 2, geometry.embed_dim), np.float32)
        return shift.detach().numpy()

    def begin(self, paged: PagedNetwork, tables: np.ndarray, pages: np.ndarray, positions: np.ndarray,
              latent: np.ndarray) -> None:
        """Begin contexts with the states ``latent [B, E]``, in ``pages [B]``, at rotary positions ``[B]``. Of
        ``tables`` only the width matters."""
        from . import compiled_search

        batch = Batch(tables, np.zeros(len(pages), np.int64), pages, np.stack([positions, positions]), latent=latent)
        self.run(compiled_search.step_roots, (paged, batch, True), paged.network, tables.shape[1], len(pages))

    def run(self, function: Callable[..., Any], given: Sequence[Any], network: Any, context_pages: int, rows: int,
            *numbers: int) -> float:
        """Run ``function(*given, scratch, *numbers, first row, end)`` over tables of ``context_pages`` pages. Threads
        share the rows out, each at least as many as are computed side by side. Too few rows for two threads run in one,
        and other threads compute columns of its products. Returns the seconds spent compiling."""
        threads = max(1, min(torch.get_num_threads(), rows // WIDTH))
        helpers = 0
        if threads == 1:
            helpers = max(0, min(torch.get_num_threads(), network.embed // LEAST_COLUMNS) - 1)
        with self.scratches(network, context_pages, threads) as scratches:
            waited = self._compile(function, (*given, scratches[0], *numbers), helpers > 0)
            _in_threads(function, given, scratches, helpers, numbers, rows)
        return waited

    def _compile(self, function: Callable[..., Any], arguments: Sequence[Any], helped: bool) -> float:
        """Compile or load a function by calling it for no rows; returns the seconds that it took."""
        if (function, helped) in self._compiled:
            return 0.
        begun = time.perf_counter()
        function(*arguments, 0, 0)
        if helped:
            from ..engine.team import dismiss, new_team
            from .compiled_search import help_search

            dismissed = new_team(2)
            dismiss(dismissed)
            help_search(dismissed, 1)
        self._compiled.add((function, helped))
        return time.perf_counter() - begun

    def scratches(self, network: Any, context_pages: int, threads: int) -> ContextManager[List[Any]]:
        """Working memory of some threads, for tables of ``context_pages`` pages."""
        from ..engine.layers import new_scratch

        size = context_pages, network.embed, network.mlp_width, network.widest
        return self.memory.lease(size, threads, partial(new_scratch, network, context_pages))


def _in_threads(function: Callable[..., Any], given: Sequence[Any], scratches: Sequence[Any], helpers: int,
                numbers: Sequence[int], rows: int) -> None:
    """Run a function in threads, which live for one call, so that a fork finds none."""
    if len(scratches) == 1 and not helpers:
        return function(*given, scratches[0], *numbers, 0, rows)
    from ..engine.team import dismiss, new_team
    from . import compiled_search

    errors: List[BaseException] = []

    def run(*args: Any) -> None:
        try:
            function(*given, *args)
        except BaseException as error:
            errors.append(error)

    team = new_team(1 + helpers)
    bounds = [rows * share // len(scratches) for share in range(len(scratches) + 1)]
    first, *rest = [
        (scratch._replace(team=team), *numbers, *share) for scratch, *share in zip(scratches, bounds, bounds[1:])
    ]
    threads = [threading.Thread(target=run, args=share) for share in rest]
    threads += [
        threading.Thread(target=compiled_search.help_search, args=(team, worker)) for worker in range(1, 1 + helpers)
    ]
    try:
        for thread in threads:
            thread.start()
        run(*first)
    finally:
        dismiss(team)
        for thread in threads:
            if thread.ident is not None:  # it was started
                thread.join()
    if errors:
        raise errors[0]

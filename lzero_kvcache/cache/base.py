"""What a cache manager must offer."""
from abc import ABC, abstractmethod
from typing import Any, Dict, Hashable, Optional, Sequence

import numpy as np

from .nodes import NodeTable
from .pages import Rows


class BaseCacheManager(ABC):
    """
    Overview:
        What everybody may ask of a world model's ``kv_cache_manager``, in either system. It is built as
        ``manager(config, env_num, enable_stats)``, ``config`` being the ``world_model_cfg``.
    """

    @abstractmethod
    def clear_init_caches(self, mode: Optional[str] = None, env_id: Optional[int] = None) -> None:
        """
        Overview:
            Forget root contexts; counts stay.
        Arguments:
            - mode (:obj:`Optional[str]`): 'collect' or 'eval'; None for both.
            - env_id (:obj:`Optional[int]`): One environment; None for all.
        """

    @abstractmethod
    def clear_recur_cache(self) -> None:
        """
        Overview:
            Forget the nodes of the last search; counts stay.
        """

    @abstractmethod
    def clear_all(self) -> None:
        """
        Overview:
            Forget everything that is stored; counts stay.
        """

    @abstractmethod
    def count_queries(self, pool: str, queries: int, hits: int, by_node: bool = False) -> None:
        """
        Overview:
            Count a batch of what both systems call a query and a hit.
        Arguments:
            - pool (:obj:`str`): 'init': one row of a root inference whose environment has a predecessor step in its \
                episode. 'recur': one row of one recurrent inference of a search.
            - queries (:obj:`int`): Rows.
            - hits (:obj:`int`): Rows whose context was there.
            - by_node (:obj:`bool`): Whether they were found by node, so that no pool has counted them.
        """

    @abstractmethod
    def counters(self) -> Dict[str, Any]:
        """
        Overview:
            The numbers that tensorboard shows.
        Returns:
            - counters (:obj:`Dict[str, Any]`): ``init``, ``recur`` and ``total``, each a dict with ``queries``, \
                ``hits``, ``misses`` and, where known, ``evictions`` and ``occupancy`` (all cumulative but the last); \
                and ``memory_mb``. A manager that does not count leaves the first three out. Where rows with nan or \
                inf can be skipped, ``skipped``, cumulative.
        """

    @abstractmethod
    def get_stats_summary(self) -> Dict[str, Any]:
        """
        Overview:
            Every pool's own counts as a JSON-serialisable dict, ``{'stats_enabled': False}`` without counting.
        """

    @abstractmethod
    def reset_stats(self) -> None:
        """
        Overview:
            Set every count to 0; what is stored stays.
        """


class PagedCacheManager(BaseCacheManager):
    """
    Overview:
        What the new world model calls beside that. Keys and values lie in pages; a manager knows keys, environments
        and page ids, and need not look at a tensor. Subclass :class:`KVCacheManager` to change a part of it, or this
        class to write another, and register it: ``@KV_CACHE_REGISTRY.register(NAME)``.

        A step is ``allocate``, ``find_*``, ``store_*``, and ``release`` at its end, whether it failed or not. A search
        is a root step (``find_init``, ``store_init``), ``clear_recur_cache`` before it, and a step for each simulation
        (``find_recur``, ``store_recur``).
    Properties:
        - width (:obj:`int`): ``R``, pages that a stored context has at the most: ``context_length / 2 - 1``.
        - page_capacity (:obj:`int`): Page ids are below this.
        - storage (:obj:`PageStorage`): Where the pages are; ``PageStorage(config, self)`` makes one.
    Shapes:
        ``B`` rows of a batch. Tables of pages are ``[B, R]``, left-aligned and padded with page 0.
    """
    width: int
    storage: Any

    @property
    @abstractmethod
    def page_capacity(self) -> int:
        """Page ids are below this; it may grow from one ``allocate`` to the next."""

    @abstractmethod
    def allocate(self, count: int) -> np.ndarray:
        """
        Overview:
            Reserve pages for the step that is about to run.
        Returns:
            - pages (:obj:`np.ndarray`): Distinct page ids ``[count]`` above 0; page 0 pads tables.
        """

    @abstractmethod
    def hold(self, tables: np.ndarray) -> None:
        """
        Overview:
            Keep the pages of contexts that were found from being reused until ``release``, whatever is evicted.
        """

    @abstractmethod
    def release(self) -> None:
        """
        Overview:
            End a step or a search: give back what was allocated or held and no entry has taken over.
        """

    @abstractmethod
    def find_init(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable]) -> Rows:
        """
        Overview:
            Find the contexts that the last roots of some environments left.
        Arguments:
            - mode (:obj:`str`): 'collect' or 'eval'; their contexts are apart.
            - env_ids (:obj:`Sequence[int]`): The environment of each row.
            - keys (:obj:`Sequence[Hashable]`): The hash of each row's last latent state, or an object that nothing is \
                stored under.
        Returns:
            - rows (:obj:`Rows`): Tables, and pages in use ``[B]``: 0 for a miss.
        Raises:
            - ValueError: There is no such environment.
        """

    @abstractmethod
    def store_init(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable], rows: Rows) -> None:
        """
        Overview:
            Store the contexts of new roots; an equal key of the same environment is replaced.
        """

    @abstractmethod
    def find_recur(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable]) -> Rows:
        """
        Overview:
            Find the contexts of the nodes that are expanded: in the environment's init pool, then in the search.
        """

    @abstractmethod
    def store_recur(self, env_ids: Sequence[int], keys: Sequence[Hashable], rows: Rows) -> None:
        """
        Overview:
            Store the contexts of the nodes that a simulation made.
        """

    def count_skipped(self, rows: int) -> None:
        """
        Overview:
            Count rows with nan or inf whose contexts are not stored (``kv_cache_cfg.on_nan='skip'``); here, nowhere.
        """

    def open_search(self, roots: Rows, simulations: int) -> NodeTable:
        """
        Overview:
            Begin a search whose contexts are found by node; ``release`` ends it.
        Arguments:
            - roots (:obj:`Rows`): The contexts of the roots.
            - simulations (:obj:`int`): Nodes that each row will get.
        Returns:
            - nodes (:obj:`NodeTable`): The contexts by node.
        """
        self.hold(roots[0])
        return NodeTable(roots, self.allocate(simulations * len(roots[1])))

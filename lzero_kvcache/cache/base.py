"""The interface of cache managers. ``B`` rows of a batch; tables of pages ``[B, R]``, left-aligned, padded with 0."""
import enum
import sys
from abc import ABC, abstractmethod
from typing import Any, Dict, Hashable, Optional, Sequence

from .pages import Lease, Rows


class Key(enum.Enum):
    """Keys that are not the hash of a latent state."""
    CURRENT = 'current'


CURRENT = Key.CURRENT
"""The key of an environment's newest root, which the policies' searches find by the environment."""
COLLECT, EVAL = 'collect', 'eval'
"""The modes: environments of collection, and those of evaluation."""


class BaseCacheManager(ABC):
    """
    Overview:
        The methods of a world model's ``kv_cache_manager`` in either system. It is built as
        ``manager(config, env_num, enable_stats)``, ``config`` being the ``world_model_cfg``.
    """

    @abstractmethod
    def clear_init_caches(self, mode: Optional[str] = None, env_id: Optional[int] = None) -> None:
        """
        Overview:
            Forget root contexts; counts stay.
        Arguments:
            - mode (:obj:`Optional[str]`): 'collect' or 'eval'; None for both, as LightZero's own caches always do.
            - env_id (:obj:`Optional[int]`): One environment; None for all.
        Raises:
            - ValueError: There is no such mode, but for LightZero's own caches.
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
            Count a batch of queries and hits, as both systems define them (docs/statistics.md).
        Arguments:
            - pool (:obj:`str`): 'init': one row of a root inference whose environment has a predecessor step in its \
                episode. 'recur': one row of one recurrent inference of a search; the old system counts these itself.
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
                ``hits``, ``misses`` and, where known, ``evictions`` and ``occupancy`` (all cumulative but the last, \
                the share of the capacity that is filled); and ``memory_mb``, in MiB. A manager that does not count \
                leaves the first three out. Where rows with nan or inf can be skipped, ``skipped``, and where CUDA \
                graphs are captured, ``captures``, both cumulative.
        """

    @abstractmethod
    def get_stats_summary(self) -> Dict[str, Any]:
        """
        Overview:
            Every pool's own counts, ready for JSON.
        Returns:
            - summary (:obj:`Dict[str, Any]`): ``{'stats_enabled': False}`` without counting; else \
                ``stats_enabled``, the counts by pool, and ``memory_mb``, in MiB.
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
        The methods that the new world model calls in addition. Keys and values lie in pages; a manager knows keys,
        environments and page ids, and need not look at a tensor. Subclass :class:`KVCacheManager` to change a part of
        it, or this class to write another, and register it: ``@KV_CACHE_REGISTRY.register(NAME)``.

        A step takes a lease, allocates pages through it, finds contexts (``find_*``), stores new ones (``store_*``)
        and gives the lease back. A search holds a lease of its own for as long as it runs. The policies' searches
        find an environment's root under the key ``CURRENT`` and their nodes by node; every other caller's keys are
        hashes of latent states.
    Properties:
        - context_pages (:obj:`int`): ``R``, pages that a stored context has at the most: ``context_length / 2 - 1``.
        - page_capacity (:obj:`int`): Page ids are below this; it may grow whenever a lease allocates.
        - page_limit (:obj:`int`): The most that ``page_capacity`` may grow to. A reanalysis, which has pages of its \
            own, may take as many again. No bound by default.
    """
    context_pages: int

    @property
    @abstractmethod
    def page_capacity(self) -> int:
        """Page ids are below this."""

    @property
    def page_limit(self) -> int:
        """The most that the page capacity may grow to."""
        return sys.maxsize

    @abstractmethod
    def use_store(self, store: Any) -> None:
        """
        Overview:
            Take the store that holds the pages' keys and values, before the first step.
        Arguments:
            - store (:obj:`PageStore`): ``grow(pages)`` makes room and says whether it could, ``memory_mb`` is what it \
                holds, ``page_bytes`` what a page takes, ``captures`` how many CUDA graphs were captured over it.
        Raises:
            - ConfigError: ``kv_cache_cfg.max_memory_mb`` is too small for one search.
        """

    @abstractmethod
    def lease(self) -> Lease:
        """
        Overview:
            Begin a step or a search, which takes its pages by a lease. Leases know nothing of each other.
        Returns:
            - lease (:obj:`Lease`): ``allocate(count)`` takes pages, ``hold(tables)`` keeps contexts that were found, \
                and ``release()``, or the end of ``with``, gives back what no entry has taken over.
        """

    @abstractmethod
    def find_init(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable]) -> Rows:
        """
        Overview:
            Find root contexts.
        Arguments:
            - mode (:obj:`str`): 'collect' or 'eval'; their contexts are apart.
            - env_ids (:obj:`Sequence[int]`): The environment of each row.
            - keys (:obj:`Sequence[Hashable]`): ``CURRENT`` for each row, which is its environment's newest root, or \
                the hash of each row's last latent state.
        Returns:
            - rows (:obj:`Rows`): Tables ``[B, R]``, and pages in use ``[B]``: 0 for a miss.
        Raises:
            - ValueError: There is no such mode or environment.
        """

    @abstractmethod
    def store_init(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable], rows: Rows) -> None:
        """
        Overview:
            Store the contexts of new roots; an equal key of the same environment is replaced. Under ``CURRENT`` a
            context of 0 pages says that the environment has none.
        Arguments:
            - mode (:obj:`str`): 'collect' or 'eval'.
            - env_ids (:obj:`Sequence[int]`): The environment of each row; under ``CURRENT`` none twice.
            - keys (:obj:`Sequence[Hashable]`): ``CURRENT`` for each row, or the hash of each row's latent state.
            - rows (:obj:`Rows`): Tables ``[B, R]``, and pages in use ``[B]``.
        Raises:
            - ValueError: There is no such mode or environment.
        """

    def forget_init(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable]) -> None:
        """
        Overview:
            Called when a search by key has ended: its roots' keys will not be asked for again. Does nothing here.
        Arguments:
            - mode (:obj:`str`): 'collect' or 'eval'.
            - env_ids (:obj:`Sequence[int]`): The environment of each root.
            - keys (:obj:`Sequence[Hashable]`): The hash of each root's latent state.
        """

    @abstractmethod
    def find_recur(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable]) -> Rows:
        """
        Overview:
            Find the contexts of the nodes that are expanded: in the environment's init pool, then in the search.
        Arguments:
            - mode (:obj:`str`): 'collect' or 'eval'.
            - env_ids (:obj:`Sequence[int]`): The environment of each row.
            - keys (:obj:`Sequence[Hashable]`): The hash of each node's latent state.
        Returns:
            - rows (:obj:`Rows`): Tables ``[B, R]``, and pages in use ``[B]``: 0 for a miss.
        Raises:
            - ValueError: There is no such mode or environment.
        """

    @abstractmethod
    def store_recur(self, env_ids: Sequence[int], keys: Sequence[Hashable], rows: Rows) -> None:
        """
        Overview:
            Store the contexts of the nodes that a simulation made; an equal key of the same environment is replaced.
        Arguments:
            - env_ids (:obj:`Sequence[int]`): The environment of each row.
            - keys (:obj:`Sequence[Hashable]`): The hash of each node's latent state.
            - rows (:obj:`Rows`): Tables ``[B, R]``, and pages in use ``[B]``.
        """

    def count_skipped(self, rows: int) -> None:
        """
        Overview:
            Count rows with nan or inf that are not stored (``kv_cache_cfg.on_nan='skip'``). Does nothing here.
        Arguments:
            - rows (:obj:`int`): How many there are.
        """

    def count_nodes(self, nodes: int) -> None:
        """
        Overview:
            Called when a search begins that needs no keys, for the occupancy. Does nothing here.
        Arguments:
            - nodes (:obj:`int`): How many nodes it will make, of all rows together.
        """

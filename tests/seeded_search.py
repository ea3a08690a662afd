"""LightZero's search with its own tree in Python in place of the one in C++, which breaks ties by the time of day.

Knows nothing of the plugin, so that it serves a process without it as well.
"""
import contextlib
import types
from typing import Any, Iterator
from unittest import mock

import lzero.mcts.ctree.ctree_muzero as ctree_muzero
import lzero.mcts.tree_search.mcts_ctree as mcts_ctree
from lzero.mcts.ptree import ptree_mz
from lzero.mcts.ptree.minimax import MinMaxStatsList


class Results(ptree_mz.SearchResults):
    """The results of a simulation, asked for as the C++ tree is."""

    def get_search_len(self) -> Any:
        """Length of the path to each row's new node."""
        return self.search_lens


class Roots(ptree_mz.Roots):
    """Roots whose distributions are lists, as the C++ tree's are."""


#: What the search calls of ``mz_tree``, from Python.
TREE = types.SimpleNamespace(
    MinMaxStatsList=MinMaxStatsList,
    ResultsWrapper=Results,
    Roots=Roots,
    batch_traverse=ptree_mz.batch_traverse,
    batch_backpropagate=ptree_mz.batch_backpropagate,
)


@contextlib.contextmanager
def seeded_search(*searches: type) -> Iterator[None]:
    """
    Inside, a UniZero search is the same whenever it is run: among equal scores the first action is taken. ``searches``
    are classes that have a ``tree`` of their own.
    """
    first = types.SimpleNamespace(choice=lambda candidates: candidates[0])
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ptree_mz, 'random', first))
        stack.enter_context(mock.patch.object(mcts_ctree, 'tree_muzero', TREE))
        stack.enter_context(mock.patch.object(ctree_muzero, 'mz_tree', TREE))
        for search in searches:
            stack.enter_context(mock.patch.object(search, 'tree', TREE))
        yield

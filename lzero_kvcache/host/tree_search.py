"""LightZero's searches with contexts that are found by node: latent states stay on the device and nothing is hashed.

The tree is in arrays on the model's device (``kv_cache_cfg.search='device'``), or LightZero's own in C++ ('tree').
"""
import copy
import functools
import types
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree, tree_muzero
from lzero.mcts.tree_search.mcts_ctree_sampled import SampledUniZeroMCTSCtree, tree_sampled_muzero

from ..search.whole import Problem
from .lightzero import lightzero
from .patches import with_globals
from .roots import Roots


def can_be_in_arrays(world_model: Any) -> bool:
    """Whether the model is where, and in the mode in which, it can be searched in arrays, at the moment."""
    devices = ('cpu', 'cuda') if lightzero.ON_GPU else ('cpu', )
    return not world_model.training and world_model.weights_source.device().type in devices


class _NodeSearch:
    """What both searches share."""
    _cfg: Any
    tree: Any
    sampled = False

    def __init__(self, cfg: Any, use_arrays: bool = False) -> None:
        super().__init__(cfg)  # type: ignore[call-arg]
        self.use_arrays = use_arrays
        self._searches = 0

    def forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A policy's step that makes roots which can be searched in arrays."""
        own = getattr(forward, '__globals__', {}).get('MCTSCtree')
        if not self.use_arrays or own not in type(self).__mro__:
            return forward
        make = functools.partial(Roots, own.roots)
        return with_globals(forward, MCTSCtree=types.SimpleNamespace(roots=make))

    def search(self, roots: Any, model: Any, latent_state_roots: Any, to_play_batch: Any, timestep: Any = None,
               task_id: Any = None) -> Any:
        """Search from roots whose root inference the world model has just served, with LightZero's signature. Latent
        states and timesteps are not used: the world model has the roots' contexts and timesteps."""
        world_model = model.world_model
        if not isinstance(roots, Roots):
            self._search_in_ctree(roots, world_model, to_play_batch)
        elif can_be_in_arrays(world_model):
            self._search_in_arrays(roots, world_model)
        else:
            self._search_in_ctree(roots.in_ctree(), world_model, to_play_batch)
        return lightzero.searched()

    def problem(self, roots: Roots) -> Problem:
        """What roots that are prepared ask, as this object's next search."""
        prepared = roots.prepared
        assert prepared is not None
        slots, action_size = self._slots()
        number, self._searches = self._searches, self._searches + 1
        return Problem(
            rules=self._rules(), seed=torch.initial_seed(), number=number, simulations=self._cfg.num_simulations,
            slots=slots, action_size=action_size, rewards=prepared.rewards, logits=prepared.logits,
            legal=[[]] * roots.num if self.sampled else roots.legal_actions, noises=prepared.noises,
            noise_weight=prepared.noise_weight
        )

    def _search_in_arrays(self, roots: Roots, world_model: Any) -> None:
        problem = self.problem(roots)
        if world_model.weights_source.device().type != 'cpu':
            roots.take(*world_model.search_on_device(problem))
            return
        from ..search.tree import root_actions, root_values, root_visits  # with which numba is imported
        with world_model.search_whole(problem) as tree:
            roots.take(root_visits(tree), root_values(tree), root_actions(tree) if self.sampled else None)

    def _slots(self) -> Tuple[int, int]:
        """How many children a node has, and how many numbers an action that is drawn for it."""
        return self._cfg.model.action_space_size, 0

    def _rules(self) -> Dict[str, Any]:
        cfg = self._cfg
        return dict(
            pb_c_base=cfg.pb_c_base, pb_c_init=cfg.pb_c_init, discount_factor=cfg.discount_factor,
            value_delta_max=cfg.value_delta_max, two_players=cfg.env_type != 'not_board_games',
            draws_ties=lightzero.draws_ties(cfg)
        )

    # ---- in LightZero's tree -----------------------------------------------------------------------------------------

    def _traverse_options(self) -> Tuple[Any, ...]:
        return lightzero.traverse_options(self._cfg)

    def _depths(self, results: Any, path: List[int]) -> List[int]:
        return results.get_search_len()

    def _search_in_ctree(self, roots: Any, world_model: Any, to_play_batch: Any) -> None:
        cfg, tree, rows = self._cfg, self.tree, roots.num
        min_max_stats = tree.MinMaxStatsList(rows)
        min_max_stats.set_delta(cfg.value_delta_max)
        board_game = cfg.env_type != 'not_board_games'
        with torch.no_grad(), world_model.search_by_node(cfg.num_simulations) as expand:
            for simulation in range(cfg.num_simulations):
                results = tree.ResultsWrapper(num=rows)
                path, columns, actions, to_play = tree.batch_traverse(
                    roots, cfg.pb_c_base, cfg.pb_c_init, cfg.discount_factor, min_max_stats, results,
                    copy.deepcopy(to_play_batch) if board_game else to_play_batch, *self._traverse_options()
                )
                predicted = expand(
                    simulation, np.asarray(path), np.asarray(columns), np.asarray(actions), self._depths(results, path)
                )
                tree.batch_backpropagate(
                    simulation + 1, cfg.discount_factor, predicted[:, 0].tolist(), predicted[:, 1].tolist(),
                    predicted[:, 2:].tolist(), min_max_stats, results, to_play
                )


class NodeSearch(_NodeSearch, UniZeroMCTSCtree):
    """``UniZeroMCTSCtree`` by node."""
    tree = tree_muzero


class SampledNodeSearch(_NodeSearch, SampledUniZeroMCTSCtree):
    """``SampledUniZeroMCTSCtree`` by node."""
    tree = tree_sampled_muzero
    sampled = True

    def _slots(self) -> Tuple[int, int]:
        model = self._cfg.model
        return model.num_of_sampled_actions, model.action_space_size if model.continuous_action_space else 1

    def _rules(self) -> Dict[str, Any]:
        return dict(super()._rules(), sampled=True, continuous=bool(self._cfg.model.continuous_action_space),
                    index_for_depth=lightzero.INDEX_FOR_DEPTH)

    def _traverse_options(self) -> Tuple[Any, ...]:
        return (self._cfg.model.continuous_action_space,)

    def _depths(self, results: Any, path: List[int]) -> List[int]:
        return path if lightzero.INDEX_FOR_DEPTH else super()._depths(results, path)

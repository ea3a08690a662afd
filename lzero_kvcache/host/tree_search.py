"""LightZero's searches whose contexts need no key: latent states stay on the device and nothing is hashed.

The tree is in arrays on the model's device (``kv_cache_cfg.search='device'``), or LightZero's own in C++ ('tree').
"""
import copy
import types
from collections import defaultdict
from typing import Any, Callable, List, Sequence, Tuple

import numpy as np
import torch
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree, tree_muzero
from lzero.mcts.tree_search.mcts_ctree_sampled import SampledUniZeroMCTSCtree, tree_sampled_muzero

from ..search.array_search import Found, Problem
from ..search.open_steps import StepsOfThread
from ..search.tree_arrays import Rules
from .lightzero import lightzero
from .patches import with_globals


class Roots:
    """Stands in for LightZero's ``MCTSCtree.roots(num, legal_actions, ...)`` where the search is in arrays: it keeps
    the arguments of ``prepare``, and later the results. Lists by row."""

    def __init__(self, num: int, legal_actions: Sequence[Sequence[int]], *sampled: Any) -> None:
        self.num, self.legal_actions = num, legal_actions
        self.noise_weight, self.noises = 0.0, None  # type: float, Any
        self.found = Found([], [])

    def prepare(self, root_noise_weight: float, noises: Any, rewards: Sequence[float],
                logits: Sequence[Sequence[float]], to_play: Any) -> None:
        self.noise_weight, self.noises = root_noise_weight, noises
        self.prepare_no_noise(rewards, logits, to_play)

    def prepare_no_noise(self, rewards: Sequence[float], logits: Sequence[Sequence[float]], to_play: Any) -> None:
        self.rewards, self.logits = rewards, logits

    def legal_logits(self) -> List[List[float]]:
        return [[row[action] for action in legal] for row, legal in zip(self.logits, self.legal_actions)]

    def get_distributions(self) -> List[List[int]]:
        return self.found.visits

    def get_values(self) -> List[float]:
        return self.found.values

    def get_sampled_actions(self) -> Any:
        return self.found.actions


class _KeylessSearch:
    """The base of both searches."""
    _cfg: Any
    tree: Any
    sampled = False

    def __init__(self, cfg: Any, running: StepsOfThread, purpose: str) -> None:
        super().__init__(cfg)  # type: ignore[call-arg]
        self._running = running  # the open steps of its policy
        self._purpose = purpose  # 'collect', 'eval' or 'reanalysis'
        self._searches = 0

    def in_arrays(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A copy of a policy's step that makes :class:`Roots`; the step itself if a user has replaced its
        ``MCTSCtree``."""
        if getattr(forward, '__globals__', {}).get('MCTSCtree') not in type(self).__mro__:
            return forward
        return with_globals(forward, MCTSCtree=types.SimpleNamespace(roots=Roots))

    def search(self, roots: Any, model: Any, latent_state_roots: Any, to_play_batch: Any, timestep: Any = None,
               task_id: Any = None) -> Any:
        """Search from the roots of the policy's innermost open step, with LightZero's signature. Latent
        states and timesteps are not used: the world model has the roots' contexts and timesteps."""
        inference, step = model.world_model.inference, self._running.innermost
        if isinstance(roots, Roots):
            roots.found = inference.in_arrays.search(step, self.problem(roots, model.world_model))
            step.logits = roots.legal_logits
        else:
            self._search_in_ctree(roots, inference, step, to_play_batch)
        step.visits = roots.get_distributions()
        return defaultdict(lambda: defaultdict(lambda: None))  # latent states, which only text is decoded from

    def problem(self, roots: Roots, world_model: Any) -> Problem:
        """The problem of prepared roots, with the number of this object's next search."""
        slots, action_size = self._slots()
        number, self._searches = self._searches, self._searches + 1
        return Problem(
            rules=self._rules(), seed=world_model.seed_of(self._purpose), number=number,
            simulations=self._cfg.num_simulations, slots=slots, action_size=action_size, rewards=roots.rewards,
            logits=roots.logits, legal=[[]] * roots.num if self.sampled else roots.legal_actions, noises=roots.noises,
            noise_weight=roots.noise_weight
        )

    def _slots(self) -> Tuple[int, int]:
        """How many children a node has, and how many numbers an action that is drawn for it."""
        return self._cfg.model.action_space_size, 0

    def _rules(self) -> Rules:
        cfg = self._cfg
        base, init, discount, delta = np.array(
            [cfg.pb_c_base, cfg.pb_c_init, cfg.discount_factor, cfg.value_delta_max], np.float32)
        two_players = cfg.env_type != 'not_board_games'
        return Rules(base, init, discount, delta, two_players, draws_ties=lightzero.draws_ties(cfg))

    # ---- in LightZero's tree -----------------------------------------------------------------------------------------

    def _traverse_options(self) -> Tuple[Any, ...]:
        return lightzero.traverse_options(self._cfg)

    def _depths(self, results: Any, path: List[int]) -> List[int]:
        return results.get_search_len()

    def _search_in_ctree(self, roots: Any, inference: Any, step: Any, to_play_batch: Any) -> None:
        cfg, tree, rows = self._cfg, self.tree, roots.num
        min_max_stats = tree.MinMaxStatsList(rows)
        min_max_stats.set_delta(cfg.value_delta_max)
        board_game = cfg.env_type != 'not_board_games'
        with torch.no_grad(), inference.search_by_node(step, cfg.num_simulations) as expand:
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


class KeylessSearch(_KeylessSearch, UniZeroMCTSCtree):
    """``UniZeroMCTSCtree`` without keys."""
    tree = tree_muzero


class SampledKeylessSearch(_KeylessSearch, SampledUniZeroMCTSCtree):
    """``SampledUniZeroMCTSCtree`` without keys."""
    tree = tree_sampled_muzero
    sampled = True

    def _slots(self) -> Tuple[int, int]:
        model = self._cfg.model
        return model.num_of_sampled_actions, model.action_space_size if model.continuous_action_space else 1

    def _rules(self) -> Rules:
        continuous = bool(self._cfg.model.continuous_action_space)
        return super()._rules()._replace(
            sampled=True, continuous=continuous, index_for_depth=lightzero.INDEX_FOR_DEPTH)

    def _traverse_options(self) -> Tuple[Any, ...]:
        return (self._cfg.model.continuous_action_space,)

    def _depths(self, results: Any, path: List[int]) -> List[int]:
        return path if lightzero.INDEX_FOR_DEPTH else super()._depths(results, path)

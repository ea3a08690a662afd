"""LightZero's C++-tree searches whose contexts are found by node: latents stay on the device and nothing is hashed."""
import copy
from typing import Any, List, Tuple

import numpy as np
import torch
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree, tree_muzero
from lzero.mcts.tree_search.mcts_ctree_sampled import SampledUniZeroMCTSCtree, tree_sampled_muzero


class _NodeSearch:
    """
    Overview:
        What both searches share. The tree is LightZero's, and so is what it passes as depth.
    """
    tree: Any

    def _traverse_options(self) -> Tuple[Any, ...]:
        return ()

    def _depths(self, results: Any, path: List[int]) -> List[int]:
        return results.get_search_len()

    def search(self, roots: Any, model: Any, latent_state_roots: Any, to_play_batch: Any,
               timestep: Any) -> None:
        """
        Overview:
            Search from roots whose root inference the world model has just served.
        Arguments:
            - roots (:obj:`Any`): A batch of expanded root nodes.
            - model (:obj:`torch.nn.Module`): The model, in new mode.
            - latent_state_roots (:obj:`Any`): Unused: contexts and not latents are what a step needs.
            - to_play_batch (:obj:`Any`): The players, for board games.
            - timestep (:obj:`Any`): Unused: the root inference had it.
        """
        cfg, tree, rows = self._cfg, self.tree, roots.num  # type: ignore[attr-defined]
        min_max_stats = tree.MinMaxStatsList(rows)
        min_max_stats.set_delta(cfg.value_delta_max)
        board_game = cfg.env_type != 'not_board_games'
        with torch.no_grad(), model.world_model.search_by_node(cfg.num_simulations) as expand:
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
    """
    Overview:
        ``UniZeroMCTSCtree`` by node.
    """
    tree = tree_muzero


class SampledNodeSearch(_NodeSearch, SampledUniZeroMCTSCtree):
    """
    Overview:
        ``SampledUniZeroMCTSCtree`` by node.
    """
    tree = tree_sampled_muzero

    def _traverse_options(self) -> Tuple[Any, ...]:
        return (self._cfg.model.continuous_action_space,)

    def _depths(self, results: Any, path: List[int]) -> List[int]:
        return path

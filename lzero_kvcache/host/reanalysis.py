"""What LightZero's replay buffer reanalyzes, searched in arrays."""
import functools
from typing import Any, Callable

import numpy as np
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree

from .lightzero import lightzero
from .patches import with_globals
from .refused import has_own_inference
from .roots import Roots
from .tree_search import NodeSearch, can_be_in_arrays
from .world_model import NewWorldModel


class Reanalysis(NodeSearch):
    """What the buffer's method finds as ``MCTSCtree``."""

    @classmethod
    def roots(cls, num: int, legal_actions: Any) -> Roots:
        return Roots(UniZeroMCTSCtree.roots, num, legal_actions)

    def search(self, roots: Any, model: Any, latent_state_roots: Any, to_play_batch: Any, timestep: Any = None,
               task_id: Any = None) -> Any:
        world_model = model.world_model
        if not can_be_in_arrays(world_model):
            return UniZeroMCTSCtree.search(
                self, roots.in_ctree(), model, latent_state_roots, to_play_batch, timestep
            )
        latents = np.asarray(latent_state_roots, dtype=np.float32).reshape(roots.num, -1)
        roots.take(*world_model.reanalyze_whole(self.problem(roots), latents, timestep))


def in_arrays(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A buffer's ``_compute_target_policy_reanalyzed`` that searches in arrays where its model can be searched so."""

    @functools.wraps(compute)
    def run(buffer: Any, policy_re_context: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = compute
        if policy_re_context is not None and _is_served(buffer, model):
            found = with_globals(compute, MCTSCtree=Reanalysis)
        return found(buffer, policy_re_context, model, *args, **kwargs)

    return run


def _is_served(buffer: Any, model: Any) -> bool:
    world_model = model.world_model
    return (
        lightzero.COMPUTES_TARGETS and isinstance(world_model, NewWorldModel)
        and buffer._cfg.model.categorical_distribution and not has_own_inference(model)
        and world_model.searches_in_arrays('Reanalyzing')
    )

"""What LightZero's replay buffer reanalyzes, searched in arrays."""
import functools
from typing import Any, Callable

import numpy as np

from .lightzero import lightzero
from .patches import with_globals
from .refused import has_own_inference
from .tree_search import NodeSearch, Roots
from .world_model import NewWorldModel


class Reanalysis(NodeSearch):
    """What the buffer's method finds as ``MCTSCtree``."""

    roots = Roots

    def search(self, roots: Any, model: Any, latent_state_roots: Any, to_play_batch: Any, timestep: Any = None,
               task_id: Any = None) -> Any:
        latents = np.asarray(latent_state_roots, dtype=np.float32).reshape(roots.num, -1)
        roots.found = model.world_model.inference.reanalyze(self.problem(roots), latents, timestep)


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
        and buffer._cfg.model.categorical_distribution and not has_own_inference(model, 'recurrent')
        and world_model.searches_in_arrays('Reanalyzing')
    )

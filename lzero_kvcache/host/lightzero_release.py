"""What is of the released LightZero 0.2.0 alone."""
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from lzero.policy import inverse_scalar_transform
from torch import nn

from ..config import PREFIX
from .kept_rows import KeptRows

NAME = 'released 0.2.0'
SIGN = 'a block of its transformer has an mlp'
SERVED = 'all of UniZero and Sampled UniZero'

BESIDE_VERSION = ''
"""What tells it from the main branch, which has its number."""

POLICIES = ('unizero', 'sampled_unizero')
"""Policies that are served."""

RECURRENT_SLOTS = 'shared_pool_size'
"""Attribute of a world model that says how many contexts its recurrent pool has."""

ANGLES_GROW = False
"""Whether the table of rotary angles grows, or else angles repeat."""

KEEPS_REANALYSES = False
"""Whether contexts grow along the paths of a reanalysis of no more rows than environments."""

INDEX_FOR_DEPTH = True
"""Whether the sampled search has a node's index in the search path for its depth."""

OWN_TARGETS = ('use_root_value', )
"""Options of a policy with which LightZero's own code computes target values."""

HAS_MANAGER = False
"""Whether LightZero has a new manager of its own."""

DIVIDE_EMBEDDING = ('num_heads', 'group_size')
"""Sizes of a world model that must divide its embedding."""

UNROLLS_WITHIN_BLOCKS = True
"""Whether a world model must have as many blocks as a training batch has steps."""

UPDATES_AT_LEAST_ONCE = False
"""Whether a collection is followed by an update, whatever ``replay_ratio`` is."""

POLICY_FIELDS = ('collect',)
"""What a policy must be built for to collect."""

SUPPORT = 'policy.model.support_scale'
"""What a world model's ``support_size`` follows from."""

SCALES: Tuple[str, ...] = (SUPPORT, )
"""Options that are whole numbers, of any type."""

NEVER_CAUSES = ('last_obs', )
"""Causes that validation knows of wrong answers of LightZero's own caching, which this one does not have."""


def mlp_of(block: Any) -> nn.Module:
    return block.mlp


def angles_of(config: Any) -> int:
    """Rotary angles that there are before they repeat."""
    return config.max_seq_len


def values_of(logits: torch.Tensor, cfg: Any) -> torch.Tensor:
    """Target values ``[B, 1]`` from logits ``[B, S]``, as a policy's config has it."""
    return inverse_scalar_transform(logits, cfg.model.support_scale)


def searching_at_once(buffer: Any, mcts: Any) -> Any:
    """A replay buffer that searches all roots of a reanalysis at once, as it does."""
    return buffer


def unserved_of(config: Any) -> Iterator[str]:
    """Options of a ``world_model_cfg`` that change what a context is, and that the new cache does not know."""
    return iter(())


def unbuilt_of(config: Any) -> Optional[str]:
    """An option of a ``world_model_cfg`` with which LightZero builds no world model, in any system."""
    return None


def unserved_policy(cfg: Any) -> Optional[str]:
    """Why a policy cannot have the new cache."""
    return None


def unserved_models() -> Iterator[Tuple[type, str, str]]:
    """Models that have LightZero's own caching: the class, its registered name, and why the new cache has none."""
    return iter(())


def simulations_of(cfg: Any) -> int:
    """Simulations of a policy's longest search."""
    return cfg['num_simulations']


def support_size(scale: Any) -> Any:
    """How many numbers a support has."""
    return 2 * scale + 1


def least_environments(policy: str) -> Tuple[Tuple[str, str], ...]:
    """Numbers of environments of which the first is at least the second in every training of a policy. The world model
    is given a row for each environment that the policy has."""
    return tuple((f'{PREFIX}.env_num', f'policy.{kind}_env_num') for kind in ('collector', 'evaluator'))


# ---- a model ---------------------------------------------------------------------------------------------------------


def world_model_of(model: Any, module: Any) -> type:
    """The class of the world model that a model, which is of a module, makes."""
    return module.WorldModel


def with_world_model(model: Any, kind: type) -> Dict[str, type]:
    """Globals with which a model's constructor makes a world model of another class."""
    return {'WorldModel': kind}


def grow_recurrent_pool(world_model: Any) -> None:
    """Let a world model's recurrent pool never begin anew."""
    world_model.shared_pool_size = 2 ** 62


# ---- a step of a policy ----------------------------------------------------------------------------------------------


def environments_of(ready: Any) -> List[int]:
    """The environment of each row, from what a worker passes as ready."""
    return [int(env_id) for env_id in ready]


def hand_rows(policy: Any, mode: str, env_ids: Sequence[int], observations: torch.Tensor, actions: List[Any]) -> None:
    """Give a policy the last observations and actions of the rows of its next batch."""
    policy.last_batch_obs, policy.last_batch_action = observations, actions


def kept_rows(policy: Any) -> KeptRows:
    """For what a policy keeps between steps; nothing yet."""
    return KeptRows()


def traverse_options(cfg: Any) -> Tuple[Any, ...]:
    """Arguments that UniZero's tree takes after all others."""
    return ()


def draws_ties(cfg: Any) -> bool:
    """Whether a search draws one of the actions with equal scores, or else takes the first."""
    return True

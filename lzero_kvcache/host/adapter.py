"""Everything that differs between the supported LightZero versions, with the values of the released 0.2.0."""
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from lzero.policy import inverse_scalar_transform

from ..config import PREFIX
from .kept_rows import KeptRows


class Adapter:
    """The released LightZero 0.2.0; a subclass overrides what differs in another version."""

    NAME = 'released 0.2.0'
    SIGN = 'a block of its transformer has an mlp'
    SERVED = 'all of UniZero and Sampled UniZero'

    BESIDE_VERSION = ''
    """Suffix of the version number, which both versions share."""

    MLP = 'mlp'
    """Attribute of a transformer's block that is its MLP."""

    POLICIES: Tuple[str, ...] = ('unizero', 'sampled_unizero')
    """Policies that can have the new cache."""

    RECURRENT_SLOTS = 'shared_pool_size'
    """Attribute of a world model that says how many contexts its recurrent pool has."""

    ANGLES_GROW = False
    """Whether the table of rotary angles grows, or else angles repeat."""

    KEEPS_REANALYSES = False
    """Whether contexts grow along the paths of a reanalysis of no more rows than environments."""

    INDEX_FOR_DEPTH = True
    """Whether the sampled search has a node's index in the search path for its depth."""

    OWN_TARGETS = ('use_root_value', 'bootstrap_value_context')
    """Options of a policy with which LightZero's own code computes target values."""

    HAS_MANAGER = False
    """Whether LightZero has a new manager of its own."""

    DIVIDE_EMBEDDING: Tuple[str, ...] = ('num_heads', 'group_size')
    """Sizes of a world model that must divide its embedding."""

    UNROLLS_WITHIN_BLOCKS = True
    """Whether a world model must have as many blocks as a training batch has steps."""

    UPDATES_AT_LEAST_ONCE = False
    """Whether a collection is followed by an update, whatever ``replay_ratio`` is."""

    ADDS_UP_STEPS = True
    """Whether collectors count what all processes have collected."""

    POLICY_BASE: type = object
    """A mixin that the plugin's policies inherit before LightZero's class."""

    POLICY_FIELDS: Tuple[str, ...] = ('collect', )
    """The fields, in DI-engine's sense, that a policy needs to collect."""

    SUPPORT = 'policy.model.support_scale'
    """The option that determines a world model's ``support_size``."""

    SCALES: Tuple[str, ...] = (SUPPORT, )
    """Options that are whole numbers, of any type."""

    NEVER_CAUSES: Tuple[str, ...] = ('last_obs', )
    """Validation's causes of wrong answers that do not occur in this version's own caching."""

    def mlp_of(self, block: Any) -> Any:
        return getattr(block, self.MLP)

    def angles_of(self, config: Any) -> int:
        """Rotary angles that there are before they repeat."""
        return 2 ** 62 if self.ANGLES_GROW else config.max_seq_len

    def longer_table(self, transformer: Any, first: int, last: int) -> Optional[torch.Tensor]:
        """A longer table of rotary angles, where they grow and the transformer's ends before the last one."""
        return None

    def values_of(self, logits: torch.Tensor, cfg: Any) -> torch.Tensor:
        """Target values ``[B, 1]`` from logits ``[B, S]``, as a policy's config has it."""
        return inverse_scalar_transform(logits, cfg.model.support_scale)

    def searching_at_once(self, buffer: Any, mcts: Any) -> Any:
        """A replay buffer that gives ``mcts`` all roots of a reanalysis at once. None where a user's method
        does that."""
        return buffer

    def unserved_of(self, config: Any) -> Iterator[str]:
        """Options of a ``world_model_cfg`` that change what a context is, and that the new cache does not know."""
        return iter(())

    def unbuilt_of(self, config: Any) -> Optional[str]:
        """An option of a ``world_model_cfg`` with which LightZero builds no world model, in any system."""
        return None

    def unserved_policy(self, cfg: Any) -> Optional[str]:
        """Why a policy cannot have the new cache."""
        return None

    def unserved_models(self) -> Iterator[Tuple[type, str, str]]:
        """Models that have LightZero's own caching: the class, its registered name, and why the new cache has none."""
        return iter(())

    def simulations_of(self, cfg: Any) -> int:
        """Simulations of a policy's longest search."""
        return cfg['num_simulations']

    def support_size(self, scale: Any) -> Any:
        """How many numbers a support has, by the option ``SUPPORT``."""
        return 2 * scale + 1

    def least_environments(self, policy: str) -> Tuple[Tuple[str, str], ...]:
        """Numbers of environments of which the first is at least the second in every training of a policy. The world
        model is given a row for each environment that the policy has."""
        return tuple((f'{PREFIX}.env_num', f'policy.{kind}_env_num') for kind in ('collector', 'evaluator'))

    # ---- a model -----------------------------------------------------------------------------------------------------

    def world_model_of(self, model: Any, module: Any) -> type:
        """The class of the world model that a model, which is of a module, makes."""
        return module.WorldModel

    def with_world_model(self, model: Any, kind: type) -> Dict[str, type]:
        """Globals with which a model's constructor makes a world model of another class."""
        return {'WorldModel': kind}

    def grow_recurrent_pool(self, world_model: Any) -> None:
        """Let a world model's recurrent pool never begin anew."""
        setattr(world_model, self.RECURRENT_SLOTS, 2 ** 62)

    # ---- a step of a policy ------------------------------------------------------------------------------------------

    def environments_of(self, ready: Any) -> List[int]:
        """The environment of each row, from what a worker passes as ready."""
        return [int(env_id) for env_id in ready]

    def hand_rows(self, policy: Any, mode: str, env_ids: Sequence[int], observations: torch.Tensor,
                  actions: List[Any]) -> None:
        """Give a policy the last observations and actions of the rows of its next batch."""
        policy.last_batch_obs, policy.last_batch_action = observations, actions

    def kept_rows(self, policy: Any) -> KeptRows:
        """A place, empty at first, for the rows that a policy keeps between steps."""
        return KeptRows()

    def traverse_options(self, cfg: Any) -> Tuple[Any, ...]:
        """Arguments that UniZero's tree takes after all others."""
        return ()

    def draws_ties(self, cfg: Any) -> bool:
        """Whether a search draws one of the actions with equal scores, or else takes the first."""
        return True

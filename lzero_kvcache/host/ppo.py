"""UniZero with PPO, which LightZero's main branch has: its policy, its model, and a world model for each system."""
from ding.utils import MODEL_REGISTRY, POLICY_REGISTRY
from lzero.model import unizero_model, unizero_ppo_model
from lzero.model.unizero_world_models.ppo_world_model import PPOWorldModel
from lzero.policy.unizero_ppo import UniZeroPPOPolicy as LightZeroUniZeroPPOPolicy

from ..registry import register_in_place_of
from .lightzero_manager import ManagerWorldModel
from .models import KVCacheModel
from .old_world_model import OldWorldModel
from .policies import KVCachePolicy
from .tree_search import KeylessSearch
from .world_model import NewWorldModel


class OldPPOWorldModel(OldWorldModel, PPOWorldModel):
    """
    Overview:
        LightZero's ``PPOWorldModel`` with its own caching; otherwise as :class:`OldWorldModel`.
    """


class ManagerPPOWorldModel(ManagerWorldModel, PPOWorldModel):
    """LightZero's with its own new manager."""


class NewPPOWorldModel(NewWorldModel, PPOWorldModel):
    """
    Overview:
        LightZero's ``PPOWorldModel`` over pages, as :class:`NewWorldModel`; PPO's loss is LightZero's.
    """


class UniZeroPPOModel(KVCacheModel, unizero_ppo_model.UniZeroPPOModel):
    """
    Overview:
        LightZero's ``UniZeroPPOModel``, whose world model ``world_model_cfg.use_new_cache_manager`` picks. A subclass
        may set the classes that it picks from: ``new_world_model``, which derives from ``NewPPOWorldModel``, and
        ``old_world_model``, which derives from ``OldPPOWorldModel``.
    Raises:
        - ConfigError: The flag is on and LightZero's module has somebody's own world model, or an option is wrong.
    """
    module, replaced = unizero_model, PPOWorldModel
    old_world_model, manager_world_model, new_world_model = OldPPOWorldModel, ManagerPPOWorldModel, NewPPOWorldModel


class UniZeroPPOPolicy(KVCachePolicy, LightZeroUniZeroPPOPolicy):
    """
    Overview:
        LightZero's ``UniZeroPPOPolicy`` with the plugin's options and counts and, with the flag on, contexts that
        belong to environments. A subclass may set ``config``, whose keys go over LightZero's defaults.
    Raises:
        - ConfigError: The config cannot be run, or with the flag on not by the new cache.
    """
    keyless_search = KeylessSearch


register_in_place_of(unizero_ppo_model.UniZeroPPOModel, MODEL_REGISTRY, 'UniZeroPPOModel', UniZeroPPOModel)
register_in_place_of(LightZeroUniZeroPPOPolicy, POLICY_REGISTRY, 'unizero_ppo', UniZeroPPOPolicy)

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
    """LightZero's with its own caching."""


class ManagerPPOWorldModel(ManagerWorldModel, PPOWorldModel):
    """LightZero's with its own new manager."""


class NewPPOWorldModel(NewWorldModel, PPOWorldModel):
    """LightZero's over pages; PPO's loss is LightZero's."""


class UniZeroPPOModel(KVCacheModel, unizero_ppo_model.UniZeroPPOModel):
    """LightZero's ``UniZeroPPOModel``; ``world_model_cfg.use_new_cache_manager`` picks ``new_world_model`` or
    ``old_world_model``, which a subclass may name its own world models by."""
    module, replaced = unizero_model, PPOWorldModel
    old_world_model, manager_world_model, new_world_model = OldPPOWorldModel, ManagerPPOWorldModel, NewPPOWorldModel


class UniZeroPPOPolicy(KVCachePolicy, LightZeroUniZeroPPOPolicy):
    """LightZero's ``UniZeroPPOPolicy`` with the plugin."""
    keyless_search = KeylessSearch


register_in_place_of(unizero_ppo_model.UniZeroPPOModel, MODEL_REGISTRY, 'UniZeroPPOModel', UniZeroPPOModel)
register_in_place_of(LightZeroUniZeroPPOPolicy, POLICY_REGISTRY, 'unizero_ppo', UniZeroPPOPolicy)

"""LightZero's models with a world model of either system, picked by ``world_model_cfg``."""
import inspect
from typing import Any, Dict, Optional, Set, Type

from ding.utils import MODEL_REGISTRY
from lzero.model import sampled_unizero_model, unizero_model
from lzero.model.unizero_world_models.tokenizer import Tokenizer
from lzero.model.unizero_world_models.world_model import WorldModel
from torch import nn

from ..config import FLAG, LIGHTZERO, PREFIX, ConfigError, picked_system
from ..registry import register_in_place_of
from .lightzero import lightzero
from .old_world_model import OldWorldModel
from .patches import with_globals
from .root_level import set_as_lightzero_does
from .weights import walked
from .world_model import NewWorldModel

_MANAGER_WORLD_MODEL: Optional[type] = None
if lightzero.HAS_MANAGER:
    from .lightzero_manager import ManagerWorldModel
    _MANAGER_WORLD_MODEL = ManagerWorldModel


class KVCacheModel(nn.Module):
    """What the plugin adds to a LightZero UniZero model: it picks the world model. ``module`` is LightZero's, which has
    the model's constructor, and ``replaced`` the world model that this makes."""
    module: Any
    replaced: type = WorldModel
    old_world_model: Any = OldWorldModel
    manager_world_model: Any = _MANAGER_WORLD_MODEL
    new_world_model: Any = NewWorldModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Run LightZero's constructor with a world model of ours under the name by which it builds its own."""
        set_as_lightzero_does()
        init, module = super().__init__.__func__, self.module  # type: ignore[attr-defined]
        config = _world_model_cfg(self, init, args, kwargs)
        system = picked_system(config)
        names: Dict[str, type] = {}
        named = lightzero.world_model_of(self, module)
        if named is self.replaced:
            picked = {'old': self.old_world_model, 'new': self.new_world_model, LIGHTZERO: self.manager_world_model}
            names = lightzero.with_world_model(self, picked[system])
        elif system == 'new':  # a user's world model, which has LightZero's own caching
            raise ConfigError(
                f'{PREFIX}.{FLAG}=True, but {module.__name__}.WorldModel is {named.__module__}.'
                f'{named.__qualname__}: derive it from lzero_kvcache.host.world_model.NewWorldModel, and name '
                f'it as {type(self).__name__}.new_world_model'
            )
        if config.obs_type == 'image_memory' and module.Tokenizer is Tokenizer:
            names['Tokenizer'] = MemoryTokenizer
        with_globals(init, **names)(self, *args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """
        Overview:
            As PyTorch's, but that a mode which all modules are in is not set again: LightZero asks for evaluation mode
            at each step, and setting it anew takes longer than the bookkeeping of a root inference.
        Arguments:
            - mode (:obj:`bool`): Training mode, or else evaluation mode.
        Returns:
            - model (:obj:`Any`): The model itself.
        """
        is_new = isinstance(self._modules.get('world_model'), NewWorldModel)
        return self if is_new and _is_in_mode(self, mode) else super().train(mode)


def _is_in_mode(model: nn.Module, mode: bool) -> bool:
    """Whether to set the mode would change nothing: all modules are in it, and none does more than note it."""
    modules = walked(model._modules.values())
    kinds: Set[Type[nn.Module]] = set(map(type, modules))
    return (model.training is mode and all(kind.train is nn.Module.train for kind in kinds)
            and all(module.training is mode and 'train' not in module.__dict__ for module in modules))


def _world_model_cfg(model: Any, init: Any, args: Any, kwargs: Any) -> Any:
    return inspect.signature(init).bind(model, *args, **kwargs).arguments['world_model_cfg']


def _unserved(original: Any, why: str) -> type:
    """LightZero's model, which refuses our flag: its own constructor would take it for LightZero's manager."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if picked_system(_world_model_cfg(self, original.__init__, args, kwargs)) == 'new':
            raise ConfigError(
                f'{PREFIX}.{FLAG}=True, but {original.__name__} is not served: {why}; set {FLAG}=False for the old '
                f"system, or kv_cache_cfg.type='{LIGHTZERO}' for LightZero's own new manager"
            )
        original.__init__(self, *args, **kwargs)

    return type(original.__name__, (original, ), {'__init__': init, '__module__': __name__})


class MemoryTokenizer(Tokenizer):
    """LightZero's tokenizer with an empty perceptual loss in place of none: LightZero's models for 'image_memory' count
    its parameters, and cannot be constructed without one."""
    lpips: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.lpips is None:
            self.lpips = nn.Identity()


class UniZeroModel(KVCacheModel, unizero_model.UniZeroModel):
    """
    Overview:
        LightZero's ``UniZeroModel``, whose world model ``world_model_cfg.use_new_cache_manager`` picks. A subclass may
        set the classes that it picks from: ``new_world_model``, which derives from ``NewWorldModel``, and
        ``old_world_model``, which derives from ``OldWorldModel``.
    Raises:
        - ConfigError: The flag is on and LightZero's module has somebody's own world model, or an option is wrong.
    """
    module = unizero_model


class SampledUniZeroModel(KVCacheModel, sampled_unizero_model.SampledUniZeroModel):
    """
    Overview:
        LightZero's ``SampledUniZeroModel``, whose world model ``world_model_cfg.use_new_cache_manager`` picks. A
        subclass may set the classes that it picks from: ``new_world_model``, which derives from ``NewWorldModel``, and
        ``old_world_model``, which derives from ``OldWorldModel``.
    Raises:
        - ConfigError: The flag is on and LightZero's module has somebody's own world model, or an option is wrong.
    """
    module = sampled_unizero_model


register_in_place_of(unizero_model.UniZeroModel, MODEL_REGISTRY, 'UniZeroModel', UniZeroModel)
register_in_place_of(
    sampled_unizero_model.SampledUniZeroModel, MODEL_REGISTRY, 'SampledUniZeroModel', SampledUniZeroModel
)
for unserved, name, why in lightzero.unserved_models():
    globals()[unserved.__name__] = refusing = _unserved(unserved, why)  # pickle looks for it here
    register_in_place_of(unserved, MODEL_REGISTRY, name, refusing)

"""LightZero's models with a world model of either system, picked by ``world_model_cfg``."""
import inspect
from contextlib import contextmanager
from typing import Any, Iterator

import torch
from ding.utils import MODEL_REGISTRY
from lzero.model import sampled_unizero_model, unizero_model
from lzero.model.unizero_world_models.tokenizer import Tokenizer
from lzero.model.unizero_world_models.world_model import WorldModel

from ..config import FLAG, PREFIX, CacheConfig, ConfigError
from ..registry import KV_CACHE_REGISTRY, register_in_place_of
from .old_world_model import OldWorldModel
from .world_model import NewWorldModel


@contextmanager
def _world_model_of(model: Any, module: Any, init: Any, args: Any, kwargs: Any) -> Iterator[None]:
    """LightZero's models build ``WorldModel`` by the name in their own module; put ours there for that moment."""
    config = inspect.signature(init).bind(model, *args, **kwargs).arguments['world_model_cfg']
    options = CacheConfig.read(config, KV_CACHE_REGISTRY)
    originals = module.WorldModel, module.Tokenizer
    if module.WorldModel is WorldModel:
        module.WorldModel = model.new_world_model if options.use_new else model.old_world_model
    elif options.use_new:  # somebody's own, which has LightZero's own caching
        raise ConfigError(
            f'{PREFIX}.{FLAG}=True, but {module.__name__}.WorldModel is {module.WorldModel.__module__}.'
            f'{module.WorldModel.__qualname__}: derive it from lzero_kvcache.host.world_model.NewWorldModel, and name '
            f'it as {type(model).__name__}.new_world_model'
        )
    if config.obs_type == 'image_memory' and module.Tokenizer is Tokenizer:
        module.Tokenizer = MemoryTokenizer
    try:
        yield
    finally:
        module.WorldModel, module.Tokenizer = originals


class MemoryTokenizer(Tokenizer):
    """
    Overview:
        LightZero's tokenizer with a perceptual loss of no parameters in place of none: LightZero's own models for
        'image_memory' count them, and cannot be constructed without.
    """
    lpips: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.lpips is None:
            self.lpips = torch.nn.Identity()


class UniZeroModel(unizero_model.UniZeroModel):
    """
    Overview:
        LightZero's ``UniZeroModel``; ``world_model_cfg.use_new_cache_manager`` picks ``new_world_model`` or
        ``old_world_model``, which a subclass may name its own world models by.
    """
    old_world_model: Any = OldWorldModel
    new_world_model: Any = NewWorldModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        init = unizero_model.UniZeroModel.__init__
        with _world_model_of(self, unizero_model, init, args, kwargs):
            super().__init__(*args, **kwargs)


class SampledUniZeroModel(sampled_unizero_model.SampledUniZeroModel):
    """
    Overview:
        LightZero's ``SampledUniZeroModel``; ``world_model_cfg.use_new_cache_manager`` picks ``new_world_model`` or
        ``old_world_model``, which a subclass may name its own world models by.
    """
    old_world_model: Any = OldWorldModel
    new_world_model: Any = NewWorldModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        init = sampled_unizero_model.SampledUniZeroModel.__init__
        with _world_model_of(self, sampled_unizero_model, init, args, kwargs):
            super().__init__(*args, **kwargs)


register_in_place_of(unizero_model.UniZeroModel, MODEL_REGISTRY, 'UniZeroModel', UniZeroModel)
register_in_place_of(
    sampled_unizero_model.SampledUniZeroModel, MODEL_REGISTRY, 'SampledUniZeroModel', SampledUniZeroModel
)

"""Small world models with random weights, LightZero's own and those of the plugin. No test lives here."""
import contextlib
import copy
import functools
import io
import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence, Tuple
from unittest import mock

import lzero.model.sampled_unizero_model as sampled_unizero_model
import lzero.model.unizero_model as unizero_model
import pytest
import torch
import torch.nn as nn
from ding.utils import MODEL_REGISTRY
from easydict import EasyDict
from hypothesis import strategies as st
from lzero.model.common import SimNorm
from lzero.model.unizero_world_models.tokenizer import Tokenizer
from lzero.policy import DiscreteSupport, InverseScalarTransform
from lzero.policy.unizero import UniZeroPolicy

#: Whether LightZero is its main branch, whose gated layers, models for text and for 'image_memory' cannot be
#: constructed, and whose rotary angles do not wrap.
ON_MAIN = hasattr(unizero_model.UniZeroModel, 'world_model_cls')
ON_RELEASE_ALONE = pytest.mark.skipif(ON_MAIN, reason="LightZero's main branch cannot construct it")
ON_MAIN_ALONE = pytest.mark.skipif(not ON_MAIN, reason="of LightZero's main branch")

BOTH_POSITIONS = pytest.mark.parametrize('rotary', [False, True], ids=['learned', 'rotary'])
BOTH_ACTIONS = pytest.mark.parametrize('continuous', [False, True], ids=['discrete', 'continuous'])

#: Shape of one observation, by ``obs_type``; a text observation is a row of token ids.
OBS_SHAPES = {'vector': (5, ), 'image': (3, 64, 64), 'image_memory': (3, 5, 5), 'text': (7, )}
VOCABULARY = 23

#: Size of random weights. Larger ones make answers depend chaotically on rounding; smaller ones, less on the context.
GAIN = 0.7

#: LightZero's own classes, bound before any plugin can replace them in the registry.
ORIGINAL_MODELS = {
    'UniZeroModel': unizero_model.UniZeroModel,
    'SampledUniZeroModel': sampled_unizero_model.SampledUniZeroModel,
}


def adapter() -> Any:
    """What is of the LightZero that is installed. Imported late, since this module is used without the plugin too."""
    from lzero_kvcache.host.lightzero import lightzero
    return lightzero


@dataclass(frozen=True)
class Case:
    """
    The make of a model, a small one: each head of LightZero's world model precomputes ``max_tokens ** 2`` slices.
    ``equal_latents`` leaves the last layer of the latent head at zero, as in a fresh model, where all predicted latent
    states are equal; ``unroll`` is how many time steps a full forward (reanalysis) must hold.
    """
    rotary: bool = False
    num_layers: int = 2
    num_heads: int = 2
    embed_dim: int = 32
    context_length: int = 8
    gru_gating: bool = False
    continuous: bool = False
    sampled: bool = False
    obs_type: str = 'vector'
    encoder_type: str = 'resnet'
    action_space_size: int = 3
    max_seq_len: int = 8192
    equal_latents: bool = False
    unroll: int = 3

    @property
    def model_name(self) -> str:
        """The name under which LightZero registers the model."""
        return 'SampledUniZeroModel' if self.sampled or self.continuous else 'UniZeroModel'

    @property
    def obs_shape(self) -> Tuple[int, ...]:
        """The shape of one observation."""
        return OBS_SHAPES[self.obs_type]


class SmallTextEncoder(nn.Module):
    """Stands in for LightZero's language encoder, which wants pretrained weights: mean of embeddings, one layer."""

    def __init__(self, model_path: str = '', embedding_size: int = 32, group_size: int = 8, **kwargs: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, embedding_size)
        self.linear = nn.Linear(embedding_size, embedding_size)
        self.norm = SimNorm(simnorm_dim=group_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(self.embedding(x).mean(dim=1)))


class TokenizerWithEmptyLpips(Tokenizer):
    """
    For 'image_memory' LightZero's UniZeroModel counts the parameters of ``tokenizer.lpips``, which it made None, and
    SampledUniZeroModel wants torchvision for it. Inference never touches it, so an empty module serves both.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, 'with_lpips': False})
        self.lpips = nn.Identity()


@contextlib.contextmanager
def _constructible(case: Case) -> Iterator[None]:
    """Silence LightZero's constructors, and hand them what an observation type wants but a test cannot have."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if case.obs_type == 'text':
            stack.enter_context(mock.patch.object(unizero_model, 'HFLanguageRepresentationNetwork', SmallTextEncoder))
        if case.encoder_type == 'vit':
            whole = unizero_model.ViTConfig
            stack.enter_context(mock.patch.object(unizero_model, 'ViTConfig', lambda **given: whole(
                **{**given, 'dim': 32, 'depth': 1, 'heads': 2, 'mlp_dim': 64})))
        if case.obs_type in ('image', 'image_memory'):
            for module in (unizero_model, sampled_unizero_model):
                stack.enter_context(mock.patch.object(module, 'Tokenizer', TokenizerWithEmptyLpips))
            from lzero_kvcache.host import models  # here, since this module is also imported where the plugin is not
            stack.enter_context(mock.patch.object(models, 'MemoryTokenizer', TokenizerWithEmptyLpips))
        yield


def random_cases(context_lengths: Sequence[int], **others: Any) -> Any:
    """A hypothesis strategy of cases of all kinds."""
    return st.builds(
        Case, rotary=st.booleans(), num_layers=st.integers(1, 3), num_heads=st.sampled_from([1, 2, 4]),
        context_length=st.sampled_from(context_lengths), gru_gating=st.just(False) if ON_MAIN else st.booleans(),
        continuous=st.booleans(), max_seq_len=st.sampled_from([32, 8192]), **others
    )


def world_model_cfg(case: Case, env_num: int, **overrides: Any) -> EasyDict:
    """A ``world_model_cfg`` with the keys and values of LightZero's default one, but for the case's shape."""
    blocks = max(case.context_length // 2, case.unroll)
    cfg = copy.deepcopy(UniZeroPolicy.config['model']['world_model_cfg'])
    cfg.update(
        continuous_action_space=case.continuous,
        max_blocks=blocks,
        max_tokens=2 * blocks,
        context_length=case.context_length,
        gru_gating=case.gru_gating,
        device='cpu',
        action_space_size=case.action_space_size,
        num_layers=case.num_layers,
        num_heads=case.num_heads,
        embed_dim=case.embed_dim,
        support_size=11,
        env_num=env_num,
        num_simulations=64,
        obs_type=case.obs_type,
        encoder_type=case.encoder_type,
        rotary_emb=case.rotary,
        max_seq_len=case.max_seq_len,
    )
    if case.continuous:
        cfg.update(sigma_type='conditioned', bound_type=None, fixed_sigma_value=0.3, policy_loss_type='kl')
    cfg.update(overrides)
    return EasyDict(cfg)


def construct(model_class: type, case: Case, env_num: int, **overrides: Any) -> nn.Module:
    """Construct a model of a class as a policy would, and put it into evaluation mode."""
    obs_shape = case.obs_shape[0] if case.obs_type == 'vector' else case.obs_shape
    with _constructible(case):
        model = model_class(
            observation_shape=obs_shape,
            action_space_size=case.action_space_size,
            world_model_cfg=world_model_cfg(case, env_num, **overrides),
            encoder_url='none',
        )
    return model.eval()


def randomise(model: nn.Module, case: Case, seed: int) -> nn.Module:
    """
    Replace all weights by random ones under which latent states differ from node to node and every answer depends
    on its whole context. (A fresh model will not do: the last layers of its heads are zero, and its weights of
    size 0.02 make attention almost uniform.)
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float, mean: float = 0.) -> None:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            normal(module.weight, GAIN / math.sqrt(module.weight[0].numel()))
            if module.bias is not None:
                normal(module.bias, 0.1)
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 0.7)
        elif isinstance(module, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)):
            normal(module.weight, 0.1, mean=1.)
            normal(module.bias, 0.1)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            normal(module.running_mean, 0.1)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
        elif type(module).__name__ == 'GRUGatingUnit':
            normal(module.bg, 0.1, mean=0.5)  # LightZero's 2 nearly closes the gates
    if case.equal_latents:
        last_layer = [m for m in model.world_model.head_observations.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.zeros_(last_layer.weight)
        nn.init.zeros_(last_layer.bias)
    return model


@functools.lru_cache(maxsize=None)
def _prototype(case: Case, env_num: int) -> nn.Module:
    return construct(ORIGINAL_MODELS[case.model_name], case, env_num)


def original_model(case: Case, env_num: int, seed: int) -> nn.Module:
    """LightZero's own model, as it is, with random weights and position differences made from these weights."""
    model = randomise(copy.deepcopy(_prototype(case, env_num)), case, seed)
    if not case.rotary:
        model.world_model.precompute_pos_emb_diff_kv()
    return model


def cached_model(case: Case, env_num: int, seed: int, **overrides: Any) -> nn.Module:
    """The registered model in new mode, with the weights of ``original_model`` of the same case and seed."""
    model_class = MODEL_REGISTRY.get(case.model_name)
    model = construct(model_class, case, env_num, use_new_cache_manager=True, **overrides)
    model.load_state_dict(original_model(case, 1, seed).state_dict())
    return model


def to_scalar(support: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """LightZero's transform of logits over numbers from ``-support`` to ``support`` to scalars."""
    if ON_MAIN:
        return InverseScalarTransform(DiscreteSupport(-support, support + 1, 1), True)
    transform = InverseScalarTransform(support, 'cpu', True)
    # As probabilities, since it takes logits that happen to sum up to 1 for such.
    return lambda logits: transform(logits.softmax(-1))


def altered(source: Any, **functions: Callable[..., Any]) -> Any:
    """A model's source of weights, some of whose functions are others."""
    source = copy.copy(source)
    vars(source).update(functions)
    return source

"""LightZero's policies with the plugin's configuration, counts and, in new mode, contexts that belong to environments.

LightZero keeps the last observations and actions as rows of a batch, shared by collection and evaluation; new mode
keeps them for each (mode, environment) and lays the rows out for LightZero's own code to run on.
"""
import copy
import inspect
import logging
import math
import numbers
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from ding.utils import POLICY_REGISTRY, deep_merge_dicts
from easydict import EasyDict
from lzero.policy import utils as lightzero_utils
from lzero.policy.sampled_unizero import SampledUniZeroPolicy as LightZeroSampledUniZeroPolicy
from lzero.policy.unizero import UniZeroPolicy as LightZeroUniZeroPolicy
from scipy.special import entr

from ..cache.manager import COLLECT, EVAL
from ..cache.stats import Timing
from ..config import FLAG, PREFIX, ConfigError, settle
from ..registry import KV_CACHE_REGISTRY, register_in_place_of
from ..telemetry import HOOK_CONFIG, HOOK_KEY
from .refused import check_served, is_own
from .tree_search import NodeSearch, SampledNodeSearch

logger = logging.getLogger(__name__)


class LastSteps:
    """
    Overview:
        The last observation and action of each environment that is inside an episode.
    """

    def __init__(self) -> None:
        self._steps: Dict[int, Tuple[torch.Tensor, Any]] = {}

    def __contains__(self, env_id: int) -> bool:
        return env_id in self._steps

    def rows(self, env_ids: Sequence[int], observations: torch.Tensor) -> Tuple[torch.Tensor, List[Any]]:
        """
        Overview:
            What LightZero calls ``last_batch_obs`` and ``last_batch_action``, for the environments of this batch.
        Arguments:
            - env_ids (:obj:`Sequence[int]`): The environment of each row.
            - observations (:obj:`torch.Tensor`): Their current observations ``[B, ...]``.
        Returns:
            - last_obs (:obj:`torch.Tensor`): ``[B, ...]``, zeros where an episode starts.
            - last_action (:obj:`List[Any]`): ``B`` actions, -1 where an episode starts.
        """
        fresh = (torch.zeros_like(observations[0]), -1)
        steps = [self._steps.get(env_id, fresh) for env_id in env_ids]
        return torch.stack([obs for obs, _ in steps]), [action for _, action in steps]

    def remember(self, env_ids: Sequence[int], observations: torch.Tensor, output: Dict[int, Any]) -> None:
        """
        Overview:
            Note what each environment saw and did.
        """
        for env_id, observation in zip(env_ids, observations):
            self._steps[env_id] = (observation, output[env_id]['action'])

    def forget(self, env_ids: Optional[Sequence[int]]) -> None:
        """
        Overview:
            End the episodes of some environments, or of all.
        """
        for env_id in list(self._steps) if env_ids is None else env_ids:
            self._steps.pop(env_id, None)


class KVCachePolicy:
    """
    Overview:
        What the plugin adds to a LightZero UniZero policy, in front of it in the method resolution order.
    """
    node_search: Any  # the search by node that goes with the policy
    _cfg: Any
    _model: Any
    _target_model: Any
    _mcts_collect: Any
    _mcts_eval: Any

    @classmethod
    def default_config(cls) -> EasyDict:
        """
        Overview:
            LightZero's default config with the plugin's learner hook, and without the default ``env_num``, which would
            hide whether a user gave one.
        Returns:
            - config (:obj:`EasyDict`): The default config.
        """
        kinds = cls.__mro__
        plugins = next(number for number, kind in enumerate(kinds) if KVCachePolicy in kind.__bases__)
        config = kinds[plugins].__bases__[1].default_config()  # type: ignore[attr-defined]
        config.model.world_model_cfg.pop('env_num', None)
        # Of classes before it only what is their own: DI-engine would add what they inherit.
        own = [copy.deepcopy(vars(kind).get('config', {})) for kind in reversed(kinds[:plugins])]
        for part in (dict(learn=dict(learner=dict(hook={HOOK_KEY: HOOK_CONFIG}))), *own):
            config = deep_merge_dicts(config, EasyDict(part))
        config.cfg_type = cls.__name__ + 'Dict'
        return config

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        self._cfg = cfg  # LightZero's destructor looks at it, also where the next line refuses it
        use_new = settle(cfg, KV_CACHE_REGISTRY).use_new
        self._last_steps = {COLLECT: LastSteps(), EVAL: LastSteps()}
        self._searching = False
        self._trace: Any = None  # of the search that is running, for validation
        super().__init__(cfg, *args, **kwargs)  # type: ignore[call-arg]
        if use_new and not _is_new(self._model.world_model):
            raise ConfigError(
                f'{PREFIX}.{FLAG}=True, but {type(self._model.world_model).__name__} of policy.model.type='
                f'{cfg.model.get("type")!r} has LightZero\'s own caching: derive the model from '
                'lzero_kvcache.host.models.UniZeroModel or SampledUniZeroModel, and its world model from NewWorldModel'
            )
        if use_new:  # again, now that a subclass has built what it builds after its base class
            check_served(self._model.world_model)

    def _init_collect(self) -> None:
        super()._init_collect()  # type: ignore[misc]
        self._mcts_collect = self._mcts_of(self._mcts_collect)

    def _init_eval(self) -> None:
        super()._init_eval()  # type: ignore[misc]
        self._mcts_eval = self._mcts_of(self._mcts_eval)

    def _mcts_of(self, mcts: Any) -> Any:
        """By node in new mode; else the search that is there, timed from outside."""
        world_model = self._model.world_model
        if _is_new(world_model) and self._can_be_by_node(mcts):
            return self.node_search(self._cfg)
        timings = getattr(world_model, 'timings', None)
        if timings is not None:
            mcts.search = _timed(mcts.search, timings['search'])
        return mcts

    def _can_be_by_node(self, mcts: Any) -> bool:
        """Whether nobody's own search or inference would be passed over, and scalars are LightZero's."""
        model = getattr(self._model, '_orig_mod', self._model)  # torch.compile wraps it
        overridden = is_own(model, 'recurrent_inference') or is_own(model.world_model, 'forward_recurrent_inference')
        own_search = type(mcts) not in self.node_search.__mro__
        if overridden or own_search:
            logger.info('Searching by key: the policy has a search, or its model a recurrent inference, of its own')
        return self._cfg.model.categorical_distribution and not overridden and not own_search

    def _forward_learn(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._forward_learn(*args, **kwargs)  # type: ignore[misc]
        for model, reason in ((self._model, 'learner step'), (self._target_model, 'target model updated')):
            if _is_new(model.world_model):
                model.world_model.weights_changed(reason)
        return output

    def _forward_collect(self, *args: Any, **kwargs: Any) -> Dict[int, Any]:
        return self._search(COLLECT, super()._forward_collect, args, kwargs)  # type: ignore[misc]

    def _forward_eval(self, *args: Any, **kwargs: Any) -> Dict[int, Any]:
        return self._search(EVAL, super()._forward_eval, args, kwargs)  # type: ignore[misc]

    def _reset_collect(self, env_id: Union[None, int, List[int]] = None, *args: Any, **kwargs: Any) -> None:
        self._reset(COLLECT, super()._reset_collect, env_id, args, kwargs)  # type: ignore[misc]

    def _reset_eval(self, env_id: Union[None, int, List[int]] = None, *args: Any, **kwargs: Any) -> None:
        self._reset(EVAL, super()._reset_eval, env_id, args, kwargs)  # type: ignore[misc]

    def _search(self, mode: str, forward: Callable[..., Dict[int, Any]], args: Any, kwargs: Any) -> Dict[int, Any]:
        arguments = inspect.signature(forward).bind(*args, **kwargs).arguments
        observations, ready = arguments['data'], arguments.get('ready_env_id')
        env_ids = [int(env_id) for env_id in (range(len(observations)) if ready is None else ready)]
        world_model = self._model.world_model
        steps = self._last_steps[mode]
        outer = self._searching, self._trace
        self._searching = True
        try:
            if _is_new(world_model):
                self.last_batch_obs, self.last_batch_action = steps.rows(env_ids, observations)
                with world_model.serving(mode, env_ids) as trace, _quick_entropy():
                    self._trace = trace
                    output = forward(*args, **kwargs)
                    if trace is not None:
                        world_model.validator.check(trace, [output[env_id]['action'] for env_id in env_ids])
            else:
                following = sum(env_id in steps for env_id in env_ids)
                hits = world_model.root_hit_cnt
                output = forward(*args, **kwargs)
                manager = getattr(world_model, 'kv_cache_manager', None)
                if manager is not None:
                    manager.count_queries('init', following, min(following, world_model.root_hit_cnt - hits))
        finally:
            self._searching, self._trace = outer
        steps.remember(env_ids, observations, output)
        return output

    def _reset(self, mode: str, reset: Callable[..., None], env_id: Union[None, int, List[int]], args: Any,
               kwargs: Any) -> None:
        """A list names environments whose episode ended, None means all; a number is LightZero's periodic clearing."""
        validator = getattr(self._model.world_model, 'validator', None)
        if validator is not None:
            validator.reset(self._trace, reset, env_id, *args, **kwargs)
        ended = env_id is None or not isinstance(env_id, numbers.Integral)
        if self._searching:  # LightZero resets every row when fewer environments are ready than usual
            ended = False
        if ended:
            self._last_steps[mode].forget(env_id)  # type: ignore[arg-type]
        if not _is_new(self._model.world_model):
            reset(env_id, *args, **kwargs)
        elif ended:
            for index in [None] if env_id is None else env_id:  # type: ignore[union-attr]
                self._model.world_model.forget(mode, index)


def _timed(function: Callable[..., Any], timing: Timing) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = function(*args, **kwargs)
        timing.record(time.perf_counter() - start)
        return output

    return run


def entropy(pk: Sequence[float], base: float) -> float:
    """
    Overview:
        The same number as ``scipy.stats.entropy``, without the checks around it, which take many times as long.
    Arguments:
        - pk (:obj:`Sequence[float]`): A distribution.
        - base (:obj:`float`): Of the logarithm.
    Returns:
        - entropy (:obj:`float`): Of the distribution.
    """
    probabilities = np.asarray(pk)
    return entr(probabilities / probabilities.sum()).sum() / math.log(base)


@contextmanager
def _quick_entropy() -> Iterator[None]:
    """LightZero asks for the entropy of every environment's visits: a third of a collect step with scipy's own."""
    original = lightzero_utils.entropy
    lightzero_utils.entropy = entropy
    try:
        yield
    finally:
        lightzero_utils.entropy = original


def _is_new(world_model: Any) -> bool:
    return getattr(world_model, 'use_new_cache_manager', False)


class UniZeroPolicy(KVCachePolicy, LightZeroUniZeroPolicy):
    """
    Overview:
        LightZero's ``UniZeroPolicy`` with the plugin.
    """
    node_search = NodeSearch


class SampledUniZeroPolicy(KVCachePolicy, LightZeroSampledUniZeroPolicy):
    """
    Overview:
        LightZero's ``SampledUniZeroPolicy`` with the plugin.
    """
    node_search = SampledNodeSearch


register_in_place_of(LightZeroUniZeroPolicy, POLICY_REGISTRY, 'unizero', UniZeroPolicy)
register_in_place_of(LightZeroSampledUniZeroPolicy, POLICY_REGISTRY, 'sampled_unizero', SampledUniZeroPolicy)

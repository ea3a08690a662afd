"""LightZero's policies with the plugin's configuration, counts and, in new mode, contexts that belong to environments.

LightZero keeps the last observations and actions as rows of a batch, shared by collection and evaluation; new mode
keeps them for each (mode, environment) and lays the rows out for LightZero's own code to run on.
"""
import copy
import functools
import inspect
import logging
import numbers
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Union

import torch
from ding.utils import POLICY_REGISTRY, deep_merge_dicts
from easydict import EasyDict
from lzero.policy.sampled_unizero import SampledUniZeroPolicy as LightZeroSampledUniZeroPolicy
from lzero.policy.unizero import UniZeroPolicy as LightZeroUniZeroPolicy

from ..cache.base import COLLECT, EVAL
from ..config import FLAG, PREFIX, ConfigError, handed_down, settle
from ..copies import Turns
from ..registry import register_in_place_of
from ..run_hooks import HOOKS
from ..search.environments import Environments
from ..search.open_steps import OpenStep, StepsOfThread
from ..search.timing import Timing
from . import states
from .entries import check_checkpoint_of_entry, leaving_no_folder, source_of_checkpoint
from .lightzero import lightzero
from .refused import check_actions, check_policy, check_served, has_own_inference, is_own, tell_uncalled
from .row_loops import masks_of, with_rows_at_once
from .tree_search import KeylessSearch, SampledKeylessSearch
from .world_model import NewWorldModel

logger = logging.getLogger(__name__)


class KVCachePolicy(lightzero.POLICY_BASE):  # type: ignore[name-defined]
    """The plugin's part of a LightZero UniZero policy, before LightZero's class in the method resolution order."""
    keyless_search: Any  # the search without keys that goes with the policy
    _cfg: Any
    _model: Any
    _target_model: Any
    _mcts_collect: Any
    _mcts_eval: Any

    @classmethod
    def default_config(cls) -> EasyDict:
        """
        Overview:
            LightZero's default config with the plugin's learner hook and the ``config`` of subclasses, and without the
            default ``env_num``, which would hide whether a user gave one.
        Returns:
            - config (:obj:`EasyDict`): A new one at each call.
        """
        kinds = cls.__mro__
        plugins = next(number for number, kind in enumerate(kinds) if KVCachePolicy in kind.__bases__)
        _, lightzeros = kinds[plugins].__bases__
        config = lightzeros.default_config()  # type: ignore[attr-defined]
        config.model.world_model_cfg.pop('env_num', None)
        # Take each user subclass's own config: DI-engine would add inherited ones as well.
        own = [copy.deepcopy(vars(kind).get('config', {})) for kind in reversed(kinds[:plugins])]
        for part in (dict(learn=dict(learner=dict(hook=HOOKS))), *own):
            config = deep_merge_dicts(config, EasyDict(part))
        config.cfg_type = cls.__name__ + 'Dict'
        return config

    @leaving_no_folder()
    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        self._cfg = cfg  # LightZero's destructor looks at it, also where the next line refuses it
        self._options = settle(cfg, lightzero.simulations_of(cfg))
        use_new = self._options.system == 'new'
        check_policy(cfg, self._options.system)
        check_actions(cfg)
        check_checkpoint_of_entry()
        self._environments = Environments()
        self._running = StepsOfThread()  # the steps that this policy is in the middle of; None for one in old mode
        self._turns = Turns()  # LightZero keeps the rows of a batch as attributes of its policy
        super().__init__(cfg, *args, **kwargs)
        if use_new and not _is_new(self._model.world_model):
            raise ConfigError(
                f'{PREFIX}.{FLAG}=True, but {type(self._model.world_model).__name__} of policy.model.type='
                f'{cfg.model.get("type")!r} has LightZero\'s own caching: derive the model from '
                'lzero_kvcache.host.models.UniZeroModel or SampledUniZeroModel (with PPO lzero_kvcache.host.ppo.'
                'UniZeroPPOModel), and its world model from NewWorldModel (NewPPOWorldModel)'
            )
        if use_new:  # again, now that a subclass has built what it builds after its base class
            check_served(self._model.world_model)
            tell_uncalled(self._model.world_model.kv_cache_manager)

    def _create_model(self, cfg: EasyDict, model: Optional[torch.nn.Module] = None) -> torch.nn.Module:
        if model is None:  # hand the options that were read down in the config, a copy: the caller's stays as it is
            cfg = copy.copy(cfg)
            cfg.model = copy.copy(cfg.model)
            cfg.model.world_model_cfg = handed_down(cfg.model.world_model_cfg, self._options)
        return super()._create_model(cfg, model)

    def _init_collect(self) -> None:
        super()._init_collect()
        self._mcts_collect = self._mcts_of(self._mcts_collect, COLLECT)

    def _init_eval(self) -> None:
        super()._init_eval()
        self._mcts_eval = self._mcts_of(self._mcts_eval, EVAL)

    def _mcts_of(self, mcts: Any, mode: str) -> Any:
        """The search of a policy: one without keys, if it can be used, or else the policy's own, timed from outside."""
        world_model = self._model.world_model
        if mcts is None:  # PPO's actions are drawn from the policy head
            return None
        if _is_new(world_model) and self._needs_no_keys(mcts):
            world_model.searches_in_arrays('Searching')  # and the log says so at the start
            return self.keyless_search(mcts._cfg, self._running, mode)
        timings = getattr(world_model, 'timings', None)
        if timings is not None:
            mcts.search = _timed(mcts.search, timings['search'])
        return mcts

    def _needs_no_keys(self, mcts: Any) -> bool:
        """Whether a search without keys would bypass no search or inference of a user's, and values are categorical."""
        manager = self._model.world_model.kv_cache_manager
        keyed = [name for name in ('find_recur', 'store_recur') if is_own(manager, name)]
        if has_own_inference(self._model, 'recurrent') or type(mcts) not in self.keyless_search.__mro__:
            reason = 'the policy has a search, or its model a recurrent inference, of its own'
        elif keyed:
            reason = f'{type(manager).__name__} has a {" and a ".join(keyed)} of its own'
        elif not self._cfg.model.categorical_distribution:
            reason = 'policy.model.categorical_distribution=False: values are not categorical'
        else:
            return True
        logger.info(f'Searching by key: {reason}')
        return False

    @leaving_no_folder()
    def _load_state_dict_learn(self, state_dict: Dict[str, Any]) -> None:
        with states.faults_under(source_of_checkpoint()):
            states.check_parts(state_dict)
            super()._load_state_dict_learn(state_dict)

    def _forward_learn(self, *args: Any, **kwargs: Any) -> Any:
        parameters = list(self._target_model.parameters()) if _is_new(self._target_model.world_model) else []
        places = [parameter.data for parameter in parameters]
        output = super()._forward_learn(*args, **kwargs)
        _put_back(parameters, places)
        for model, reason in ((self._model, 'learner step'), (self._target_model, 'target model updated')):
            if _is_new(model.world_model):
                model.world_model.weights_changed(reason)
        return output

    def _forward_collect(self, *args: Any, **kwargs: Any) -> Dict[int, Any]:
        return self._search(COLLECT, super()._forward_collect, args, kwargs)

    def _forward_eval(self, *args: Any, **kwargs: Any) -> Dict[int, Any]:
        return self._search(EVAL, super()._forward_eval, args, kwargs)

    def _reset_collect(self, env_id: Union[None, int, List[int]] = None, *args: Any, **kwargs: Any) -> None:
        self._reset(COLLECT, super()._reset_collect, env_id, args, kwargs)

    def _reset_eval(self, env_id: Union[None, int, List[int]] = None, *args: Any, **kwargs: Any) -> None:
        self._reset(EVAL, super()._reset_eval, env_id, args, kwargs)

    def _search(self, mode: str, forward: Callable[..., Dict[int, Any]], args: Any, kwargs: Any) -> Dict[int, Any]:
        given = _signature(forward.__func__).bind(self, *args, **kwargs)  # type: ignore[attr-defined]
        observations, ready = given.arguments['data'], given.arguments.get('ready_env_id')
        env_ids = lightzero.environments_of(range(len(observations)) if ready is None else ready)
        if not _is_new(self._model.world_model):
            output = self._old_search(mode, env_ids, functools.partial(forward, *args, **kwargs))
            self._environments.remember(mode, env_ids, None, output)
            return output
        with self._turns.lock:
            output = self._new_search(mode, env_ids, forward, given)
            self._environments.remember(mode, env_ids, observations, output)
        return output

    def _new_search(self, mode: str, env_ids: List[int], forward: Callable[..., Dict[int, Any]],
                    given: inspect.BoundArguments) -> Dict[int, Any]:
        world_model, observations = self._model.world_model, given.arguments['data']
        lightzero.hand_rows(self, mode, env_ids, *self._environments.rows(mode, env_ids, observations))
        mcts = self._mcts_collect if mode == COLLECT else self._mcts_eval
        if world_model.training:
            self._model.eval()  # as LightZero does next
        keyless = isinstance(mcts, self.keyless_search)
        with world_model.open_step(mode, env_ids, in_arrays=keyless) as step, self._in_the_middle_of(step):
            if keyless:
                given.arguments['action_mask'] = masks = masks_of(given.arguments.get('action_mask'))
                forward = with_rows_at_once(forward, step, masks)
            if step.in_arrays:
                forward = mcts.in_arrays(forward)
            if step.trace is not None:
                step.trace.first_reset = (
                    super()._reset_collect if mode == COLLECT else super()._reset_eval)
            output = forward(*given.args[1:], **given.kwargs)
            if step.trace is not None:
                world_model.validator.check(step.trace, [output[env_id]['action'] for env_id in env_ids])
        return output

    def _old_search(self, mode: str, env_ids: List[int],
                    forward: 'functools.partial[Dict[int, Any]]') -> Dict[int, Any]:
        world_model = self._model.world_model
        following = sum(self._environments.inside(mode, env_id) for env_id in env_ids)
        hits = world_model.root_hit_cnt
        with self._in_the_middle_of(None):
            output = forward()
        manager = getattr(world_model, 'kv_cache_manager', None)
        if manager is not None:
            manager.count_queries('init', following, min(following, world_model.root_hit_cnt - hits))
        return output

    @contextmanager
    def _in_the_middle_of(self, step: Optional[OpenStep]) -> Iterator[None]:
        self._running.steps.append(step)
        try:
            yield
        finally:
            self._running.steps.pop()

    def _reset(self, mode: str, reset: Callable[..., None], env_id: Union[None, int, List[int]], args: Any,
               kwargs: Any) -> None:
        """A list names environments whose episode ended, None means all; a number is LightZero's periodic clearing."""
        validator = getattr(self._model.world_model, 'validator', None)
        running = self._running.steps
        if validator is not None:
            validator.reset(running[-1].trace if running else None, reset, env_id, *args, **kwargs)
        # Inside a search LightZero resets every row when fewer environments are ready than usual.
        ended = not isinstance(env_id, numbers.Integral) and not running
        if ended:
            self._environments.forget(mode, env_id)  # type: ignore[arg-type]
        if not _is_new(self._model.world_model):
            reset(env_id, *args, **kwargs)
        elif ended:
            for index in [None] if env_id is None else env_id:  # type: ignore[union-attr]
                self._model.world_model.forget(mode, index)


@torch.no_grad()
def _put_back(parameters: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> None:
    """Move parameters to where they were: DI-engine gives those of a target model new memory at each update, and what
    is captured or compiled reads them where they were."""
    for parameter, place in zip(parameters, places):
        if parameter.data_ptr() != place.data_ptr():
            parameter.data = place.copy_(parameter.data)


@functools.lru_cache(maxsize=None)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _timed(function: Callable[..., Any], timing: Timing) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = function(*args, **kwargs)
        timing.record(time.perf_counter() - start)
        return output

    return run


def _is_new(world_model: Any) -> bool:
    return isinstance(world_model, NewWorldModel)


class UniZeroPolicy(KVCachePolicy, LightZeroUniZeroPolicy):
    """
    Overview:
        LightZero's ``UniZeroPolicy`` with the plugin's options and counts and, with the flag on, contexts that belong
        to environments. A subclass may set ``config``, whose keys go over LightZero's defaults.
    Raises:
        - ConfigError: The config cannot be run, or with the flag on not by the new cache.
    """
    keyless_search = KeylessSearch


class SampledUniZeroPolicy(KVCachePolicy, LightZeroSampledUniZeroPolicy):
    """
    Overview:
        LightZero's ``SampledUniZeroPolicy`` with the plugin's options and counts and, with the flag on, contexts that
        belong to environments. A subclass may set ``config``, whose keys go over LightZero's defaults.
    Raises:
        - ConfigError: The config cannot be run, or with the flag on not by the new cache.
    """
    keyless_search = SampledKeylessSearch


register_in_place_of(LightZeroUniZeroPolicy, POLICY_REGISTRY, 'unizero', UniZeroPolicy)
register_in_place_of(LightZeroSampledUniZeroPolicy, POLICY_REGISTRY, 'sampled_unizero', SampledUniZeroPolicy)

"""
The one file of this package that reaches into LightZero's entries and DI-engine's learner. An entry builds its learner,
collector and evaluator by names of its own module: for the time of a run those names stand for watched subclasses.
"""
import contextlib
import functools
import importlib
import os
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import numpy as np
import torch
from easydict import EasyDict

from .status import Evaluation

NAMES = ('compile_config', 'BaseLearner', 'Collector', 'Evaluator')


def default_tree(main_config: EasyDict, create_config: EasyDict) -> EasyDict:
    """
    Overview:
        Complete a config with all defaults of its policy, environment and learner, as a run will. Writes nothing.
    Arguments:
        - main_config (:obj:`EasyDict`), create_config (:obj:`EasyDict`): The configs, which stay as they are.
    Returns:
        - tree (:obj:`EasyDict`): The complete config.
    """
    from ding.config import compile_config
    return compile_config(main_config, env=None, auto=True, create_cfg=create_config, save_cfg=False)


def try_environment(main_config: EasyDict, create_config: EasyDict) -> None:
    """
    Overview:
        Build one environment and reset it, so that what is missing is missed here and not in a worker process.
    Arguments:
        - main_config (:obj:`EasyDict`), create_config (:obj:`EasyDict`): The configs.
    """
    from ding.envs import get_vec_env_setting
    env_fn, collector_configs, _ = get_vec_env_setting(default_tree(main_config, create_config).env)
    env = env_fn(cfg=collector_configs[0])
    try:
        env.reset()
    finally:
        env.close()


class Watch:
    """
    Overview:
        What is known of a running training. ``on_change`` is called whenever something moved.
    Arguments:
        - on_change (:obj:`Callable[[], None]`): Called often; it decides itself when to do something.
        - interrupted (:obj:`Callable[[], None]`): Called after each training iteration; it may raise.
    """

    def __init__(self, on_change: Callable[[], None], interrupted: Callable[[], None]) -> None:
        self.on_change = on_change
        self.interrupted = interrupted
        self.learner: Any = None
        self.collector: Any = None
        self.evaluator: Any = None
        self.phase = 'starting'
        self.updating = False
        self.stopped = False
        self.steps_in_collect = 0
        self.evaluations: List[Evaluation] = []
        self._resume: Optional[str] = None

    @property
    def env_step(self) -> int:
        done = int(self.collector.envstep) if self.collector is not None else 0
        return done + self.steps_in_collect

    @property
    def train_iter(self) -> int:
        return int(self.learner.train_iter) if self.learner is not None else 0

    @property
    def cache(self) -> Any:
        """The model's cache manager, None while there is no model."""
        model = None if self.learner is None else self.learner.policy.get_attribute('model')
        return getattr(getattr(model, 'world_model', None), 'kv_cache_manager', None)

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.on_change()

    def save_checkpoint(self) -> Optional[str]:
        """
        Overview:
            Save where the training stands.
        Returns:
            - path (:obj:`Optional[str]`): The checkpoint, None if there is nothing to save yet.
        """
        if self.learner is None or self.collector is None:
            return None
        self.learner.collector_envstep = int(self.collector.envstep)
        with _atomic_checkpoints():
            self.learner.save_checkpoint()
        return self.latest_checkpoint()

    def latest_checkpoint(self) -> Optional[str]:
        if self.learner is None:
            return None
        path = os.path.join(self.learner.exp_name, 'ckpt', 'iteration_{}.pth.tar'.format(self.train_iter))
        return path if os.path.isfile(path) else None

    def close(self) -> None:
        """End the environments and flush the event files; what fails here must not hide how the run ended."""
        for part in (self.evaluator, self.collector, self.learner):
            if part is not None:
                with contextlib.suppress(Exception):
                    part.close()


def run_entry(entry: str, configs: Tuple[EasyDict, EasyDict], watch: Watch, **arguments: Any) -> Any:
    """
    Overview:
        Run a LightZero training entry under a watch. The experiment's folder exists already, and keeps its name.
    Arguments:
        - entry (:obj:`str`): 'train_unizero' or 'train_unizero_segment'.
        - configs (:obj:`Tuple[EasyDict, EasyDict]`): main_config and create_config.
        - watch (:obj:`Watch`): Learns what happens.
        - arguments (:obj:`Any`): The entry's other arguments.
    Returns:
        - policy (:obj:`Any`): The trained policy.
    """
    module = importlib.import_module('lzero.entry.' + entry)
    with _watched(module, watch), _atomic_checkpoints():
        return getattr(module, entry)(list(configs), **arguments)


@contextlib.contextmanager
def _watched(module: Any, watch: Watch) -> Iterator[None]:
    originals = {name: getattr(module, name) for name in NAMES}
    module.compile_config = functools.partial(module.compile_config, renew_dir=False)
    module.BaseLearner = _watched_learner(module.BaseLearner, watch)
    module.Collector = _watched_collector(module.Collector, watch)
    module.Evaluator = _watched_evaluator(module.Evaluator, watch)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def _watched_learner(base: type, watch: Watch) -> type:

    class WatchedLearner(base):  # type: ignore[misc,valid-type]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.learner = self

        def train(self, *args: Any, **kwargs: Any) -> Any:
            # Stopping inside an update would leave weights of two iterations in one checkpoint.
            watch.updating = True
            try:
                log_vars = super().train(*args, **kwargs)
            finally:
                watch.updating = False
            watch.enter('training')
            watch.interrupted()
            return log_vars

    return WatchedLearner


def _watched_collector(base: type, watch: Watch) -> type:

    class WatchedCollector(base):  # type: ignore[misc,valid-type]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.collector = self

        def reset_policy(self, _policy: Any = None) -> None:
            super().reset_policy(None if _policy is None else _policy._replace(forward=self._counted(_policy.forward)))

        def collect(self, *args: Any, **kwargs: Any) -> Any:
            watch.enter('collecting')
            try:
                return super().collect(*args, **kwargs)
            finally:
                watch.steps_in_collect = 0
                watch.on_change()

        @staticmethod
        def _counted(forward: Callable) -> Callable:

            @functools.wraps(forward)
            def counted(*args: Any, **kwargs: Any) -> Any:
                actions = forward(*args, **kwargs)
                watch.steps_in_collect += len(actions)
                watch.on_change()
                return actions

            return counted

    return WatchedCollector


def _watched_evaluator(base: type, watch: Watch) -> type:

    class WatchedEvaluator(base):  # type: ignore[misc,valid-type]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.evaluator = self

        def eval(self, save_ckpt_fn: Optional[Callable] = None, train_iter: int = -1, envstep: int = -1,
                 *args: Any, **kwargs: Any) -> Any:
            watch.enter('evaluating')
            stop, info = super().eval(save_ckpt_fn, train_iter, envstep, *args, **kwargs)
            watch.stopped = bool(stop)
            if info is not None:
                reward = float(np.mean(info['eval_episode_return']))
                watch.evaluations.append(Evaluation(int(envstep), int(train_iter), reward))
            watch.on_change()
            return stop, info

    return WatchedEvaluator


@contextlib.contextmanager
def _atomic_checkpoints() -> Iterator[None]:
    """Let every checkpoint of DI-engine's learner appear whole or not at all."""
    from ding.worker.learner import learner_hook
    original = learner_hook.save_file
    learner_hook.save_file = lambda path, data, *args, **kwargs: save_atomically(data, path)
    try:
        yield
    finally:
        learner_hook.save_file = original


def save_atomically(data: Mapping[str, Any], path: str) -> None:
    """
    Overview:
        Replace a checkpoint by a new one in a single step.
    Arguments:
        - data (:obj:`Mapping[str, Any]`): What to save.
        - path (:obj:`str`): Where.
    """
    temporary = '{}.{}.tmp'.format(path, os.getpid())
    try:
        with open(temporary, 'wb') as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def cache_counters(cache: Any) -> Dict[str, Any]:
    """
    Overview:
        A cache manager's counters; of what counts nothing, none.
    Arguments:
        - cache (:obj:`Any`): A manager, or None.
    Returns:
        - counters (:obj:`Dict[str, Any]`): 'init', 'recur' and 'total', each with 'queries' and 'hits', and 'memory_mb'.
    """
    read = getattr(cache, 'counters', None)
    return dict(read()) if callable(read) else {}

"""
The one file of this package that reaches into LightZero's entries and DI-engine's learner. An entry builds its learner,
collector and evaluator by names of its own module: for the time of a run those names stand for watched subclasses.
"""
import contextlib
import functools
import importlib
import inspect
import os
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
from easydict import EasyDict

from lzero_kvcache.config import FLAG, ConfigError, nearest

from .checkpoints import Checkpoint, atomic_checkpoints, load_state
from .data_parallel import DataParallel
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
    Raises:
        - ConfigError: Nothing has registered the environment, or the model.
    """
    from ding.config import compile_config
    from ding.utils import ENV_REGISTRY, MODEL_REGISTRY, import_module
    for key, registry, asked in (('create_config.env.type', ENV_REGISTRY, create_config.env),
                                 ('policy.model.type', MODEL_REGISTRY, main_config.policy.model)):
        modules = asked.get('import_names', [])
        import_module(modules)
        if 'type' in asked and asked.type not in registry:
            raise ConfigError(
                f'{key}={asked.type!r} is registered by none of its import_names={modules}; '
                f'{nearest(asked.type, registry)}'
            )
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


def build_policy(main_config: EasyDict, create_config: EasyDict) -> Any:
    """
    Overview:
        The policy of a config as its collector has it: without environments, optimizer and target model.
    Arguments:
        - main_config (:obj:`EasyDict`), create_config (:obj:`EasyDict`): The configs.
    Returns:
        - policy (:obj:`Any`): The policy, on the config's device.
    """
    from ding.policy import create_policy
    return create_policy(default_tree(main_config, create_config).policy, enable_field=['collect'])


def which_lightzero() -> Tuple[str, str]:
    """
    Overview:
        Tell the released LightZero from its main branch, which has the same version number, by what it has.
    Returns:
        - which (:obj:`str`), sign (:obj:`str`): The name, and what it was told by.
    """
    from lzero.model.unizero_world_models import world_model
    if FLAG in inspect.getsource(world_model):
        return 'main branch', f'its own world_model.py reads {FLAG}'
    return 'released 0.2.0', f'its world_model.py knows no {FLAG}'


class Watch:
    """
    Overview:
        What is known of a running training. ``on_change`` is called whenever something moved.
    Arguments:
        - on_change (:obj:`Callable[[], None]`): Called often; it decides itself when to do something.
        - interrupted (:obj:`Callable[[], None]`): Called after each training iteration; it may raise.
        - ranks (:obj:`Optional[DataParallel]`): The processes of the training; None for this one alone.
    """

    def __init__(self, on_change: Callable[[], None], interrupted: Callable[[], None],
                 ranks: Optional[DataParallel] = None) -> None:
        self.on_change = on_change
        self.interrupted = interrupted
        self.ranks = ranks or DataParallel()
        self.learner: Any = None
        self.collector: Any = None
        self.evaluator: Any = None
        self.phase = 'start'
        self.updating = False
        self.stopped = False
        self.steps_in_collect = 0
        self.evaluations: List[Evaluation] = []
        self.checkpoint: Optional[Checkpoint] = None
        self.best_reward: Optional[float] = None  # of what the checkpoint was saved by

    @property
    def env_step(self) -> int:
        if self.collector is None or self.checkpoint is not None:
            return self.checkpoint.env_step if self.checkpoint is not None else 0
        # The collector's own count is of all ranks; what is under way, others collect as well.
        return int(self.collector.envstep) + self.steps_in_collect * self.ranks.size

    @property
    def train_iter(self) -> int:
        if self.learner is None or self.checkpoint is not None:
            return self.checkpoint.train_iter if self.checkpoint is not None else 0
        return int(self.learner.train_iter)

    @property
    def cache(self) -> Any:
        """The model's cache manager, None while there is no model."""
        policy = None if self.evaluator is None else self.evaluator.policy
        model = None if policy is None else policy.get_attribute('model')
        return getattr(getattr(model, 'world_model', None), 'kv_cache_manager', None)

    def restore(self) -> None:
        """
        Overview:
            Put a new training where the checkpoint stood. LightZero itself would restore the weights alone.
        """
        if self.checkpoint is None:
            return
        checkpoint, self.checkpoint = self.checkpoint, None
        load_state(self.learner.policy, checkpoint)
        self.learner.last_iter.update(checkpoint.train_iter)
        self.learner.collector_envstep = checkpoint.env_step
        self.collector._total_envstep_count = checkpoint.env_step
        if self.best_reward is not None:  # else the next evaluation, whatever it is, would replace ckpt_best
            self.evaluator._max_episode_return = self.best_reward

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.on_change()

    def evaluate_last(self) -> None:
        """
        Overview:
            Evaluate what the training ended with. LightZero's entries do not, so that the last reward would be one of
            before the last training phase. A run too short for any evaluation, as of Atari on a CPU, stays without.
        """
        evaluated = bool(self.evaluations) or self.best_reward is not None
        last = self.evaluations[-1].train_iter if self.evaluations else -1
        if evaluated and last < self.train_iter:
            self.evaluator.eval(self.learner.save_checkpoint, self.train_iter, self.env_step)

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
        with atomic_checkpoints():
            self.learner.save_checkpoint()
        return self.latest_checkpoint()

    def latest_checkpoint(self) -> Optional[str]:
        if self.learner is None:
            return None
        path = os.path.join(self.learner.exp_name, 'ckpt', f'iteration_{self.train_iter}.pth.tar')
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
    with watch.ranks.mended(module), _watched(module, watch), atomic_checkpoints():
        policy = getattr(module, entry)(list(configs), **arguments)
        watch.evaluate_last()
    return policy


def evaluate(configs: Tuple[EasyDict, EasyDict], watch: Watch, seed: int) -> None:
    """
    Overview:
        Evaluate the watch's checkpoint with LightZero's evaluator, and nothing else around it: LightZero's own entry
        for that refuses sampled UniZero. The outcome is in ``watch.evaluations``.
    Arguments:
        - configs (:obj:`Tuple[EasyDict, EasyDict]`): main_config and create_config.
        - watch (:obj:`Watch`): Holds the checkpoint.
        - seed (:obj:`int`): Of the environments.
    """
    from ding.config import compile_config
    from ding.envs import create_env_manager, get_vec_env_setting
    from ding.policy import create_policy
    from ding.utils import set_pkg_seed
    from lzero.worker import MuZeroEvaluator
    from torch.utils.tensorboard import SummaryWriter
    assert watch.checkpoint is not None
    checkpoint = watch.checkpoint
    cfg = compile_config(
        configs[0], seed=seed, env=None, auto=True, create_cfg=configs[1], save_cfg=True, renew_dir=False
    )
    env_fn, _, env_configs = get_vec_env_setting(cfg.env, collect=False)
    env = create_env_manager(cfg.env.manager, [functools.partial(env_fn, cfg=c) for c in env_configs])
    env.seed(seed, dynamic_seed=False)
    set_pkg_seed(seed, use_cuda=cfg.policy.cuda)
    policy = create_policy(cfg.policy, enable_field=['learn', 'collect', 'eval'])
    load_state(policy.learn_mode, checkpoint)
    _watched_evaluator(MuZeroEvaluator, watch)(
        eval_freq=cfg.policy.eval_freq, n_evaluator_episode=cfg.env.n_evaluator_episode, stop_value=cfg.env.stop_value,
        env=env, policy=policy.eval_mode, tb_logger=SummaryWriter(os.path.join(cfg.exp_name, 'log', 'serial')),
        exp_name=cfg.exp_name, policy_config=cfg.policy,
    )
    watch.evaluator.eval(None, checkpoint.train_iter, checkpoint.env_step)


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

    class WatchedLearner(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.learner = self

        def call_hook(self, name: str) -> None:
            super().call_hook(name)
            # The entries call this when all parts stand, and before anything is collected.
            if name == 'before_run':
                watch.restore()

        def train(self, *args: Any, **kwargs: Any) -> Any:
            # Stopping inside an update would leave weights of two iterations in one checkpoint.
            watch.updating = True
            try:
                log_vars = super().train(*args, **kwargs)
            finally:
                watch.updating = False
            watch.enter('train')
            watch.interrupted()
            return log_vars

    return WatchedLearner


def _watched_collector(base: type, watch: Watch) -> type:

    class WatchedCollector(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.collector = self

        def reset_policy(self, _policy: Any = None) -> None:
            super().reset_policy(None if _policy is None else _policy._replace(forward=self._counted(_policy.forward)))

        def collect(self, *args: Any, **kwargs: Any) -> Any:
            watch.enter('collect')
            try:
                return super().collect(*args, **kwargs)
            finally:
                watch.steps_in_collect = 0
                watch.on_change()

        @staticmethod
        def _counted(forward: Callable) -> Callable:

            @functools.wraps(forward)
            def counted(*args: Any, **kwargs: Any) -> Any:
                watch.ranks.in_collection()
                actions = forward(*args, **kwargs)
                watch.steps_in_collect += len(actions)
                watch.on_change()
                return actions

            return counted

    return WatchedCollector


def _watched_evaluator(base: type, watch: Watch) -> type:

    class WatchedEvaluator(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.policy = kwargs['policy']
            watch.evaluator = self

        def reset_policy(self, _policy: Any = None) -> None:
            super().reset_policy(None if _policy is None else _policy._replace(forward=self._left(_policy.forward)))

        @staticmethod
        def _left(forward: Callable) -> Callable:

            @functools.wraps(forward)
            def left(*args: Any, **kwargs: Any) -> Any:
                watch.ranks.in_evaluation()
                return forward(*args, **kwargs)

            return left

        def eval(self, save_ckpt_fn: Optional[Callable] = None, train_iter: int = -1, envstep: int = -1,
                 *args: Any, **kwargs: Any) -> Any:
            watch.enter('evaluate')
            stop, info = super().eval(save_ckpt_fn, train_iter, envstep, *args, **kwargs)
            watch.stopped = bool(stop)
            if info is not None:
                reward = float(np.mean(info['eval_episode_return']))
                watch.evaluations.append(Evaluation(int(envstep), int(train_iter), reward))
            watch.on_change()
            return stop, info

    return WatchedEvaluator


def cache_counters(cache: Any) -> Dict[str, Any]:
    """
    Overview:
        A cache manager's counters; of what counts nothing, none.
    Arguments:
        - cache (:obj:`Any`): A manager, or None.
    Returns:
        - counters (:obj:`Dict[str, Any]`): 'init', 'recur', 'total', each with 'queries' and 'hits', and 'memory_mb'.
    """
    read = getattr(cache, 'counters', None)
    return dict(read()) if callable(read) else {}

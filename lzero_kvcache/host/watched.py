"""LightZero's learner, collector and evaluator for a ``Watcher``: they register themselves with it, and notify it of
their progress."""
import functools
from abc import ABC, abstractmethod
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from ding.config import compile_config
from ding.envs import create_env_manager, get_vec_env_setting
from ding.policy import create_policy
from ding.utils import set_pkg_seed
from lzero.worker import MuZeroEvaluator

from ..run_hooks import LOSS, RunHook
from ..summary import Evaluation, Result
from . import data_parallel, entries
from .lightzero import lightzero
from .patches import applied
from .states import Checkpoint


class Past(NamedTuple):
    """The known past of a training that goes on in place; all None for a training that begins."""
    saved: Optional[Tuple[str, int]] = None  # the checkpoint's path, and its iteration
    result: Optional[Result] = None  # as it was at the checkpoint
    run_id: Optional[str] = None
    best_reward: Optional[float] = None  # of what is abandoned, too
    evaluated_at: Optional[int] = None  # its iteration, if it was evaluated there


class Watcher(ABC):
    """Gets notified of the progress of a training or an evaluation."""
    learner: Any = None
    collector: Any = None
    evaluator: Any = None
    stopped = False  # since the reward is high enough
    under_way = 0  # env steps of this process in the collection that is under way, or that was cut off
    loaded: Optional[Checkpoint] = None  # to go on from, or to evaluate
    past = Past()
    ranks: data_parallel.Ranks

    @abstractmethod
    def enter(self, phase: str) -> None:
        """A collection begins, 'collect', or an evaluation, 'evaluate'."""

    @abstractmethod
    def stepped(self, steps: int) -> None:
        """So many environment steps of a collection were taken."""

    @abstractmethod
    def updated(self, loss: Optional[float]) -> None:
        """An update is done."""

    @abstractmethod
    def evaluated(self, evaluation: Evaluation) -> None:
        """An evaluation is done."""

    @abstractmethod
    def evaluate_last(self) -> None:
        """The training has ended: evaluate what it ended with, if that is to be."""

    @abstractmethod
    def save(self, path: str, data: Any, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, in place of DI-engine's ``save_file``."""


def train(watch: Watcher, entry: str, configs: entries.Configs, **arguments: Any) -> Any:
    """Run one of LightZero's entries under a watch, into a folder that exists already; returns the trained policy."""
    with applied(
            compile_config=lambda original: functools.partial(original, renew_dir=False),
            learner=functools.partial(_watched_learner, watch), collector=functools.partial(_watched_collector, watch),
            evaluator=functools.partial(_watched_evaluator, watch), save_file=lambda original: watch.save,
            **data_parallel.replacements(watch.ranks)):
        return entries.run_entry(entry, configs, **arguments)


def evaluate(watch: Watcher, configs: entries.Configs, seed: int, writer: Any) -> None:
    """Evaluate the watch's checkpoint, and nothing else, with a tensorboard writer: LightZero's own entry for this
    refuses sampled UniZero."""
    assert watch.loaded is not None
    cfg = compile_config(
        configs[0], seed=seed, env=None, auto=True, create_cfg=configs[1], save_cfg=True, renew_dir=False
    )
    env_fn, _, env_configs = get_vec_env_setting(cfg.env, collect=False)
    env = create_env_manager(cfg.env.manager, [functools.partial(env_fn, cfg=config) for config in env_configs])
    env.seed(seed, dynamic_seed=False)
    set_pkg_seed(seed, use_cuda=cfg.policy.cuda)
    policy = create_policy(cfg.policy, enable_field=['learn', 'collect', 'eval'])
    state, train_iter, env_step = watch.loaded
    policy.learn_mode.load_state_dict(state)
    _watched_evaluator(watch, MuZeroEvaluator)(
        eval_freq=cfg.policy.eval_freq, n_evaluator_episode=cfg.env.n_evaluator_episode, stop_value=cfg.env.stop_value,
        env=env, policy=policy.eval_mode, tb_logger=writer, exp_name=cfg.exp_name, policy_config=cfg.policy,
    ).eval(None, train_iter, env_step)


def restore(watch: Watcher) -> None:
    """Put a new training where the watch's checkpoint stood. LightZero itself would restore the weights alone."""
    if watch.loaded is None:
        return
    state, train_iter, env_step = watch.loaded
    watch.learner.policy.load_state_dict(state)
    watch.learner.last_iter.update(train_iter)
    watch.learner.collector_envstep = env_step
    watch.collector._total_envstep_count = env_step
    if watch.past.best_reward is not None:  # else the next evaluation, whatever it is, would replace ckpt_best
        watch.evaluator._max_episode_return = watch.past.best_reward
    watch.loaded = None  # it is as large as the model and its optimizer


def _before_each(action: Callable[[], None], policy: Any, after: Callable[[Any], None] = lambda output: None) -> Any:
    """DI-engine's view on a policy, whose ``forward`` stands between two actions; None for None."""
    if policy is None:
        return None

    @functools.wraps(policy.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        action()
        output = policy.forward(*args, **kwargs)
        after(output)
        return output

    return policy._replace(forward=forward)


def _watched_learner(watch: Watcher, base: type) -> type:

    class WatchedLearner(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.learner = self
            for hooks in self._hooks.values():
                hooks[:] = [hook for hook in hooks if not isinstance(hook, RunHook)]

        def call_hook(self, name: str) -> None:
            if name == 'after_run':
                watch.evaluate_last()
            if name == 'after_iter':  # DI-engine's sum over processes leaves them tensors, which its monitor refuses
                scalars = self.log_buffer['scalar']
                scalars.update({key: value.item() for key, value in scalars.items() if isinstance(value, torch.Tensor)})
            super().call_hook(name)
            # The entries call this when all parts are made, and before anything is collected.
            if name == 'before_run':
                restore(watch)

        def train(self, *args: Any, **kwargs: Any) -> Any:
            log_vars = super().train(*args, **kwargs)
            watch.updated(log_vars[-1].get(LOSS))
            return log_vars

    return WatchedLearner


def _watched_collector(watch: Watcher, base: Any) -> type:

    class WatchedCollector(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.collector = self

        def reset_policy(self, _policy: Any = None) -> None:
            super().reset_policy(_before_each(
                watch.ranks.in_collection, _policy, lambda actions: watch.stepped(len(actions))))

        def collect(self, *args: Any, **kwargs: Any) -> Any:
            watch.enter('collect')
            self._begun_at = int(self.envstep)
            collected = super().collect(*args, **kwargs)
            watch.stepped(-watch.under_way)
            return collected

        def take_back(self) -> None:
            """Count the last collection no more."""
            self._total_envstep_count = self._begun_at

        def _output_log(self, train_iter: int) -> None:
            """Called as a collection ends, on every rank."""
            if watch.ranks.several and not lightzero.ADDS_UP_STEPS:
                own = int(self.envstep)
                self._total_envstep_count = self._begun_at  # an interrupt cuts it off here
                self._total_envstep_count = watch.ranks.collected(self._begun_at, own)
            super()._output_log(train_iter)

    return WatchedCollector


def _watched_evaluator(watch: Watcher, base: type) -> type:

    class WatchedEvaluator(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.policy = kwargs['policy']
            watch.evaluator = self

        def reset_policy(self, _policy: Any = None) -> None:
            super().reset_policy(_before_each(watch.ranks.in_evaluation, _policy))

        def eval(self, save_ckpt_fn: Optional[Callable] = None, train_iter: int = -1, envstep: int = -1,
                 *args: Any, **kwargs: Any) -> Tuple[Any, Any]:
            if train_iter == watch.past.evaluated_at:
                return False, None
            watch.enter('evaluate')
            best: List[str] = []  # what is to be saved, which is noted together with this evaluation
            stop, info = super().eval(save_ckpt_fn and best.append, train_iter, envstep, *args, **kwargs)
            watch.stopped = bool(stop)
            if info is not None:
                rewards = np.asarray(info['eval_episode_return'], dtype=float)
                watch.evaluated(Evaluation(
                    int(envstep), int(train_iter), float(rewards.mean()), float(rewards.std()), rewards.size))
            for name in best:
                watch.learner.save_checkpoint(name)
            return stop, info

    return WatchedEvaluator

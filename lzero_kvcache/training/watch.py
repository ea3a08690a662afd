"""Watches a running training through subclasses of LightZero's learner, collector and evaluator."""
import contextlib
import functools
import os
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np

from ..host import entries
from ..host.patches import applied
from ..run_hooks import LOSS, RunHook
from ..summary import Evaluation
from .checkpoints import CHECKPOINTS, Checkpoint, prune, save_atomically
from .ranks import DataParallel


class Watch:
    """``on_change`` is called whenever something moved; ``after_update`` after each iteration, and it may raise;
    ``on_saved`` with the path of each checkpoint."""

    def __init__(self, on_change: Callable[[], None], after_update: Callable[[], None], on_saved: Callable[[str], None],
                 ranks: Optional[DataParallel] = None, keep_checkpoints: Optional[int] = None) -> None:
        self.on_change = on_change
        self.after_update = after_update
        self.on_saved = on_saved
        self.ranks = ranks or DataParallel()
        self.keep_checkpoints = keep_checkpoints
        self.learner: Any = None
        self.collector: Any = None
        self.evaluator: Any = None
        self.phase = 'start'
        self.updating = False
        self.stopped = False
        self.steps_in_collect = 0
        self.loss: Optional[float] = None
        self._collected = 0
        self.evaluations: List[Evaluation] = []
        self.checkpoint: Optional[Checkpoint] = None
        self.best_reward: Optional[float] = None  # of what the checkpoint was saved by

    @property
    def env_step(self) -> int:
        """Steps of whole collections, which are trained on and which a checkpoint counts."""
        if self.checkpoint is not None:
            return self.checkpoint.env_step
        return 0 if self.collector is None else int(self.collector.envstep)

    @property
    def collected(self) -> int:
        """All steps that were taken. It never goes back, even if a collection is cut off."""
        # The collector's own count is of all ranks, each of which collects as much as this one meanwhile.
        self._collected = max(self._collected, self.env_step + self.steps_in_collect * self.ranks.size)
        return self._collected

    @property
    def train_iter(self) -> int:
        if self.checkpoint is not None:
            return self.checkpoint.train_iter
        return 0 if self.learner is None else int(self.learner.train_iter)

    @property
    def cache(self) -> Any:
        """The model's cache manager, None while there is no model."""
        policy = None if self.evaluator is None else self.evaluator.policy
        model = None if policy is None else policy.get_attribute('model')
        return getattr(getattr(model, 'world_model', None), 'kv_cache_manager', None)

    @property
    def counters(self) -> Dict[str, Any]:
        """The manager's counters; none while there is no manager, or if it counts nothing."""
        read = getattr(self.cache, 'counters', None)
        return dict(read()) if callable(read) else {}

    def restore(self) -> None:
        """Put a new training where the checkpoint stood. LightZero itself would restore the weights alone."""
        if self.checkpoint is None:
            return
        checkpoint, self.checkpoint = self.checkpoint, None
        self.learner.policy.load_state_dict(checkpoint.state)
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
        Evaluate the weights that the training ended with, which LightZero's entries do not. A run that was too short
        for any evaluation has none here either.
        """
        evaluated = bool(self.evaluations) or self.best_reward is not None
        last = self.evaluations[-1].train_iter if self.evaluations else -1
        if evaluated and last < self.train_iter:
            self.evaluator.eval(self.learner.save_checkpoint, self.train_iter, self.env_step)

    def save_checkpoint(self) -> Optional[str]:
        """Save where the training stands; None if there is nothing to save yet."""
        if self.learner is None or self.collector is None:
            return None
        self.learner.collector_envstep = int(self.collector.envstep)
        with applied(save_file=self._saved):
            self.learner.save_checkpoint()
        return self.latest_checkpoint()

    def _saved(self, _: Callable) -> Callable:
        """In place of DI-engine's ``save_file``."""

        def save(path: str, data: Any, *args: Any, **kwargs: Any) -> None:
            save_atomically(data, path)
            self.on_saved(path)
            if self.keep_checkpoints is not None:
                prune(os.path.dirname(path), self.keep_checkpoints)

        return save

    def latest_checkpoint(self) -> Optional[str]:
        if self.learner is None:
            return None
        path = os.path.join(self.learner.exp_name, CHECKPOINTS, f'iteration_{self.train_iter}.pth.tar')
        return path if os.path.isfile(path) else None

    def close(self) -> None:
        """End the environments and flush the event files; what fails here must not hide how the run ended."""
        for part in (self.evaluator, self.collector, self.learner):
            if part is not None:
                with contextlib.suppress(Exception):
                    part.close()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which LightZero's entries train under this watch, into a folder that exists already."""
        with self.ranks.patched(), applied(
                compile_config=lambda original: functools.partial(original, renew_dir=False),
                learner=functools.partial(_watched_learner, self),
                collector=functools.partial(_watched_collector, self),
                evaluator=functools.partial(_watched_evaluator, self), save_file=self._saved):
            yield

    def evaluate(self, configs: entries.Configs, seed: int) -> None:
        """Evaluate the checkpoint, and nothing else; the outcome is in ``evaluations``."""
        checkpoint = self.checkpoint
        assert checkpoint is not None
        entries.make_evaluator(
            configs, seed, functools.partial(_watched_evaluator, self),
            lambda learn_mode: learn_mode.load_state_dict(checkpoint.state))
        self.evaluator.eval(None, checkpoint.train_iter, checkpoint.env_step)


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


def _watched_learner(watch: Watch, base: type) -> type:

    class WatchedLearner(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.learner = self
            for hooks in self._hooks.values():
                hooks[:] = [hook for hook in hooks if not isinstance(hook, RunHook)]

        def call_hook(self, name: str) -> None:
            if name == 'after_run':
                watch.evaluate_last()
            super().call_hook(name)
            # The entries call this when all parts are made, and before anything is collected.
            if name == 'before_run':
                watch.restore()

        def train(self, *args: Any, **kwargs: Any) -> Any:
            # An end inside an update would leave weights of two iterations in one checkpoint.
            watch.updating = True
            try:
                log_vars = super().train(*args, **kwargs)
            finally:
                watch.updating = False
            watch.loss = log_vars[-1].get(LOSS)
            watch.enter('train')
            watch.after_update()
            return log_vars

    return WatchedLearner


def _watched_collector(watch: Watch, base: type) -> type:

    def count(actions: Any) -> None:
        watch.steps_in_collect += len(actions)
        watch.on_change()

    class WatchedCollector(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.collector = self

        def reset_policy(self, _policy: Any = None) -> None:
            super().reset_policy(_before_each(watch.ranks.in_collection, _policy, count))

        def collect(self, *args: Any, **kwargs: Any) -> Any:
            watch.enter('collect')
            try:
                return super().collect(*args, **kwargs)
            finally:
                watch.steps_in_collect = 0
                watch.on_change()

    return WatchedCollector


def _watched_evaluator(watch: Watch, base: type) -> type:

    class WatchedEvaluator(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.policy = kwargs['policy']
            watch.evaluator = self

        def reset_policy(self, _policy: Any = None) -> None:
            super().reset_policy(_before_each(watch.ranks.in_evaluation, _policy))

        def eval(self, save_ckpt_fn: Optional[Callable] = None, train_iter: int = -1, envstep: int = -1,
                 *args: Any, **kwargs: Any) -> Tuple[Any, Any]:
            watch.enter('evaluate')
            best: List[str] = []  # what is to be saved, which is noted together with this evaluation
            stop, info = super().eval(save_ckpt_fn and best.append, train_iter, envstep, *args, **kwargs)
            watch.stopped = bool(stop)
            if info is not None:
                rewards = np.asarray(info['eval_episode_return'], dtype=float)
                watch.evaluations.append(Evaluation(
                    int(envstep), int(train_iter), float(rewards.mean()), float(rewards.std()), rewards.size))
            watch.on_change()
            for name in best:
                watch.learner.save_checkpoint(name)
            return stop, info

    return WatchedEvaluator

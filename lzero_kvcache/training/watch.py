"""Watches a running training through subclasses of LightZero's learner, collector and evaluator."""
import contextlib
import functools
import os
from typing import Any, Callable, ContextManager, List, Optional, Tuple

import numpy as np
import torch

from ..host import entries
from ..host.patches import applied
from ..run_hooks import LOSS, RunHook
from ..summary import Evaluation, Result, reward_text
from .checkpoints import Checkpoint, prune, save_atomically
from .ranks import DataParallel
from .terminal import Terminal


class Watch:
    """
    Keeps a result up to date. ``on_change`` is called whenever something moved, ``on_saved`` with the path of each
    checkpoint.
    """

    def __init__(self, result: Result, terminal: Terminal, ranks: DataParallel, on_change: Callable[[], None],
                 on_saved: Callable[[str], None], keep_checkpoints: Optional[int] = None) -> None:
        self.result, self.terminal, self.ranks = result, terminal, ranks
        self.on_change, self.on_saved, self.keep_checkpoints = on_change, on_saved, keep_checkpoints
        self.learner: Any = None
        self.collector: Any = None
        self.evaluator: Any = None
        self.phase = 'start'
        self.stopped = False
        self.under_way = 0  # env steps of this process in the collection that is under way, or that was cut off
        self.checkpoint: Optional[Checkpoint] = None  # to go on from, or to evaluate
        self.best_reward: Optional[float] = None  # before a training goes on in place
        self.evaluated_at: Optional[int] = None  # the iteration where it goes on, if it was evaluated there
        self.goes_on_from: Optional[Tuple[str, int]] = None  # the checkpoint in its folder, and its iteration

    def look(self) -> None:
        """Bring the result up to date."""
        result = self.result
        if self.learner is not None and self.phase != 'start':
            # Steps of whole collections, which are trained on and which a checkpoint counts.
            result.env_step, result.train_iter = int(self.collector.envstep), int(self.learner.train_iter)
        # What the other ranks collect is known when the collection ends, and never less.
        result.collected_env_step = max(result.collected_env_step, result.env_step + self.under_way)
        if self.evaluator is not None:
            world_model = self.evaluator.policy.get_attribute('model').world_model
            manager = getattr(world_model, 'kv_cache_manager', None)
            result.count({} if manager is None else manager.counters())

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.on_change()

    def evaluated(self, evaluation: Evaluation) -> None:
        """Keep an evaluation, and show it."""
        result = self.result
        result.evaluations.append(evaluation)
        result.last_reward = evaluation.reward
        known = [evaluation.reward] if result.best_reward is None else [evaluation.reward, result.best_reward]
        result.best_reward = max(known)
        self.terminal.line(
            f'Evaluation after {evaluation.env_step:,} env steps, iteration {evaluation.train_iter:,}: '
            f'reward {reward_text(evaluation)}')
        self.on_change()

    def restore(self) -> None:
        """Put a new training where the checkpoint stood. LightZero itself would restore the weights alone."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return
        self.learner.policy.load_state_dict(checkpoint.state)
        self.learner.last_iter.update(checkpoint.train_iter)
        self.learner.collector_envstep = checkpoint.env_step
        entries.set_steps(self.collector, checkpoint.env_step)
        if self.best_reward is not None:  # else the next evaluation, whatever it is, would replace ckpt_best
            entries.set_best_reward(self.evaluator, self.best_reward)
        self.checkpoint = None  # it is as large as the model and its optimizer

    def evaluate_last(self) -> None:
        """
        Evaluate the weights that the training ended with, which LightZero's entries do not. A run that was too short
        for any evaluation has none here either.
        """
        evaluations, train_iter = self.result.evaluations, self.learner.train_iter
        last = evaluations[-1].train_iter if evaluations else -1
        if (evaluations or self.best_reward is not None) and last < train_iter:
            self.evaluator.eval(self.learner.save_checkpoint, train_iter, self.collector.envstep)

    def save_checkpoint(self) -> None:
        """Save where the training stands, if there is anything to save yet."""
        if self.learner is not None and self.collector is not None:
            self.learner.collector_envstep = int(self.collector.envstep)
            with applied(save_file=self._saved):
                self.learner.save_checkpoint()

    def _saved(self, _: Callable) -> Callable:
        """In place of DI-engine's ``save_file``."""

        def save(path: str, data: Any, *args: Any, **kwargs: Any) -> None:
            # DI-engine saves at the first update, too: a checkpoint would change by being gone on from.
            if (os.path.realpath(path), data.get('last_iter')) == self.goes_on_from:
                return
            save_atomically(data, path)
            self.learner.tb_logger.flush()  # a training that is killed goes on from these points
            self.on_saved(os.path.normpath(path))
            if self.keep_checkpoints is not None:
                prune(os.path.dirname(path), self.keep_checkpoints)

        return save

    def close(self) -> None:
        """End the environments and flush the event files; what fails here must not hide how the run ended."""
        for part in (self.evaluator, self.collector, self.learner):
            if part is not None:
                with contextlib.suppress(Exception):
                    part.close()

    def watching(self) -> ContextManager[None]:
        """A context in which LightZero's entries train under this watch, into a folder that exists already."""
        return applied(
            compile_config=lambda original: functools.partial(original, renew_dir=False),
            learner=functools.partial(_watched_learner, self), collector=functools.partial(_watched_collector, self),
            evaluator=functools.partial(_watched_evaluator, self), save_file=self._saved, **self.ranks.replacements())

    def evaluate(self, configs: entries.Configs, seed: int) -> None:
        """Evaluate the checkpoint, and nothing else."""
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
            if name == 'after_iter':  # DI-engine's sum over processes leaves them tensors, which its monitor refuses
                scalars = self.log_buffer['scalar']
                scalars.update({key: value.item() for key, value in scalars.items() if isinstance(value, torch.Tensor)})
            super().call_hook(name)
            # The entries call this when all parts are made, and before anything is collected.
            if name == 'before_run':
                watch.restore()

        def train(self, *args: Any, **kwargs: Any) -> Any:
            log_vars = super().train(*args, **kwargs)
            watch.result.loss = log_vars[-1].get(LOSS)
            watch.enter('train')
            watch.ranks.after_update()
            return log_vars

    return WatchedLearner


def _watched_collector(watch: Watch, base: type) -> type:

    def count(actions: Any) -> None:
        watch.under_way += len(actions)
        watch.on_change()

    class WatchedCollector(base):

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watch.collector = self

        def reset_policy(self, _policy: Any = None) -> None:
            super().reset_policy(_before_each(watch.ranks.in_collection, _policy, count))

        def collect(self, *args: Any, **kwargs: Any) -> Any:
            watch.enter('collect')
            self._begun_at = int(self.envstep)
            collected = super().collect(*args, **kwargs)
            watch.under_way = 0
            watch.on_change()
            return collected

        def _output_log(self, train_iter: int) -> None:
            """Called as a collection ends, on every rank."""
            if watch.ranks.several and not entries.sums_steps(base):
                own = int(self.envstep)
                entries.set_steps(self, self._begun_at)  # an interrupt cuts it off here
                entries.set_steps(self, watch.ranks.collected(self._begun_at, own))
            super()._output_log(train_iter)

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
            if train_iter == watch.evaluated_at:
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

"""Watches a running training."""
import contextlib
import os
from typing import Any, Callable, Optional

from ..host import watched
from ..host.patches import applied
from ..summary import Evaluation, Result, reward_text
from ..telemetry import counters_of
from .checkpoints import prune, save_atomically
from .ranks import DataParallel
from .terminal import Terminal


class Watch(watched.Watcher):
    """
    Keeps a result up to date. ``on_change`` is called whenever something moved, ``on_saved`` with the path of each
    checkpoint.
    """

    def __init__(self, result: Result, terminal: Terminal, ranks: DataParallel, on_change: Callable[[], None],
                 on_saved: Callable[[str], None], keep_checkpoints: Optional[int] = None) -> None:
        self.result, self.terminal, self.ranks = result, terminal, ranks
        self.on_change, self.on_saved, self.keep_checkpoints = on_change, on_saved, keep_checkpoints
        self.phase = 'start'

    def look(self) -> None:
        """Bring the result up to date."""
        result = self.result
        if self.learner is not None and self.phase != 'start':
            # Steps of whole collections, which are trained on and which a checkpoint counts.
            result.env_step, result.train_iter = int(self.collector.envstep), int(self.learner.train_iter)
        # What the other ranks collect is known when the collection ends, and never less.
        result.collected_env_step = max(result.collected_env_step, result.env_step + self.under_way)
        if self.evaluator is not None:
            result.count(counters_of(self.evaluator.policy))

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.on_change()

    def stepped(self, steps: int) -> None:
        self.under_way += steps
        self.on_change()

    def updated(self, loss: Optional[float]) -> None:
        self.result.loss = loss
        self.enter('train')
        self.ranks.after_update()

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

    def evaluate_last(self) -> None:
        """
        Evaluate the weights that the training ended with, which LightZero's entries do not. A run that begins and was
        too short for any evaluation has none here either.
        """
        evaluations, train_iter = self.result.evaluations, self.learner.train_iter
        last = evaluations[-1].train_iter if evaluations else -1
        if (evaluations or self.result.resumed_at) and last < train_iter:
            self.evaluator.eval(self.learner.save_checkpoint, train_iter, self.collector.envstep)

    def cut_off(self, max_env_step: float) -> None:
        """Do not count the steps of the last collection if its updates were interrupted at the step limit: a checkpoint
        that counts all steps could not be continued."""
        self.look()
        if self.result.env_step >= max_env_step and self.phase not in ('start', 'evaluate'):
            self.collector.take_back()

    def save_checkpoint(self) -> None:
        """Save where the training stands, if there is anything to save yet."""
        if self.learner is not None and self.collector is not None:
            self.learner.collector_envstep = int(self.collector.envstep)
            with applied(save_file=lambda original: self.save):
                self.learner.save_checkpoint()

    def save(self, path: str, data: Any, *args: Any, **kwargs: Any) -> None:
        # DI-engine also saves at the first update: it would write over the checkpoint that the training goes on from.
        if (os.path.realpath(path), data.get('last_iter')) == self.past.saved:
            return
        save_atomically(data, path)
        self.learner.tb_logger.flush()  # a training that is killed goes on from these points
        self.on_saved(os.path.normpath(path))
        if self.keep_checkpoints is not None:
            prune(os.path.dirname(path), self.keep_checkpoints)

    def close(self) -> None:
        """End the environments and flush the event files; what fails here must not hide how the run ended."""
        for part in (self.evaluator, self.collector, self.learner):
            if part is not None:
                with contextlib.suppress(Exception):
                    part.close()

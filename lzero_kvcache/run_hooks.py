"""
Learner hooks for trainings that call LightZero's own entry: a line of progress from time to time, and a summary at the
end. ``train.py`` removes them, and shows more itself.
"""
import logging
import os
import sys
import time
import traceback
from dataclasses import replace
from typing import Any, Dict, List, Optional

from ding.worker.learner.learner_hook import LearnerHook, register_learner_hook

from .config import picked_manager
from .run_files import EVENT_FILES, config_of, event_files, events
from .summary import POOLS, SUMMARY, Evaluation, Result, begun, number_text, rate_text
from .telemetry import HOOK_CONFIG, HOOK_KEY, summed_over_ranks

logger = logging.getLogger(__name__)

EVERY_SECONDS = 30.
LOSS = 'weighted_total_loss'
UNBOUNDED = int(1e10)  # what LightZero's entries are given for no limit


class RunHook(LearnerHook):
    """What both hooks know of a run: when it began, how far it is, and when it is to stop."""

    def __init__(self, *args: Any, ext_args: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._result, self._began = begun(**limits_of_entry()), time.monotonic()
        self._next = self._began  # moment for a line

    def look(self, engine: Any) -> Optional[Result]:
        """The run as far as it is; None if the model is not the plugin's. ``engine`` is DI-engine's learner."""
        model = engine.policy.get_attribute('model').world_model
        manager = getattr(model, 'kv_cache_manager', None)
        if manager is None:
            return None
        cfg, result = engine.policy.get_attribute('cfg'), self._result
        result.cache, result.device = picked_manager(cfg.model.world_model_cfg), str(cfg.device)
        result.env_step = result.collected_env_step = max(0, engine.collector_envstep)
        result.train_iter, result.seconds = engine.last_iter.val, time.monotonic() - self._began
        result.env_steps_per_second = result.env_step / result.seconds
        result.count(manager.counters())
        return result


class ProgressHook(RunHook):
    """Logs a line from time to time."""

    def __call__(self, engine: Any) -> None:
        """The first rank speaks."""
        now = time.monotonic()
        if engine.rank != 0 or now < self._next:
            return
        self._next = now + EVERY_SECONDS
        result = self.look(engine)
        if result is not None:
            result.loss = engine.log_buffer['scalar'].get(LOSS)
            logger.info(replace(result, **rewards_of_entry()).line('train'))


class SummaryHook(RunHook):
    """Writes ``summary.json`` when the training ends, and logs a line."""

    def __call__(self, engine: Any) -> None:
        """All ranks count, and the first one speaks."""
        result = self.look(engine)
        if result is None:
            return
        counters = summed_over_ranks(result.counters)
        if engine.rank != 0:
            return
        engine.tb_logger.flush()
        folder = os.path.join(engine.exp_name, EVENT_FILES)
        evaluations = read_evaluations(folder)
        rewards = [evaluation.reward for evaluation in evaluations]
        result = result.at_its_end(
            counters, outcome='done', exp_name=engine.exp_name, seed=config_of(engine.exp_name).get('seed', 0),
            event_files=folder, evaluations=evaluations, last_reward=rewards[-1] if rewards else None,
            best_reward=max(rewards, default=None))
        result.write()
        rates = ', '.join(f'{pool} {rate_text(result.hit_rates[pool])}' for pool in POOLS)
        logger.info(
            f'Hit rates of the cache: {rates}; its memory: {number_text(result.cache_memory_mb)} MiB; best reward '
            f'{number_text(result.best_reward)}. {os.path.join(engine.exp_name, SUMMARY)} has all numbers')


def limits_of_entry() -> Dict[str, Any]:
    """The limits of the entry that is making a learner."""
    limits = _of_entry('max_env_step', 'max_train_iter')
    return {name: limit if limit and limit < UNBOUNDED else None for name, limit in limits.items()}


def rewards_of_entry() -> Dict[str, Any]:
    """The last and the best reward of the entry that trains; nothing before its first evaluation."""
    known = _of_entry('evaluator', 'reward')
    episodes = known['reward'].get('eval_episode_return') if isinstance(known.get('reward'), dict) else None
    if episodes is None:
        return {}
    last = float(sum(episodes)) / len(episodes)
    return dict(last_reward=last, best_reward=max(last, getattr(known['evaluator'], '_max_episode_return', last)))


def _of_entry(*names: str) -> Dict[str, Any]:
    """Local variables of the entry that is running, by their names. It hands them to nobody, so they are read on the
    stack."""
    for frame, _ in traceback.walk_stack(sys._getframe()):
        if set(names) <= set(frame.f_code.co_varnames):
            return {name: frame.f_locals.get(name) for name in names}
    return {}


def read_evaluations(folder: str) -> List[Evaluation]:
    """All evaluations in a run's event files; LightZero's evaluator writes each against iterations and steps."""
    rewards, steps = [], []
    for path in event_files(folder):  # a script may log elsewhere
        for _, event in events(path):
            for value in event.summary.value:
                if value.tag == 'evaluator_iter/reward_mean':
                    rewards.append((event.step, value.simple_value))
                elif value.tag == 'evaluator_step/reward_mean':
                    steps.append(event.step)
    return [Evaluation(step, iteration, reward) for step, (iteration, reward) in zip(steps, rewards)]


PROGRESS, END = 'kv_cache_progress', 'kv_cache_summary'
register_learner_hook(PROGRESS, ProgressHook)
register_learner_hook(END, SummaryHook)
# By the key under which they stand in a policy's default config. DI-engine's own are at 20: one clears the losses, one
# saves the last checkpoint.
HOOKS = {
    HOOK_KEY: HOOK_CONFIG,
    PROGRESS: dict(type=PROGRESS, name=PROGRESS, priority=15, position='after_iter'),
    END: dict(type=END, name=END, priority=30, position='after_run'),
}

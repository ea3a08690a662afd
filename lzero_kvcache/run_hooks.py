"""
Learner hooks for trainings that call LightZero's own entry: the folder is held, how far they are is logged and written
from time to time, and a summary at the end. ``train.py`` removes them, and shows more itself.
"""
import contextlib
import logging
import os
import shutil
import sys
import time
import traceback
from dataclasses import replace
from itertools import repeat
from types import FrameType
from typing import Any, Dict, Iterator, List, Optional, Tuple

from ding.worker.learner.learner_hook import LearnerHook, register_learner_hook

from .config import ConfigError, picked_manager
from .lock_files import training_in
from .run_files import CONFIG_FILES, DONE, EVALUATIONS, EVENT_FILES, LOADED, config_of, event_files, events
from .summary import SUMMARY, Evaluation, Result, begun, number_text, rate_text, reward_text
from .telemetry import HOOK_CONFIG, HOOK_KEY, summed_over_ranks

logger = logging.getLogger(__name__)

EVERY_SECONDS = 30.
LOSS = 'weighted_total_loss'
LOSS_TAG = f'learner_iter/{LOSS}_avg'
# Mean, standard deviation and number of episodes of each evaluation.
EVALUATED = tuple(EVALUATIONS[0] + name for name in ('reward_mean', 'reward_std', 'episode_count'))
EVALUATED_STEPS = EVALUATIONS[1] + 'reward_mean'
UNBOUNDED = int(1e10)  # what LightZero's entries are given for no limit


class RunHook(LearnerHook):
    """What the hooks know of a run: when it began, how far it is, and when it is to stop."""

    def __init__(self, *args: Any, ext_args: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._result, self._began = begun(**limits_of_entry(), **origin_of_entry()), time.monotonic()
        self._next = self._began  # when the next line is due

    def look(self, engine: Any) -> Optional[Result]:
        """The run as far as it is; None if the model is not the plugin's. ``engine`` is DI-engine's learner."""
        model = engine.policy.get_attribute('model').world_model
        manager = getattr(model, 'kv_cache_manager', None)
        if manager is None:
            return None
        cfg, result = engine.policy.get_attribute('cfg'), self._result
        if not result.exp_name:
            result.exp_name, result.event_files = engine.exp_name, os.path.join(engine.exp_name, EVENT_FILES)
            result.seed, result.processes = config_of(engine.exp_name).get('seed', 0), engine.world_size
            result.run_id = next(hook._result.run_id for hook in engine._hooks['before_run']
                                 if isinstance(hook, BeginHook))
            result.versions['LightZero'] = model.lightzero_version
        result.cache, result.device = picked_manager(cfg.model.world_model_cfg), str(cfg.device)
        result.env_step = result.collected_env_step = max(0, engine.collector_envstep)
        result.train_iter, result.seconds = engine.last_iter.val, time.monotonic() - self._began
        result.env_steps_per_second = result.env_step / result.seconds
        result.count(manager.counters())
        return result


class BeginHook(RunHook):
    """Holds the run's folder, so that no second training goes on in it, until the training or its process ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.holding = contextlib.ExitStack()

    def __call__(self, engine: Any) -> None:
        """The first rank writes."""
        if engine.rank != 0:
            return
        result = self.look(engine)
        if result is not None:
            self.holding.enter_context(training_in(engine.exp_name, engine.exp_name))
            write_progress(result, 'start')


class ProgressHook(RunHook):
    """Logs a line from time to time, and writes how far the run is: the record of one that is killed."""

    def __call__(self, engine: Any) -> None:
        """Only the first rank logs."""
        now = time.monotonic()
        if engine.rank != 0 or now < self._next:
            return
        self._next = now + EVERY_SECONDS
        result = self.look(engine)
        if result is not None:
            result.loss = engine.log_buffer['scalar'].get(LOSS)
            result = replace(result, **rewards_of_entry())
            logger.info(result.line('train'))
            write_progress(result, 'train')


class SummaryHook(RunHook):
    """Writes ``summary.json`` when the training ends, and logs a line."""

    def __call__(self, engine: Any) -> None:
        """All ranks add up their counts; the first one writes and logs."""
        result = self.look(engine)
        if result is None:
            return
        counters = summed_over_ranks(result.counters)
        if engine.rank != 0:
            return
        engine.tb_logger.flush()
        seen = read_events(result.event_files)
        evaluations = seen.evaluations
        rewards = [evaluation.reward for evaluation in evaluations]
        result = result.at_its_end(
            counters, outcome=DONE, exit_code=0, evaluations=evaluations, loss=seen.loss,
            last_reward=rewards[-1] if rewards else None, best_reward=max(rewards, default=None))
        result.write()
        result.write_progress('end')
        for hook in engine._hooks['before_run']:
            if isinstance(hook, BeginHook):
                hook.holding.close()
        rates = ', '.join(f'{pool} {rate_text(rate)}' for pool, rate in result.hit_rates.items())
        last = reward_text(evaluations[-1]) if evaluations else number_text(None)
        logger.info(
            f'Hit rates of the cache: {rates}; its memory: {number_text(result.cache_memory_mb)} MiB; last reward '
            f'{last}, best {number_text(result.best_reward)}. {os.path.join(engine.exp_name, SUMMARY)} has all numbers')


def write_progress(result: Result, phase: str) -> None:
    """How far a run is. Its evaluations would have to be looked for in its event files, which grow."""
    result.write_progress(phase, evaluations=None)


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


def origin_of_entry() -> Dict[str, Any]:
    """The name of the entry that is making a learner, and the file that has called it, if it is one."""
    frame = _frame_of_entry('max_env_step', 'max_train_iter')
    if frame is None:
        return {}
    caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ''
    return dict(entry=frame.f_code.co_name, config=os.path.abspath(caller) if os.path.isfile(caller) else '')


def source_of_checkpoint() -> str:
    """The option and the path of the checkpoint that DI-engine's learner or an entry is loading; nothing where another
    caller loads one."""
    of_learner = _of_entry('engine', 'path', 'state_dict')
    if of_learner:
        return f'{LOADED}={of_learner["path"]}'
    of_entry = _of_entry('model_path', 'create_cfg')
    return f'model_path={of_entry["model_path"]}' if of_entry else ''


@contextlib.contextmanager
def leaving_no_folder() -> Iterator[None]:
    """Where LightZero's own entry is refused before it trains, remove the folder that DI-engine has just made for its
    config, if it holds nothing else."""
    try:
        yield
    except ConfigError:
        frame = _frame_of_entry('cfg', 'create_cfg')
        if frame is not None and frame.f_globals.get('__name__', '').startswith('lzero.entry.'):
            folder = getattr(frame.f_locals.get('cfg'), 'exp_name', None)
            if folder and os.path.isdir(folder) and set(os.listdir(folder)) <= CONFIG_FILES:
                shutil.rmtree(folder, ignore_errors=True)
        raise


def _of_entry(*names: str) -> Dict[str, Any]:
    """Local variables of the entry that is running, by their names. LightZero hands them to no hook, so they are read
    from the stack."""
    frame = _frame_of_entry(*names)
    return {} if frame is None else {name: frame.f_locals.get(name) for name in names}


def _frame_of_entry(*names: str) -> Optional[FrameType]:
    """The innermost frame whose function has these local variables."""
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe()))
    return next((frame for frame in frames if set(names) <= set(frame.f_code.co_varnames)), None)


class Seen:
    """The evaluations in event files, and the last loss, as far as events were added. LightZero's evaluator writes each
    number twice, against iterations and against steps."""

    def __init__(self) -> None:
        self.loss: Optional[float] = None
        self._found: Dict[str, Dict[str, List[Tuple[int, float]]]] = {}  # of each file, since each may break off

    def add(self, path: str, event: Any) -> None:
        """An event of a file."""
        found = self._found.setdefault(path, {tag: [] for tag in (*EVALUATED, EVALUATED_STEPS)})
        for value in event.summary.value:
            if value.tag == LOSS_TAG:
                self.loss = value.simple_value
            elif value.tag in found:
                found[value.tag].append((event.step, value.simple_value))

    @property
    def evaluations(self) -> List[Evaluation]:
        """All of them, as they stand in the files."""
        found_in = [([found[tag] for tag in EVALUATED], found[EVALUATED_STEPS]) for found in self._found.values()]
        return [
            Evaluation(step, iteration, reward, deviation, None if episodes is None else int(episodes))
            for (means, deviations, counts), steps in found_in
            for (step, _), (iteration, reward), (_, deviation), (_, episodes)
            in zip(steps, means, deviations or repeat((0, None)), counts or repeat((0, None)))
        ]


def read_events(folder: str) -> Seen:
    """What the event files in a folder have; a script may log elsewhere."""
    seen = Seen()
    for path in event_files(folder):
        for _, event in events(path):
            seen.add(path, event)
    return seen


BEGIN_HOOK, PROGRESS_HOOK, SUMMARY_HOOK = 'kv_cache_folder', 'kv_cache_progress', 'kv_cache_summary'
register_learner_hook(BEGIN_HOOK, BeginHook)
register_learner_hook(PROGRESS_HOOK, ProgressHook)
register_learner_hook(SUMMARY_HOOK, SummaryHook)
# By the key under which they stand in a policy's default config. DI-engine's own are at 20: one clears the losses, one
# saves the last checkpoint.
HOOKS = {
    HOOK_KEY: HOOK_CONFIG,
    BEGIN_HOOK: dict(type=BEGIN_HOOK, name=BEGIN_HOOK, priority=15, position='before_run'),
    PROGRESS_HOOK: dict(type=PROGRESS_HOOK, name=PROGRESS_HOOK, priority=15, position='after_iter'),
    SUMMARY_HOOK: dict(type=SUMMARY_HOOK, name=SUMMARY_HOOK, priority=30, position='after_run'),
}

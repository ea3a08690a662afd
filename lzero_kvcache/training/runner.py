"""
One run of a plan: makes the experiment's folder, ends cleanly when interrupted, and leaves a summary next to the event
files.
"""
import contextlib
import datetime
import itertools
import os
import shutil
import signal
import time
import traceback
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from torch.utils.tensorboard import SummaryWriter

from ..config import ConfigError, picked_manager
from ..host import building, watched
from ..host.data_parallel import Interrupted
from ..host.entries import UNBOUNDED, check_wandb_login
from ..host.lightzero import VERSION
from ..host.patches import applied
from ..lock_files import check_not_trained_in, training_in
from ..run_files import DONE, EVALUATE, EVENT_FILES, LOADED, STOPPED, TRAIN, Record, remove_empty
from ..summary import Result, add_up, begun
from ..telemetry import summed_over_ranks
from .checkpoints import Checkpoint, beside, is_abandoned, read_checkpoint
from .config_file import Plan, look_beside
from .error_hints import hinted
from .past import take_up
from .ranks import DataParallel
from .terminal import Bar, Output, summary_rows, unlogged
from .watch import Watch

LOG_FILE = os.path.join('log', 'train.log')
LOG_FILE_OF_RANK = os.path.join('log', 'train_rank{}.log')
NO_BUFFER = 'A checkpoint holds no replay buffer, so collection begins with an empty one'
# The bar is redrawn four times a second, so counters are not asked for more often.
REFRESH_SECONDS = 0.25


def run(plan: Plan, output: Optional[Output] = None, ranks: Optional[DataParallel] = None) -> Result:
    """Train or evaluate. ``output`` has been entered, if it is given; an error of the training itself is raised."""
    look_beside(plan.config)
    with contextlib.ExitStack() as stack:
        output = output or stack.enter_context(Output())
        return _Training(plan, output, ranks or DataParallel()).run()


def claim_folder(asked: str) -> Tuple[str, List[str]]:
    """
    Make a folder for this experiment alone: a name that is taken gets the time appended. Returns a relative path, since
    DI-engine puts './' before it, and the parent folders that were made too, the uppermost last.
    """
    exp_name = os.path.relpath(os.path.expanduser(asked))
    if os.path.basename(exp_name) in ('.', '..'):
        raise ConfigError(f'{asked}: this folder is there; give --exp-name a name of its own')
    above = [str(folder) for folder in Path(exp_name).parents if not os.path.lexists(folder)]
    stamped = exp_name + datetime.datetime.now().strftime('_%y%m%d_%H%M%S')
    names = itertools.chain([exp_name, stamped], (f'{stamped}_{attempt}' for attempt in itertools.count(1)))
    if os.path.lexists(exp_name) and not os.path.isdir(exp_name):
        raise ConfigError(f'{asked}: this is a file; give another --exp-name')
    while True:
        name = next(names)
        try:
            os.makedirs(name)
            return name, above
        except FileExistsError:
            continue
        except OSError as error:
            remove_empty(above)
            raise ConfigError(
                f'{asked}: the folder of the experiment cannot be made ({error.strerror}); give another --exp-name'
            ) from error


class _Training:

    def __init__(self, plan: Plan, output: Output, ranks: DataParallel) -> None:
        self.plan = plan
        self.ranks = ranks
        self.output = output
        self.terminal = output.terminal
        self.result = begun(
            plan.seed, plan.task, config=plan.config, entry=plan.entry, max_env_step=plan.max_env_step,
            max_train_iter=plan.max_train_iter, processes=ranks.size, overrides=list(plan.overrides),
            checkpoint=plan.checkpoint)
        self.result.versions['LightZero'] = VERSION
        self.watch = Watch(
            self.result, self.terminal, ranks, self._refresh, self._note, keep_checkpoints=plan.keep_checkpoints)
        self._pid = os.getpid()
        self._finishing = False
        self._absolute = False  # whether the user gave the experiment's folder as an absolute path
        self._made: Optional[List[str]] = None  # parent folders that were made for the run's folder
        self._holding = contextlib.ExitStack()  # the run's folder
        self._started = time.monotonic()
        self._next_refresh = 0.0
        self._first_collected = 0
        self._bar: Bar

    def run(self) -> Result:
        try:
            with hinted(), applied(threads=lambda before: self.plan.threads or before), self._holding:
                self._check()
                self._make_folder()
                self._announce()
                return self._train()
        except Exception:
            # A run that ends before it begins leaves nothing behind.
            if self._made is not None and self.watch.phase == 'start':
                shutil.rmtree(self.result.exp_name, ignore_errors=True)
                remove_empty(self._made)
            raise

    def _train(self) -> Result:
        plan, result = self.plan, self.result
        with applied(interrupts=lambda original: self._on_signal):
            self._bar = Bar(self.terminal, plan.max_env_step if plan.task == TRAIN else None, self._first_collected)
            together = True
            try:
                result.outcome, result.exit_code = self._work(), 0
            except BaseException as error:
                interrupt = self._interrupt(error)
                if interrupt is None:
                    self.output.write_log(traceback.format_exc())
                    raise
                result.outcome, result.exit_code = f'interrupted by {interrupt}', 128 + interrupt.signum
                together = interrupt.agreed
                self.watch.cut_off(plan.max_env_step or UNBOUNDED)
                if plan.task == TRAIN and self.ranks.main:
                    self.watch.save_checkpoint()
            finally:
                self._refresh(now=True)
                shown = plan.task == TRAIN and self.watch.phase != 'start'
                self._bar.close(self._whole(result).line('end') if shown else '')
                self.terminal.repetitions()
                self.watch.close()
            own: Dict[str, Any] = dict(counters=result.counters, cut_off=self.watch.under_way)
            # Ranks that have not agreed on ending cannot add up what they counted.
            counted = summed_over_ranks(own) if together else own
            result.collected_env_step += counted['cut_off'] - own['cut_off']
            self._time(result.seconds)
            result = self._completed(counted['counters'])
            if self.ranks.main:
                result.write()
                result.write_progress(self.watch.phase)
            if together:
                self.ranks.part()
        title = 'Training: ' if plan.task == TRAIN else 'Evaluation: '
        self.terminal.table(title + result.outcome, summary_rows(result))
        return result

    def _check(self) -> None:
        """Refuse what cannot work, before a folder is made."""
        plan, result, watch = self.plan, self.result, self.watch
        given = plan.checkpoint if plan.in_place else plan.main_config.exp_name
        self._absolute = os.path.isabs(os.path.expanduser(str(given)))
        policy = plan.main_config.policy
        # LightZero and DI-engine load these without looking at what they hold.
        loaded = [(f'{key}={path}', _given(f'{key}=', path).state) for key, path in (
            ('policy.model_path', policy.get('model_path')),
            (LOADED, self._loaded_by_learner)) if path]
        if plan.checkpoint is not None:
            option = '--resume' if plan.task == TRAIN else '--eval'
            watch.loaded = _given(f'{option} ', plan.checkpoint)
            loaded.append((f'{option} {plan.checkpoint}', watch.loaded.state))
            result.env_step, result.train_iter = watch.loaded.env_step, watch.loaded.train_iter
            result.collected_env_step = result.env_step
        result.cache = picked_manager(policy.model.world_model_cfg)
        result.device = str(policy.model.world_model_cfg.device)
        if plan.in_place:
            self._check_place()
        self._first_collected = result.collected_env_step
        if policy.get('use_wandb', False):
            check_wandb_login()
        if plan.task == TRAIN and result.env_step >= (plan.max_env_step or UNBOUNDED):
            raise ConfigError(
                f'--resume {plan.checkpoint}: it stands at {result.env_step} environment steps, and max_env_step is '
                f'{plan.max_env_step}; give a higher --max-env-step'
            )
        if self.ranks.several and plan.task == EVALUATE:
            raise ConfigError('--eval evaluates in one process; run it without torchrun')
        building.try_environment(plan.main_config, plan.create_config)
        with unlogged():
            building.try_policy(plan.main_config, plan.create_config, loaded)

    @property
    def _loaded_by_learner(self) -> Optional[str]:
        """The checkpoint that DI-engine's learner loads as it begins."""
        learn = self.plan.main_config.policy.get('learn', {})
        return learn.get('learner', {}).get('hook', {}).get('load_ckpt_before_run')

    def _check_place(self) -> None:
        """No other process may train in the folder that a training goes on in, which must be of one cache system, nor
        may the checkpoint be of a part that was abandoned there."""
        plan, now = self.plan, self.result.cache
        folder = plan.main_config.exp_name
        check_not_trained_in(folder, self._shown(folder))
        was, fault = Record(folder).read().cache, None
        if was and was != now:
            fault = f"{self._shown(folder)} was trained with cache system '{was}', not '{now}'"
        elif is_abandoned(str(plan.checkpoint)):
            fault = f'{plan.checkpoint} is of a part that was abandoned when the training went on from an earlier one'
        if fault:
            raise ConfigError(f'--in-place: {fault}; give --exp-name in its place, and the training goes on in a '
                              'folder of its own')

    def _make_folder(self) -> None:
        plan, ranks = self.plan, self.ranks
        ranks.join(str(plan.main_config.policy.model.world_model_cfg.device))
        ranks.share_out(plan.main_config, building.completed(plan.main_config, plan.create_config), plan.entry)
        asked = plan.main_config.exp_name
        exp_name = ranks.from_main(self._take_folder)
        if plan.in_place:
            self._take_up(exp_name)
        elif exp_name != os.path.relpath(os.path.expanduser(asked)):
            self.terminal.line(f'{asked} is there already, so this run has another folder: {self._shown(exp_name)}')
        plan.main_config.exp_name = exp_name
        self.result.exp_name = shown = self._shown(exp_name)
        self.result.event_files = os.path.join(shown, EVENT_FILES)
        self.result.log_file = os.path.join(shown, LOG_FILE if ranks.main else LOG_FILE_OF_RANK.format(ranks.rank))
        self.output.attach(self.result.log_file)

    def _take_folder(self) -> str:
        """Make the folder, or find it, for this run alone; on the first rank."""
        asked = self.plan.main_config.exp_name
        if self.plan.in_place:
            exp_name = os.path.relpath(asked)
        else:
            exp_name, self._made = claim_folder(asked)
        self._holding.enter_context(training_in(exp_name, self._shown(exp_name)))
        return exp_name

    def _take_up(self, folder: str) -> None:
        """Continue the training from the state and the numbers at its checkpoint."""
        path, result = str(self.plan.checkpoint), self.result
        past = self.watch.past = self.ranks.from_main(
            lambda: take_up(folder, path, result.train_iter, result.env_step, self.terminal.line))
        if past.result is not None:
            result.best_reward = past.result.best_reward
        if past.run_id is not None:
            result.run_id = past.run_id

    def _shown(self, path: str) -> str:
        """A path as the user would give it; DI-engine's are relative."""
        return os.path.abspath(path) if self._absolute else os.path.relpath(path)

    def _announce(self) -> None:
        plan, result, line = self.plan, self.result, self.terminal.line
        if plan.task == EVALUATE:
            line(f'Evaluating {plan.checkpoint} into {result.exp_name}')
            return
        line(f'Training with {plan.entry} into {result.exp_name}')
        if plan.checkpoint is not None:
            result.resumed_at = [result.env_step]
            line(
                f'Going on from {plan.checkpoint}: {result.env_step:,} env steps, {result.train_iter:,} iterations. '
                + NO_BUFFER)
        elif self._loaded_by_learner:
            line(f'Going on from {self._loaded_by_learner} ({LOADED}). {NO_BUFFER}')
        if plan.max_env_step is None and plan.max_train_iter is None:
            line('No max_env_step in the config and none given: it trains until interrupted (Ctrl-C)')

    def _work(self) -> str:
        plan = self.plan
        configs = (plan.main_config, plan.create_config)
        if plan.task == EVALUATE:
            writer = SummaryWriter(os.path.join(plan.main_config.exp_name, EVENT_FILES))
            watched.evaluate(self.watch, configs, plan.seed, writer)
            return DONE
        watched.train(
            self.watch, plan.entry, configs, model_path=plan.main_config.policy.get('model_path'),
            seed=self.ranks.seed(plan.seed, plan.main_config.env.get('collector_env_num', 0)),
            max_train_iter=plan.max_train_iter or UNBOUNDED, max_env_step=plan.max_env_step or UNBOUNDED,
        )
        return STOPPED if self.watch.stopped else DONE

    def _on_signal(self, signum: int, _: Any) -> None:
        # Ctrl-C goes to the environments' processes as well, which inherit this handler; their parent ends them.
        if os.getpid() != self._pid:
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if self.result.outcome:  # the last checkpoint is being saved
            return
        first, self.ranks.asked = self.ranks.asked is None, signum
        # A training ends by itself after a step or an update; before it has begun, or at a second signal, at once.
        if not first or self.watch.phase == 'start':
            raise Interrupted(signum)

    def _interrupt(self, error: BaseException) -> Optional[Interrupted]:
        """The interrupt behind an error, if any: DI-engine's environments raise errors of their own for it."""
        if isinstance(error, Interrupted):
            return error
        return None if self.ranks.asked is None else Interrupted(self.ranks.asked)

    def _refresh(self, now: bool = False) -> None:
        moment = time.monotonic()
        if not now and moment < self._next_refresh:
            return
        self._next_refresh = moment + REFRESH_SECONDS
        result = self.result
        self.watch.look()
        self._time(moment - self._started)
        if not self._finishing and result.env_step >= (result.max_env_step or UNBOUNDED):
            self._finishing = True
            self.terminal.line(f'{result.env_step:,} env steps are collected: finishing the updates that go with them')
        whole = self._whole(result)
        self._bar.update(result.collected_env_step, whole.line(self.watch.phase), whole.steps_at_the_end)
        if self.ranks.main:
            whole.write_progress(self.watch.phase)

    def _time(self, seconds: float) -> None:
        """How long this run has taken, and how fast it is."""
        steps = self.result.collected_env_step - self._first_collected
        self.result.seconds, self.result.env_steps_per_second = seconds, steps / seconds if steps > 0 else None

    def _note(self, checkpoint: str) -> None:
        """Write the result so far beside a checkpoint; after a kill, the training goes on from these two alone."""
        self.result.checkpoint = self._shown(checkpoint)
        self._refresh(now=True)
        completed = self._completed(self.result.counters)
        self.result.machine = completed.machine
        completed.write(beside(checkpoint))

    def _completed(self, counters: Dict[str, Any]) -> Result:
        """The result of a run that has ended."""
        return self._whole(self.result.at_its_end(counters))

    def _whole(self, result: Result) -> Result:
        """The result of the whole training, which output and files show, if this run continued an earlier one in
        place."""
        before = self.watch.past.result
        return result if before is None else add_up(before, result)


def _given(option: str, path: str) -> Checkpoint:
    """The checkpoint that an option gives."""
    try:
        return read_checkpoint(path)
    except ConfigError as error:
        raise ConfigError(f'{option}{error}') from error

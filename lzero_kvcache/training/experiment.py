"""
An experiment on disk: a training for each cache system and seed, all of one set of settings, and how far each of them
is. ``processes.py`` starts and watches them.
"""
import contextlib
import hashlib
import itertools
import os
from dataclasses import dataclass, replace
from typing import IO, Any, Callable, Dict, Iterator, Optional, Sequence

from lzero_kvcache_options import TrainOptions

from ..config import FLAG, OPTIONS, PREFIX, ConfigError, system_of
from ..host import building
from ..lock_files import check_not_trained_in, held
from ..run_files import EXPERIMENT, TRAIN, read_json, write_json
from ..summary import Result, read_summary
from . import overrides
from .checkpoints import CHECKPOINTS, in_folder, is_abandoned, read_checkpoint
from .config_file import Plan
from .plan import plan_of
from .terminal import unlogged

LOCK = 'experiment.lock'
# The settings that a later call may add to, and those that it must repeat.
GROWING = ('caches', 'seeds')
FIXED = ('max_env_step', 'max_train_iter', 'device', 'threads', 'values')
VALUES_VERSION = 2
# Without values_version an experiment.json is of version 1, whose hash covered these defaults too. It is accepted if
# the values of now, with these defaults added, give the same hash.
VERSION_1_DEFAULTS: Dict[str, Any] = {
    f'{PREFIX}.{FLAG}': False,
    **{f'{PREFIX}.{key}': None for key in ('game_segment_length', 'num_simulations', 'env_num')},
    **{f'{PREFIX}.{OPTIONS}.{key}': None for key in (
        'type', 'eviction', 'init_pool_size', 'recurrent_pool_size', 'enable_stats', 'dtype', 'max_memory_mb',
        'backend', 'on_nan', 'validation', 'validation_freq', 'validation_tol', 'validation_action'
    )},
}


@dataclass(frozen=True)
class Trial:
    """One training of an experiment."""
    cache: str
    seed: int
    folder: str

    @property
    def name(self) -> str:
        return os.path.basename(self.folder)

    @property
    def log(self) -> str:
        """The file that has what its process prints."""
        return self.folder + '.log'

    @property
    def result(self) -> Optional[Result]:
        """Its summary; None as long as it has not ended, or if it was cut off."""
        result = read_summary(self.folder)
        if result is None:
            return None
        found = result.exit_code, result.task, result.seed, system_of(result.cache)
        return result if found == (0, TRAIN, self.seed, self.cache) else None


class Experiment:
    """
    Trainings below one folder that differ only in cache system and seed; all else is in ``shared``. A training that
    cannot be started is refused.
    """

    def __init__(self, folder: str, shared: TrainOptions, caches: Sequence[str], seeds: Sequence[int]) -> None:
        self.folder, self.shared = folder, shared
        self.caches, self.seeds = list(dict.fromkeys(caches)), list(dict.fromkeys(seeds))
        if any(text.partition('=')[0].strip(' +') == 'exp_name' for text in shared.overrides):
            raise ConfigError('--set exp_name: an experiment names its folders by system and seed; --out says where')
        plans = {cache: plan_of(replace(shared, cache=cache, seed=max(self.seeds), exp_name=EXPERIMENT))
                 for cache in dict.fromkeys(('old', *self.caches))}
        plan = plans['old']
        if plan.max_env_step is None:
            raise ConfigError(f'{plan.config} has no max_env_step, and every run must end; give --max-env-step')
        building.try_environment(plan.main_config, plan.create_config)
        with unlogged():
            for cache in self.caches:
                building.try_policy(plans[cache].main_config, plans[cache].create_config)
        self._plan = plan  # of the old system, whichever are asked for
        self.max_env_step: int = plan.max_env_step
        # Seeds in the outer loop: if the machine is busy for a while, that slows both systems.
        self.trials = [
            Trial(cache, seed, os.path.join(folder, f'{cache}_seed{seed}'))
            for seed in self.seeds for cache in self.caches
        ]

    @property
    def settings(self) -> Dict[str, Any]:
        """The content of ``experiment.json``."""
        plan = self._plan
        return dict(
            config=plan.config, caches=self.caches, seeds=self.seeds, max_env_step=plan.max_env_step,
            max_train_iter=plan.max_train_iter, threads=plan.threads,
            device=str(plan.main_config.policy.model.world_model_cfg.device),
            options=replace(self.shared, config='').arguments(),
            values_version=VALUES_VERSION, values=_hash(plan, VALUES_VERSION),
        )

    @contextlib.contextmanager
    def opened(self) -> Iterator[IO[str]]:
        """
        A context in which no other process works on this experiment, and its settings are on disk. Gives the lock file:
        the experiment is taken for as long as any process holds it.
        """
        path = os.path.join(self.folder, EXPERIMENT)
        settings = self._agreed(path)
        refusal = f'--out {self.folder}: its runs are still going on, in {{who}}; wait for them, or end them'
        with held(os.path.join(self.folder, LOCK), refusal) as lock:
            write_json(path, settings)
            yield lock

    def ask(self, trial: Trial, tell: Callable[[str], None]) -> TrainOptions:
        """
        The options of a trial that is not done: it goes on in its folder from the last whole checkpoint there. Without
        one it begins anew, and a folder of that name is renamed, with a line. A folder that is trained in is refused.
        """
        check_not_trained_in(trial.folder, trial.folder)
        asked = replace(self.shared, cache=trial.cache, seed=trial.seed)
        checkpoint = last_checkpoint(trial.folder, self.max_env_step)
        if checkpoint is not None:
            return replace(asked, resume=checkpoint, in_place=True)
        if os.path.exists(trial.folder):
            names = (f'{trial.folder}_cut_off{attempt}' for attempt in itertools.count(1))
            aside = next(name for name in names if not os.path.exists(name))
            os.rename(trial.folder, aside)
            tell(f'{trial.name}: has no checkpoint to go on from; its folder is now {os.path.basename(aside)}')
        return replace(asked, exp_name=trial.folder)

    def _agreed(self, path: str) -> Dict[str, Any]:
        """The settings, with the seeds and systems that are there already."""
        settings = self.settings
        if not os.path.exists(path):
            there = os.listdir(self.folder) if os.path.isdir(self.folder) else []
            if set(there) - {LOCK}:
                raise ConfigError(f'--out {self.folder} is not empty, and is no experiment; give another')
            return settings
        try:
            held = read_json(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f'{path} cannot be read ({error}); give another --out') from error
        version = held.get('values_version', 1)
        if version not in (1, VALUES_VERSION):
            raise ConfigError(
                f'--out {self.folder} is an experiment of a later version of this program (values_version={version!r} '
                f'in {EXPERIMENT}, not {VALUES_VERSION}); give another --out'
            )
        asked = settings if version == VALUES_VERSION else {**settings, 'values': _hash(self._plan, version)}
        for name in FIXED:
            was, now = held.get(name), asked[name]
            if was != now:
                said = f'{name} {was}, not {now}'
                if name == 'values':
                    said = f"{held.get('config')} as it was then, with the options {held.get('options')}"
                raise ConfigError(f'--out {self.folder} is an experiment with {said}; give another --out')
        for name in GROWING:
            settings[name] = list(dict.fromkeys([*held.get(name, []), *settings[name]]))
        return settings


def _hash(plan: Plan, version: int) -> str:
    """The entry and every value that a config and its options give beyond the defaults."""
    held, defaults = overrides.leaves({**plan.main_config, overrides.CREATE: plan.create_config}), overrides.CACHE_PATHS
    given = {path: value for path, value in held.items() if path not in defaults or value != defaults[path]}
    values = {**VERSION_1_DEFAULTS, **given} if version == 1 else given
    lines = [f'{path}={getattr(value, "__qualname__", None) or repr(value)}' for path, value in values.items()]
    return hashlib.sha256('\n'.join([plan.entry, *sorted(lines)]).encode()).hexdigest()


def last_checkpoint(folder: str, max_env_step: int) -> Optional[str]:
    """The last whole checkpoint in the folder of a training that was cut off before ``max_env_step``."""
    for _, path in reversed(in_folder(os.path.join(folder, CHECKPOINTS))):
        if is_abandoned(path):
            continue
        with contextlib.suppress(ConfigError):
            held = read_checkpoint(path)
            if held.train_iter > 0 and held.env_step < max_env_step:
                return path
    return None

"""What two sides differ in besides the cache: their configs, and what makes their numbers not comparable."""
import functools
import itertools
import operator
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Sequence

from .events import host_of
from .runs import WORLD_MODEL, Run
from .saved_config import OF_ONE_RUN
from .sides import Side

ABSENT = '(absent)'
# Collection ends with a whole phase, so that runs of one budget end some steps apart.
BUDGET_TOLERANCE = 0.75
BUDGETS = {'max_env_step': 'environment steps', 'max_train_iter': 'training iterations'}
MACHINE = {'system': 'systems', 'processor': 'processors', 'cpus': 'numbers of CPUs', 'threads': 'numbers of threads',
           'gpu': 'GPUs', 'python': 'versions of Python', 'torch': 'versions of torch', 'ding': 'versions of DI-engine'}
ENVIRONMENT = ('env.env_id', 'env.env_name', 'env.type')


class Difference(NamedTuple):
    """
    Overview:
        A config key and its values by the name of a side, as text; joined by '; ' where the side's runs differ.
    """
    key: str
    values: Dict[str, str]


def config_differences(sides: Sequence[Side]) -> List[Difference]:
    """
    Overview:
        The keys that two sides do not have the same value for. Sides without a saved config are left out.
    Arguments:
        - sides (:obj:`Sequence[Side]`): The sides.
    Returns:
        - differences (:obj:`List[Difference]`): Sorted by key.
    """
    known = [(side.name, [run.config for run in side.runs if run.config]) for side in sides]
    known = [(name, configs) for name, configs in known if configs]
    keys = sorted({key for _, configs in known for config in configs for key in config} - set(OF_ONE_RUN))
    differences = []
    for key in keys:
        values = {name: '; '.join(_distinct(_text(config, key) for config in configs)) for name, configs in known}
        if len(set(values.values())) > 1:
            differences.append(Difference(key, values))
    return differences


def warnings_of(sides: Sequence[Side]) -> List[str]:
    """
    Overview:
        Why numbers may not be comparable.
    Arguments:
        - sides (:obj:`Sequence[Side]`): The sides.
    Returns:
        - warnings (:obj:`List[str]`): One line each; empty if nothing is known against it.
    """
    runs = [run for side in sides for run in side.runs]
    return [
        *(f'{run.name}: {note}' for run in runs for note in run.notes),
        *_one_side(sides),
        *_disagreement(sides, 'environments', _environment, 'nothing here is comparable'),
        *_seeds(sides),
        *_budgets(sides, runs),
        *_machines(sides),
        *_at_once(runs),
    ]


def _one_side(sides: Sequence[Side]) -> List[str]:
    if len(sides) > 1:
        return []
    return [f"All runs are of one side, '{sides[0].name}': there is nothing to compare it to (--group makes sides)"]


def _seeds(sides: Sequence[Side]) -> List[str]:
    seeds = {side.name: sorted(run.seed for run in side.runs if run.seed is not None) for side in sides}
    warnings = []
    if len({tuple(found) for found in seeds.values()}) > 1:
        said = '; '.join(f"{name}: {', '.join(map(str, found)) or 'unknown'}" for name, found in seeds.items())
        warnings.append(f'Other seeds: {said}')
    single = [f"'{side.name}'" for side in sides if len(side.runs) == 1]
    if single:
        warnings.append(f"One run of {' and of '.join(single)}: without a spread, chance cannot be told from effect")
    return warnings


def _budgets(sides: Sequence[Side], runs: Sequence[Run]) -> List[str]:
    early = [f"{run.name} ended early: {run.summary['outcome']}" for run in runs
             if run.summary.get('outcome', 'done') != 'done']
    asked = []
    for key, title in BUDGETS.items():
        asked += _disagreement(sides, f'budgets of {title}', operator.methodcaller('told', key),
                               'times and rewards are not comparable')
    steps = {run.name: run.recording.env_step for run in runs if run.recording.env_step}
    if asked or not steps:
        return early + asked
    least, most = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
    if steps[least] < BUDGET_TOLERANCE * steps[most]:
        early.append(f'Other budgets: {least} has {steps[least]:,} environment steps, {most} {steps[most]:,}')
    return early


def _machines(sides: Sequence[Side]) -> List[str]:
    effect = 'times and memory are not comparable'
    warnings = [
        *_disagreement(sides, 'devices', _device, effect),
        *_disagreement(sides, 'numbers of processes', operator.methodcaller('told', 'processes'), effect),
    ]
    for key, title in MACHINE.items():
        warnings += _disagreement(sides, title, functools.partial(_of_machine, key=key), effect)
    return warnings or _disagreement(
        sides, 'hosts', lambda run: host_of(run.event_files[0]), 'times are comparable if these are of one kind')


def _at_once(runs: Sequence[Run]) -> List[str]:
    """Runs share a machine as long as their hosts are not known to be two."""
    for one, other in itertools.combinations(runs, 2):
        overlap = any(max(span[0], others[0]) < min(span[1], others[1])
                      for span in one.recording.spans for others in other.recording.spans)
        if overlap and one.recording.host == other.recording.host:
            return [f'Runs went on at the same time on one machine, as {one.name} and {other.name}: '
                    'they took time from each other']
    return []


def _disagreement(sides: Sequence[Side], what: str, value_of: Callable[[Run], Any], effect: str) -> List[str]:
    """One line if runs are known to have more than one value."""
    values = {side.name: _distinct(_shown(value_of(run)) for run in side.runs if value_of(run) is not None)
              for side in sides}
    if len({value for found in values.values() for value in found}) < 2:
        return []
    said = '; '.join(f"{name}: {', '.join(found) or 'unknown'}" for name, found in values.items())
    return [f'Other {what} ({said}): {effect}']


def _environment(run: Run) -> Any:
    return next((run.config[key] for key in ENVIRONMENT if run.config.get(key) is not None), None)


def _device(run: Run) -> Any:
    return run.summary.get('device') or run.config.get(WORLD_MODEL + 'device')


def _of_machine(run: Run, key: str) -> Any:
    """A machine without a GPU says so."""
    machine = run.told('machine')
    return (machine[key] or 'none') if isinstance(machine, dict) and key in machine else None


def _distinct(texts: Iterable[str]) -> List[str]:
    return list(dict.fromkeys(texts))


def _shown(value: Any) -> str:
    return f'{value:,}' if isinstance(value, int) else str(value)


def _text(config: Dict[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else ABSENT

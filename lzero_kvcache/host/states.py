"""States of checkpoints; one that does not fit the model is reported in one line."""
import contextlib
import re
from typing import Any, Dict, Iterator, NamedTuple, Optional, Sequence

from ..config import ConfigError

# How torch begins errors of modules and of optimizers, and what it says of each parameter of a module.
_OTHER_MODEL = re.compile(r'^(Error\(s\) in loading state_dict for|loaded state dict )')
_OTHER_SHAPE = re.compile(
    r'size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, the shape in current '
    r'model is torch\.Size\((.*?)\)')
_OTHER_KEYS = re.compile(r'(Missing|Unexpected) key\(s\) in state_dict: ((?:"[^"]*"(?:, )?)+)')


class Checkpoint(NamedTuple):
    """Where a training stood: the policy's state, and the counts that DI-engine's learner saves beside it."""
    state: Dict[str, Any]
    train_iter: int
    env_step: int


@contextlib.contextmanager
def faults_under(source: str) -> Iterator[None]:
    """Where a state is of another model, say so under the option and the path that it came by, without torch's list of
    all parameters."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        fault = str(error) if isinstance(error, ConfigError) else fault_of_state(error)
        if fault is None:
            raise
        raise ConfigError(f'{source}: {fault}' if source else fault) from None


def check_parts(state: Any, parts: Sequence[str] = ('model', 'target_model')) -> None:
    """Refuse what lacks a part of a policy's state; these are the ones that LightZero loads."""
    missing = [part for part in parts if not isinstance(state, dict) or part not in state]
    if missing:
        raise ConfigError(f'it is no checkpoint of a UniZero training; it lacks {", ".join(missing)}')


def fault_of_state(error: BaseException) -> Optional[str]:
    """The fault of a state that torch cannot load, with the first parameter that is different and how many more there
    are; None if the error is another one."""
    text = ' '.join(str(error).split()).replace('_orig_mod.', '')  # which torch puts before those of a compiled module
    if not _OTHER_MODEL.search(text):
        return None
    different = [f'{name} is {there} in it, not {here}' for name, there, here in _OTHER_SHAPE.findall(text)]
    for kind, keys in _OTHER_KEYS.findall(text):
        different += [f'{name} is not in it' if kind == 'Missing' else f'{name} is only in it'
                      for name in re.findall('"([^"]*)"', keys)]
    more = f', and {len(different) - 1:,} more' if len(different) > 1 else ''
    first = f': {different[0]}{more}' if different else ''
    return f'the checkpoint is of another model{first}; use the config that it was trained with'

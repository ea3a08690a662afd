"""``--set KEY=VALUE``: values are parsed, never evaluated; keys must exist; ``linked_keys.py`` changes their copies."""
import argparse
import ast
import difflib
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Tuple

from easydict import EasyDict

from lzero_kvcache_options import flag_of, reader_of

from ..config import FLAG, KV_CACHE_CFG, OPTIONS, PREFIX, SIZES, ConfigError
from ..host import building
from .config_file import Plan
from .linked_keys import COPIES, follow

CREATE = 'create_config'
ADD = '+'
# Names that users try with --set, and the fields of ``TrainOptions`` that they mean.
OPTION_OF = {**{name: name for name in ('device', 'threads', 'max_env_step', 'max_train_iter')},
             'policy.device': 'device'}
# How alike two names must be for one to be taken for the other misspelt: 'activation' and 'augmentation' are not.
NEAR = 0.7
# The paths about caching, which LightZero's defaults lack, each with the value that means that it is not given.
CACHE_PATHS: Dict[str, Any] = {
    f'{PREFIX}.{FLAG}': False,
    **{f'{PREFIX}.{key}': None for key in (*SIZES, *(f'{OPTIONS}.{option}' for option in KV_CACHE_CFG))},
}


def apply_overrides(
        main_config: EasyDict,
        create_config: EasyDict,
        assignments: Iterable[str],
        defaults: Mapping[str, Any],
) -> Dict[str, Any]:
    """
    Change configs in place as ``--set`` asks for, and the copies that LightZero keeps of each value. A path that begins
    with ``create_config.`` is one of ``create_config``; one that begins with ``+`` may be new. ``defaults`` is
    ``main_config`` completed with LightZero's defaults. Returns every path that has a new value, copies included.
    """
    known = {**CACHE_PATHS, **leaves(defaults), **leaves({**main_config, CREATE: create_config})}
    changed: Dict[str, Any] = {}
    for assignment in assignments:
        try:
            changed.update(_parse(assignment, {**known, **changed}))
        except ConfigError as error:
            raise ConfigError(f'--set {assignment}: {error}') from None
    followed = follow(known, changed)
    for path, value in followed.items():
        _assign(main_config, create_config, path, value)
    return followed


class CompleteConfig(Dict[str, Any]):
    """
    The values of a plan's config with all defaults, by path; ``chosen`` are the paths that the config or ``--set``
    gives.
    """

    def __init__(self, plan: Plan, assignments: Sequence[str] = ()) -> None:
        chosen = leaves({**plan.main_config, CREATE: plan.create_config})
        super().__init__({**leaves(building.completed(plan.main_config, plan.create_config)), **chosen})
        self.entry, self.chosen = plan.entry, set(chosen)
        self._given = [assignment.partition('=')[0].strip().lstrip(ADD) for assignment in assignments]

    def said(self, path: str) -> str:
        """A path and its value, with its origin if it is a default; of copies, the path that ``--set`` names."""
        value = self.get(path)
        copies = next((group for group in COPIES if path in group), ())
        path = next((copy for copy in (path, *copies) if copy in self._given and self.get(copy) == value), path)
        whose = "LightZero's default" if path.startswith('policy.') else "the environment's default"
        return f'{path}={value!r}' + ('' if path in self.chosen else f' ({whose})')

    def contradiction(self, path: str, others: Sequence[str], right: str) -> ConfigError:
        """The error for a value beside others, with what would be right."""
        return ConfigError(f'{self.said(path)} contradicts {" and ".join(map(self.said, others))}: {right}')


def leaves(tree: Mapping[str, Any], prefix: str = '') -> Dict[str, Any]:
    """Every dotted path of a tree with its value; an empty dict is a value."""
    found: Dict[str, Any] = {}
    for key, value in tree.items():
        path = f'{prefix}{key}'
        found.update(leaves(value, path + '.') if isinstance(value, dict) and value else {path: value})
    return found


def _parse(assignment: str, known: Mapping[str, Any]) -> Dict[str, Any]:
    key, equals, text = (part.strip() for part in assignment.partition('='))
    path = key.lstrip(ADD)
    if not equals or not all(path.split('.')):
        raise ConfigError('write KEY=VALUE, as in --set policy.num_simulations=25')
    value = _literal(text)
    children = [known_path for known_path in known if known_path.startswith(path + '.')]
    if children and isinstance(value, dict):
        return {child: _checked(child, repr(part), known) for child, part in leaves(value, path + '.').items()}
    if children:
        raise ConfigError(f'{path} holds {len(children)} keys; set one of them, as {children[0]}')
    if not key.startswith(ADD):
        return {path: _checked(path, text, known)}
    for holder, held in known.items():
        if path.startswith(holder + '.') and held is not None and not isinstance(held, dict):
            raise ConfigError(f'{holder} is {held!r}, which holds no keys')
    return {path: value}


def _checked(path: str, text: str, known: Mapping[str, Any]) -> Any:
    """The value for a key that is there, or for a new one of a dict that is empty; other keys are refused."""
    if path in known:
        return _like(known[path], text)
    parents = [path.rsplit('.', depth)[0] for depth in range(1, path.count('.') + 1)]
    if any(known.get(parent) == {} for parent in parents):
        return _literal(text)
    if path in OPTION_OF:
        option = flag_of(OPTION_OF[path])
        try:
            reader_of(OPTION_OF[path])(text)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f'give {option} in its place, for which {error}') from None
        raise ConfigError(f'give {option} {text} in its place')
    nearest = nearest_key(path, known)
    hint = f"; did you mean '{nearest}'?" if nearest else ''
    raise ConfigError(f"there is no key '{path}'{hint} ('+{path}=...' adds a new one)")


def nearest_key(path: str, known: Iterable[str]) -> str:
    """The key that a path may be misspelt from, or nothing: its last part is near the path's, and its end is more like
    the path than that of any other such key."""
    by_name: Dict[str, List[str]] = {}
    for key in known:
        by_name.setdefault(key.rpartition('.')[2], []).append(key)
    names = difflib.get_close_matches(path.rpartition('.')[2], by_name, 1, NEAR)
    parts = path.count('.') + 1

    def likeness(key: str) -> Tuple[float, int]:
        return difflib.SequenceMatcher(None, '.'.join(key.split('.')[-parts:]), path).ratio(), -len(key)

    return max(by_name[names[0]], key=likeness) if names else ''


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _like(present: Any, text: str) -> Any:
    """A value of the kind that the key has now. Integers stand for floats and the reverse: configs write 0 for 0.0."""
    value = _literal(text)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_list = isinstance(value, (list, tuple))
    held_list = isinstance(present, (list, tuple))
    if present is None or value is None:
        return value
    if isinstance(present, str):
        return value if isinstance(value, str) else text
    if isinstance(present, bool):
        answer = {'true': True, 'false': False, '1': True, '0': False}.get(text.lower())
        if answer is None:
            raise ConfigError(f'it is True or False, not {value!r}')
        return answer
    of_names = held_list and any(isinstance(item, str) for item in present)  # for which no number can stand
    if isinstance(present, (int, float, list, tuple)) and not (is_list or is_number and not of_names):
        kind = 'list' if held_list else 'number'
        raise ConfigError(f'it is a {kind} ({present!r} now), not {value!r}')
    if isinstance(present, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    return type(present)(value) if is_list and held_list else value


def _assign(main_config: EasyDict, create_config: EasyDict, path: str, value: Any) -> None:
    *parents, last = path.split('.')
    node = main_config
    if parents[:1] == [CREATE]:
        node, parents = create_config, parents[1:]
    for key in parents:
        if not isinstance(node.get(key), dict):
            node[key] = EasyDict()
        node = node[key]
    node[last] = value

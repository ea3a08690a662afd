"""``--set KEY=VALUE``: values are parsed, never evaluated; keys must exist; ``linked_keys.py`` changes their copies."""
import ast
import difflib
from typing import Any, Dict, Iterable, List, Mapping

from easydict import EasyDict

from ..config import FLAG, KV_CACHE_CFG, OPTIONS, PREFIX, ConfigError
from .linked_keys import follow

CREATE = 'create_config'
# Keys of world_model_cfg that no default of LightZero's names.
CACHE_KEYS: Dict[str, Any] = {
    FLAG: False,
    'game_segment_length': None,
    'num_simulations': None,
    'env_num': None,
    **{f'{OPTIONS}.{key}': None for key in KV_CACHE_CFG},
}
ADD = '+'


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
    known = known_leaves(main_config, create_config, defaults)
    changed: Dict[str, Any] = {}
    for assignment in assignments:
        changed.update(_parse(assignment, known))
    followed = follow(known, changed)
    for path, value in followed.items():
        _assign(main_config, create_config, path, value)
    return followed


def known_leaves(main_config: EasyDict, create_config: EasyDict, defaults: Mapping[str, Any]) -> Dict[str, Any]:
    """Every dotted path that a config can set, with the value it has now; an empty dict is a value."""
    known = cache_defaults()
    known.update(leaves(defaults))
    known.update(leaves(main_config))
    known.update(leaves({CREATE: create_config}))
    return known


def cache_defaults() -> Dict[str, Any]:
    """Every path about caching, with the value that stands for not given."""
    return {f'{PREFIX}.{key}': value for key, value in CACHE_KEYS.items()}


def _parse(assignment: str, known: Mapping[str, Any]) -> Dict[str, Any]:
    path, equals, text = assignment.partition('=')
    path = path.strip()
    if not equals or not path.strip(ADD):
        raise ConfigError(f"--set {assignment}: write KEY=VALUE, as in --set policy.num_simulations=25")
    value = _literal(text.strip())
    new, path = path.startswith(ADD), path.lstrip(ADD)
    children = [key for key in known if key.startswith(path + '.')]
    if new and not children:
        for holder in known:
            if path.startswith(holder + '.') and known[holder] is not None and not isinstance(known[holder], dict):
                raise ConfigError(f'--set {assignment}: {holder} is {known[holder]!r}, which holds no keys')
        return {path: value}
    if children and isinstance(value, dict):
        changed: Dict[str, Any] = {}
        for key, child in leaves(value).items():
            changed.update(_checked(assignment, f'{path}.{key}', child, repr(child), known))
        return changed
    if children:
        raise ConfigError(f"--set {assignment}: {path} holds {len(children)} keys; set one of them, as {children[0]}")
    return _checked(assignment, path, value, text.strip(), known)


def _checked(assignment: str, path: str, value: Any, text: str, known: Mapping[str, Any]) -> Dict[str, Any]:
    if path in known:
        return {path: _like(known[path], value, text, assignment)}
    parents = [path.rsplit('.', depth)[0] for depth in range(1, path.count('.') + 1)]
    if any(known.get(parent) == {} for parent in parents):
        return {path: value}
    nearest = nearest_key(path, known)
    hint = f"; did you mean '{nearest}'?" if nearest else ''
    raise ConfigError(f"--set {assignment}: there is no key '{path}'{hint} ('+{path}=...' adds a new one)")


def nearest_key(path: str, known: Iterable[str]) -> str:
    """The key that was probably meant by a path, or by the last part of one; empty if nothing is near."""
    last = path.rsplit('.', 1)[-1]
    by_name: Dict[str, List[str]] = {}
    for key in sorted(known, key=len):
        by_name.setdefault(key.rsplit('.', 1)[-1], []).append(key)
    if last in by_name:  # a right name in a wrong place is nearer than any other spelling
        return difflib.get_close_matches(path, by_name[last], 1, 0.0)[0]
    close = difflib.get_close_matches(path, known, 1, 0.6)
    return (close or [by_name[name][0] for name in difflib.get_close_matches(last, by_name, 1, 0.6)] or [''])[0]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _like(present: Any, value: Any, text: str, assignment: str) -> Any:
    """A value of the kind that the key has now. Integers stand for floats and the reverse: configs write 0 for 0.0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_list = isinstance(value, (list, tuple))
    if present is None or value is None:
        return value
    if isinstance(present, str):
        return value if isinstance(value, str) else text
    if isinstance(present, bool):
        answer = {'true': True, 'false': False, '1': True, '0': False}.get(text.lower())
        if answer is None:
            raise ConfigError(f"--set {assignment}: it is True or False, not {value!r}")
        return answer
    if isinstance(present, (int, float, list, tuple)) and not (is_number or is_list):
        kind = 'list' if isinstance(present, (list, tuple)) else 'number'
        raise ConfigError(f"--set {assignment}: it is a {kind} ({present!r} now), not {value!r}")
    if isinstance(present, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    return type(present)(value) if is_list and isinstance(present, (list, tuple)) else value


def leaves(tree: Mapping[str, Any], prefix: str = '') -> Dict[str, Any]:
    """Every dotted path of a tree with its value; an empty dict is a value."""
    found: Dict[str, Any] = {}
    for key, value in tree.items():
        path = f'{prefix}{key}'
        if isinstance(value, dict) and value:
            found.update(leaves(value, path + '.'))
        else:
            found[path] = value
    return found


def _assign(main_config: EasyDict, create_config: EasyDict, path: str, value: Any) -> None:
    keys: List[str] = path.split('.')
    node = main_config
    if keys[0] == CREATE:
        node, keys = create_config, keys[1:]
    parents, last = keys[:-1], keys[-1]
    for key in parents:
        if not isinstance(node.get(key), dict):
            node[key] = EasyDict()
        node = node[key]
    node[last] = value

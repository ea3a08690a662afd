"""The config that DI-engine saved with a run: parsed, never run, and flattened to ``policy.learn...`` keys."""
import ast
import os
from typing import Any, Dict, Optional

# What seeds of one side may differ in.
OF_ONE_RUN = ('exp_name', 'seed')


class Source(str):
    """An expression that is no literal, as ``float("inf")``."""

    __repr__ = str.__str__


def read_config(path: str) -> Optional[Dict[str, Any]]:
    """
    Overview:
        Parse a ``total_config.py``.
    Arguments:
        - path (:obj:`str`): The file.
    Returns:
        - config (:obj:`Optional[Dict[str, Any]]`): Its values by dotted key; what is no literal as ``Source``. \
            None if there is no such file.
    Raises:
        - ValueError: If it is no Python, or has no dict in it; the message says why.
    """
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding='utf-8') as file:
            source = file.read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f'{os.path.basename(path)} cannot be parsed ({error})') from error
    dicts = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    if not dicts:
        raise ValueError(f'{os.path.basename(path)} has no config in it')
    config: Dict[str, Any] = {}
    _flatten(dicts[0], '', source, config)
    return config


def _flatten(node: ast.Dict, prefix: str, source: str, config: Dict[str, Any]) -> None:
    for key, value in zip(node.keys, node.values):
        name = prefix + ('**' if key is None else str(_value(key, source)))
        if isinstance(value, ast.Dict) and value.keys:
            _flatten(value, name + '.', source, config)
        else:
            config[name] = _value(value, source)


def _value(node: ast.AST, source: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return Source(' '.join((ast.get_source_segment(source, node) or '').split()))

"""Config files that tests write: what one declares, and how one is run as a program."""
import textwrap
from pathlib import Path
from typing import Callable

PROGRAM = "\nif __name__ == '__main__':\n    main()\n"
BODY = """
main_config = dict(
    exp_name='data/x_seed0', env=dict(),
    policy=dict({policy} model=dict(world_model_cfg=dict(device='cpu'))),
)
create_config = dict(env=dict(type='e'), env_manager=dict(type='base'), policy=dict(type={type!r}))
{rest}
"""


def in_main(policy: str = '', kind: str = 'unizero') -> str:
    """What a config declares, as lines of a function."""
    return textwrap.indent(BODY.format(policy=policy, type=kind, rest=''), '    ')


def writer(folder: Path) -> Callable[..., str]:
    """A function that writes a config file below a folder and returns its path."""

    def write(name: str = 'mine.py', policy: str = '', type: str = 'unizero', rest: str = '', body: str = BODY) -> str:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(body.format(policy=policy, type=type, rest=rest))
        return str(path)

    return write

"""Errors that a user can mend with one command, recognised by their exceptions; any other keeps its traceback."""
import contextlib
import re
from typing import Iterator, Optional

from ..config import ConfigError
from ..host import building

# What pip installs for the modules that LightZero's environments import, and LightZero itself does not need.
PACKAGES = {
    'Box2D': 'Box2D==2.3.10',
    'cv2': "'opencv-python-headless<4.11'",
    'pygame': 'pygame',
    'pycolab': "'pycolab==1.2'",
}
ROMS = "pip install --target atari_roms --no-deps ale-py==0.10.1 && ale-import-roms atari_roms/ale_py/roms"
_ROM_MESSAGE = re.compile(r"unable to find (the )?game|ROM.{0,80}(not (found|supported)|missing)|ale-import-roms", re.I)


def hint(error: BaseException) -> Optional[str]:
    """One line with the missing library and the command that installs it; None if the error is of no known kind."""
    text = ' '.join(str(error).split())
    missing = _missing_module(error)
    if missing:
        package = PACKAGES.get(missing.split('.')[0])
        if missing.startswith('zoo.'):
            return (
                f"there is no module '{missing}' below the zoo that is installed, {building.zoo_folder()}; if it "
                "is in a folder zoo of yours, write in the config: import zoo; zoo.__path__.append('PATH/TO/zoo')"
            )
        if package is None:  # perhaps a file of the user's, whose name may be that of a stranger's package
            return f"there is no module '{missing}': put its folder on PYTHONPATH, or install the package that has it"
        return f"the module '{missing}' is not installed; pip install {package}"
    if isinstance(error, AttributeError) and text == "module 'collections' has no attribute 'Mapping'":
        return 'pycolab 1.2 is older than Python 3.10: take memory_unizero_config, which mends it'
    if type(error).__name__ == 'DependencyNotInstalled':
        return text
    if _ROM_MESSAGE.search(text):
        return f"the game's ROM file is not installed; {ROMS}"
    return building.fault_of_segments(error)


@contextlib.contextmanager
def hinted() -> Iterator[None]:
    """Turn an error that a user can mend into a ``ConfigError`` that says how."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        line = hint(error)
        if line is None:
            raise
        raise ConfigError(line) from error


def _missing_module(error: Optional[BaseException]) -> Optional[str]:
    """
    The name of the module that is missing, None if that is not the error. Environments raise errors of their own from
    it, whose advice is for another version.
    """
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name
        if not isinstance(error, ImportError) and type(error).__name__ != 'DependencyNotInstalled':
            return None
        error = error.__cause__ or error.__context__
    return None

"""Calls of training entries that are recorded instead of run."""
import functools
import inspect
import sys
import traceback
from typing import Any, Callable, Dict, Optional, Set, Tuple

from .patches import ENTRIES, applied


class _EntryCalled(BaseException):
    """Carries the arguments of a call to an entry out of the code that made it."""

    def __init__(self, entry: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        super().__init__(entry)
        self.entry, self.arguments = entry, (args, kwargs)


class _Silenced:
    """A stream that passes on what is written, but not what is written as a recorded call is handled."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return len(text) if isinstance(sys.exc_info()[1], _EntryCalled) else self._stream.write(text)


def recorded_call(run: Callable[[], Any]) -> Optional[Dict[str, Any]]:
    """What the first call of an entry in ``run`` would have trained; None if there is none. Nothing is trained. Of an
    entry that is none of ``ENTRIES`` there is the name alone, also if it fails."""
    signatures = _signatures()
    with applied(entries=lambda code: _raise_call.__code__, trainings=lambda code: _raise_training.__code__,
                 registered=lambda code: _register.__code__, ddp_config=lambda code: (lambda config: config).__code__,
                 ddp_context=lambda method: lambda self, *args: None, stdout=_Silenced, stderr=_Silenced):
        try:
            run()
        except _EntryCalled as call:
            if call.entry not in signatures:
                return dict(entry=call.entry)
            args, kwargs = call.arguments
            arguments = signatures[call.entry].bind(*args, **kwargs).arguments
            main_config, create_config = arguments['input_cfg']
            given: Dict[str, Any] = {key: arguments[key] for key in ('seed', 'max_env_step') if key in arguments}
            return dict(given, main_config=main_config, create_config=create_config, entry=call.entry)
        except Exception as error:
            failed = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)
                      if frame.f_globals.get('__name__', '').startswith('lzero.entry.')]
            if trainings() & set(failed[:1]):
                return dict(entry=failed[0])
            raise
    return None


def trainings() -> Set[str]:
    """The names of all of LightZero's trainings."""
    import lzero.entry
    return {name for name in dir(lzero.entry) if name.startswith('train_')}


@functools.lru_cache(maxsize=None)
def _signatures() -> Dict[str, inspect.Signature]:
    """Those of the entries. Calls are recorded inside of others, when the entries have other code."""
    import lzero.entry
    return {name: inspect.signature(getattr(lzero.entry, name)) for name in ENTRIES}


def _raise_call(*args, **kwargs):  # type: ignore[no-untyped-def]
    # As the code of an entry this runs with the names of the entry's module.
    from lzero_kvcache.host.recorded import _EntryCalled
    raise _EntryCalled(__name__.rpartition('.')[2], args, kwargs)


def _raise_training(*args, **kwargs):  # type: ignore[no-untyped-def]
    import sys

    from lzero_kvcache.host.recorded import _EntryCalled
    raise _EntryCalled(sys._getframe(1).f_code.co_name, args, kwargs)


def _register(module_dict, module_name, module, force_overwrite=False):  # type: ignore[no-untyped-def]
    # What a file registers that runs again takes the place of what it has registered before.
    import sys

    before = getattr(dict.get(module_dict, module_name), '__module__', None)
    is_gone = before is not None and before not in sys.modules
    assert force_overwrite or is_gone or module_name not in module_dict, module_name
    module_dict[module_name] = module

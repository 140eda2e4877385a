"""Find the callbacks of a run: those of --callback, by module or file and class, and those that `fit` is given."""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

from shardlaunch.checkpoints.files import error_text
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.callbacks import Callback, RunHooks
from shardlaunch.launcher.hook_names import check_hook_names

HOOKS = tuple(name for name in vars(RunHooks) if name[0] != "_")
_FORM = "MODULE:CLASS or path/to/FILE.py:CLASS, a class derived from shardlaunch.Callback"


def callback_makers(named: Sequence[str], given: Sequence[Any]) -> list[Callable[[], Callback]]:
    """Return functions that make the callbacks of a run, anew if they are classes. Raises UserError."""
    if isinstance(given, Callback | type | str):
        raise UserError("callbacks: must be a list, such as [MyCallback()]")
    makers: list[Callable[[], Callback]] = []
    for one in named:
        makers.append(_maker(_named_class(one), f"--callback {one}"))
    for each in given:
        found = _named_class(each) if isinstance(each, str) else each
        makers.append(_maker(found, "callbacks"))
    return makers


def _maker(found: Any, where: str) -> Callable[[], Callback]:
    kind = found if isinstance(found, type) else type(found)
    if not issubclass(kind, Callback):
        raise UserError(
            f"{where}: {kind.__module__}.{kind.__name__} is not derived from shardlaunch.Callback, whose methods are "
            f"{', '.join(HOOKS)}; callbacks of other trainers do not work here"
        )
    check_hook_names(kind, Callback)
    check_signatures(kind, f"{where}: {kind.__name__}")
    if isinstance(found, Callback):
        return lambda: found
    try:
        made = kind()
    except Exception as error:  # the user's own code
        raise UserError(
            f"{where}: {kind.__name__}() fails: {described(error)}. What a class needs is to have defaults, or give "
            f"an object: fit(..., callbacks=[{kind.__name__}(...)])"
        ) from error
    del made
    return kind


def check_signatures(kind: type, name: str) -> None:
    """Raise UserError for a hook of a class that cannot be called with one argument."""
    for hook in HOOKS:
        method = getattr(kind, hook)
        try:
            signature(method).bind(None, None)
        except TypeError:
            raise UserError(f"{name}.{hook}(): must take one argument besides self, the event") from None


def described(error: BaseException) -> str:
    """Return kind and text of an error, and where in the user's code it came up."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "shardlaunch" not in Path(code.co_filename).parts and not code.co_filename.startswith(sys.prefix):
            place = f" ({code.co_filename}, line {trace.tb_lineno})"
        trace = trace.tb_next
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    text = error_text(error) if isinstance(error, OSError) else " ".join(str(error).split()) or "no message"
    return f"{kind}{text}{place}"


def _named_class(name: str) -> type:
    """Return the class that a text names. Raises UserError."""
    where = f"--callback {name}"
    module_name, _, class_name = name.rpartition(":")
    if not module_name or not class_name.isidentifier():
        raise UserError(f"{where}: must be {_FORM}")
    try:
        module = _of_file(Path(module_name)) if module_name.endswith(".py") else _of_name(module_name)
    except Exception as error:  # importing runs the user's code
        raise UserError(f"{where}: {module_name} cannot be imported: {described(error)}. It must be {_FORM}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        known = [key for key, value in vars(module).items() if _is_callback(value)]
        has = f"it has {some(known)}" if known else "it has none that is derived from shardlaunch.Callback"
        raise UserError(f"{where}: {module_name} has no class {class_name}; {has}")
    return found


def _is_callback(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Callback) and value is not Callback


def _of_name(name: str) -> ModuleType:
    """Import a module, also from the current folder; that of the running file is not run a second time."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        main = sys.modules["__main__"]
        spec = find_spec(name)
        if spec is not None and spec.origin and spec.origin == _file_of(main):
            return main
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def _of_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    main = sys.modules["__main__"]
    if str(path) == _file_of(main):
        return main
    path.stat()  # raises
    name = f"shardlaunch_callbacks_of_{path.stem}"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _file_of(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return str(Path(file).resolve()) if file else ""

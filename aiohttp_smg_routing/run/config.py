"""Where ``run`` finds the options: a file, an object of the server, or the environment."""

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import ConfigError, RoutingConfig, as_config

TABLE = "smg_routing"


def load(source: str) -> RoutingConfig:
    """Return the config that ``source`` names; ``instrument`` is true unless it sets it.

    ``source`` is a TOML file with a table ``[smg_routing]``; or ``package.module:NAME``, which is a
    mapping or a ``RoutingConfig``; or empty, for the environment variables ``SMG_ROUTING_*``.
    Raises ``ConfigError``.
    """
    if not source:
        return RoutingConfig.from_env(environ={"SMG_ROUTING_INSTRUMENT": "true", **os.environ})
    found = _named(source) if is_name(source) else _table(Path(source))
    if isinstance(found, Mapping):
        found = {"instrument": True, **found}
    return as_config(found)


def is_name(source: str) -> bool:
    """Tell whether ``source`` names an object and not a file."""
    module, colon, name = source.rpartition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), name])


def _named(source: str) -> Any:
    module, _, name = source.rpartition(":")
    program = sys.modules["__main__"]  # an import by name would run it a second time
    if hasattr(program, name) and _is_at(module, getattr(program, "__file__", None) or ""):
        return getattr(program, name)
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            [("config", f"{source} is not there: {error}; check the name, or set PYTHONPATH")]
        ) from error


def _is_at(module: str, file: str) -> bool:
    if module == Path(file).stem:
        return True
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin == str(Path(file).absolute())


def _table(file: Path) -> Any:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        toml = import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(
            [("config", "a TOML file on Python 3.10 needs: pip install tomli")]
        ) from None
    try:
        content = toml.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([("config", f"{file} can't be read: {error.strerror}")]) from error
    except ValueError as error:  # a wrong encoding, too
        raise ConfigError([("config", f"{file} is not TOML: {error}")]) from error
    if TABLE not in content:
        tables = ", ".join(f"[{name}]" for name in content) or "nothing"
        reason = f'{file} has no table [{TABLE}], but {tables}: write gateway = "…" below [{TABLE}]'
        raise ConfigError([("config", reason)])
    return content[TABLE]

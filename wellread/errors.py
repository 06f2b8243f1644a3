"""The errors a user can cause, and how an optional package is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType


class BadInput(ValueError):
    """Something the caller gave cannot be used. The message is one sentence: what is wrong and what to do."""


class Diverged(RuntimeError):
    """A training stopped at a loss that is not a number. The module holds the weights of the last good step."""


def optional(module: str, extra: str) -> ModuleType:
    """The imported `module`, or `BadInput` with the pip command of the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or module.split(".")[0] != missing.name.split(".")[0]:
            raise  # the package is there but something of its own is not: hiding that would mislead
        raise BadInput(f"this needs the package {module.split('.')[0]!r}: pip install 'wellread[{extra}]'") from None

"""wellread: research on pre-trained networks as functions from networks and data to networks or findings.

import wellread
small = wellread.load("efficientnet-lite0")
cells = wellread.load_data("elpv")
inspector = wellread.adapt.transfer([small], cells["train"], cells["validation"])
inspector.save("inspector")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wellread.data import load_data
    from wellread.errors import BadInput
    from wellread.evaluate import evaluate, predict
    from wellread.inputs import ImageInput, TextInput
    from wellread.network import Network, load
    from wellread.results import load_result
    from wellread.runtime import using

__version__ = "0.1.0"

# names are looked up when they are used: `wellread list` must not wait for torch
_WHERE = {
    "load": "network", "Network": "network", "ImageInput": "inputs", "TextInput": "inputs", "load_data": "data", "BadInput": "errors",
    "evaluate": "evaluate", "predict": "evaluate", "load_result": "results", "using": "runtime",
}  # fmt: skip


def run(name: str, *args: Any, **arguments: Any) -> Any:
    """Run a method by the name that `wellread list` shows: run("model-soup", networks=[...], validation=...)."""
    from wellread import catalog

    return catalog.function(name)(*args, **arguments)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"wellread.{_WHERE[name]}"), name)
    try:
        return importlib.import_module(f"wellread.{name}")
    except ModuleNotFoundError as missing:
        if missing.name != f"wellread.{name}":
            raise
        raise AttributeError(f"module 'wellread' has no attribute {name!r}") from None


class _Package(ModuleType):
    """`wellread.evaluate` stays the function also when the file of that name has been imported, which would store the module here."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.evaluate if name == "evaluate" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})


__all__ = [
    "BadInput", "ImageInput", "Network", "TextInput", "evaluate", "load", "load_data", "load_result", "predict", "run", "using",
]  # fmt: skip

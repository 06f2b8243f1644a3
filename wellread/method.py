"""`@method`: what lies between a caller and a paper's function.

The signature is the interface. Positional parameters are what the user brings (networks, data), keyword-only ones are what the user may
change, the return type is what the user gets. From it come the checks, the command line, the page and the docs; nothing is written twice.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
from datasets import Dataset

from wellread.data import Needs, as_data, check, class_names, duplicates, fingerprint, name_of
from wellread.errors import BadInput
from wellread.inputs import TextInput, input_config
from wellread.lineage import merged, step
from wellread.network import Network, Networks, as_network

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method as the command line, the page and the docs see it."""

    name: str
    kind: Literal["brings", "setting"]
    type: Any  # Network, Dataset, or a plain type; without Optional and list around it
    needs: Needs | None  # of a table
    default: Any
    required: bool
    many: bool  # given by repeating
    optional: bool  # None is allowed
    choices: tuple[Any, ...] | None
    help: str


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    """The parameters of a method, with help from the lines "name: text" of its docstring."""
    plain = inspect.unwrap(function)
    hints = typing.get_type_hints(plain, include_extras=True)
    words = _help(plain.__doc__ or "")
    found = []
    for name, parameter in inspect.signature(plain).parameters.items():
        kind, needs, many, optional, choices = _take_apart(hints[name])
        required = parameter.default is parameter.empty
        found.append(
            Parameter(
                name=name,
                kind="setting" if parameter.kind is parameter.KEYWORD_ONLY else "brings",
                type=kind,
                needs=needs,
                default=None if required else parameter.default,
                required=required,
                many=many,
                optional=optional,
                choices=choices,
                help=words.get(name, ""),
            )
        )
    return found


def returns(function: Callable[..., Any]) -> str:
    """The name of what a method gives: Network, Scores, Heatmaps, ..."""
    hint = typing.get_type_hints(inspect.unwrap(function))["return"]
    return getattr(hint, "__name__", str(hint))


def _take_apart(hint: Any) -> tuple[Any, Needs | None, bool, bool, tuple[Any, ...] | None]:
    optional = many = False
    needs = choices = None
    if get_origin(hint) in (Union, types.UnionType):
        inner = [each for each in get_args(hint) if each is not type(None)]
        optional = len(inner) < len(get_args(hint))
        hint = inner[0]
    if get_origin(hint) is list:
        many, hint = True, get_args(hint)[0]
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        needs = next((note for note in notes if isinstance(note, Needs)), None)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        hint = type(choices[0])
    return hint, needs, many, optional, choices


def _help(doc: str) -> dict[str, str]:
    found: dict[str, str] = {}
    current = None
    for line in inspect.cleandoc(doc).splitlines():
        start = re.match(r"([a-z_]\w*(?:, [a-z_]\w*)*): (.*)", line)
        if start:
            current = start[1].split(", ")
            for name in current:
                found[name] = start[2]
        elif current and line.startswith(" "):
            for name in current:
                found[name] += " " + line.strip()
        else:
            current = None
    return found


def method(function: F) -> F:
    """Make a paper's function callable with names, folders, modules and tables, checked before it starts, its result with a lineage.

    Around the function: names and folders become networks and tables; types, choices, columns, labels and weights are checked and refused with
    one `BadInput`; random numbers are seeded with `seed` when the function has one; tables that share rows are warned about; the returned
    Network or finding carries a lineage step. The function itself is `wrapper.__wrapped__`.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = inspect.signature(function).bind(*args, **kwargs)
        except TypeError as wrong:
            raise BadInput(f"{_name(function)}: {wrong}") from None
        bound.apply_defaults()
        given = bound.arguments
        wanted = {each.name: each for each in parameters(function)}
        for name, each in wanted.items():
            if each.kind == "setting":
                given[name] = _setting(each, given[name])
        networks = {name: _networks(each, given[name]) for name, each in wanted.items() if each.type is Network}
        first = next((found for found in networks.values() if found is not None), None)
        reads = first.record(0)["input"] if isinstance(first, Networks) else input_config(first.input) if first is not None else None
        tables = {name: _table(each, given[name], reads["kind"] if reads else None) for name, each in wanted.items() if each.type is Dataset}
        given.update(networks)
        given.update(tables)
        _warn_of_shared_rows({name: table for name, table in tables.items() if table is not None})
        if "seed" in given:
            seed_everything(given["seed"])
        result = function(*bound.args, **bound.kwargs)
        return _with_lineage(result, function, wanted, given, networks, tables)

    return call  # type: ignore[return-value]


def seed_everything(seed: int) -> None:
    import random

    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _name(function: Callable[..., Any]) -> str:
    return function.__name__.replace("_", "-")


def _setting(wanted: Parameter, value: Any) -> Any:
    if value is None and (wanted.optional or (not wanted.required and wanted.default is None)):
        return None
    if wanted.type is Network or wanted.type is Dataset:
        return value
    values = list(value) if wanted.many and isinstance(value, list | tuple) else [value]
    checked = []
    for each in values:
        if wanted.choices is not None:
            if each not in wanted.choices:
                raise BadInput(f"{wanted.name} is {each!r}: choose one of {', '.join(map(repr, wanted.choices))}")
        elif wanted.type is bool:
            if not isinstance(each, bool | np.bool_):
                raise BadInput(f"{wanted.name} is {each!r}: give True or False")
        elif wanted.type in (int, float):
            number = isinstance(each, int | float | np.number) and not isinstance(each, bool)
            if not number or (wanted.type is int and float(each) != int(each)) or each != each:
                raise BadInput(f"{wanted.name} is {each!r}: give {'a whole number' if wanted.type is int else 'a number'}")
            each = wanted.type(each)
        elif isinstance(wanted.type, type) and not isinstance(each, wanted.type):
            if wanted.type is Path and isinstance(each, str):
                each = Path(each)
            else:
                raise BadInput(f"{wanted.name} is {each!r}: give a {wanted.type.__name__}")
        checked.append(each)
    return checked if wanted.many else checked[0]


def _networks(wanted: Parameter, value: Any) -> Network | Networks | None:
    if value is None and wanted.optional:
        return None
    if not wanted.many:
        network = as_network(value)
        network.check_finite()
        return network
    if isinstance(value, Networks):
        return value
    if not isinstance(value, list | tuple):
        value = [value]
    if not value:
        raise BadInput(f"{wanted.name} is empty: give at least one network")
    networks = Networks(value)
    for each in networks.given:
        if isinstance(each, Network):
            each.check_finite()  # those on disk are checked when they are read
    return networks


def _table(wanted: Parameter, value: Any, column: str | None) -> Dataset | None:
    if value is None and wanted.optional:
        return None
    data = as_data(value, split=wanted.name)
    assert wanted.needs is not None, f"{wanted.name}: a table parameter is annotated with what it needs (Labelled, Unlabelled, ...)"
    check(data, wanted.needs, column, wanted.name)
    return data


def _warn_of_shared_rows(tables: dict[str, Dataset]) -> None:
    import warnings

    names = list(tables)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            shared = duplicates(tables[a], tables[b])
            if 2 * len(shared) > min(len(tables[a]), len(tables[b])):
                raise BadInput(
                    f"{a} and {b} share {len(shared)} of {len(tables[b])} rows (row {shared[0][0]} of {a} is row {shared[0][1]} of {b}): "
                    "what is learned from one cannot be judged on the same examples; give separate splits"
                )
            if shared:
                warnings.warn(
                    f"{a} and {b} share {len(shared)} rows (first: row {shared[0][0]} of {a} is row {shared[0][1]} of {b}): figures on {b} are optimistic",
                    stacklevel=3,
                )


def _with_lineage(
    result: Any,
    function: Callable[..., Any],
    wanted: dict[str, Parameter],
    given: dict[str, Any],
    networks: dict[str, Network | Networks | None],
    tables: dict[str, Dataset | None],
) -> Any:
    parents: list[str] = []
    lineages = []
    for found in networks.values():
        several = found if isinstance(found, Networks) else Networks([found] if found is not None else [])
        for record in map(several.record, range(len(several))):
            parents.append(record["fingerprint"])
            lineages.append(record["lineage"])
    made = step(
        _name(function),
        {name: given[name] for name, each in wanted.items() if each.kind == "setting" and each.type not in (Network, Dataset)},
        parents=parents,
        data=[{"argument": n, "name": name_of(t), "rows": len(t), "fingerprint": fingerprint(t)} for n, t in tables.items() if t is not None],
    )
    if isinstance(result, Network):
        made["result"] = result.fingerprint
        result.lineage = [*merged(lineages), made]
    elif hasattr(result, "made_by"):
        result.made_by = made
    return result


def sentence_input(network: Network) -> TextInput:
    """How a sentence encoder is fed. Raises `BadInput` for a network that gives no embeddings of text."""
    if network.output != "embedding" or not isinstance(network.input, TextInput):
        raise BadInput("a sentence encoder is needed, with its tokenizer: give minilm-l6, hf/NAME of an encoder, or the folder of one")
    return network.input


def known_classes(network: Network, data: Dataset, argument: str = "the data") -> None:
    """Raises `BadInput` unless a classifier's classes are those of the table."""
    names = class_names(data)
    if network.output != "logits":
        raise BadInput(f"a classifier is needed, and this network gives {network.output.replace('_', ' ')}: train a head first (transfer)")
    if network.labels is not None and list(network.labels) != names:
        raise BadInput(f"{argument} has the classes {', '.join(names[:6])} and the network {', '.join(network.labels[:6])}: they must be the same")

"""Families of networks, written down in a few lines: the language of DeepArchitect (Negrinho and Gordon 2017, arXiv 1704.08792).

A space is a tree of parts; whatever is written as a list is a choice:

    Concat([Repeat(Concat([Affine([64, 128]), ReLU(), Optional(Dropout([0.1, 0.3]))]), [1, 2]), Hyper("learning_rate", [0.01, 0.001])])

`walk` goes through it from left to right and asks at every choice; the shape of what flows is known there, and earlier choices may be named
(`Hyper`) and computed with (`Computed`). The answers are the program: the same answers always give the same network. Printing a space gives
text which `parse` reads, so a space can be typed into a shell and is kept in the lineage.
"""

from __future__ import annotations

import ast
import json
import operator
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellread.errors import BadInput
from wellread.structure import importable

Shape = tuple[int, ...]  # of one example
Record = list[Any]  # ["package.module:Class", {argument: value}]
Ask = Callable[[str, list[Any]], int]  # the name of a choice and its values to the place of one


# --- networks as records


class Built(nn.Sequential):
    """Layers from their records, one after the other. Input [B, *shape], output as the last layer gives it."""

    def __init__(self, layers: list[Record]) -> None:
        super().__init__(*(importable(name)(**arguments) for name, arguments in layers))


class Added(nn.Module):
    """x + layers(x). Where sizes differ, zeros fill the end of the smaller; where the number of axes differs, both are flattened first."""

    def __init__(self, layers: list[Record]) -> None:
        super().__init__()
        self.layers = Built(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        if x.ndim != y.ndim:
            x, y = x.flatten(1), y.flatten(1)
        sizes = [max(pair) for pair in zip(x.shape, y.shape, strict=True)]
        x, y = (F.pad(each, [n for a, b in zip(sizes[::-1], list(each.shape)[::-1], strict=True) for n in (0, a - b)]) for each in (x, y))
        return x + y


class Impossible(ValueError):
    """These choices give no network, as when a map shrinks to nothing."""


@lru_cache(100_000)
def _shape_after(record: str, shape: Shape) -> Shape:
    try:
        with torch.device("meta"), torch.no_grad():
            found = Built([json.loads(record)]).eval()(torch.empty(1, *shape)).shape[1:]
    except (RuntimeError, ValueError, TypeError, IndexError) as failed:
        raise Impossible(f"{record} does not take {list(shape)}: {str(failed).splitlines()[0]}") from None
    if 0 in found:
        raise Impossible(f"{record} makes {list(found)} of {list(shape)}")
    return tuple(found)


# --- one way through a space


@dataclass(frozen=True)
class Program:
    """What a space and the answers to its choices give. error: why there is no network; then the layers are those until there."""

    choices: tuple[int, ...]
    layers: list[Record]
    values: dict[str, Any]  # of the named hyperparameters
    words: tuple[str, ...]  # all that was chosen, printed: what the surrogate reads
    shape: Shape  # of what comes out
    error: str | None = None


class Walk:
    """The state of one way through a space; parts change it in `specify`."""

    def __init__(self, shape: Shape, ask: Ask) -> None:
        self.shape, self.ask = tuple(shape), ask
        self.choices: list[int] = []
        self.layers: list[Record] = []
        self.words: list[str] = []
        self.values: ChainMap[str, Any] = ChainMap()
        self.bisect = False
        self._taken: list[int] = []  # choices as one copy of a tied repetition makes them
        self._script: Iterator[int] | None = None  # of the further copies

    def choose(self, name: str, values: Sequence[Any]) -> Any:
        """One of the values; a single one is taken unasked."""
        if not values:
            raise BadInput(f"{name} has no values: give at least one")
        options = [compute(each.expression, self.values) if isinstance(each, Computed) else each for each in values]
        if not self.bisect:
            return options[self._answer(name, options)] if len(options) > 1 else options[0]
        if all(isinstance(each, int | float) for each in options):
            options.sort()
        while len(options) > 1:
            middle = (len(options) + 1) // 2
            options = (options[:middle], options[middle:])[self._answer(name, [options[:middle], options[middle:]])]
        return options[0]

    def _answer(self, name: str, options: list[Any]) -> int:
        answer = next(self._script) if self._script else self.ask(name, options)
        if not 0 <= answer < len(options):
            raise BadInput(f"{name} has {len(options)} values and not number {answer}: choose 0 to {len(options) - 1}")
        self._taken.append(answer)
        if not self._script:
            self.choices.append(answer)
        return answer

    def value(self, name: str, given: Any) -> Any:
        """An argument of a part: a list is a choice, a `Hyper` is chosen once, a `Computed` follows from earlier ones, the rest is itself."""
        if isinstance(given, Hyper):
            return given.value(self)
        if isinstance(given, Computed):
            return compute(given.expression, self.values)
        return self.choose(name, given) if isinstance(given, list | tuple) else given

    def add(self, layer: str, word: str | None = None, **arguments: Any) -> None:
        """The next layer, "package.module:Class" and its arguments."""
        record = [layer, arguments]
        self.shape = _shape_after(json.dumps(record), self.shape)
        self.layers.append(record)
        self.words += [word] if word else []

    def repeat(self, part: Any, times: int, tied: bool) -> None:
        """`part` so many times; the names that it gives are its own in each copy. tied: with the choices of the first."""
        outer, start, end = self._script, len(self._taken), 0
        for copy in range(times):
            if tied and copy:
                self._script = iter(self._taken[start:end])
            self.values = self.values.new_child()
            part.specify(self)
            self.values = self.values.parents
            if tied:
                end = end or len(self._taken)
                del self._taken[end:]
        self._script = outer


def walk(space: Any, shape: Shape, ask: Ask) -> Program:
    """Through `space` with examples of `shape`, ([C, H, W] or [d]), asking at every choice. A space is never changed and can be walked again."""
    on, error = Walk(shape, ask), None
    try:
        space.specify(on)
    except Impossible as failed:
        error = str(failed)
    return Program(tuple(on.choices), on.layers, dict(on.values), tuple(on.words), on.shape, error)


def replay(space: Any, shape: Shape, choices: Sequence[int]) -> Program:
    """The program of these choices. Raises `BadInput` when they are too few or too many."""
    left = list(choices)

    def ask(name: str, values: list[Any]) -> int:
        if not left:
            raise BadInput(f"{len(choices)} choices are too few: {name} is not chosen")
        return left.pop(0)

    program = walk(space, shape, ask)
    if left:
        raise BadInput(f"{len(choices)} choices are too many: the program is complete after {len(program.choices)}")
    return program


def every(space: Any, shape: Shape) -> Iterator[Program]:
    """All programs of a space, each once, without a list of them."""
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        start, counts = waiting.pop(), list[int]()

        def ask(name: str, values: list[Any], start: tuple[int, ...] = start, counts: list[int] = counts) -> int:
            counts.append(len(values))
            return start[len(counts) - 1] if len(counts) <= len(start) else 0

        program = walk(space, shape, ask)
        yield program
        waiting += [(*program.choices[:place], other) for place in range(len(start), len(counts)) for other in range(1, counts[place])]


# --- the language: hyperparameters


OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": round}


def compute(expression: str, values: Any) -> Any:
    """Arithmetic on named values: "max(16, 2 * width)". Raises `BadInput` for a name that is not chosen yet and for anything else."""

    def of(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float()):
                return node.value
            case ast.Name() if node.id in values:
                return values[node.id]
            case ast.BinOp() if type(node.op) in OPERATIONS:
                return OPERATIONS[type(node.op)](of(node.left), of(node.right))
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS:
                return FUNCTIONS[name](*map(of, node.args))
        raise BadInput(f"{ast.unparse(node)!r} in {expression!r} cannot be computed: use numbers, + - * / //, min, max, round and names chosen before")

    try:
        return of(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, TypeError) as failed:
        raise BadInput(f"{expression!r} cannot be computed: {failed}") from None


@dataclass(frozen=True)
class Computed:
    """A dependent hyperparameter: what an expression on named ones gives, such as Computed("2 * width"), as an argument or a value in a list."""

    expression: str


@dataclass(frozen=True)
class Hyper:
    """An independent hyperparameter with a name. Wherever the name stands again it has the same value; inside a Repeat, in each copy its own.

    As an argument, Affine(Hyper("width", [16, 32])), or as a part without layers, for what the training reads (learning_rate, weight_decay).
    """

    name: str
    values: Any

    def value(self, walk: Walk) -> Any:
        """Chosen when it is met for the first time."""
        if self.name not in walk.values:
            walk.values[self.name] = walk.choose(self.name, self.values if isinstance(self.values, list | tuple) else [self.values])
            walk.words.append(f"{self.name}={walk.values[self.name]}")
        return walk.values[self.name]

    def specify(self, walk: Walk) -> None:
        self.value(walk)


# --- the language: basic parts


@dataclass(frozen=True)
class Layer:
    """Any importable nn.Module by name, Layer("torch.nn:GELU"), each argument a value or a list to choose from."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def specify(self, walk: Walk) -> None:
        importable(self.name)
        chosen = {name: walk.value(name, given) for name, given in self.arguments.items()}
        word = f"{self.name.rpartition(':')[2]}({','.join(f'{name}={value}' for name, value in chosen.items())})"
        walk.add(self.name, word, **chosen)


@dataclass(frozen=True)
class Conv2d:
    """filters channels, square kernels; padding "same" keeps the size at stride 1 (odd sizes), "valid" pads nothing."""

    filters: Any
    sizes: Any = 3
    strides: Any = 1
    paddings: Any = "same"

    def specify(self, walk: Walk) -> None:
        given = {"filters": self.filters, "sizes": self.sizes, "strides": self.strides, "paddings": self.paddings}
        filters, size, stride, padding = (walk.value(name, values) for name, values in given.items())
        if padding not in ("same", "valid") or (padding == "same" and size % 2 == 0):
            raise BadInput(f"padding {padding!r} with kernels of {size}: choose valid, or same with an odd size")
        word = f"Conv2d({filters},{size},{stride},{padding})"
        sizes = {"kernel_size": size, "stride": stride, "padding": size // 2 if padding == "same" else 0}
        walk.add("torch.nn:Conv2d", word, in_channels=walk.shape[0], out_channels=filters, **sizes)


@dataclass(frozen=True)
class Affine:
    """A Linear layer; maps are flattened before."""

    units: Any

    def specify(self, walk: Walk) -> None:
        if len(walk.shape) > 1:
            walk.add("torch.nn:Flatten")
        units = walk.value("units", self.units)
        walk.add("torch.nn:Linear", f"Affine({units})", in_features=walk.shape[0], out_features=units)


@dataclass(frozen=True)
class BatchNorm:
    """Batch norm over what comes: maps or features."""

    def specify(self, walk: Walk) -> None:
        walk.add(f"torch.nn:BatchNorm{2 if len(walk.shape) == 3 else 1}d", "BatchNorm", num_features=walk.shape[0])


@dataclass(frozen=True)
class Empty:
    """Nothing."""

    def specify(self, walk: Walk) -> None:
        pass


ReLU, Sigmoid, Tanh = partial(Layer, "torch.nn:ReLU"), partial(Layer, "torch.nn:Sigmoid"), partial(Layer, "torch.nn:Tanh")
Flatten = partial(Layer, "torch.nn:Flatten")


def Dropout(p: Any) -> Layer:
    """Drops features with probability p."""
    return Layer("torch.nn:Dropout", {"p": p})


def MaxPool(sizes: Any = 2) -> Layer:
    """The largest of each square."""
    return Layer("torch.nn:MaxPool2d", {"kernel_size": sizes})


def AvgPool(sizes: Any = 2) -> Layer:
    """The mean of each square."""
    return Layer("torch.nn:AvgPool2d", {"kernel_size": sizes})


def GlobalPool() -> Layer:
    """The mean over the whole map, [C, 1, 1]."""
    return Layer("torch.nn:AdaptiveAvgPool2d", {"output_size": 1})


# --- the language: composite parts


@dataclass(frozen=True)
class Concat:
    """One part after the other."""

    parts: list[Any]

    def specify(self, walk: Walk) -> None:
        for part in self.parts:
            part.specify(walk)


@dataclass(frozen=True)
class Or:
    """One of the parts, and then its choices."""

    parts: list[Any]

    def specify(self, walk: Walk) -> None:
        walk.choose("Or", self.parts).specify(walk)


def Optional(part: Any) -> Or:
    """The part or nothing."""
    return Or([Empty(), part])


def MaybeSwap(a: Any, b: Any) -> Or:
    """a and b in one of the two orders."""
    return Or([Concat([a, b]), Concat([b, a])])


@dataclass(frozen=True)
class Repeat:
    """The part so many times, each copy with choices of its own."""

    part: Any
    times: Any

    def specify(self, walk: Walk) -> None:
        times = walk.value("times", self.times)
        if not isinstance(times, int) or times < 1:
            raise BadInput(f"a part cannot be repeated {times!r} times: give at least 1, or put it into Optional")
        walk.repeat(self.part, times, isinstance(self, RepeatTied))


@dataclass(frozen=True)
class RepeatTied(Repeat):
    """The part so many times, each copy with the choices of the first; weights are its own."""


@dataclass(frozen=True)
class Residual:
    """x + part(x), padded with zeros where the shapes differ."""

    part: Any

    def specify(self, walk: Walk) -> None:
        before, shape, walk.layers = walk.layers, walk.shape, []
        walk.words.append("Residual(")
        self.part.specify(walk)
        inner, walk.layers, walk.shape = walk.layers, before, shape
        walk.add("wellread.spaces:Added", ")", layers=inner)


@dataclass(frozen=True)
class ChoiceBisection:
    """The part with every choice among n made as a series of halvings of the list, numbers in ascending order."""

    part: Any

    def specify(self, walk: Walk) -> None:
        before, walk.bisect = walk.bisect, True
        self.part.specify(walk)
        walk.bisect = before


WORDS: dict[str, Callable[..., Any]] = {
    "Computed": Computed, "Hyper": Hyper, "Layer": Layer, "Conv2d": Conv2d, "Affine": Affine, "BatchNorm": BatchNorm, "Empty": Empty,
    "ReLU": ReLU, "Sigmoid": Sigmoid, "Tanh": Tanh, "Flatten": Flatten, "Dropout": Dropout, "MaxPool": MaxPool, "AvgPool": AvgPool,
    "GlobalPool": GlobalPool, "Concat": Concat, "Or": Or, "Optional": Optional, "MaybeSwap": MaybeSwap, "Repeat": Repeat,
    "RepeatTied": RepeatTied, "Residual": Residual, "ChoiceBisection": ChoiceBisection,
}  # fmt: skip


def parse(text: str) -> Any:
    """A space from text: one of the words above with lists, numbers, words in quotes, and what repr() of a space prints. Nothing is executed."""

    def of(node: ast.AST) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple():
                return [of(each) for each in node.elts]
            case ast.Dict() if None not in node.keys:
                return {of(key): of(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None}
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.Call(func=ast.Name(id=name)) if name in WORDS:
                try:
                    return WORDS[name](*map(of, node.args), **{str(each.arg): of(each.value) for each in node.keywords})
                except TypeError as wrong:
                    raise BadInput(f"{ast.unparse(node)[:80]!r} in the space: {wrong}") from None
        raise BadInput(f"{ast.unparse(node)[:80]!r} is not known in a space: use {', '.join(WORDS)}")

    try:
        space = of(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as failed:
        raise BadInput(f"the space cannot be read, {failed.msg} at character {failed.offset}: write it as Concat([Affine([32, 64]), ReLU()])") from None
    if not hasattr(space, "specify"):
        raise BadInput(f"{text[:80]!r} is no space: write one as Concat([Affine([32, 64]), ReLU()]), or name one of {', '.join(SPACES)}")
    return space


# --- spaces to start from


TRAINING = [Hyper("learning_rate", [0.0003, 0.001, 0.003, 0.01]), Hyper("weight_decay", [0.0, 0.01, 0.1])]
NONLINEAR = Or([ReLU(), Sigmoid(), Tanh()])
CONVOLUTION = Concat([Conv2d([16, 32, 64], [3, 5]), Or([Concat([BatchNorm(), ReLU()]), Concat([ReLU(), BatchNorm()]), ReLU()])])
HIDDEN = Concat([Affine([32, 64, 128, 256, 512]), MaybeSwap(NONLINEAR, Optional(BatchNorm())), Optional(Dropout([0.1, 0.3, 0.5]))])
SPACES = {
    "head": Concat([*TRAINING, Optional(BatchNorm()), Optional(Repeat(HIDDEN, [1, 2, 3]))]),
    "convnet": Concat([*TRAINING, Repeat(Concat([Repeat(CONVOLUTION, [1, 2]), MaxPool()]), [1, 2]), Or([Flatten(), GlobalPool()]), Optional(HIDDEN)]),
    "resnet": Concat([*TRAINING, Conv2d([16, 32]), Repeat(Concat([RepeatTied(Residual(CONVOLUTION), [1, 2, 4]), MaxPool()]), [1, 2]), GlobalPool()]),
}
PLAIN = {
    "head": Empty(),
    "convnet": Concat([Conv2d(32), BatchNorm(), ReLU(), MaxPool(), Conv2d(64), BatchNorm(), ReLU(), GlobalPool()]),
}  # what is compared with: a linear head, a small convolutional network

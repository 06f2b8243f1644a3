"""Structure is data: a network is an architecture, a list of edits, and weights.

An edit is a small JSON record, {"edit": NAME, ...}, applied in place to a module by the function of that name below. Nothing else changes the
shape of a network, so every network can be written as JSON and tensors and be built again in another process. A new family of edits is one
more function with `@edit`; its record's fields are its keyword parameters.

Each edit function takes `fill`: when True, new tensors get values that follow from the old ones; when False (replay before weights are read
from a file) only shapes matter, and expensive values are not computed.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wellread.errors import BadInput

EDITS: dict[str, Callable[..., nn.Module]] = {}


def edit(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make `function(module, *, fill, **fields) -> module` the edit of its name. It may change `module` in place and returns the result."""
    EDITS[function.__name__] = function
    return function


def apply(module: nn.Module, record: dict[str, Any], *, fill: bool = True) -> nn.Module:
    """`module` after one edit. Raises `BadInput` for an unknown edit, layer or impossible size."""
    fields = dict(record)
    name = fields.pop("edit", None)
    if name not in EDITS:
        raise BadInput(f"the edit {name!r} is not known here (known: {', '.join(sorted(EDITS))}): update wellread, or check the network's config")
    try:
        return EDITS[name](module, fill=fill, **fields)
    except TypeError as wrong:
        raise BadInput(f"the edit {record} does not fit {name}(): {wrong}") from None


def layer_of(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path. Raises `BadInput` with the nearest names."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        from difflib import get_close_matches

        near = get_close_matches(path, [name for name, _ in module.named_modules()], n=3, cutoff=0.3)
        raise BadInput(f"this network has no layer {path!r}: " + (f"did you mean {', '.join(near)}?" if near else "see named_modules()")) from None


def put_layer(module: nn.Module, path: str, layer: nn.Module) -> nn.Module:
    """Exchange the submodule at `path` (the module itself for an empty path)."""
    if not path:
        return layer
    layer_of(module, path)
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
    return module


def importable(name: str) -> type[nn.Module]:
    """The `nn.Module` class named "package.module:Class". Anything else is refused: a config must not be able to call other code."""
    package, _, qualified = name.partition(":")
    try:
        found: Any = importlib.import_module(package)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        raise BadInput(f"the class {name!r} cannot be imported: install or put on the path the code that defines it") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise BadInput(f"{name!r} is not an nn.Module class: only those can be part of a network")
    return found


def class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


# --- the edits


@edit
def new_head(module: nn.Module, *, layer: str, part: str, arguments: dict[str, Any], fill: bool = True) -> nn.Module:
    """Exchange the layer that turns the embedding into the output for a `part` ("package.module:Class") built with `arguments`."""
    old = layer_of(module, layer)
    head = importable(part)(**arguments)
    like = next(old.parameters(), next(module.parameters(), None))
    if like is not None and not _keeps_its_dtype(head):
        head = head.to(dtype=like.dtype)
    return put_layer(module, layer, head.to(device=like.device) if like is not None else head)


def _keeps_its_dtype(part: nn.Module) -> bool:
    return bool(getattr(part, "keeps_dtype", False))  # statistics in float64 must not follow a network into bfloat16


@edit
def wrap(module: nn.Module, *, part: str, arguments: dict[str, Any], fill: bool = True) -> nn.Module:
    """Put the whole network inside a `part` built as Class(network, **arguments)."""
    return importable(part)(module, **arguments)


@edit
def factorise(module: nn.Module, *, layer: str, rank: int, scheme: str = "channel", fill: bool = True) -> nn.Module:
    """Write a linear or convolution layer as two of them with `rank` features between, by truncated SVD of its weight.

    channel: Linear [o, i] becomes [r, i] then [o, r]; a convolution [o, i, h, w] becomes an h x w convolution to r channels (same stride, padding
    and dilation) and a 1 x 1 convolution to o. spatial: a convolution becomes an h x 1 convolution to r channels and a 1 x w convolution to o, each
    with its half of stride, padding and dilation. The bias is the second layer's. At the highest rank the layer computes what it did before.
    Raises `BadInput` for another kind of layer, a grouped convolution, or a rank outside 1...min(o, i * h * w), for spatial 1...min(i * h, o * w).
    """
    old = layer_of(module, layer)
    spatial = scheme == "spatial"
    if scheme not in ("channel", "spatial"):
        raise BadInput(f"the scheme {scheme!r} is not known: choose channel or spatial")
    if not isinstance(old, nn.Conv2d if spatial else nn.Linear | nn.Conv2d):
        raise BadInput(f"layer {layer!r} is a {type(old).__name__}: only {'Conv2d' if spatial else 'Linear and Conv2d'} can be factorised")
    if isinstance(old, nn.Conv2d) and old.groups != 1:
        raise BadInput(f"layer {layer!r} is a convolution in {old.groups} groups: only ungrouped ones can be factorised")
    if isinstance(old, nn.Conv2d) and (not isinstance(old.padding, tuple) or type(old) is not nn.Conv2d):
        raise BadInput(
            f"layer {layer!r} is a {type(old).__name__} with padding {old.padding!r}: only plain Conv2d with numeric padding can be factorised"
        )
    assert isinstance(old, nn.Linear | nn.Conv2d)
    matrix = old.weight.detach().permute(1, 2, 0, 3).flatten(2).flatten(0, 1) if spatial else old.weight.detach().flatten(1)
    highest = min(matrix.shape)
    if not 1 <= rank <= highest:
        raise BadInput(f"rank {rank} does not fit layer {layer!r}: choose 1 to {highest}")
    kind: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        first: nn.Linear | nn.Conv2d = nn.Linear(old.in_features, rank, bias=False, **kind)
        second: nn.Linear | nn.Conv2d = nn.Linear(rank, old.out_features, bias=old.bias is not None, **kind)
    else:
        form: dict[str, Any] = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        rest: dict[str, Any] = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        if spatial:
            form, rest = {name: (form[name][0], rest[name][1]) for name in form}, {name: (rest[name][0], form[name][1]) for name in form}
        first = nn.Conv2d(old.in_channels, rank, bias=False, padding_mode=old.padding_mode, **form, **kind)
        second = nn.Conv2d(rank, old.out_channels, bias=old.bias is not None, padding_mode=old.padding_mode, **rest, **kind)
    if fill:
        into, out = low_rank(matrix, rank)
        if isinstance(old, nn.Conv2d) and spatial:  # rows of the matrix are (input, height), columns (output, width)
            (h, w), i, o = old.kernel_size, old.in_channels, old.out_channels
            into, out = out.t().reshape(rank, i, h, 1), into.reshape(rank, o, 1, w).transpose(0, 1)
        with torch.no_grad():
            first.weight.copy_(into.reshape(first.weight.shape))
            second.weight.copy_(out.reshape(second.weight.shape))
            if old.bias is not None and second.bias is not None:
                second.bias.copy_(old.bias)
    return put_layer(module, layer, nn.Sequential(first, second).train(old.training))


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r factors of an [o, i] matrix in the Frobenius norm: [r, i] and [o, r], each carrying the root of the singular values."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * vt[:rank]).to(matrix.dtype), (u[:, :rank] * root).to(matrix.dtype)


@edit
def keep_blocks(module: nn.Module, *, blocks: str, keep: list[int], fill: bool = True) -> nn.Module:
    """Depth: the Sequential or ModuleList at `blocks` holds the children `keep`, in that order. An index named again is a copy with its own weights.

    Children are numbered anew; those of a Sequential with names keep theirs. Raises `BadInput` for another kind of layer or an index out of range.
    """
    holder = layer_of(module, blocks)
    if not isinstance(holder, nn.Sequential | nn.ModuleList):
        raise BadInput(f"{blocks!r} is a {type(holder).__name__}: blocks are kept in a Sequential or ModuleList")
    old = list(holder.named_children())
    if wrong := [index for index in keep if not 0 <= index < len(old)]:
        raise BadInput(f"{blocks!r} has no block {wrong[0]}: choose from 0 to {len(old) - 1}")
    numbered = all(name == str(index) for index, (name, _) in enumerate(old))
    holder._modules.clear()
    for place, index in enumerate(keep):
        name, child = old[index]
        if index in keep[:place]:
            child, name = copy.deepcopy(child), f"{name}_{keep[: place + 1].count(index)}"
        holder.add_module(str(place) if numbered else name, child)
        for part in child.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = place  # where transformers keeps the past keys of a block
    for path, part in module.named_modules():
        settings: Any = getattr(part, "config", None)  # transformers runs the first num_hidden_layers blocks
        if f"{blocks}.".startswith(f"{path}." if path else "") and getattr(settings, "num_hidden_layers", None) == len(old):
            settings.num_hidden_layers = len(keep)
    return module

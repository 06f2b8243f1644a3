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
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
                part.layer_idx = place  # type: ignore[assignment]  # where transformers keeps the past keys of a block
    for path, part in module.named_modules():
        settings: Any = getattr(part, "config", None)  # transformers runs the first num_hidden_layers blocks
        if f"{blocks}.".startswith(f"{path}." if path else "") and getattr(settings, "num_hidden_layers", None) == len(old):
            settings.num_hidden_layers = len(keep)
    return module


def to_ranges(indices: Iterable[int]) -> list[list[int]]:
    """[0, 1, 2, 5] as [[0, 3], [5, 6]]: how records write which channels are kept (start, end)."""
    ranges: list[list[int]] = []
    for index in sorted(set(indices)):
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] += 1
        else:
            ranges.append([index, index + 1])
    return ranges


def from_ranges(ranges: list[list[int]]) -> list[int]:
    return [index for start, end in ranges for index in range(start, end)]


@edit
def keep_channels(
    module: nn.Module,
    *,
    out: dict[str, list[list[int]]] | None = None,
    into: dict[str, list[list[int]]] | None = None,
    parameters: dict[str, dict[str, Any]] | None = None,
    attributes: dict[str, dict[str, Any]] | None = None,
    fill: bool = True,
) -> nn.Module:
    """Width: layers keep only these outputs and inputs. The record names every layer that is touched; `coupling.keep` writes one.

    out, into: layer to the ranges kept (to_ranges). Rows and columns of Linear and Conv; for norm and scale layers, `out` are their entries;
    for an Embedding its features. A grouped convolution must lose equally many channels in each group, or whole groups.
    parameters: for tensors that belong to no such layer (tokens, positions): path to {"dim": d, "keep": ranges}.
    attributes: numbers that the layers compute with, such as {"blocks.0.attn": {"num_heads": 2}}.
    Raises `BadInput` when ranges are empty, not ascending, or do not fit a layer.
    """
    out, into = out or {}, into or {}
    for path in sorted({*out, *into}):
        layer = layer_of(module, path)
        if parametrize.is_parametrized(layer):
            raise BadInput(f"layer {path!r} has a mask: apply the edit 'densify' before its channels are cut")
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _cut_convolution(layer, path, out.get(path), into.get(path))
        elif isinstance(layer, nn.Linear):
            if path in out:
                layer.out_features = _cut(layer, ("weight", "bias"), 0, out[path], path)
            if path in into:
                layer.in_features = _cut(layer, ("weight",), 1, into[path], path)
        elif path in into:
            raise BadInput(f"layer {path!r} is a {type(layer).__name__}: only Linear and Conv have inputs of their own to keep")
        elif isinstance(layer, nn.Embedding):
            layer.embedding_dim = _cut(layer, ("weight",), 1, out[path], path)
        else:
            own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
            size = _cut(layer, [name for name, tensor in own if tensor.ndim], -1, out[path], path)
            for name in ("num_features", "num_channels", "num_parameters", "normalized_shape"):
                if hasattr(layer, name):
                    setattr(layer, name, (size,) if name == "normalized_shape" else size)
    for path, cut in (parameters or {}).items():
        where, _, name = path.rpartition(".")
        _cut(layer_of(module, where), [name], cut["dim"], cut["keep"], path)
    for path, values in (attributes or {}).items():
        layer = layer_of(module, path)
        for name, value in values.items():
            if not isinstance(getattr(layer, name, None), int | float):
                raise BadInput(f"layer {path!r} has no number {name!r} to change")
            setattr(layer, name, value)
    return module


def _cut(layer: nn.Module, names: Iterable[str], dim: int, ranges: list[list[int]], path: str) -> int:
    """Keep these entries along `dim` of the layer's tensors that are there; how many they are."""
    kept = from_ranges(ranges)
    tensors = {name: tensor for name in names if isinstance(tensor := getattr(layer, name, None), Tensor)}
    if not tensors:
        raise BadInput(f"{path!r} is a {type(layer).__name__} and has no channels of its own to keep")
    for name, tensor in tensors.items():
        if not -tensor.ndim <= dim < tensor.ndim or not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= tensor.shape[dim]:
            raise BadInput(f"channels {ranges} cannot be kept of {path!r} ({name} is {list(tensor.shape)}): give ascending ranges, at least one channel")
        cut = tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device)).contiguous()
        setattr(layer, name, nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut)
    return len(kept)


def _cut_convolution(layer: Any, path: str, out: list[list[int]] | None, into: list[list[int]] | None) -> None:
    """Cut rows, columns and groups. In groups, `into` says which groups stay and which inputs of each; depthwise is one input in each."""
    groups, per_in, per_out = layer.groups, layer.in_channels // layer.groups, layer.out_channels // layer.groups
    if groups > 1 and into is not None:
        inputs = [[i - g * per_in for i in from_ranges(into) if i // per_in == g] for g in range(groups)]
        rows = [[o for o in (range(layer.out_channels) if out is None else from_ranges(out)) if o // per_out == g] for g in range(groups)]
        stay = [g for g in range(groups) if inputs[g]]
        if any(bool(rows[g]) != bool(inputs[g]) for g in range(groups)) or len({(len(rows[g]), len(inputs[g])) for g in stay}) != 1:
            raise BadInput(f"convolution {path!r} has {groups} groups: keep equally many channels in each of them, or leave out whole groups")
        pick = torch.tensor([inputs[o // per_out] for g in stay for o in rows[g]], device=layer.weight.device)  # [kept outputs, inputs of a group]
    elif groups > 1 and out is not None and len({sum(o // per_out == g for o in from_ranges(out)) for g in range(groups)}) != 1:
        raise BadInput(f"convolution {path!r} has {groups} groups: keep equally many channels in each of them, or leave out whole groups")
    if out is not None:
        layer.out_channels = _cut(layer, ("weight", "bias"), 0, out, path)
    if into is not None and groups == 1:
        layer.in_channels = _cut(layer, ("weight",), 1, into, path)
    elif into is not None:
        index = pick.view(*pick.shape, *[1] * (layer.weight.ndim - 2)).expand(-1, -1, *layer.weight.shape[2:])
        layer.weight = nn.Parameter(layer.weight.detach().gather(1, index), layer.weight.requires_grad)
        layer.groups, layer.in_channels = len(stay), len(from_ranges(into))


class Mask(nn.Module):
    """A weight with zeros that stay: weight * keep. `keep` is a buffer and may be changed in place, also during training."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep: Tensor
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.keep


def masks(module: nn.Module) -> dict[str, Mask]:
    """The masks of a sparse network, by layer."""
    found = ((name, getattr(layer, "parametrizations", {})) for name, layer in module.named_modules())
    return {name: each for name, weights in found if "weight" in weights for each in weights["weight"] if isinstance(each, Mask)}


@edit
def sparsify(module: nn.Module, *, layers: dict[str, int], fill: bool = True) -> nn.Module:
    """Sparsity: a mask on the weight of each layer, with so many zeros, at first where the weight is smallest in magnitude (Mask.keep may be changed).

    The masks are saved with the weights. Of a layer that has a mask already, the mask is made anew from its weight under the mask.
    Raises `BadInput` for a layer without a weight matrix or more zeros than it has entries.
    """
    present = masks(module)
    for path, zeros in layers.items():
        layer = layer_of(module, path)
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            raise BadInput(f"layer {path!r} is a {type(layer).__name__} without a weight matrix: name Linear or Conv layers")
        if not 0 <= zeros <= weight.numel():
            raise BadInput(f"{zeros} zeros do not fit the {weight.numel()} weights of layer {path!r}")
        keep = torch.ones_like(weight, dtype=torch.bool)
        if fill:
            keep.view(-1)[weight.detach().abs().flatten().argsort(stable=True)[:zeros]] = False
        if path in present:
            present[path].keep = keep
        else:
            parametrize.register_parametrization(layer, "weight", Mask(keep))
    return module


@edit
def densify(module: nn.Module, *, fill: bool = True) -> nn.Module:
    """Take all masks away. What they held at zero is zero now and can be trained again."""
    for path in masks(module):
        layer = layer_of(module, path)
        kind = type(layer)  # torch takes the weight's property off the class, which copies of the layer share: this one gets its own
        own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(kind.__name__, kind.__bases__, own)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return module

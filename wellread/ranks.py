"""Low rank: which layers can be written as two, what that costs and saves, and which rank each gets from an energy or a budget.

The edit `factorise` of structure.py does the cut; `truncated` gives the same matrix while the layer is still whole, so that it can be trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from wellread import meter, runtime
from wellread.batches import network_batches
from wellread.errors import BadInput
from wellread.features import running, to_device
from wellread.network import Network
from wellread.structure import apply, layer_of, put_layer

Scheme = Literal["channel", "spatial"]
Measure = Literal["macs", "parameters"]
Which = Literal["all", "linear", "conv", "kxk"]
MOMENT_SIZE = 4096  # whitening needs a square matrix of a layer's inputs; beyond this the layer is cut without


@dataclass(frozen=True)
class Layer:
    """A layer that can be factorised, and what its weight costs: whole, and for each unit of rank. Multiply-adds are for one example."""

    path: str
    scheme: Scheme
    shape: tuple[int, ...]  # of the weight
    parameters: int
    macs: int
    parameters_per_rank: int
    macs_per_rank: int

    @property
    def highest(self) -> int:
        """The rank at which the two layers compute what the one did."""
        return min(matrix(torch.empty(self.shape, device="meta"), self.scheme).shape)

    def cost(self, rank: int | None, measure: Measure = "macs") -> int:
        """Of the two layers at `rank`, or of the whole one for None."""
        if rank is None:
            return self.parameters if measure == "parameters" else self.macs
        return rank * (self.parameters_per_rank if measure == "parameters" else self.macs_per_rank)

    def edit(self, rank: int) -> dict[str, Any]:
        """The record for `Network.edited`."""
        return {"edit": "factorise", "layer": self.path, "rank": rank} | ({"scheme": self.scheme} if self.scheme != "channel" else {})


# --- matrices


def matrix(weight: Tensor, scheme: Scheme) -> Tensor:
    """The matrix whose rank counts. channel: [o, i, h, w] as [o, i h w], Linear as it is. spatial: [i h, o w]."""
    return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1) if scheme == "spatial" else weight.flatten(1)


def folded(flat: Tensor, shape: Sequence[int], scheme: Scheme) -> Tensor:
    """`matrix` undone: a weight of `shape`."""
    if scheme == "spatial":
        o, i, h, w = shape
        return flat.reshape(i, h, o, w).permute(2, 0, 1, 3)
    return flat.reshape(tuple(shape))


@dataclass(frozen=True)
class Spectrum:
    """Singular values, float64 [k], falling, and the singular vectors of the shorter side, [k, k] in columns."""

    values: Tensor
    vectors: Tensor


def spectra(matrices: Mapping[str, Tensor]) -> dict[str, Spectrum]:
    """Of each matrix, in float64 from the Gram matrix of its shorter side; those of one shape are solved together."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, flat in matrices.items():
        groups.setdefault(tuple(flat.shape), []).append(name)
    found = {}
    for (rows, columns), names in groups.items():
        stacked = torch.stack([_wide(matrices[name]) for name in names])
        gram = stacked @ stacked.mT if rows <= columns else stacked.mT @ stacked
        squares, vectors = torch.linalg.eigh(gram)
        for name, square, vector in zip(names, squares.flip(-1), vectors.flip(-1), strict=True):
            found[name] = Spectrum(square.clamp(min=0).sqrt(), vector)
    return found


def truncated(flat: Tensor, spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank `rank` in the Frobenius norm, U_r S_r V_r^T, and the sub-gradient of its nuclear norm, U_r V_r^T.

    Both in the shape, dtype and on the device of `flat` [m, n].
    """
    wide = _wide(flat)
    turned = wide if flat.shape[0] <= flat.shape[1] else wide.mT
    basis, values = spectrum.vectors[:, :rank], spectrum.values[:rank]
    inner = basis.mT @ turned
    inverse = torch.where(values > 1e-7 * spectrum.values[0], 1 / values, 0.0)  # a direction that is not there has no sub-gradient
    both = basis @ inner, basis @ (inverse[:, None] * inner)
    best, sign = both if turned is wide else (both[0].mT, both[1].mT)
    return best.to(flat), sign.to(flat)


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # mps has no float64


def whitened(flat: Tensor, rank: int, moment: Tensor) -> Tensor:
    """The matrix W' of rank `rank` that is best on the inputs: least ||(W - W') x||^2 in the mean, for E[x x^T] = `moment` [n, n]."""
    values, vectors = torch.linalg.eigh(_wide(moment))
    root = values.clamp(min=1e-9 * float(values[-1])).sqrt()
    weighted = _wide(flat) @ (vectors * root)
    best, _ = truncated(weighted, spectra({"": weighted})[""], rank)
    return ((best / root) @ vectors.mT).to(flat)


# --- which layers


def find_layers(
    network: Network, *, scheme: Scheme = "channel", which: Which = "all", leave_out: Sequence[str] = (), smallest: int = 1
) -> tuple[list[Layer], dict[str, str]]:
    """The layers that can be factorised, in the order in which they run, and the others by name with the reason.

    which: "kxk" are convolutions larger than 1 x 1, "conv" all of them, "linear" the Linear ones. The head and the convolution that reads the
        picture are never among them, nor is what shares its weight, is called by more than its output, or does not run.
    leave_out: names of layers or of what holds them, whole parts of a dotted path: "attn.proj", "blocks.0". smallest: fewest outputs of a layer.
    Raises `BadInput`, with the nearest ones, for a name to leave out that no layer has.
    """
    module, head = network.module, network.head
    owners: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    check_names(module, leave_out)
    candidates, left = {}, {}
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) or not _wanted(layer, which):
            continue
        reason = _unfit(layer)
        if path == head:
            reason = "the head"
        elif named := next((name for name in leave_out if is_named(path, name)), None):
            reason = f"left out by name ({named})"
        elif reason is None and owners[id(layer.weight)] > 1:
            reason = "shares its weight with another layer"
        elif reason is None and layer.weight.shape[0] < smallest:
            reason = f"has {layer.weight.shape[0]} outputs"
        if reason is None:
            candidates[path] = layer
        else:
            left[path] = reason
    calls = _calls(network, list(candidates))
    first = next((path for path in calls if isinstance(candidates[path], nn.Conv2d)), None)
    if first is not None and network.input is not None and network.input.column == "image" and _reads_picture(candidates[first], network):
        left[first] = "reads the picture"
    for path in set(candidates) - set(calls):
        left[path] = "does not run as a layer of its own"
    chosen = [path for path in calls if path not in left]
    if chosen and not _runs(network, chosen):
        for path in chosen:
            if not _runs(network, [path]):
                left[path] = "its weight is read by another part of the network"
    return [_layer(path, candidates[path], scheme, calls[path]) for path in chosen if path not in left], left


def is_named(path: str, name: str) -> bool:
    """Whether `name` is a run of whole parts of a dotted path."""
    return f".{name}." in f".{path}."


def check_names(module: nn.Module, names: Sequence[str]) -> None:
    paths = [path for path, _ in module.named_modules()]
    for name in names:
        if not any(is_named(path, name) for path in paths):
            near = get_close_matches(name, {*paths, *(part for path in paths for part in path.split("."))}, n=3, cutoff=0.4)
            raise BadInput(f"leave_out names {name!r}, and no layer is called so" + (f": did you mean {', '.join(near)}?" if near else ""))


def _wanted(layer: nn.Module, which: Which) -> bool:
    if isinstance(layer, nn.Linear):
        return which in ("all", "linear")
    return which in ("all", "conv") or (which == "kxk" and set(getattr(layer, "kernel_size", ())) != {1})


def _unfit(layer: Any) -> str | None:
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"is a {type(layer).__name__}"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"is in {layer.groups} groups"
    return "has no numeric padding" if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, tuple) else None


def _reads_picture(layer: Any, network: Network) -> bool:
    return layer.in_channels == getattr(network.input, "channels", 3)


def _calls(network: Network, paths: Sequence[str]) -> dict[str, list[tuple[torch.Size, torch.Size]]]:
    """{layer: (input shape, output shape) of each call} for one example, in the order in which the layers first run."""
    calls: dict[str, list[tuple[torch.Size, torch.Size]]] = {}
    hooks = []
    for path in paths:

        def note(_: nn.Module, given: tuple[Any, ...], out: Tensor, path: str = path) -> None:
            calls.setdefault(path, []).append((given[0].shape, out.shape))

        hooks.append(layer_of(network.module, path).register_forward_hook(note))
    try:
        with torch.inference_mode():
            network(meter.batch(network, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _runs(network: Network, paths: Sequence[str]) -> bool:
    """Whether the network runs when these layers are a Sequential, which has no `weight`."""
    layers = {path: layer_of(network.module, path) for path in paths}
    try:
        for path, layer in layers.items():
            put_layer(network.module, path, nn.Sequential(layer).eval())
        with torch.inference_mode():
            network(meter.batch(network, 1))
    except (AttributeError, TypeError):
        return False
    finally:
        for path, layer in layers.items():
            put_layer(network.module, path, layer)
    return True


def _layer(path: str, layer: Any, scheme: Scheme, calls: list[tuple[torch.Size, torch.Size]]) -> Layer:
    shape = tuple(layer.weight.shape)
    o, i = shape[:2]
    if isinstance(layer, nn.Linear):
        positions = sum(out.numel() // o for _, out in calls)
        return Layer(path, "channel", shape, o * i, o * i * positions, o + i, (o + i) * positions)
    h, w = shape[2:]
    if h == w == 1:
        scheme = "channel"  # the same thing
    positions = sum(out.numel() // o for _, out in calls)
    between = sum(out.numel() // o // out[-1] * given[-1] for given, out in calls)  # after h x 1 only the height has changed
    if scheme == "spatial":
        return Layer(path, scheme, shape, o * i * h * w, o * i * h * w * positions, i * h + o * w, i * h * between + o * w * positions)
    return Layer(path, scheme, shape, o * i * h * w, o * i * h * w * positions, i * h * w + o, (i * h * w + o) * positions)


# --- which ranks


def energy_rank(values: Tensor, energy: float) -> int:
    """The smallest r at which the first r singular values [k] hold the share `energy` of the sum of squares; at least 1."""
    kept = _kept(values)
    return min(int((kept < energy).sum()) + 1, len(kept))


def value_rank(values: Tensor, least: float) -> int:
    """How many singular values are at least `least`; at least 1."""
    return max(1, int((values >= least).sum()))


def _kept(values: Tensor) -> np.ndarray:
    sums = (values.double() ** 2).cumsum(0).cpu().numpy()
    return sums / sums[-1] if sums[-1] > 0 else np.ones(len(sums))


def ranks_for_energy(
    layers: Sequence[Layer], values: Mapping[str, Tensor], energy: float, *, measure: Measure = "macs", pays: bool = True
) -> dict[str, int]:
    """{layer: rank}. With `pays`, a layer whose two parts would cost as much as the whole is not among them and stays as it is."""
    if not 0 < energy <= 1:
        raise BadInput(f"energy is {energy}: give the share of the squared singular values to keep, above 0 and at most 1")
    ranks = {layer.path: energy_rank(values[layer.path], energy) for layer in layers}
    return {layer.path: ranks[layer.path] for layer in layers if not pays or layer.cost(ranks[layer.path], measure) < layer.cost(None, measure)}


def ranks_for_budget(
    layers: Sequence[Layer], values: Mapping[str, Tensor], limit: float, *, measure: Measure = "macs"
) -> tuple[dict[str, int], float]:
    """The ranks at the highest energy, one for all layers, at which together they cost at most `limit`; and that energy.

    Raises `BadInput` with the smallest reachable cost when rank 1 everywhere is too much.
    """
    levels = np.unique(np.concatenate([_kept(values[layer.path]) for layer in layers] or [np.ones(1)]))

    def cost(ranks: Mapping[str, int]) -> int:
        return sum(layer.cost(ranks.get(layer.path), measure) for layer in layers)

    if cost({}) <= limit:
        return {}, 1.0
    low, high = -1, len(levels)  # levels[low] is cheap enough, levels[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        fits = cost(ranks_for_energy(layers, values, float(levels[middle]), measure=measure)) <= limit
        low, high = (middle, high) if fits else (low, middle)
    if low < 0:
        least = cost(ranks_for_energy(layers, values, float(levels[0]), measure=measure))
        raise BadInput(f"the layers that can be cut need at least {least:,} {_WORDS[measure]}, and the budget leaves them {max(0, int(limit)):,}")
    return ranks_for_energy(layers, values, float(levels[low]), measure=measure), float(levels[low])


_WORDS = {"macs": "multiply-adds", "parameters": "parameters"}


def limit_for(network: Network, layers: Sequence[Layer], keep: float, measure: Measure) -> float:
    """What `layers` may cost together when the whole network is to keep the share `keep` of its cost.

    Raises `BadInput`, with the smallest share that is reachable, when everything else alone costs more.
    """
    if not 0 < keep < 1:
        raise BadInput(f"keep is {keep}: give the share of the network's {_WORDS[measure]} that may remain, between 0 and 1")
    total = meter.macs(network) if measure == "macs" else meter.parameters(network)
    rest = total - sum(layer.cost(None, measure) for layer in layers)
    least = rest + sum(min(layer.cost(1, measure), layer.cost(None, measure)) for layer in layers)
    if keep * total < least:
        share = int(1000 * least / total + 1) / 1000
        raise BadInput(
            f"{keep:g} of the {_WORDS[measure]} cannot be reached: the {len(layers)} layers that can be cut at rank 1 leave {share:g}; give more"
        )
    return keep * total - rest


# --- what the inputs of layers look like, and what a cut does to the clock


def second_moments(network: Network, data: Dataset, layers: Sequence[Layer], *, batch_size: int = 32) -> dict[str, Tensor]:
    """{layer: mean of x x^T over all its inputs, float64 [n, n]} for `whitened`; a convolution's inputs are its patches. Padding tokens do not count.

    Layers in the spatial scheme, and those with more than 4,096 inputs, have none.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: list[Tensor | None] = [None]
    usable = [layer for layer in layers if layer.scheme == "channel" and int(np.prod(layer.shape[1:])) <= MOMENT_SIZE]
    hooks = []
    for each in usable:

        def note(layer: nn.Module, given: tuple[Any, ...], path: str = each.path) -> None:
            x = given[0].detach()
            if isinstance(layer, nn.Conv2d):
                if layer.padding_mode != "zeros":
                    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
                padding = layer.padding if layer.padding_mode == "zeros" else 0
                x = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2)  # type: ignore[arg-type]
            elif mask[0] is not None and mask[0].shape == x.shape[:2]:
                x = x[mask[0] > 0]
            x = x.reshape(-1, x.shape[-1]).float()
            sums[path] = sums.get(path, 0) + _wide(x.mT @ x)
            counts[path] = counts.get(path, 0) + len(x)

        hooks.append(layer_of(network.module, each.path).register_forward_pre_hook(note))
    device = runtime.device()
    batches = network_batches(network, data, batch_size=batch_size, label=False)
    try:
        with running(network, device), torch.inference_mode():
            for batch in runtime.track(batches.epoch(0), "inputs of layers", total=len(batches)):
                given = to_device(batch["inputs"], device)
                mask[0] = given.get("attention_mask") if isinstance(given, dict) else None
                network(given)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / counts[path] for path, total in sums.items()}


def milliseconds(network: Network, layers: Sequence[Layer], ranks: Mapping[str, int], *, seconds: float = 0.05) -> dict[str, tuple[float, float]]:
    """{layer: (whole, in two parts)}: median time of a layer's forward pass for one example on the network's device, each measured for `seconds`."""
    found = {}
    chosen = [layer for layer in layers if layer.path in ranks]
    calls = _calls(network, [layer.path for layer in chosen])
    with torch.inference_mode():
        for layer in chosen:
            whole = layer_of(network.module, layer.path)
            holder = nn.Sequential()
            holder.add_module("layer", whole)
            apply(holder, layer.edit(ranks[layer.path]) | {"layer": "layer"}, fill=False)
            parts = holder.get_submodule("layer")
            x = torch.zeros(calls[layer.path][0][0], device=network.device, dtype=next(whole.parameters()).dtype)
            x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x  # as networks are run
            timers = [Timer("f(x)", globals={"f": each, "x": x}, num_threads=torch.get_num_threads()) for each in (whole, parts)]
            once, twice = (1000 * timer.blocked_autorange(min_run_time=seconds).median for timer in timers)
            found[layer.path] = (once, twice)
    return found


# --- the cut


def cut(network: Network, layers: Sequence[Layer], ranks: Mapping[str, int]) -> Network:
    """A copy whose layers are factorised to `ranks`; the others stay. Parts keep their layer's `requires_grad`; hooks are lost, with a warning."""
    chosen = [layer for layer in layers if layer.path in ranks]
    small = network.edited(*[layer.edit(ranks[layer.path]) for layer in chosen])
    for layer in chosen:
        old: Any = layer_of(network.module, layer.path)
        parts: Any = layer_of(small.module, layer.path)
        for part in parts:
            part.weight.requires_grad_(old.weight.requires_grad)
        if old.bias is not None:
            parts[1].bias.requires_grad_(old.bias.requires_grad)
        if old._forward_hooks or old._forward_pre_hooks or old._backward_hooks:
            warnings.warn(f"layer {layer.path!r} had hooks, and its two parts have none: register them again", stacklevel=2)
    return small


def table(layers: Sequence[Layer], ranks: Mapping[str, int], original: Mapping[str, Spectrum] | None = None) -> list[dict[str, Any]]:
    """One row for each layer: rank, cost before and after and, from the spectra of the `original` weights, how much of them the rank holds."""
    rows = []
    for layer in layers:
        rank = ranks.get(layer.path)
        row: dict[str, Any] = {"layer": layer.path, "rank": rank if rank is not None else "whole", "of": layer.highest}
        row |= {"parameters": layer.parameters, "parameters after": layer.cost(rank, "parameters")}
        row |= {"multiply-adds": layer.macs, "multiply-adds after": layer.cost(rank)}
        if original:
            squares = original[layer.path].values ** 2
            lost = float(squares[rank:].sum() / squares.sum().clamp(min=1e-300)) if rank is not None else 0.0
            row |= {"relative error of the starting weights": lost**0.5}
        rows.append(row)
    return rows


def compared(before: Network, after: Network) -> tuple[list[dict[str, Any]], list[str]]:
    """What the meter says of both, as rows of a table, and a sentence for each batch size at which the smaller network is not the faster one."""
    rows = [meter.row("before", before), meter.row("after", after)]
    slow = [
        f"not faster here: a {name.removeprefix('ms, ').replace('batch', 'batch of')} takes {rows[1][name]:.2f} ms, before {rows[0][name]:.2f} ms"
        for name in rows[0]
        if name.startswith("ms") and rows[1][name] > 0.97 * rows[0][name]
    ]
    return rows, slow

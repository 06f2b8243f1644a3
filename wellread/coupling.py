"""Which channels of a network hang together, so that it can be made narrower: torch-pruning's dependency graph as groups of units.

A unit is a channel, or an attention head, with all that must go when it goes: a row here, columns there, an entry of each norm layer between.

    groups = channel_groups(network)
    smaller = network.edited(keep(network, {groups[0]: range(8)}))

A channel without weights is not silent: batch norm and activation make a constant of it. Cutting takes away that constant too; `masked` gives the
outputs of the cut network without cutting it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wellread import structure
from wellread.errors import BadInput, optional
from wellread.features import example_batch
from wellread.structure import layer_of, to_ranges

if TYPE_CHECKING:
    from wellread.network import Network

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ATTENTION_INPUTS = {"qkv", "q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj", "kv", "to_q", "to_k", "to_v", "in_proj", "c_attn"}
HEADS, HEAD_SIZES, WIDTHS = ("num_heads", "num_attention_heads"), ("head_dim", "attention_head_size"), ("attn_dim", "all_head_size")


@dataclass(frozen=True)
class Member:
    """The part of one layer in a group.

    path: of the layer, or of a parameter. side: "out" (rows, or the entries of a norm layer), "into" (columns) or "parameter" (along `dim`).
    channels: of each unit, its channels in this layer.
    """

    path: str
    side: str
    channels: tuple[tuple[int, ...], ...]
    dim: int = 0


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can only be cut together. name: the first layer that makes them. units: how many can be kept or cut one by one.

    heads: the units are attention heads. attributes: numbers in a layer that shrink with the units: {path: {name: amount of one unit}}.
    producers, consumers: the Linear and Conv layers whose rows make the channels, and whose columns read them.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    heads: bool = False
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    producers: tuple[Member, ...] = ()
    consumers: tuple[Member, ...] = ()
    norms_over: bool = False  # a layer norm lies between: it mixes the channels, so cutting one changes the others


def channel_groups(network: Network) -> list[Group]:
    """All groups whose units can be cut, in the order of the network's layers; its outputs are in none of them.

    Groups that torch-pruning finds but that do not survive a trial cut are left out (padded shortcuts, attention with bias tables).
    Raises `BadInput` naming the module that cannot be traced.
    """
    pruning = optional("torch_pruning", "compress")
    if structure.masks(network.module):
        raise BadInput("this network has masks: apply the edit 'densify' before its channels are cut")
    module = copy.deepcopy(network.module).float().requires_grad_(True)
    names: dict[Any, str] = {layer: name for name, layer in module.named_modules()}
    parameters = {id(parameter): name for name, parameter in module.named_parameters()}
    order = {name: place for place, name in enumerate([*names.values(), *parameters.values()])}
    inside: list[str] = []
    hidden: list[str] = []

    def entered(layer: nn.Module, _: Any) -> None:
        inside.append(names[layer])

    def left(layer: nn.Module, _: Any, out: Any) -> None:
        inside.pop()
        if isinstance(layer, (nn.Linear, *CONVOLUTIONS)) and not out.requires_grad:
            hidden.append(names[layer])

    for layer in module.modules():
        layer.register_forward_pre_hook(entered)
        layer.register_forward_hook(left)
    batch = example_batch(network)
    batch = batch.float() if isinstance(batch, Tensor) else batch

    def call(model: nn.Module, given: Any) -> Any:
        out = model(**given) if isinstance(given, Mapping) else model(given)
        return out.logits if hasattr(out, "logits") else out

    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # it tells which dimension of loose parameters it cuts
            graph = pruning.DependencyGraph().build_dependency(module, batch, forward_fn=call)
            found = list(graph.get_all_groups())
    except Exception as failed:
        where = f"the module {inside[-1]!r}" if inside and inside[-1] else "this network"
        why = (str(failed).strip().splitlines() or [type(failed).__name__])[0][:160]
        raise BadInput(f"{where} cannot be traced ({why}): write the edit keep_channels yourself, naming the layers that are cut together") from None
    if hidden:
        raise BadInput(f"the module {hidden[0]!r} cannot be traced (no gradient reaches it): take torch.no_grad() out of the forward")
    groups = [group for each in found if (group := _group(each, module, names, parameters, order, network.head))]
    return sorted(_sound(network, groups), key=lambda group: order[group.name])


def _group(found: Any, module: nn.Module, names: Mapping[Any, str], parameters: Mapping[int, str], order: Mapping[str, int], head: str | None) -> Group | None:
    """Our form of torch-pruning's group; None when it may not or cannot be cut."""
    items: list[tuple[str, str, int, dict[int, list[int]]]] = []
    norms_over = False
    for item in found:
        layer = item.dep.target.module
        by_root: dict[int, list[int]] = {}
        for root, index in zip(item.root_idxs, item.idxs, strict=True):
            by_root.setdefault(root, []).append(index)
        if type(layer).__name__ == "_OutputOp":
            return None
        if id(layer) in parameters:
            items.append((parameters[id(layer)], "parameter", item.dep.target.pruning_dim, by_root))
        if layer not in names:
            continue
        path, action = names[layer], item.dep.handler.__name__
        depthwise = isinstance(layer, CONVOLUTIONS) and layer.groups > 1
        uneven = depthwise and not layer.groups == layer.in_channels == layer.out_channels
        if uneven or (isinstance(layer, nn.GroupNorm) and layer.num_groups > 1):
            return None  # units would have to leave in equal numbers from every group
        if path == head and "in_channels" not in action:
            return None
        norms_over = norms_over or not isinstance(layer, (nn.Linear, nn.Embedding, nn.PReLU, nn.modules.batchnorm._BatchNorm, *CONVOLUTIONS))
        sides = ("out", "into") if depthwise else ("into",) if "in_channels" in action and isinstance(layer, (nn.Linear, *CONVOLUTIONS)) else ("out",)
        items += [(path, side, 0, by_root) for side in sides]
    roots = range(max(root for *_, by_root in items for root in by_root) + 1)
    unit_of: dict[int, int] = {root: root for root in roots}
    attributes: dict[str, dict[str, int]] = {}
    attention = next((path for path, side, *_ in items if side == "out" and path.rpartition(".")[2] in ATTENTION_INPUTS), None)
    if attention is not None:
        parent = layer_of(module, attention.rpartition(".")[0])
        heads, size = (next((getattr(parent, name) for name in known if isinstance(getattr(parent, name, None), int)), 0) for known in (HEADS, HEAD_SIZES))
        width, own = heads * size, [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]
        if not width or len(roots) not in (width, 3 * width) or own:
            return None  # grouped queries, bias tables: heads that are not all alike
        unit_of = {root: root % width // size for root in roots}
        shrink = dict.fromkeys(HEADS, 1) | dict.fromkeys(WIDTHS, size)
        attributes[attention.rpartition(".")[0]] = {name: each for name, each in shrink.items() if isinstance(getattr(parent, name, None), int)}
    units = max(unit_of.values()) + 1
    members = []
    for path, side, dim, by_root in items:
        channels: list[list[int]] = [[] for _ in range(units)]
        for root, indices in by_root.items():
            channels[unit_of[root]] += indices
        member = Member(path, side, tuple(tuple(sorted(each)) for each in channels), dim)
        if any(index >= _size(module, member) for each in channels for index in each):
            return None  # a padded shortcut: channels are added that no layer makes
        members.append(member)
    matrices = [each for each in members if each.side != "parameter" and isinstance(layer_of(module, each.path), (nn.Linear, *CONVOLUTIONS))]
    depthwise_paths = {each.path for each in matrices if getattr(layer_of(module, each.path), "groups", 1) > 1}
    ends = [each for each in matrices if each.path not in depthwise_paths]
    producers = sorted((each for each in ends if each.side == "out"), key=lambda each: order[each.path])
    consumers = sorted((each for each in ends if each.side == "into"), key=lambda each: order[each.path])
    if not producers or not consumers or units < 2:
        return None
    return Group(producers[0].path, units, tuple(members), attention is not None, attributes, tuple(producers), tuple(consumers), norms_over)


def _size(module: nn.Module, member: Member) -> int:
    """How many channels the layer has on this side."""
    if member.side == "parameter":
        where, _, name = member.path.rpartition(".")
        return getattr(layer_of(module, where), name).shape[member.dim]
    layer: Any = layer_of(module, member.path)
    if isinstance(layer, nn.Linear):
        return layer.in_features if member.side == "into" else layer.out_features
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels if member.side == "into" else layer.out_channels
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    tensors = [tensor for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)] if tensor.ndim]
    return tensors[0].shape[-1] if tensors else 0


def _sound(network: Network, groups: list[Group]) -> list[Group]:
    """The groups of which the network still runs, with the same form of output, after a unit of each is cut."""
    if not groups:
        return []
    try:
        with torch.inference_mode():
            trial = structure.apply(copy.deepcopy(network.module), keep(network, {group: range(1, group.units) for group in groups}))
            batch = example_batch(network)
            trial(**batch) if isinstance(batch, Mapping) else trial(batch)
        return groups
    except (RuntimeError, ValueError, TypeError, IndexError):  # BadInput is a ValueError
        half = len(groups) // 2
        return _sound(network, groups[:half]) + _sound(network, groups[half:]) if half else []


def keep(network: Network, kept: Mapping[Group, Iterable[int]]) -> dict[str, Any]:
    """The edit record that keeps these units of each group. Raises `BadInput` for a unit that the group has not, and for none at all."""
    removed: dict[Member, set[int]] = {}  # by layer and side: two groups may end in one layer (concatenation)
    attributes: dict[str, dict[str, int]] = {}
    for group, units in kept.items():
        chosen = set(units)
        if not chosen or not chosen <= set(range(group.units)):
            raise BadInput(f"units {sorted(chosen)} cannot be kept of {group.name!r}: give at least one of 0 to {group.units - 1}")
        for member in group.members:
            place = Member(member.path, member.side, (), member.dim)
            gone = {index for unit, indices in enumerate(member.channels) if unit not in chosen for index in indices}
            removed[place] = removed.get(place, set()) | gone
        for path, amounts in group.attributes.items():
            attributes[path] = {name: each * len(chosen) for name, each in amounts.items()}
    record: dict[str, Any] = {"edit": "keep_channels"}
    for place, gone in removed.items():
        if gone:
            ranges = to_ranges(index for index in range(_size(network.module, place)) if index not in gone)
            value = {"dim": place.dim, "keep": ranges} if place.side == "parameter" else ranges
            record.setdefault("parameters" if place.side == "parameter" else place.side, {})[place.path] = value
    return record | ({"attributes": attributes} if attributes else {})


@contextmanager
def masked(module: nn.Module, kept: Mapping[Group, Iterable[int]]) -> Iterator[None]:
    """Inside the body `module` computes what it would after `keep`: the layers that read a removed unit get zeros there.

    Exact unless a layer norm lies between (`Group.norms_over`), which would divide by the spread of fewer channels.
    """
    hooks = []
    gone: dict[str, list[int]] = {}
    for group, units in kept.items():
        chosen = set(units)
        for member in group.consumers:
            gone.setdefault(member.path, []).extend(i for unit, indices in enumerate(member.channels) if unit not in chosen for i in indices)
    for path, channels in gone.items():
        layer = layer_of(module, path)
        dim = -1 if isinstance(layer, nn.Linear) else 1

        def silence(_: nn.Module, given: tuple[Any, ...], channels: list[int] = channels, dim: int = dim) -> tuple[Any, ...]:
            return (given[0].index_fill(dim, torch.tensor(channels, dtype=torch.long, device=given[0].device), 0.0), *given[1:])

        if channels:
            hooks.append(layer.register_forward_pre_hook(silence))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""The weights of several networks of one structure, read tensor by tensor: what may be averaged, and averages that hold two tensors at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wellread.errors import BadInput
from wellread.network import CONFIG, Network, Networks


def running_mean(mean: Tensor, new: Tensor, before: float, weight: float = 1.0, *, out: Tensor | None = None) -> Tensor:
    """Mean of what had the total weight `before` and of `new`, which has `weight`. Tensors of one shape; the dtype of `mean`, float32 or float64.

    One step of algorithm 1: mean * m / (m + 1) + new / (m + 1) with `before` = m. Equal tensors give themselves to the bit, for any m.
    """
    return torch.lerp(mean, new.to(mean), weight / (before + weight) if weight else 0.0, out=out)


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], amount: float) -> dict[str, Tensor]:
    """(1 - amount) * first + amount * second, two states of one network; at 0 and 1 the end points to the bit. Whole numbers are those of `first`."""
    mixed = {}
    for name, start in first.items():
        wide = torch.promote_types(start.dtype, torch.float32) if start.is_floating_point() else start.dtype
        mixed[name] = running_mean(start.to(wide), second[name], 1 - amount, amount).to(start.dtype) if start.is_floating_point() else start.clone()
    return mixed


def fill(module: nn.Module, networks: Networks, members: Sequence[int], shares: Mapping[str, Sequence[float]] | None = None) -> None:
    """Put the average of the `members` (numbers in `networks`) into `module`, in place.

    shares: {tensor: one weight for each member}, for tensors that are not weighted equally. Summed in float32, in float64 for more than 50
    members, then cast back; whole numbers and truth values are those of the first member; tied tensors are averaged once and stay tied.
    Beside `module` two tensors are in memory at a time, whatever the number of members.
    """
    targets = state_of(module)
    wide = torch.float64 if len(members) > 50 else torch.float32
    first_name = {id(target): name for name, target in reversed(targets.items())}
    streams = [networks.weights(member) for member in members]
    with torch.no_grad():
        for _ in range(len(targets)):
            mean = torch.empty(0)
            for count, stream in enumerate(streams):
                key, new = next(stream)
                name = plain_name(key, targets)
                weights = (shares or {}).get(name, [1.0] * len(members))
                if count == 0:
                    mean = new.to(wide, copy=True) if new.is_floating_point() else new
                elif new.is_floating_point():
                    running_mean(mean, new, sum(weights[:count]), weights[count], out=mean)
            if first_name[id(targets[name])] == name:
                targets[name].copy_(mean)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, not copies, under the names that they have without torch.compile."""
    found = module.state_dict(keep_vars=True)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def plain_name(key: str, known: Mapping[str, Any]) -> str:
    """`key` without what torch.compile and DataParallel put before it."""
    key = key.replace("_orig_mod.", "")
    return key if key in known else key.removeprefix("module.")


def readable(networks: Networks, folder: str) -> Networks:
    """Networks that can be read tensor by tensor: those of other formats than ours are written into `folder`."""
    ours = [isinstance(each, Network) or (Path(each) / CONFIG).is_file() for each in networks.given]
    return Networks([each if ours[i] else networks[i].save(Path(folder) / str(i)) for i, each in enumerate(networks.given)])


def plain_copy(network: Network) -> Network:
    """An independent copy, out of torch.compile and DataParallel."""
    module: Any = network.module
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if hasattr(module, "module") else module._orig_mod
    if module is network.module:
        return network.copy()
    return Network(module, network.input, None, network.labels, network.output, lineage=network.lineage).copy()


def same_structure(networks: Networks, module: nn.Module, names: Sequence[str]) -> list[dict[str, Any]]:
    """Read every network once; the record of each. Raises `BadInput` when they cannot be averaged into `module`, which holds the first.

    Named are the networks and what differs (architecture, edits, output, labels, input) or the first tensor that is missing, of another shape
    or dtype, not finite, or of whole numbers that differ (quantised weights; the counters of batch norm may differ).
    """
    known = state_of(module)
    records: list[dict[str, Any]] = []
    for i in range(len(networks)):
        who, pair = names[i], f"{names[i]} and {names[0]} cannot be averaged"
        records.append(networks.record(i))
        for part in ("architecture", "edits", "output", "labels", "input"):
            mine, theirs = (json.dumps(_comparable(record[part]), sort_keys=True) for record in (records[i], records[0]))
            if mine != theirs and "null" not in (mine, theirs):  # null: not known
                raise BadInput(f"{pair}, their {part} differ ({mine[:60]}, {theirs[:60]}): give fine-tunings of one network")
        missing = set(known)
        for key, tensor in networks.weights(i, verify=True):
            name = plain_name(key, known)
            missing.discard(name)
            if re.search(r"(^|[._])lora[._]?(a|b|up|down|embedding)", name, re.IGNORECASE):
                raise BadInput(f"{who} has an adapter beside its weights ({name!r}), whose factors must not be averaged: merge it into them first")
            if name not in known or _kind(tensor) != _kind(known[name]):
                theirs = _kind(known[name]) if name in known else "missing"
                raise BadInput(f"{pair}, their tensors {name!r} differ ({_kind(tensor)}, {theirs}): give fine-tunings of one network")
            if tensor.is_floating_point():
                if not tensor.sum().isfinite() and not tensor.isfinite().all():  # the sum needs no second tensor
                    raise BadInput(f"{who} is damaged, its tensor {name!r} holds values that are not finite: leave it out")
            elif not name.endswith("num_batches_tracked") and not torch.equal(tensor.to(known[name].device), known[name]):
                raise BadInput(f"{pair}, the whole numbers in their tensors {name!r} differ: give fine-tunings that are not quantised")
        if missing:
            name = min(missing)
            raise BadInput(f"{pair}, their tensors {name!r} differ (missing, {_kind(known[name])}): give fine-tunings of one network")
    return records


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _comparable(part: Any) -> Any:
    """Without what a sweep may change (dropout rates) and what is only a note."""
    if isinstance(part, Mapping):
        return {key: _comparable(value) for key, value in part.items() if "drop" not in key and not key.startswith(("_", "transformers_version"))}
    return part

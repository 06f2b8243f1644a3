"""Pruning by explaining: cut the filters that carry the least relevance for a few examples (Yeom et al. 2021, arXiv 1912.08881)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import meter, runtime
from wellread.batches import Batches, network_batches
from wellread.charts import line_chart
from wellread.coupling import Group, channel_groups, keep
from wellread.data import Labelled, class_names, labels, name_of, subset
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.features import capture, running, to_device
from wellread.method import method
from wellread.network import Network
from wellread.relevance import Rules
from wellread.results import Report
from wellread.structure import layer_of
from wellread.train import fit

Criterion = Literal["lrp", "taylor", "taylor_after", "gradient", "weight", "random"]

# --- scores of units


def unit_scores(network: Network, groups: list[Group], batches: Batches, columns: Tensor, criterion: Criterion = "lrp") -> dict[Group, Tensor]:
    """{group: float32 [units]}: what each unit is worth for the examples; the smallest is cut first.

    batches: {"inputs", "label"}, in evaluation mode; neither their size nor their order matters. columns: int64 [K], the output of each class.
    lrp: sum over examples and places of |relevance| of the true class's output, where the unit's channels are read (equations 1 and 2), divided by
    the number of examples. taylor: |mean of output x gradient| and gradient: |mean gradient|, of the cross-entropy, at the layers that make the unit, as
    the authors have it; taylor_after: where its channels are read. weight: the sum of |w| of the rows that make the unit. These four are divided by the
    norm of the group (L1 for weight, else L2). random: noise.
    """
    if criterion == "random":
        return {group: torch.rand(group.units) for group in groups}
    if criterion == "weight":
        return {group: _magnitudes(network.module, group) for group in groups}
    totals = {group: torch.zeros(group.units) for group in groups}
    copy, device = network.copy(), runtime.device()
    copy.module.float().requires_grad_(False)
    rows = 0
    with running(copy, device):
        for batch in batches.epoch(0):
            targets = batch["label"].to(device)
            rows += len(targets)
            for group, value in _of_batch(copy, groups, to_device(batch["inputs"], device), targets, columns.to(device), criterion).items():
                totals[group] += value.cpu()
    if criterion == "lrp":
        return {group: value / rows for group, value in totals.items()}
    return {group: value.abs() / value.norm().clamp(min=1e-12) for group, value in totals.items()}


def _of_batch(network: Network, groups: list[Group], inputs: Any, targets: Tensor, columns: Tensor, criterion: str) -> dict[Group, Tensor]:
    """Sums over one batch: of |relevance|, or signed of gradient (x activation) averaged over places."""
    made = criterion in ("taylor", "gradient")
    places = {group: group.producers if made else group.consumers for group in groups}
    paths = list(dict.fromkeys(member.path for members in places.values() for member in members))
    rules = Rules() if criterion == "lrp" else None
    with capture(network.module, paths, inputs=not made) as caught:
        with torch.enable_grad(), rules or nullcontext(), _with_gradient(network.module, inputs) as given:
            logits = network(given)
        if criterion == "lrp":
            of, start = logits, F.one_hot(columns[targets], logits.shape[1]).to(logits.dtype)
        else:
            of, start = F.cross_entropy(logits[:, columns], targets, reduction="sum"), None
        back = dict(zip(paths, torch.autograd.grad(of, [caught[path] for path in paths], start, allow_unused=True), strict=True))
    if rules is not None:
        rules.release()
    found = {}
    for group, members in places.items():
        total = torch.zeros(group.units, device=targets.device)
        seen: set[int] = set()
        for member in members:
            tensor, value = caught[member.path], back[member.path]
            if value is None or id(tensor) in seen:
                continue  # behind a gate, which counts as constant; or two layers read one tensor, whose gradient is that of both
            seen.add(id(tensor))
            value = value.abs() if criterion == "lrp" else value if criterion == "gradient" else value * tensor.detach()
            value = value.movedim(-1 if isinstance(layer_of(network.module, member.path), nn.Linear) else 1, 1).flatten(2 if value.ndim > 2 else 1)
            if value.ndim > 2:
                value = value.sum(2) if criterion == "lrp" else value.mean(2)
            total += _by_unit(value.sum(0), member.channels)
        found[group] = total
    return found


def _magnitudes(module: nn.Module, group: Group) -> Tensor:
    total = torch.zeros(group.units)
    for member in group.producers:
        weight: Any = layer_of(module, member.path).weight
        total += _by_unit(weight.detach().float().abs().flatten(1).sum(1), member.channels).cpu()
    return total / total.sum().clamp(min=1e-12)


@contextmanager
def _with_gradient(module: nn.Module, inputs: Any) -> Iterator[Any]:
    """Pictures that ask for a gradient; for tokens, embeddings that do."""
    if isinstance(inputs, Tensor):
        yield inputs.float().requires_grad_()
        return
    embeddings = [layer for layer in module.modules() if isinstance(layer, nn.Embedding)]
    hooks = [layer.register_forward_hook(lambda _, __, out: out.requires_grad_()) for layer in embeddings]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _by_unit(values: Tensor, channels: tuple[tuple[int, ...], ...]) -> Tensor:
    """[units] sums of a value per channel [C]."""
    unit = torch.full((len(values),), -1, dtype=torch.long)
    for number, indices in enumerate(channels):
        unit[list(indices)] = number
    inside = unit >= 0  # beside it may lie channels of another group
    return torch.zeros(len(channels), device=values.device).index_add_(0, unit[inside].to(values.device), values[inside.to(values.device)].float())


def least(scores: Mapping[Group, Tensor], count: int, floors: Mapping[Group, int]) -> dict[Group, list[int]]:
    """The units that stay when the `count` with the smallest scores [units] over all groups go, of no group more than leaves it its floor."""
    groups = list(scores)
    order = sorted((value, place, unit) for place, group in enumerate(groups) for unit, value in enumerate(scores[group].tolist()))
    kept = {group: set(range(group.units)) for group in groups}
    for _, place, unit in order:
        if count > 0 and len(kept[groups[place]]) > floors[groups[place]]:
            kept[groups[place]].discard(unit)
            count -= 1
    return {group: sorted(units) for group, units in kept.items()}


# --- the method


@method
def pruning_by_explaining(
    network: Network,
    reference: Labelled,
    validation: Labelled | None = None,
    *,
    remove: float = 0.3,
    of: Literal["units", "parameters", "macs"] = "units",
    step: float = 0.05,
    criterion: Literal["lrp", "taylor", "taylor_after", "gradient", "weight", "random"] = "lrp",
    samples_per_class: int = 10,
    at_least: int = 4,
    epochs: int = 0,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
) -> Network:
    """A smaller classifier for my task, from ten labelled examples of each class and without training.

    network: a classifier that torch-pruning can trace. Its outputs all stay, also those of classes that reference does not have.
    reference: a few labelled examples; its classes are the network's or, by name, some of them: filters that only others need go first.
    validation: on which accuracy is followed; by default on the reference, which is optimistic.
    remove: how much to remove, as a share of what `of` says.
    of: units (channels of convolutions and hidden layers, attention heads), parameters or macs (multiply-accumulates).
    step: share of all units that go between two looks at the network.
    criterion: lrp (relevance, the paper), or what it is compared with: taylor (output x gradient), taylor_after (the same behind norm and
        activation), gradient, weight (magnitude), random.
    samples_per_class: how many examples of each class are looked at.
    at_least: units that every group of channels keeps (one for groups of heads).
    epochs: of training on reference after each step; 0 is none, the paper's case of few data.
    learning_rate: of that training.
    batch_size: examples at a time; changes no score.
    seed: of the choice of examples, of random scores and of training.

    Channels that are joined by additions, depthwise convolutions or gates go together. Groups across layer norms, such as the width of a ViT, are not
    cut. The report "pruning" holds the curve: share removed, parameters, MACs and accuracy after each step, and how many units each layer has left.
    Raises `BadInput` when a class has no example, when so much cannot be removed (with the most that can be), and for a network that cannot be traced or,
    for lrp, has a step without a rule.
    Source: arXiv 1912.08881; rules from zennit.
    """
    for name, value, fits in (("remove", remove, 0 <= remove < 1), ("step", step, 0 < step <= 1), ("samples_per_class", samples_per_class, samples_per_class > 0),
                              ("at_least", at_least, at_least > 0), ("epochs", epochs, epochs >= 0), ("batch_size", batch_size, batch_size > 0)):  # fmt: skip
        if not fits:
            raise BadInput(f"{name} is {value}: give {'0 to below 1' if name == 'remove' else 'above 0 to 1' if name == 'step' else 'a larger number'}")
    columns = _columns(network, reference)
    judged = reference if validation is None else validation
    if class_names(judged) != class_names(reference):
        raise BadInput("reference and validation have different classes: give tables with the same ones")
    chosen = _examples(reference, samples_per_class, seed)
    batches = network_batches(network, chosen, batch_size=batch_size)

    first = _prunable(network)
    if not first:
        raise BadInput("this network has no channels that can be cut: name them yourself in an edit keep_channels")
    total = sum(group.units for group in first)
    kept = {group.name: list(range(group.units)) for group in first}
    size = meter.macs if of == "macs" else meter.parameters
    full = size(network)

    def removed(made: Network, units: int) -> float:
        return 1 - units / total if of == "units" else 1 - size(made) / full

    floors = {group: range(_floor(group, at_least)) for group in first}
    most = removed(network.edited(keep(network, floors)), sum(map(len, floors.values())))
    if remove > most:
        raise BadInput(f"{remove:.1%} of the {of} cannot be removed: at most {most:.1%} can while every group keeps {at_least} (lower at_least for more)")

    current, count = network.copy(), max(1, round(step * total))
    curve = [_row(current, judged, columns, 0.0)]
    for _ in runtime.track(range(-(-total // count)), "pruning steps at most"):
        units = sum(map(len, kept.values()))
        wanted = min(count, units - round((1 - remove) * total)) if of == "units" else count
        if wanted <= 0 or removed(current, units) >= remove:
            break
        groups = _prunable(current)
        scores = unit_scores(current, groups, batches, columns, criterion)
        stay = least(scores, wanted, {group: _floor(group, at_least) for group in groups})
        current = current.edited(keep(current, stay))
        kept |= {group.name: [kept[group.name][unit] for unit in units] for group, units in stay.items()}
        if epochs:
            _tune(current, reference, columns, epochs, learning_rate, batch_size, seed)
        curve.append(_row(current, judged, columns, 1 - sum(map(len, kept.values())) / total))
    if len(curve) == 1:
        made = network.copy()
    else:  # all steps as one edit
        made = network.edited(keep(network, {group: kept[group.name] for group in first})).with_weights(current.module.state_dict())
    made.reports["pruning"] = _report(first, kept, curve, judged, validation is not None, criterion)
    if validation is not None:
        made.measured = [{"data": name_of(validation), "rows": len(validation), "metrics": {"accuracy": curve[-1]["accuracy"]}}]
    return made


def _prunable(network: Network) -> list[Group]:
    """Not across layer norms: there a unit that goes changes all that stay."""
    return [group for group in channel_groups(network) if not group.norms_over]


def _floor(group: Group, at_least: int) -> int:
    return 1 if group.heads else min(group.units, at_least)


def _columns(network: Network, data: Dataset) -> Tensor:
    """The output of each class of the data: int64 [K]."""
    names, known = class_names(data), network.labels
    if network.output != "logits":
        raise BadInput(f"a classifier is needed, and this network gives {network.output.replace('_', ' ')}: train a head first (transfer)")
    if known is None:
        return torch.arange(len(names))
    if missing := [name for name in names if name not in known]:
        raise BadInput(f"reference has the class {missing[0]!r} and the network {', '.join(known[:6])}: its classes must be among the network's")
    return torch.tensor([known.index(name) for name in names])


def _examples(data: Dataset, each: int, seed: int) -> Dataset:
    """So many examples of every class, at random."""
    truth, random = labels(data), np.random.default_rng(seed)
    rows = [random.permutation(np.flatnonzero(truth == number))[:each] for number in range(len(class_names(data)))]
    if empty := [name for name, found in zip(class_names(data), rows, strict=True) if not len(found)]:
        raise BadInput(f"reference has no example of the class {empty[0]!r}: give at least one of each class")
    return subset(data, np.sort(np.concatenate(rows)))


def _row(network: Network, data: Dataset, columns: Tensor, gone: float) -> dict[str, Any]:
    with runtime.using(progress=False):
        logits = predict(network, data)
    if logits.shape[1] <= int(columns.max()):
        raise BadInput(f"the network has {logits.shape[1]} outputs and reference {len(columns)} classes: give data of the network's classes")
    accuracy = float((logits[:, columns.numpy()].argmax(1) == labels(data)).mean())
    return {"units removed, %": 100 * gone, "parameters": meter.parameters(network), "MACs": meter.macs(network), "accuracy": accuracy}


def _tune(network: Network, data: Dataset, columns: Tensor, epochs: int, learning_rate: float, batch_size: int, seed: int) -> None:
    """Plain SGD on the classes of the data, in place."""

    def step(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(module(batch["inputs"])[:, columns.to(batch["label"].device)], batch["label"])

    batches = network_batches(network, data, batch_size=batch_size, shuffle=True, seed=seed)
    fit(network.module, batches, step, epochs=epochs, learning_rate=learning_rate, optimizer="sgd", momentum=0.9, weight_decay=5e-4, seed=seed)
    network.module.eval()


def _report(groups: list[Group], kept: Mapping[str, list[int]], curve: list[dict[str, Any]], judged: Dataset, separate: bool, criterion: str) -> Report:
    start, end = curve[0], curve[-1]
    layers = [{"layer": g.name, "units": "heads" if g.heads else "channels", "before": g.units, "kept": len(kept[g.name])} for g in groups]
    figures = {
        "accuracy before": start["accuracy"], "accuracy after": end["accuracy"], "units removed, %": end["units removed, %"],
        "parameters left, %": 100 * end["parameters"] / start["parameters"], "MACs left, %": 100 * end["MACs"] / start["MACs"],
    }  # fmt: skip
    picture = line_chart({criterion: [row["accuracy"] for row in curve]}, at=[row["units removed, %"] for row in curve], x="units removed, %", y="accuracy")
    return Report(
        f"pruning by {criterion}",
        figures,
        tables={"curve": curve, "layers": layers},
        text=f"Accuracy is on {name_of(judged)}" + (", which chose nothing." if separate else ", whose examples chose the units: report figures on other data."),
        pictures={"accuracy": picture},
    )

"""PELA: a low-rank copy of a pre-trained transformer that can be fine-tuned like the original (Guo et al. 2024, arXiv 2310.10700)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellread import ranks, runtime
from wellread.batches import network_batches
from wellread.charts import line_chart
from wellread.data import Unlabelled, name_of, subset
from wellread.errors import BadInput
from wellread.features import capture, probe, running, to_device, trunk
from wellread.method import method
from wellread.network import Network
from wellread.ranks import Layer
from wellread.results import Report
from wellread.structure import layer_of
from wellread.train import fit

ALONE = ("head", "heads", "classifier", "norm", "patch_embed", "downsample", "cls", "pooler")  # left whole when nothing else is asked for
SMALLEST = 10  # outputs; a layer with fewer is a head
ROWS = 512  # enough to see what goes into the layers, and how far features are off
SHARE = 4  # one in so many layers is held near its original in each step: all of them would cost as much as a forward pass


def ratio_rank(layer: Layer, ratio: float) -> int:
    """The largest rank at which the two layers hold at most 1 / ratio of the parameters of the one; 0 for a layer too small."""
    return int(layer.parameters / (ratio * layer.parameters_per_rank))


def blocks(network: Network) -> list[str]:
    """The repeated blocks of a transformer, in order: those whose output is tokens [B, T, C] or a map [B, h, w, C]."""
    names = [name for name in trunk(network.module) if name.rpartition(".")[2].isdigit()]
    found = probe(network, names)
    return [name for name in names if name in found and found[name].ndim >= 3]


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """Mean over blocks of the mean squared difference of their outputs [B, T, C] or [B, h, w, C]; of the tokens in `mask` [B, T], where given."""
    terms = []
    for name, target in teacher.items():
        squares = (student[name] - target).float() ** 2
        if mask is not None and mask.shape == squares.shape[:2]:
            terms.append((squares * mask.unsqueeze(-1)).sum() / (mask.sum() * squares.shape[-1]))
        else:
            terms.append(squares.mean())
    return torch.stack(terms).mean()


def perturbation_loss(pairs: Sequence[tuple[nn.Module, Tensor]], epsilon: float = 1e-3, hinge: bool = False) -> Tensor:
    """Mean over layers of (max |R L - W| - epsilon)^2: how far the largest entry of a weight [o, i] has moved.

    pairs: the two layers (L, then R) as a Sequential, and the original weight W. Two-sided, as the authors compute it: below epsilon it pushes away;
    with `hinge` it is max(0, max |R L - W| - epsilon)^2. Its gradient touches one row of R and one column of L.
    """
    terms = []
    for parts, weight in pairs:
        first, second = (part.weight for part in parts)  # type: ignore[attr-defined]
        moved = (second @ first - weight).abs().max() - epsilon
        terms.append((moved.clamp(min=0) if hinge else moved) ** 2)
    return torch.stack(terms).mean()


def features_of(network: Network, names: Sequence[str], inputs: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of the blocks, [B, T, C] each or as they are, and of the network, [B, d]; inputs as the network takes them."""
    with capture(network.module, names) as caught:
        out = network(inputs)
    return {name: caught[name] for name in names}, out


def token_mask(inputs: Any) -> Tensor | None:
    """[B, T], 1 for words and 0 for padding; None for pictures."""
    return inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


def feature_error(student: Network, teacher: Network, data: Unlabelled, names: Sequence[str], *, batch_size: int = 32) -> float:
    """`feature_loss` over a table, both networks in evaluation mode."""
    device = runtime.device()
    total = 0.0
    with running(student, device), running(teacher, device), torch.inference_mode(), runtime.autocast(device):
        for batch in network_batches(teacher, data, batch_size=batch_size, label=False).epoch(0):
            inputs = to_device(batch["inputs"], device)
            mine, theirs = (features_of(each, names, inputs)[0] for each in (student, teacher))
            total += len(batch["index"]) * float(feature_loss(mine, theirs, token_mask(inputs)))
    return total / len(data)


def low_rank_start(
    network: Network, layers: Sequence[Layer], chosen: Mapping[str, int], data: Unlabelled | None = None, *, batch_size: int = 32
) -> Network:
    """A copy with the layers cut to the ranks `chosen`, by truncated SVD or, with `data`, so that their outputs on these change least."""
    if data is None:
        return ranks.cut(network, layers, chosen)
    nearest = network.copy()
    for path, moment in ranks.second_moments(network, data, [layer for layer in layers if layer.path in chosen], batch_size=batch_size).items():
        weight: Any = layer_of(nearest.module, path).weight
        weight.data.copy_(ranks.whitened(weight.detach(), chosen[path], moment))
    return ranks.cut(nearest, layers, chosen)


def distil(
    student: Network,
    teacher: Network,
    data: Unlabelled,
    layers: Sequence[Layer],
    *,
    epochs: int = 2,
    learning_rate: float = 5e-4,
    batch_size: int = 32,
    features: float = 1.0,
    outputs: float = 0.0,
    perturbation: float = 1.0,
    epsilon: float = 1e-3,
    hinge: bool = False,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Train the student, in place, to compute what the teacher does; the teacher is only read. layers: those that the student has in two parts.

    Returns the terms of the loss at each step. One forward pass of the student gives its features and its outputs.
    """
    names = blocks(teacher)

    def step(_: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float | Tensor]]:
        inputs = batch["inputs"]
        with torch.no_grad():
            targets, wanted = features_of(teacher, names, inputs)
        found, out = features_of(student, names, inputs)
        terms = {"features": feature_loss(found, targets, token_mask(inputs)), "outputs": F.mse_loss(out.float(), wanted.float())}
        loss = features * terms["features"] + (outputs * terms["outputs"] if outputs else 0.0)
        if perturbation:
            drawn = torch.randperm(len(layers))[: -(-len(layers) // SHARE)].tolist()
            pairs = [(layer_of(student.module, path), teacher_weights[path]) for path in (layers[i].path for i in drawn)]
            terms["perturbation"] = perturbation_loss(pairs, epsilon, hinge)
            loss = loss + perturbation * terms["perturbation"]
        return loss, dict(terms)

    batches = network_batches(student, data, batch_size=batch_size, shuffle=True, seed=seed, label=False)
    options: dict[str, Any] = {"weight_decay": 0.02, "warmup": 0.1, "seed": seed, "name": "distilling features"}
    with running(teacher, runtime.device()):
        originals: dict[str, Any] = {layer.path: layer_of(teacher.module, layer.path).weight for layer in layers}
        teacher_weights = {path: weight.detach() for path, weight in originals.items()}
        history = fit(student.module, batches, step, epochs=epochs, learning_rate=learning_rate, **options)
    student.module.eval()
    return history.logs


@method
def pela(
    network: Network,
    data: Unlabelled,
    held_out: Unlabelled | None = None,
    *,
    ratio: float = 2.0,
    keep: float | None = None,
    leave_out: list[str] | None = None,
    start: Literal["svd", "whitened"] = "svd",
    epochs: int = 2,
    learning_rate: float = 5e-4,
    batch_size: int = 32,
    features: float = 1.0,
    outputs: float = 0.0,
    perturbation: float = 1.0,
    epsilon: float = 1e-3,
    hinge: bool = False,
    seed: int = 0,
) -> Network:
    """A pre-trained transformer at a half or a third of its size, to be used and fine-tuned as if it were the original.

    network: the original, which is only read; any network of repeated blocks with Linear layers.
    data: examples of the kind it will meet, for a short training; labels are not read.
    held_out: examples on which the report measures how far its features are from the original's; by default some of `data`.
    ratio: what the parameters of each of these layers are divided by, above 1.
    keep: instead of `ratio`, the share of the whole network's parameters that may remain; the layers then get ranks by one common energy.
    leave_out: names of layers, or of blocks that hold them, that stay whole; by default head, classifier, norm, patch_embed, downsample, cls, pooler.
    start: svd cuts the weights as they are; whitened cuts them so that their outputs on `data` change least.
    epochs: of training against the original's features; 0 cuts only.
    learning_rate, batch_size: of AdamW with weight decay 0.02, a warm-up of a tenth of the steps, and a cosine schedule.
    features, outputs: weights of the mean squared error of the blocks' outputs, and of the network's.
    perturbation: weight of the term that holds the largest change of a weight near `epsilon`; a quarter of the layers, drawn anew, in each step.
    epsilon: the change of a weight's entry that is aimed at.
    hinge: count only changes above epsilon; no: below it they are pushed up to it, as in the authors' code.
    seed: of the order of the examples and the draws.

    The report "pela" has the ranks, what was left whole and why, parameters, multiply-adds and milliseconds before and after, the error of
    the features before and after training, and says so when the result is not faster. All padding tokens are left out of all errors.
    Raises BadInput for a network without such layers or blocks, names that match nothing, a ratio of at most 1, a share that cannot be
    reached (with the smallest that can), and adapters that are not merged.
    Source: Guo et al. 2024, arXiv 2310.10700.
    """
    weights = (features, outputs, perturbation, epsilon)
    for right, sentence in (
        (keep is not None or ratio > 1, f"ratio is {ratio}: give what the layers' parameters are divided by, above 1"),
        (epochs >= 0, f"epochs is {epochs}: give at least 0"),
        (min(weights) >= 0, "features, outputs, perturbation and epsilon must be at least 0"),
        (epochs == 0 or features > 0 or outputs > 0, "features and outputs are both 0, so there is nothing to learn from: raise one of them"),
    ):
        if not right:
            raise BadInput(sentence)
    if adapter := next((name for name, _ in network.module.named_modules() if name.endswith("lora_A")), None):
        raise BadInput(f"the network has adapters that are not merged ({adapter}): merge them into its weights first")
    paths = [path for path, _ in network.module.named_modules()]
    alone = leave_out if leave_out is not None else [name for name in ALONE if any(ranks.is_named(path, name) for path in paths)]
    layers, left = ranks.find_layers(network, which="linear", leave_out=alone, smallest=SMALLEST)
    if keep is None:
        chosen = {layer.path: rank for layer in layers if (rank := ratio_rank(layer, ratio)) >= 1}
        left |= {layer.path: f"too small to be divided by {ratio:g}" for layer in layers if layer.path not in chosen}
    else:
        limit = ranks.limit_for(network, layers, keep, "parameters") if layers else 0.0
        found = ranks.spectra({layer.path: layer_of(network.module, layer.path).weight for layer in layers})  # type: ignore[misc]
        chosen, _ = ranks.ranks_for_budget(layers, {path: each.values for path, each in found.items()}, limit, measure="parameters")
    if not chosen:
        raise BadInput("no Linear layer of this network can be cut: take trained-rank-pruning for convolutions; else change ratio or leave_out")
    names = blocks(network)
    if not names:
        raise BadInput("this network has no repeated blocks of tokens whose features could be compared: take trained-rank-pruning")
    layers = [layer for layer in layers if layer.path in chosen]

    sample = subset(data, np.sort(np.random.default_rng(seed).permutation(len(data))[:ROWS]))
    judged = sample if held_out is None else held_out
    student = low_rank_start(network, layers, chosen, sample if start == "whitened" else None, batch_size=batch_size)
    error = feature_error(student, network, judged, names, batch_size=batch_size)
    figures = {"feature error after the cut": error}
    logs: dict[str, list[float]] = {}
    if epochs:
        options: dict[str, Any] = {"epsilon": epsilon, "hinge": hinge, "seed": seed, "batch_size": batch_size, "learning_rate": learning_rate}
        logs = distil(student, network, data, layers, epochs=epochs, features=features, outputs=outputs, perturbation=perturbation, **options)
        figures["feature error after training"] = feature_error(student, network, judged, names, batch_size=batch_size)
    timed, warned = ranks.compared(network, student)
    whole = sum(layer.cost(None, "parameters") for layer in layers)
    parts = sum(layer.cost(chosen[layer.path], "parameters") for layer in layers)
    student.reports["pela"] = Report(
        f"{len(layers)} layers at {parts / whole:.0%} of their parameters",
        {
            "parameters of the cut layers": parts / whole,
            "parameters of the network": timed[1]["parameters, M"] / timed[0]["parameters, M"],
            "multiply-adds": timed[1]["MACs, M"] / timed[0]["MACs, M"],
            **figures,
        },
        tables={
            "cost": timed,
            "layers": ranks.table(layers, chosen),
            "left out": [{"layer": path, "because": reason} for path, reason in left.items()],
        },
        text="Parameters and multiply-adds are shares of what they were. "
        f"Features are the outputs of {len(names)} blocks, their error is measured on {name_of(judged)}.",
        pictures={"features": line_chart({"feature error of the batch": logs["features"]}, x="step", y="mean squared error")} if logs else {},
        warnings=warned,
    )
    return student

"""Nearest mean classifier on frozen features: new classes at any time, nothing retrained, nothing forgotten (Janson et al. 2022, arXiv 2210.04428).

All that is kept of the data are sums: of the features of each class, their number, and for two of the rules one matrix of second moments.
Sums do not depend on the order in which examples come, can be added to those of another site, and (those of a class) taken away again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from wellread.data import Needs, class_names
from wellread.data import labels as label_numbers
from wellread.errors import BadInput
from wellread.features import capture, embed, example_batch
from wellread.inputs import input_config
from wellread.method import method
from wellread.network import Network
from wellread.results import Report
from wellread.structure import layer_of

Rule = Literal["euclidean", "cosine", "lda", "ridge"]
WITH_MOMENTS = ("lda", "ridge")
PART = "wellread.continual.nearest_mean_classifier:NearestMeanHead"

Arrived = Annotated[Dataset, Needs("labelled examples: an image or text column and a label column", ("input", "label"), min_classes=1)]


def unit_length(features: Tensor | np.ndarray) -> Tensor:
    """float64 [N, d] on the CPU: f = g / ||g|| of features g [N, d]. Raises `BadInput` for those that are zero or not finite."""
    g = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if g.ndim != 2:
        raise BadInput(f"features of shape {list(g.shape)} are not one vector for each example: give [N, d]")
    length = g.norm(dim=1, keepdim=True)
    bad = torch.nonzero(~(length.isfinite() & (length > 0)).squeeze(1)).flatten().tolist()
    if bad:
        raise BadInput(f"{len(bad)} of {len(g)} examples have features that are all zero or not finite (the first in row {bad[0]}): remove them")
    return g / length


def linear_form(sums: Tensor, counts: Tensor, rule: Rule = "euclidean", moments: Tensor | None = None, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight [C, d] and bias [C], float64, of the Linear layer that does the same as a rule on unit features f [d].

    sums [C, d], counts [C]: sum and number of the unit features of each class, so m_c = sums_c / counts_c. moments [d, d]: sum of f f^T over all.
    euclidean (the paper): m_c . f - (||m_c||^2 + 1) / 2, which is minus half the squared distance of f to m_c; the means are not normalised again.
    cosine: f . m_c / ||m_c||.
    lda: Gaussians around the means with one covariance S, shrunk to (S + penalty t I) / (1 + penalty) with t its mean eigenvalue; equal priors.
    ridge: the least squares fit to one-hot targets, weight = sums (moments + penalty I)^-1; no bias.
    Raises `BadInput` for a class without examples, and for a matrix that cannot be inverted.
    """
    if len(counts) == 0 or bool((counts < 1).any()):
        raise BadInput("there is a class without examples: add at least one of each before predicting")
    means = sums / counts[:, None]
    if rule == "euclidean":
        return means, -(means.square().sum(1) + 1) / 2
    if rule == "cosine":
        return nn.functional.normalize(means), torch.zeros(len(means), dtype=means.dtype)
    if moments is None:
        raise BadInput(f"rule {rule!r} needs the second moments of the features, which were not kept: start again from the encoder with this rule")
    identity = torch.eye(len(moments), dtype=moments.dtype)
    if rule == "ridge":
        return _solved(moments + penalty * identity, sums), torch.zeros(len(means), dtype=means.dtype)
    covariance = (moments - sums.T @ means) / counts.sum()
    weight = _solved((covariance + penalty * covariance.trace() / len(covariance) * identity) / (1 + penalty), means)
    return weight, -(weight * means).sum(1) / 2


def _solved(matrix: Tensor, rows: Tensor) -> Tensor:
    """rows @ matrix^-1 of a symmetric matrix."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if failed or diagonal.min() <= 1e-6 * diagonal.max():  # squared, this is the inverse of the condition number that float64 can bear
        raise BadInput("the features seen so far are too few or too alike for their covariance to be inverted: raise penalty or give more examples")
    return torch.cholesky_solve(rows.T, factor).T


class NearestMeanHead(nn.Module):
    """Class means as the last layer of a network: features [B, d] to logits [B, C] (`linear_form`).

    features, classes: d and C. encoder: mark of the network that made the features (`encoder_mark`).
    sums float64 [C, d], counts int64 [C], moments float64 [d, d] (lda and ridge only): what was seen, in whatever order.
    weight float64 [C, d], bias float64 [C]: what follows from it, after `solve`. Before that the logits are NaN.
    """

    keeps_dtype = True
    sums: Tensor
    counts: Tensor
    moments: Tensor | None
    weight: Tensor
    bias: Tensor

    def __init__(self, features: int, classes: int, rule: Rule = "euclidean", penalty: float = 1.0, encoder: str = "") -> None:
        super().__init__()
        self.in_features, self.rule, self.penalty, self.encoder = features, rule, penalty, encoder
        self.register_buffer("sums", torch.zeros(classes, features, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("moments", torch.zeros(features, features, dtype=torch.float64) if rule in WITH_MOMENTS else None)
        self.register_buffer("weight", torch.zeros(classes, features, dtype=torch.float64))
        self.register_buffer("bias", torch.full((classes,), torch.nan, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        unit = nn.functional.normalize(features.to(self.weight.dtype), dim=-1)  # float64 also keeps the product out of autocast
        return nn.functional.linear(unit, self.weight, self.bias).float()

    def add(self, features: Tensor | np.ndarray, classes: Tensor | np.ndarray) -> None:
        """Count examples in: features [N, d] of any length, classes int [N]. Then `solve`."""
        unit, classes = unit_length(features), torch.as_tensor(classes, dtype=torch.int64)
        if unit.shape[1] != self.in_features:
            raise BadInput(f"the features have {unit.shape[1]} numbers and the class means {self.in_features}: they come from another encoder")
        self.sums.index_add_(0, classes, unit)
        self.counts += torch.bincount(classes, minlength=len(self.counts))
        if self.moments is not None:
            self.moments += unit.T @ unit

    def take(self, other: NearestMeanHead, classes: Sequence[int], places: Sequence[int]) -> None:
        """Count in what another head has seen: its `classes` are here the classes `places`. Then `solve`."""
        self.sums.index_add_(0, torch.tensor(places, dtype=torch.int64), other.sums[list(classes)])
        self.counts.index_add_(0, torch.tensor(places, dtype=torch.int64), other.counts[list(classes)])
        if self.moments is not None and other.moments is not None:
            self.moments += other.moments

    def solve(self) -> None:
        """Weight and bias from all that was counted in."""
        weight, bias = linear_form(self.sums, self.counts, self.rule, self.moments, self.penalty)
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    @property
    def stored(self) -> int:
        """Bytes kept of all data seen."""
        return sum(kept.numel() * kept.element_size() for kept in (self.sums, self.counts, self.moments) if kept is not None)

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> NearestMeanHead:
        """Moves with its network to a device, but stays in float64 (float32 where a device has none); what was counted stays on the CPU."""
        device = change(torch.empty(0)).device
        for name in ("weight", "bias"):
            setattr(self, name, getattr(self, name).to(device, torch.float32 if device.type == "mps" else torch.float64))
        return self


# --- networks


def means_of(network: Network) -> NearestMeanHead | None:
    """The class means of a network, when it has some."""
    layer = layer_of(network.module, network.head) if network.head else None
    return layer if isinstance(layer, NearestMeanHead) else None


def encoder(network: Network) -> Network:
    """The network without its head: gives the features [B, d]; the same one whatever the class means are.

    Raises `BadInput` when the head does not get one vector for each example, or is not what the output comes from.
    """
    if network.output not in ("logits", "embedding"):
        raise BadInput(f"a classifier or an encoder is needed, and this network gives {network.output.replace('_', ' ')}: give what it was made from")
    trunk = _exchanged(network, (), "torch.nn:Identity")
    trunk.output = "embedding"
    head = trunk.head or ""
    batch = example_batch(network)
    with torch.inference_mode(), capture(network.module, [head], inputs=True) as caught:
        network(batch)
        vectors = head in caught and caught[head].ndim == 2
        last = vectors and torch.equal(trunk(batch), caught[head])
    if not last:
        raise BadInput(f"the layer {head!r} does not turn one vector per example into the output: name the layer that does, Network(..., head=PATH)")
    return trunk


def encoder_mark(trunk: Network) -> str:
    """Hash of weights, structure and input of an encoder: class means are worth something only beside the encoder that they were made with."""
    return hashlib.sha256(json.dumps([trunk.fingerprint, input_config(trunk.input)]).encode()).hexdigest()


def _exchanged(network: Network, labels: Sequence[str], part: str, **arguments: Any) -> Network:
    """`with_head`, in place of earlier class means: edits do not pile up however often classes arrive."""
    made = network.with_head(labels, part=part, **arguments)
    if len(made.edits) > 1 and made.edits[-2].get("part") == PART and made.edits[-2]["layer"] == made.head:
        del made.edits[-2]
    return made


def _names(network: Network, known: NearestMeanHead) -> list[str]:
    return list(network.labels or map(str, range(len(known.counts))))


def _with_means(network: Network, labels: Sequence[str], rule: str, penalty: float, width: int, mark: str) -> tuple[Network, NearestMeanHead]:
    made = _exchanged(network, labels, PART, features=width, classes=len(labels), rule=rule, penalty=penalty, encoder=mark)
    head = means_of(made)
    assert head is not None
    return made, head


@method
def nearest_mean_classifier(
    network: Network,
    new: Arrived | None = None,
    *,
    rule: Rule | None = None,
    penalty: float | None = None,
    forget: list[str] | None = None,
) -> Network:
    """A classifier from a frozen network and examples that arrive in pieces, without training, without keeping them, without forgetting.

    Each class is the mean of the unit-length features [d] of its examples, and an image or text is given the class whose mean is nearest.
    Called again on its own result it counts the new examples in and appends the classes that it did not know; the result is the same in
    whatever order examples and classes came. Logits [B, C] are minus half the squared distance (see `linear_form`).

    network: any network that ends in a head on one vector for each example (its head is replaced), or what this method returned before.
    new: examples that have arrived, of known classes, new ones, or both; one class is enough. Left out when there is only something to forget.
    rule: euclidean is the paper's; cosine; lda and ridge also use the second moments of the features (d x d numbers more) and are usually
        better. None keeps the network's rule, and begins with euclidean.
    penalty: for lda, what is added to the covariance, in units of its mean eigenvalue (1.0 is a shrinkage of one half); for ridge, what is
        added to the diagonal of the sum of f f^T. None keeps the network's penalty, and begins with 1.0.
    forget: names of classes to take out before `new` is counted in; nothing of their examples is left in the weights. Not for lda and ridge,
        whose moments are shared by all classes.

    Raises `BadInput` for features that are zero, a network that changed since its means were made, a rule for which too little was kept, an
    unknown name in `forget`, and a network whose head is not the last layer.
    Source: Janson, Zhang, Aljundi and Elhoseiny 2022, arXiv 2210.04428; lda and ridge are not in the paper.
    """
    known = means_of(network)
    before = _names(network, known) if known else []
    rule = rule or (known.rule if known else "euclidean")
    forgotten = list(forget or ())
    _check(known, before, new, rule, penalty, forgotten)
    penalty = penalty if penalty is not None else known.penalty if known else 1.0
    trunk = encoder(network)
    mark = encoder_mark(trunk)
    if known and known.encoder != mark:
        raise BadInput("the network is not the one its class means were made with (weights, structure or input changed since): start again")

    names: list[str] = class_names(new) if new is not None else []
    numbers = label_numbers(new) if new is not None else np.zeros(0, np.int64)
    features = embed(trunk, new) if new is not None else np.zeros((0, known.in_features if known else 0))
    stay = [number for number, name in enumerate(before) if name not in forgotten]
    labels = [before[number] for number in stay]
    labels += [names[number] for number in np.unique(numbers) if names[number] not in labels]
    if not labels:
        raise BadInput("no class would be left: keep at least one, or give examples of a new one")

    made, head = _with_means(network, labels, rule, penalty, features.shape[1], mark)
    if known:
        head.take(known, stay, range(len(stay)))
    place = {number: labels.index(names[number]) for number in np.unique(numbers)}
    head.add(features, np.array([place[number] for number in numbers], np.int64))
    head.solve()
    made.reports["classes"] = class_report(head, labels)
    return made


def _check(known: NearestMeanHead | None, labels: list[str], new: Dataset | None, rule: str, penalty: float | None, forgotten: list[str]) -> None:
    if new is None and not forgotten:
        raise BadInput("there is nothing to do: give new examples, or the names of classes to forget")
    if penalty is not None and rule not in WITH_MOMENTS:
        raise BadInput(f"penalty is for the rules lda and ridge, and the rule is {rule}: leave it out")
    if penalty is not None and not 0 <= penalty < float("inf"):
        raise BadInput(f"penalty is {penalty}: give 0 or more")
    if known and rule in WITH_MOMENTS and known.moments is None:
        raise BadInput(f"rule {rule!r} needs second moments, which {known.rule!r} has not kept of the examples seen: start again from the encoder")
    unknown = [name for name in forgotten if name not in labels]
    if unknown:
        knows = f"the network knows {', '.join(labels[:8])}" if labels else "the network has no class means"
        raise BadInput(f"there is no class {unknown[0]!r} to forget: {knows}")
    if forgotten and rule in WITH_MOMENTS:
        raise BadInput(f"a class cannot be forgotten with rule {rule!r}, whose second moments are those of all classes: use euclidean or cosine")


@method
def merge(a: Network, b: Network) -> Network:
    """One classifier from two that were made at different places with the same encoder: as if one had seen the examples of both.

    a, b: results of `nearest_mean_classifier` with one rule. Only means and counts (and moments) ever left the places.
    Raises `BadInput` when the encoders, the rules or the penalties differ.
    """
    first, second = means_of(a), means_of(b)
    if first is None or second is None:
        raise BadInput(f"network {'a' if first is None else 'b'} has no class means: make them with nearest_mean_classifier")
    if (first.rule, first.penalty) != (second.rule, second.penalty):
        raise BadInput(f"a has the rule {first.rule} (penalty {first.penalty}) and b {second.rule} (penalty {second.penalty}): make both alike")
    if not first.encoder == second.encoder == encoder_mark(encoder(a)) == encoder_mark(encoder(b)):
        raise BadInput("a and b do not have the same encoder, or it changed after the class means were made: their means cannot be added")
    ours, theirs = _names(a, first), _names(b, second)
    labels = [*ours, *(name for name in theirs if name not in ours)]
    made, head = _with_means(a, labels, first.rule, first.penalty, first.in_features, first.encoder)
    head.take(first, range(len(ours)), range(len(ours)))
    head.take(second, range(len(theirs)), [labels.index(name) for name in theirs])
    head.solve()
    made.reports["classes"] = class_report(head, labels)
    return made


def class_report(head: NearestMeanHead, labels: Sequence[str]) -> Report:
    """What is known of each class: examples, length of its mean (1: all alike, 0: all different), and the class whose mean is nearest."""
    means = head.sums / head.counts[:, None]
    rows: list[dict[str, Any]] = [
        {"class": name, "examples": int(count), "length of mean": float(length)}
        for name, count, length in zip(labels, head.counts, means.norm(dim=1), strict=True)
    ]
    if 1 < len(labels) <= 2000:  # a square table of distances
        distance, nearest = torch.cdist(means, means).fill_diagonal_(torch.inf).min(1)
        for row, number, value in zip(rows, nearest.tolist(), distance.tolist(), strict=True):
            row |= {"nearest class": labels[number], "distance": value}
    few = [name for name, count in zip(labels, head.counts, strict=True) if count < 5]
    return Report(
        f"{len(labels)} classes by their means ({head.rule})",
        {"classes": len(labels), "examples": int(head.counts.sum()), "bytes kept of them": head.stored},
        {"classes": rows},
        text="Classes that the network met in its pre-training are not new to it: expect less on classes unlike those.",
        warnings=[f"{len(few)} classes have fewer than 5 examples ({', '.join(few[:5])}): their means are uncertain"] if few else [],
    )

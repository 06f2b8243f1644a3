"""Anomaly detection with one Gaussian per stage of a pre-trained network (Rippel, Mertens and Merhof 2020, arXiv 2005.14140).

Nothing is trained. Each stage's map is averaged over space, a Gaussian is fitted to these averages of normal pictures, and the score of a new
picture is its Mahalanobis distance, summed over the stages. Normals that were held out turn the score into a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wellread import runtime
from wellread.batches import network_batches
from wellread.charts import histogram_chart
from wellread.covariance import Moments, ledoit_wolf, oas
from wellread.data import Unlabelled, class_names, duplicates, labels, name_of, pixels, subset
from wellread.errors import BadInput
from wellread.features import as_map, capture, pooled, probe, running, stage_features, stages, to_device
from wellread.inputs import ImageInput
from wellread.method import method
from wellread.network import Network
from wellread.results import Heatmaps, Report
from wellread.structure import class_name

if TYPE_CHECKING:
    from datasets import Dataset

Components = Literal["low-variance", "all", "high-variance"]
Estimator = Literal["ledoit-wolf", "oas"]

CHUNK = 8192  # pictures whose features are in memory at a time; a larger table is read from the feature cache chunk by chunk


# --- the Gaussian of one level


def select(variances: Tensor, rows: int, components: Components, variance: float) -> slice:
    """Which principal components are kept; `variances` [d] are sorted, highest first.

    The first component k at which the cumulative share of the variance passes `variance` is the boundary. "high-variance" is 0...k.
    "low-variance" is k - 1... up to the last that `rows` pictures can define: k - 1 and k are in both, as in the authors' experiments.
    "all" is everything, also directions in which the normals do not vary.
    """
    if components == "all":
        return slice(0, len(variances))
    share = variances.cumsum(0) / variances.sum()
    boundary = min(int((share <= variance).sum()), len(variances) - 1)
    if components == "high-variance":
        return slice(0, boundary + 1)
    return slice(max(boundary - 1, 0), min(len(variances), max(rows - 1, boundary + 1)))


def whitening(vectors: Tensor, variances: Tensor, shrinkage: float) -> Tensor:
    """[d, k] from principal directions [d, k] and their variances [k], which are drawn towards their mean by `shrinkage`, 0 to 1."""
    shrunk = (1 - shrinkage) * variances + shrinkage * variances.mean()
    return vectors * torch.where(shrunk > 1e-12 * shrunk.max(), shrunk.rsqrt(), 0.0)  # nothing is known of a direction without variance


class Gaussian(NamedTuple):
    """float64: mean [d]; whiten [d, k], whose product with its transpose is the precision in the components that were kept."""

    mean: Tensor
    whiten: Tensor
    shrinkage: float


def mahalanobis(z: Tensor, mean: Tensor, whiten: Tensor) -> Tensor:
    """The distance [...] of z [..., d]: a norm, so that rounding never leaves a negative number under the root."""
    return torch.linalg.vector_norm((z - mean) @ whiten, dim=-1)


def fit_gaussians(
    walk: Callable[[], Iterable[dict[str, Tensor]]],
    *,
    components: Components = "low-variance",
    variance: float = 0.99,
    estimator: Estimator = "ledoit-wolf",
) -> dict[str, Gaussian]:
    """One Gaussian per level, from features in batches of any size.

    walk: starts a walk over the normals and gives {level: [B, d]}; `lambda: [features]` when they are in memory. "oas" walks once, "ledoit-wolf"
    twice: fourth moments of the components that are kept can be summed only when these are known.
    Raises `BadInput` for fewer than two normals, values that are not finite, and a level that is the same for all normals.
    """
    moments: dict[str, Moments] = {}
    for batch in walk():
        for level, z in batch.items():
            if not torch.isfinite(z).all():
                raise BadInput(f"level {level!r} gives values that are not finite for some of the normals: the weights or the pictures are damaged")
            moments.setdefault(level, Moments(z.shape[1])).update(z)
    kept, basis = {}, {}
    for level, each in moments.items():
        if each.rows < 2:
            raise BadInput(f"{each.rows} normals cannot show how normals vary: give at least two to be fitted")
        rising, vectors = torch.linalg.eigh(each.covariance)
        variances = rising.flip(0).clamp(min=0)
        if variances.sum() <= 1e-11 * each.mean.square().sum():  # the rounding of float32 on copies of one picture
            raise BadInput(f"level {level!r} is the same for all normals: give different pictures, or choose levels without it")
        part = select(variances, each.rows, components, variance)
        kept[level], basis[level] = variances[part], vectors.flip(1)[:, part]
    fourth = dict.fromkeys(moments, 0.0)
    for batch in walk() if estimator == "ledoit-wolf" else ():
        for level, z in batch.items():
            x = (z.to("cpu", torch.float64) - moments[level].mean) @ basis[level]
            fourth[level] += float(x.square().sum(1).square().sum())
    found = {}
    for level, each in moments.items():
        share = oas(kept[level], each.rows) if estimator == "oas" else ledoit_wolf(kept[level], each.rows, fourth[level])
        found[level] = Gaussian(each.mean, whitening(basis[level], kept[level], share), share)
    return found


# --- thresholds


def conformal_threshold(held_out: np.ndarray, false_alarm_rate: float) -> tuple[float, int]:
    """The threshold that a new normal exceeds with at most this probability, and its rank k among the scores [n] of held-out normals.

    It is the k-th smallest, k = ceil((n + 1)(1 - rate)), whatever the distribution, if new normals come as those did. With n < 1 / rate - 1 no
    score is high enough: then it is the highest, which one new normal in n + 1 exceeds.
    """
    n = len(held_out)
    rank = min(int(np.ceil((n + 1) * (1 - false_alarm_rate) - 1e-9)), n)
    return float(np.sort(held_out)[rank - 1]), rank


def chi_square_threshold(kept: int, false_alarm_rate: float) -> float:
    """The distance that a Gaussian in `kept` dimensions exceeds with this probability: right only for many more normals than dimensions."""
    from scipy.stats import chi2

    return float(np.sqrt(chi2.ppf(1 - false_alarm_rate, kept)))


# --- the network


class AnomalyScore(nn.Module):
    """A network whose output [B] says how strange pictures [B, C, H, W] are.

    module: the pre-trained network, kept in eval mode. levels: the layers that are looked at, with their `widths` and the numbers of components
    `kept`. held_out: how many scores of normals are stored. combine: "sum" of the distances, or of distances / sqrt(kept) ("normalised").
    """

    threshold: Tensor  # [] scores above it are alarms
    held_out: Tensor  # [n] the scores of normals that were not fitted, sorted
    scale: Tensor  # [L]

    def __init__(self, module: nn.Module, levels: list[str], widths: list[int], kept: list[int], held_out: int, combine: str = "sum") -> None:
        super().__init__()
        self.module, self.levels = module, list(levels)
        device = next(module.parameters(), torch.empty(0)).device
        for number, (d, k) in enumerate(zip(widths, kept, strict=True)):
            self.register_buffer(f"mean_{number}", torch.zeros(d, device=device))
            self.register_buffer(f"whiten_{number}", torch.zeros(d, k, device=device))
        self.register_buffer("scale", torch.tensor([k**-0.5 if combine == "normalised" else 1.0 for k in kept], device=device))
        self.register_buffer("held_out", torch.zeros(held_out, device=device))
        self.register_buffer("threshold", torch.zeros((), device=device))
        self.train(False)

    def train(self, mode: bool = True) -> AnomalyScore:
        return super().train(False)  # the Gaussians hold for frozen batch statistics only

    def gaussian(self, level: str) -> tuple[Tensor, Tensor]:
        """Mean [d] and whitening [d, k] of a level, float32."""
        number = self.levels.index(level)
        return self.get_buffer(f"mean_{number}"), self.get_buffer(f"whiten_{number}")

    def forward(self, images: Tensor) -> Tensor:
        return self.combined(self.level_scores(images))

    def level_scores(self, images: Tensor) -> Tensor:
        """The distance at each level, [B, L]."""
        with capture(self.module, self.levels) as caught:
            self.module(images)
        return self.distances({level: pooled(caught[level], images, self) for level in self.levels})  # type: ignore[arg-type]  # reads .module

    def distances(self, features: dict[str, Tensor]) -> Tensor:
        """[B, L] from the features [B, d] of the levels. Never in half precision: low variances would drown in its rounding."""
        device = self.scale.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return torch.stack([mahalanobis(features[level].float(), *self.gaussian(level)) for level in self.levels], -1)

    def combined(self, distances: Tensor) -> Tensor:
        """The score [B] from [B, L]."""
        return (distances * self.scale).sum(-1)

    def p_value(self, scores: Tensor) -> Tensor:
        """[B]: alarms at p <= a have a false alarm rate of at most a, for any a."""
        lower = torch.searchsorted(self.held_out, scores.contiguous())
        return (1 + len(self.held_out) - lower) / (1 + len(self.held_out))


def anomaly_map(network: Network, images: Dataset, *, levels: list[str] | None = None, batch_size: int = 32) -> Heatmaps:
    """Roughly where each picture is strange: every position of a level's map scored with the level's Gaussian, divided by sqrt(kept), summed.

    network: from `gaussian_anomaly`. levels: some of its levels. Maps are as large as the network's input and run from 0 to 1 in each picture;
    `peak` is the highest value before. An approximation: the Gaussians are those of averages over a picture, which vary less than its positions
    do, so values compare within a picture only, and not with the score.
    """
    scorer, source = network.module, network.input
    if not isinstance(scorer, AnomalyScore) or not isinstance(source, ImageInput):
        raise BadInput("this network holds no Gaussians: give one that gaussian_anomaly returned")
    chosen = scorer.levels if levels is None else levels
    if unknown := [level for level in chosen if level not in scorer.levels]:
        raise BadInput(f"the network was fitted without level {unknown[0]!r}: choose from {', '.join(scorer.levels)}")
    batches, device, parts = network_batches(network, images, batch_size=batch_size, label=False), runtime.device(), []
    with running(network, device), torch.inference_mode(), capture(scorer.module, chosen) as caught:
        for batch in runtime.track(batches.epoch(0), f"mapping {name_of(images)}", total=len(batches)):
            scorer.module(to_device(batch["inputs"], device))
            total = torch.zeros(1, device=device)
            for level in chosen:
                mean, whiten = scorer.gaussian(level)
                positions = as_map(caught[level], scorer).permute(0, 2, 3, 1).float()  # type: ignore[arg-type]
                distance = mahalanobis(positions, mean, whiten) / whiten.shape[1] ** 0.5
                total = total + nn.functional.interpolate(distance[:, None], source.size, mode="bilinear")[:, 0]
            parts.append(total.cpu())
    maps = torch.cat(parts)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    shown = np.repeat(pixels(images, source).transpose(0, 2, 3, 1), 3 // source.channels, axis=-1)
    names = list(images["file"]) if "file" in images.column_names else None
    target = network.labels[1] if network.labels else "anomalous"
    return Heatmaps(((maps - low) / (high - low).clamp(min=1e-12)).numpy(), shown, [target] * len(maps), high.flatten().numpy(), names)


# --- the method


@method
def gaussian_anomaly(
    network: Network,
    normals: Unlabelled,
    *,
    components: Literal["low-variance", "all", "high-variance"] = "low-variance",
    variance: float = 0.99,
    estimator: Literal["ledoit-wolf", "oas"] = "ledoit-wolf",
    levels: list[str] | None = None,
    combine: Literal["sum", "normalised"] = "sum",
    false_alarm_rate: float = 0.05,
    calibration: float = 0.2,
    normal_class: str | None = None,
    contaminated: bool = False,
    size: int | None = None,
    seed: int = 0,
) -> Network:
    """An inspector from pictures of good things only: a network that scores how strange a picture is, with a threshold for alarms.

    network: a pre-trained image classifier, used frozen; pictures are resized whole to its input, never cropped.
    normals: pictures of normal things, a few hundred or more; no anomalous one is needed.
    components: which principal components of a level count: those with little variance in normals (which carry the anomalies, the paper finds),
        all, or those with much.
    variance: the share of the variance that low-variance components leave out and high-variance ones hold, 0 to 1.
    estimator: how the covariance is shrunk; oas walks over the features once, ledoit-wolf twice.
    levels: names of layers to look at; without them the last of each resolution or width.
    combine: sum the levels' distances, or each distance divided by the root of its number of components, so that wide levels do not count more.
    false_alarm_rate: the share of normals that may raise an alarm, 0 to 1.
    calibration: the share of the normals that is not fitted but sets the threshold, 0 to 1.
    normal_class: the class of a labelled table that is normal; its other rows are left out.
    contaminated: fit a labelled table of several classes whole, anomalies and all.
    size: side of the square to which pictures are resized, in pixels; without it the network's own.
    seed: chooses the normals that are held out.

    Returns a Network with output "anomaly_score", float32 [B] from images [B, C, H, W], higher is stranger. Its module is an `AnomalyScore` with
    threshold, level_scores and p_value; reports["gaussian-anomaly"] says what the threshold promises and what each level does.
    Raises `BadInput` for too few or identical normals, features that are not finite, several classes without normal_class, rates outside 0...1, and
    a network that does not read pictures or not of this size.
    Source: arXiv 2005.14140; the conformal threshold is not in the paper.
    """
    for name, value in {"variance": variance, "false_alarm_rate": false_alarm_rate, "calibration": calibration}.items():
        if not 0 < value < 1:
            raise BadInput(f"{name} is {value}: give a share between 0 and 1")
    normals, normal = _only_normal(normals, normal_class, contaminated)
    held_out = max(1, round(calibration * len(normals)))
    if len(normals) - held_out < 2:
        raise BadInput(f"{len(normals)} normals are too few when {held_out} of them set the threshold: at least two must be left to be fitted")
    network, widths = _levels(network, levels, size)
    fitted = np.ones(len(normals), dtype=bool)
    fitted[np.random.default_rng(seed).permutation(len(normals))[:held_out]] = False

    def walk(wanted: np.ndarray) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(normals), CHUNK):  # chunks of the whole table: the second walk, and other seeds, find them in the cache
            rows = np.arange(start, min(start + CHUNK, len(normals)))
            features = stage_features(network, subset(normals, rows), list(widths))
            yield {level: torch.from_numpy(z[wanted[rows]]) for level, z in features.items()}

    gaussians = fit_gaussians(lambda: walk(fitted), components=components, variance=variance, estimator=estimator)
    kept = [gaussians[level].whiten.shape[1] for level in widths]
    arguments = {"levels": list(widths), "widths": list(widths.values()), "kept": kept, "held_out": held_out, "combine": combine}
    wrap = {"edit": "wrap", "part": class_name(AnomalyScore), "arguments": arguments}
    head = f"module.{network.head}" if network.head else None
    result = network.edited(wrap, output="anomaly_score", labels=(normal, "anomalous"), head=head)
    scorer: AnomalyScore = result.module  # type: ignore[assignment]
    with torch.no_grad():
        for level in widths:
            mean, whiten = scorer.gaussian(level)
            mean.copy_(gaussians[level].mean)
            whiten.copy_(gaussians[level].whiten)
        on = scorer.scale.device
        distances = torch.cat([scorer.distances({level: z.to(on) for level, z in batch.items()}) for batch in walk(~fitted)])
        scorer.held_out.copy_(scorer.combined(distances).sort().values)
    threshold, rank = conformal_threshold(scorer.held_out.cpu().numpy(), false_alarm_rate)
    scorer.threshold.fill_(threshold)
    report = _report(scorer, gaussians, int(fitted.sum()), distances.cpu().numpy(), rank, false_alarm_rate)
    if copies := duplicates(normals, normals):
        report.warnings.append(f"{len(copies)} normals are copies of others: some that were held out were also fitted, and the threshold is too low")
    if contaminated:
        report.warnings.append("there may be anomalies among the held-out normals: then the threshold is too high")
    result.reports["gaussian-anomaly"] = report
    return result


def _only_normal(table: Dataset, normal_class: str | None, contaminated: bool) -> tuple[Dataset, str]:
    """The rows to learn from, and what their class is called."""
    column = table.features.get("label")
    if not (hasattr(column, "names") or str(getattr(column, "dtype", "")).startswith("int")):
        if normal_class is not None:
            raise BadInput(f"normals has no classes, so none is called {normal_class!r}: leave normal_class out, or give a labelled table")
        return table, "normal"
    names, found = class_names(table), labels(table, "normals")
    present = [names[number] for number in np.unique(found)]
    if normal_class is not None:
        if normal_class not in present:
            raise BadInput(f"normals has no rows of class {normal_class!r}: normal_class is one of {', '.join(present[:10])}")
        return subset(table, np.flatnonzero(found == names.index(normal_class))), normal_class
    if len(present) > 1 and not contaminated:
        few = ", ".join(present[:6])
        raise BadInput(f"normals holds {len(present)} classes ({few}): name the normal one with normal_class, or fit all with contaminated=True")
    return table, present[0] if len(present) == 1 else "normal"


def _levels(network: Network, levels: list[str] | None, size: int | None) -> tuple[Network, dict[str, int]]:
    """The network as it is fed here, and the width of each level."""
    if network.output == "anomaly_score":
        raise BadInput("this network gives anomaly scores already: give the classifier that it was made from")
    if not isinstance(network.input, ImageInput):
        raise BadInput("a network that reads pictures is needed: give an image classifier, or say how it is fed, Network(module, input=ImageInput())")
    height, width = network.input.size if size is None else (size, size)
    if height < 1:
        raise BadInput(f"size is {size}: give the side of the pictures in pixels")
    network = network.edited(input=network.input.changed(size=(height, width), crop=1.0))
    try:
        chosen = list(dict.fromkeys(levels)) if levels else stages(network)
        seen = probe(network, chosen)
    except (RuntimeError, AssertionError, IndexError) as failed:
        why = (str(failed).strip().splitlines() or [type(failed).__name__])[0][:120]
        raise BadInput(f"this network cannot be fed pictures of {height} x {width} ({why}): give another size") from None
    if idle := [level for level in chosen if level not in seen]:
        raise BadInput(f"the layer {idle[0]!r} does not run when the network does: choose other levels")
    return network, {level: pooled(seen[level], torch.empty(0), network).shape[-1] for level in chosen}


def _report(scorer: AnomalyScore, gaussians: dict[str, Gaussian], fitted: int, distances: np.ndarray, rank: int, rate: float) -> Report:
    """What the threshold promises and what each level does; distances: [n, L] of the held-out normals."""
    from scipy.stats import beta

    n, rows = len(distances), list[dict[str, Any]]()
    for level, distance in zip(scorer.levels, distances.T, strict=True):
        (d, k), share = gaussians[level].whiten.shape, gaussians[level].shrinkage
        assumed = chi_square_threshold(k, rate)
        row = {"level": level, "width": d, "kept": k, "shrinkage": share, "threshold": conformal_threshold(distance, rate)[0]}
        rows.append({**row, "chi-square threshold": assumed, "chi-square false alarms": float((distance > assumed).mean())})
    low, high = beta.ppf((0.025, 0.975), n + 1 - rank, rank)
    figures: dict[str, float | str | int] = {"normals fitted": fitted, "normals held out": n, "threshold": float(scorer.threshold), "false alarm rate asked": rate}
    figures |= {"false alarm rate promised": (n + 1 - rank) / (n + 1), "false alarm rate, low": float(low), "false alarm rate, high": float(high)}
    text = (
        "Scores above the threshold are alarms. Promised is the false alarm rate over all ways to choose the held-out normals; low and high "
        "enclose that of this choice with 95 % confidence, as long as new normals come as these did. The chi-square threshold of a level is that "
        "of a perfect Gaussian; beside it is the share of held-out normals that exceeds it."
    )
    picture = histogram_chart(scorer.held_out.cpu().numpy(), x="score", y="held-out normals")
    report = Report("Anomalies, from normals only", figures, {"levels": rows}, text, {"Scores of the held-out normals.": picture})
    if n + 1 < 1 / rate - 1e-9:
        few = f"{n} held-out normals promise a false alarm rate of {1 / (n + 1):.2g} at best"
        report.warnings.append(f"{few}: {int(np.ceil(1 / rate - 1e-9)) - 1} are needed, so bring more normals or raise calibration")
    return report

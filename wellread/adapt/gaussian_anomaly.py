"""Anomaly detection with one Gaussian per stage of a pre-trained network (Rippel, Mertens and Merhof 2020, arXiv 2005.14140).

Nothing is trained. The mean of each stage's map over space is taken for pictures of normal things, a Gaussian is fitted to it, and the score of
a new picture is its Mahalanobis distance, summed over the stages. Normals that were held out turn the score into a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from wellread import runtime
from wellread.batches import network_batches
from wellread.data import Unlabelled, class_names, duplicates, labels, name_of, pixels, subset
from wellread.errors import BadInput
from wellread.features import as_map, capture, pooled, probe, running, stage_features, stages, to_device
from wellread.method import method
from wellread.network import Network
from wellread.results import Heatmaps, Report, histogram_chart
from wellread.structure import class_name

if TYPE_CHECKING:
    from datasets import Dataset

Components = Literal["low-variance", "all", "high-variance"]
Estimator = Literal["ledoit-wolf", "oas"]

CHUNK = 8192  # pictures whose features are in memory at a time; more are read from the feature cache, chunk by chunk


# --- the Gaussian of one level


class Moments:
    """Count, mean and covariance of rows that arrive in batches: float64, memory d^2 whatever their number."""

    def __init__(self, width: int) -> None:
        self.rows = 0
        self._shift = torch.zeros(width, dtype=torch.float64)
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._outer = torch.zeros(width, width, dtype=torch.float64)

    def update(self, z: Tensor) -> None:
        """Add the rows of z [B, d]."""
        z = z.to("cpu", torch.float64)
        if self.rows == 0:
            self._shift = z.mean(0)  # sums of squares around a point near the mean: around zero their digits would cancel
        x = z - self._shift
        self.rows += len(x)
        self._sum += x.sum(0)
        self._outer += x.T @ x

    @property
    def mean(self) -> Tensor:
        """[d]"""
        return self._shift + self._sum / self.rows

    @property
    def covariance(self) -> Tensor:
        """[d, d], divided by the number of rows."""
        off = self._sum / self.rows
        return self._outer / self.rows - off[:, None] * off


def ledoit_wolf(variances: Tensor, rows: int, fourth: float) -> float:
    """The share of the identity in the Ledoit-Wolf covariance (J. Multivariate Analysis 2004, lemma 3.2), 0 to 1.

    variances: [d] eigenvalues of the covariance of `rows` rows. fourth: sum over the rows of |z - mean|^4.
    """
    d, norm, mu = len(variances), float((variances**2).sum()), float(variances.mean())
    spread = norm - d * mu**2
    noise = (fourth / rows - norm) / rows
    return 1.0 if spread <= 0 else min(max(noise, 0.0) / spread, 1.0)


def oas(variances: Tensor, rows: int) -> float:
    """The same of the oracle approximating shrinkage (Chen et al. 2010, equation 23), which needs no fourth moments."""
    d, norm, mu = len(variances), float((variances**2).mean()), float(variances.mean())
    spread = (rows + 1) * (norm - mu**2 / d)
    return 1.0 if spread <= 0 else min((norm + mu**2) / spread, 1.0)


def select(variances: Tensor, rows: int, components: Components, variance: float) -> slice:
    """Which principal components are kept, `variances` [d] being sorted from high to low.

    The first component k at which the cumulative share of the variance passes `variance` is the boundary. "high-variance" is 0...k;
    "low-variance" is k - 1... (so k - 1 and k are in both, as in the authors' experiments) up to the last that `rows` pictures can define;
    "all" is everything, with the directions in which the normals do not vary at all.
    """
    if components == "all":
        return slice(0, len(variances))
    share = variances.cumsum(0) / variances.sum()
    boundary = min(int((share <= variance).sum()), len(variances) - 1)
    if components == "high-variance":
        return slice(0, boundary + 1)
    return slice(max(boundary - 1, 0), min(len(variances), max(rows - 1, boundary + 1)))


@dataclass
class Gaussian:
    """mean [d] and whiten [d, k], float64: |(z - mean) whiten| is the Mahalanobis distance of z in the k components that were kept.

    whiten @ whiten.T is the precision (in the kept components). shrinkage: the share of the identity in the covariance.
    """

    mean: Tensor
    whiten: Tensor
    shrinkage: float

    def distance(self, z: Tensor) -> Tensor:
        """[B] float64 from z [B, d]."""
        return mahalanobis(z.double(), self.mean, self.whiten)


def mahalanobis(z: Tensor, mean: Tensor, whiten: Tensor) -> Tensor:
    """[...] from z [..., d]: a norm, so no rounding can bring a negative number under the root."""
    return torch.linalg.vector_norm((z - mean) @ whiten, dim=-1)


def fit_gaussians(
    passes: Callable[[], Iterable[dict[str, Tensor]]],
    *,
    components: Components = "low-variance",
    variance: float = 0.99,
    estimator: Estimator = "ledoit-wolf",
) -> dict[str, Gaussian]:
    """One Gaussian per level from features in batches.

    passes: starts a walk over the normals that gives {level: [B, d]}; `lambda: [features]` when they are in memory. "oas" needs one walk;
    "ledoit-wolf" needs two, because the fourth moments of the components that are kept are not known before these are.
    Raises `BadInput` for a level with values that are not finite or that is the same for all normals.
    """
    moments: dict[str, Moments] = {}
    for batch in passes():
        for level, z in batch.items():
            if not torch.isfinite(z).all():
                raise BadInput(f"the features of level {level!r} are not finite for some of the normals: the weights or the pictures are damaged")
            moments.setdefault(level, Moments(z.shape[1])).update(z)
    found, basis, kept = {}, {}, {}
    for level, each in moments.items():
        if each.rows < 2:
            raise BadInput("one normal cannot say how normals vary: give at least two to fit")
        rising, vectors = torch.linalg.eigh(each.covariance)
        variances, vectors = rising.flip(0).clamp(min=0), vectors.flip(1)
        if variances.sum() <= 1e-11 * each.mean.square().sum():  # what float32 leaves of identical pictures
            raise BadInput(f"level {level!r} is the same for all normals: they are copies of one picture, or levels must be chosen without it")
        part = select(variances, each.rows, components, variance)
        basis[level], kept[level] = vectors[:, part], variances[part]
    fourth = dict.fromkeys(moments, 0.0)
    for batch in passes() if estimator == "ledoit-wolf" else ():
        for level, z in batch.items():
            fourth[level] += float(((z.to("cpu", torch.float64) - moments[level].mean) @ basis[level]).square().sum(1).square().sum())
    for level, each in moments.items():
        share = oas(kept[level], each.rows) if estimator == "oas" else ledoit_wolf(kept[level], each.rows, fourth[level])
        shrunk = (1 - share) * kept[level] + share * kept[level].mean()
        weight = torch.where(shrunk > 1e-12 * shrunk.max(), shrunk.rsqrt(), 0.0)  # nothing is known of a direction without any variance
        found[level] = Gaussian(each.mean, basis[level] * weight, share)
    return found


# --- thresholds


def conformal_threshold(held_out: np.ndarray, false_alarm_rate: float) -> tuple[float, int]:
    """A threshold that a new normal passes with at most `false_alarm_rate`, and its rank k among the n scores of held-out normals.

    The k-th smallest, k = ceil((n + 1)(1 - rate)): no assumption but that new normals come as those did. With n < 1 / rate - 1 no score is high
    enough; then the highest is given, which n + 1 normals pass once on average.
    """
    n = len(held_out)
    rank = min(int(np.ceil((n + 1) * (1 - false_alarm_rate) - 1e-9)), n)
    return float(np.sort(held_out)[rank - 1]), rank


def chi_square_threshold(kept: int, false_alarm_rate: float) -> float:
    """The distance that a Gaussian in `kept` dimensions exceeds with this probability: right only when there are many more normals than that."""
    from scipy.stats import chi2

    return float(np.sqrt(chi2.ppf(1 - false_alarm_rate, kept)))


# --- the network


class AnomalyScore(nn.Module):
    """A network whose output is how strange a picture is: [B] from [B, C, H, W].

    module: the pre-trained network, always in eval mode. levels: its layers that are looked at, with their `widths` and the number of
    components `kept`. held_out: how many scores of normals are stored. combine: the sum of the distances, or of distances / sqrt(kept).
    """

    threshold: Tensor  # scores above it are alarms
    held_out: Tensor  # [n] float32, sorted: what normals that were not fitted score
    scale: Tensor

    def __init__(self, module: nn.Module, levels: list[str], widths: list[int], kept: list[int], held_out: int, combine: str = "sum") -> None:
        super().__init__()
        self.module = module
        self.levels = list(levels)
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

    def fill(self, gaussians: Iterable[Gaussian]) -> None:
        """Take over the Gaussians of the levels, in their order."""
        for number, each in enumerate(gaussians):
            self.get_buffer(f"mean_{number}").copy_(each.mean)
            self.get_buffer(f"whiten_{number}").copy_(each.whiten)

    def calibrate(self, scores: Tensor, false_alarm_rate: float) -> int:
        """Keep the scores [n] of held-out normals and set the threshold by them; its rank (`conformal_threshold`)."""
        self.held_out.copy_(scores.sort().values)
        threshold, rank = conformal_threshold(scores.cpu().numpy(), false_alarm_rate)
        self.threshold.fill_(threshold)
        return rank

    def forward(self, images: Tensor) -> Tensor:
        return self.combined(self.level_scores(images))

    def level_scores(self, images: Tensor) -> Tensor:
        """The distance at each level, [B, L]."""
        with capture(self.module, self.levels) as caught:
            self.module(images)
        return self.distances([pooled(caught[level], images, self) for level in self.levels])  # type: ignore[arg-type]  # it reads .module only

    def distances(self, features: list[Tensor]) -> Tensor:
        """[..., L] from the features [..., d] of each level; never in half precision, which low variances do not survive."""
        with torch.autocast(features[0].device.type, enabled=False) if torch.is_autocast_enabled(features[0].device.type) else nullcontext():
            found = [mahalanobis(z.float(), self.get_buffer(f"mean_{n}"), self.get_buffer(f"whiten_{n}")) for n, z in enumerate(features)]
            return torch.stack(found, -1)

    def combined(self, distances: Tensor) -> Tensor:
        """The score [...] from [..., L]."""
        return (distances * self.scale).sum(-1)

    def p_value(self, scores: Tensor) -> Tensor:
        """[B]: at most the chance that a normal scores as high. Alarms below p have a false alarm rate of at most p."""
        higher = len(self.held_out) - torch.searchsorted(self.held_out, scores.contiguous())
        return (1 + higher) / (1 + len(self.held_out))


def anomaly_map(network: Network, images: Dataset, *, levels: list[str] | None = None, batch_size: int = 32) -> Heatmaps:
    """Roughly where each picture is strange: every position of a level's map scored with the Gaussian of that level, summed over levels.

    network: what `gaussian_anomaly` returned. levels: some of its levels. Maps are divided by sqrt(kept), resized to the picture's size and
    scaled to 0...1 per picture; `peak` is the highest distance before. This is an approximation: the Gaussians are those of averages over
    the whole picture, which vary less than single positions do, so heights compare within a picture and not with the score.
    """
    scorer = network.module
    if not isinstance(scorer, AnomalyScore):
        raise BadInput("this network has no Gaussians: give the network that gaussian_anomaly returned")
    chosen = levels if levels is not None else scorer.levels
    if unknown := [level for level in chosen if level not in scorer.levels]:
        raise BadInput(f"the network was fitted without level {unknown[0]!r}: choose from {', '.join(scorer.levels)}")
    batches, device = network_batches(network, images, batch_size=batch_size, label=False), runtime.device()
    parts = []
    with running(network, device), torch.inference_mode(), capture(scorer.module, chosen) as caught:
        for batch in runtime.track(batches.epoch(0), f"mapping {name_of(images)}", total=len(batches)):
            given = to_device(batch["inputs"], device)
            scorer.module(given)
            total = torch.zeros(len(given), 1, *given.shape[2:], device=device)
            for level in chosen:
                n = scorer.levels.index(level)
                mean, whiten = scorer.get_buffer(f"mean_{n}"), scorer.get_buffer(f"whiten_{n}")
                positions = as_map(caught[level], scorer).permute(0, 2, 3, 1).float()  # type: ignore[arg-type]
                distance = mahalanobis(positions, mean, whiten) / whiten.shape[1] ** 0.5
                total += nn.functional.interpolate(distance[:, None], given.shape[2:], mode="bilinear")
            parts.append(total[:, 0].cpu())
    maps = torch.cat(parts)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    shown = np.asarray(pixels(images, network.input)).transpose(0, 2, 3, 1)  # type: ignore[arg-type]
    return Heatmaps(
        ((maps - low) / (high - low).clamp(min=1e-12)).numpy(),
        shown[..., 0] if shown.shape[-1] == 1 else shown,
        [(network.labels or ("", "anomalous"))[1]] * len(maps),
        high.flatten().numpy(),
        list(images["file"]) if "file" in images.column_names else None,
    )


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

    network: a pre-trained image classifier, frozen; pictures are resized whole to its input, never cropped.
    normals: pictures of normal things, a few hundred or more; not a single anomalous one is needed.
    components: the principal components of each level that count: those with little variance in the normals (which the paper finds to carry the
        anomalies), all, or those with much.
    variance: share of the variance that the high-variance components hold and the low-variance ones leave out, 0 to 1.
    estimator: of the covariance; "oas" reads the features once instead of twice.
    levels: layers to look at; by default the last of each resolution or width (wellread.features.stages).
    combine: sum the levels' distances, or their distances divided by the root of the number of components, so that wide levels do not weigh more.
    false_alarm_rate: share of normals that may raise an alarm, 0 to 1.
    calibration: share of the normals that is not fitted but sets the threshold, 0 to 1.
    normal_class: the class of a labelled table that is normal; rows of other classes are left out.
    contaminated: fit a labelled table of several classes as it is, anomalies included.
    size: side of the square that pictures are resized to, in pixels; by default the network's own.
    seed: chooses the normals that are held out.

    Returns a Network with output "anomaly_score": float32 [B] from images [B, C, H, W], higher is stranger. Its module is an `AnomalyScore`
    (`threshold`, `level_scores`, `p_value`); its report says what each level does.
    Raises `BadInput` for too few or identical normals, a level without variance, features that are not finite, rates outside 0...1, several classes
    without normal_class, a network that does not read pictures or not of this size.
    Source: Rippel, Mertens and Merhof, ICPR 2020, arXiv 2005.14140; the conformal threshold is ours.
    """
    for name, value in {"variance": variance, "false_alarm_rate": false_alarm_rate, "calibration": calibration}.items():
        if not 0 < value < 1:
            raise BadInput(f"{name} is {value}: give a share between 0 and 1")
    normals, normal = _only_normal(normals, normal_class, contaminated)
    held_out = max(1, round(calibration * len(normals)))
    if len(normals) - held_out < 2:
        raise BadInput(f"{len(normals)} normals are too few, {held_out} of them held out: give at least two to fit and one to set the threshold")
    network, widths = _looked_into(network, levels, size)
    fitted = np.ones(len(normals), dtype=bool)
    fitted[np.random.default_rng(seed).permutation(len(normals))[:held_out]] = False

    def walk(wanted: np.ndarray) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(normals), CHUNK):  # chunks of the whole table: another seed finds their features in the cache
            rows = np.arange(start, min(start + CHUNK, len(normals)))
            features = stage_features(network, subset(normals, rows), list(widths))
            yield {level: torch.from_numpy(z[wanted[rows]]) for level, z in features.items()}

    gaussians = fit_gaussians(lambda: walk(fitted), components=components, variance=variance, estimator=estimator)
    kept = [gaussians[level].whiten.shape[1] for level in widths]
    arguments = {"levels": list(widths), "widths": list(widths.values()), "kept": kept, "held_out": held_out, "combine": combine}
    result = network.edited(
        {"edit": "wrap", "part": class_name(AnomalyScore), "arguments": arguments},
        output="anomaly_score",
        labels=(normal, "anomalous"),
        head=f"module.{network.head}" if network.head else None,
    )
    scorer = result.module
    assert isinstance(scorer, AnomalyScore)
    with torch.no_grad():
        scorer.fill(gaussians[level] for level in widths)
        distances = torch.cat([scorer.distances([z.to(network.device) for z in batch.values()]) for batch in walk(~fitted)])
        rank = scorer.calibrate(scorer.combined(distances), false_alarm_rate)
    result.reports["gaussian-anomaly"] = _report(scorer, gaussians, distances.cpu().numpy(), rank, false_alarm_rate, normals, contaminated)
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
        raise BadInput(
            f"normals holds {len(present)} classes ({', '.join(present[:6])}): say which is normal with normal_class, "
            "or fit them all with contaminated=True"
        )
    return table, present[0] if len(present) == 1 else "normal"


def _looked_into(network: Network, levels: list[str] | None, size: int | None) -> tuple[Network, dict[str, int]]:
    """The network as it is fed here, and the width of each level."""
    if network.output == "anomaly_score":
        raise BadInput("this network gives anomaly scores already: give the classifier that it was made from")
    if network.input is None or network.input.column != "image":
        raise BadInput("a network that reads pictures is needed: give an image classifier, or say how it is fed with Network(module, input=ImageInput(...))")
    side = network.input.size if size is None else (size, size)
    if min(side) < 1:
        raise BadInput(f"size is {size}: give at least 1 pixel")
    fed = network.edited(input=network.input.changed(size=side, crop=1.0))
    try:
        chosen = list(dict.fromkeys(levels)) if levels else stages(fed)
        seen = probe(fed, chosen)
    except (RuntimeError, AssertionError, IndexError) as failed:
        raise BadInput(f"this network cannot be fed pictures of {side[0]} x {side[1]} ({str(failed).strip().splitlines()[0][:120]}): give another size") from None
    example = torch.empty(0)
    return fed, {level: pooled(seen[level], example, fed).shape[-1] for level in chosen}


def _report(
    scorer: AnomalyScore, gaussians: dict[str, Gaussian], held_out: np.ndarray, rank: int, rate: float, normals: Dataset, contaminated: bool
) -> Report:
    """What the threshold promises and what each level does; held_out: distances [n, L] of the normals that were not fitted."""
    from scipy.stats import beta

    n, threshold = len(held_out), float(scorer.threshold)
    low, high = beta.ppf((0.025, 0.975), n + 1 - rank, rank)
    rows: list[dict[str, Any]] = []
    for level, distance in zip(scorer.levels, held_out.T, strict=True):
        d, k = gaussians[level].whiten.shape
        assumed = chi_square_threshold(k, rate)
        rows.append(
            {
                "level": level,
                "width": d,
                "kept": k,
                "shrinkage": gaussians[level].shrinkage,
                "threshold": conformal_threshold(distance, rate)[0],
                "chi-square threshold": assumed,
                "chi-square false alarms": float((distance > assumed).mean()),
            }
        )
    warnings = []
    if n + 1 < 1 / rate - 1e-9:
        warnings.append(
            f"{n} held-out normals cannot promise {rate:.3g} false alarms, only {1 / (n + 1):.3g}: at least {int(np.ceil(1 / rate - 1e-9)) - 1} are needed; "
            "bring more normals, or raise calibration"
        )
    if copies := duplicates(normals, normals):
        warnings.append(f"{len(copies)} normals are copies of others: what was held out is not new, and the threshold is too low")
    if contaminated:
        warnings.append("anomalies may be among the normals that were held out: then the threshold is too high and misses more")
    return Report(
        "Anomaly detection from normals only",
        {
            "normals fitted": len(normals) - n,
            "normals held out": n,
            "threshold": threshold,
            "false alarm rate asked": rate,
            "false alarm rate promised": (n + 1 - rank) / (n + 1),
            "false alarm rate, low": float(low),
            "false alarm rate, high": float(high),
        },
        {"levels": rows},
        "The threshold is the score of a held-out normal. Promised is the false alarm rate on average over such calibrations; low and high enclose that of "
        "this one in 95 of 100 cases, as long as new normals come as these did. The chi-square threshold of a level is what a Gaussian would need; beside it is "
        "the share of held-out normals that it takes for anomalies.",
        {"scores of held-out normals": histogram_chart(scorer.held_out.cpu().numpy(), x=f"score (threshold {threshold:.4g})", y="normals")},
        warnings,
    )

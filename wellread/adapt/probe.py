"""Linear heads on frozen features, for all penalties at once.

One eigen-decomposition of the standardised features turns every ridge penalty into a division, gives every ridge leave-one-out error in
closed form, and makes the Hessian of the logistic loss at the start diagonal, so that one L-BFGS run over an axis of penalties converges fast.
The chosen head is folded into one weight and one bias on the raw features: a plain `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from wellread.errors import BadInput

PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-5, 1.01, 0.5))  # times half the squared weights, against the mean loss of a row


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """n / (K n_k), float64 [K]: every class counts the same, and the mean weight over the rows is one. Classes without rows get 0."""
    counts = np.bincount(labels, minlength=classes)
    return len(labels) / (classes * np.maximum(counts, 1)) * (counts > 0)


@dataclass(frozen=True)
class Basis:
    """Features in their principal axes. `coordinates` [N, r] have weighted mean 0 and weighted second moments `variance` [r] (diagonal)."""

    mean: Tensor  # [d]
    scale: Tensor  # [d]
    axes: Tensor  # [d, r]
    variance: Tensor  # [r]
    coordinates: Tensor  # [N, r]
    weights: Tensor  # [N], mean 1

    def of(self, features: np.ndarray) -> Tensor:
        """Coordinates [M, r] of other rows."""
        return (torch.from_numpy(np.asarray(features, np.float64)) - self.mean) / self.scale @ self.axes

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """float32 weight [K, d] and bias [K] on raw features from weight [r, K] and bias [K] on coordinates."""
        raw = (self.axes @ weight / self.scale[:, None]).T
        return raw.float(), (bias - raw @ self.mean).float()


def basis(features: np.ndarray, weights: np.ndarray | None = None) -> Basis:
    """Standardised features [N, d] in the r <= min(N, d) axes in which they vary. weights [N]: of the rows, any scale."""
    x = torch.from_numpy(np.asarray(features, np.float64))
    if not bool(x.isfinite().all()):
        raise BadInput("the network's features are not finite: its weights or the data are damaged")
    w = torch.ones(len(x), dtype=x.dtype) if weights is None else torch.from_numpy(np.asarray(weights, np.float64))
    w = w / w.mean()
    mean = (w[:, None] * x).mean(0)
    scale = (w[:, None] * (x - mean) ** 2).mean(0).sqrt()
    scale = torch.where(scale > 1e-8 * scale.max(), scale, 1.0)  # a feature that never changes stays at zero
    x = (x - mean) / scale
    rows = w.sqrt()[:, None] * x / len(x) ** 0.5
    if len(x) >= x.shape[1]:
        variance, axes = torch.linalg.eigh(rows.T @ rows)
        kept = variance > 1e-10 * variance[-1]
        variance, axes = variance[kept], axes[:, kept]
    else:
        variance, left = torch.linalg.eigh(rows @ rows.T)
        kept = variance > 1e-10 * variance[-1]
        variance = variance[kept]
        axes = rows.T @ left[:, kept] / variance.sqrt()
    return Basis(mean, scale, axes, variance, x @ axes, w)


def ridge(found: Basis, targets: Tensor, penalties: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares with penalty / 2 * squared weights against half the mean squared error, for every penalty.

    targets: [N, K]. Weights [P, r, K], biases [P, K], and the predictions [P, N, K] for each row of a fit without that row, all in closed
    form. scikit-learn's alpha is N * penalty.
    """
    z, w, n = found.coordinates, found.weights[:, None], len(targets)
    targets = targets.to(z.dtype)
    bias = (w * targets).mean(0)
    shrunk = 1 / (found.variance + torch.tensor(penalties, dtype=z.dtype)[:, None])  # [P, r]
    weight = shrunk[:, :, None] * (z.T @ (w * (targets - bias)) / n)
    leverage = found.weights / n * (1 + shrunk @ (z**2).T)  # [P, N]
    left_out = targets - (targets - (z @ weight + bias)) / (1 - leverage)[:, :, None].clamp(min=1e-9)
    return weight, bias.expand(len(penalties), -1), left_out


def logistic(
    found: Basis,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float],
    *,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with penalty / 2 * squared weights against the mean loss, for every penalty in one run.

    labels: int64 [N]. Weights [P, r, K], biases [P, K] (not penalised). scikit-learn's C is 1 / (N * penalty), for two classes 2 / (N * penalty),
    because it has one weight vector there where the softmax has two.
    start: weights and biases to begin from; zeros when left out. tolerance: largest entry of the gradient at which it stops.
    """
    z = torch.cat([found.coordinates, torch.ones(len(labels), 1, dtype=found.coordinates.dtype)], 1)
    one_hot = torch.nn.functional.one_hot(labels, classes).to(z.dtype)[:, None]
    share = (found.weights / len(labels))[:, None]
    count, size = len(penalties), z.shape[1]
    penalty = torch.tensor(penalties, dtype=z.dtype)[:, None, None].repeat(1, size, 1)
    penalty[:, -1] = 0

    def loss(theta: Tensor) -> tuple[Tensor, Tensor]:
        logits = (z @ theta.permute(1, 0, 2).reshape(size, -1)).view(-1, count, classes)
        total = logits.logsumexp(-1)
        value = (share * (total - (logits * one_hot).sum(-1))).sum(0) + (penalty * theta**2).sum((1, 2)) / 2
        residual = ((logits - total[:, :, None]).exp() - one_hot) * share[:, :, None]
        gradient = (z.T @ residual.view(len(z), -1)).view(size, count, classes).permute(1, 0, 2)
        return value, gradient + penalty * theta

    curvature = torch.cat([found.variance, torch.ones(1, dtype=z.dtype)])[None, :, None] / 2 + penalty  # bounds the Hessian (Boehning 1992)
    first = torch.zeros(count, size, classes, dtype=z.dtype) if start is None else torch.cat([start[0], start[1][:, None]], 1)
    theta = minimise(loss, first, 1 / curvature, tolerance=tolerance)
    return theta[:, :-1], theta[:, -1]


def minimise(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, scale: Tensor, *, tolerance: float, memory: int = 20, limit: int = 1000
) -> Tensor:
    """L-BFGS on P independent convex problems at once, each with its own step length and curvature history.

    function: [P, ...] to values [P] and gradients [P, ...]. scale: a diagonal guess of the inverse Hessians, broadcast to [P, ...].
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (start.ndim - 1))

    theta, history = start, list[tuple[Tensor, Tensor, Tensor]]()
    value, gradient = function(theta)
    for _ in range(limit):
        if float(gradient.abs().max()) <= tolerance:
            break
        direction, used = -gradient, []
        for step, change, inverse in reversed(history):
            used.append(inverse * dot(step, direction))
            direction = direction - used[-1] * change
        direction = scale * direction
        if history:
            step, change, _ = history[-1]
            direction = direction * dot(step, change) / dot(change, scale * change).clamp(min=1e-30)
        for (step, change, inverse), alpha in zip(history, reversed(used), strict=True):
            direction = direction + step * (alpha - inverse * dot(change, direction))
        slope = dot(gradient, direction)
        length = torch.ones_like(slope)
        for _ in range(30):
            new_value, new_gradient = function(theta + length * direction)
            enough = new_value.view_as(slope) <= value.view_as(slope) + 1e-4 * length * slope + 1e-14 * value.view_as(slope).abs()
            if bool(enough.all()):
                break
            length = torch.where(enough, length, length / 2)
        step, change = length * direction, new_gradient - gradient
        along = dot(step, change)
        # a problem that has converged makes no step: its pair must not count
        history = [*history, (step, change, torch.where(along > 1e-30, 1 / along.clamp(min=1e-30), 0.0))][-memory:]
        theta, value, gradient = theta + step, new_value, new_gradient
    return theta


@dataclass(frozen=True)
class Probe:
    """A linear head on raw features. weight: float32 [K, d]; bias: [K]; tried: one line per penalty with its error."""

    weight: Tensor
    bias: Tensor
    penalty: float
    tried: list[dict[str, Any]]

    def logits(self, features: np.ndarray) -> np.ndarray:
        """float32 [N, K]."""
        return (torch.from_numpy(np.asarray(features, np.float32)) @ self.weight.T + self.bias).numpy()


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    kind: Literal["logistic", "ridge"] = "logistic",
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    penalties: Sequence[float] = PENALTIES,
    balance: bool = True,
) -> Probe:
    """The linear head of the best penalty.

    features: [N, d]; labels: int64 [N] in 0...classes - 1.
    validation: features and labels on which the log loss chooses among logistic penalties; ridge chooses by its own leave-one-out error.
    balance: every class counts the same, in the fit and in the choice.
    """
    by_class = class_weights(labels, classes) if balance else np.ones(classes)
    found, truth = basis(features, by_class[labels]), torch.from_numpy(labels)
    if kind == "ridge":
        one_hot = torch.nn.functional.one_hot(truth, classes)
        weight, bias, left_out = ridge(found, one_hot, penalties)
        error = (found.weights[:, None] * (left_out - one_hot) ** 2).sum(2).mean(1)
        best = int(error.argmin())
        factor = _calibration(left_out[best], truth, found.weights)
        tried = [{"penalty": p, "leave_one_out_squared_error": float(e)} for p, e in zip(penalties, error, strict=True)]
        return Probe(*found.folded(weight[best] * factor, bias[best] * factor), penalties[best], tried)
    if validation is None:
        if len(penalties) != 1:
            raise BadInput("logistic penalties are chosen on validation rows: give some, or one penalty")
        weight, bias = logistic(found, truth, classes, penalties)
        return Probe(*found.folded(weight[0], bias[0]), penalties[0], [])
    # small penalties take ten times as long to converge and are seldom the best: only the chosen one is solved to the end
    weight, bias = logistic(found, truth, classes, penalties, tolerance=1e-3)
    seen = torch.from_numpy(validation[1])
    weights = torch.from_numpy(by_class)[seen]
    logits = found.of(validation[0]) @ weight + bias[:, None]  # [P, M, K]
    losses = torch.stack([(weights * torch.nn.functional.cross_entropy(each, seen, reduction="none")).sum() / weights.sum() for each in logits])
    best = int(losses.argmin())
    tried = [{"penalty": p, "validation_log_loss": float(e)} for p, e in zip(penalties, losses, strict=True)]
    chosen = slice(best, best + 1)
    weight, bias = logistic(found, truth, classes, penalties[chosen], start=(weight[chosen], bias[chosen]))
    return Probe(*found.folded(weight[0], bias[0]), penalties[best], tried)


def _calibration(scores: Tensor, labels: Tensor, weights: Tensor) -> float:
    """The factor on ridge scores [N, K] whose softmax has the least log loss: scores near 0 and 1 are no logits."""
    from scipy.optimize import minimize_scalar

    def loss(log_factor: float) -> float:
        return float((weights * torch.nn.functional.cross_entropy(scores * np.exp(log_factor), labels, reduction="none")).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-2, 8), method="bounded").x))

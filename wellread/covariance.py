"""Covariance of rows that arrive in batches, and how far to shrink it: scikit-learn's estimators need all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Count, mean and covariance of rows that arrive in batches: float64, memory d^2 however many they are."""

    def __init__(self, width: int) -> None:
        self.rows = 0
        self._shift = self._sum = torch.zeros(width, dtype=torch.float64)
        self._outer = torch.zeros(width, width, dtype=torch.float64)

    def update(self, z: Tensor) -> None:
        """Add the rows of z [B, d]."""
        z = z.to("cpu", torch.float64)
        if self.rows == 0 and len(z):
            self._shift = z.mean(0)  # squares are summed around a point near the mean: around zero their digits would cancel
        x = z - self._shift
        self.rows += len(x)
        self._sum = self._sum + x.sum(0)
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
    """The share of the identity in the covariance of Ledoit and Wolf (2004, J. Multivariate Analysis 88), 0 to 1.

    variances: [d] eigenvalues of the covariance of `rows` rows. fourth: sum over these rows of |z - mean|^4.
    """
    norm, mu = float(variances.square().sum()), float(variances.mean())
    spread = norm - len(variances) * mu**2
    return min(max(fourth / rows - norm, 0.0) / rows / spread, 1.0) if spread > 0 else 1.0


def oas(variances: Tensor, rows: int) -> float:
    """The same, 0 to 1, of the oracle approximating shrinkage (Chen et al. 2010, arXiv 0907.4698, equation 23 without its 2 / d).

    variances: [d] eigenvalues of the covariance of `rows` rows. It needs no fourth moments.
    """
    norm, squared_trace = float(variances.square().sum()), float(variances.sum()) ** 2
    spread = (rows + 1) * (norm - squared_trace / len(variances))
    return min((norm + squared_trace) / spread, 1.0) if spread > 0 else 1.0

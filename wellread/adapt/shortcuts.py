"""Leaks and shortcuts: pictures that stand in two splits, and classes that are told apart by something other than what they show.

Nothing here trains a network. A control is a small classifier on what should not tell the class; when it comes near the network, the
network may have learned that instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from wellread.data import _bytes, pixels
from wellread.features import embed
from wellread.inputs import ImageInput, flat
from wellread.runtime import track

if TYPE_CHECKING:
    from datasets import Dataset

    from wellread.network import Network

HASH_SIDE = 16


def difference_hash(data: Dataset, side: int = HASH_SIDE) -> np.ndarray:
    """bool [N, side * side]: whether each cell of the picture, made grey and shrunk to side x (side + 1), is darker than its right neighbour.

    Changes little when a picture is resized, recompressed or made brighter.
    """
    small = pixels(data, ImageInput((side, side + 1), 1, (0.0,), (1.0,), "lanczos"))[:, 0]
    return (small[:, :, 1:] > small[:, :, :-1]).reshape(len(data), -1)


def near_duplicates(a: np.ndarray, b: np.ndarray, *, bits: int = 40, ratio: float = 0.4, same: bool = False) -> list[tuple[int, int, int]]:
    """(row in a, row in b, bits that differ) of rows of b whose nearest hash in a is suspiciously near, nearest first.

    a, b: bool [N, h] and [M, h] from `difference_hash`. same: b is a; then a row is not its own neighbour and each pair comes once.
    bits: at most so many differ (two unrelated photos differ in half of them).
    ratio: and at most this share of the distance to the third nearest: photos of one product under one camera are all alike, and there a small
    distance alone says nothing.
    """
    left, found = a.astype(np.float32) * 2 - 1, {}
    for start in range(0, len(b), 1000):
        right = b[start : start + 1000].astype(np.float32) * 2 - 1
        distance = (a.shape[1] - right @ left.T) / 2
        if same:
            distance[np.arange(len(right)), start + np.arange(len(right))] = np.inf
        nearest = distance.argmin(1)
        least = distance[np.arange(len(right)), nearest]
        third = np.partition(distance, 2, axis=1)[:, 2] if len(a) > 3 else np.full(len(right), a.shape[1] / 2)
        for row in np.flatnonzero((least <= bits) & (least <= ratio * third)):
            pair = (int(nearest[row]), start + int(row))
            found[tuple(sorted(pair)) if same else pair] = int(least[row])
    return sorted(((i, j, d) for (i, j), d in found.items()), key=lambda each: (each[2], each[0], each[1]))


class BorderOnly(nn.Module):
    """A network that sees the border alone: the central `share` of the area of pictures [B, C, H, W] is set to the mean color."""

    def __init__(self, inner: nn.Module, share: float = 0.7) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, images: Tensor) -> Any:
        images = images.clone()
        height, width = images.shape[-2:]
        top, left = (round(size * (1 - self.share**0.5) / 2) for size in (height, width))
        images[..., top : height - top, left : width - left] = 0  # the mean, after normalisation
        return self.inner(images)


def border_features(network: Network, data: Dataset, share: float = 0.7) -> np.ndarray:
    """float32 [N, d]: embeddings of the pictures with the central `share` of their area masked."""
    record = {"edit": "wrap", "part": "wellread.adapt.shortcuts:BorderOnly", "arguments": {"share": share}}
    return embed(network.edited(record, head=f"inner.{network.head}"), data)


def metadata(data: Dataset) -> tuple[np.ndarray, list[str]]:
    """float64 [N, F] and the names of its columns: what is known of a picture (or a text) without looking at what it shows."""
    if "image" not in data.column_names:
        return np.array([[len(text), len(str(text).split())] for text in data["text"]], np.float64), ["characters", "words"]
    import io

    from datasets import Image
    from PIL import Image as Picture

    raw = data.with_format(None).select_columns("image").cast_column("image", Image(decode=False))
    rows = []
    for row in track(raw, "reading metadata", total=len(raw)):
        content = _bytes(row["image"])
        with Picture.open(io.BytesIO(content)) as picture:
            grey = np.asarray(flat(picture).convert("L"))
            bands = len(picture.getbands())
        height, width = grey.shape
        rows.append([len(content), height, width, width / height, bands, grey.mean(), grey.min(), grey.max()])
    return np.array(rows, np.float64), ["file size", "height", "width", "aspect", "color bands", "mean brightness", "darkest pixel", "brightest pixel"]


def metadata_classifier(features: np.ndarray, labels: np.ndarray, classes: int, judged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A small decision tree: probabilities [M, K] of the rows `judged`, and the importance [F] of each column."""
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=4, min_samples_leaf=max(1, min(10, len(labels) // 20)), class_weight="balanced", random_state=0)
    tree.fit(features, labels)
    found = np.zeros((len(judged), classes))
    found[:, tree.classes_] = tree.predict_proba(judged)
    return found, tree.feature_importances_


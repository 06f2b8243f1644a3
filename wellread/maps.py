"""What a map of evidence is worth: does it find the thing, does the network care about what it marks, does it change with the network.

Maps are float [H, W] of non-negative values, masks bool [H, W]. Pointing game: Zhang et al. 2016, arXiv 1608.00507. Deletion and insertion:
Petsiuk et al. 2018, arXiv 1806.07421. Sanity check: Adebayo et al. 2018, arXiv 1810.03292.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from wellread.data import pixels
from wellread.features import running, stages, trunk
from wellread.inputs import ImageInput

if TYPE_CHECKING:
    from datasets import Dataset

    from wellread.network import Network

Array = np.ndarray[Any, np.dtype[Any]]


def masks(data: Dataset, source: ImageInput) -> list[Array | None]:
    """bool [H, W] for each row, resized and cut like the pictures of `source`; None without a column `mask`, a mask, or anything in it."""
    found: list[Array | None] = [None] * len(data)
    if "mask" in data.column_names:
        rows = [row for row, each in enumerate(data.select_columns("mask")) if each["mask"] is not None]
        if rows:
            table = data.select(rows).select_columns("mask").rename_column("mask", "image")
            values = pixels(table, ImageInput(source.size, 1, interpolation="nearest", crop=source.crop))[:, 0]
            for row, value in zip(rows, values, strict=True):
                mask = value > (127 if value.max() > 1 else 0)  # 0 and 255, compressed or not, or 0 and 1
                found[row] = mask if mask.any() else None
    return found


def pointing_game(heat: Array, mask: Array, dilate: float = 15) -> bool:
    """Whether the highest point lies in the mask or within `dilate` pixels of it. A map of zeros points nowhere."""
    return bool(heat.max() > 0 and _distance(mask).flat[heat.argmax()] <= dilate)


def energy_share(heat: Array, mask: Array) -> float:
    """The part of the map's sum that lies in the mask; 0 for a map of zeros. Divided by the mask's part of the picture it is the lift."""
    total = float(heat.sum(dtype=np.float64))
    return float(heat[mask].sum(dtype=np.float64)) / total if total > 0 else 0.0


def grid_bound(mask: Array, grid: tuple[int, int]) -> float:
    """The highest intersection over union with the mask that a choice of cells of a coarse `grid` reaches.

    Cells are taken in the order of their share of mask: for a ratio of two sums over cells no other choice is better.
    """
    cell = [np.arange(side) * cells // side for side, cells in zip(mask.shape, grid, strict=True)]
    number = (cell[0][:, None] * grid[1] + cell[1]).ravel()
    area = np.bincount(number, minlength=grid[0] * grid[1])
    inside = np.bincount(number, mask.ravel(), len(area))
    order = np.argsort(-inside / np.maximum(area, 1), kind="stable")
    hit, outside = inside[order].cumsum(), (area - inside)[order].cumsum()
    return float((hit / (mask.sum() + outside)).max())


def localisation(heat: Array, mask: Array, grid: tuple[int, int]) -> dict[str, float]:
    """How well a map finds the mask (which must not be empty).

    pointing_game and, for comparison, pointing_by_chance (a random point); energy_share and energy_lift (1 for a uniform map); average
    precision of the pixels; intersection over union at half of the maximum, and the bound that choosing among `grid` cells cannot pass.
    """
    from sklearn.metrics import average_precision_score

    above = (heat >= 0.5 * heat.max()) & (heat > 0)
    share = energy_share(heat, mask)
    return {
        "pointing_game": float(pointing_game(heat, mask)),
        "pointing_by_chance": float((_distance(mask) <= 15).mean()),
        "energy_share": share,
        "energy_lift": share / float(mask.mean()),
        "average_precision": float(average_precision_score(mask.ravel(), heat.ravel())),
        "iou_at_half": float((above & mask).sum() / (above | mask).sum()),
        "iou_bound": grid_bound(mask, grid),
    }


def _distance(mask: Array) -> Array:
    """Pixels from each place to the nearest of the mask."""
    from scipy.ndimage import distance_transform_edt

    found: Array = distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)
    return found


def coarse_boxes(heat: Array, threshold: float | Literal["otsu"] = 0.5, smallest: float = 0.01) -> list[dict[str, float]]:
    """Regions above `threshold` times the maximum (or Otsu's threshold), at least `smallest` of the picture's area, best first.

    Each has left, top, right, bottom in pixels (right and bottom lie outside) and score, the mean of the map in it.
    """
    from scipy.ndimage import find_objects, label

    cut = otsu(heat) if threshold == "otsu" else threshold * float(heat.max())
    numbers, _ = label((heat >= cut) & (heat > 0), structure=np.ones((3, 3)))
    boxes = []
    for number, (rows, columns) in enumerate(find_objects(numbers), 1):
        region = numbers[rows, columns] == number
        if region.sum() >= smallest * heat.size:
            corners = {"left": columns.start, "top": rows.start, "right": columns.stop, "bottom": rows.stop}
            boxes.append({**corners, "score": float(heat[rows, columns][region].mean())})
    return sorted(boxes, key=lambda box: -box["score"])


def otsu(values: Array) -> float:
    """The threshold that divides `values` into two groups with the least variance inside them, from a histogram of 256 bins."""
    counts, edges = np.histogram(values, 256)
    centers = (edges[:-1] + edges[1:]) / 2
    below, sum_below = counts.cumsum()[:-1].astype(float), (counts * centers).cumsum()[:-1]
    above, sum_above = counts.sum() - below, (counts * centers).sum() - sum_below
    between = below * above * (sum_below / np.maximum(below, 1) - sum_above / np.maximum(above, 1)) ** 2
    return float(centers[between.argmax()])


def deletion_insertion(
    score: Callable[[Tensor], Tensor], image: Tensor, heat: Tensor, *, steps: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Areas under the score while the most marked pixels are blurred away (low is good), and while they appear in the blurred picture (high).

    score: images [B, C, H, W] to [B], for instance the probability of the class. image: [C, H, W]; heat: [H, W].
    In `steps` equal steps; pixels of equal heat in random order; the blur is Gaussian with a 16th of the shorter side as its deviation.
    """
    from torchvision.transforms.functional import gaussian_blur

    sigma = min(image.shape[1:]) / 16
    blurred = gaussian_blur(image, 2 * math.ceil(3 * sigma) + 1, sigma)
    count = heat.numel()
    tie = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(heat.device)
    rank = torch.empty_like(tie)
    rank[tie[heat.flatten()[tie].argsort(descending=True, stable=True)]] = torch.arange(count, device=heat.device)
    gone = rank.view(1, 1, *heat.shape) < torch.linspace(0, count, steps + 1, device=heat.device).round().view(-1, 1, 1, 1)
    with torch.no_grad():
        curves = [score(torch.where(gone, new, old)).double() for old, new in ((image, blurred), (blurred, image))]
    deletion, insertion = (float(torch.trapezoid(curve, dx=1 / steps)) for curve in curves)
    return deletion, insertion


def spearman(a: Array, b: Array) -> float:
    """Rank correlation of two maps; 0 when one of them is constant."""
    from scipy.stats import rankdata

    x, y = (rankdata(values.ravel()) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else 0.0


def cascade(network: Network) -> list[tuple[str, set[str]]]:
    """Names of tensors in groups from the output to the input: what follows the last stage ("head"), then each stage from the last on."""
    order = trunk(network.module)
    ends = sorted((order.index(name), name) for name in stages(network))
    groups: list[set[str]] = [set() for _ in range(len(ends) + 1)]
    for name in network.module.state_dict():
        place = max((i for i, layer in enumerate(order) if f"{name}.".startswith(f"{layer}.")), default=0)  # a class token: at the input
        groups[bisect_left(ends, (place, ""))].add(name)
    names = [*(name for _, name in ends), "head"]
    return [(name, group) for name, group in reversed(list(zip(names, groups, strict=True))) if group]


def randomise(module: nn.Module, names: set[str], images: Tensor, seed: int = 0) -> None:
    """Replace the parameters called `names`, in place, by Gaussian numbers with each tensor's mean and deviation.

    Batch norm statistics among `names` are taken anew from `images` [B, C, H, W], or signals would vanish in or burst from random layers.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in names:
                noise = torch.randn(parameter.shape, generator=random).to(parameter)
                parameter.copy_(parameter.mean() + parameter.std(correction=0) * noise)
        norms = [
            layer
            for name, layer in module.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None and f"{name}.running_mean" in names
        ]
        for layer in norms:
            layer.momentum = None  # the mean over all batches: here, over one
            layer.reset_running_stats()
            layer.train()
        if norms:
            module(torch.cat([images, images.flip(-1)]))
        for layer in norms:
            layer.eval()


def sanity(network: Network, images: Tensor, maps: Array, draw: Callable[[Network], Array]) -> dict[str, float]:
    """{what is random, from the head back to here: mean rank correlation with `maps`} (Adebayo et al. 2018, cascading randomisation).

    maps: [B, H, W], what `draw` makes of `images` [B, C, H, W] and the network; `draw` is called with copies whose weights are more and more
    random. A map that stays as it was shows the images, not the network.
    """
    other = network.copy()
    found, random = {}, set[str]()
    with running(other, images.device):
        for seed, (name, group) in enumerate(cascade(network)):
            random |= group
            randomise(other.module, random, images, seed)
            found[name] = float(np.mean([spearman(before, after) for before, after in zip(maps, draw(other), strict=True)]))
    return found

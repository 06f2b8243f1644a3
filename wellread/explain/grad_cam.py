"""Grad-CAM: where in a picture lies the evidence for a class, and may that map be trusted.

Used on photographs of damaged buildings by Bahrami and Albadvi (2023, arXiv 2302.14354). The maps: Grad-CAM (Selvaraju et al. 2017, arXiv
1610.02391), Grad-CAM++ (Chattopadhyay et al. 2018, arXiv 1710.11063), Layer-CAM (Jiang et al. 2021, doi 10.1109/TIP.2021.3089943), Eigen-CAM
(Muhammad and Yeasin 2020, arXiv 2008.00299). What a map is worth is measured in wellread.maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wellread import runtime
from wellread.batches import network_batches
from wellread.data import Unlabelled, name_of, pixels
from wellread.errors import BadInput
from wellread.features import as_map, running, stages, to_device, trunk
from wellread.inputs import ImageInput
from wellread.maps import coarse_boxes, localisation, masks, sanity
from wellread.method import method
from wellread.network import Network
from wellread.results import Heatmaps
from wellread.structure import layer_of

Variant = Literal["grad-cam", "grad-cam++", "layer-cam", "eigen-cam"]
Array = np.ndarray[Any, np.dtype[Any]]
SANITY_IMAGES = 16  # as many pictures tell whether maps change when the weights do

# --- maps


def cam_weights(activation: Tensor, gradient: Tensor, variant: Variant = "grad-cam") -> Tensor:
    """How much each channel (or each channel at each position) counts: [B, C, 1, 1] or [B, C, h, w].

    activation, gradient: A and dy/dA [B, C, h, w], y the logit.
    "grad-cam": the mean gradient (Selvaraju et al., eq. 1). "grad-cam++": sum of alpha * ReLU(dy/dA) with alpha = g^2 / (2 g^2 + g^3 * sum A)
    (Chattopadhyay et al., eq. 19, without the positive factor exp(y), which normalisation removes). "layer-cam": ReLU(dy/dA) at each position.
    "eigen-cam": the first right singular vector of A as a matrix [h * w, C], signed so that the map's sum is positive; no gradient is used.
    """
    if variant == "grad-cam":
        return gradient.mean((2, 3), keepdim=True)
    if variant == "grad-cam++":
        square = gradient.square()
        below = 2 * square + square * gradient * activation.sum((2, 3), keepdim=True)
        alpha = torch.where(below != 0, square / torch.where(below != 0, below, 1), 0)
        return (alpha * gradient.relu()).sum((2, 3), keepdim=True)
    if variant == "layer-cam":
        return gradient.relu()
    channels = torch.linalg.svd(activation.flatten(2), full_matrices=False).U[:, :, 0]  # of the transpose, hence U
    total = (channels * activation.sum((2, 3))).sum(1, keepdim=True)
    return torch.where(total < 0, -channels, channels)[:, :, None, None]


def cam(activation: Tensor, gradient: Tensor, variant: Variant = "grad-cam") -> Tensor:
    """The weighted sum over channels, signed: [B, h, w]. Its ReLU is the map; where nothing is positive, nothing speaks for the class."""
    return (cam_weights(activation, gradient, variant) * activation).sum(1)


def normalised(raw: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maps [B, H, W] with maximum 1 and the maxima [B] they were divided by, from signed maps [B, h, w].

    ReLU, then bilinear to `size` (pixel areas aligned, not corners), then division. A map without positive evidence becomes zeros, and its
    peak is its signed maximum, zero or less.
    """
    maps = nn.functional.interpolate(raw.relu()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    highest = maps.amax((1, 2))
    return maps / torch.where(highest > 0, highest, 1)[:, None, None], torch.where(highest > 0, highest, raw.amax((1, 2)))


def class_logit(output: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The number [B] that speaks for each row's class, and those classes int64 [B]: the predicted ones when none are given.

    output: logits [B, K]. A single logit, [B] or [B, 1], speaks for class 1, and its negative for class 0.
    Never a probability: where the softmax saturates its gradient is zero.
    """
    if output.ndim == 1 or output.shape[1] == 1:
        single = output.reshape(len(output))
        classes = (single > 0).long() if classes is None else classes
        return torch.where(classes == 1, single, -single), classes
    classes = output.argmax(1) if classes is None else classes
    return output.gather(1, classes[:, None])[:, 0], classes


class Evidence(NamedTuple):
    """Of one batch: `activations` [B, C, h, w] by layer, in the order in which the layers ran, only those that give a map; `gradients` of the
    `logit` [B] in the same shapes; `classes` int64 [B] that the logits speak for."""

    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]
    logit: Tensor
    classes: Tensor


def evidence(network: Network, images: Tensor, layers: Sequence[str], classes: Tensor | None = None) -> Evidence:
    """Activations of `layers` and the gradient of each image's class logit in them. Frozen parameters do no harm; nothing is left behind.

    images: [B, C, H, W] as `network.input` makes them, on the network's device. The network should be in eval mode: batch norm in training
    mode would mix the rows.
    """
    with torch.inference_mode(False), torch.enable_grad(), _tapped(network.module, layers) as caught, runtime.autocast(images.device):
        logit, classes = class_logit(network(images), classes)
    caught = {name: value for name, value in caught.items() if value.ndim in (3, 4)}
    found: Sequence[Tensor | None] = [None] * len(caught)
    if caught and logit.requires_grad:
        found = torch.autograd.grad(logit.sum(), list(caught.values()), allow_unused=True)
    activations, gradients = {}, {}
    for (name, value), gradient in zip(caught.items(), found, strict=True):
        laid_out = as_map(value.detach(), network)
        if laid_out.shape[2] * laid_out.shape[3] > 1:
            exact = torch.promote_types(value.dtype, torch.float32)  # sums of half-precision numbers are made in float32
            activations[name] = laid_out.to(exact)
            gradients[name] = as_map(torch.zeros_like(value) if gradient is None else gradient, network).to(exact)
    return Evidence(activations, gradients, logit.detach(), classes)


@contextmanager
def _tapped(module: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Fills a dict with the outputs of `layers`, ready to be differentiated by. Parameters get no gradient meanwhile, so nothing before the
    first of the layers is differentiated, and a later layer may work in place, because it is handed a copy."""
    caught: dict[str, Tensor] = {}
    hooks = []
    for name in layers:

        def keep(_: nn.Module, __: Any, out: Any, name: str = name) -> Any:
            value = out[0] if isinstance(out, tuple) else out
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return None
            caught.pop(name, None)  # of a layer that runs twice, the last time counts
            caught[name] = value if value.requires_grad else value.detach().requires_grad_()
            copy = caught[name].clone()
            return (copy, *out[1:]) if isinstance(out, tuple) else copy

        hooks.append(layer_of(module, name).register_forward_hook(keep, prepend=True))  # before hooks of the network's own
    required = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield caught
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()


def last_map(network: Network, images: Tensor, classes: Tensor | None = None) -> str:
    """The last layer whose output is a map on which the class depends. Behind a class token the patches of the last block do not count.

    images: [B, C, H, W], a few. Raises `BadInput` when there is none.
    """
    found = evidence(network, images, trunk(network.module), classes)
    for name, gradient in reversed(found.gradients.items()):
        if gradient.abs().max() > 0:
            return name
    raise BadInput(
        "this network has no layer whose output is a map that its answer depends on: Grad-CAM needs convolutions or patch tokens before the head"
        + (f"; those with a map ({', '.join(list(found.gradients)[-4:])}) have no gradient: is the head untrained?" if found.gradients else "")
    )


def heat(
    network: Network, images: Tensor, layers: Sequence[str], classes: Tensor | None = None, variant: Variant = "grad-cam"
) -> tuple[Tensor, Tensor, Evidence]:
    """Maps [B, H, W] with maximum 1 at the size of `images`, their peaks [B], and what they were made from.

    Several layers: the mean of their normalised maps, divided by its maximum; the peak is the highest of the layers'.
    """
    found = evidence(network, images, layers, classes)
    height, width = images.shape[2:]
    each = [normalised(cam(found.activations[name], found.gradients[name], variant), (height, width)) for name in layers]
    if len(each) == 1:
        return *each[0], found
    maps, _ = normalised(torch.stack([maps for maps, _ in each]).mean(0), (height, width))
    return maps, torch.stack([peak for _, peak in each]).amax(0), found


# --- the method


@method
def grad_cam(
    network: Network,
    images: Unlabelled,
    *,
    target: str | None = None,
    variant: Variant = "grad-cam",
    layers: list[str] | None = None,
    sanity_check: bool = False,
    batch_size: int = 16,
) -> Heatmaps:
    """Show where in each picture a network finds the evidence for a class, and say how far the map can be trusted.

    network: a classifier of pictures, or a network that gives an anomaly score (then the score is explained). CNN or transformer.
    images: pictures. With a column `mask` (white on the thing to be found) the maps are scored against it; a column `file` names them.
    target: name or number of the class to look for; by default each picture's predicted class.
    variant: how channels are weighted. layer-cam stays sharp on earlier layers, eigen-cam ignores the class and shows what stands out.
    layers: dotted names of the layers to look at; several are fused as the mean of their normalised maps. By default the last layer whose
        output is a map that the class depends on; with layer-cam, an earlier stage named beside it makes the map finer.
    sanity_check: make the weights random, from the head back to the input, and see whether the maps change as they should.
    batch_size: pictures at a time; the maps do not depend on it.

    The maps have the size of the network's input and maximum 1; times `peak` they are the raw maps. Without any positive evidence a map is
    zeros and its peak zero or less. `columns` holds for each picture the explained score, coarse boxes and, with masks, its marks;
    `figures` their means: pointing game (15 px), energy share and lift, average precision, intersection over union and its bound.
    Raises `BadInput` for a network without maps or classes, an unknown class, and a layer that gives no map.
    Source: arXiv 2302.14354 and 1610.02391.
    """
    source = network.input
    if not isinstance(source, ImageInput):
        raise BadInput("this network does not say that it reads pictures: give one that does, or Network(module, input=ImageInput(...))")
    if network.output not in ("logits", "anomaly_score"):
        raise BadInput(f"this network gives {network.output.replace('_', ' ')}, not classes: train a head first (transfer)")
    if layers is not None and not layers:
        raise BadInput("layers is empty: name at least one layer, or leave it out")
    device, shown = runtime.device(), pixels(images, source)
    batches = network_batches(network, images, batch_size=batch_size, label=False)
    maps, peak, logits, classes = np.empty((len(images), *source.size), np.float32), [], [], []
    figures: dict[str, Any] = {}
    warnings: list[str] = []
    with torch.inference_mode(False), running(network, device):
        first = source.normalise(torch.from_numpy(shown[:SANITY_IMAGES].copy())).to(device)
        wanted = _class_number(network, target, first[:1])
        if layers is None:
            layers = [last_map(network, first[:4], _repeated(wanted, first[:4]))]
        probe = evidence(network, first[:4], layers, _repeated(wanted, first[:4]))
        if missing := [name for name in layers if name not in probe.activations]:
            raise BadInput(f"the layer {missing[0]!r} gives no map: choose one such as {', '.join(stages(network))}")
        if variant != "eigen-cam" and all(gradient.abs().max() == 0 for gradient in probe.gradients.values()):
            warnings.append(f"the class does not depend on the positions in {', '.join(layers)}: leave layers out, and one that counts is found")
        for batch in runtime.track(batches.epoch(0), f"maps of {name_of(images)}", total=len(batches)):
            given = to_device(batch["inputs"], device)
            found_maps, found_peak, found = heat(network, given, layers, _repeated(wanted, given), variant)
            maps[batch["index"].numpy()] = found_maps.cpu().numpy()
            peak += found_peak.tolist()
            logits += found.logit.tolist()
            classes += found.classes.tolist()
        grids = [(probe.activations[name].shape[2], probe.activations[name].shape[3]) for name in layers]
        figures["layers"], figures["grid"] = ", ".join(layers), ", ".join(f"{height} x {width}" for height, width in grids)
        if sanity_check:
            numbers, chosen = torch.tensor(classes[: len(first)], device=device), layers
            same = sanity(network, first, maps[: len(first)], lambda other: heat(other, first, chosen, numbers, variant)[0].cpu().numpy())
            figures |= {f"similarity with random weights down to {name}": value for name, value in same.items()}
            if (last := list(same.values())[-1]) > 0.7:
                warnings.append(f"with all weights random the maps are still similar (Spearman {last:.2f}): they show the image, not the model")
    columns: dict[str, list[Any]] = {"score": logits, "boxes": [coarse_boxes(each) for each in maps]}
    found_masks = masks(images, source)
    marks = [localisation(each, mask, max(grids)) if mask is not None else {} for each, mask in zip(maps, found_masks, strict=True)]
    if scored := [row for row, each in enumerate(marks) if each]:
        figures["pictures with a mask"] = len(scored)
        for name in marks[scored[0]]:
            columns[name] = [each.get(name) for each in marks]
            figures[name] = float(np.mean([marks[row][name] for row in scored]))
        if wanted is None and len({classes[row] for row in scored}) > 1:
            warnings.append("the pictures with a mask were not all given the same class, and each map speaks for its own: name the target")
    if nothing := sum(value <= 0 for value in peak):
        warnings.append(f"{nothing} of {len(images)} maps are empty: nothing in those pictures speaks for the class")
    names = [_class_name(network, number) for number in classes]
    files = list(images["file"]) if "file" in images.column_names else None
    pictures = np.asarray(shown).transpose(0, 2, 3, 1)
    pictures = pictures[..., 0] if source.channels == 1 else pictures
    return Heatmaps(maps, pictures, names, np.array(peak), files, figures=figures, columns=columns, warnings=warnings)


def _repeated(wanted: int | None, images: Tensor) -> Tensor | None:
    return None if wanted is None else torch.full((len(images),), wanted, device=images.device)


def _class_number(network: Network, target: str | None, image: Tensor) -> int | None:
    """The class that is meant; None for the predicted one. An anomaly score counts as a single logit for class 1."""
    with torch.inference_mode():
        shape = tuple(network(image).shape[1:])
    if network.output == "anomaly_score":
        if target is not None or shape not in ((), (1,)):
            raise BadInput("this network gives one anomaly score and has no classes: leave target out")
        return 1
    if len(shape) > 1:
        raise BadInput(f"this network's output is {['B', *shape]}: a classifier gives [B, classes]")
    if target is None:
        return None
    count = 2 if shape in ((), (1,)) else shape[0]
    names = [_class_name(network, number) for number in range(count)]
    if target in names:
        return names.index(target)
    if target.isdecimal() and int(target) < count:
        return int(target)
    near = get_close_matches(target, names, n=3) or [*names[:6], *["..."] * (count > 6)]
    raise BadInput(f"there is no class {target!r}: the network has {', '.join(near)} (or numbers 0 to {count - 1})")


def _class_name(network: Network, number: int) -> str:
    names = network.labels or (("normal", "anomalous") if network.output == "anomaly_score" else ())
    if len(names) == 1:  # one logit, one name: that of class 1
        return names[0] if number else f"not {names[0]}"
    return names[number] if number < len(names) else str(number)

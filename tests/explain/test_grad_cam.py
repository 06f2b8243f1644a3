"""Grad-CAM against closed forms and captum; it leaves no trace; its scores are what they say."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from torch import Tensor, nn

import wellread
from wellread.errors import BadInput
from wellread.explain.grad_cam import cam, cam_weights, class_logit, evidence, grad_cam, heat, last_map, normalised
from wellread.inputs import ImageInput
from wellread.maps import (
    cascade,
    coarse_boxes,
    deletion_insertion,
    energy_share,
    grid_bound,
    localisation,
    masks,
    otsu,
    pointing_game,
    randomise,
    sanity,
    spearman,
)
from wellread.network import Network

VARIANTS = ("grad-cam", "grad-cam++", "layer-cam", "eigen-cam")


class Plain(nn.Module):
    """Convolutions, global average pool, linear."""

    def __init__(self, classes: int = 3, inplace: bool = False, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=inplace)
        self.second = nn.Conv2d(8, 6, 3)
        self.last = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(6, classes)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.second(self.act(self.norm(self.first(x)))))
        x = self.head(x.mean((2, 3)))
        return x[:, 0] if self.flat else x


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3 * 16 * 16, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)).relu())


class Brightness(nn.Module):
    """Class 1 for pictures with something bright: its map is the brightness of 4 x 4 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.AvgPool2d(4)
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))
            self.head.bias.copy_(torch.tensor([0.5, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def network(module: nn.Module | None = None, side: int = 16, **more: Any) -> Network:
    return Network(module or Plain(), input=ImageInput((side, side), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest"), **more)


def noise(rows: int = 4, side: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def table(rows: int = 5, side: int = 16, **columns: list[Any]) -> Dataset:
    random = np.random.default_rng(0)
    features = {"image": Image()} | {name: Image() for name in columns}
    pictures = [Picture.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(rows)]
    return Dataset.from_dict({"image": pictures} | columns, features=Features(features))


def squares() -> Dataset:
    """Black pictures with a white square in another corner each, its mask, one without a mask, and one with an empty mask."""
    pictures = np.zeros((4, 32, 32), np.uint8)
    for row, (y, x) in enumerate([(0, 0), (16, 4), (8, 20), (20, 20)]):
        pictures[row, y : y + 8, x : x + 8] = 255
    given = [Picture.fromarray(pictures[0]), Picture.fromarray(pictures[1]), None, Picture.fromarray(np.zeros((32, 32), np.uint8))]
    return Dataset.from_dict(
        {"image": [Picture.fromarray(each) for each in pictures], "mask": given, "label": [1, 1, 1, 1], "file": ["a.png", "b.png", "c.png", "d.png"]},
        features=Features({"image": Image(), "mask": Image(), "label": ClassLabel(names=["dark", "bright"]), "file": Value("string")}),
    )


# ---- the maps


def test_it_is_the_class_activation_map_before_a_global_average_pool():
    net, images = network(), noise()
    classes = torch.tensor([0, 1, 2, 1])
    found = evidence(net, images, ["last"], classes)
    active, module = found.activations["last"], net.module
    positions = active.shape[2] * active.shape[3]
    map_of_class = torch.einsum("bc,bchw->bhw", module.head.weight[classes], active).detach()
    raw = cam(active, found.gradients["last"])
    torch.testing.assert_close(raw, map_of_class / positions, rtol=0, atol=1e-6)
    torch.testing.assert_close(raw.sum((1, 2)), found.logit - module.head.bias[classes].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layer"), [("timm/test_efficientnet", "bn2"), ("timm/test_convnext", "stages.2"), ("torchvision/resnet18", "layer4")]
)
def test_it_agrees_with_captum(name: str, layer: str):
    from captum.attr import LayerGradCam

    net = wellread.load(name, pretrained=False)
    images, classes = noise(2, 64), torch.tensor([3, 700])
    ours = evidence(net, images, [layer], classes)
    theirs = LayerGradCam(net.module, net.module.get_submodule(layer)).attribute(images, target=classes, relu_attributions=True)[:, 0].detach()
    mine = cam(ours.activations[layer], ours.gradients[layer]).relu()
    assert theirs.max() > 0
    torch.testing.assert_close(mine / theirs.max(), theirs / theirs.max(), rtol=0, atol=1e-5)


def test_a_transformer_agrees_with_its_gradient_taken_by_hand():
    net, images = wellread.load("timm/test_vit", pretrained=False), noise(2, 160)
    tokens = net.module.patch_embed(images)
    tokens = net.module.norm_pre(net.module.patch_drop(net.module._pos_embed(tokens)))
    for block in net.module.blocks[:5]:
        tokens = block(tokens)
    tokens = tokens.detach().requires_grad_()
    logits = net.module.forward_head(net.module.norm(net.module.blocks[5](tokens)))
    (gradient,) = torch.autograd.grad(logits[:, 7].sum(), tokens)
    by_hand = (gradient[:, 1:].mean(1, keepdim=True) * tokens[:, 1:]).sum(2).unflatten(1, (10, 10)).detach()
    found = evidence(net, images, ["blocks.4"], torch.tensor([7, 7]))
    ours = cam(found.activations["blocks.4"], found.gradients["blocks.4"])
    torch.testing.assert_close(ours / by_hand.abs().max(), by_hand / by_hand.abs().max(), rtol=0, atol=1e-5)


def test_the_variants_are_their_formulas():
    random = torch.Generator().manual_seed(3)
    a, g = (torch.randn(2, 3, 4, 5, generator=random, dtype=torch.float64) for _ in range(2))
    a, g = a.abs(), g * (g.abs() > 0.3)
    plus = np.zeros((2, 4, 5))
    for b, c in itertools.product(range(2), range(3)):
        below = 2 * g[b, c] ** 2 + g[b, c] ** 3 * a[b, c].sum()
        weight = sum(float(v**2 / d * max(v, 0)) for v, d in zip(g[b, c].flatten(), below.flatten(), strict=True) if v != 0)
        plus[b] += weight * a[b, c].numpy()
    np.testing.assert_allclose(cam(a, g, "grad-cam++"), plus, rtol=1e-9)
    np.testing.assert_allclose(cam(a, g, "layer-cam"), (g.clamp(min=0) * a).sum(1), rtol=1e-12)
    np.testing.assert_allclose(cam(a, g), sum(g[:, c].mean((1, 2))[:, None, None] * a[:, c] for c in range(3)), rtol=1e-12)
    for b in range(2):
        u, s, vt = np.linalg.svd(a[b].flatten(1).T.numpy())  # positions x channels
        np.testing.assert_allclose(cam(a, g, "eigen-cam")[b].flatten(), np.abs(u[:, 0] * s[0]), rtol=1e-9)
        assert cam_weights(-a, g, "eigen-cam").shape == (2, 3, 1, 1)
        assert (cam(-a, g, "eigen-cam")[b].sum() > 0) and abs(np.linalg.norm(vt[0]) - 1) < 1e-9


def test_no_channel_with_a_zero_gradient_makes_a_nan():
    zero = torch.zeros(1, 2, 3, 3)
    for variant in VARIANTS:
        assert torch.equal(cam(zero, zero, variant), torch.zeros(1, 3, 3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_and_offset_of_the_logit_do_not_count(variant: Any):
    net, images, classes = network(), noise(), torch.tensor([0, 1, 2, 1])
    before, peak, _ = heat(net, images, ["second"], classes, variant)
    scale = 1 if variant == "grad-cam++" else 7  # whose alpha holds the third power of the gradient beside the second
    with torch.no_grad():
        net.module.head.weight.mul_(scale)
        net.module.head.bias.add_(100)
    after, peak_after, _ = heat(net, images, ["second"], classes, variant)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)
    torch.testing.assert_close(peak_after, (1 if variant == "eigen-cam" else scale) * peak)


def test_a_saturated_probability_still_has_a_map():
    net = network()
    with torch.no_grad():
        net.module.head.weight.mul_(1e4)
    maps, peak, found = heat(net, noise(), ["last"])
    assert (class_logit(net(noise()))[0].detach() == found.logit).all()
    assert net(noise()).softmax(1).max(1).values.min() > 1 - 1e-6
    assert (peak > 0).all() and (maps.amax((1, 2)) == 1).all()


def test_a_batch_is_its_pictures_and_double_precision_the_same():
    data = table(5)
    many, one = grad_cam(network(), data, batch_size=5), grad_cam(network(), data, batch_size=1)
    np.testing.assert_allclose(many.maps, one.maps, rtol=0, atol=1e-5)
    np.testing.assert_allclose(many.peak, one.peak, rtol=1e-4)
    assert many.targets == one.targets
    for name, side in (("timm/test_efficientnet", 64), ("timm/test_vit", 160)):
        net, images = wellread.load(name, pretrained=False), noise(1, side)
        layer, classes = last_map(net, images), torch.tensor([1])
        single = heat(net, images, [layer], classes)[0]
        net.module.double()
        torch.testing.assert_close(single.double(), heat(net, images.double(), [layer], classes)[0], rtol=0, atol=1e-4)


def test_no_positive_evidence_gives_zeros_and_a_flag():
    module = Plain()
    with torch.no_grad():
        module.head.weight[1].copy_(-module.head.weight[1].abs())
        module.head.weight[2].zero_()
    found = grad_cam(network(module), table(3), target="1")
    assert (found.maps == 0).all() and (found.peak < 0).all()
    assert found.warnings == ["3 of 3 maps are empty: nothing in those pictures speaks for the class"]
    assert found.columns["boxes"] == [[], [], []]
    with pytest.raises(BadInput, match="untrained"):  # a class that nothing leads to
        grad_cam(network(module), table(3), target="2")
    named = grad_cam(network(module), table(3), target="2", layers=["last"])
    assert (named.peak == 0).all() and "does not depend on the positions in last" in named.warnings[0]


def test_maps_times_peak_are_the_raw_maps():
    found, net = grad_cam(network(), table(4), target="0", layers=["last"]), network()
    ours = evidence(net, net.input(table(4)["image"]), ["last"], torch.zeros(4, dtype=torch.long))
    raw = cam(ours.activations["last"], ours.gradients["last"]).relu()[:, None]
    raw = nn.functional.interpolate(raw, (16, 16), mode="bilinear", align_corners=False)[:, 0].numpy()
    np.testing.assert_allclose(found.maps * np.maximum(found.peak, 0)[:, None, None], raw, rtol=0, atol=1e-6)
    assert found.maps.dtype == np.float32 and (found.maps.max((1, 2)) == np.where(found.peak > 0, 1, 0)).all()


def test_pixel_areas_are_aligned_not_corners():
    maps, peak = normalised(torch.tensor([[[0.0, 4.0]], [[-1.0, -3.0]]]), (1, 4))
    assert maps[0, 0].tolist() == [0, 0.25, 0.75, 1] and peak.tolist() == [4, -1]
    assert maps[1, 0].tolist() == [0, 0, 0, 0]


def test_several_layers_are_the_mean_of_their_maps():
    net, images, classes = network(), noise(), torch.tensor([0, 1, 2, 1])
    each = [heat(net, images, [name], classes, "layer-cam") for name in ("act", "last")]
    mean = (each[0][0] + each[1][0]) / 2
    maps, peak, _ = heat(net, images, ["act", "last"], classes, "layer-cam")
    torch.testing.assert_close(maps, mean / mean.amax((1, 2), keepdim=True))
    assert torch.equal(peak, torch.maximum(each[0][1], each[1][1]))


# ---- which layer, which class


@pytest.mark.parametrize(
    ("name", "layer", "grid"),
    [
        ("timm/test_vit", "blocks.4", (10, 10)),  # the last block's patches do not reach the class token
        ("timm/test_efficientnet", "bn2", (2, 3)),
        ("timm/test_resnet", "layer4.0", (2, 3)),
        ("timm/test_convnext", "norm_pre", (2, 3)),
    ],
)
def test_the_last_layer_that_counts_is_found(name: str, layer: str, grid: tuple[int, int]):
    net = wellread.load(name, pretrained=False)
    if name != "timm/test_vit":  # which takes one size only
        net.input = net.input.changed(size=(64, 96))
    found = grad_cam(net, table(2, 40), target="5")
    assert found.maps.shape == (2, *net.input.size) and (found.peak > 0).any()
    assert found.figures["layers"] == layer and found.figures["grid"] == f"{grid[0]} x {grid[1]}"


def test_patches_behind_a_class_token_have_no_gradient_and_those_of_a_mean_have():
    images = noise(1, 160)
    token = wellread.load("timm/test_vit", pretrained=False)
    assert evidence(token, images, ["blocks.5"]).gradients["blocks.5"].abs().max() == 0
    mean = wellread.load("timm/test_vit", pretrained=False, global_pool="avg")
    assert last_map(mean, images) in ("blocks.5", "norm")


@pytest.mark.parametrize("classes", [1, 2])
def test_a_single_logit_speaks_against_class_0(classes: int):
    single = Plain(1, flat=classes == 1)  # [B] and [B, 1]
    both = Plain(2)
    both.load_state_dict(single.state_dict() | {"head.weight": torch.cat([-single.head.weight, single.head.weight]), "head.bias": torch.zeros(2)})
    with torch.no_grad():
        single.head.bias.zero_()
    for target in ("intact", "broken", None):
        one = grad_cam(network(single, labels=("intact", "broken")), table(), target=target, layers=["second"])
        two = grad_cam(network(both, labels=("intact", "broken")), table(), target=target, layers=["second"])
        np.testing.assert_allclose(one.maps, two.maps, rtol=0, atol=1e-6)
        assert one.targets == two.targets


def test_an_anomaly_score_is_explained_itself():
    module = Plain(1, flat=True)
    found = grad_cam(network(module, output="anomaly_score"), table())
    logit = grad_cam(network(module), table(), target="1")
    assert np.array_equal(found.maps, logit.maps) and found.targets == ["anomalous"] * 5
    with pytest.raises(BadInput, match="leave target out"):
        grad_cam(network(module, output="anomaly_score"), table(), target="1")


def test_the_class_is_the_predicted_one_or_the_named_one():
    net = network(labels=("a", "b", "2"))
    data = table(6)
    predicted = wellread.predict(net, data)
    assert grad_cam(net, data).targets == [net.labels[k] for k in predicted.argmax(1)]
    named = grad_cam(net, data, target="b")
    assert named.targets == ["b"] * 6 and np.array_equal(named.maps, grad_cam(net, data, target="1").maps)
    np.testing.assert_allclose(named.columns["score"], predicted[:, 1], rtol=1e-5)
    assert grad_cam(net, data, target="2").targets == ["2"] * 6  # a name that looks like a number


# ---- traps


def test_layers_that_work_in_place_do_not_change_what_was_captured():
    images, classes = noise(), torch.tensor([0, 1, 2, 1])
    plain, inplace = (evidence(network(Plain(inplace=flag)), images, ["norm", "second"], classes) for flag in (False, True))
    assert plain.activations["second"].min() < 0
    for kind in ("activations", "gradients"):
        for name in ("norm", "second"):
            assert torch.equal(getattr(plain, kind)[name], getattr(inplace, kind)[name])


def test_frozen_parameters_and_a_caller_without_gradients_do_not_matter():
    frozen = Plain().requires_grad_(False)
    with torch.inference_mode():
        found = grad_cam(network(frozen), table(), target="1", layers=["second"])
    assert np.array_equal(found.maps, grad_cam(network(), table(), target="1", layers=["second"]).maps) and (found.peak > 0).any()


def test_nothing_is_left_behind():
    net = network()
    net.module.norm.train()
    net.module.first.requires_grad_(False)
    calls = []
    net.module.second.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    random = torch.get_rng_state()
    grad_cam(net, table(), sanity_check=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.module.state_dict().items())
    assert [name for name, layer in net.module.named_modules() if layer.training] == ["norm"]
    assert {name for name, p in net.module.named_parameters() if not p.requires_grad} == {"first.weight", "first.bias"}
    assert all(p.grad is None for p in net.module.parameters())
    assert [len(layer._forward_hooks) for layer in net.module.modules()] == [0, 0, 0, 0, 1, 0, 0] and calls
    assert torch.equal(random, torch.get_rng_state())


def test_the_images_are_left_alone_by_a_layer_that_passes_them_on():
    net, images = network(nn.Sequential(nn.Identity(), Plain())), noise()
    assert evidence(net, images, ["0"]).gradients["0"].abs().max() > 0
    assert not images.requires_grad and images.grad_fn is None


def test_a_hook_of_the_network_itself_sees_the_differentiable_map():
    class Hooked(Plain):
        """Its score is taken from what a hook of its own has caught, as a network made of another's layers does."""

        def __init__(self) -> None:
            super().__init__(1)
            self.last.register_forward_hook(lambda _, __, out: setattr(self, "caught", out))

        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return self.caught.square().mean((1, 2, 3))

    assert evidence(network(Hooked(), output="anomaly_score"), noise(), ["last"]).gradients["last"].abs().max() > 0


# ---- what a map is worth


def test_marks_of_maps_that_are_known():
    mask = np.zeros((20, 30), bool)
    mask[2:8, 5:15] = True
    same = localisation(mask.astype(np.float32), mask, (5, 5))
    assert same["energy_share"] == same["average_precision"] == same["iou_at_half"] == same["pointing_game"] == 1
    assert same["energy_lift"] == pytest.approx(10)
    uniform = localisation(np.ones((20, 30), np.float32), mask, (5, 5))
    assert uniform["energy_share"] == pytest.approx(0.1) and uniform["energy_lift"] == pytest.approx(1)
    assert uniform["average_precision"] == uniform["iou_at_half"] == pytest.approx(0.1)
    nothing = localisation(np.zeros((20, 30), np.float32), mask, (5, 5))
    assert nothing["energy_share"] == nothing["pointing_game"] == nothing["iou_at_half"] == 0


def test_pointing_allows_fifteen_pixels():
    mask, point = np.zeros((40, 40), bool), np.zeros((2, 40, 40))
    mask[0, 0] = True
    point[0, 9, 12] = point[1, 9, 13] = 1  # 15 and 15.8 pixels away
    assert [pointing_game(each, mask) for each in point] == [True, False]
    assert not pointing_game(point[0], mask, dilate=14) and not pointing_game(point[0], np.zeros((40, 40), bool))
    chance = localisation(point[0], mask, (4, 4))["pointing_by_chance"]
    inside = sum(y * y + x * x <= 225 for y in range(40) for x in range(40))
    assert chance == pytest.approx(inside / 1600)


def test_the_bound_of_the_grid_is_the_best_of_all_choices():
    random = np.random.default_rng(0)
    choices = [np.array(chosen).reshape(2, 3) for chosen in itertools.product((False, True), repeat=6)]
    every = np.stack([cells[np.arange(5)[:, None] * 2 // 5, np.arange(7) * 3 // 7] for cells in choices])  # of unequal cells
    for _ in range(60):
        mask = random.random((5, 7)) < random.random()
        mask[0, 0] = True
        best = ((every & mask).sum((1, 2)) / (every | mask).sum((1, 2))).max()
        assert grid_bound(mask, (2, 3)) == pytest.approx(best)
    assert grid_bound(np.kron(np.eye(3, dtype=bool), np.ones((4, 5), bool)), (3, 3)) == 1
    assert grid_bound(mask, (5, 7)) == 1


def test_boxes_are_the_regions_above_half():
    heat = np.zeros((20, 20), np.float32)
    heat[2:6, 3:9], heat[12:18, 10:12], heat[0, 19], heat[5, 3] = 0.8, 1.0, 1.0, 0.6  # the single pixel is below 1 % of the area
    first, second = coarse_boxes(heat)
    assert first == {"left": 10, "top": 12, "right": 12, "bottom": 18, "score": 1.0}
    assert second == {"left": 3, "top": 2, "right": 9, "bottom": 6, "score": pytest.approx((23 * 0.8 + 0.6) / 24)}
    assert len(coarse_boxes(heat, 0.9)) == 1 and len(coarse_boxes(heat, smallest=0)) == 3 and coarse_boxes(0 * heat) == []
    assert [box["score"] for box in coarse_boxes(heat, "otsu")] == [1.0, pytest.approx(0.79166, abs=1e-4)]


def test_otsu_agrees_with_scikit_image():
    from skimage.filters import threshold_otsu

    random = np.random.default_rng(0)
    values = np.concatenate([random.normal(0.2, 0.05, 900), random.normal(0.7, 0.1, 300)]).reshape(30, 40)
    assert otsu(values) == pytest.approx(threshold_otsu(values), abs=1e-6)


def test_deletion_and_insertion_of_a_score_that_counts_pixels():
    image = torch.zeros(1, 16, 16)
    image[:, :, :8] = torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) + 1

    def untouched(batch: Tensor) -> Tensor:  # the part of the left half that is as it was
        return (batch[:, 0, :, :8] == image[0, :, :8]).double().mean((1, 2))

    left, right = torch.zeros(16, 16), torch.zeros(16, 16)
    left[:, :8], right[:, 8:] = 1, 1
    # the left half goes first: from 1 to 0 in half of the way; or last: 1 for half of the way, then down
    assert deletion_insertion(untouched, image, left, steps=16) == (pytest.approx(0.25), pytest.approx(0.75))
    assert deletion_insertion(untouched, image, right, steps=16) == (pytest.approx(0.75), pytest.approx(0.25))
    deletion, insertion = deletion_insertion(untouched, image, torch.zeros(16, 16), steps=20)  # ties in random order
    assert deletion == pytest.approx(0.5, abs=0.05) and deletion + insertion == pytest.approx(1)


def test_masks_are_cut_like_the_pictures_whatever_their_values():
    wide = np.zeros((16, 32), np.uint8)
    wide[:, 20:] = 1
    noisy = wide * 250 + np.random.default_rng(0).integers(0, 5, wide.shape).astype(np.uint8)
    data = table(4, mask=[Picture.fromarray(wide), Picture.fromarray(noisy), None, Picture.fromarray(0 * wide)])
    found = masks(data, ImageInput((8, 8), crop=0.999))
    expected = np.zeros((8, 8), bool)
    expected[:, 6:] = True  # the middle 16 columns are 8...23 of 32, of which 20...23 are marked
    assert np.array_equal(found[0], expected) and np.array_equal(found[1], expected) and found[2] is None and found[3] is None
    assert masks(table(2), ImageInput()) == [None, None]


def test_masks_are_scored_and_files_named():
    net = network(Brightness(), 32, labels=("dark", "bright"))
    found = grad_cam(net, squares(), target="bright")
    assert found.items == ["a.png", "b.png", "c.png", "d.png"] and found.figures["pictures with a mask"] == 2
    assert found.figures["pointing_game"] == 1 and found.figures["iou_bound"] == 1 and found.figures["grid"] == "8 x 8"
    shares = [energy_share(found.maps[row], np.array(squares()[row]["mask"]) > 0) for row in (0, 1)]
    assert found.columns["energy_share"] == [pytest.approx(shares[0]), pytest.approx(shares[1]), None, None]
    assert found.figures["energy_share"] == pytest.approx(np.mean(shares)) and min(shares) > 0.6
    inside = found.maps[1][found.maps[1] >= 0.5].mean()
    assert found.columns["boxes"][1] == [{"left": 4, "top": 16, "right": 12, "bottom": 24, "score": pytest.approx(inside)}]
    assert not found.warnings
    with torch.no_grad():
        net.module.head.weight[0] = 0
        net.module.head.bias[0] = 0.1  # a square has a brightness of 0.19
    dimmed = squares().map(lambda row, i: {"image": Picture.fromarray(np.array(row["image"]) // (1 + 2 * (i == 0)))}, with_indices=True)
    found = grad_cam(net, dimmed)
    assert found.targets[:2] == ["dark", "bright"] and "name the target" in found.warnings[0]


def test_any_kind_of_picture_is_shown_as_the_network_sees_it():
    pictures = [Picture.new(mode, (20, 24), 60 if mode in "L" else None) for mode in ("L", "RGBA", "CMYK", "1")]
    data = Dataset.from_dict({"image": pictures}, features=Features({"image": Image()}))
    found = grad_cam(network(), data, layers=["second"])
    assert found.images.shape == (4, 16, 16, 3) and (found.images[0] == 60).all()


# ---- the sanity check


def test_the_cascade_goes_from_the_head_to_the_input_and_holds_every_tensor_once():
    for name in ("timm/test_efficientnet", "timm/test_vit"):
        net = wellread.load(name, pretrained=False)
        groups = cascade(net)
        everything = [tensor for _, group in groups for tensor in group]
        assert sorted(everything) == sorted(net.module.state_dict())
        assert groups[0][0] == "head" and net.head + ".weight" in groups[0][1]
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= groups[-1][1]


def test_randomising_keeps_the_moments_and_takes_the_statistics_anew():
    net, images = network(Plain()), noise(64, 32)
    net.module.norm.num_batches_tracked.fill_(10)  # as after training
    before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    randomise(net.module, {"first.weight", "first.bias", "norm.running_mean", "norm.running_var"}, images)
    after = net.module.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "first.weight", "first.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    weight = after["first.weight"]
    assert float(weight.std()) == pytest.approx(float(before["first.weight"].std()), rel=0.2) and abs(weight.mean()) < 0.05
    given = net.module.first(torch.cat([images, images.flip(-1)]))
    torch.testing.assert_close(after["norm.running_mean"], given.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not net.module.norm.training


def test_in_the_cascade_statistics_follow_the_layers_before_them():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net, images, steps = network(nn.Sequential(*layers, nn.Linear(6, 2))), noise(), []

    def draw(other: Network) -> np.ndarray:
        assert other is not net
        reached = other.module[:4](torch.cat([images, images.flip(-1)]))
        off = (other.module[4].running_mean - reached.detach().mean((0, 2, 3))).abs().max().item()
        steps.append((off, torch.equal(other.module[0].weight, layers[0].weight)))
        return np.ones((4, 16, 16))

    assert list(sanity(net, images, np.ones((4, 16, 16)), draw)) == ["head", "4", "2"]
    assert [same for _, same in steps] == [True, True, False]
    assert steps[0][0] > 0.1  # the head changes no statistics
    assert max(off for off, _ in steps[1:]) < 1e-3  # running variances divide by n - 1, those of the batch by n


def test_the_sanity_check_tells_a_map_of_the_image_from_a_map_of_the_model():
    shown = grad_cam(network(Brightness(), 32, labels=("dark", "bright")), squares(), variant="eigen-cam", layers=["blocks"], sanity_check=True)
    assert "they show the image, not the model" in shown.warnings[-1]  # no weight is before the map
    net = wellread.load("timm/test_resnet", pretrained=False)
    net.input = net.input.changed(size=(96, 96))
    images = noise(4, 96)
    maps, _, found = heat(net, images, ["layer4.0"])
    same = sanity(net, images, maps.numpy(), lambda other: heat(other, images, ["layer4.0"], found.classes)[0].numpy())
    assert next(iter(same)) == "head" and list(same)[-1] == "conv1.5" and abs(same["conv1.5"]) < 0.7


def test_rank_correlation_agrees_with_scipy():
    from scipy.stats import spearmanr

    random = np.random.default_rng(0)
    a, b = random.integers(0, 5, (2, 9, 9)).astype(float)
    assert spearman(a, b) == pytest.approx(spearmanr(a.ravel(), b.ravel()).statistic) and spearman(a, a**3) == pytest.approx(1)
    assert spearman(a, np.zeros((9, 9))) == 0


# ---- from the outside


def test_the_result_comes_back_in_a_new_process(tmp_path: Path):
    net = wellread.load("timm/test_efficientnet", pretrained=False)
    net.input = net.input.changed(size=(64, 64))
    net.save(tmp_path / "net")
    (tmp_path / "photos").mkdir()
    for row, each in enumerate(squares()):
        each["image"].save(tmp_path / "photos" / f"{row}.png")
    found = grad_cam(net, f"folder:{tmp_path / 'photos'}", target="1", sanity_check=True)
    found.save(tmp_path / "out")
    code = f"""
import numpy as np, wellread
from wellread.explain.grad_cam import grad_cam
saved = wellread.load_result(r"{tmp_path / "out"}")
np.save(r"{tmp_path / "saved.npy"}", saved.maps)
np.save(r"{tmp_path / "again.npy"}", grad_cam(wellread.load(r"{tmp_path / "net"}"), r"folder:{tmp_path / "photos"}", target="1").maps)
print(saved.figures, saved.columns, saved.warnings)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert said == f"{found.figures} {found.columns} {found.warnings}"
    assert np.array_equal(np.load(tmp_path / "saved.npy"), found.maps)
    np.testing.assert_allclose(np.load(tmp_path / "again.npy"), found.maps, atol=1e-6)
    assert found.made_by["method"] == "grad-cam" and found.items == ["0.png", "1.png", "2.png", "3.png"]
    assert "similarity with random weights" in found.html()


@pytest.mark.parametrize(
    ("wrong", "arguments", "words"),
    [
        (lambda: network(labels=("crack", "free", "hole")), {"target": "crak"}, "no class 'crak'.*crack"),
        (network, {"target": "3"}, "no class '3'.*0 to 2"),
        (network, {"target": "-1"}, "no class '-1'"),
        (network, {"layers": ["seccond"]}, "no layer 'seccond'.*second"),
        (network, {"layers": ["head"]}, "'head' gives no map: choose one such as .*last"),
        (network, {"layers": []}, "layers is empty"),
        (network, {"batch_size": 0}, "batch_size is 0"),
        (network, {"variant": "score-cam"}, "choose one of 'grad-cam'"),
        (lambda: network(Vectors()), {}, "no layer whose output is a map"),
        (lambda: network(output="embedding"), {}, "gives embedding, not classes"),
        (lambda: Network(Plain()), {}, "does not say that it reads pictures"),
        (lambda: network(nn.Conv2d(3, 2, 3)), {}, "a classifier gives"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(wrong: Any, arguments: dict[str, Any], words: str):
    with pytest.raises(BadInput, match=words) as refused:
        grad_cam(wrong(), table(2), **arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["timm/test_efficientnet", "timm/test_vit"])
def test_half_precision_on_a_gpu_gives_nearly_the_same(name: str):
    net, data = wellread.load(name, pretrained=False), table(3, 160)
    with wellread.using(device="cpu"):
        exact = grad_cam(net, data, target="3")
    with wellread.using(device="cuda", precision="bfloat16"):
        half = grad_cam(net, data, target="3")
    assert [round(spearman(a, b), 1) >= 0.9 for a, b in zip(exact.maps, half.maps, strict=True)] == [True] * 3

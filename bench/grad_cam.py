"""Grad-CAM on photographs of magnetic tiles with pixel masks: does a classifier that saw only "free" or "defective" show where the defect is?

Baselines in the same run: a map that is uniform, a Gaussian in the centre, Sobel edges, Grad-CAM of the same network with random weights.
Run with WELLREAD_DATA naming the folder of data sets; --quick tries it out on a few pictures and records nothing.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor, nn

import wellread
from bench.harness import Expect, record
from wellread import runtime
from wellread.batches import network_batches, tensor_batches
from wellread.data import class_names, labels, load_data, subset
from wellread.evaluate import score
from wellread.explain.grad_cam import grad_cam
from wellread.features import embed, running
from wellread.maps import deletion_insertion, localisation, masks, randomise
from wellread.network import Network
from wellread.train import fit

QUICK = "--quick" in sys.argv
SEEDS = [0] if QUICK else [0, 1, 2]
EPOCHS = 1 if QUICK else 4
SIDE = 224
TRAINED = ("blocks.5", "blocks.6", "conv_head", "bn2", "classifier")
DELETED = 2 if QUICK else 10  # pictures per seed for the deletion curves
MARKS = ("energy_lift", "energy_share", "pointing_game", "average_precision", "iou_at_half")

EXPECTS = [
    Expect("on tiles never seen, Grad-CAM puts at least 1.5 times as much of its energy on the defect as a uniform map", "grad_cam_energy_lift", 1.5),
    Expect("its energy lift is above that of a Gaussian in the centre", "grad_cam_energy_lift - centre_energy_lift", 0.0),
    Expect("its energy lift is above that of Sobel edges", "grad_cam_energy_lift - sobel_energy_lift", 0.0),
    Expect("its energy lift is above that of the same network with random weights", "grad_cam_energy_lift - random_weights_energy_lift", 0.0),
    Expect(
        "blurring what it marks lowers the probability of a defect sooner than blurring what a random map marks (lower end of the 95 % interval)",
        "deletion_gain_low", 0.0,
    ),
    Expect("with all weights random the maps are no longer similar (rank correlation)", "similarity_when_random", 0.7, at_least=False),
    Expect(
        "Layer-CAM fused over the last two resolutions finds defect pixels at least as precisely as Grad-CAM (average precision)",
        "fused_average_precision - grad_cam_average_precision", 0.0,
    ),
]  # fmt: skip


def tiles() -> tuple[Dataset, np.ndarray, list[str]]:
    """Photographs, the number of the tile on each, and the kind of defect.

    A tile was photographed under six lights in a row, some of them several times: frame numbers less than 2,000 apart count as one tile. Only
    the first two lights (and the three pictures of "exp0") have tiles without a defect: with the others, the light alone would tell the classes.
    """
    data = load_data("magnetic-tiles")
    parts = [re.search(r"exp(\d)_num_(\d+)", file) for file in data["file"]]
    frames = np.array([int(found[2]) for found in parts])
    order = np.argsort(frames)
    group = np.empty(len(frames), int)
    group[order] = np.concatenate([[0], (np.diff(frames[order]) > 2000).cumsum()])
    rows = [row for row, found in enumerate(parts) if int(found[1]) <= 2]
    names = class_names(data)
    kinds = [names[number] for number in data["label"]]
    binary = data.remove_columns("label").add_column("label", [int(kind != "free") for kind in kinds])
    binary = binary.cast_column("label", ClassLabel(names=["free", "defective"]))
    return subset(binary, rows), group[rows], [kinds[row] for row in rows]


def split(data: Dataset, group: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import StratifiedGroupKFold

    folds = StratifiedGroupKFold(3, shuffle=True, random_state=seed)
    return next(iter(folds.split(np.zeros(len(data)), labels(data), group)))


def trained(data: Dataset, seed: int) -> Network:
    """EfficientNet-Lite0: first a head on frozen features, then the last stages with it."""
    torch.manual_seed(seed)
    network = wellread.load("efficientnet-lite0").with_head(["free", "defective"])
    network.input = network.input.changed(size=(SIDE, SIDE), crop=1.0)
    truth = torch.from_numpy(labels(data))
    weight = len(truth) / (2 * torch.bincount(truth).float())

    def loss(module: nn.Module, batch: dict[str, Any]) -> Tensor:
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()  # so few pictures are no new statistics
        return nn.functional.cross_entropy(module(batch["inputs"]), batch["label"], weight.to(batch["label"].device))

    features = tensor_batches({"inputs": torch.from_numpy(embed(network, data)), "label": truth}, batch_size=64, shuffle=True, seed=seed)
    head = network.module.get_submodule("classifier")
    fit(head, features, loss, epochs=30, learning_rate=3e-3, weight_decay=1e-2, seed=seed, name="head")
    pictures = network_batches(network, data, batch_size=16, shuffle=True, seed=seed, augment=varied)
    parameters = [parameter for name, parameter in network.module.named_parameters() if name.startswith(TRAINED)]
    fit(network.module, pictures, loss, parameters=parameters, epochs=EPOCHS, learning_rate=3e-4, weight_decay=1e-2, seed=seed, name="last stages")
    return network


def varied(images: Tensor) -> Tensor:
    """Flips and brightness, so that the light tells nothing."""
    flips = torch.rand(2, len(images), 1, 1, 1) < 0.5
    images = torch.where(flips[0], images.flip(-1), images)
    images = torch.where(flips[1], images.flip(-2), images)
    return (images * (0.7 + 0.6 * torch.rand(len(images), 1, 1, 1))).clamp(0, 255).to(torch.uint8)


def centre(side: int) -> np.ndarray:
    line = np.exp(-0.5 * ((np.arange(side) + 0.5 - side / 2) / (side / 4)) ** 2)
    return np.outer(line, line)


def sobel(image: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    grey = image.mean(2)
    return np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1))


def coarse_noise(seed: int) -> np.ndarray:
    """A random map as smooth as Grad-CAM's."""
    noise = torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, (SIDE, SIDE), mode="bilinear", align_corners=False)[0, 0].numpy()


def interval_low(values: np.ndarray, group: np.ndarray) -> float:
    """Lower end of the 95 % bootstrap interval of the mean, drawing tiles, not pictures."""
    random = np.random.default_rng(0)
    tiles = [values[group == each] for each in np.unique(group)]
    means = [np.concatenate([tiles[i] for i in random.integers(len(tiles), size=len(tiles))]).mean() for _ in range(2000)]
    return float(np.quantile(means, 0.025))


def main() -> None:
    data, group, kinds = tiles()
    print(f"{len(data)} pictures of {len(np.unique(group))} tiles")
    figures: dict[str, list[float]] = defaultdict(list)
    baselines: dict[str, list[float]] = defaultdict(list)
    gains, gain_tiles, by_kind = [], [], defaultdict(list)
    for seed in SEEDS:
        train, test = split(data, group, seed)
        if QUICK:
            train, test = train[::6], test[::6]
        network = trained(subset(data, train), seed)
        figures["balanced_accuracy"].append(score(network, subset(data, test), "balanced_accuracy"))
        broken = np.array([row for row in test if kinds[row] != "free"])
        shown = subset(data, broken)
        found = {
            "grad_cam": grad_cam(network, shown, target="defective", sanity_check=True),
            "layer_cam": grad_cam(network, shown, target="defective", variant="layer-cam"),
            "fused": grad_cam(network, shown, target="defective", variant="layer-cam", layers=["blocks.4.2", "bn2"]),
        }
        for name, maps in found.items():
            for mark in MARKS:
                figures[f"{name}_{mark}"].append(maps.figures[mark])
        main_maps = found["grad_cam"]
        figures["iou_bound"].append(main_maps.figures["iou_bound"])
        figures["similarity_when_random"].append([v for name, v in main_maps.figures.items() if name.startswith("similarity")][-1])
        figures["empty_maps"].append(float((main_maps.peak <= 0).mean()))
        for kind, lift in zip((kinds[row] for row in broken), main_maps.columns["energy_lift"], strict=True):
            if lift is not None:
                by_kind[kind].append(lift)

        scrambled = network.copy()
        images = network.input.normalise(torch.from_numpy(main_maps.images[:16].transpose(0, 3, 1, 2).copy()))
        randomise(scrambled.module, set(scrambled.module.state_dict()), images, seed)
        random_maps = grad_cam(scrambled, shown, target="defective").maps
        marked = masks(shown, network.input)
        others = {
            "uniform": [np.ones((SIDE, SIDE))] * len(shown),
            "centre": [centre(SIDE)] * len(shown),
            "sobel": [sobel(image) for image in main_maps.images],
            "random_weights": random_maps,
        }
        for name, drawn in others.items():
            marks = [localisation(each, mask, (7, 7)) for each, mask in zip(drawn, marked, strict=True) if mask is not None]
            for mark in MARKS:
                baselines[f"{name}_{mark}"].append(float(np.mean([each[mark] for each in marks])))
        baselines["random_point_pointing_game"].append(main_maps.figures["pointing_by_chance"])

        chosen = np.random.default_rng(seed).permutation(len(broken))[:DELETED]
        curves = defaultdict(list)
        device = runtime.device()

        def defective(images: Tensor, network: Network = network) -> Tensor:
            return network(images).softmax(1)[:, 1]

        with running(network, device):
            for row in chosen:
                image = network.input.normalise(torch.from_numpy(main_maps.images[row].transpose(2, 0, 1).copy())[None])[0].to(device)
                drawings = {"grad_cam": main_maps.maps[row], "random_map": coarse_noise(int(broken[row])), "centre": centre(SIDE)}
                for name, drawn in drawings.items():
                    curves[name].append(deletion_insertion(defective, image, torch.tensor(drawn, device=device), seed=seed))
        for name, values in curves.items():
            kept = figures if name == "grad_cam" else baselines
            kept[f"{name}_deletion"].append(float(np.mean([deletion for deletion, _ in values])))
            kept[f"{name}_insertion"].append(float(np.mean([insertion for _, insertion in values])))
        gains += [random[0] - ours[0] for ours, random in zip(curves["grad_cam"], curves["random_map"], strict=True)]
        gain_tiles += group[broken[chosen]].tolist()
    figures["deletion_gain_low"] = [interval_low(np.array(gains), np.array(gain_tiles))]
    lifts = ", ".join(f"{kind} {np.mean(values):.2f} ({len(values)})" for kind, values in sorted(by_kind.items()))
    notes = [f"energy lift of Grad-CAM by kind of defect: {lifts}"]
    notes += ["the lift is at most one over the mask's area: small defects weigh most in the mean"]
    if QUICK:
        print({name: np.mean(values) for name, values in {**figures, **baselines}.items()}, notes)
        return
    record(
        "grad-cam",
        figures=figures,
        baselines=baselines,
        expects=EXPECTS,
        claims_tested=["Grad-CAM of a fine-tuned classifier localises defects to some extent (other data than the paper's, with masks)"],
        sizes={
            "pictures": len(data), "tiles": len(np.unique(group)), "test share": "1/3 of the tiles", "side": SIDE, "network": "efficientnet-lite0",
            "epochs": EPOCHS, "pictures with deletion curves": len(gains),
        },
        seeds=SEEDS,
        notes=notes,
    )  # fmt: skip


if __name__ == "__main__":
    main()

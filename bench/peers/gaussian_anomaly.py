"""gaussian_anomaly beside anomalib's DFM and PaDiM: magnetic tiles, the same backbone and weights, the same tensors, one process.

    python3.11 -m venv /tmp/anomalib                                   # its pins are not ours, so it gets an environment of its own,
    echo "$(python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])')" \
        > /tmp/anomalib/lib/python3.11/site-packages/ours.pth          # which sees the packages of this one,
    /tmp/anomalib/bin/pip install --no-deps anomalib freia kornia kornia_rs einops omegaconf antlr4-python3-runtime==4.9.3 imagecodecs \
        docstring-parser 'jsonargparse<4.47' typeshed-client importlib_resources rich-argparse platformdirs lightning pytorch-lightning lightning-utilities \
        torchmetrics opencv-python-headless
    python -m bench.peers.gaussian_anomaly --python /tmp/anomalib/bin/python [--quick]

Nothing is downloaded: anomalib builds the network without weights and gets ours. DFM and PaDiM have their default settings, on the stages that lie as
deep in this network as their default ones in a ResNet (stride 16; strides 4, 8 and 16). What is timed begins with normalised pictures in memory.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor, nn

from bench.gaussian_anomaly import auroc, fed, split
from bench.harness import Expect, record_peer
from wellread import load, load_data
from wellread.adapt.gaussian_anomaly import AnomalyScore, fit_gaussians
from wellread.data import class_names, labels, pixels, subset
from wellread.features import capture, pooled, probe, stages

SEEDS = (0, 1, 2)
SIZE, BATCH = 160, 32
EXPECTS = [
    Expect("AUROC is at least that of DFM", "auroc / auroc_dfm", 1.0),
    Expect("AUROC is at least that of PaDiM", "auroc / auroc_padim", 1.0),
    Expect("fitting is at least as fast as PaDiM's", "fit_images_per_second / fit_images_per_second_padim", 1.0),
    Expect("scoring is at least as fast as PaDiM's", "score_images_per_second / score_images_per_second_padim", 1.0),
]

Score = Callable[[Tensor], Tensor]


def batches(images: Tensor) -> Iterator[Tensor]:
    return (each.contiguous(memory_format=torch.channels_last) for each in images.split(BATCH))


def ours(backbone: nn.Module, levels: list[str], widths: list[int]) -> Callable[[Tensor], Score]:
    def fit(images: Tensor) -> Score:
        scorer = AnomalyScore(backbone, levels, widths, widths, 1)  # only for its way to the features
        found: dict[str, list[Tensor]] = {level: [] for level in levels}
        with capture(backbone, levels) as caught:
            for batch in batches(images):
                backbone(batch)
                for level, parts in found.items():
                    parts.append(pooled(caught[level], batch, scorer))  # type: ignore[arg-type]
        gaussians = fit_gaussians(lambda: [{level: torch.cat(parts) for level, parts in found.items()}])
        scorer = AnomalyScore(backbone, levels, widths, [gaussians[level].whiten.shape[1] for level in levels], 1)
        for level in levels:
            for buffer, value in zip(scorer.gaussian(level), gaussians[level][:2], strict=True):
                buffer.copy_(value)
        return scorer

    return fit


def anomalib(make: Callable[[], nn.Module], backbone: nn.Module, layout: torch.memory_format = torch.channels_last) -> Callable[[Tensor], Score]:
    def fit(images: Tensor) -> Score:
        model = make().train()
        assert not model.feature_extractor.feature_extractor.load_state_dict(backbone.state_dict(), strict=False).missing_keys  # type: ignore
        model.to(memory_format=layout)  # type: ignore[call-overload]
        for batch in batches(images):
            model(batch.contiguous(memory_format=layout))
        model.fit()  # type: ignore[operator]
        model.eval()
        return lambda batch: model(batch.contiguous(memory_format=layout)).pred_score

    return fit


def measure(quick: bool) -> None:
    from anomalib.models.image.dfm.torch_model import DFMModel
    from anomalib.models.image.padim.torch_model import PadimModel

    began = time.perf_counter()
    tiles, size = load_data("magnetic-tiles"), 96 if quick else SIZE
    network = fed(load("efficientnet-lite0"), size)
    names = np.asarray(class_names(tiles))[labels(tiles)]
    session = np.asarray([int(file.split("/")[1].removeprefix("exp").split("_")[0]) for file in tiles["file"]])
    good, bad = (subset(tiles, np.flatnonzero(rows)) for rows in (names == "free", (names != "free") & (session <= 2)))
    normal, strange = (network.input.normalise(torch.from_numpy(np.array(pixels(each, network.input)))) for each in (good, bad))  # type: ignore
    backbone = network.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    levels = stages(network)
    widths = [each.shape[1] for each in probe(network, levels).values()]
    methods = {
        "": ours(backbone, levels, widths),
        # DFM refuses channels-last maps (it takes a view of them)
        "_dfm": anomalib(lambda: DFMModel("tf_efficientnet_lite0", "blocks.4", pre_trained=False), backbone, torch.contiguous_format),
        "_padim": anomalib(lambda: PadimModel("tf_efficientnet_lite0", ["blocks.1", "blocks.2", "blocks.4"], False, n_features=100), backbone),
    }
    figures: dict[str, list[float]] = {}
    with torch.no_grad():
        for seed in SEEDS[:1] if quick else SEEDS:
            rows, held = split(len(normal), seed, 1 / 3)
            test = torch.cat([normal[held], strange])
            for name in np.random.default_rng(seed).permutation(list(methods)):  # turns in another order each time
                torch.manual_seed(seed)
                start = time.perf_counter()
                score = methods[name](normal[rows])
                fitted = time.perf_counter()
                scores = torch.cat([score(batch).flatten() for batch in batches(test)]).numpy()
                done = time.perf_counter()
                figures.setdefault(f"auroc{name}", []).append(auroc(scores[: len(held)], scores[len(held) :]))
                figures.setdefault(f"fit_images_per_second{name}", []).append(len(rows) / (fitted - start))
                figures.setdefault(f"score_images_per_second{name}", []).append(len(test) / (done - fitted))
    for peer in ("_dfm", "_padim"):
        for figure in ("auroc", "fit_images_per_second", "score_images_per_second"):
            figures[f"{figure}_ratio{peer}"] = [a / b for a, b in zip(figures[figure], figures[f"{figure}{peer}"], strict=True)]
    for name, values in figures.items():
        print(f"{name:40} {np.mean(values):.4g}")
    if quick:
        return
    record_peer(
        "gaussian_anomaly",
        f"anomalib {version('anomalib')}: DFMModel (feature reconstruction error) and PadimModel (100 features)",
        figures=figures,
        expects=EXPECTS,
        sizes={"network": "efficientnet-lite0", "size": size, "fitted": 200, "normal": 100, "defective": len(bad), "batch": BATCH},
        seconds=time.perf_counter() - began,
        seeds=list(SEEDS),
        notes=[
            "ratios are ours to theirs in the same turn; names without a peer's name are ours (low-variance components, Ledoit-Wolf, 9 levels)",
            "PaDiM scores every position and gives a map, ours gives one score per picture",
        ],
    )


def main() -> None:
    if "--python" in sys.argv:
        at = sys.argv.index("--python")
        rest = [*sys.argv[1:at], *sys.argv[at + 2 :]]
        sys.exit(subprocess.run([sys.argv[at + 1], "-W", "ignore", "-m", "bench.peers.gaussian_anomaly", *rest]).returncode)
    measure("--quick" in sys.argv)


if __name__ == "__main__":
    main()

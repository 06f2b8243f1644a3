"""Gaussian anomaly: agreement with scikit-learn, invariances, conformal thresholds, networks of two families, saving and export, bad input."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from sklearn.covariance import OAS, LedoitWolf
from sklearn.decomposition import PCA
from torch import Tensor, nn

import wellread
from wellread import runtime
from wellread.adapt.gaussian_anomaly import (
    AnomalyScore,
    Gaussian,
    anomaly_map,
    chi_square_threshold,
    conformal_threshold,
    fit_gaussians,
    gaussian_anomaly,
    mahalanobis,
    select,
    whitening,
)
from wellread.covariance import Moments
from wellread.data import as_data
from wellread.errors import BadInput
from wellread.evaluate import evaluate, predict
from wellread.features import stages
from wellread.inputs import ImageInput
from wellread.network import Network, load

FAMILIES = {"cnn": ("timm/test_resnet", 64), "vit": ("timm/test_vit", None)}


def features(rows: int, width: int, seed: int = 0) -> Tensor:
    """Correlated float64 rows far from the origin, with a different scale in every direction."""
    random = np.random.default_rng(seed)
    mixing = np.linalg.qr(random.normal(size=(width, width)))[0] * np.geomspace(1, 0.05, width)
    return torch.from_numpy(random.normal(size=(rows, width)) @ mixing + 30)


def fit(z: Tensor, **settings: Any) -> Gaussian:
    return fit_gaussians(lambda: [{"only": z}], **settings)["only"]


def distance(z: Tensor, gaussian: Gaussian) -> Tensor:
    return mahalanobis(z, gaussian.mean, gaussian.whiten)


def pictures(rows: int, seed: int = 0, spot: bool = False) -> list[Picture.Image]:
    """Grey noise of varying brightness; with `spot`, a bright square in the lower right."""
    random = np.random.default_rng((seed, spot))
    found = []
    for _ in range(rows):
        pixels = random.normal(random.uniform(90, 110), 15, (48, 56, 3))
        if spot:
            pixels[30:42, 36:48] = 250
        found.append(Picture.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return found


def table(good: int, bad: int, names: tuple[str, ...] = ("bad", "good"), seed: int = 0) -> Dataset:
    images, label = pictures(good, seed) + pictures(bad, seed, spot=True), [names.index("good")] * good + [0] * bad
    return Dataset.from_dict({"image": images, "label": label}, features=Features({"image": Image(), "label": ClassLabel(names=list(names))}))


class Small(nn.Module):
    """A network of nobody's family, for grey pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 9, 3, stride=2), nn.ReLU())
        self.fc = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def small() -> Network:
    torch.manual_seed(0)
    return Network(Small(), input=ImageInput((32, 32), channels=1, mean=(0.5,), std=(0.2,)))


def classifier(family: str) -> tuple[Network, int | None]:
    name, size = FAMILIES[family]
    torch.manual_seed(0)
    return load(name, pretrained=False), size


@pytest.fixture(scope="module")
def fitted() -> dict[str, Network]:
    normals = table(40, 0)
    found = {}
    for family in FAMILIES:
        network, size = classifier(family)
        found[family] = gaussian_anomaly(network, normals, size=size)
    return found


def example(folder: Path) -> dict[str, Any]:
    """For the conformance test: its photos have several classes, and here one must be named."""
    network, _ = classifier("cnn")
    network.input = network.input.changed(size=(64, 64))  # type: ignore[union-attr]
    if not (folder / "network").exists():
        network.save(folder / "network")
        (folder / "photos").mkdir()
        for number, picture in enumerate(pictures(8)):
            picture.save(folder / "photos" / f"{number}.png")
    return {"network": str(folder / "network"), "normals": f"folder:{folder / 'photos'}", "false_alarm_rate": 0.5, "components": "all"}


# --- the Gaussian


def test_squared_distances_of_a_gaussian_are_chi_square():
    z = features(100_000, 8)
    squared = distance(z, fit(z, components="all")).square()
    assert squared.mean().item() == pytest.approx(8, rel=0.02)
    assert squared.var().item() == pytest.approx(16, rel=0.02)
    assert abs((squared.sqrt() > chi_square_threshold(8, 0.01)).double().mean().item() - 0.01) < 0.002


@pytest.mark.parametrize(("rows", "width"), [(300, 7), (60, 90), (5, 40)])
@pytest.mark.parametrize(("estimator", "theirs"), [("ledoit-wolf", LedoitWolf), ("oas", OAS)])
def test_agrees_with_scikit_learn(rows: int, width: int, estimator: str, theirs: type) -> None:
    z, new = features(rows, width), features(20, width, seed=1)
    ours, reference = fit(z, components="all", estimator=estimator), theirs().fit(z.numpy())
    assert ours.shrinkage == pytest.approx(reference.shrinkage_, rel=1e-6)
    np.testing.assert_allclose(ours.whiten @ ours.whiten.T, reference.precision_, rtol=1e-6, atol=1e-6 * reference.precision_.max())
    np.testing.assert_allclose(distance(new, ours) ** 2, reference.mahalanobis(new.numpy()), rtol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(200, 30), (25, 30)])
@pytest.mark.parametrize("components", ["low-variance", "high-variance"])
def test_reduced_model_is_ledoit_wolf_on_the_components_of_a_pca(rows: int, width: int, components: str) -> None:
    z, new = features(rows, width), features(20, width, seed=1)
    pca = PCA().fit(z.numpy())
    boundary = int((pca.explained_variance_ratio_.cumsum() > 0.95).argmax())
    part = slice(0, boundary + 1) if components == "high-variance" else slice(boundary - 1, min(rows - 1, width))
    reference = LedoitWolf().fit(pca.transform(z.numpy())[:, part])
    ours = fit(z, components=components, variance=0.95)
    assert ours.whiten.shape[1] == len(reference.location_)
    assert ours.shrinkage == pytest.approx(reference.shrinkage_, rel=1e-6)
    np.testing.assert_allclose(distance(new, ours) ** 2, reference.mahalanobis(pca.transform(new.numpy())[:, part]), rtol=1e-6)


def test_batches_of_any_size_give_one_gaussian_in_one_or_two_walks():
    z, walks = features(50, 12), []

    def walk(size: int):
        walks.append(size)
        for start in range(0, 50, size):
            yield {"a": z[start : start + size], "b": z[start : start + size, :5]}

    whole, single = fit_gaussians(lambda: walk(50)), fit_gaussians(lambda: walk(1))
    assert walks == [50, 50, 1, 1]
    for level in ("a", "b"):
        new = features(9, 12, seed=2)[:, : len(whole[level].mean)]
        torch.testing.assert_close(distance(new, whole[level]), distance(new, single[level]), rtol=1e-9, atol=0)
    fit_gaussians(lambda: walk(7), estimator="oas")
    assert walks[4:] == [7]


def test_moments_hold_far_from_the_origin():
    z = features(400, 6) * 1e-4 + 1e5
    moments = Moments(6)
    for part in z.split(33):
        moments.update(part)
    torch.testing.assert_close(moments.mean, z.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(z.T, correction=0), rtol=1e-6, atol=1e-15)


def unshrunk(z: Tensor) -> Gaussian:
    moments = Moments(z.shape[1])
    moments.update(z)
    variances, vectors = torch.linalg.eigh(moments.covariance)
    return Gaussian(moments.mean, whitening(vectors, variances, 0.0), 0.0)


def test_invariance_under_affine_maps_holds_without_shrinkage_only():
    z, new = features(80, 6), features(10, 6, seed=1)
    mixing, offset = torch.from_numpy(np.random.default_rng(3).normal(size=(6, 6))), torch.arange(6)
    rotation = torch.linalg.qr(mixing).Q
    affine, rigid = (lambda x: x @ mixing + offset), (lambda x: 7 * x @ rotation + offset)
    torch.testing.assert_close(distance(affine(new), unshrunk(affine(z))), distance(new, unshrunk(z)), rtol=1e-8, atol=0)
    torch.testing.assert_close(distance(rigid(new), fit(rigid(z))), distance(new, fit(z)), rtol=1e-8, atol=0)
    shrunk, moved = distance(new, fit(z, components="all")), distance(affine(new), fit(affine(z), components="all"))
    assert (moved / shrunk - 1).abs().max() > 1e-3


def test_the_mean_is_at_distance_zero():
    gaussian = fit(features(40, 9))
    assert distance(gaussian.mean[None], gaussian).item() == 0


def test_all_components_are_the_full_model():
    z, new = features(60, 10), features(10, 10, seed=1)
    full = distance(new, fit(z, components="all"))
    torch.testing.assert_close(distance(new, fit(z, components="low-variance", variance=1e-9)), full, rtol=1e-6, atol=0)
    torch.testing.assert_close(distance(new, fit(z, components="high-variance", variance=1 - 1e-9)), full, rtol=1e-6, atol=0)


def test_low_and_high_variance_cover_everything_and_share_the_boundary():
    variances = torch.tensor([50.0, 30.0, 15.0, 4.0, 0.9, 0.1])
    kept = {part: set(range(6)[select(variances, 100, part, 0.9)]) for part in ("low-variance", "high-variance", "all")}  # 0.95 is passed at 2
    assert kept["low-variance"] | kept["high-variance"] == kept["all"] == set(range(6))
    assert kept["low-variance"] & kept["high-variance"] == {1, 2}
    assert select(variances, 100, "low-variance", 0.1) == slice(0, 6)  # a boundary at the first component has none before it
    assert select(variances, 4, "low-variance", 0.9) == slice(1, 3)  # four pictures define three directions


def test_full_model_is_the_diagonal_one_for_uncorrelated_features():
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)  # columns of a Hadamard matrix
    new, mean = features(5, 3), torch.tensor([5.0, 0, -2], dtype=torch.float64)
    equal = fit(signs * 3 + mean, components="all")
    assert equal.shrinkage == 1  # equal variances: the covariance is its own target
    torch.testing.assert_close(distance(new, equal), ((new - mean) / 3).norm(dim=1))
    scales = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(distance(new, unshrunk(signs * scales + mean)), ((new - mean) / scales).norm(dim=1))


def test_features_that_cannot_be_fitted_are_refused():
    z = features(20, 4)
    with pytest.raises(BadInput, match="level 'only' is the same for all normals"):
        fit(z[:1].repeat(20, 1))
    with pytest.raises(BadInput, match="level 'only' gives values that are not finite"):
        fit(torch.where(torch.arange(20)[:, None] == 7, torch.nan, z))
    with pytest.raises(BadInput, match="1 normals cannot"):
        fit(z[:1])


# --- thresholds


def test_conformal_threshold_is_the_right_rank():
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))  # 1...99
    assert conformal_threshold(scores, 0.05) == (95.0, 95)
    assert conformal_threshold(scores, 0.01) == (99.0, 99)
    assert conformal_threshold(scores, 0.051) == (95.0, 95)
    assert conformal_threshold(scores, 0.049) == (96.0, 96)
    assert conformal_threshold(scores[:10], 0.05) == (scores[:10].max(), 10)  # too few: the highest


def test_conformal_false_alarms_are_as_promised_whatever_the_distribution():
    random = np.random.default_rng(0)
    draws = random.standard_cauchy((4000, 40))  # 39 held out, one new: 2 of 40 ranks are alarms at 5 %
    alarms = np.mean([new[-1] > conformal_threshold(new[:-1], 0.05)[0] for new in draws])
    assert abs(alarms - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 4000)


def test_p_values_agree_with_the_threshold():
    scorer = AnomalyScore(nn.Identity(), [], [], [], 99)
    scorer.held_out.copy_(torch.arange(1.0, 100.0))
    p = scorer.p_value(torch.tensor([0.5, 95.0, 95.5, 200.0]))
    torch.testing.assert_close(p, torch.tensor([1.0, 0.06, 0.05, 0.01]))


# --- the network


@pytest.mark.parametrize("family", FAMILIES)
def test_strange_pictures_score_higher(fitted: dict[str, Network], family: str) -> None:
    report = evaluate(fitted[family], table(30, 30, seed=5))
    assert report.figures["auroc"] > 0.95
    assert 0 <= report.figures["false_alarm_rate"] < 0.5 < report.figures["detection_rate"]
    assert report.figures["threshold"] == fitted[family].module.threshold.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_module_scores_as_its_float64_gaussians_do(fitted: dict[str, Network], family: str) -> None:
    scorer = fitted[family].module
    z = {level: torch.rand(6, len(scorer.gaussian(level)[0])) for level in scorer.levels}
    wanted = [mahalanobis(z[level].double(), *(each.double() for each in scorer.gaussian(level))) for level in scorer.levels]
    torch.testing.assert_close(scorer.distances(z).double(), torch.stack(wanted, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scorer.combined(scorer.distances(z)).double(), sum(wanted), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = scorer.distances(z)
    assert torch.equal(mixed, scorer.distances(z))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_the_batch(fitted: dict[str, Network], family: str) -> None:
    data = as_data(pictures(7, seed=3) + pictures(3, spot=True))
    one, all_at_once = predict(fitted[family], data, batch_size=1), predict(fitted[family], data, batch_size=10)
    np.testing.assert_allclose(one, all_at_once, rtol=1e-4)


def test_level_scores_add_up(fitted: dict[str, Network]) -> None:
    network = fitted["cnn"]
    batch = network.input(pictures(4))
    with torch.inference_mode():
        levels = network.module.level_scores(batch)
        torch.testing.assert_close(levels.sum(1), network(batch))
    assert levels.shape == (4, len(network.module.levels))
    base, size = classifier("cnn")
    other = gaussian_anomaly(base, table(40, 0), size=size, combine="normalised", levels=["layer2.0", "layer3.0"])
    kept = [other.module.gaussian(level)[1].shape[1] for level in other.module.levels]
    with torch.inference_mode():
        torch.testing.assert_close(other(batch), (other.module.level_scores(batch) / torch.tensor(kept).sqrt()).sum(1))


def test_the_input_is_not_changed_and_training_mode_cannot_move_the_statistics() -> None:
    network, size = classifier("cnn")
    before, fed = network.fingerprint, network.input
    result = gaussian_anomaly(network, table(20, 0), size=size)
    assert (network.fingerprint, network.input) == (before, fed)
    assert result.input.size == (64, 64) and result.input.crop == 1.0
    after = result.fingerprint
    result.module.train()
    with torch.no_grad():
        result(result.input(pictures(4)))
    assert result.fingerprint == after


def test_report_says_what_the_threshold_promises(fitted: dict[str, Network]) -> None:
    report = fitted["cnn"].reports["gaussian-anomaly"]
    assert report.figures["normals held out"] == 8
    assert report.figures["false alarm rate promised"] == pytest.approx(1 / 9)
    assert report.figures["false alarm rate, low"] < 1 / 9 < report.figures["false alarm rate, high"]
    assert any("19 are needed" in each for each in report.warnings)
    assert [row["level"] for row in report.tables["levels"]] == fitted["cnn"].module.levels
    assert fitted["cnn"].module.threshold == fitted["cnn"].module.held_out.max()
    twice = gaussian_anomaly(small(), pictures(10) * 2).reports["gaussian-anomaly"]
    assert any("10 normals are copies" in each for each in twice.warnings)


def test_chunks_of_the_table_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    normals, new = table(30, 0), as_data(pictures(6, seed=4))
    whole = predict(gaussian_anomaly(small(), normals), new)
    monkeypatch.setattr(sys.modules["wellread.adapt.gaussian_anomaly"], "CHUNK", 7)
    np.testing.assert_allclose(predict(gaussian_anomaly(small(), normals), new), whole, rtol=1e-3)


def test_the_map_finds_the_spot(fitted: dict[str, Network]) -> None:
    network = fitted["cnn"]
    found = anomaly_map(network, as_data(pictures(5, seed=8, spot=True)), levels=network.module.levels[:4])
    assert found.maps.shape == (5, 64, 64) and found.images.shape == (5, 64, 64, 3)
    assert found.maps.min() == 0 and found.maps.max() == 1
    height, width = np.s_[40:56], np.s_[41:55]  # the square, in a picture of 64 x 64
    inside = found.maps[:, height, width].mean((1, 2))
    assert (inside > 1.5 * found.maps.mean((1, 2))).all()
    with pytest.raises(BadInput, match="fitted without level 'nowhere'"):
        anomaly_map(network, as_data(pictures(1)), levels=["nowhere"])


def test_the_class_that_is_normal() -> None:
    network, normals = small(), table(20, 6)
    named = gaussian_anomaly(network, normals, normal_class="good")
    alone = gaussian_anomaly(network, normals.select(range(20)))
    assert named.labels == alone.labels == ("good", "anomalous")
    assert named.fingerprint == alone.fingerprint
    everything = gaussian_anomaly(network, normals, contaminated=True)
    assert everything.labels == ("normal", "anomalous") and "anomalies among" in everything.reports["gaussian-anomaly"].warnings[-1]
    assert evaluate(named, normals).figures["auroc"] > 0.9  # "good" is class 1 here


def test_saved_networks_give_the_same_scores_in_another_process(fitted: dict[str, Network], tmp_path: Path) -> None:
    images = pictures(4, seed=2)
    for number, picture in enumerate(images):
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture.save(tmp_path / "photos" / f"{number}.png")
    for family, network in fitted.items():
        network.save(tmp_path / family)
    code = (
        "import json, sys, wellread\n"
        "with wellread.using(progress=False):\n"
        "    data = wellread.load_data('folder:photos')\n"
        "    for name in sys.argv[1:]:\n"
        "        network = wellread.load(name)\n"
        "        print(json.dumps([network.fingerprint, wellread.predict(network, data).tolist(), float(network.module.threshold)]))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, *fitted], cwd=tmp_path, capture_output=True, text=True, check=True)
    for network, line in zip(fitted.values(), ran.stdout.splitlines(), strict=True):
        again = [network.fingerprint, predict(network, as_data(images)).tolist(), float(network.module.threshold)]
        assert json.loads(line) == again


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_exported_programs_give_the_same_scores(fitted: dict[str, Network], family: str) -> None:
    module, batch = fitted[family].module, fitted[family].input(pictures(3))
    with torch.inference_mode():
        wanted = module(batch)
        twin = copy.deepcopy(module)
        twin.module.load_state_dict({name: torch.zeros_like(each) for name, each in module.module.state_dict().items()})
        assert torch.equal(module(batch), wanted) and not torch.equal(twin(batch), wanted)
        exported = torch.export.export(module, (batch,), dynamic_shapes=({0: torch.export.Dim("B", min=1, max=64)},)).module()
        torch.testing.assert_close(exported(batch), wanted)
        torch.testing.assert_close(exported(batch[:2]), wanted[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["small", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES)])
def test_onnx_agrees(fitted: dict[str, Network], tmp_path: Path, family: str) -> None:
    runtime_of_onnx = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = fitted[family] if family in fitted else gaussian_anomaly(small(), pictures(12))
    module, batch = network.module, network.input(pictures(3))
    file = tmp_path / "scorer.onnx"
    torch.onnx.export(module, (batch,), str(file), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("B", min=1, max=64)},))
    session = runtime_of_onnx.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {session.get_inputs()[0].name: batch[:2].numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(scores, module(batch[:2]).numpy(), rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda_in_bfloat16(family: str) -> None:
    network, size = classifier(family)
    with runtime.using(device="cuda", precision="bfloat16"):
        found = evaluate(gaussian_anomaly(network, table(40, 0), size=size), table(20, 20, seed=5))
    assert found.figures["auroc"] > 0.9


# --- bad input


def test_bad_settings_and_data_are_refused() -> None:
    network = small()
    normals = table(8, 4)
    cases: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("false_alarm_rate is 0", network, pictures(8), {"false_alarm_rate": 0.0}),
        ("false_alarm_rate is 1", network, pictures(8), {"false_alarm_rate": 1.0}),
        ("variance is 1.5", network, pictures(8), {"variance": 1.5}),
        ("calibration is -0.1", network, pictures(8), {"calibration": -0.1}),
        ("1 normals are too few", network, pictures(1), {}),
        ("2 normals are too few when 1", network, pictures(2), {}),
        ("is the same for all normals", network, pictures(1) * 9, {}),
        ("name the normal one with normal_class", network, normals, {}),
        ("no rows of class 'best'", network, normals, {"normal_class": "best"}),
        ("no classes", network, pictures(8), {"normal_class": "good"}),
        ("no layer 'body.9'", network, pictures(8), {"levels": ["body.9"]}),
        ("size is 0", network, pictures(8), {"size": 0}),
        ("cannot be fed pictures of 100 x 100", classifier("vit")[0], pictures(8), {"size": 100}),
        ("gives anomaly scores already", gaussian_anomaly(network, pictures(8)), pictures(8), {}),
        ("reads pictures is needed", nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), pictures(8), {}),
    ]
    for words, which, data, settings in cases:
        with pytest.raises(BadInput) as refused:
            gaussian_anomaly(which, data, **settings)
        assert words in str(refused.value) and "\n" not in str(refused.value), f"{words!r} is not in {refused.value}"
    with pytest.raises(BadInput, match="holds no Gaussians"):
        anomaly_map(network, as_data(pictures(2)))


def test_labels_that_are_no_classes_are_not_read() -> None:
    normals = Dataset.from_dict(
        {"image": pictures(8), "label": [0.5 + each for each in range(8)]}, features=Features({"image": Image(), "label": Value("float64")})
    )
    assert gaussian_anomaly(small(), normals).labels == ("normal", "anomalous")


def test_a_grey_network_of_nobodys_family() -> None:
    network = small()
    scorer = gaussian_anomaly(network, pictures(12))
    assert scorer.module.levels == stages(network) == ["body.1", "body.3"]
    assert anomaly_map(scorer, as_data(pictures(2))).images.shape == (2, 32, 32, 3)
    assert wellread.predict(scorer, as_data(pictures(3))).shape == (3,)

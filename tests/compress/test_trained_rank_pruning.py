"""Trained rank pruning: the projection, training as it was without it, the cut, and the whole on a CNN and a ViT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn import functional as F

import wellread
from wellread import Network, meter, ranks, runtime
from wellread.batches import network_batches
from wellread.compress.trained_rank_pruning import needs_its_norm, project, spectra, train_low_rank, trained_rank_pruning
from wellread.data import as_data
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.train import fit

COLORS = ("blue", "green", "red")
ONE_ENERGY = 0.7


@pytest.fixture(scope="module")
def colors() -> Dataset:
    """36 pictures of noise with a tint."""
    random = np.random.default_rng(0)
    pairs = []
    for row in range(36):
        picture = random.integers(0, 160, (16, 16, 3))
        picture[..., 2 - row % 3] += 60
        pairs.append((Image.fromarray(picture.astype(np.uint8)), COLORS[row % 3]))
    return as_data(pairs)


def tiny(name: str) -> Network:
    torch.manual_seed(0)
    network = wellread.load(f"timm/{name}", pretrained=False, **({"img_size": 32} if "vit" in name else {})).with_head(COLORS)
    return network.edited(input=network.input.changed(size=(32, 32)))  # type: ignore[union-attr]


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def network(request: pytest.FixtureRequest) -> Network:
    return tiny(request.param)


@pytest.fixture(scope="module")
def cnn() -> Network:
    return tiny("test_resnet")


def by_energy(layers: list[ranks.Layer], energy: float = ONE_ENERGY) -> Any:
    return lambda values: (ranks.ranks_for_energy(layers, values, energy), energy)


def states_equal(a: Network, b: Network) -> bool:
    first, second = a.module.state_dict(), b.module.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- the projection


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_after_a_projection_the_cut_network_is_the_whole_one(cnn: Network, colors: Dataset, scheme: ranks.Scheme) -> None:
    layers, _ = ranks.find_layers(cnn, scheme=scheme)
    whole = cnn.copy()
    chosen, energy, signs = project(whole.module, layers, by_energy(layers))
    assert energy == ONE_ENERGY and 0 < len(chosen) == len(signs)
    after = spectra(whole.module, layers)
    for path, rank in chosen.items():
        values = after[path].values
        assert float(values[rank - 1]) > 1e-2 and (rank == len(values) or float(values[rank]) < 1e-5)
    left = [layer for layer in layers if layer.path not in chosen]
    assert all(torch.equal(*(net.module.get_submodule(layer.path).weight for net in (cnn, whole))) for layer in left)
    small = ranks.cut(whole, layers, chosen)
    assert len(small.edits) == len(cnn.edits) + len(chosen)
    np.testing.assert_allclose(predict(small, colors), predict(whole, colors), rtol=1e-4, atol=1e-5)
    assert np.abs(predict(whole, colors) - predict(cnn, colors)).max() > 1e-3


# --- the training


def test_without_projections_it_is_plain_training_to_the_bit(network: Network, colors: Dataset) -> None:
    layers, _ = ranks.find_layers(network)
    plain, ours, projected = network.copy(), network.copy(), network.copy()

    def step(_: Any, batch: dict[str, Any]) -> torch.Tensor:
        return F.cross_entropy(plain(batch["inputs"]), batch["label"])

    if "resnet" in network.architecture["name"]:  # type: ignore[index]
        plain.module.to(memory_format=torch.channels_last)
    batches = network_batches(plain, colors, batch_size=12, shuffle=True, seed=3, drop_last=True)
    fit(plain.module, batches, step, epochs=2, learning_rate=0.05, optimizer="sgd", momentum=0.9, weight_decay=1e-4, seed=3)
    options: dict[str, Any] = {"epochs": 2, "learning_rate": 0.05, "batch_size": 12, "seed": 3}
    train_low_rank(ours, colors, layers, by_energy(layers), every=None, nuclear=0.0, **options)
    assert states_equal(plain, ours) and not states_equal(plain, network)
    train_low_rank(projected, colors, layers, by_energy(layers), every=2, nuclear=0.0, **options)
    assert not states_equal(plain, projected)


def test_one_step_projects_first_and_then_descends_the_nuclear_norm(cnn: Network, colors: Dataset) -> None:
    """The step from the projected weights W differs by exactly -lr * nuclear * U_r V_r^T from the one without."""
    layers, _ = ranks.find_layers(cnn)
    reference = cnn.copy()
    _, _, signs = project(reference.module, layers, by_energy(layers))
    options: dict[str, Any] = {"every": 20, "epochs": 1, "learning_rate": 0.1, "batch_size": 36, "seed": 0}
    found = {}
    for nuclear in (0.0, 0.5):
        found[nuclear] = cnn.copy()
        history = train_low_rank(found[nuclear], colors, layers, by_energy(layers), nuclear=nuclear, **options)
        assert history.steps == 1
        norms = sum(float((reference.module.get_submodule(path).weight.detach() * sign).sum()) for path, sign in signs.items())
        assert history.loss[0] - history.logs["task"][0] == pytest.approx(nuclear * norms, rel=1e-5, abs=1e-6)
    plain = reference.copy()
    train_low_rank(plain, colors, layers, by_energy(layers), nuclear=0.0, **options | {"every": None})
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.module.parameters(), found[0.0].module.parameters(), strict=True))
    for layer in layers:
        without, with_it = (found[nuclear].module.get_submodule(layer.path).weight for nuclear in (0.0, 0.5))
        expected = -0.1 * 0.5 * signs[layer.path] if layer.path in signs else torch.zeros_like(without)
        torch.testing.assert_close(with_it - without, expected, rtol=1e-3, atol=1e-6)


def test_projections_come_every_so_many_steps(cnn: Network, colors: Dataset) -> None:
    layers, _ = ranks.find_layers(cnn)
    calls = []

    def choose(values: Any) -> Any:
        calls.append(1)
        return by_energy(layers)(values)

    train_low_rank(cnn.copy(), colors, layers, choose, every=4, nuclear=0.0, epochs=3, batch_size=12)
    assert len(calls) == 1 + 3  # what is aimed at, then steps 0, 4 and 8 of 9


def test_a_killed_training_goes_on_with_its_count(cnn: Network, colors: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, _ = ranks.find_layers(cnn)
    options: dict[str, Any] = {"every": 2, "nuclear": 1e-3, "epochs": 3, "batch_size": 12, "learning_rate": 0.05}
    unbroken = cnn.copy()
    train_low_rank(unbroken, colors, layers, by_energy(layers), **options)
    calls = []

    def killed(values: Any) -> Any:
        calls.append(1)
        if len(calls) == 1 + 3:
            raise KeyboardInterrupt
        return by_energy(layers)(values)

    folder = tmp_path / "run"
    clock = SimpleNamespace(perf_counter=iter(range(0, 10**9, 1000)).__next__)  # so slow that each step leaves a checkpoint
    monkeypatch.setattr("wellread.train.time", clock)
    with runtime.using(folder=folder), pytest.raises(KeyboardInterrupt):
        train_low_rank(cnn.copy(), colors, layers, killed, **options)
    monkeypatch.undo()
    resumed = cnn.copy()
    with runtime.using(folder=folder):
        history = train_low_rank(resumed, colors, layers, by_energy(layers), **options)
    assert history.resumed_at == 4 and states_equal(resumed, unbroken)
    with runtime.using(folder=folder), pytest.warns(UserWarning, match="other weights, data or settings"):
        train_low_rank(cnn.copy(), colors, layers, by_energy(layers, 0.5), **options)


# --- the method

LOAD = """
import json, sys, torch, wellread
network = wellread.load(sys.argv[1])
out = network(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))
print(json.dumps([out.flatten().tolist(), network.lineage[-1]["method"], list(network.reports)]))
"""


@pytest.mark.parametrize(("name", "scheme"), [("test_resnet", "spatial"), ("test_vit", "channel")])
def test_half_the_network_saved_and_loaded_in_a_new_process(name: str, colors: Dataset, scheme: Any, tmp_path: Path) -> None:
    network = tiny(name)
    before = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    small = trained_rank_pruning(network, colors, colors.select(range(12)).map(lambda row: {"image": row["image"].rotate(90)}), keep=0.7, epochs=1,
                                 batch_size=12, scheme=scheme, every=2, keep_norm=False)  # fmt: skip
    assert all(torch.equal(before[key], tensor) for key, tensor in network.module.state_dict().items())
    assert meter.macs(small) <= 0.7 * meter.macs(network)
    report = small.reports["rank pruning"]
    assert report.figures["multiply-adds"] == pytest.approx(meter.macs(small) / meter.macs(network))
    assert report.figures["parameters"] == pytest.approx(meter.parameters(small) / meter.parameters(network))
    assert report.figures["layers cut"] == len(small.edits) - len(network.edits) > 0
    cut = {row["layer"]: row["rank"] for row in report.tables["layers"] if row["rank"] != "whole"}
    assert cut == {record["layer"]: record["rank"] for record in small.edits if record["edit"] == "factorise"}
    norms = [each for each in report.figures if "batch norm" in each]
    assert bool(norms) == (name == "test_resnet")
    assert small.measured[0]["metrics"]["accuracy"] == report.figures[norms[0] if norms else "accuracy cut"]
    with torch.no_grad():
        mine = small(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32))
    small.save(tmp_path / "small")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "small")], capture_output=True, text=True, check=True)
    theirs, made_by, reports = json.loads(done.stdout)
    assert (made_by, reports) == ("trained-rank-pruning", ["rank pruning"])
    torch.testing.assert_close(torch.tensor(theirs), mine.flatten(), rtol=0, atol=0)


def test_energy_one_changes_nothing_but_the_layers(cnn: Network, colors: Dataset) -> None:
    small = trained_rank_pruning(cnn, colors, energy=1.0, epochs=0, pays="always", keep_norm=True)
    assert small.reports["rank pruning"].figures["layers cut"] == len(ranks.find_layers(cnn)[0])
    np.testing.assert_allclose(predict(small, colors), predict(cnn, colors), rtol=1e-4, atol=1e-5)
    whole = trained_rank_pruning(cnn, colors, energy=1.0, epochs=0, keep_norm=True)
    assert whole.edits == cnn.edits and "no layer was cut" in whole.reports["rank pruning"].warnings[0]
    assert states_equal(whole, cnn)


def test_it_says_so_when_the_result_is_not_faster(cnn: Network, colors: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "milliseconds", lambda network, size, **_: size * (1.0 + len(network.edits)))
    small = trained_rank_pruning(cnn, colors, energy=0.5, epochs=0)
    assert all("not faster here" in warning for warning in small.reports["rank pruning"].warnings)
    assert len(small.reports["rank pruning"].warnings) == 2
    monkeypatch.setattr(meter, "milliseconds", lambda network, size, **_: size / (1.0 + len(network.edits)))
    assert trained_rank_pruning(cnn, colors, energy=0.5, epochs=0).reports["rank pruning"].warnings == []


def test_layers_that_are_slower_in_two_parts_stay(cnn: Network, colors: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, _ = ranks.find_layers(cnn)
    slow = layers[0].path
    monkeypatch.setattr(ranks, "milliseconds", lambda _, __, chosen: {path: (1.0, 2.0 if path == slow else 0.5) for path in chosen})
    small = trained_rank_pruning(cnn, colors, energy=0.5, epochs=0, pays="measured")
    assert slow not in [record.get("layer") for record in small.edits] and len(small.edits) > len(cnn.edits)
    reasons = {row["layer"]: row["because"] for row in small.reports["rank pruning"].tables["left out"]}
    assert reasons[slow].startswith("two layers of rank")


def test_training_after_the_cut_trains_the_parts(cnn: Network, colors: Dataset) -> None:
    once = trained_rank_pruning(cnn, colors, energy=0.5, epochs=0)
    tuned = trained_rank_pruning(cnn, colors, energy=0.5, epochs=0, tune=1, batch_size=12)
    assert once.edits == tuned.edits and not states_equal(once, tuned)


def test_batch_norm_is_estimated_anew(cnn: Network, colors: Dataset) -> None:
    kept = trained_rank_pruning(cnn, colors, energy=0.5, epochs=0, keep_norm=True)
    anew = trained_rank_pruning(cnn, colors, energy=0.5, epochs=0, keep_norm=False)
    assert kept.edits == anew.edits
    changed = {key for key, tensor in kept.module.state_dict().items() if not torch.equal(tensor, anew.module.state_dict()[key])}
    assert changed and all("running_" in key or "num_batches" in key for key in changed)


@pytest.mark.parametrize("keep_norm", [True, False])
def test_a_network_tuned_with_kept_batch_norm_keeps_it(cnn: Network, colors: Dataset, keep_norm: bool) -> None:
    tuned = cnn.copy()
    train_low_rank(tuned, colors, [], lambda _: ({}, 1.0), every=None, nuclear=0.0, epochs=8, batch_size=12, learning_rate=0.05, keep_norm=keep_norm)
    statistics = [key for key in cnn.module.state_dict() if "running_" in key]
    assert all(torch.equal(tuned.module.state_dict()[key], cnn.module.state_dict()[key]) == keep_norm for key in statistics)
    assert needs_its_norm(tuned, colors) == keep_norm
    small = trained_rank_pruning(tuned, colors, colors, energy=0.9, epochs=1, batch_size=12)
    assert ("accuracy cut, batch norm re-estimated" in small.reports["rank pruning"].figures) != keep_norm


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"energy": 0.0}, "above 0 and at most 1"),
        ({"energy": 1.2}, "above 0 and at most 1"),
        ({"every": 0}, "at least 1 step"),
        ({"nuclear": -1.0}, "at least 0"),
        ({"keep": 1.0}, "between 0 and 1"),
        ({"keep": 0.01}, r"at rank 1 leave 0\.\d+; give more"),
        ({"layers": "linear"}, r"no layer of this network can be cut as asked.*head"),
        ({"leave_out": ["conv9"]}, "no layer is called so"),
    ],
)
def test_bad_input(cnn: Network, colors: Dataset, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        trained_rank_pruning(cnn, colors, epochs=0, **settings)


def test_other_classes_and_damaged_weights_are_refused(cnn: Network, colors: Dataset) -> None:
    with pytest.raises(BadInput, match="classes"):
        trained_rank_pruning(cnn.edited(labels=("x", "y", "z")), colors)
    damaged = cnn.copy()
    next(damaged.module.parameters()).data.fill_(float("nan"))
    with pytest.raises(BadInput, match=r"conv1.0.weight"):
        trained_rank_pruning(damaged, colors)

"""Maestro: cuts, sampler, penalty, importance in closed form; SVD and PCA by training; shrinking, deployment, and the whole on a CNN and a ViT."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

import wellread
from wellread import Network, meter, ranks, runtime
from wellread.batches import network_batches
from wellread.compress.maestro import (
    cut_to,
    dense,
    deploy,
    draw,
    hierarchical_lasso,
    importance,
    maestro,
    narrowed,
    needed,
    ordered_layers,
    train_ordered,
    weights,
)
from wellread.data import as_data
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.structure import apply, layer_of

module_under_test = sys.modules["wellread.compress.maestro"]  # by that name the package has the function
COLORS = ("blue", "green", "red")


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


@pytest.fixture(scope="module")
def cnn() -> Network:
    return tiny("test_resnet")


def factorised(network: Network) -> tuple[Network, list[str]]:
    layers, _ = ranks.find_layers(network)
    return ranks.cut(network, layers, {layer.path: layer.highest for layer in layers}), [layer.path for layer in layers]


def a_pair(kind: str = "linear", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "linear":
        return nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(5, 6))
    return nn.Sequential(nn.Conv2d(4, 5, 3, 2, (1, 2), 2, bias=False, padding_mode="reflect"), nn.Conv2d(5, 6, 1))


def an_input(kind: str) -> Tensor:
    return torch.randn(3, 7) if kind == "linear" else torch.randn(3, 4, 9, 9)


def states_equal(a: Network, b: Network) -> bool:
    first, second = a.module.state_dict(), b.module.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# --- one layer as two


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_cut_is_the_others_at_zero(kind: str) -> None:
    pair, x = a_pair(kind), an_input(kind)
    for width in range(1, 6):
        other = a_pair(kind)
        with torch.no_grad():
            other[0].weight[width:] = 0
            other[1].weight[:, width:] = 0
        with cut_to(pair, width):
            torch.testing.assert_close(pair(x), other(x))
        assert torch.equal(pair(x), a_pair(kind)(x))  # all of it again
    with cut_to(pair, 2):
        pair(x).sum().backward()
    into, out = pair[0].weight.grad.flatten(1), pair[1].weight.grad.flatten(1)
    assert into[:2].abs().sum(1).min() > 0 and out[:, :2].abs().sum(0).min() > 0
    assert into[2:].abs().max() == 0 and out[:, 2:].abs().max() == 0
    with pytest.raises(RuntimeError), cut_to(pair, 3):
        pair(torch.zeros(1, 2, 3, 4, 5))
    assert "forward" not in vars(pair)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_multiplied_back_it_computes_the_same(kind: str) -> None:
    pair, x = a_pair(kind), an_input(kind)
    whole = dense(pair)
    torch.testing.assert_close(whole(x), pair(x))
    fresh = nn.Linear(7, 6) if kind == "linear" else nn.Conv2d(4, 6, 3, 2, (1, 2), 2, padding_mode="reflect")
    assert repr(whole) == repr(fresh) and not {id(each) for each in whole.parameters()} & {id(each) for each in pair.parameters()}
    assert [tuple(tensor.shape) for tensor in weights(pair, 3)] == ([(3, 7), (6, 3)] if kind == "linear" else [(3, 36), (6, 3)])


def test_cut_for_good_it_computes_the_same(cnn: Network, colors: Dataset) -> None:
    network, paths = factorised(cnn)
    state = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    widths: dict[str, int | None] = {path: None if number == 1 else 2 + number for number, path in enumerate(paths)}
    small = narrowed(network, widths)
    with ExitStack() as cuts:
        for path in paths:
            cuts.enter_context(cut_to(layer_of(network.module, path), widths[path] or 10**6))
        np.testing.assert_allclose(predict(small, colors), predict(network, colors), rtol=1e-4, atol=1e-5)
    assert {record["layer"]: record["rank"] for record in small.edits if record["edit"] == "factorise"} == {
        path: width for path, width in widths.items() if width
    }
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.module.state_dict().items())


def test_at_full_rank_the_network_computes_what_it_did(cnn: Network, colors: Dataset) -> None:
    full, paths = factorised(cnn)
    np.testing.assert_allclose(predict(full, colors), predict(cnn, colors), rtol=1e-4, atol=1e-4)
    assert ordered_layers(full) == paths and len(paths) > 4
    back = narrowed(full, dict.fromkeys(paths))
    assert back.edits == cnn.edits and back.module.state_dict().keys() == cnn.module.state_dict().keys()
    np.testing.assert_allclose(predict(back, colors), predict(full, colors), rtol=1e-4, atol=1e-5)


def test_the_penalty_is_the_double_loop_and_so_is_its_gradient() -> None:
    pair = a_pair()
    into, out = (tensor.detach() for tensor in weights(pair))
    expected = sum(float(into[b:].norm()) + float(out[:, b:].norm()) for b in range(5))
    penalty = hierarchical_lasso(pair)
    assert float(penalty) == pytest.approx(expected, rel=1e-6)
    penalty.backward()
    for j in range(5):
        v = sum((into[j] / into[b:].norm() for b in range(j + 1)), torch.zeros(7))
        u = sum((out[:, j] / out[:, b:].norm() for b in range(j + 1)), torch.zeros(6))
        torch.testing.assert_close(pair[0].weight.grad[j], v)
        torch.testing.assert_close(pair[1].weight.grad[:, j], u)


def test_columns_at_zero_have_no_nan_gradient() -> None:
    pair = a_pair()
    with torch.no_grad():
        pair[0].weight[3:] = 0
        pair[1].weight[:, 3:] = 0
    hierarchical_lasso(pair).backward()
    assert pair[0].weight.grad.isfinite().all() and pair[1].weight.grad[:, 3:].abs().max() == 0
    assert needed(pair, 1e-5) == 3 and needed(pair, 0.999) == 1


def test_importance_is_that_of_the_paper_for_balanced_columns() -> None:
    pair = a_pair()
    found = importance(pair)
    assert (found.diff() <= 0).all()
    into, out = (tensor.detach().double() for tensor in weights(pair))
    scale = (out.norm(dim=0) / into.norm(dim=1)).sqrt()
    into, out = into * scale[:, None], out / scale
    torch.testing.assert_close(found, torch.stack([into[b:].norm() * out[:, b:].norm() for b in range(5)]))
    assert needed(pair, float(found[2] / found[0]) + 1e-9) == 2
    with torch.no_grad():  # moved between the factors, nothing changes
        pair[0].weight.mul_(10)
        pair[1].weight.div_(10)
    torch.testing.assert_close(importance(pair), found, rtol=1e-5, atol=0)
    whole = nn.Sequential(nn.Linear(7, 6))
    apply(whole, {"edit": "factorise", "layer": "0", "rank": 6})
    values = torch.linalg.svdvals(dense(whole[0]).weight.detach().double())
    torch.testing.assert_close(importance(whole[0]), values.flip(0).cumsum(0).flip(0), rtol=1e-5, atol=1e-6)


# --- the sampler


def test_each_cycle_goes_once_through_every_layer_and_width() -> None:
    widths = [3, 7, 1]
    cycles = [[draw(widths, cycle * 11 + number, (4,)) for number in range(11)] for cycle in range(3)]
    every = {(layer, width) for layer, most in enumerate(widths) for width in range(1, most + 1)}
    assert all(set(cycle) == every for cycle in cycles)
    assert cycles[0] != cycles[1] != cycles[2] and cycles[0] != [draw(widths, number, (5,)) for number in range(11)]


# --- SVD and PCA by training


def trained(target: Tensor, x: Tensor, rank: int, *, ordered: bool, seed: int, steps: int, rate: float) -> Any:
    """U V from random factors, such that x V^T U^T is like `target`; gradient descent with momentum."""
    torch.manual_seed(seed)
    pair = nn.Sequential(nn.Linear(x.shape[1], rank, bias=False), nn.Linear(rank, target.shape[1], bias=False))
    optimizer = torch.optim.SGD(pair.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number in range(steps):
        optimizer.zero_grad()
        with cut_to(pair, draw([rank], number, (seed,))[1] if ordered else rank):
            (pair(x) - target).square().sum().backward()
        optimizer.step()
        schedule.step()
    return pair


def test_a_linear_map_becomes_its_svd() -> None:
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(size, 6))[0] for size in (9, 6))
    w = left @ torch.diag(torch.tensor([1.0, 0.8, 0.6, 0.45, 0.3, 0.2])) @ right.T  # [9, 6]
    x = torch.eye(6)  # the second moments of N(0, I)
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    pairs = {ordered: trained(x @ w.T, x, 6, ordered=ordered, seed=0, steps=2500, rate=0.1) for ordered in (True, False)}
    for b in range(1, 7):
        into, out = (tensor.detach() for tensor in weights(pairs[True]))
        torch.testing.assert_close(out[:, :b] @ into[:b], (u[:, :b] * s[:b]) @ vt[:b], rtol=0, atol=0.02)
    into, out = (tensor.detach() for tensor in weights(pairs[False]))
    torch.testing.assert_close(out @ into, w, rtol=0, atol=0.02)  # the same map, and its columns have no order
    assert max(float((out[:, :b] @ into[:b] - (u[:, :b] * s[:b]) @ vt[:b]).abs().max()) for b in range(1, 6)) > 0.1


def test_a_linear_autoencoder_becomes_pca_on_digits() -> None:
    digits = load_digits().data
    pca = PCA().fit(digits)
    variances = pca.explained_variance_
    rows = (pca.components_.T * np.sqrt(variances / variances[0])) @ pca.components_  # 64 rows with the moments of all the digits
    root = torch.tensor(rows, dtype=torch.float32)
    for seed, ordered in ((0, True), (1, True), (2, True), (0, False)):
        pair = trained(root, root, 16, ordered=ordered, seed=seed, steps=3000, rate=0.1)
        for k in (1, 2, 4, 8, 16):
            with torch.no_grad(), cut_to(pair, k):
                centred = torch.tensor(digits - pca.mean_, dtype=torch.float32)
                error = float((pair(centred) - centred).square().sum()) / (len(digits) - 1)
            if ordered or k == 16:
                assert error <= 1.02 * variances[k:].sum()
            else:
                assert error > 1.05 * variances[k:].sum()


# --- training of a network


def settings(network: Network, colors: Dataset, **changed: Any) -> dict[str, Any]:
    batches = network_batches(network, colors, batch_size=12, shuffle=True, drop_last=True)
    return {"batches": batches, "loss": lambda out, batch: F.cross_entropy(out, batch["label"]), "epochs": 2, "lasso": 1e-6, "shrink": 0.0, **changed}


def test_one_layer_is_cut_in_each_step_and_all_others_are_whole(cnn: Network, colors: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    network, paths = factorised(cnn)
    pairs = {id(layer_of(network.module, path)): number for number, path in enumerate(paths)}
    seen = []
    cut = module_under_test.cut_to

    def noted(pair: Any, width: int) -> Any:
        seen.append((pairs[id(pair)], width))
        return cut(pair, width)

    monkeypatch.setattr(module_under_test, "cut_to", noted)
    widths = [len(weights(layer_of(network.module, path))[0]) for path in paths]
    _, history = train_ordered(network, paths, **settings(network, colors, epochs=3))
    steps = [seen[start : start + len(paths)] for start in range(0, len(seen), len(paths))]
    expected = [(dict(enumerate(widths)) | dict([draw(widths, number, (0, epoch))])) for epoch in range(3) for number in range(3)]
    assert [dict(each) for each in steps] == expected and len({each for step in steps for each in step}) > len(paths)
    assert history == [dict(zip(paths, widths, strict=True))] * 3
    assert not states_equal(network, factorised(cnn)[0])
    seen.clear()
    train_ordered(network, paths, **settings(network, colors, ordered=False))
    assert seen == list(enumerate(widths)) * 6


def test_columns_go_between_epochs_and_are_never_read_again(cnn: Network, colors: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"shrink": 0.1, "lasso": 1e-3, "epochs": 3}
    start, paths = factorised(cnn)
    network = start.copy()
    small, history = train_ordered(network, paths, **settings(network, colors, **options))
    assert len(history) == 3 and small.edits == [each | {"rank": history[2][each["layer"]]} if "rank" in each else each for each in start.edits]
    for layer in ranks.find_layers(cnn)[0]:
        assert history[2][layer.path] <= history[1][layer.path] <= history[0][layer.path] < layer.highest
        into, out = weights(layer_of(small.module, layer.path))
        assert len(into) == out.shape[1] == history[2][layer.path]
        mine = weights(layer_of(network.module, layer.path), len(into))
        assert torch.equal(into, mine[0]) and torch.equal(out, mine[1])
    np.testing.assert_allclose(predict(small, colors), predict(narrowed(network, history[2]), colors), rtol=1e-6)
    shrink = module_under_test.Ordered.shrink

    def spoilt(self: Any, epoch: int, threshold: float) -> None:
        shrink(self, epoch, threshold)
        for pair, width in zip(self.pairs, self.ranks[epoch].tolist(), strict=True):
            with torch.no_grad():
                pair[0].weight[width:] = 1e6
                pair[1].weight[:, width:] = -1e6

    monkeypatch.setattr(module_under_test.Ordered, "shrink", spoilt)
    other = start.copy()
    found = train_ordered(other, paths, **settings(other, colors, **options))
    assert found[1] == history and states_equal(found[0], small)


def test_the_penalty_is_part_of_the_loss(cnn: Network, colors: Dataset) -> None:
    start, paths = factorised(cnn)
    found = {}
    for lasso in (0.0, 0.01):
        network = start.copy()
        train_ordered(network, paths, **settings(network, colors, epochs=1, lasso=lasso, learning_rate=0.1))
        found[lasso] = sum(hierarchical_lasso(layer_of(network.module, path)).item() for path in paths)
    assert found[0.01] < found[0.0]


def test_a_killed_training_goes_on_where_it_was(cnn: Network, colors: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken, paths = factorised(cnn)
    options: dict[str, Any] = {"shrink": 0.05, "epochs": 3, "learning_rate": 0.05}
    whole, history = train_ordered(unbroken, paths, **settings(unbroken, colors, **options))
    clock = SimpleNamespace(perf_counter=iter(range(0, 10**9, 1000)).__next__)  # so slow that each step leaves a checkpoint
    monkeypatch.setattr("wellread.train.time", clock)
    steps = []

    def killed(out: Tensor, batch: dict[str, Any]) -> Tensor:
        steps.append(1)
        if len(steps) == 6:  # the last step of the second epoch
            raise KeyboardInterrupt
        return F.cross_entropy(out, batch["label"])

    broken, _ = factorised(cnn)
    with runtime.using(folder=tmp_path), pytest.raises(KeyboardInterrupt):
        train_ordered(broken, paths, **settings(broken, colors, **options | {"loss": killed}))
    monkeypatch.undo()
    resumed, _ = factorised(cnn)
    with runtime.using(folder=tmp_path):
        found = train_ordered(resumed, paths, **settings(resumed, colors, **options))
    assert found[1] == history and states_equal(found[0], whole) and found[0].edits == whole.edits


# --- smaller networks of it


def test_deployment_keeps_first_columns_within_the_budget(cnn: Network, colors: Dataset) -> None:
    network, paths = factorised(cnn)
    sizes = []
    for keep in (0.8, 0.6):
        small = deploy(network, keep=keep)
        assert meter.macs(small) <= keep * meter.macs(cnn)
        sizes.append({record["layer"]: record["rank"] for record in small.edits if record["edit"] == "factorise"})
        for path in paths:
            pair: Any = layer_of(network.module, path)
            mine: Any = layer_of(small.module, path)
            if path in sizes[-1]:
                rank = sizes[-1][path]
                assert torch.equal(mine[0].weight, pair[0].weight[:rank]) and torch.equal(mine[1].weight, pair[1].weight[:, :rank])
            else:
                assert isinstance(mine, nn.Linear | nn.Conv2d)
        assert small.lineage[-1]["method"] == "maestro-deploy"
    assert all(rank <= sizes[0].get(path, 10**6) for path, rank in sizes[1].items()) and sizes[0] != sizes[1]
    by_parameters = deploy(network, keep=0.6, budget="parameters")
    assert meter.parameters(by_parameters) <= 0.6 * meter.parameters(cnn)
    small = deploy(network, threshold=0.3)
    for path, rank in {record["layer"]: record["rank"] for record in small.edits if "rank" in record}.items():
        shares = importance(layer_of(network.module, path))
        assert float(shares[rank] / shares[0]) <= 0.3 < float(shares[rank - 1] / shares[0])
    whole = deploy(network)  # nothing is cheaper as two layers at full rank
    assert whole.edits == cnn.edits
    np.testing.assert_allclose(predict(whole, colors), predict(cnn, colors), rtol=1e-4, atol=1e-4)
    anew = deploy(network, colors, threshold=0.3)
    changed = {key for key, tensor in small.module.state_dict().items() if not torch.equal(tensor, anew.module.state_dict()[key])}
    assert changed and all("running_" in key or "num_batches" in key for key in changed)


LOAD = """
import json, sys, torch, wellread
from wellread.compress.maestro import deploy
outs = []
for folder in sys.argv[1:]:
    network = wellread.load(folder)
    for each in (network, deploy(network, keep=0.6)):
        outs.append(each(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).flatten().tolist())
print(json.dumps([outs, network.lineage[-1]["method"], list(network.reports)]))
"""


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_trained_saved_and_cut_in_a_new_process(name: str, colors: Dataset, tmp_path: Path) -> None:
    network = tiny(name)
    before = {key: tensor.clone() for key, tensor in network.module.state_dict().items()}
    others = colors.select(range(12)).map(lambda row: {"image": row["image"].rotate(90)})
    ordered = maestro(network, colors, others, epochs=2, batch_size=12, shrink=0.05)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.module.state_dict().items())
    report = ordered.reports["maestro"]
    left = {row["layer"]: row["rank"] for row in report.tables["layers"]}
    assert left == {record["layer"]: record["rank"] for record in ordered.edits if record["edit"] == "factorise"}
    assert 0 < report.figures["ranks left by training"] < 1
    assert all(row["rank"] == row["after epoch 2"] <= row["after epoch 1"] < row["of"] for row in report.tables["layers"])
    assert all(len(row["importance of the columns"]) == row["rank"] for row in report.tables["layers"])
    costs = [row["multiply-adds"] for row in report.tables["sizes"]]
    assert len(costs) > 1 and costs == sorted(costs, reverse=True) and all(row["multiply-adds"] <= row["keep"] for row in report.tables["sizes"])
    assert ordered.measured[0]["metrics"]["accuracy"] == report.figures["accuracy"]
    small = deploy(ordered, keep=0.6)
    x = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        mine = [each(x).flatten() for each in (ordered, small)]
    ordered.save(tmp_path / "ordered")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "ordered")], capture_output=True, text=True, check=True)
    theirs, made_by, reports = json.loads(done.stdout)
    assert (made_by, reports) == ("maestro", ["maestro"])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(b), a, rtol=0, atol=0)


def test_with_a_budget_it_returns_the_cut_network(cnn: Network, colors: Dataset) -> None:
    small = maestro(cnn, colors, keep=0.7, epochs=1, batch_size=12)
    assert meter.macs(small) <= 0.7 * meter.macs(cnn)
    report = small.reports["maestro"]
    assert report.figures["multiply-adds"] == pytest.approx(meter.macs(small) / meter.macs(cnn))
    cut = {row["layer"]: row["rank"] for row in report.tables["layers"] if row["rank"] != "whole"}
    assert cut == {record["layer"]: record["rank"] for record in small.edits if record["edit"] == "factorise"}
    assert [step["method"] for step in small.lineage].count("maestro") == 1 and small.lineage[-1]["method"] == "maestro"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lasso": -1e-6}, "lasso is -1e-06: give a weight of at least 0"),
        ({"shrink": 1.0}, "at least 0 and below 1"),
        ({"epochs": 0}, "at least 1"),
        ({"keep": 0.01}, r"at rank 1 leave 0\.\d+; give more"),
        ({"layers": "linear"}, r"no layer of this network can be factorised as asked.*head"),
        ({"leave_out": ["conv9"]}, "no layer is called so"),
    ],
)
def test_bad_input(cnn: Network, colors: Dataset, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        maestro(cnn, colors, **settings)


def test_bad_input_of_deployment(cnn: Network) -> None:
    with pytest.raises(BadInput, match="factorise no layer"):
        deploy(cnn, keep=0.5)
    network, _ = factorised(cnn)
    with pytest.raises(BadInput, match=r"at rank 1 leave 0\.\d+; give more"):
        deploy(network, keep=0.01)
    with pytest.raises(BadInput, match="below 1"):
        deploy(network, threshold=1.0)
    assert ordered_layers(network.with_head(("a", "b"))) == []  # edited since: cut first

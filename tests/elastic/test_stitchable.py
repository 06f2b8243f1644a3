"""Stitchable networks: positions, the least squares, the super-network and what is cut from it, tuning, and the whole on CNNs, ViTs and text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor, nn

import wellread
from bench.cifar_resnet import ResNet
from wellread import ImageInput, Network, runtime
from wellread.chain import Stitch, chain
from wellread.cli import main
from wellread.data import as_data, subset
from wellread.elastic import stitchable
from wellread.elastic.stitchable import (
    Regression,
    Stitchable,
    cut,
    least_squares,
    mean_stitch,
    paired,
    positions,
    rows_of,
    stitched_by_least_squares,
    super_network,
    tune,
    unpaired,
)
from wellread.errors import BadInput
from wellread.meter import macs, parameters

COLORS = ("blue", "green", "red")


def resnet(blocks: int, width: int = 8, seed: int = 0) -> Network:
    """A CIFAR ResNet for three classes on 16 x 16 pixels, with batch norms that are not fresh."""
    torch.manual_seed(seed)
    arguments = {"blocks": blocks, "classes": 3, "width": width}
    architecture = {"family": "class", "name": "bench.cifar_resnet:ResNet", "arguments": arguments}
    network = Network(ResNet(**arguments), ImageInput((16, 16)), "linear", COLORS, architecture=architecture)
    for name, tensor in network.module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
    return network


def vit(name: str = "timm/test_vit", seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = wellread.load(name, pretrained=False, img_size=32, num_classes=3)
    return network.edited(input=network.input.changed(size=(32, 32)), labels=COLORS)


@pytest.fixture(scope="module")
def colors() -> Dataset:
    """90 pictures of noise with a tint."""
    random = np.random.default_rng(0)
    pairs = []
    for number in range(90):
        picture = random.integers(0, 160, (16, 16, 3))
        picture[..., 2 - number % 3] += 60
        pairs.append((Image.fromarray(picture.astype(np.uint8)), COLORS[number % 3]))
    return as_data(pairs)


@pytest.fixture(scope="module")
def both(colors: Dataset) -> Network:
    """The super-network of a ResNet-8 and a ResNet-20 of other width, solved on 30 pictures."""
    return stitched_by_least_squares([resnet(1), resnet(3, 12, 1)], subset(colors, range(30)))[0]


def pictures(network: Network, rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, *network.input.size, generator=torch.Generator().manual_seed(3))


def at(network: Network, number: int, batch: Tensor) -> Tensor:
    before, network.module.choice = network.module.choice, number
    with torch.no_grad():
        found = network(batch)
    network.module.choice = before
    return found


# --- positions


def test_the_counts_are_those_of_the_paper() -> None:
    pairs = paired(12)
    assert len(pairs) == 34 and len({layer for _, _, layer in pairs}) == 11
    assert 3 + 2 * len(positions([12], [12])) == 71  # three anchors, neighbours in size
    assert paired(2) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    assert [layer for j, k, layer in paired(4) if (j, k) in ((1, 1), (1, 2), (2, 1))] == [0, 1, 1]


def test_a_deeper_network_is_divided_among_the_blocks_of_the_other() -> None:
    assert [(j, k) for j, k, _ in unpaired(3, 9)] == [(0, 1), (0, 2), (1, 3), (1, 4), (1, 5), (2, 6), (2, 7), (2, 8)]
    assert {layer for _, _, layer in unpaired(3, 9)} == {0, 1, 2}
    found = positions([3, 3, 3], [9, 9, 9])
    assert len(found) == 24 and len({layer for _, _, layer in found}) == 9
    assert found[8] == (3, 10, 3) and found[-1] == (8, 26, 8)
    assert [(j, k) for j, k, _ in unpaired(4, 2)] == [(2, 1)]  # the cheaper one may have more blocks


def test_other_numbers_of_stages_are_one_stage() -> None:
    assert positions([1, 1], [2, 2, 2]) == unpaired(2, 6)


# --- least squares


def test_an_exact_map_is_found() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(50, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    regression = Regression(6, 4)
    for part in (x[:7], x[7:30], x[30:]):
        regression.update(part, part @ weight.T + bias)
    found = regression.solve()
    torch.testing.assert_close(found, (weight, bias), rtol=1e-9, atol=1e-9)


def test_it_agrees_with_numpy_and_scikit_learn_and_its_residual_is_orthogonal() -> None:
    torch.manual_seed(0)
    x, y = 5 + torch.randn(80, 6, dtype=torch.float64), torch.randn(80, 3, dtype=torch.float64)
    regression = Regression(6, 3)
    for part in range(4):
        regression.update(x[part::4], y[part::4])
    weight, bias = regression.solve()
    ones = torch.cat([x, torch.ones(80, 1, dtype=torch.float64)], 1)
    theirs = np.linalg.lstsq(ones.numpy(), y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(torch.cat([weight, bias[:, None]], 1).numpy(), theirs.T, rtol=1e-8, atol=1e-8)
    sklearn = LinearRegression().fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), sklearn.coef_, rtol=1e-8, atol=1e-8)
    residual = y - x @ weight.T - bias
    assert float((ones.T @ residual).abs().max()) < 1e-8
    weight, bias = regression.solve(ridge=0.3)
    penalty = 0.3 * 80 * float(x.var(0, unbiased=False).mean())
    theirs = Ridge(penalty).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), theirs.coef_, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), theirs.intercept_, rtol=1e-8, atol=1e-8)


def test_features_that_depend_on_each_other_share_the_weight() -> None:
    x = torch.randn(40, 1, dtype=torch.float64)
    regression = Regression(3, 1)
    regression.update(torch.cat([x, x, torch.zeros_like(x)], 1), 4 * x + 1)
    weight, bias = regression.solve()
    torch.testing.assert_close(weight, torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias, torch.ones(1, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_rows_are_places_and_words() -> None:
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert rows_of(maps).tolist() == [[i, i + 12] for i in range(12)]
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    assert rows_of(tokens).shape == (6, 2) and rows_of(tokens, torch.tensor([[1, 1, 0], [1, 0, 0]])).tolist() == [[0, 1], [2, 3], [6, 7]]


@pytest.mark.parametrize("make", [lambda: resnet(3), vit])
def test_a_network_stitched_to_itself_is_itself(make: object, colors: Dataset) -> None:
    network = make()  # type: ignore[operator]
    view = chain(network)
    inside = [(k - 1, k, k) for k in range(1, len(view.blocks))]
    layers = least_squares(network, network, (view, view), inside, subset(colors, range(30)), ridge=0.0)
    assert len(layers) == len(inside)
    made = super_network([network, network.copy()], [view, view], [layers])
    batch = network.input([colors[i]["image"] for i in range(4)])
    for number in range(len(made.module.configurations)):
        torch.testing.assert_close(at(made, number, batch), network(batch).detach(), rtol=1e-3, atol=1e-3)
    dense = next(layer for pair, layer in layers.items() if pair[1] == len(view.blocks) - 1)
    if isinstance(dense.map, nn.Linear):
        torch.testing.assert_close(dense.map.weight, torch.eye(len(dense.map.bias)), rtol=0, atol=1e-2)


def test_shared_layers_start_at_the_mean() -> None:
    layers = [Stitch(2, 3, False) for _ in range(3)]
    shared = mean_stitch(layers)
    torch.testing.assert_close(shared.map.weight, sum(layer.map.weight for layer in layers) / 3)
    assert shared is not layers[0] and shared.map.weight is not layers[0].map.weight


def test_pairs_that_do_not_fit_are_left_out(colors: Dataset) -> None:
    small, large = resnet(2), resnet(2, 12)
    views = chain(small), chain(large)
    pairs = positions([2, 2, 2], [2, 2, 2])
    found = least_squares(small, large, views, pairs, subset(colors, range(20)), 1e-6)
    assert len(pairs) == 12 and len(found) == 8  # at the start of a later stage the map is twice as large
    assert all(k not in (2, 4) for _, k, _ in found)


# --- the super-network


def test_anchors_are_reproduced_to_the_bit_and_switching_leaves_nothing_behind(both: Network) -> None:
    batch = pictures(both)
    state = {name: tensor.clone() for name, tensor in both.module.state_dict().items()}
    first = [at(both, number, batch) for number in range(len(both.module.configurations))]
    assert torch.equal(first[0], resnet(1)(batch)) and torch.equal(first[1], resnet(3, 12, 1)(batch)) and torch.equal(both(batch), first[1])
    again = [at(both, number, batch) for number in reversed(range(len(first)))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in both.module.state_dict().items())
    assert len({tuple(each.flatten().tolist()) for each in first}) == len(first)


def test_what_is_cut_out_computes_the_same_and_costs_the_sum_of_its_parts(both: Network) -> None:
    batch = pictures(both)
    small, large = resnet(1), resnet(3, 12, 1)

    def spent(network: Network, blocks: slice) -> int:
        """MACs of the blocks: two 3 x 3 convolutions each."""
        total = 0
        for path in chain(network).blocks[blocks]:
            block, side = network.module.get_submodule(path), {"1": 16, "2": 8, "3": 4}[path[5]]
            total += side * side * (block.conv1.weight.numel() + block.conv2.weight.numel())
        return total

    for number, chosen in enumerate(both.module.configurations):
        one = cut(both, number)
        torch.testing.assert_close(one(batch).detach(), at(both, number, batch), rtol=0, atol=1e-6)
        if "back" in chosen:
            stitching = both.module.stitches[chosen["layer"]].map.weight
            side = 16 // 2 ** (chosen["until"] - 1)
            expected = 16 * 16 * small.module.conv1.weight.numel() + side * side * stitching.numel() + large.module.linear.weight.numel()
            expected += spent(small, slice(chosen["until"])) + spent(large, slice(chosen["since"], None))
            assert macs(one) == expected and parameters(one) < parameters(both)
            assert not isinstance(one.module, Stitchable) and one.labels == COLORS and one.head == "back.linear"
    assert cut(both, 0).fingerprint == small.fingerprint and cut(both, 1).fingerprint == large.fingerprint


def test_a_super_network_is_saved_and_loaded_in_another_process(both: Network, tmp_path: Path) -> None:
    batch = pictures(both)
    both.save(tmp_path / "super")
    torch.save((batch, [at(both, number, batch) for number in (0, 2, 5)]), tmp_path / "outputs.pt")
    code = (
        "import sys, torch, wellread\n"
        "from wellread.elastic.stitchable import cut\n"
        "network = wellread.load(sys.argv[1])\n"
        "batch, outputs = torch.load(sys.argv[2], weights_only=True)\n"
        "for number, output in zip((0, 2, 5), outputs):\n"
        "    network.module.choice = number\n"
        "    assert torch.equal(network(batch), output), number\n"
        "    assert torch.allclose(cut(network, number)(batch), output, atol=1e-6), number\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "super", tmp_path / "outputs.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_three_anchors(colors: Dataset) -> None:
    made, _ = stitched_by_least_squares([resnet(1), resnet(2), resnet(3)], subset(colors, range(20)))
    pairs = {(each["front"], each["back"]) for each in made.module.configurations if "back" in each}
    assert len(made.module.anchors) == 3 and pairs == {(0, 1), (1, 2)} and made.module.choice == 2
    assert made.edits[-1]["arguments"]["configurations"] == made.module.configurations


# --- tuning


def test_tuning_touches_what_it_may(both: Network, colors: Dataset) -> None:
    state = both.module.state_dict()
    made = {}
    for anchors in (True, False):
        made[anchors] = both.copy()
        losses = tune(made[anchors], colors, epochs=3, learning_rate=0.01, batch_size=10, tune_anchors=anchors)
        assert len(losses) == 27 and made[anchors].module.choice == both.module.choice
        changed = {name for name, tensor in made[anchors].module.state_dict().items() if not torch.equal(tensor, state[name])}
        assert any(name.startswith("stitches.") for name in changed) and not any("running" in name for name in changed)
        assert any(name.startswith("anchors.") for name in changed) == anchors
    again = both.copy()
    tune(again, colors, epochs=3, learning_rate=0.01, batch_size=10)
    assert again.fingerprint == made[True].fingerprint


def test_every_configuration_is_drawn(both: Network, colors: Dataset) -> None:
    made, drawn = both.copy(), []
    made.module.register_forward_hook(lambda module, *_: drawn.append(module.choice))
    tune(made, colors, epochs=10, learning_rate=1e-4, batch_size=10)
    assert set(drawn) == set(range(len(made.module.configurations))) and len(drawn) == 90
    assert max(np.bincount(drawn)) < 30


def test_a_killed_tuning_goes_on_with_the_same_draws(both: Network, colors: Dataset, tmp_path: Path) -> None:
    whole, broken = both.copy(), both.copy()
    tune(whole, colors, epochs=2, learning_rate=0.01, batch_size=10)
    calls = []

    def killed(*_: object) -> None:
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt

    with runtime.using(folder=tmp_path):
        hook = broken.module.register_forward_hook(killed)
        with pytest.raises(KeyboardInterrupt):
            tune(broken, colors, epochs=2, learning_rate=0.01, batch_size=10)
        hook.remove()
    with runtime.using(folder=tmp_path):
        again = both.copy()
        tune(again, colors, epochs=2, learning_rate=0.01, batch_size=10)
    assert again.fingerprint == whole.fingerprint


def test_a_teacher_counts_half(both: Network, colors: Dataset) -> None:
    plain, taught, same = both.copy(), both.copy(), both.copy()
    truth = np.asarray(colors["label"])
    losses = [
        tune(made, colors, epochs=1, learning_rate=1e-12, batch_size=10, teacher=teacher)
        for made, teacher in ((plain, None), (taught, (truth + 1) % 3), (same, truth))
    ]
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-6)
    assert np.abs(np.subtract(losses[0], losses[1])).max() > 1e-3


# --- the method


def test_no_training(colors: Dataset) -> None:
    small, large = resnet(1), resnet(3, 12, 1)
    before = small.fingerprint, large.fingerprint
    made = stitchable([small, large], colors, samples=30, timing=False)
    report = made.reports["stitchable"]
    rows = report.tables["sizes"]
    assert (small.fingerprint, large.fingerprint) == before
    assert len(rows) == len(made.module.configurations) == report.figures["sizes"] and [each["MACs, M"] for each in rows] == sorted(
        each["MACs, M"] for each in rows
    )
    assert next(each for each in rows if each["number"] == 1)["agreement with the largest"] == 1.0
    assert "ms, batch 1" not in rows[0] and made.lineage[-1]["method"] == "stitchable" and "Nothing was trained" in report.text


def test_tuning_and_a_budget(colors: Dataset, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(90)
    train, validation, calibration = (subset(colors, order[part::3]) for part in range(3))
    with pytest.warns(UserWarning, match="sorted by cost"):
        made = stitchable([resnet(3, 12, 1), resnet(1)], calibration, train, validation, epochs=1, batch_size=10, distill=True, budget=0.7)
    figures = made.reports["stitchable"].figures
    assert figures["share of the largest cost"] <= 0.7 and macs(made) <= 0.7 * macs(resnet(3, 12, 1))
    rows = [each for each in made.reports["stitchable"].tables["sizes"] if each["MACs, M"] * 1e6 <= 0.7 * macs(resnet(3, 12, 1))]
    assert figures["accuracy"] == max(each["accuracy"] for each in rows) and all(each["ms, batch 1"] > 0 for each in rows)
    batch = pictures(made)
    made.save(tmp_path / "made")
    assert torch.equal(wellread.load(tmp_path / "made")(batch), made(batch))


def test_a_super_network_is_cut_later(both: Network, colors: Dataset) -> None:
    one = stitchable([both], colors, budget=0.6, timing=False)
    number = one.reports["stitchable"].figures["number"]
    assert torch.equal(one(pictures(one)), cut(both, number)(pictures(one)))


def test_transformers_and_text(colors: Dataset) -> None:
    with pytest.warns(UserWarning, match="answer differently"):  # they are random
        made = stitchable([vit(), vit("timm/test_vit3", 1)], colors, samples=40, timing=False)
    assert len(made.module.configurations) > 4
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from test_chain import bert

    texts = as_data(["good very", "bad bad good very", "very bad"] * 10)
    torch.manual_seed(0)
    made = stitchable([bert(2), bert(4)], texts, samples=20, timing=False)
    rows = made.reports["stitchable"].tables["sizes"]
    assert all(-1 <= each["cosine to the largest"] <= 1 + 1e-6 for each in rows)
    assert abs(next(each for each in rows if each["number"] == 1)["cosine to the largest"] - 1) < 1e-6
    with pytest.raises(BadInput, match="16 and 24 numbers in their embeddings"):
        stitchable([bert(2), bert(4, 24)], texts, samples=20, timing=False)


def example(folder: Path) -> dict[str, object]:
    """What the conformance test runs: two sizes and a few pictures of noise."""
    random = np.random.default_rng(0)
    places = []
    for part in ("calibration", "train"):
        for number in range(24):
            place = folder / part / COLORS[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(place / f"{number}.png")
        places.append(f"folder:{folder / part}")
    networks = [str(resnet(1).save(folder / "small")), str(resnet(2, 12).save(folder / "large"))]
    return {"networks": networks, "calibration": places[0], "train": places[1], "epochs": 1, "batch_size": 8, "timing": False}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "stitchable"]
    for name, value in example(tmp_path).items():
        for each in value if isinstance(value, list) else [value]:
            words += ["--no-timing"] if each is False else [f"--{name.replace('_', '-')}", str(each)]
    assert main([*words, "--budget", "0.9", "--out", str(tmp_path / "out")]) == 0
    assert "stitching layers" in capsys.readouterr().out
    assert "sizes" in wellread.load(tmp_path / "out").reports["stitchable"].html()


def test_bad_input(both: Network, colors: Dataset) -> None:
    small, large = resnet(1), resnet(2)
    for arguments, said in (
        ({"networks": [small]}, "give at least two"),
        ({"networks": [small, large.edited(input=large.input.changed(size=(32, 32)))]}, "fed differently, size"),
        ({"networks": [small, large.edited(input=large.input.changed(mean=(0.5,) * 3))]}, "fed differently, mean"),
        ({"networks": [small, large.edited(labels=COLORS[::-1])]}, "in another order"),
        ({"networks": [small, large.edited(labels=None).with_head(["a", "b"]).edited(labels=None)]}, "3 and 2 classes"),
        ({"networks": [small, wellread.load("torchvision/squeezenet1_1", pretrained=False)]}, "blocks of a SqueezeNet are not known"),
        ({"calibration": subset(colors, [0]), "networks": [resnet(1, 48), resnet(2, 48)]}, "64 rows for 97 unknowns.*at least 2 examples"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"budget": 0.01, "samples": 20, "timing": False}, r"budget 0.01 cannot be met: the smallest size costs 0\.\d+"),
        ({"samples": 0}, "samples is 0"),
    ):
        with pytest.raises(BadInput, match=said):
            stitchable(**{"networks": [small, large], "calibration": colors, **arguments})
    with pytest.raises(BadInput, match="no configuration 99"):
        cut(both, 99)
    with pytest.raises(BadInput, match="no super-network"):
        cut(small, 0)
    with pytest.warns(UserWarning, match="sorted by cost"):
        stitched_by_least_squares([large, small], subset(colors, range(10)))

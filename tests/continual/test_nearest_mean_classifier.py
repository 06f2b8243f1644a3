"""Nearest mean classifier: sums that do not care for order, agreement with scikit-learn, networks of several families, bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture
from torch import nn

import wellread
from wellread import runtime
from wellread.continual.metrics import continual_report, task_accuracies
from wellread.continual.nearest_mean_classifier import (
    PART,
    NearestMeanHead,
    encoder,
    linear_form,
    means_of,
    merge,
    nearest_mean_classifier,
    unit_length,
)
from wellread.errors import BadInput
from wellread.evaluate import evaluate, predict
from wellread.features import embed
from wellread.inputs import ImageInput
from wellread.network import Network

RULES = ("euclidean", "cosine", "lda", "ridge")
NAMES = ["ant", "bee", "cow", "dog"]


class Small(nn.Module):
    """A network of nobody's family. Black pictures have features that are all zero."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, stride=4, bias=False)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def small(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(Small(), input=ImageInput((16, 16), mean=(0, 0, 0), std=(1, 1, 1)))


def pictures(classes: list[int], rows: int = 6, seed: int = 0, names: list[str] = NAMES) -> Dataset:
    """Noise around a colour of the class's own; a table knows all the names, also those it has no rows of."""
    random = np.random.default_rng((seed, *classes))
    colours = np.random.default_rng(9).integers(40, 200, (len(names), 1, 1, 3))
    images = [Picture.fromarray((colours[c] + random.integers(0, 50, (16, 16, 3))).astype(np.uint8)) for c in classes for _ in range(rows)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": images, "label": [c for c in classes for _ in range(rows)]}, features=features)


def vectors(rows: int = 120, width: int = 12, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of every length in clusters that overlap; every class has as many."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return (centres[y] + 1.5 * torch.randn(rows, width, generator=generator)) * (0.1 + 5 * torch.rand(rows, 1, generator=generator)), y


def example(folder: Path) -> dict[str, str]:
    """Arguments that can be typed, for the conformance test: `new` may be left out, so it cannot be made up from the signature."""
    network = wellread.load("timm/test_resnet", pretrained=False)
    network.edited(input=network.input.changed(size=(32, 32))).save(folder / "network", force=True)
    for number, row in enumerate(pictures([0, 1])):
        place = folder / "photos" / NAMES[row["label"]]
        place.mkdir(parents=True, exist_ok=True)
        row["image"].save(place / f"{number}.png")
    return {"network": str(folder / "network"), "new": f"folder:{folder / 'photos'}"}


def fitted(features: torch.Tensor, y: torch.Tensor, rule: str = "euclidean", penalty: float = 1.0, classes: int = 4) -> NearestMeanHead:
    head = NearestMeanHead(features.shape[1], classes, rule, penalty)  # type: ignore[arg-type]
    head.add(features, y)
    head.solve()
    return head


def by_name(network: Network) -> dict[str, tuple[torch.Tensor, int]]:
    head = means_of(network)
    assert head is not None and network.labels is not None
    return {name: (head.sums[i] / head.counts[i], int(head.counts[i])) for i, name in enumerate(network.labels)}


def same_means(a: Network, b: Network, tolerance: float = 1e-10) -> None:
    first, second = by_name(a), by_name(b)
    assert first.keys() == second.keys()
    for name, (mean, count) in first.items():
        assert count == second[name][1]
        assert (mean - second[name][0]).abs().max() <= tolerance


def guesses(network: Network, data: Dataset) -> list[str]:
    assert network.labels is not None
    return [network.labels[i] for i in predict(network, data).argmax(1)]


# --- the arithmetic


@pytest.mark.parametrize("rule", RULES)
def test_order_and_pieces_do_not_matter(rule):
    x, y = vectors()
    test, _ = vectors(seed=1)
    whole = fitted(x, y, rule)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    shuffled = fitted(x[order], y[order], rule)
    one_by_one = NearestMeanHead(12, 4, rule)
    for row in torch.argsort(y).tolist():  # class after class, as tasks come
        one_by_one.add(x[row : row + 1], y[row : row + 1])
    one_by_one.solve()
    for other in (shuffled, one_by_one):
        assert (other.sums / other.counts[:, None] - whole.sums / whole.counts[:, None]).abs().max() <= 1e-10
        assert (other.weight - whole.weight).abs().max() <= 1e-10 * whole.weight.abs().max()
        assert torch.equal(other(test).argmax(1), whole(test).argmax(1))


def test_it_agrees_with_nearest_centroid():
    from sklearn.neighbors import NearestCentroid

    x, y = vectors(240, 20, 8)
    test, truth = vectors(400, 20, 8, seed=1)
    theirs = NearestCentroid(metric="euclidean").fit(unit_length(x).numpy(), y.numpy()).predict(unit_length(test).numpy())
    ours = fitted(x, y, classes=8)(test).argmax(1).numpy()
    assert (ours == theirs).all()
    assert 0.5 < (ours == truth.numpy()).mean() < 1  # neither trivial nor hopeless


def test_one_example_a_class_is_the_nearest_neighbour():
    from sklearn.neighbors import KNeighborsClassifier

    x, y = vectors(8, 10, 8)
    test, _ = vectors(200, 10, 8, seed=1)
    theirs = KNeighborsClassifier(1).fit(unit_length(x).numpy(), y.numpy()).predict(unit_length(test).numpy())
    assert (fitted(x, y, classes=8)(test).argmax(1).numpy() == theirs).all()


def test_logits_are_minus_half_the_squared_distance_and_a_linear_layer():
    x, y = vectors()
    test, _ = vectors(300, seed=1)
    head = fitted(x, y)
    unit = unit_length(test)
    distance = torch.cdist(unit, head.sums / head.counts[:, None])
    assert torch.allclose(head(test).double(), -distance.square() / 2, atol=1e-6)
    linear = nn.Linear(12, 4, dtype=torch.float64)
    linear.weight.data, linear.bias.data = head.weight, head.bias
    assert torch.equal(linear(unit).argmax(1), distance.argmin(1))


def test_the_means_are_not_made_unit_length_and_cosine_is():
    """Two classes with means in the same direction: only the length of the mean tells them apart, and cosine does not see it."""
    spread, tight = [[1.0, 1.0], [1.0, -1.0]], [[1.0, 0.0], [1.0, 0.0]]
    x, y = torch.tensor(spread + tight), torch.tensor([0, 0, 1, 1])
    outside = torch.tensor([[1.0, 2.0]])
    assert fitted(x, y, classes=2)(outside).argmax().item() == 0
    assert fitted(x, y, "cosine", classes=2)(outside).diff().abs().item() < 1e-7


@pytest.mark.parametrize("penalty", [0.05, 1.0, 3.0])
def test_lda_agrees_with_scikit_learn(penalty):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = vectors()
    test, _ = vectors(300, seed=1)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=penalty / (1 + penalty)).fit(unit_length(x).numpy(), y.numpy())
    ours = fitted(x, y, "lda", penalty)
    probability = torch.softmax(unit_length(test) @ ours.weight.T + ours.bias, 1)
    assert np.allclose(probability.numpy(), theirs.predict_proba(unit_length(test).numpy()), atol=1e-9)


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_ridge_agrees_with_scikit_learn(penalty):
    from sklearn.linear_model import Ridge

    x, y = vectors()
    test, _ = vectors(300, seed=1)
    theirs = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky").fit(unit_length(x).numpy(), np.eye(4)[y.numpy()])
    assert np.allclose(fitted(x, y, "ridge", penalty)(test).numpy(), theirs.predict(unit_length(test).numpy()), atol=1e-6)


def test_float64_stays_whatever_happens_to_the_network():
    x, y = vectors()
    head = fitted(x, y)
    before = head(x)
    head.half().to(torch.bfloat16)
    assert head.weight.dtype == head.sums.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x), before)


# --- networks


def test_classes_arrive_one_at_a_time():
    network = small()
    before = network.fingerprint
    order = [2, 0, 3, 1]
    grown = network
    for number in order:
        grown = nearest_mean_classifier(grown, pictures([number]))
    assert grown.labels == tuple(NAMES[i] for i in order)  # names without rows are not classes; the order is that of arrival
    assert len(grown.edits) == 1 and grown.output == "logits"
    assert [step["method"] for step in grown.lineage] == ["nearest-mean-classifier"] * 4
    backwards = network
    for number in reversed(order):
        backwards = nearest_mean_classifier(backwards, pictures([number]))
    more = nearest_mean_classifier(grown, pictures([0, 2], seed=1))  # more of classes that are known
    assert more.labels == grown.labels and by_name(more)["ant"][1] == 12
    same_means(grown, backwards)
    test = pictures([0, 1, 2, 3], seed=5)
    assert guesses(grown, test) == guesses(backwards, test)
    assert network.fingerprint == before
    assert grown.reports["classes"].figures["bytes kept of them"] == 4 * 8 * 8 + 4 * 8
    assert evaluate(grown, test).figures["accuracy"] > 0.8  # evaluate matches classes by name


@pytest.mark.parametrize("rule", RULES)
def test_two_sites_add_up(rule):
    a, b = pictures([0, 1, 2], seed=1), pictures([2, 3], seed=2)
    first, second = nearest_mean_classifier(small(), a, rule=rule), nearest_mean_classifier(small(), b, rule=rule)
    both = nearest_mean_classifier(first, b)
    assert means_of(both).rule == rule  # kept without being named again
    added = merge(first, second)
    same_means(both, added)
    assert added.labels == ("ant", "bee", "cow", "dog") and by_name(added)["cow"][1] == 12
    assert np.allclose(predict(both, a), predict(added, a), atol=1e-6)
    assert [step["method"] for step in added.lineage].count("merge") == 1


@pytest.mark.parametrize("rule", ["euclidean", "cosine"])
def test_what_is_forgotten_is_gone_and_can_come_back(rule):
    others, bees = pictures([0, 2, 3]), pictures([1])
    alone = nearest_mean_classifier(small(), others, rule=rule)
    all_four = nearest_mean_classifier(alone, bees)
    without = nearest_mean_classifier(all_four, forget=["bee"])
    assert without.labels == ("ant", "cow", "dog") and without.fingerprint == alone.fingerprint  # to the bit
    again = nearest_mean_classifier(without, bees)
    assert again.fingerprint == all_four.fingerprint
    replaced = nearest_mean_classifier(all_four, bees, forget=["bee"])  # taken out before the new are counted in
    assert replaced.fingerprint == all_four.fingerprint


def test_rules_can_change_when_enough_was_kept():
    data = pictures([0, 1, 2, 3])
    ridge = nearest_mean_classifier(small(), data, rule="ridge", penalty=0.5)
    lda = nearest_mean_classifier(ridge, pictures([1], seed=2), rule="lda", penalty=0.2)
    direct = nearest_mean_classifier(nearest_mean_classifier(small(), data, rule="lda", penalty=0.2), pictures([1], seed=2))
    assert np.allclose(predict(lda, data), predict(direct, data), atol=1e-5) and means_of(direct).penalty == 0.2
    plain = nearest_mean_classifier(lda, forget=["dog"], rule="euclidean")  # drops the moments, and so can forget
    assert means_of(plain).moments is None and plain.labels == ("ant", "bee", "cow")


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_efficientnet", "timm/test_convnext"])
def test_families(name):
    arguments = {"img_size": 32} if "vit" in name else {}
    torch.manual_seed(0)
    network = wellread.load(name, pretrained=False, **arguments)
    network = network.edited(input=network.input.changed(size=(32, 32)))
    data = pictures([0, 1, 2, 3], rows=4)
    made = nearest_mean_classifier(network, data)
    features = torch.from_numpy(embed(network, data))
    assert features.ndim == 2 and np.array_equal(embed(encoder(made), data), features)
    assert (by_name(made)["cow"][0] - unit_length(features)[8:12].mean(0)).abs().max() < 1e-12
    distance = torch.cdist(unit_length(features), torch.stack([mean for mean, _ in by_name(made).values()]))
    assert np.allclose(predict(made, data), -distance.square().numpy() / 2, atol=1e-4)
    batch = network.input([row["image"] for row in data.select(range(2))])
    exported = torch.export.export(made.module, (batch,)).module()
    assert torch.allclose(exported(batch), made(batch), atol=1e-6)


def test_sentences():
    rows = {"bank": ["my card is lost", "the payment was refused"], "food": ["soup with bread", "fresh apples and pears"], "sport": ["the team won"]}
    pairs = [(text, name) for name, texts in rows.items() for text in texts]
    table = Dataset.from_dict({"text": [text for text, _ in pairs], "label": [list(rows).index(name) for _, name in pairs]})
    table = table.cast(Features({"text": Value("string"), "label": ClassLabel(names=list(rows))}))
    network = wellread.load("minilm-l6")
    made = nearest_mean_classifier(network, table)
    assert made.labels == ("bank", "food", "sport") and made.head == "head"
    test = Dataset.from_dict({"text": ["I cannot find my credit card", "a pot of vegetable stew", "they lost the match"], "label": [0, 1, 2]})
    assert guesses(made, test) == ["bank", "food", "sport"]


def test_saved_and_loaded_in_a_new_process(tmp_path):
    torch.manual_seed(0)
    network = wellread.load("timm/test_resnet", pretrained=False)
    network = network.edited(input=network.input.changed(size=(32, 32)))
    made = nearest_mean_classifier(nearest_mean_classifier(network, pictures([0, 3]), rule="lda"), pictures([1]))
    test, later = pictures([0, 1, 3], rows=3, seed=4), pictures([2], seed=1)
    made.save(tmp_path / "made")
    test.to_parquet(tmp_path / "test.parquet")
    later.to_parquet(tmp_path / "later.parquet")
    code = """
import sys, numpy as np, wellread
from pathlib import Path
from wellread.evaluate import predict
from wellread.runtime import using
here = Path(sys.argv[1])
with using(progress=False):
    made = wellread.load(here / "made")
    np.save(here / "logits.npy", predict(made, wellread.load_data(f"parquet:{here}/test.parquet")))
    grown = wellread.continual.nearest_mean_classifier(made, wellread.load_data(f"parquet:{here}/later.parquet"))
    grown.save(here / "grown")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert np.array_equal(np.load(tmp_path / "logits.npy"), predict(made, test))
    grown = wellread.load(tmp_path / "grown")
    assert grown.fingerprint == nearest_mean_classifier(made, later).fingerprint
    assert grown.labels == ("ant", "dog", "bee", "cow") and grown.reports["classes"].figures["classes"] == 4


@pytest.mark.gpu
def test_on_cuda_in_bfloat16():
    data = pictures([0, 1, 2, 3])
    with runtime.using(device="cuda", precision="bfloat16"):
        made = nearest_mean_classifier(nearest_mean_classifier(small(), data), pictures([1], seed=2))
        assert evaluate(made, data).figures["accuracy"] > 0.8
        assert means_of(made).sums.device.type == "cpu" and made.copy().module.cuda().fc.weight.dtype == torch.float64


# --- bad input


def test_features_of_zeros_are_counted():
    data = pictures([0, 1], rows=3)
    black = data.map(lambda row, i: {"image": Picture.new("RGB", (16, 16)) if i in (1, 4) else row["image"]}, with_indices=True)
    with pytest.raises(BadInput, match=r"2 of 6 examples .* row 1"):
        nearest_mean_classifier(small(), black)
    head = fitted(*vectors())
    with pytest.raises(BadInput, match="another encoder"):
        head.add(torch.ones(2, 5), torch.tensor([0, 1]))
    with pytest.raises(BadInput, match="not one vector"):
        head.add(torch.ones(2, 3, 12), torch.tensor([0, 1]))
    with pytest.raises(BadInput, match="not finite"):
        head.add(torch.full((1, 12), torch.nan), torch.tensor([0]))


def test_prediction_before_any_class():
    unfilled = small().with_head(["a", "b"], part=PART, features=8, classes=2)
    with pytest.raises(BadInput, match="not finite"):
        predict(unfilled, pictures([0]))
    with pytest.raises(BadInput, match="class without examples"):
        linear_form(torch.ones(2, 3), torch.tensor([4, 0]))


@pytest.mark.parametrize("change", ["weights", "input"])
def test_another_encoder_is_refused(change):
    made = nearest_mean_classifier(small(), pictures([0, 1]))
    other = made.copy()
    if change == "weights":
        other.module.conv.weight.data[0, 0, 0, 0] += 1e-3
    else:
        other.input = other.input.changed(mean=(0.5, 0.5, 0.5))
    with pytest.raises(BadInput, match="start again"):
        nearest_mean_classifier(other, pictures([2]))
    with pytest.raises(BadInput, match="encoder"):
        merge(made, other)
    with pytest.raises(BadInput, match="encoder"):
        merge(made, nearest_mean_classifier(small(seed=1), pictures([0, 1])))
    with pytest.raises(BadInput, match="no class means"):
        merge(made, small())
    with pytest.raises(BadInput, match="rule"):
        merge(made, nearest_mean_classifier(small(), pictures([0, 1]), rule="cosine"))


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"new": None}, "nothing to do"),
        ({"rule": "nearest"}, "choose one of"),
        ({"rule": "lda"}, "second moments"),
        ({"penalty": 1.0}, "leave it out"),
        ({"forget": ["cat"]}, "no class 'cat' to forget"),
        ({"new": None, "forget": ["ant", "bee"]}, "no class would be left"),
    ],
)
def test_settings_that_cannot_be(settings, complaint):
    made = nearest_mean_classifier(small(), pictures([0, 1]))
    with pytest.raises(BadInput, match=complaint):
        nearest_mean_classifier(made, **{"new": pictures([2]), **settings})


def test_moments_have_their_limits():
    made = nearest_mean_classifier(small(), pictures([0, 1]), rule="ridge")
    with pytest.raises(BadInput, match="cannot be forgotten"):
        nearest_mean_classifier(made, forget=["ant"])
    with pytest.raises(BadInput, match="0 or more"):
        nearest_mean_classifier(made, pictures([2]), penalty=-1.0)
    for rule in ("lda", "ridge"):
        with pytest.raises(BadInput, match="raise penalty"):
            nearest_mean_classifier(small(), pictures([0, 1], rows=2), rule=rule, penalty=0.0)  # 4 examples in 8 dimensions


def test_networks_without_one_vector_for_each_example():
    headless = wellread.load("timm/test_vit", pretrained=False, num_classes=0)  # its last Linear is inside a block
    layers = nn.Conv2d(3, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)
    wrong = Network(nn.Sequential(*layers), input=ImageInput((16, 16)), head="3")
    for network in (headless, wrong):
        with pytest.raises(BadInput, match="does not turn one vector"):
            nearest_mean_classifier(network, pictures([0, 1]))
    with pytest.raises(BadInput, match="anomaly score"):
        nearest_mean_classifier(small().edited(output="anomaly_score"), pictures([0, 1]))


# --- how well it learned on


def test_the_figures_of_learning_on():
    report = continual_report([[0.9], [0.6, 0.8], [0.7, 0.3, 1.0]], [10, 10, 20], stored=80)
    assert report.figures["last accuracy"] == pytest.approx((7 + 3 + 20) / 40)
    assert report.figures["average incremental accuracy"] == pytest.approx((0.9 + 0.7 + 0.75) / 3)
    assert [row["forgetting"] for row in report.tables["tasks"]] == [pytest.approx(0.2), pytest.approx(0.5), None]
    assert report.figures["mean forgetting"] == pytest.approx(0.35) and report.figures["bytes stored"] == 80
    assert "mean forgetting" not in continual_report([[0.5]], [4]).figures
    with pytest.raises(BadInput, match="one more entry"):
        continual_report([[0.9, 0.1], [0.6]], [10, 10])


def test_accuracy_by_task():
    predicted, truth = ["a", "b", "c", "a"], ["a", "a", "c", "b"]
    assert task_accuracies(predicted, truth, [["a"], ["b", "c"]]) == [0.5, 0.5]
    with pytest.raises(BadInput, match="task 2"):
        task_accuracies(predicted, truth, [["a"], ["z"]])

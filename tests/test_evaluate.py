"""Metrics agree with scikit-learn, predictions with the network, and mismatches are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score
from torch import nn

from wellread import Network
from wellread.data import labels, load_data
from wellread.errors import BadInput
from wellread.evaluate import accuracy_interval, evaluate, metrics, predict, probabilities, record, score
from wellread.inputs import ImageInput


class Score(nn.Module):
    """Brightness as an anomaly score."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3))


def classifier(classes: int = 10) -> Network:
    torch.manual_seed(0)
    return Network(nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), input=ImageInput((8, 8), 1, (0.0,), (1.0,)))


def test_predictions_are_the_networks_outputs_in_order() -> None:
    network, data = classifier(), load_data("digits:test[:30]")
    with torch.inference_mode():
        direct = network(network.input([row["image"] for row in data])).numpy()
    np.testing.assert_allclose(predict(network, data, batch_size=7), direct, atol=1e-6)


def test_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(200, 4)), rng.integers(0, 4, 200)
    found, p = metrics(logits, truth), probabilities(logits)
    assert found["accuracy"] == accuracy_score(truth, p.argmax(1))
    assert found["log_loss"] == pytest.approx(log_loss(truth, p))
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, p, multi_class="ovr"))
    two, binary = rng.normal(size=(50, 2)), rng.integers(0, 2, 50)
    assert metrics(two, binary)["auroc"] == pytest.approx(roc_auc_score(binary, two[:, 1] - two[:, 0]))


def test_probabilities_do_not_overflow() -> None:
    np.testing.assert_array_equal(probabilities(np.array([[1e4, 0.0], [-1e4, 0.0]])), [[1, 0], [0, 1]])


def test_wilsons_interval() -> None:
    low, high = accuracy_interval(0, 10)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.27753, abs=1e-5)
    assert accuracy_interval(10, 10)[0] == pytest.approx(0.72247, abs=1e-5)


def test_an_evaluation_says_how_sure_it_is_and_goes_into_the_card() -> None:
    network, data = classifier(), load_data("digits:test")
    report = evaluate(network, data)
    assert report.figures["accuracy_low"] < report.figures["accuracy"] < report.figures["accuracy_high"]
    assert report.figures["accuracy"] == pytest.approx((predict(network, data).argmax(1) == labels(data)).mean())
    assert sum(row["rows"] for row in report.tables["by class"]) == 360
    record(network, data, report)
    record(network, data, report)
    assert len(network.measured) == 1 and network.measured[0]["data"] == "digits:test"


def test_anomaly_scores_are_judged_by_their_order() -> None:
    data = load_data("digits:test").filter(lambda row: row["label"] in (0, 1))
    network = Network(Score(), input=ImageInput((8, 8), 1), output="anomaly_score", labels=("0", "1"))
    report = evaluate(network, data)
    assert report.figures["auroc"] == pytest.approx(roc_auc_score(labels(data) != 0, predict(network, data)))


def test_classes_in_another_order_are_matched_by_name() -> None:
    data = load_data("digits:test")
    plain = classifier()
    turned = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), input=plain.input, labels=tuple("9876543210"))
    with torch.no_grad():
        turned.module[1].weight.copy_(plain.module[1].weight.flip(0))
        turned.module[1].bias.copy_(plain.module[1].bias.flip(0))
    assert evaluate(turned, data).figures["accuracy"] == evaluate(plain, data).figures["accuracy"]


def test_a_network_and_data_that_do_not_belong_together() -> None:
    with pytest.raises(BadInput, match="2 classes and digits:test has 10"):
        evaluate(classifier(2), load_data("digits:test"))
    other = Network(classifier(2).module, input=ImageInput((8, 8), 1), labels=("cat", "dog"))
    with pytest.raises(BadInput, match="knows cat, dog.*do not belong together"):
        evaluate(other, load_data("elpv:test[:4]"))
    with pytest.raises(BadInput, match="gives embedding"):
        evaluate(Network(classifier().module, input=ImageInput((8, 8), 1), output="embedding"), load_data("digits:test[:9]"))
    with pytest.raises(BadInput, match="metric 'wow' is not known"):
        score(classifier(), load_data("digits:test[:9]"), "wow")


def test_outputs_that_are_not_numbers_are_named() -> None:
    network = classifier()
    with torch.no_grad():
        network.module[1].bias[0] = float("nan")
    with pytest.raises(BadInput, match="output for row 0 .* not finite"):
        predict(network, load_data("digits:test[:9]"))


def test_scores_are_higher_when_better() -> None:
    data = load_data("digits:test[:50]")
    assert score(classifier(), data, "log_loss") < 0 <= score(classifier(), data, "accuracy")


def test_the_function_is_not_hidden_by_its_module() -> None:
    import wellread.evaluate

    assert wellread.evaluate is evaluate and callable(wellread.load)

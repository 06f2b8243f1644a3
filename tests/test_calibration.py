"""Calibration: statistics and rotations by closed forms and scipy, the layer in networks of two families, and in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.linalg import orthogonal_procrustes
from torch import Tensor
from torch.nn import functional as F

import wellread
from tests.small_encoders import small_encoder, tokenizer_of, two_families
from wellread import Network
from wellread.calibration import (
    Calibration,
    calibrate,
    check_known,
    csls,
    for_language,
    identity,
    judged,
    mutual,
    procrustes,
    rotation,
    statistics,
    uncalibrated,
)  # fmt: skip
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.features import embed
from wellread.index import Index, encode

WORDS = [f"{language}{number}" for language in "ab" for number in range(40)]
CONFIGS = two_families(84)


def made(kind: str = "bert") -> Network:
    """A small encoder of two languages: word b7 has the vector of a7 and the same shift as all words of its language."""
    network = small_encoder(tokenizer_of(WORDS, model_input_names=["input_ids", "attention_mask"]), CONFIGS[kind], length=32, shaken=False)
    with torch.no_grad():
        table = network.module.get_submodule("model.embeddings.word_embeddings").weight  # type: ignore[union-attr]
        table[4:44] = torch.randn(40, 24)
        table[44:] = table[4:44] + 2 * torch.randn(24)
    return network


def texts(language: str, count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(f"{language}{word}" for word in random.integers(0, 40, random.integers(4, 9))) for _ in range(count)]


def by_language(count: int = 150) -> dict[str, list[str]]:
    return {"aa": texts("a", count, 1), "bb": texts("b", count, 2)}


def found(network: Network) -> float:
    """How often a text finds its word by word translation among 200."""
    first = texts("a", 200, 3)
    x, y = (encode(network, side) for side in (first, [text.replace("a", "b") for text in first]))
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    return float(((x @ y.T).argmax(1) == np.arange(200)).mean())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- statistics


def test_mean_zero_and_variance_one() -> None:
    x = random(300, 7) * torch.arange(1, 8) + 5
    mean, factor = statistics(x, shrink=0)
    z = (x - mean) * factor
    torch.testing.assert_close(z.mean(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-12)
    shifted = statistics(x, scale=False)
    assert torch.equal(shifted[0], mean) and torch.equal(shifted[1], torch.ones(7, dtype=torch.float64))


def test_variances_shrink_to_their_mean() -> None:
    x = random(50, 5) * torch.arange(1, 6)
    variance = x.var(0, correction=0)
    expected = (50 * variance + 100 * variance.mean()) / 150
    torch.testing.assert_close(statistics(x, shrink=100)[1], expected.rsqrt())


def test_dead_dimensions_stay_at_zero() -> None:
    x = random(100, 6) * 0.05
    x[:, 2], x[:, 4] = 0.3, 1e-9 * x[:, 4]
    for scale in (True, False):
        mean, factor = statistics(x, scale=scale)
        assert (factor == 0).nonzero()[:, 0].tolist() == [2, 4] and bool(torch.isfinite((x - mean) * factor).all())
    assert torch.equal(statistics(torch.ones(30, 3))[1], torch.zeros(3, dtype=torch.float64))
    alive = x[:, [0, 1, 3, 5]]
    torch.testing.assert_close(statistics(x)[1][[0, 1, 3, 5]], statistics(alive)[1], msg="dead ones are no part of the mean variance")


# --- neighbours and rotations


def test_csls_by_hand() -> None:
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    half = 0.5**0.5
    cosine = torch.tensor([[1, half], [0, half]])
    near_x, near_y = torch.tensor([(1 + half) / 2, half / 2]), torch.tensor([0.5, half])
    torch.testing.assert_close(csls(x, y), 2 * cosine - near_x[:, None] - near_y[None])
    torch.testing.assert_close(csls(x, y, 1), 2 * cosine - torch.tensor([1, half])[:, None] - torch.tensor([1, half])[None])


def test_mutual_neighbours_of_a_shuffled_copy() -> None:
    x, order = random(60, 12), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    left, right = mutual(x, x[order])
    assert torch.equal(left, torch.arange(60)) and torch.equal(order[right], left)


def test_a_hub_is_not_everybodys_neighbour() -> None:
    x = F.normalize(random(30, 8), dim=1)
    hub = x.mean(0, keepdim=True) * 30
    y = torch.cat([F.normalize(x + 0.9 * F.normalize(random(30, 8, seed=2), dim=1), dim=1), hub])
    plain = (x @ F.normalize(y, dim=1).T).argmax(1)
    assert (csls(x, y).argmax(1) == 30).sum() <= (plain == 30).sum()


def test_procrustes_is_scipys() -> None:
    x, y = random(40, 9), random(40, 9, seed=1)
    turn = procrustes(x, y)
    torch.testing.assert_close(turn, torch.from_numpy(orthogonal_procrustes(x.numpy(), y.numpy())[0]), rtol=0, atol=1e-10)
    for each in (turn, procrustes(x, y, pull=3.0), procrustes(x[:2], y[:2], pull=1.0)):
        torch.testing.assert_close(each.T @ each, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (procrustes(x, y, pull=1e9) - torch.eye(9)).abs().max() < 1e-6, "a strong pull holds it at the identity"


def test_a_planted_rotation_is_found() -> None:
    x = random(200, 10)
    turn = torch.linalg.qr(random(10, 10, seed=3))[0]
    torch.testing.assert_close(procrustes(x, x @ turn), turn, rtol=0, atol=1e-10)
    skew = random(10, 10, seed=3) * 0.05
    small = torch.matrix_exp(skew - skew.T)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotation(x, (x @ small)[order], pull=0), small, rtol=0, atol=1e-10, msg="without being told the pairs")
    torch.testing.assert_close(rotation(x, x[order]), torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_rotation_must_prove_itself() -> None:
    skew = random(10, 10, seed=3) * 0.2
    small = torch.matrix_exp(skew - skew.T)
    x, held = random(400, 10), random(200, 10, seed=5)
    turn, verdict = judged(x, x @ small, held, (held @ small).flip(0), pull=0)
    assert verdict.used and verdict.after == 1 > verdict.before and verdict.agreement == pytest.approx(1)
    torch.testing.assert_close(turn, small, rtol=0, atol=1e-10)
    _, same = judged(x, x, held, held.flip(0))
    assert not same.used and same.before == same.after == 1, "nothing to gain"


def test_noise_that_looks_like_a_gain_is_refused() -> None:
    """A free rotation between clouds without anything in common raises the share of mutual neighbours in some draws, and is another one in each half."""
    gains = 0
    for seed in range(6):
        x, y, held_x, held_y = (random(150, 60, seed=10 * seed + each) for each in range(4))
        common = random(60, seed=99)  # one direction that both have, so that neighbours are not all chance
        _, verdict = judged(x + common, y + common, held_x + common, held_y + common, pull=0)
        gains += verdict.after > verdict.before
        assert not verdict.used and verdict.agreement < 0.9
    assert gains, "else the check of the halves would not be tested"


# --- the layer


def layer(**changes: Any) -> Calibration:
    made_of = Calibration(**{"width": 2, "languages": ["x", "y"], "sentences": [30, 40], "source": "news", "rotated": ["y"], **changes})
    made_of.mean.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0]]))
    made_of.factor.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
    made_of.rotation.copy_(torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]))
    return made_of


def test_the_layer_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [12.0, 5.0]])
    assert layer().recognise(x).tolist() == [0, 1]
    assert layer()(x).tolist() == [[1.0, 2.0], [0.0, 4.0]], "(12 - 10) * 2 on the first axis, dead on the second, then turned"
    assert layer(language="y")(x).tolist() == [[0.0, -18.0], [0.0, 4.0]]
    assert layer()(x.bfloat16()).dtype == torch.bfloat16
    again = Calibration(**layer().arguments)
    again.load_state_dict(layer().state_dict())
    assert torch.equal(again(x), layer()(x))


def test_a_mean_far_from_zero_is_recognised() -> None:
    big = Calibration(3, ["x", "y"], [1, 1])
    big.mean.copy_(torch.tensor([[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]))
    x = random(100, 3).float() * 3 + 3
    assert torch.equal(big.recognise(x), torch.cdist(x, big.mean).argmin(1))


# --- in a network


@pytest.mark.parametrize("kind", CONFIGS)
def test_languages_come_together(kind: str) -> None:
    network = made(kind)
    before = network.fingerprint
    better = calibrate(network, by_language(), level="shift", source="made up")
    assert network.fingerprint == before
    assert found(better) > found(network) + 0.3
    report = better.reports["calibration"]
    rows = report.tables["languages"]
    assert [row["sentences"] for row in rows] == [120, 120] and [row["held out"] for row in rows] == [30, 30]
    assert min(row["recognised, %"] for row in rows) > 95
    assert report.figures["language read off a vector before, %"] > 90 > 75 > report.figures["language read off a vector after, %"]
    assert better.edits[-1]["arguments"] == {
        "width": 24, "languages": ["aa", "bb"], "sentences": [120, 120], "source": "made up", "rotated": [], "language": None,
    }  # fmt: skip


def test_the_fitting_sentences_have_mean_zero_and_variance_one() -> None:
    given = by_language()
    network = made()
    better = calibrate(network, given, held_out=by_language(20), level="scale", shrink=0)
    for language, some in given.items():
        z = encode(for_language(better, language), some)
        assert np.abs(z.mean(0)).max() < 1e-4 and np.abs(z.std(0) - 1).max() < 1e-4


def test_vectors_before_calibration_are_not_lost() -> None:
    network, table = made(), Dataset.from_dict({"text": texts("b", 9)})
    better = calibrate(network, by_language())
    raw = predict(network, table)
    np.testing.assert_array_equal(embed(better, table, cache=False), raw)
    np.testing.assert_array_equal(predict(uncalibrated(better), table), raw)
    assert uncalibrated(network) is network
    twice = calibrate(better, by_language())
    np.testing.assert_allclose(predict(twice, table), predict(better, table), atol=1e-6)


def test_one_language_is_fixed() -> None:
    better = calibrate(made(), by_language(), level="scale")
    table = Dataset.from_dict({"text": texts("a", 30, 8)})
    np.testing.assert_array_equal(predict(for_language(better, "aa"), table), predict(better, table))
    assert np.abs(predict(for_language(better, "bb"), table) - predict(better, table)).max() > 0.1
    assert for_language(for_language(better, "bb"), "aa").edits[-1]["arguments"]["language"] == "aa"
    with pytest.raises(BadInput, match="no statistics of the language 'cc': choose aa, bb"):
        for_language(better, "cc")
    with pytest.raises(BadInput, match="not calibrated"):
        for_language(made(), "aa")


def test_an_encoder_that_ends_with_a_layer_of_its_own() -> None:
    network = made().edited({"edit": "new_head", "layer": "head", "part": "torch.nn:Linear", "arguments": {"in_features": 24, "out_features": 12}})
    table = Dataset.from_dict({"text": texts("b", 9)})
    better = calibrate(network, by_language(), level="shift")
    assert better.edits[-1]["edit"] == "wrap" and predict(better, table).shape == (9, 12)
    np.testing.assert_array_equal(predict(uncalibrated(better), table), predict(network, table))
    assert found(better) > found(network)
    assert for_language(better, "aa").edits[-1]["edit"] == "new_head"


def test_every_level_can_be_had_and_the_pivot_is_not_turned() -> None:
    for level, rotated in (("shift", None), ("scale", None), ("rotate", "pivot")):
        rows = calibrate(made(), by_language(), level=level, pivot="bb").reports["calibration"].tables["languages"]  # type: ignore[arg-type]
        assert rows[1].get("rotation") == rotated and rows[0].get("rotation") in (None, "used", "refused")


def test_an_index_finds_across_languages(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    better = calibrate(made(), by_language())
    queries = texts("a", 40, 3)
    corpus = Dataset.from_dict({"id": [str(row) for row in range(40)], "text": [text.replace("a", "b") for text in queries]})
    index = Index.build(better, corpus, tmp_path / "index", lexical=False)
    first = [hits[0].id for hits in index.search(queries, k=1, mode="dense")]
    index.close()
    assert np.mean([first[row] == str(row) for row in range(40)]) > 0.8


LOAD = """
import sys, torch, wellread
from wellread.calibration import for_language
network, expected = wellread.load(sys.argv[1] + "/out"), torch.load(sys.argv[1] + "/output.pt", weights_only=True)
inputs = network.input(sys.argv[2:])
assert torch.equal(network(inputs), expected[0]) and torch.equal(for_language(network, "bb")(inputs), expected[1])
assert network.reports["calibration"].figures["languages"] == 2
"""


@pytest.mark.parametrize("ending", ["torch.nn:Identity", "torch.nn:Linear"])
def test_another_process(tmp_path: Path, ending: str) -> None:
    arguments = {"in_features": 24, "out_features": 12} if ending.endswith("Linear") else {}
    network = made().edited({"edit": "new_head", "layer": "head", "part": ending, "arguments": arguments})
    better = calibrate(network, by_language())
    some = ["a1 a2 a3", "b4 b5"]
    better.save(tmp_path / "out")
    with torch.no_grad():
        torch.save([each(better.input(some)) for each in (better, for_language(better, "bb"))], tmp_path / "output.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), *some], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_identity_is_chance_for_equal_clouds() -> None:
    x, labels = random(200, 5), np.repeat([0, 1], 100)
    assert identity(x, labels) < 65
    assert identity(x + 9 * torch.from_numpy(labels)[:, None], labels) > 99


# --- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"texts": {}}, "texts is empty"),
        ({"texts": {"aa": texts("a", 40), "bb": texts("b", 19)}}, "19 different sentences of 'bb': give at least 20"),
        ({"texts": {"aa": ["a1 a2"] * 40}}, "1 different sentences of 'aa'"),
        ({"pivot": "cc"}, "pivot is 'cc': choose one of 'aa', 'bb'"),
        ({"shrink": -1.0}, "shrink is -1"),
        ({"texts": {"aa": texts("a", 40), "zz": texts("z", 40)}}, "does not know 100% of the tokens of 'zz'"),
    ],
)
def test_bad_input(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        calibrate(made(), **{"texts": by_language(40), **changes})
    with pytest.raises(BadInput, match="a sentence encoder is needed"):
        calibrate(wellread.load("timm/test_vit", pretrained=False), by_language(40))


def test_unknown_tokens_are_counted() -> None:
    assert check_known(made(), {"aa": ["a1 a2 a3 a4 a5 a6 a7 a8 a9 ?"]}) == {"aa": 0.1}

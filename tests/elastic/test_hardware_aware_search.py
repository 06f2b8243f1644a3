"""LINAS: codes, predictors and ranks against brute force, the search on spaces whose front is known, shared and resumed searches, real super-networks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from scipy.stats import spearmanr

import wellread
from bench.cifar_resnet import ResNet
from wellread import ImageInput, Network, TextInput, families
from wellread.data import as_data
from wellread.elastic import hardware_aware_search, sortednet, starbucks, stitchable
from wellread.elastic.hardware_aware_search import ALL, Space, by_rank, chosen, evolve, hypervolume, one_hot, predictor, propose, search, sizes_of
from wellread.errors import BadInput
from wellread.evaluate import score
from wellread.features import embed
from wellread.meter import macs
from wellread.results import Front, load_result

pytest.importorskip("optuna")
pytest.importorskip("pymoo")
COLORS = ("blue", "green", "red")
SPACE = Space({"depth": [1, 2, 3, 4], "width": [0.25, 0.5, 0.75, 1.0], "kernel": [3, 5, 7, 9]})


def resnet(blocks: int = 2, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    arguments = {"blocks": blocks, "classes": 3, "width": 4}
    architecture = {"family": "class", "name": "bench.cifar_resnet:ResNet", "arguments": arguments}
    return Network(ResNet(**arguments), ImageInput((16, 16), mean=(0.35,) * 3, std=(0.1,) * 3), "linear", COLORS, architecture=architecture)


def photos(rows: int, seed: int = 0) -> Dataset:
    """Noise with a tint."""
    random = np.random.default_rng(seed)
    pairs = []
    for row in range(rows):
        picture = random.integers(0, 160, (16, 16, 3))
        picture[..., 2 - row % 3] += 40
        pairs.append((Image.fromarray(picture.astype(np.uint8)), COLORS[row % 3]))
    return as_data(pairs)


@pytest.fixture(scope="module")
def elastic() -> Network:
    """Eight depths in two widths, all trained for one pass; statistics are kept for some only."""
    settings: dict[str, Any] = {"sizes": ["all"], "widths": [0.5], "epochs": 1, "batch_size": 8, "accumulate": 1, "learning_rate": 0.05}
    return sortednet(resnet(), photos(48), **settings)


def example(folder: Path) -> dict[str, Any]:
    sortednet(resnet(), photos(24), epochs=1, batch_size=8, accumulate=1).save(folder / "network")
    for row, photo in enumerate(photos(18, seed=1)):
        place = folder / "photos" / COLORS[photo["label"]]
        place.mkdir(parents=True, exist_ok=True)
        photo["image"].save(place / f"{row}.png")
    return {"network": str(folder / "network"), "validation": f"folder:{folder / 'photos'}", "evaluations": 4, "population": 2, "cost": "macs"}


def encoder() -> Network:
    """Three layers with fresh weights, far enough from zero that they matter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1} | {word: i for i, word in enumerate(COLORS, 2)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    sizes = {"vocab_size": 8, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0}
    config = {"model_type": "bert", "num_hidden_layers": 3, **sizes}
    architecture = {"family": "transformers", "auto": "AutoModel", "config": config, "pooling": "mean", "normalize": True}
    torch.manual_seed(0)
    network = Network(families.build(architecture), TextInput(tokenizer, 32), "head", None, "embedding", architecture)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def sentences(rows: int, seed: int = 0) -> Dataset:
    """Three colours each; the score is in how many places they agree."""
    first, second = np.random.default_rng(seed).choice(COLORS, (2, rows, 3))
    agree = (first == second).sum(1).astype(float)
    return Dataset.from_dict({"sentence1": [" ".join(each) for each in first], "sentence2": [" ".join(each) for each in second], "score": agree})


def additive(configuration: dict[str, Any]) -> dict[str, float]:
    """Cost and quality are sums over the variables."""
    depth, width, kernel = configuration["depth"], configuration["width"], configuration["kernel"]
    return {"ms": 2.0 * depth + 4.1 * width + 0.3 * kernel, "accuracy": 0.1 * depth**0.5 + 0.2 * width**0.5 + 0.04 * kernel**0.5}


def found_front(rows: list[dict[str, Any]]) -> set[tuple[float, float]]:
    front = Front(rows, "ms", "accuracy")
    return {(front.points[i]["ms"], front.points[i]["accuracy"]) for i in front.efficient()}


# --- parts


def test_codes() -> None:
    codes = [tuple(code) for code in SPACE.codes]
    assert len(codes) == SPACE.size == 64 == len(set(codes))
    assert all(SPACE.encode(SPACE.decode(code)) == code for code in codes)
    hot = one_hot(SPACE.codes, SPACE.counts)
    assert hot.shape == (64, 12) and (hot.sum(1) == 3).all() and len(np.unique(hot, axis=0)) == 64
    few = Space(SPACE.variables, [SPACE.decode(code) for code in [(0, 0, 0), (3, 3, 3), (0, 0, 0), (1, 0, 2)]])
    assert few.codes is not None and few.codes.tolist() == [[0, 0, 0], [3, 3, 3], [1, 0, 2]], "a configuration that is listed twice is one"


def test_draws_are_new_and_even() -> None:
    taken: set[Any] = set()
    for step in range(64):
        code = SPACE.draw(np.random.default_rng(step), taken)
        assert code is not None and code not in taken
        taken.add(code)
    assert SPACE.draw(np.random.default_rng(0), taken) is None
    first = [SPACE.draw(np.random.default_rng(seed), set()) for seed in range(1000)]
    assert len(set(first)) == 64
    large = Space({name: list(range(10)) for name in "abcd"})
    assert large.size == 10_000 > ALL
    assert len({large.draw(np.random.default_rng(seed), set()) for seed in range(50)}) > 45


def test_predictors() -> None:
    hot = one_hot(SPACE.codes, SPACE.counts)
    truth = np.asarray([additive(SPACE.decode(code))["ms"] for code in SPACE.codes])
    order = np.random.default_rng(0).permutation(64)
    fitted = predictor(hot[order[:32]], truth[order[:32]])
    assert np.abs(fitted.predict(hot[order[32:]]) - truth[order[32:]]).max() < 0.05 * np.ptp(truth)
    bent = np.where(SPACE.codes[:, 0] == SPACE.codes[:, 1], 5.0, -5.0)  # no sum over variables: ridge sees nothing
    assert type(predictor(hot, bent).regressor_).__name__ == "SVR"
    assert np.corrcoef(predictor(hot, bent).predict(hot), bent)[0, 1] > 0.95
    np.testing.assert_allclose(predictor(hot, np.full(64, 0.7)).predict(hot), 0.7)
    assert np.isfinite(predictor(hot[:3], truth[:3]).predict(hot)).all()


def test_ranks_agree_with_brute_force() -> None:
    points = np.random.default_rng(0).integers(0, 12, (60, 2)).astype(float)
    left, ranks = list(range(60)), {}
    for rank in itertools.count():
        front = [i for i in left if not any((points[j] <= points[i]).all() and (points[j] < points[i]).any() for j in left)]
        ranks |= dict.fromkeys(front, rank)
        left = [i for i in left if i not in front]
        if not left:
            break
    order = by_rank(points)
    assert sorted(order) == list(range(60)) and [ranks[i] for i in order] == sorted(ranks.values())
    ends = {int(i) for i in order[:2]}
    front = [i for i in range(60) if ranks[i] == 0]
    assert {tuple(points[i]) for i in ends} <= {
        tuple(points[i]) for i in (min(front, key=lambda i: points[i, 0]), min(front, key=lambda i: points[i, 1]))
    }


def test_hypervolume_agrees_with_brute_force() -> None:
    random = np.random.default_rng(0)
    costs, qualities = random.integers(1, 30, 20), random.integers(1, 30, 20)
    covered = {(x, y) for c, q in zip(costs, qualities, strict=True) for x in range(c, 25) for y in range(5, q)}
    assert hypervolume(costs, qualities, (25, 5)) == len(covered) > 0
    assert hypervolume([30.0], [40.0], (25, 5)) == 0 and hypervolume([20.0], [7.0], (25, 5)) == 10


def test_evolution_finds_the_predicted_front_of_a_large_space() -> None:
    space = Space({name: list(range(6)) for name in "abcdef"})
    assert space.size > ALL

    def predict(codes: np.ndarray) -> np.ndarray:
        return np.stack([codes @ np.arange(1, 7), -np.sqrt(codes + 1) @ np.arange(6, 0, -1)], axis=1)

    assert evolve(space, predict, 0).shape[1] == 6 and np.array_equal(evolve(space, predict, 0, 5), evolve(space, predict, 0, 5))
    truth = predict(np.asarray(list(itertools.product(range(6), repeat=6))))
    mine = predict(evolve(space, predict, 0))
    reference = (float(truth[:, 0].max()), -float(truth[:, 1].max()))
    assert hypervolume(mine[:, 0], -mine[:, 1], reference) > 0.97 * hypervolume(truth[:, 0], -truth[:, 1], reference)


# --- the search


def test_linas_finds_the_exact_front_where_chance_does_not() -> None:
    truth = found_front([additive(SPACE.decode(code)) for code in SPACE.codes])
    for seed in range(3):
        share = {}
        for population in (9, 45):  # as many as evaluations: a random search
            rows = search(SPACE, additive, cost="ms", quality="accuracy", evaluations=45, population=population, seed=seed)
            assert len(rows) == 45 == len({json.dumps([row[name] for name in SPACE.variables]) for row in rows})
            share[population] = len(truth & found_front(rows)) / len(truth)
        assert share[9] == 1.0 > share[45] + 0.1, "27 sizes identify the sum over 10 free choices, and the front has 24"
    assert all(row["predicted ms"] is None for row in rows), "nothing predicts in a random search"


def test_predictions_stand_beside_the_measurements() -> None:
    rows = search(SPACE, additive, cost="ms", quality="accuracy", evaluations=30, population=10)
    assert all(row["predicted ms"] is None for row in rows[:10])
    error = [abs(row["predicted accuracy"] - row["accuracy"]) for row in rows[20:]]
    assert 0 < max(error) < 0.1
    known = {SPACE.encode(SPACE.decode(code)): additive(SPACE.decode(code))["ms"] for code in SPACE.codes}
    rows = search(SPACE, additive, cost="ms", quality="accuracy", evaluations=12, population=10, known=known)
    assert "predicted ms" not in rows[-1] and rows[-1]["predicted accuracy"] is not None


def test_known_costs_are_not_predicted() -> None:
    known = {tuple(map(int, code)): float(i) for i, code in enumerate(SPACE.codes)}
    found = propose(SPACE, list(known)[:8], np.random.default_rng(0).normal(size=(8, 2)), known, 0)
    assert {code: cost for code, (cost, _) in found.items()} == known


def test_budget_and_seeds() -> None:
    few = Space(SPACE.variables, [SPACE.decode(code) for code in SPACE.codes[::3]])
    for population in (5, 14):
        asked = []

        def measure(configuration: dict[str, Any], asked: list[Any] = asked) -> dict[str, float]:
            asked.append(SPACE.encode(configuration))
            return additive(configuration)

        first = search(few, measure, cost="ms", quality="accuracy", evaluations=14, population=population, seed=1)
        assert len(asked) == len(set(asked)) == len(first) == 14 and set(asked) <= set(few.listed or ())
        again = search(few, measure, cost="ms", quality="accuracy", evaluations=14, population=population, seed=1)
        other = search(few, measure, cost="ms", quality="accuracy", evaluations=14, population=population, seed=2)
        assert again == first != other
    assert len(search(few, additive, cost="ms", quality="accuracy", evaluations=1000)) == few.size, "a small space is measured whole, and that is all"


def test_a_space_too_large_to_list() -> None:
    space = Space({name: list(range(6)) for name in "abcdef"})

    def measure(configuration: dict[str, Any]) -> dict[str, float]:
        values = np.asarray(list(configuration.values()))
        return {"ms": float(values @ np.arange(1, 7)), "accuracy": float(np.sqrt(values + 1) @ np.arange(6, 0, -1))}

    assert space.codes is None
    volume = {}
    for population in (15, 45):
        rows = search(space, measure, cost="ms", quality="accuracy", evaluations=45, population=population)
        assert len(rows) == 45
        volume[population] = hypervolume([row["ms"] for row in rows], [row["accuracy"] for row in rows], (105.0, 21.0))
    assert volume[15] > 1.05 * volume[45]


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    budget: dict[str, Any] = {"cost": "ms", "quality": "accuracy", "evaluations": 16, "population": 5, "seed": 3}
    whole = search(SPACE, additive, **budget)
    asked: list[Any] = []

    def measure(configuration: dict[str, Any]) -> dict[str, float]:
        asked.append(SPACE.encode(configuration))
        if len(asked) == 8:
            raise KeyboardInterrupt
        return additive(configuration)

    storage = f"sqlite:///{tmp_path / 'search.db'}"
    with pytest.raises(KeyboardInterrupt):
        search(SPACE, measure, storage=storage, **budget)
    assert search(SPACE, measure, storage=storage, **budget) == whole
    assert len(asked) == 17 and asked[7] == asked[8], "only what was cut short is measured again"
    assert search(SPACE, measure, storage=storage, **budget) == whole and len(asked) == 17
    with pytest.raises(BadInput, match="of another space or other objectives"):
        search(Space({"depth": [1, 2]}), measure, storage=storage, **budget)


def test_two_processes_share_a_search(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from wellread.elastic.hardware_aware_search import Space, search\n"
        "def measure(c):\n"
        "    open(sys.argv[2], 'a').write(f'{sys.argv[3]} {c}\\n')\n"
        "    time.sleep(0.1)\n"
        "    return {'ms': c['a'] + c['b'], 'accuracy': c['a'] * c['b']}\n"
        "space = Space({'a': list(range(6)), 'b': list(range(6))})\n"
        "search(space, measure, cost='ms', quality='accuracy', evaluations=14, population=5, storage=sys.argv[1])\n"
    )
    said = tmp_path / "said.txt"
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    measured = search(Space({"a": list(range(6)), "b": list(range(6))}), lambda c: {"ms": c["a"] + c["b"], "accuracy": c["a"] * c["b"]},
                      cost="ms", quality="accuracy", evaluations=2, population=5, storage=storage)  # fmt: skip
    root = Path(wellread.__file__).parents[1]
    running = [subprocess.Popen([sys.executable, "-c", code, storage, str(said), who], cwd=root) for who in "xy"]
    assert [process.wait(100) for process in running] == [0, 0]
    lines = said.read_text().splitlines()
    assert len(lines) == 12 == len({line[2:] for line in lines}), "fourteen in all, two of them before, none twice"
    assert len(measured) == 2


def test_failures_are_noted_and_many_in_a_row_end_the_search() -> None:
    def sometimes(configuration: dict[str, Any]) -> dict[str, float]:
        if configuration["kernel"] == 9:
            raise RuntimeError("out of memory")
        return additive(configuration) | ({"accuracy": float("nan")} if configuration["kernel"] == 7 and configuration["depth"] == 1 else {})

    rows = search(SPACE, sometimes, cost="ms", quality="accuracy", evaluations=24, population=6, seed=2)
    assert 12 <= len(rows) < 24 and all(row["kernel"] != 9 and np.isfinite(row["accuracy"]) for row in rows)

    def never(configuration: dict[str, Any]) -> dict[str, float]:
        raise RuntimeError("out of memory")

    with pytest.raises(BadInput, match="5 measurements in a row failed, the last one with RuntimeError: out of memory"):
        search(SPACE, never, cost="ms", quality="accuracy")
    with pytest.raises(BadInput, match="no 'watts'"):
        search(SPACE, additive, cost="watts", quality="accuracy")
    constant = search(SPACE, lambda c: additive(c) | {"accuracy": 0.5}, cost="ms", quality="accuracy", evaluations=12, population=4)
    assert len(constant) == 12


@pytest.mark.parametrize("variables", [{}, {"a": []}, {"a": [1, 1]}])
def test_spaces_that_cannot_be(variables: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="at least one value"):
        Space(variables)


def test_other_bad_input() -> None:
    with pytest.raises(BadInput, match="no configuration is listed"):
        Space({"a": [1]}, [])
    with pytest.raises(BadInput, match="a is 3: choose one of 1, 2"):
        Space({"a": [1, 2]}, [{"a": 3}])
    with pytest.raises(BadInput, match="does not say a"):
        Space({"a": [1, 2]}).encode({"b": 1})
    with pytest.raises(BadInput, match="evaluations is 0"):
        search(SPACE, additive, cost="ms", quality="accuracy", evaluations=0)


# --- real super-networks


def test_sizes_of_a_sorted_network(elastic: Network) -> None:
    validation, examples, test = photos(30, seed=1), photos(40, seed=2), photos(30, seed=3)
    space, rows = sizes_of(elastic)
    assert space.size == 16 == len(rows) and list(space.variables) == ["layer1", "layer2", "layer3", "width"]
    front = hardware_aware_search(elastic, validation, examples, test, cost="macs", evaluations=8, population=4)
    assert (
        len(front) == 8
        and (front.cost, front.quality) == ("MACs, M", "accuracy")
        and [point["evaluation"] for point in front.points] == list(range(1, 9))
    )
    for point in front.points[:2] + front.points[-2:]:
        cut = chosen(elastic, point, examples)
        assert score(cut, validation) == point["accuracy"] and macs(cut) == pytest.approx(1e6 * point["MACs, M"])
        assert rows[space.encode({name: point[name] for name in space.variables})]["size"] == point["size"]
    efficient = front.efficient()
    assert [i for i, point in enumerate(front.points) if "accuracy on test" in point] == sorted(efficient)
    best = front.points[efficient[-1]]
    assert best["accuracy on test"] == score(chosen(elastic, best, examples), test)
    assert front.made_by is not None and front.made_by["method"] == "hardware-aware-search"


def test_milliseconds_are_measured_here(elastic: Network) -> None:
    front = hardware_aware_search(elastic, photos(12, seed=1), photos(20, seed=2), evaluations=3, population=2, batch_size=2, threads=1)
    assert front.cost == "ms, batch 2" and all(point["ms, batch 2"] > 0 and point["MACs, M"] > 0 for point in front.points)


def test_a_vit_and_a_stitched_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = wellread.load("timm/test_vit", pretrained=False, img_size=32, num_classes=3)
    vit = vit.edited(input=vit.input.changed(size=(32, 32)), labels=COLORS)
    several = sortednet(vit, photos(12), epochs=1, batch_size=6, accumulate=1, optimizer="adamw")
    front = hardware_aware_search(several, photos(9, seed=1), cost="parameters", evaluations=100)
    assert len(front) == 6 and {point["blocks"] for point in front.points} == set(range(1, 7)), "a small space is measured whole"

    both = stitchable([resnet(1), resnet(2, seed=1)], photos(30), timing=False, samples=20)
    sizes, rows = sizes_of(both)
    assert sizes.size == len(both.module.configurations) == len(rows)
    front = hardware_aware_search(both, photos(12, seed=1), cost="macs", evaluations=4, population=2)
    point = front.points[0]
    cut = chosen(both, point)
    assert score(cut, photos(12, seed=1)) == point["accuracy"] and macs(cut) == pytest.approx(1e6 * point["MACs, M"])

    both.save(tmp_path / "network")
    front.save(tmp_path / "front")
    batch = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"batch": batch, "output": cut(batch).detach()}, tmp_path / "outputs.pt")
    code = (
        "import sys, torch, wellread\n"
        "from pathlib import Path\n"
        "from wellread.elastic.hardware_aware_search import chosen\n"
        "from wellread.results import load_result\n"
        "folder = Path(sys.argv[1])\n"
        "said = torch.load(folder / 'outputs.pt', weights_only=True)\n"
        "cut = chosen(wellread.load(folder / 'network'), load_result(folder / 'front').points[0])\n"
        "assert torch.equal(cut(said['batch']), said['output'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=Path(wellread.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert load_result(tmp_path / "front").points == front.points


def test_an_encoder_from_starbucks() -> None:
    several = starbucks(encoder(), sentences(24), sizes=["1x8", "2x16"], epochs=1, batch_size=8)
    validation, test = sentences(30, seed=1), sentences(30, seed=2)
    front = hardware_aware_search(several, validation, None, test, evaluations=9, threads=1)
    assert [point["size"] for point in sorted(front.points, key=lambda each: each["layers"])] == ["1x8", "2x16", "3x24"] and front.quality == "spearman"
    for point in front.points:
        cut = chosen(several, point)
        a, b = (embed(cut, Dataset.from_dict({"text": validation[column]})) for column in ("sentence1", "sentence2"))
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert point["spearman"] == pytest.approx(spearmanr(cosine, validation["score"]).statistic, abs=0.02), "equal cosines are ordered by their rounding"
        assert point["ms, batch 1"] > 0 and point["MACs, M"] == pytest.approx(macs(cut) / 1e6)
    assert all("spearman on test" in front.points[i] for i in front.efficient())
    with pytest.raises(BadInput, match="choose spearman"):
        hardware_aware_search(several, validation, metric="accuracy")
    with pytest.raises(BadInput, match="no column 'sentence1'"):
        hardware_aware_search(several, photos(6))


def test_networks_that_cannot_be_searched(elastic: Network) -> None:
    with pytest.raises(BadInput, match="lists no sizes"):
        hardware_aware_search(resnet(), photos(6))
    with pytest.raises(BadInput, match="lists no sizes"):
        hardware_aware_search(elastic.copy(), photos(6))
    with pytest.raises(BadInput, match="no batch-norm statistics were kept"):
        hardware_aware_search(elastic, photos(6))
    with pytest.raises(BadInput, match="'speed' is not known"):
        hardware_aware_search(elastic, photos(6), photos(6, seed=2), metric="speed")
    with pytest.raises(BadInput, match="the classes"):
        hardware_aware_search(elastic, as_data([(photo["image"], "cat" if row % 2 else "dog") for row, photo in enumerate(photos(6))]))
    with pytest.raises(BadInput, match="does not say its size"):
        chosen(elastic, {"accuracy": 1.0})

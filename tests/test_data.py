"""Tables from names and folders, and what is refused before any work starts."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image

from wellread.data import (
    Needs,
    Pairs,
    as_data,
    check,
    class_names,
    duplicates,
    fingerprint,
    labels,
    load_data,
    name_of,
    pixels,
    row_hashes,
    scores,
    stratified,
    subset,
)  # fmt: skip
from wellread.errors import BadInput
from wellread.inputs import ImageInput


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def class_folders(root: Path, classes: dict[str, int], start: int = 0) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(start := start + 1).save(root / name / f"{i}.png")
    return root


def test_elpv_is_split_class_by_class_and_always_the_same() -> None:
    cells = load_data("elpv")
    assert [len(cells[s]) for s in ("train", "validation", "test")] == [1574, 525, 525]
    assert class_names(cells["train"]) == ["intact", "defective"]
    shares = [labels(cells[s]).mean() for s in cells]
    assert max(shares) - min(shares) < 0.002
    assert all((labels(t) == (np.asarray(t["probability"]) > 0.5)).all() for t in cells.values())
    assert load_data("elpv")["train"]["file"][:3] == cells["train"]["file"][:3]
    assert not {*cells["train"]["file"]} & {*cells["test"]["file"]}


def test_digits_are_pictures_with_ten_classes() -> None:
    digits = load_data("digits:test")
    assert len(digits) == 360 and digits[0]["image"].size == (8, 8) and len(class_names(digits)) == 10 and name_of(digits) == "digits:test"


def test_rows_of_a_split() -> None:
    some = load_data("digits:train[5:15]")
    assert len(some) == 10 and row_hashes(some) == row_hashes(load_data("digits:train"))[5:15]
    with pytest.raises(BadInput, match="name one before the rows"):
        load_data("digits[:5]")
    with pytest.raises(BadInput, match="has no split 'foo'"):
        load_data("digits:foo")


def test_a_folder_per_class(tmp_path: Path) -> None:
    table = load_data(f"folder:{class_folders(tmp_path / 'photos', {'dog': 3, 'cat': 2})}")
    assert class_names(table) == ["cat", "dog"] and labels(table).tolist() == [0, 0, 1, 1, 1] and table["file"][0] == "cat/0.png"


def test_splits_of_a_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "p" / "train", {"a": 2, "b": 2})
    class_folders(tmp_path / "p" / "val", {"a": 1, "b": 1}, start=10)
    splits = load_data(f"folder:{tmp_path / 'p'}")
    assert set(splits) == {"train", "val"}
    assert len(load_data(f"folder:{tmp_path / 'p'}:validation")) == 2
    assert len(as_data(splits, split="train")) == 4
    with pytest.raises(BadInput, match="name the one that is meant"):
        as_data(splits)


def test_a_png_beside_a_jpg_is_its_mask(tmp_path: Path) -> None:
    (tmp_path / "p" / "crack").mkdir(parents=True)
    (tmp_path / "p" / "free").mkdir()
    picture(1).save(tmp_path / "p" / "crack" / "1.jpg")
    Image.fromarray(np.zeros((12, 10), np.uint8)).save(tmp_path / "p" / "crack" / "1.png")
    picture(2).save(tmp_path / "p" / "free" / "2.jpg")
    table = load_data(f"folder:{tmp_path / 'p'}")
    assert len(table) == 2 and table[0]["mask"].size == (10, 12) and table[1]["mask"] is None


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    class_folders(tmp_path / "p", {"a": 1})
    (tmp_path / "p" / "b").mkdir()
    with pytest.raises(BadInput, match="/b' holds no pictures"):
        load_data(f"folder:{tmp_path / 'p'}")


def test_broken_pictures_are_named_before_anything_starts(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "p", {"a": 2, "b": 2})
    (root / "a" / "0.png").write_bytes(b"not a picture")
    (root / "b" / "1.png").write_bytes((root / "b" / "1.png").read_bytes()[:80])
    with pytest.raises(BadInput, match=r"2 pictures of .* cannot be decoded: row 0 .*a/0.png.*row 3") as refused:
        pixels(load_data(f"folder:{root}"), ImageInput(size=(8, 8)))
    assert "\n" not in str(refused.value)


def test_csv_by_synonyms_and_by_name(tmp_path: Path) -> None:
    file = tmp_path / "tickets.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["body", "topic"], ["a, b", "x"], ["c", "y"], ["d", "x"]])
    table = load_data(f"csv:{file}?text=body&label=topic")
    assert table["text"][0] == "a, b" and class_names(table) == ["x", "y"] and labels(table).tolist() == [0, 1, 0]
    with pytest.raises(BadInput, match="no column 'subject'"):
        load_data(f"csv:{file}?text=subject")
    file.write_text("text,category\nhello,10\nworld,9\n")
    assert class_names(load_data(f"csv:{file}")) == ["9", "10"]
    file.write_text("text,category\nhello,\n")
    with pytest.raises(BadInput, match="no label in row 0"):
        load_data(f"csv:{file}")
    file.write_text("text,category\nhello\n")
    with pytest.raises(BadInput, match="row 2.*header"):
        load_data(f"csv:{file}")
    file.write_bytes(b"text,category\n\xff\xfe,1\n")
    with pytest.raises(BadInput, match="UTF-8"):
        load_data(f"csv:{file}")


def test_parquet_round_trip(tmp_path: Path) -> None:
    table = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
    table.to_parquet(str(tmp_path / "t.parquet"))
    loaded = load_data(f"parquet:{tmp_path / 't.parquet'}")
    assert loaded["text"][:] == ["a", "b"] and class_names(loaded) == ["0", "1"]
    (tmp_path / "t.parquet").write_bytes(b"no")
    with pytest.raises(BadInput, match="cannot be read as parquet"):
        load_data(f"parquet:{tmp_path / 't.parquet'}")


def test_a_name_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folders(tmp_path / "home" / "pets", {"a": 1, "b": 1})
    monkeypatch.setenv("WELLREAD_DATA", str(tmp_path / "home"))
    assert len(load_data("pets")) == 2
    with pytest.raises(BadInput, match="no data called 'cars'"):
        load_data("cars")


def test_labels_of_every_split_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,z\n")
    (tmp_path / "test.csv").write_text("text,label\nc,y\n")
    splits = load_data(f"csv:{tmp_path}")
    assert class_names(splits["train"]) == class_names(splits["test"]) == ["x", "y", "z"] and labels(splits["test"]).tolist() == [1]


@pytest.mark.parametrize(
    "given",
    [
        [(torch.rand(3, 8, 8), 1), (torch.rand(3, 8, 8), 0)],
        [(np.zeros((8, 8), np.uint8), "cat"), (np.ones((8, 8), np.uint8), "dog")],
        [("a sentence", 0), ("another", 1)],
        torch.utils.data.TensorDataset(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])),
    ],
)
def test_pairs_and_torch_datasets_become_tables(given) -> None:
    table = as_data(given)
    assert len(table) == 2 and isinstance(table.features["label"], ClassLabel) and len(class_names(table)) == 2


NEEDS = Needs("labelled examples", ("input", "label"))


@pytest.mark.parametrize(
    "columns,words",
    [
        ({"text": [], "label": []}, "has no rows"),
        ({"text": ["a", "b"]}, "no column 'label'"),
        ({"label": [0, 1]}, "no column 'image or text'"),
        ({"text": ["a", "b"], "label": [0, 0]}, "one class only"),
        ({"text": ["a", "b"], "label": [0, None]}, "no label in row 1"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, "fractions"),
        ({"text": ["a", "b"], "label": [[0], [1]]}, "several labels per row"),
        ({"text": ["a", "b"], "label": [-1, 1]}, "label -1 in row 0"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(columns, words) -> None:
    with pytest.raises(BadInput, match=words) as refused:
        check(Dataset.from_dict(columns), NEEDS, None, "train")
    assert str(refused.value).startswith("train ") and "\n" not in str(refused.value)


def test_duplicates_within_and_across() -> None:
    a = Dataset.from_dict({"text": ["x", "y", "x"]})
    b = Dataset.from_dict({"text": ["z", "y"]})
    assert duplicates(a, a) == [(0, 2)] and duplicates(a, b) == [(1, 1)] and duplicates(b, a) == [(1, 1)]


def test_a_fingerprint_is_of_the_content() -> None:
    a = load_data("digits:train[:20]")
    assert fingerprint(a) == fingerprint(load_data("digits:train").select(range(20)))
    assert fingerprint(a) != fingerprint(subset(a, range(19))) and fingerprint(a) != fingerprint(subset(a, reversed(range(20))))
    relabelled = a.remove_columns("label").add_column("label", [0] * 20)
    assert fingerprint(relabelled) != fingerprint(a)


def test_pixels_are_cached_by_content_and_size() -> None:
    table = load_data("digits:train[:10]")
    source = ImageInput(size=(16, 16), channels=1)
    first, again = pixels(table, source), pixels(table, source)
    assert first.shape == (10, 1, 16, 16) and np.array_equal(first, again) and isinstance(again, np.memmap)
    direct = source.pixels([row["image"] for row in table]).numpy()
    assert np.array_equal(first, direct)
    assert pixels(table, source.changed(size=(8, 8))).shape == (10, 1, 8, 8)


@pytest.mark.parametrize(
    "mode,value,expected", [("L", 100, 100), ("I;16", 65535, 255), ("RGBA", (10, 20, 30, 0), 255), ("P", 0, 0), ("CMYK", (0, 0, 0, 0), 255)]
)
def test_every_kind_of_picture_becomes_three_channels_of_eight_bits(mode, value, expected) -> None:
    array = ImageInput(size=(4, 4))._pixels(Image.new(mode, (6, 6), value))
    assert array.shape == (3, 4, 4) and array.dtype == np.uint8 and abs(int(array[0, 0, 0]) - expected) <= 1


def test_cropping_cuts_the_centre_and_resizing_keeps_the_whole() -> None:
    image = Image.new("L", (40, 20), 0)
    image.paste(255, (0, 0, 4, 20))  # a bright left edge
    kept = ImageInput(size=(20, 20), channels=1, crop=1.0)._pixels(image)
    cut = ImageInput(size=(20, 20), channels=1, crop=0.999)._pixels(image)
    assert kept.max() > 200 and cut.max() == 0


def test_stratified_parts_cover_everything_once() -> None:
    truth = np.repeat([0, 1, 2], [50, 30, 20])
    parts = stratified(truth, (0.6, 0.2, 0.2), seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    assert [np.bincount(truth[p]).tolist() for p in parts] == [[30, 18, 12], [10, 6, 4], [10, 6, 4]]
    with pytest.raises(BadInput, match="too few"):
        stratified(np.array([0, 1]), (0.5, 0.5))


def test_a_dataset_dict_with_one_split_is_a_table() -> None:
    one = DatasetDict({"test": Dataset.from_dict({"text": ["a"]})})
    assert len(as_data(one, split="test")) == 1


def test_pairs_come_from_a_table_with_tabs(tmp_path: Path) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text('sentence_A\tsentence_B\trelatedness_score\nA "dog" runs\tA cat, asleep\t1.5\nA dog\tThe dog\t4.5\n')
    table = load_data(f"csv:{file}")
    assert table["sentence1"][0] == 'A "dog" runs' and table["sentence2"][0] == "A cat, asleep"
    assert scores(table).tolist() == [1.5, 4.5]
    check(table, Pairs.__metadata__[0], None, "train")
    other = table.map(lambda row: {"sentence2": row["sentence2"] + "."})
    assert fingerprint(other) != fingerprint(table) and not duplicates(table, other)
    rescored = table.map(lambda row: {"score": "2"})
    assert fingerprint(rescored) != fingerprint(table)


@pytest.mark.parametrize("value", ["", "high", "nan", None])
def test_a_score_is_a_number(value: Any) -> None:
    table = Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": ["1", value]})
    with pytest.raises(BadInput, match="score .* in row 1"):
        check(table, Pairs.__metadata__[0], None, "train")

"""Names and folders to tables with columns.

The table type is `datasets.Dataset` (memory-mapped, streams, pictures as a column) with the standard column names image, text, label, mask,
group. A method's signature says what it needs with `Labelled`, `Unlabelled`, ...; the same annotation checks the columns, writes the error
and words the help.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, disable_progress_bars

from wellread.errors import BadInput
from wellread.runtime import cache_folder, track

if TYPE_CHECKING:
    from wellread.inputs import ImageInput

disable_progress_bars()  # ours are the only ones: every step of a run is tracked by `runtime.track`


@dataclass(frozen=True)
class Needs:
    """What a table must hold. "input" stands for the column that the network reads (image or text)."""

    what: str
    columns: tuple[str, ...] = ("input",)
    min_classes: int = 2


Labelled = Annotated[Dataset, Needs("labelled examples: an image or text column and a label column", ("input", "label"))]
Unlabelled = Annotated[Dataset, Needs("examples: an image or text column; labels are not read", ("input",))]
Pairs = Annotated[Dataset, Needs("pairs of texts and how alike they are: columns sentence1, sentence2 and score", ("sentence1", "sentence2", "score"))]

Corpus = Annotated[
    Dataset, Needs("documents: a text column, and id and title where there are any (folder:PATH of text, Markdown, HTML, PDF; jsonl:FILE)", ("text",))
]

SYNONYMS = {
    "image": ("image", "img", "picture", "photo"),
    "text": ("text", "sentence", "content", "utterance", "title"),
    "label": ("label", "labels", "category", "class", "target", "intent", "fine_label"),
    "sentence1": ("sentence1", "sentence_A"),
    "sentence2": ("sentence2", "sentence_B"),
    "score": ("score", "similarity_score", "relatedness_score"),
}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")


# --- loading


def load_data(spec: str, split: str | None = None) -> Dataset | DatasetDict:
    """A table, or all its splits when it has several and none is named.

    "elpv", "digits" (from PyPI packages), "folder:PATH" (a folder of pictures per class; PATH/train, PATH/test when it has splits; a .png beside
    a .jpg of the same name is its mask; a folder of text, Markdown, HTML or PDF files and no pictures gives their passages), "csv:PATH" (commas or
    tabs), "parquet:PATH", "jsonl:PATH" (_id, title, text), "hf:NAME" (fetched because you named it), or a name in $WELLREAD_DATA.
    Then ":SPLIT", and "[from:to]" for some rows: "elpv:train[:200]". Columns of other names: "csv:notes.csv?text=body&label=topic".
    Raises `BadInput` for what is not there or cannot be read.
    """
    spec, rows = _rows(spec)
    spec, renamed = _renamed(spec)
    splits, chosen = _open(spec, renamed)
    base = spec.removesuffix(f":{chosen}") if chosen else spec
    splits = DatasetDict({key: rename(table, base if len(splits) == 1 else f"{base}:{key}") for key, table in splits.items()})
    split = split or chosen
    if split is not None:
        key = next((key for key in splits if key in SPLITS.get(split, (split,)) or key == split), None)
        if key is None:
            raise BadInput(f"{spec!r} has no split {split!r}: it has {', '.join(splits)}")
        splits = DatasetDict({key: splits[key]})
    if len(splits) > 1:
        if rows:
            raise BadInput(f"{spec!r} has the splits {', '.join(splits)}: name one before the rows, {spec}:train[:100]")
        return splits
    table = next(iter(splits.values()))
    if rows:
        first, last, _ = rows.indices(len(table))
        table = rename(table.select(range(first, last)), f"{name_of(table)}[{first}:{last}]")
    return table


def _rows(spec: str) -> tuple[str, slice | None]:
    found = re.fullmatch(r"(.*)\[(\d*):(\d*)\]", spec)
    if not found:
        return spec, None
    return found[1], slice(int(found[2]) if found[2] else None, int(found[3]) if found[3] else None)


def _renamed(spec: str) -> tuple[str, dict[str, str]]:
    found = re.fullmatch(r"([^?]*)\?([^:]*)(:\w+)?", spec)
    if not found:
        return spec, {}
    pairs = dict(part.split("=", 1) for part in found[2].split("&") if "=" in part)
    return found[1] + (found[3] or ""), {theirs: ours for ours, theirs in pairs.items()}


def _open(spec: str, renamed: dict[str, str]) -> tuple[DatasetDict, str | None]:
    """All splits of `spec`, and the split that it names."""
    kind, colon, rest = spec.partition(":")
    readers = {"folder": _folder, "csv": _csv, "parquet": _parquet, "jsonl": _jsonl, "hf": _hub}
    if kind in readers and colon:
        path, split = rest, None
        if kind == "hf" or not Path(rest).expanduser().exists():
            path, _, split = rest.rpartition(":") if ":" in rest else (rest, "", None)
        return _standard(readers[kind](path), renamed, spec), split or None
    split = rest or None
    if kind == "elpv":
        return _elpv(), split
    if kind == "digits":
        return _digits(), split
    home = os.environ.get("WELLREAD_DATA")
    if home and (Path(home) / kind).is_dir():
        return _standard(_anything(Path(home) / kind), renamed, spec), split
    if Path(kind).expanduser().exists():
        raise BadInput(f"say how {spec!r} is to be read: folder:{spec}, csv:{spec}, parquet:{spec} or jsonl:{spec}")
    raise BadInput(
        f"there are no data called {spec!r}: give elpv, digits, folder:PATH, csv:PATH, parquet:PATH, jsonl:PATH, hf:NAME"
        + (f", or a folder in {home}" if home else ", or set WELLREAD_DATA to the folder that holds your data sets")
    )


def _anything(folder: Path) -> DatasetDict:
    for ending, reader in ((".parquet", _parquet), (".csv", _csv), (".jsonl", _jsonl)):
        if any(found.suffix == ending for found in folder.iterdir()):
            return reader(str(folder))
    return _folder(str(folder))


def _folder(path: str) -> DatasetDict:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise BadInput(f"there is no folder {path!r}: give the folder that holds one sub-folder of pictures per class")
    if not any(each.suffix.lower() in PICTURES for each in root.rglob("*")):
        from wellread import documents

        if documents.documents(root)[0]:
            return DatasetDict({"all": documents.from_folder(root)})
    inside = sorted(each for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
    names = {alias for aliases in SPLITS.values() for alias in aliases}
    splits = {each.name.lower(): each for each in inside if each.name.lower() in names}
    if splits and len(splits) == len(inside):
        return DatasetDict({name: _class_folders(folder) for name, folder in splits.items()})
    return DatasetDict({"all": _class_folders(root)})


def _class_folders(root: Path) -> Dataset:
    classes = sorted(each.name for each in root.iterdir() if each.is_dir() and not each.name.startswith("."))
    rows: dict[str, list[Any]] = {"image": [], "mask": [], "label": [], "file": []}
    for number, name in enumerate(classes or [""]):
        files = sorted(each for each in (root / name).rglob("*") if each.suffix.lower() in PICTURES)
        photos = {each.with_suffix("") for each in files if each.suffix.lower() in (".jpg", ".jpeg")}
        masks = {each.with_suffix(""): each for each in files if each.suffix.lower() == ".png" and each.with_suffix("") in photos}
        chosen = [each for each in files if each not in masks.values()]
        if not chosen:
            raise BadInput(f"the folder {str(root / name)!r} holds no pictures ({', '.join(PICTURES)}): remove it or fill it")
        rows["image"] += [str(each) for each in chosen]
        rows["mask"] += [str(masks[stem]) if (stem := each.with_suffix("")) in masks else None for each in chosen]
        rows["label"] += [number] * len(chosen)
        rows["file"] += [str(each.relative_to(root)) for each in chosen]
    features: dict[str, Any] = {"image": Image(), "mask": Image(), "label": ClassLabel(names=classes or ["all"]), "file": Value("string")}
    if not any(rows["mask"]):
        del rows["mask"], features["mask"]
    if not classes:
        del rows["label"], features["label"]
    return Dataset.from_dict(rows, features=Features(features))


def _files(path: str, ending: str) -> dict[str, str]:
    root = Path(path).expanduser()
    files = sorted(root.glob(f"*{ending}")) if root.is_dir() else [root] if root.is_file() else []
    if not files:
        raise BadInput(f"there is no {ending} file at {path!r}")
    return {each.stem: str(each) for each in files} if root.is_dir() else {"all": str(root)}


def _csv(path: str) -> DatasetDict:
    return DatasetDict({name: _csv_table(file) for name, file in _files(path, ".csv").items()})


def _csv_table(file: str) -> Dataset:
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            tabs = "\t" in opened.readline()
            opened.seek(0)
            # between tabs a quotation mark is a quotation mark
            rows = list(csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.DictReader(opened))
    except (UnicodeDecodeError, csv.Error) as failed:
        raise BadInput(f"{file} cannot be read as UTF-8 CSV ({failed}): save it as UTF-8 with one header line") from None
    if not rows:
        raise BadInput(f"{file} has no rows below its header")
    ragged = next((number for number, row in enumerate(rows, 2) if None in row or None in row.values()), None)
    if ragged:
        raise BadInput(f"{file}, row {ragged}: the number of fields is not that of the header")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


def _parquet(path: str) -> DatasetDict:
    try:
        return DatasetDict({name: Dataset.from_parquet(file) for name, file in _files(path, ".parquet").items()})
    except BadInput:
        raise
    except Exception as failed:  # datasets wraps pyarrow's errors in several of its own
        raise BadInput(f"{path!r} cannot be read as parquet: {str(failed).strip().splitlines()[0][:160]}") from None


def _jsonl(path: str) -> DatasetDict:
    from wellread.documents import from_jsonl

    return DatasetDict({name: from_jsonl(file) for name, file in _files(path, ".jsonl").items()})


def _hub(name: str) -> DatasetDict:
    from datasets import load_dataset

    try:
        loaded = load_dataset(name)
    except Exception as failed:  # the hub client's many errors all mean: not to be had
        raise BadInput(
            f"hf:{name} is neither in the local cache nor could it be fetched ({str(failed).strip().splitlines()[0][:160]}): "
            "go online once, or give a local file with parquet:PATH"
        ) from None
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"all": loaded})


def _elpv() -> DatasetDict:
    """2,624 solar cells, defective when the annotators' probability of a defect is above 0.5; 60/20/20, stratified, always the same."""
    from importlib.util import find_spec

    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise BadInput("elpv comes in the package elpv-dataset: pip install 'wellread[zoo]'")
    root = Path(spec.origin).parent / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines() if line.strip()]
    table = Dataset.from_dict(
        {
            "image": [str(root / row[0]) for row in rows],
            "label": [int(float(row[1]) > 0.5) for row in rows],
            "probability": [float(row[1]) for row in rows],
            "type": [row[2] for row in rows],
            "file": [row[0] for row in rows],
        },
        features=Features(
            {
                "image": Image(),
                "label": ClassLabel(names=["intact", "defective"]),
                "probability": Value("float64"),
                "type": Value("string"),
                "file": Value("string"),
            }
        ),
    )
    return _three_parts(table)


def _digits() -> DatasetDict:
    """scikit-learn's 1,797 hand-written digits, 8 x 8, grey values 0...16 scaled to 0...255; 60/20/20."""
    from PIL import Image as Picture
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pictures = [Picture.fromarray((image * 15.9375).astype(np.uint8)) for image in loaded.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in range(10)])})
    return _three_parts(Dataset.from_dict({"image": pictures, "label": loaded.target.tolist()}, features=features))


def _three_parts(table: Dataset) -> DatasetDict:
    train, validation, test = stratified(np.asarray(table["label"]), (0.6, 0.2, 0.2), seed=0)
    return DatasetDict({"train": table.select(train), "validation": table.select(validation), "test": table.select(test)})


def stratified(labels: np.ndarray, shares: Sequence[float], seed: int = 0) -> list[np.ndarray]:
    """Row numbers of parts that hold each class in the same share; shuffled. Raises `BadInput` when a class is too small to be in each."""
    from sklearn.model_selection import train_test_split

    rest, parts = np.arange(len(labels)), []
    for number, share in enumerate(shares[:-1]):
        left = sum(shares[number:])
        try:
            part, rest = train_test_split(rest, train_size=share / left, stratify=labels[rest], random_state=seed)
        except ValueError as failed:
            raise BadInput(f"the data are too few to be split class by class: {failed}") from None
        parts.append(part)
    return [*parts, np.random.default_rng(seed).permutation(rest)]


def _standard(splits: DatasetDict, renamed: dict[str, str], spec: str) -> DatasetDict:
    """Standard column names, and labels as class numbers with the same names in every split."""
    tables = dict(splits)
    for split, table in tables.items():
        missing = [column for column in renamed if column not in table.column_names]
        if missing:
            raise BadInput(f"{spec!r} has no column {missing[0]!r}: it has {', '.join(table.column_names)}")
        table = table.rename_columns({theirs: ours for theirs, ours in renamed.items() if theirs != ours})
        for name, synonyms in SYNONYMS.items():
            found = next((s for s in synonyms if s in table.column_names), None)
            if found and name not in table.column_names:
                table = table.rename_column(found, name)
        tables[split] = table
    if all("label" in table.column_names for table in tables.values()):
        if any(isinstance(table.features["label"], Value) for table in tables.values()):
            values = {split: list(table["label"]) for split, table in tables.items()}
            names = sorted({str(value) for column in values.values() for value in column if value not in (None, "")}, key=_natural)
            numbers = {name: number for number, name in enumerate(names)}
            for split, column in values.items():
                empty = next((row for row, value in enumerate(column) if value in (None, "")), None)
                if empty is not None:
                    raise BadInput(f"{spec!r} has no label in row {empty} of {split}: fill it or remove the row")
                if any(isinstance(value, float) and not value.is_integer() for value in column):
                    continue  # a number to predict, not a class
                encoded = [numbers[str(value)] for value in column]
                table = tables[split].remove_columns("label").add_column("label", encoded)  # type: ignore[call-arg]
                tables[split] = table.cast_column("label", ClassLabel(names=names))
        elif len({tuple(table.features["label"].names) for table in tables.values() if isinstance(table.features["label"], ClassLabel)}) > 1:
            raise BadInput(f"the splits of {spec!r} do not have the same classes: make the class folders the same in each")
    return DatasetDict(tables)


def _natural(name: str) -> tuple[int, float, str]:
    return (0, float(name), name) if re.fullmatch(r"-?\d+", name) else (1, 0.0, name)


# --- what a caller may give


def as_data(given: Any, split: str | None = None) -> Dataset:
    """A table from a Dataset, a name for `load_data`, a torch Dataset, or a list of (example, label) pairs.

    split: taken when a name stands for several splits.
    """
    if isinstance(given, Dataset):
        return given
    if isinstance(given, str | Path):
        loaded = load_data(str(given))
        if isinstance(loaded, Dataset):
            return loaded
        given = loaded
    if isinstance(given, DatasetDict):
        for key in SPLITS.get(split or "", ()):
            if key in given:
                return given[key]
        raise BadInput(f"these data have the splits {', '.join(given)}: name the one that is meant, for instance data:{next(iter(given))}")
    if hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, dict):
        return _from_pairs([given[i] for i in range(len(given))])
    raise BadInput(
        f"data are needed, not a {type(given).__name__}: give a datasets.Dataset, a name for load_data, a torch Dataset, or a list of (example, label) pairs"
    )


def _from_pairs(pairs: list[Any]) -> Dataset:
    if not pairs:
        raise BadInput("the data have no rows: give at least one example")
    pairs = [each if isinstance(each, tuple | list) and len(each) == 2 else (each, None) for each in pairs]
    examples, targets = [each for each, _ in pairs], [target for _, target in pairs]
    text = isinstance(examples[0], str)
    columns: dict[str, Any] = {"text" if text else "image": examples if text else [_picture(each) for each in examples]}
    features: dict[str, Any] = {"text" if text else "image": Value("string") if text else Image()}
    if targets[0] is not None:
        columns["label"] = [int(target) if not isinstance(target, str) else target for target in targets]
        features["label"] = Value("string" if isinstance(targets[0], str) else "int64")
    table = Dataset.from_dict(columns, features=Features(features))
    return _standard(DatasetDict({"all": table}), {}, "the list of pairs")["all"]


def _picture(example: Any) -> Any:
    from PIL import Image as Picture

    if isinstance(example, Picture.Image):
        return example
    array = np.asarray(example)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3):
        raise BadInput(f"an example of shape {array.shape} is not a picture: give PIL images, or arrays [H, W], [H, W, 3] or [3, H, W]")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise BadInput("pictures given as floats must lie in 0...1: give them before normalisation")
        array = (array * 255).round()
    return Picture.fromarray(array.astype(np.uint8).squeeze())


def check(data: Dataset, needs: Needs, column: str | None, argument: str, labels_known: int | None = None) -> None:
    """Everything that can be said about a table before work starts. Raises `BadInput` naming the argument.

    column: what the network reads. labels_known: number of classes that labels must stay below, when the network fixes it.
    """
    if len(data) == 0:
        raise BadInput(f"{argument} has no rows: give at least one example")
    for wanted in needs.columns:
        name = (column or _first_input(data)) if wanted == "input" else wanted
        if name is None or name not in data.column_names:
            raise BadInput(f"{argument} has no column {name or 'image or text'!r} (it has {', '.join(data.column_names)}): {needs.what} are needed")
    if "label" in needs.columns:
        values = labels(data, argument)
        names = class_names(data)
        outside = np.flatnonzero((values < 0) | (values >= len(names)))
        if len(outside):
            raise BadInput(f"{argument} has the label {values[outside[0]]} in row {outside[0]}, outside 0...{len(names) - 1}: correct the labels")
        if len(np.unique(values)) < needs.min_classes:
            raise BadInput(f"{argument} has one class only ({names[values[0]]}): at least two are needed")
        if labels_known is not None and len(names) > labels_known:
            raise BadInput(
                f"{argument} has {len(names)} classes and the network {labels_known}: give data with the network's classes, or train a new head"
            )
    if "score" in needs.columns:
        scores(data, argument)


def _first_input(data: Dataset) -> str | None:
    return next((name for name in ("image", "text") if name in data.column_names), None)


# --- reading tables


def labels(data: Dataset, argument: str = "the data") -> np.ndarray:
    """int64 [N]. Raises `BadInput` for missing, fractional or nested labels."""
    if "label" not in data.column_names:
        raise BadInput(f"{argument} has no column 'label' (it has {', '.join(data.column_names)})")
    values = data.with_format(None)["label"]
    values = list(values)
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise BadInput(f"{argument} has no label in row {missing}: fill it or remove the row")
    array = np.asarray(values)
    if array.ndim != 1:
        raise BadInput(f"{argument} has several labels per row: give one class per row")
    if array.dtype.kind == "f" and not np.array_equal(array, np.round(array)):
        raise BadInput(f"{argument} has labels that are fractions: give class numbers or names")
    if array.dtype.kind not in "iufb":
        raise BadInput(f"{argument} has labels that are not class numbers: load it with load_data, or cast the column to ClassLabel")
    return array.astype(np.int64)


def scores(data: Dataset, argument: str = "the data") -> np.ndarray:
    """float32 [N], how alike the texts of each pair are. Raises `BadInput` naming the first row without a finite number."""
    found = np.empty(len(data), np.float32)
    for row, value in enumerate(data["score"]):
        try:
            found[row] = float(value)
        except (TypeError, ValueError):
            found[row] = np.nan
        if not np.isfinite(found[row]):
            raise BadInput(f"{argument} has the score {value!r} in row {row}: give a number in every row")
    return found


def class_names(data: Dataset) -> list[str]:
    feature = data.features["label"]
    if isinstance(feature, ClassLabel) and feature.names is not None:
        return list(feature.names)
    return [str(number) for number in range(int(labels(data).max()) + 1)]


def rename(data: Dataset, name: str) -> Dataset:
    """The same rows under a name that lineage and reports show."""
    other = data.select(range(len(data)))
    other.info.description = name
    return other


def name_of(data: Dataset) -> str:
    return data.info.description or "data"


def row_hashes(data: Dataset, columns: Iterable[str] = ("image", "text", "sentence1", "sentence2")) -> list[str]:
    """A hash per row of the raw content (file bytes for pictures) of those of `columns` that are there."""
    present = [column for column in columns if column in data.column_names]
    key = (data._fingerprint, tuple(present))
    if key not in _hashes:
        raw = data.with_format(None).select_columns(present)
        for column in present:
            if isinstance(raw.features[column], Image):
                raw = raw.cast_column(column, Image(decode=False))
        _hashes[key] = [hashlib.sha256(b"\0".join(_bytes(row[column]) for column in present)).hexdigest() for row in raw]
    return _hashes[key]


_hashes: dict[tuple[str, tuple[str, ...]], list[str]] = {}


def _bytes(value: Any) -> bytes:
    if isinstance(value, dict):  # an undecoded picture
        try:
            return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        except OSError as failed:
            raise BadInput(f"the picture {value['path']} cannot be read ({failed.strerror}): restore it or remove its row") from None
    return str(value).encode()


def fingerprint(data: Dataset) -> str:
    """sha256 of the rows in their order: content and, when there are any, labels, scores and what else is said of them."""
    whole = hashlib.sha256("\n".join(row_hashes(data)).encode())
    for column in ("label", "score", "group", "links", "captions", "tags", "first", "second", "rater"):
        if column in data.column_names:
            whole.update(str(list(data.with_format(None)[column])).encode())
    return whole.hexdigest()


def duplicates(a: Dataset, b: Dataset) -> list[tuple[int, int]]:
    """(row in a, row in b) of examples that are the same to the byte; for a table with itself, each pair once."""
    where: dict[str, int] = {}
    same = a is b
    pairs = []
    for row, found in enumerate(row_hashes(a)):
        if same and found in where:
            pairs.append((where[found], row))
        where.setdefault(found, row)
    if same:
        return pairs
    return [(where[found], row) for row, found in enumerate(row_hashes(b)) if found in where]


def subset(data: Dataset, rows: Iterable[int]) -> Dataset:
    """Some rows, with the table's name."""
    return data.select(list(map(int, rows)))


def joined(tables: Sequence[Dataset]) -> Dataset:
    return concatenate_datasets(list(tables))


def pixels(data: Dataset, source: ImageInput) -> np.ndarray:
    """uint8 [N, C, H, W]: the pictures as `source` resizes them, decoded once into a memory-mapped file of the cache.

    Raises `BadInput` naming the pictures that cannot be decoded.
    """
    if "image" not in data.column_names:
        raise BadInput(f"{name_of(data)} has no column 'image' (it has {', '.join(data.column_names)}): this network reads pictures")
    settings = f"{source.size} {source.channels} {source.interpolation} {source.crop}"
    key = hashlib.sha256(("\n".join(row_hashes(data, ("image",))) + settings).encode()).hexdigest()
    file = cache_folder() / "pixels" / f"{key[:32]}.npy"
    if file.is_file():
        try:
            return np.load(file, mmap_mode="r")
        except ValueError:
            file.unlink()  # cut off by a full disk: made again
    shape = (len(data), source.channels, *source.size)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}")
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    except OSError:
        partial, array = None, np.empty(shape, np.uint8)  # type: ignore[assignment]  # no cache to be had: in memory
    broken = []
    for row, value in enumerate(track(_decoded(data, source), f"reading {name_of(data)}", total=len(data))):
        if isinstance(value, str):
            broken.append(f"row {row} ({value})")
        else:
            array[row] = value
    if broken:
        if partial:
            partial.unlink()
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise BadInput(
            f"{len(broken)} pictures of {name_of(data)} cannot be decoded: {', '.join(broken[:5])}{more}: restore them or remove their rows"
        )
    if partial:
        array.flush()  # type: ignore[union-attr]
        os.replace(partial, file)
        return np.load(file, mmap_mode="r")
    return array


def _decoded(data: Dataset, source: ImageInput) -> Iterator[np.ndarray | str]:
    import io

    from PIL import Image as Picture

    raw = data.with_format(None).select_columns("image").cast_column("image", Image(decode=False))

    def decode(row: dict[str, Any]) -> np.ndarray | str:
        value = row["image"]
        try:
            with Picture.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]) as picture:
                return source._pixels(picture)
        except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError):
            return str(value.get("path") or "bytes")

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # PIL decodes and resizes outside the interpreter lock
        yield from pool.map(decode, raw)

"""Pairs of sentences and how alike people find them: SICK and STS-B in WELLREAD_DATA."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from datasets import Dataset

from wellread.data import rename
from wellread.elastic.starbucks import check_pairs


def sick(part: str) -> Dataset:
    """SICK's pairs; its relatedness is 1 to 5."""
    with open(Path(os.environ["WELLREAD_DATA"]) / "sick" / f"SICK_{part}.txt", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return table([(row["sentence_A"], row["sentence_B"], row["relatedness_score"]) for row in rows], f"SICK {part}")


def stsb() -> Dataset:
    with open(Path(os.environ["WELLREAD_DATA"]) / "stsb" / "en-test.csv", newline="", encoding="utf-8") as file:
        return table([(row[0], row[1], row[2]) for row in csv.reader(file)], "STS-B test")


def table(rows: list[tuple[str, str, str]], name: str) -> Dataset:
    first, second, score = zip(*rows, strict=True)
    made = rename(Dataset.from_dict({"sentence1": first, "sentence2": second, "score": [float(each) for each in score]}), name)
    check_pairs(made, True, name)
    return made

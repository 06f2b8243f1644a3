"""Test collections: a corpus, queries, and what people judged relevant, to measure a search on."""

from __future__ import annotations

import os
import re
import warnings as python_warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from wellread.documents import from_jsonl
from wellread.errors import BadInput
from wellread.ranking import Judgements


@dataclass(eq=False)
class Collection:
    """A corpus (columns id, text and perhaps title), queries (id, text) and judgements (query id -> document id -> grade).

    Only judged queries are kept. Judgements of unknown queries are left out; those of unknown documents stay, as for trec_eval, and count as
    not found. How many there are is warned about and kept in `warnings`.
    """

    name: str
    corpus: Dataset
    queries: Dataset
    judgements: Judgements
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for what, table in (("corpus", self.corpus), ("queries", self.queries)):
            if missing := {"id", "text"} - set(table.column_names):
                raise BadInput(f"the {what} of {self.name} has no column {sorted(missing)[0]!r} (it has {', '.join(table.column_names)})")
        asked = dict.fromkeys(self.queries["id"])
        if len(asked) < len(self.queries):
            raise BadInput(f"{self.name} has {len(self.queries) - len(asked)} queries with the id of another: make the ids unique")
        documents = {document for grades in self.judgements.values() for document in grades}
        for batch in self.corpus.select_columns("id").iter(10_000):
            documents -= set(batch["id"])
        pairs = [(query, document) for query, grades in self.judgements.items() for document in grades]
        for what, unknown in (
            ("documents, which count as not found", [document for _, document in pairs if document in documents]),
            ("queries, which are left out", [query for query, _ in pairs if query not in asked]),
        ):
            if unknown:
                self.warnings.append(f"judgements of unknown {what}: {len(unknown)} of {len(pairs)} (first: {unknown[0]!r})")
        unasked = set(self.judgements) - set(asked)
        self.judgements = {query: grades for query, grades in self.judgements.items() if query not in unasked and grades}
        if not self.judgements:
            raise BadInput(f"none of the queries of {self.name} has a judgement: the queries and the judgements do not belong together")
        self.queries = self.queries.select([row for row, each in enumerate(asked) if each in self.judgements])
        for warning in self.warnings:
            python_warnings.warn(f"{self.name}: {warning}", stacklevel=3)


def load_collection(spec: str) -> Collection:
    """A collection by name.

    "beir:PATH" (a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv), or a name in $WELLREAD_DATA: such a folder, or "cranfield" (the
    files of 1967). Then ":SPLIT" of the judgements; "test" when none is named. Raises `BadInput` for what is not there or cannot be read.
    """
    kind, _, rest = spec.partition(":")
    home = os.environ.get("WELLREAD_DATA")
    if kind == "beir":
        path, split = (rest, "") if ":" not in rest or Path(rest).expanduser().is_dir() else rest.rsplit(":", 1)
        return _beir(Path(path).expanduser(), split)
    if home and (Path(home) / kind / "cran.all.1400").is_file():
        return _cranfield(Path(home) / kind)
    if home and (Path(home) / kind / "corpus.jsonl").is_file():
        return _beir(Path(home) / kind, rest)
    raise BadInput(
        f"there is no test collection {spec!r}: give beir:PATH, the folder of corpus.jsonl, queries.jsonl and qrels"
        + (f", or the name of one in {home}" if home else ", or set WELLREAD_DATA to the folder that holds your data sets")
    )


def read_judgements(file: str | Path) -> Judgements:
    """Judgements from lines "query document grade" (BEIR, with a header) or "query 0 document grade" (TREC), between tabs or spaces."""
    judgements: Judgements = {}
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as failed:
        raise BadInput(f"the judgements {str(file)!r} cannot be read: {failed}") from None
    for number, line in enumerate(lines, 1):
        parts = line.rstrip().split("\t") if "\t" in line else line.split()
        if not parts or (number == 1 and parts[-1].lower() in ("score", "grade", "relevance")):
            continue
        try:
            query, document, grade = parts[0], parts[-2], int(parts[-1])
            if len(parts) not in (3, 4):
                raise ValueError
        except (ValueError, IndexError):
            raise BadInput(f"{file}, line {number} is not 'query document grade': {line[:80]!r}") from None
        if judgements.setdefault(query, {}).setdefault(document, grade) != grade:
            raise BadInput(f"{file}, line {number}: document {document!r} has another grade for query {query!r} further up")
    return judgements


def _beir(folder: Path, split: str) -> Collection:
    splits = {each.stem: each for each in sorted((folder / "qrels").glob("*.tsv"))}
    chosen = split or ("test" if "test" in splits else next(iter(splits), "test") if len(splits) < 2 else "")
    if chosen not in splits:
        raise BadInput(f"{str(folder)!r} has no judgements {chosen or 'test'!r} (qrels/SPLIT.tsv): it has {', '.join(splits) or 'none'}; name one")
    corpus, queries = (from_jsonl(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    return Collection(f"{folder.name}:{chosen}", corpus, queries, read_judgements(splits[chosen]))


def _cranfield(folder: Path) -> Collection:
    """1,400 abstracts and 225 queries on aerodynamics (Cleverdon 1967). Every code of the judgements means relevant.

    Judgements number the queries by position, not by what is written beside them; most texts repeat the title, which is taken out of them.
    """
    documents = [{"id": each["I"], "title": each["T"], "text": each["W"].removeprefix(each["T"]).strip()} for each in _smart(folder / "cran.all.1400")]
    queries = [{"id": str(number), "text": fields["W"]} for number, fields in enumerate(_smart(folder / "cran.qry"), 1)]
    judgements = {query: dict.fromkeys(grades, 1) for query, grades in read_judgements(folder / "cranqrel").items()}
    corpus = Dataset.from_list([each for each in documents if each["title"] or each["text"]])  # 2 are empty
    return Collection("cranfield", corpus, Dataset.from_list(queries), judgements)


def _smart(file: Path) -> Iterator[dict[str, str]]:
    """Records of the SMART system's files: ".I number", then ".T", ".W", ... and the lines of that field; line breaks become spaces."""
    records = re.split(r"^\.I +(\d+) *$", file.read_text("utf-8", "replace"), flags=re.M)
    for number, record in zip(records[1::2], records[2::2], strict=True):
        parts = re.split(r"^\.([A-Z]) *$", record, flags=re.M)
        yield {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)} | {"I": number}  # the file ends with ".I"

"""An index on a folder: passages, their vectors and their words, searched by meaning, by words or by both.

    index.json        what never changes: the encoder and its fingerprint, the kind of the index, the score, the language
    passages.sqlite   the passages by row, and which segments hold the vectors of which rows; every change is one transaction
    segments/         vectors as FAISS files that are never changed, read memory-mapped; pending.f32 while they are computed
    words-.../        the BM25 scores, memory-mapped

Neither building nor searching holds the corpus in memory. A build that was killed goes on when it is started again.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from datasets import Dataset

from wellread import documents, runtime
from wellread.errors import BadInput, optional
from wellread.words import check_language, words

if TYPE_CHECKING:
    from wellread.network import Network

Mode = Literal["hybrid", "dense", "lexical"]
Kind = Literal["flat", "hnsw"]

SEGMENT = 131_072  # rows: what one FAISS file holds, and with it the memory that building takes
CHUNK = 512  # rows that are encoded between two commits: what a kill can lose
DEPTH = 100  # how far down each ranking is read before they are fused
NEIGHBOURS, BUILD_BREADTH, SEARCH_BREADTH = 32, 80, 64  # of the HNSW graph
SMALL = 8  # segments below half of SEGMENT, above which they are joined
K1, B = 1.2, 0.75


@dataclass(frozen=True)
class Hit:
    """One passage found. ranks: its place, from 1, in each of the rankings that were fused."""

    id: str
    score: float
    title: str
    text: str
    ranks: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Index:
    """`Index.build` makes one, `Index.open` opens one; `search` finds passages, `add`, `delete` and `update` change what it holds."""

    def __init__(self, folder: Path, settings: dict[str, Any], encoder: Network | None = None) -> None:
        self.folder, self.settings, self._encoder = folder, settings, encoder
        self.database = sqlite3.connect(folder / "passages.sqlite", check_same_thread=False)
        self.database.executescript(
            """CREATE TABLE IF NOT EXISTS passages (row INTEGER PRIMARY KEY, id TEXT UNIQUE, title TEXT, text TEXT);
            CREATE TABLE IF NOT EXISTS segments (first INTEGER PRIMARY KEY, rows INTEGER, file TEXT);
            CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value);"""
        )  # a deleted passage keeps its row and has no id
        self._open: dict[str, Any] = {}  # what is mapped into memory, by file

    # --- making and opening

    @classmethod
    def build(
        cls,
        encoder: Network | str | Path,
        corpus: Any,
        folder: str | Path,
        *,
        kind: Kind = "flat",
        score: Literal["cosine", "dot"] = "cosine",
        lexical: bool = True,
        language: str | None = "en",
        batch_size: int = 64,
        update: bool = False,
    ) -> Index:
        """Make an index of `corpus` in `folder`, or go on with one that was interrupted.

        encoder: a network that gives embeddings of text, by name or folder, or a Network.
        corpus: what `documents.corpus` takes (folder:notes, jsonl:FILE, a Dataset, ...), or an iterable of {"id", "title", "text"}.
        kind: flat compares with every vector; hnsw walks a graph, for hundreds of thousands of passages and more.
        score: cosine, or the plain dot product for encoders trained with it.
        lexical: also an index of the words. Building that takes about 30 bytes of memory for each different word of each passage.
        language: of stemming and stop words ("en", "de", ...); None takes words as they are.
        update: when the folder holds an index already, make it one of `corpus`: new and changed passages are encoded, vanished ones deleted.
        Raises `BadInput` for a network that gives no embeddings, for ids that appear twice, and when the folder holds another index.
        """
        if kind not in ("flat", "hnsw") or score not in ("cosine", "dot"):
            raise BadInput(f"kind {kind!r} and score {score!r}: choose flat or hnsw, and cosine or dot")
        check_language(language)
        for module in ("faiss", "bm25s") if lexical else ("faiss",):
            optional(module, "retrieve")  # before anything is read
        network, named = encoder_of(encoder)
        place = Path(folder).expanduser().resolve()
        file = place / "index.json"
        fixed = {"kind": kind, "score": score, "lexical": lexical, "language": language}
        if file.is_file():
            index = cls(place, _settings(place), network)
            index._same_encoder(network)
            for name, value in fixed.items():
                if index.settings[name] != value:
                    raise BadInput(f"{place} holds an index with {name} {index.settings[name]}, not {value}: choose another folder")
        else:
            if place.exists() and any(each.name != "lock" for each in place.iterdir()):
                raise BadInput(f"{place} is not empty and holds no index: choose another folder")
            place.mkdir(parents=True, exist_ok=True)
            dimension = int(encode(network, ["a sentence"], 1).shape[1])
            settings = {"format": 1, "encoder": named, "dimension": dimension, **fixed}
            (place / "segments").mkdir(exist_ok=True)
            _write(file, json.dumps(settings, indent=1))
            index = cls(place, settings, network)
        try:
            with index._writing():
                index._take(corpus, "update" if update else "build")
                index._finish(batch_size)
        except BaseException:
            if not index._total():  # the corpus was refused: no empty index stays behind
                index.close()
                shutil.rmtree(place, ignore_errors=True)
            raise
        return index

    @classmethod
    def open(cls, folder: str | Path, encoder: Network | str | Path | None = None) -> Index:
        """An index that was built before. The encoder is loaded when it is needed, from where it was, unless one is given.

        Raises `BadInput` when there is no index, or `encoder` is not the one that built it.
        """
        place = Path(folder).expanduser().resolve()
        settings = _settings(place)
        if not (place / "passages.sqlite").is_file():
            raise BadInput(f"{place} is not whole: it has no passages.sqlite; copy the folder again, or build the index again")
        index = cls(place, settings)
        if encoder is not None:
            network = encoder_of(encoder)[0]
            index._same_encoder(network)
            index._encoder = network
        return index

    @property
    def encoder(self) -> Network:
        if self._encoder is None:
            name = self.settings["encoder"]["name"]
            if name is None:
                raise BadInput(f"{self.folder} was built with a network that has no name: open it with that network, Index.open(folder, encoder=...)")
            network = encoder_of(name)[0]
            self._same_encoder(network)
            self._encoder = network
        return self._encoder

    def _same_encoder(self, network: Network) -> None:
        built, given = self.settings["encoder"], network.fingerprint
        if built["fingerprint"] != given:
            raise BadInput(
                f"{self.folder} was built with the encoder {built['name'] or 'without a name'} (fingerprint {built['fingerprint'][:12]}) and the one given "
                f"is another ({given[:12]}), whose vectors cannot be compared: give the first one, or build a new index"
            )

    def close(self) -> None:
        self._open.clear()
        self.database.close()

    def __len__(self) -> int:
        return self._one("SELECT count(id) FROM passages")

    def __repr__(self) -> str:
        what = self.settings["kind"] + (" and words" if self.settings["lexical"] else "")
        return f"Index({len(self)} passages, {what}, encoder {self.settings['encoder']['name']})"

    # --- what it holds

    def add(self, corpus: Any, *, batch_size: int = 64) -> None:
        """Add passages. Raises `BadInput` naming an id that is there already; nothing is added then."""
        with self._writing():
            self._take(corpus, "add")
            self._finish(batch_size)

    def update(self, corpus: Any, *, batch_size: int = 64) -> None:
        """Make it an index of `corpus`: new and changed passages are encoded, vanished ones deleted, the others stay as they are."""
        with self._writing():
            self._take(corpus, "update")
            self._finish(batch_size)

    def delete(self, ids: Iterable[str]) -> None:
        """Delete passages. Raises `BadInput` naming an id that is not there; nothing is deleted then."""
        with self._writing(), self.database:
            for each in [ids] if isinstance(ids, str) else ids:
                if not self.database.execute(f"{_DELETE} id = ?", (each,)).rowcount:
                    raise BadInput(f"the index holds no passage {each!r}: nothing was deleted")
        if self._one("SELECT count(*) FROM passages") > 1.25 * len(self):
            self.compact()

    def compact(self) -> None:
        """Rewrite without the deleted passages, and join small segments. Happens by itself when a fifth is deleted, or small segments are many."""
        with self._writing():
            self._compact()
            self._finish(64)

    def _take(self, corpus: Any, how: Literal["build", "add", "update"]) -> None:
        """Passages into the database, in one transaction; they wait there to be encoded."""
        given = corpus if is_rows(corpus) else documents.corpus(corpus)
        run, empty = self.database.execute, 0
        with self.database:
            run("CREATE TEMP TABLE IF NOT EXISTS incoming (id TEXT PRIMARY KEY, title TEXT, text TEXT)")
            run("DELETE FROM incoming")
            for passage in runtime.track(documents.rows(given), "reading passages", len(given) if isinstance(given, Dataset) else None):
                if not passage.text and not passage.title:
                    empty += 1
                    continue
                try:
                    run("INSERT INTO incoming VALUES (?, ?, ?)", tuple(each.encode("utf-8", "replace").decode() for each in passage))
                except sqlite3.IntegrityError:
                    raise BadInput(f"the corpus has the id {passage.id!r} more than once: make the ids unique") from None
            if not self._one("SELECT count(*) FROM incoming"):
                raise BadInput(f"the corpus holds no text ({empty} empty documents): give at least one passage")
            if how == "add":
                twice = run("SELECT id FROM incoming WHERE id IN (SELECT id FROM passages) LIMIT 1").fetchone()
                if twice:
                    raise BadInput(f"the index holds a passage {twice[0]!r} already: delete it first, or use update")
            else:
                changed = "SELECT id FROM (SELECT id, title, text FROM passages WHERE id IS NOT NULL EXCEPT SELECT id, title, text FROM incoming)"
                if (
                    how == "build"
                    and self._total()
                    and (self._one(f"SELECT count(*) FROM ({changed})") or self._one("SELECT count(*) FROM incoming") != len(self))
                ):
                    raise BadInput(
                        f"{self.folder} holds an index of other passages, or they have changed: bring it up to date with --update (Index.update)"
                    )
                run(f"{_DELETE} id IN ({changed})")
            run(
                "INSERT INTO passages SELECT ? + row_number() OVER (ORDER BY rowid), id, title, text FROM incoming WHERE id NOT IN "
                "(SELECT id FROM passages WHERE id IS NOT NULL) ORDER BY rowid",
                (self._total() - 1,),
            )
            run("DELETE FROM incoming")
        if empty:
            warnings.warn(f"{empty} of the documents hold no text and were skipped", stacklevel=3)

    def _finish(self, batch_size: int) -> None:
        """Whatever is missing: words first, since they are quick and a half-built index can be searched by them; then vectors."""
        if self._one("SELECT count(*) FROM segments WHERE rows < ?", SEGMENT // 2) > SMALL or self._total() > 1.25 * len(self):
            self._compact()
        if self.settings["lexical"] and self._state("words_rows") != self._total():
            self._build_words()
        self._encode(batch_size)
        used = {file for (file,) in self.database.execute("SELECT file FROM segments")} | {"pending.f32"}
        for file in (self.folder / "segments").iterdir():
            if file.name not in used:
                file.unlink()
        for place in self.folder.glob("words-*"):
            if place.name != self._state("words"):
                shutil.rmtree(place, ignore_errors=True)

    # --- vectors

    def _encode(self, batch_size: int) -> None:
        total, d = self._total(), self.settings["dimension"]
        start = self._ready() + (self._state("pending") or 0)
        if start >= total > self._ready():
            self._seal(total)
        if start >= total:
            return
        _warn_unknown(self.encoder, [whole_text(*each) for each in self.database.execute(_SOME, (max(1, (total - start) // 200), start))], "passages")
        pending = self.folder / "segments" / "pending.f32"
        pending.touch()
        os.truncate(pending, 4 * d * (start - self._ready()))  # what a killed run wrote and did not commit

        def chunks() -> Iterator[tuple[int, int]]:
            first = start
            while first < total:
                last = min(first + CHUNK, total, self._ready() + SEGMENT)
                yield first, last
                first = last

        for first, last in runtime.track(chunks(), f"encoding {total - start} passages", -(-(total - start) // CHUNK)):
            texts = [
                whole_text(*each)
                for each in self.database.execute("SELECT title, text FROM passages WHERE row >= ? AND row < ? ORDER BY row", (first, last))
            ]
            vectors = self._vectors(texts, batch_size)
            with open(pending, "ab") as opened:
                opened.write(vectors.tobytes())
                opened.flush()
                os.fsync(opened.fileno())
            with self.database:
                self._set("pending", last - self._ready())
            if last in (total, self._ready() + SEGMENT):
                self._seal(last)

    def _vectors(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        vectors = encode(self.encoder, texts, batch_size)
        if self.settings["score"] == "cosine":
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
        return vectors

    def _seal(self, end: int) -> None:
        """The pending vectors become a segment."""
        first, pending = self._ready(), self.folder / "segments" / "pending.f32"
        vectors = np.memmap(pending, np.float32, "r", shape=(end - first, self.settings["dimension"]))
        file = self._segment(vectors[at : at + 8192] for at in range(0, len(vectors), 8192))
        with self.database:
            self.database.execute("INSERT INTO segments VALUES (?, ?, ?)", (first, end - first, file))
            self._set("pending", 0)
        del vectors
        pending.unlink()

    def _segment(self, blocks: Iterable[np.ndarray]) -> str:
        """The name of a new FAISS file of these vectors."""
        faiss = optional("faiss", "retrieve")
        d = self.settings["dimension"]
        if self.settings["kind"] == "hnsw":
            segment = faiss.IndexHNSWFlat(d, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
            segment.hnsw.efConstruction = BUILD_BREADTH
        else:
            segment = faiss.IndexFlatIP(d)
        for block in blocks:
            segment.add(np.ascontiguousarray(block))
        file = f"{uuid.uuid4().hex[:12]}.faiss"
        faiss.write_index(segment, str(self.folder / "segments" / file))
        return file

    def _compact(self) -> None:
        """New segments without deleted rows in place of those that are small or have holes; rows are numbered anew, in one transaction."""
        gone = self._deleted()
        kept: list[tuple[int, int, str]] = []  # first, rows, file
        ready, block, joined = 0, list[np.ndarray](), 0

        def write() -> None:
            nonlocal ready, joined
            if joined:
                kept.append((ready, joined, self._segment(block)))
                ready, joined = ready + joined, 0
                block.clear()

        for first, rows, file in self.database.execute("SELECT first, rows, file FROM segments ORDER BY first").fetchall():
            holes = gone[(gone >= first) & (gone < first + rows)] - first
            if not len(holes) and rows >= SEGMENT // 2:
                write()
                kept.append((ready, rows, file))
                ready += rows
                continue
            if joined + rows - len(holes) > SEGMENT:
                write()
            vectors = np.delete(self._mapped(file).reconstruct_n(0, rows), holes, 0)
            block.append(vectors)
            joined += len(vectors)
        write()
        before, waiting = self._ready(), self._state("pending") or 0
        still = waiting - int(((gone >= before) & (gone < before + waiting)).sum())
        with self.database:
            run = self.database.execute
            run("BEGIN")  # Python's own would begin after the CREATE
            if still != waiting:
                self._set("pending", 0)  # pending vectors with holes are few: encoded again
            run("CREATE TABLE fresh (row INTEGER PRIMARY KEY, id TEXT UNIQUE, title TEXT, text TEXT)")
            run("INSERT INTO fresh SELECT row_number() OVER (ORDER BY row) - 1, id, title, text FROM passages WHERE id IS NOT NULL ORDER BY row")
            run("DROP TABLE passages")
            run("ALTER TABLE fresh RENAME TO passages")
            run("DELETE FROM segments")
            self.database.executemany("INSERT INTO segments VALUES (?, ?, ?)", kept)
            self._set("words_rows", None)
        self._open.clear()

    # --- words

    def _build_words(self) -> None:
        """BM25 of all passages by bm25s. The words pass through a file, so that only the scores are in memory, while they are built."""
        bm25s = optional("bm25s", "retrieve")
        split, total, vocabulary = words(self.settings["language"]), self._total(), dict[str, int]()
        if not total:
            with self.database:
                self._set("words_rows", 0)
            return
        place = self.folder / f"words-{uuid.uuid4().hex[:12]}"
        place.mkdir()
        ends = np.zeros(total + 1, np.int64)
        spool = place / "words.i32"
        with open(spool, "wb") as opened:
            for row, title, text in runtime.track(
                self.database.execute("SELECT row, title, text FROM passages ORDER BY row"), "reading words", total
            ):
                found = np.asarray([vocabulary.setdefault(word, len(vocabulary)) for word in split(whole_text(title, text))], np.int32)
                opened.write(found.tobytes())
                ends[row + 1] = ends[row] + len(found)
        vocabulary.setdefault("", len(vocabulary))  # bm25s gives this word to queries that have none
        flat = np.memmap(spool, np.int32, "r") if ends[-1] else np.empty(0, np.int32)
        found_words = _Spooled(flat, ends, vocabulary)
        ranking = bm25s.BM25(k1=K1, b=B)
        ranking.index(found_words, show_progress=False)
        ranking.save(place, show_progress=False)
        del flat, found_words
        spool.unlink()
        with self.database:
            self._set("words", place.name)
            self._set("words_rows", total)
        self._open = {name: each for name, each in self._open.items() if not name.startswith("words-")}

    # --- searching

    def search(self, texts: str | Sequence[str], k: int = 10, mode: Mode = "hybrid") -> Any:
        """The `k` best passages: a list of `Hit` for one text, a list of such lists for several.

        mode: dense by meaning, lexical by words, hybrid both, fused by reciprocal ranks.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        rankings = self._rankings(several, k, mode)
        return self._hits(rankings, k)[0] if isinstance(texts, str) else self._hits(rankings, k)

    def run(self, queries: Dataset, k: int = 100, mode: Mode = "hybrid") -> dict[str, dict[str, float]]:
        """{query id: {passage id: score}} for a table of queries (id, text), as `ranking.measure` takes it."""
        ids, texts = [str(each) for each in queries["id"]], list(queries["text"])
        parts = self._rankings(texts, k, mode)
        return dict(zip(ids, ({hit: score for hit, score, _ in each[:k]} for each in _fused(parts)), strict=True))

    def _rankings(self, texts: list[str], k: int, mode: str) -> dict[str, list[list[tuple[str, float]]]]:
        """For each part of the search and each text (passage id, score), best first."""
        if mode not in ("hybrid", "dense", "lexical"):
            raise BadInput(f"mode {mode!r} is not known: choose hybrid, dense or lexical")
        if not texts or not all(isinstance(each, str) and each.strip() for each in texts):
            raise BadInput("a query is empty: give some words")
        if k < 1:
            raise BadInput(f"k is {k}: give at least 1")
        if mode == "lexical" and not self.settings["lexical"]:
            raise BadInput(f"{self.folder} was built without words: search it with mode dense, or build it again")
        total = self._total()
        ready = {"dense": self._ready(), "lexical": self._state("words_rows") or 0}
        wanted = [name for name in ready if mode in (name, "hybrid") and (name == "dense" or self.settings["lexical"])]
        for name in wanted:
            if ready[name] < total:
                done = ready[name] + (self._state("pending") or 0 if name == "dense" else 0)
                warnings.warn(
                    f"this index is not finished: {name} search sees {ready[name]} of {total} passages"
                    + (f" ({done} are encoded)" if name == "dense" else "")
                    + "; run the command that builds it again, it goes on where it stopped",
                    stacklevel=3,
                )
        if not self._one("SELECT EXISTS (SELECT 1 FROM passages WHERE id IS NOT NULL)"):  # counting a million rows takes longer than the search
            raise BadInput(f"{self.folder} holds no passages: add some first")
        wanted = [name for name in wanted if ready[name]]
        if not wanted:
            raise BadInput(f"{self.folder} is not finished and cannot be searched yet: run the command that builds it again")
        depth = max(k, DEPTH) if len(wanted) > 1 else k
        gone = self._deleted()
        return {name: self._named((self._dense if name == "dense" else self._lexical)(texts, depth, gone)) for name in wanted}

    def _dense(self, texts: list[str], k: int, gone: np.ndarray) -> list[list[tuple[int, float]]]:
        faiss = optional("faiss", "retrieve")
        _warn_unknown(self.encoder, texts, "queries")
        queries = self._vectors(texts)
        scores, found = [], []
        for first, rows, file in self.database.execute("SELECT first, rows, file FROM segments").fetchall():
            segment, holes = self._mapped(file), gone[(gone >= first) & (gone < first + rows)] - first
            settings: dict[str, Any] = {}
            if len(holes):
                stays = np.ones(rows, bool)
                stays[holes] = False
                settings["sel"] = faiss.IDSelectorBitmap(np.packbits(stays, bitorder="little"))
            if self.settings["kind"] == "hnsw":
                settings["efSearch"] = max(SEARCH_BREADTH, 2 * k)
            make = faiss.SearchParametersHNSW if self.settings["kind"] == "hnsw" else faiss.SearchParameters
            score, row = segment.search(queries, min(k, rows), params=make(**settings) if settings else None)
            scores.append(np.where(row < 0, -np.inf, score))
            found.append(row + first)
        score, row = np.concatenate(scores, 1), np.concatenate(found, 1)
        order = np.argsort(-score, 1, kind="stable")[:, :k]
        best = zip(np.take_along_axis(row, order, 1).tolist(), np.take_along_axis(score, order, 1).tolist(), strict=True)
        return [[(r, s) for r, s in zip(rs, ss, strict=True) if s > -np.inf] for rs, ss in best]

    def _lexical(self, texts: list[str], k: int, gone: np.ndarray) -> list[list[tuple[int, float]]]:
        ranking, split = self._words(), words(self.settings["language"])
        rows = ranking.scores["num_docs"]
        weights = None
        if len(gone[gone < rows]):
            weights = np.ones(rows, np.float32)
            weights[gone[gone < rows]] = 0
        found: list[list[tuple[int, float]]] = []
        for text in texts:
            known = [word for word in split(text) if word in ranking.vocab_dict]
            if not known:
                found.append([])
                continue
            row, score = ranking.retrieve([known], k=min(k, rows), show_progress=False, weight_mask=weights)
            found.append([(int(r), float(s)) for r, s in zip(row[0], score[0], strict=True) if s > 0])
        return found

    def _named(self, rankings: list[list[tuple[int, float]]]) -> list[list[tuple[str, float]]]:
        ids = self._lookup("row", "row, id", {row for each in rankings for row, _ in each})
        return [[(ids[row][0], score) for row, score in each] for each in rankings]

    def _hits(self, parts: dict[str, list[list[tuple[str, float]]]], k: int) -> list[list[Hit]]:
        fused = [each[:k] for each in _fused(parts)]
        content = self._lookup("id", "id, title, text", {hit for each in fused for hit, _, _ in each})
        return [[Hit(hit, score, content[hit][0], content[hit][1], ranks) for hit, score, ranks in each] for each in fused]

    def _lookup(self, column: str, columns: str, wanted: set[Any]) -> dict[Any, tuple[Any, ...]]:
        found, keys = {}, list(wanted)
        for at in range(0, len(keys), 500):
            some = keys[at : at + 500]
            for key, *rest in self.database.execute(f"SELECT {columns} FROM passages WHERE {column} IN ({', '.join('?' * len(some))})", some):
                found[key] = tuple(rest)
        return found

    # --- the folder

    def _mapped(self, file: str) -> Any:
        if file not in self._open:
            faiss = optional("faiss", "retrieve")
            try:
                self._open[file] = faiss.read_index(str(self.folder / "segments" / file), getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP))
            except RuntimeError as failed:
                raise BadInput(
                    f"{self.folder / 'segments' / file} is missing or damaged ({str(failed)[-80:].strip()}): build the index again"
                ) from None
        return self._open[file]

    def _words(self) -> Any:
        name = self._state("words")
        if name not in self._open:
            try:
                self._open[name] = optional("bm25s", "retrieve").BM25.load(self.folder / name, mmap=True, show_progress=False)
            except (OSError, ValueError) as failed:
                raise BadInput(f"{self.folder / name} is missing or damaged ({failed}): build the index again") from None
        return self._open[name]

    def _one(self, query: str, *values: Any) -> Any:
        return self.database.execute(query, values).fetchone()[0]

    def _total(self) -> int:
        return self._one("SELECT coalesce(max(row), -1) + 1 FROM passages")

    def _ready(self) -> int:
        return self._one("SELECT coalesce(max(first + rows), 0) FROM segments")

    def _deleted(self) -> np.ndarray:
        return np.asarray([row for (row,) in self.database.execute("SELECT row FROM passages WHERE id IS NULL ORDER BY row")], np.int64)

    def _state(self, name: str) -> Any:
        found = self.database.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return found[0] if found else None

    def _set(self, name: str, value: Any) -> None:
        self.database.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, value))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time: a lock that ends with its process."""
        with closing(sqlite3.connect(self.folder / "lock", timeout=0, isolation_level=None)) as lock:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                raise BadInput(f"another process is writing to {self.folder}: wait until it has finished") from None
            yield


_DELETE = "UPDATE passages SET id = NULL, title = '', text = '' WHERE"
_SOME = "SELECT title, text FROM passages WHERE row % ? = 0 AND row >= ? AND id IS NOT NULL LIMIT 200"


@dataclass
class _Spooled:
    """Word numbers of each passage in a file, as bm25s walks over them (several times)."""

    flat: np.ndarray
    ends: np.ndarray
    vocab: dict[str, int]

    @property
    def ids(self) -> _Spooled:
        return self

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in zip(self.ends[:-1], self.ends[1:], strict=True):
            yield self.flat[start:end].tolist()


def _fused(parts: dict[str, list[list[tuple[str, float]]]]) -> list[list[tuple[str, float, dict[str, int]]]]:
    """(id, score, rank in each part) for each query, best first; by reciprocal ranks when there are several parts."""
    from wellread import ranking

    result = []
    for each in zip(*parts.values(), strict=True):
        places: dict[str, dict[str, int]] = {}
        for name, ranked in zip(parts, each, strict=True):
            for place, hit in enumerate(ranking.ranked(dict(ranked)), 1):
                places.setdefault(hit, {})[name] = place
        scores = dict(each[0]) if len(each) == 1 else ranking.fuse([{"": dict(ranked)} for ranked in each]).get("", {})
        result.append([(hit, scores[hit], places[hit]) for hit in ranking.ranked(scores)])
    return result


def is_rows(corpus: Any) -> bool:
    """An iterable of records, which is taken as it comes."""
    if isinstance(corpus, list | tuple):
        return bool(corpus) and all(isinstance(each, Mapping) for each in corpus)
    return isinstance(corpus, Iterable) and not isinstance(corpus, str | Path | Dataset | Mapping)


def _settings(place: Path) -> dict[str, Any]:
    file = place / "index.json"
    if not file.is_file():
        raise BadInput(f"{place} holds no index: make one with wellread index --encoder NETWORK --corpus DATA --out {place}")
    try:
        settings = json.loads(file.read_text("utf-8"))
        version = settings["format"]
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{file} is damaged: build the index again") from None
    if version != 1:
        raise BadInput(f"{place} was written by a newer wellread (format {version}): update with pip install -U wellread")
    return settings


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(text, "utf-8")
    os.replace(partial, file)


def whole_text(title: str, text: str) -> str:
    """What is encoded and whose words count."""
    return f"{title}\n{text}".strip()


# --- encoding


def encoder_of(given: Network | str | Path) -> tuple[Network, dict[str, Any]]:
    """The network, and what of it is noted in the index: the name under which it can be loaded again, and its fingerprint."""
    from wellread.inputs import TextInput
    from wellread.network import as_network

    network = as_network(given)
    if network.output != "embedding" or not isinstance(network.input, TextInput):
        what = network.output.replace("_", " ") if isinstance(network.input, TextInput) else "no embeddings of text"
        raise BadInput(
            f"an encoder of texts is needed and this network gives {what}: use minilm-l6, hf/NAME of a sentence encoder, or one of your own"
        )
    network.check_finite()
    name: str | None = None
    if isinstance(given, str | Path):
        name = str(Path(given).resolve()) if Path(given).is_dir() else str(given)
    elif len(network.lineage) == 1 and network.lineage[0].get("method") == "load":
        name = network.lineage[0]["settings"]["name"]
    return network, {"name": name, "fingerprint": network.fingerprint}


def encode(network: Network, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """float32 [N, d]. Texts of like length share a batch, so that little is padding; the order is kept. Raises `BadInput` for vectors that are not finite."""
    from wellread.evaluate import outputs

    source: Any = network.input
    order = np.argsort([-len(text) for text in texts], kind="stable")
    parts = (order[start : start + batch_size] for start in range(0, len(texts), batch_size))
    found = outputs(network, (source([texts[row] for row in rows]) for rows in parts))  # no table: for the one text of a query it would take half of the time
    if not np.isfinite(found).all():
        wrong = texts[int(order[np.flatnonzero(~np.isfinite(found).all(1))[0]])]
        raise BadInput(f"the encoder gives no finite vector for the text {wrong[:60]!r}: its weights are damaged")
    vectors = np.empty_like(found)
    vectors[order] = found
    return vectors


def _warn_unknown(network: Network, texts: Sequence[str], what: str) -> None:
    """A tokenizer that has never seen a script turns its words into one and the same unknown token."""
    from wellread.inputs import TextInput

    assert isinstance(network.input, TextInput)
    tokenizer = network.input.tokenizer
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not texts:
        return
    found = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=network.input.max_length)["input_ids"]
    share = sum(each.count(unknown) for each in found) / max(sum(map(len, found)), 1)
    if share > 0.3:
        warnings.warn(
            f"the encoder's tokenizer does not know {share:.0%} of the tokens of the {what}: they are in a script that it has not seen, and search by "
            "meaning will not work on them; take a multilingual encoder, or search by words (--mode lexical)",
            stacklevel=3,
        )

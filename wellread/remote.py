"""Search past one machine: encoding as a Ray Data map, and passages in a Qdrant server behind the face of `Index`."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wellread import documents, runtime
from wellread.errors import BadInput, optional
from wellread.index import CHUNK, Hit, encode, encoder_of, is_rows, whole_text

if TYPE_CHECKING:
    from wellread.network import Network


def encode_with_ray(encoder: str | Path, corpus: Any, folder: str | Path, *, workers: int = 1, gpus: float = 0, batch_size: int = 64) -> Any:
    """A Ray dataset of id, title, text and vector: a map over the corpus, with the encoder loaded once in each of `workers` processes.

    encoder: a name or a folder that every machine can read. folder: new, and one that every machine can read: the corpus is laid there as parquet.
    The rows (`.iter_rows()`) go into `QdrantIndex.add` as they come, or the dataset to disk with `.write_parquet(...)`.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from wellread.folders import new_folder

    data = optional("ray.data", "scale")
    encoder_of(encoder)  # refused here, not in the workers

    class Encode:
        def __init__(self) -> None:
            self.network = encoder_of(encoder)[0]

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            texts = [whole_text(title, text) for title, text in zip(batch["title"], batch["text"], strict=True)]
            return {**batch, "vector": encode(self.network, texts, batch_size)}

    with new_folder(folder) as place:
        passages = (passage for passage in documents.rows(documents.corpus(corpus)) if passage.text or passage.title)
        for number, block in enumerate(iter(lambda: list(islice(passages, 16 * CHUNK)), [])):
            parquet.write_table(pa.Table.from_pylist([passage._asdict() for passage in block]), place / f"{number:06}.parquet", row_group_size=CHUNK)
    return data.read_parquet(str(Path(folder).resolve())).map_batches(
        Encode, compute=data.ActorPoolStrategy(size=workers), num_gpus=gpus, batch_size=CHUNK
    )


class QdrantIndex:
    """The same search over a Qdrant server, for more passages than one machine holds. Dense only.

    location: a server's address, a folder (Qdrant's local mode), or ":memory:". The collection's name carries the encoder's fingerprint.
    """

    def __init__(
        self, encoder: Network | str | Path, location: str = ":memory:", *, name: str = "passages", score: Literal["cosine", "dot"] = "cosine"
    ) -> None:
        qdrant = optional("qdrant_client", "scale")
        self.network, noted = encoder_of(encoder)
        self.models = qdrant.models
        if location == ":memory:" or "://" in location:
            self.client = qdrant.QdrantClient(location)
        else:
            self.client = qdrant.QdrantClient(path=location)
        self.collection = f"{name}-{noted['fingerprint'][:16]}"
        others = [each.name for each in self.client.get_collections().collections if re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{16}}", each.name)]
        if others and self.collection not in others:
            raise BadInput(
                f"{location} holds {name!r} of another encoder ({others[0]}), whose vectors cannot be compared: give that one, or another name"
            )
        if not others:
            size = int(encode(self.network, ["a sentence"], 1).shape[1])
            distance = self.models.Distance.COSINE if score == "cosine" else self.models.Distance.DOT
            self.client.create_collection(self.collection, vectors_config=self.models.VectorParams(size=size, distance=distance, on_disk=True))

    def __len__(self) -> int:
        return self.client.count(self.collection, exact=True).count

    def add(self, corpus: Any, *, batch_size: int = 64) -> None:
        """Add passages, in place of those with the same id. Rows that carry a "vector" (of `encode_with_ray`) are not encoded again."""
        given: Iterable[Mapping[str, Any]] = corpus if is_rows(corpus) else (each._asdict() for each in documents.rows(documents.corpus(corpus)))
        block: list[Mapping[str, Any]] = []
        for row in runtime.track(given, "encoding passages"):
            if row.get("text") or row.get("title"):
                block.append(row)
            if len(block) == CHUNK:
                self._upsert(block, batch_size)
                block = []
        if block:
            self._upsert(block, batch_size)

    def _upsert(self, block: list[Mapping[str, Any]], batch_size: int) -> None:
        if all("vector" in row for row in block):
            vectors = np.stack([np.asarray(row["vector"], np.float32) for row in block])
        else:
            vectors = encode(self.network, [whole_text(row.get("title") or "", row.get("text") or "") for row in block], batch_size)
        payloads = [{"id": str(row["id"]), "title": row.get("title") or "", "text": row.get("text") or ""} for row in block]
        points = [self.models.PointStruct(id=_point(p["id"]), vector=v.tolist(), payload=p) for p, v in zip(payloads, vectors, strict=True)]
        self.client.upsert(self.collection, points)

    def delete(self, ids: Iterable[str]) -> None:
        self.client.delete(self.collection, [_point(each) for each in ids])

    def search(self, texts: str | Sequence[str], k: int = 10) -> Any:
        """The `k` best passages, as `Index.search` gives them."""
        several = [texts] if isinstance(texts, str) else list(texts)
        if not several or not all(text.strip() for text in several):
            raise BadInput("a query is empty: give some words")
        requests = [self.models.QueryRequest(query=v.tolist(), limit=k, with_payload=True) for v in encode(self.network, several)]
        found = [
            [Hit(p.payload["id"], p.score, p.payload["title"], p.payload["text"], {"dense": place}) for place, p in enumerate(answer.points, 1)]
            for answer in self.client.query_batch_points(self.collection, requests)
        ]
        return found[0] if isinstance(texts, str) else found


def _point(name: str) -> str:
    """Qdrant's ids are numbers or UUIDs."""
    return str(uuid.UUID(bytes=hashlib.sha256(name.encode()).digest()[:16]))

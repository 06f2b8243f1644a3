"""Documents to passages: folders of text, Markdown, HTML and PDF, and files with one document a row, as a table that never lies in memory.

A corpus is a Hugging Face `Dataset` with the columns id (unique), title and text, memory-mapped from the cache; where there are any, also links (the
documents that a passage names in a link, as a list) and group (its language or source).
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
from datasets import Dataset, DatasetDict

from wellread.errors import BadInput, optional
from wellread.runtime import cache_folder, track

WORDS = 160  # of a passage: below the 256 tokens at which most sentence encoders cut
LONGEST = 100_000  # characters of one document in a row; longer ones are cut into passages


class Passage(NamedTuple):
    id: str
    title: str
    text: str


class Section(NamedTuple):
    """A stretch of a document under one heading, as paragraphs. links: (words that are linked, target) as written."""

    heading: str
    paragraphs: list[str]
    links: Sequence[tuple[str, str]] = ()


class Row(NamedTuple):
    """What is kept of a passage."""

    passage: Passage
    links: list[str]
    group: str | None


@dataclass
class Notes:
    """What was left out or guessed while reading, said once at the end."""

    empty: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    guessed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def say(self, where: str) -> None:
        for names, what in (
            (self.unreadable, "could not be read and were left out"),
            (self.guessed, "are not UTF-8; their encoding was guessed"),
            (self.empty, "hold no text and were skipped"),
            (self.cut, f"are longer than {LONGEST:,} characters and were cut into passages"),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                warnings.warn(f"{where}: {len(names)} documents {what}: {', '.join(names[:5])}{more}", stacklevel=2)
        if self.others:
            kinds = ", ".join(f"{count} {ending}" for ending, count in self.others.most_common(5))
            warnings.warn(f"{where}: files of other kinds were left out ({kinds})", stacklevel=2)


# --- corpora by name


def corpus(given: Any, *, words: int = WORDS) -> Dataset:
    """The corpus that `given` stands for.

    "folder:notes" (text, Markdown, HTML and PDF files, cut into passages), "jsonl:corpus.jsonl" (_id, title, text), "csv:FILE", "parquet:FILE"
    (a text column, id and title where there are any), any other name of `load_data`, a Dataset with a text column, or a list of texts.
    words: of a passage, at most, when files are cut.
    Raises `BadInput` for what is not there, for an id that appears twice, and when there is no text at all.
    """
    if isinstance(given, str | Path):
        name = str(given)
        kind, _, path = name.partition(":")
        if kind == "folder" or (not Path(kind).suffix and Path(name).is_dir()):
            return from_folder(path if kind == "folder" else name, words=words)
        from wellread.data import load_data

        given = load_data(name)
    if isinstance(given, DatasetDict):
        if "corpus" not in given:
            raise BadInput(
                f"these data have the splits {', '.join(given)}: name the one that holds the documents, for instance data:{next(iter(given))}"
            )
        given = given["corpus"]
    if isinstance(given, list | tuple) and given and all(isinstance(each, str) for each in given):
        given = Dataset.from_dict({"text": list(given)})
    if not isinstance(given, Dataset):
        raise BadInput(
            f"a corpus is needed, not a {type(given).__name__}: give folder:PATH, jsonl:FILE, a Dataset with a text column, or a list of texts"
        )
    if "text" not in given.column_names:
        raise BadInput(f"the corpus has no column 'text' (it has {', '.join(given.column_names)}): name it, as in csv:FILE?text=COLUMN")
    return given


def rows(data: Dataset | Iterable[Mapping[str, Any]]) -> Iterator[Passage]:
    """The documents of a table one after the other, read from the disk as they come. Without ids the row number is the id.

    Rows without text come as they are: who counts them knows what to say.
    """
    table: Iterable[Mapping[str, Any]] = data
    if isinstance(data, Dataset):
        columns = [name for name in ("id", "title", "text") if name in data.column_names]
        plain = data.with_format(None).select_columns(columns)
        table = (dict(zip(batch, each, strict=True)) for batch in plain.iter(1000) for each in zip(*batch.values(), strict=True))
    for number, row in enumerate(table):
        name = row.get("id")
        yield Passage(str(number if name is None else name), _clean(row.get("title")), _clean(row.get("text")))


def _clean(text: Any) -> str:
    return "" if text is None else str(text).replace("\0", "").strip()


def from_folder(path: str | Path, *, words: int = WORDS) -> Dataset:
    """Passages of all documents below a folder: id "sub/notes.md#3", title "Notes > Heading". Hidden files are left out.

    links: the other documents of the folder that links in the passage lead to, as "sub/other.md".
    Read once and kept in the cache until a file changes. What could not be read is counted and named in a warning.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise BadInput(f"there is no folder {str(path)!r}: give the folder that holds your documents")
    if words < 8:
        raise BadInput(f"words is {words}: a passage needs at least 8")
    found, others = documents(root)
    if not found:
        raise BadInput(f"the folder {str(path)!r} holds no documents ({', '.join(READERS)})")
    key = [str(root.resolve()), words, [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in found]]
    names = [file.relative_to(root).as_posix() for file in found]
    known = {name.rpartition(".")[0]: name for name in names} | {name: name for name in names}  # documentation is often linked by other endings

    def passages(notes: Notes) -> Iterator[Row]:
        notes.others = others
        for file in track(found, f"reading {root.name}"):
            name = file.relative_to(root).as_posix()
            try:
                for passage, targets in of_file(file, name, words, notes):
                    leads_to = (linked(name, target, known) for target in targets)
                    yield Row(passage, list(dict.fromkeys(each for each in leads_to if each)), None)
            except BadInput:
                raise  # a missing package, not a bad file
            except Exception as failed:  # parsers of damaged files raise anything
                notes.unreadable.append(f"{name} ({type(failed).__name__})")

    return _kept(passages, key, f"folder:{path}")


def from_jsonl(path: str | Path, *, words: int = WORDS) -> Dataset:
    """One document a line: _id or id, title, text (the form of BEIR), and where there are any links and group.

    Raises `BadInput` naming the line that is not such an object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadInput(f"there is no .jsonl file at {str(path)!r}")
    key = [str(file.resolve()), words, file.stat().st_size, file.stat().st_mtime_ns]

    def passages(notes: Notes) -> Iterator[Row]:
        with open(file, "rb") as opened:
            for number, line in enumerate(track(opened, f"reading {file.name}"), 1):
                if not line.strip():
                    continue
                text, guessed = decoded(line)
                try:
                    row = json.loads(text)
                    body = row["text"]
                except (ValueError, KeyError, TypeError):
                    raise BadInput(
                        f"{file}, line {number}: not a JSON object with a text: write {{'_id': ..., 'title': ..., 'text': ...}} on each line"
                    ) from None
                name = next((str(row[key]) for key in ("_id", "id") if row.get(key) is not None), f"{file.name}#{number}")
                if guessed:
                    notes.guessed.append(name)
                document = Passage(name, _clean(row.get("title")), _clean(body))
                links, group = row.get("links") or [], row.get("group")
                links = links.split(";") if isinstance(links, str) else links
                more = [str(each).strip() for each in links], None if group is None else str(group)
                if not document.text and not document.title:
                    notes.empty.append(name)
                elif len(document.text) > LONGEST:
                    notes.cut.append(name)
                    for part, piece in enumerate(pieces([document.text], words), 1):
                        yield Row(Passage(f"{name}#{part}", document.title, piece), *more)
                else:
                    yield Row(document, *more)

    return _kept(passages, key, f"jsonl:{path}")


def _kept(passages: Callable[[Notes], Iterator[Row]], key: list[Any], name: str) -> Dataset:
    """The passages as a memory-mapped table in the cache; made when it is not there yet."""
    import pyarrow as pa

    digest = hashlib.sha256(json.dumps([3, key]).encode()).hexdigest()[:32]
    file = cache_folder() / "corpora" / f"{digest}.arrow"
    said = file.with_suffix(".json")
    if not (file.is_file() and said.is_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
        notes, hashes = Notes(), array("Q")
        schema = pa.schema([*((column, pa.large_string()) for column in Passage._fields), ("links", pa.list_(pa.string())), ("group", pa.large_string())])
        used: set[str] = set()
        partial = file.with_name(f"{digest}.{os.getpid()}.partial")
        try:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                block: list[Row] = []

                def write() -> None:
                    columns = zip(*((*row.passage, row.links, row.group) for row in block), strict=True)
                    writer.write_batch(pa.record_batch([pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)], schema=schema))
                    block.clear()

                for row in passages(notes):
                    hashes.append(int.from_bytes(hashlib.blake2b(row.passage.id.encode("utf-8", "replace"), digest_size=8).digest(), "little"))
                    used.update(name for name, there in (("links", row.links), ("group", row.group)) if there)
                    block.append(row)
                    if len(block) == 1000:
                        write()
                if block:
                    write()
            if not hashes:
                notes.say(name)
                raise BadInput(f"{name} holds no text: nothing could be read from it")
            _refuse_twins(np.frombuffer(hashes, np.uint64), partial, name)
            said.write_text(json.dumps({"notes": vars(notes), "empty": sorted({"links", "group"} - used)}))
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    record = json.loads(said.read_text())
    Notes(**{**record["notes"], "others": Counter(record["notes"]["others"])}).say(name)
    from wellread.data import rename

    return rename(Dataset.from_file(str(file)).remove_columns(record["empty"]), name)


def _refuse_twins(hashes: np.ndarray, file: Path, name: str) -> None:
    """8 bytes a row instead of all ids in memory; only when two hashes meet are the ids themselves compared."""
    ordered = np.sort(hashes)
    meeting = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not meeting:
        return
    chosen = np.flatnonzero(np.isin(hashes, list(meeting)))
    twice = [each for each, count in Counter(Dataset.from_file(str(file)).select(chosen)["id"]).items() if count > 1]
    if twice:
        raise BadInput(f"{name} has the id {twice[0]!r} more than once ({len(twice)} such ids): make the ids unique")


# --- files


def documents(root: Path) -> tuple[list[Path], Counter[str]]:
    """The files below `root` that can be read, sorted, and how many there are of other kinds."""
    found, others = [], Counter[str]()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for each in sorted(files):
            if each.startswith("."):
                continue
            file = Path(folder) / each
            if file.suffix.lower() in READERS:
                found.append(file)
            else:
                others[file.suffix.lower() or "without ending"] += 1
    return found, others


def linked(name: str, target: str, known: Mapping[str, str]) -> str | None:
    """The document that a link in document `name` leads to, or None: elsewhere, to itself, to what is not among the `known` (path -> document)."""
    try:
        parts = urlsplit(target)
    except ValueError:
        return None
    path = unquote(parts.path)
    if parts.scheme or parts.netloc or not path:
        return None
    place = posixpath.normpath(path.lstrip("/") if path.startswith("/") else posixpath.join(posixpath.dirname(name), path))
    found = next((known[each] for each in (place, posixpath.splitext(place)[0], posixpath.join(place, "index")) if each in known), None)
    return None if found == name else found


def of_file(file: Path, name: str, words: int, notes: Notes) -> Iterator[tuple[Passage, list[str]]]:
    """The passages of one document, numbered from 1, each with the targets of the links whose words it holds."""
    title, sections = READERS[file.suffix.lower()](file, name, notes)
    title, number = title or file.stem, 0
    for section in sections:
        heading = section.heading if section.heading != title else ""
        for text in pieces(section.paragraphs, words):
            number += 1
            yield Passage(f"{name}#{number}", f"{title} > {heading}" if heading else title, text), [target for said, target in section.links if said in text]
    if not number:
        notes.empty.append(name)


def decoded(content: bytes) -> tuple[str, bool]:
    """The text, and whether its encoding had to be guessed: it is neither UTF-8 nor marked as UTF-16."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", "replace"), False
    try:
        return content.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        few = sum(byte > 127 for byte in content) < 32  # too few for a guess to be better than the commonest case
        found = optional("bs4", "retrieve").UnicodeDammit(content, ["windows-1252"] if few else [], smart_quotes_to=None).unicode_markup
        if found is None:
            raise ValueError("no encoding fits") from None
        return found, True


def _read(file: Path, name: str, notes: Notes) -> str:
    content = file.read_bytes()
    if b"\0" in content[:4096] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("binary")
    text, guessed = decoded(content)
    if guessed:
        notes.guessed.append(name)
    return text.replace("\0", "")


Read = tuple[str, Iterable[Section]]  # title ("" when the file has none) and sections


def _text(file: Path, name: str, notes: Notes) -> Read:
    return "", [Section("", re.split(r"\n\s*\n", _read(file, name, notes).replace("\r\n", "\n")))]


def _markdown(file: Path, name: str, notes: Notes) -> Read:
    text = _read(file, name, notes).replace("\r\n", "\n")
    front = re.match(r"---\n(.*?)\n(?:---|\.\.\.)\s*(?:\n|$)", text, re.DOTALL)  # YAML, which Markdown would take for a heading
    title = ""
    if front:
        text = text[front.end() :]
        named = re.search(r"^title:\s*(.+)$", front[1], re.MULTILINE)
        title = named[1].strip().strip("\"'") if named else ""
    tokens = optional("markdown_it", "retrieve").MarkdownIt("commonmark").enable("table").parse(text)
    outline = _Outline(title)
    level = 0
    row: list[str] | None = None
    for token in tokens:
        if token.type == "heading_open":
            level = int(token.tag[1])
        elif token.type == "heading_close":
            level = 0
        elif token.type == "tr_open":
            row = []
        elif token.type == "tr_close" and row is not None:
            outline.paragraph(" | ".join(row))
            row = None
        elif token.type in ("fence", "code_block"):
            outline.paragraph(token.content)
        elif token.type == "inline":
            parts, links = list[str](), list[tuple[int, str]]()
            for each in token.children or []:
                if each.type == "link_open":
                    links.append((len(parts), str(each.attrGet("href") or "")))
                parts.append(" " if each.type.endswith("break") else "" if each.type == "html_inline" else each.content)
                if each.type == "link_close":
                    start, target = links.pop()
                    outline.link("".join(parts[start:]), target)
            content = "".join(parts)
            if level:
                outline.heading(level, content)
            elif row is not None:
                row.append(content)
            else:
                outline.paragraph(content)
        elif token.type == "html_block":
            outline.paragraph(re.sub(r"<!--.*?-->|<[^>]*>", " ", token.content, flags=re.DOTALL))
    return outline.title, outline.sections


BLOCKS = [
    "address", "article", "aside", "blockquote", "br", "caption", "dd", "details", "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1",
    "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "p", "pre", "section", "summary", "table", "tr", "ul",
]  # fmt: skip


def _html(file: Path, name: str, notes: Notes) -> Read:
    bs4 = optional("bs4", "retrieve")
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        found = bs4.UnicodeDammit(content, is_html=True)  # reads <meta charset>, which is no guess
        text = found.unicode_markup or ""
        if not found.declared_html_encoding and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
            notes.guessed.append(name)
    soup = bs4.BeautifulSoup(text.replace("\0", ""), "html.parser")
    named = " ".join(soup.title.get_text(" ").split()) if soup.title else ""
    for each in [*soup(["script", "style", "template", "noscript", "head", "title", "nav", "svg"]), *soup(role=["navigation", "search"])]:
        each.decompose()
    for each in soup("a", string=["¶", "#"]):  # how documentation tools link a heading to itself
        each.decompose()
    main = soup.find("main") or soup.find(role="main")
    soup = main if main is not None and main.get_text(strip=True) else soup
    first = soup.find("h1")
    heading = " ".join(first.get_text(" ").split()) if first else ""
    named = heading if heading and named.startswith(heading) else named  # the rest is the name of the site
    for cell in soup(["td", "th"]):
        cell.append(" ")
    targets = list[tuple[str, str]]()
    for each in soup("a", href=True):
        each.insert_before(f"\1{len(targets)}\1")  # where it stood, for the section that it belongs to
        targets.append((each.get_text(), str(each["href"])))
    for each in soup(BLOCKS):
        mark = f"\0{each.name[1]}" if re.fullmatch(r"h[1-6]", each.name) else ""
        if mark:
            each.string = " ".join(each.get_text(" ").split())  # the mark stands before one unbroken line
        each.insert_before("\n\n" + mark)
        each.insert_after("\n\n")
    outline = _Outline(named)
    for paragraph in re.split(r"\n\s*\n", soup.get_text()):
        links = [targets[int(number)] for number in re.findall("\1(\\d+)\1", paragraph)]
        paragraph = re.sub("\1\\d+\1", "", paragraph).strip()
        if paragraph.startswith("\0"):
            outline.heading(int(paragraph[1]), paragraph[2:])
        else:
            outline.paragraph(paragraph)
        for said, target in links:
            outline.link(said, target)
    return outline.title, outline.sections


def _pdf(file: Path, name: str, notes: Notes) -> Read:
    import logging

    pypdf = optional("pypdf", "retrieve")
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it reports every oddity of a file that it then reads
    reader = pypdf.PdfReader(file)
    if reader.is_encrypted and not reader.decrypt(""):
        raise PermissionError("it needs a password")
    title = str((reader.metadata and reader.metadata.title) or "").strip()

    def pages() -> Iterator[Section]:
        for number, page in enumerate(reader.pages, 1):
            yield Section(f"page {number}", re.split(r"\n\s*\n", re.sub(r"(?<=\w)-\n(?=[a-z])", "", page.extract_text())))

    return title, pages()


READERS: dict[str, Callable[[Path, str, Notes], Read]] = {
    **dict.fromkeys((".txt", ".text", ".rst"), _text),
    **dict.fromkeys((".md", ".markdown"), _markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _html),
    ".pdf": _pdf,
}


class _Outline:
    """Sections under the path of their headings. The first heading of the highest kind is the title when there is no other."""

    def __init__(self, title: str) -> None:
        self.title, self.sections = title, [Section("", [], [])]
        self.above: list[tuple[int, str]] = []

    def heading(self, level: int, text: str) -> None:
        text = " ".join(text.split())
        if not text:
            return
        if level == 1 and not self.title:
            self.title = text
        self.above = [(l, t) for l, t in self.above if l < level] + [(level, text)]  # noqa: E741
        self.sections.append(Section(" > ".join(t for _, t in self.above if t != self.title), [], []))

    def link(self, said: str, target: str) -> None:
        self.sections[-1].links.append((" ".join(said.split()), target))  # type: ignore[attr-defined]

    def paragraph(self, text: str) -> None:
        self.sections[-1].paragraphs.append(text)


# --- passages

# what counts as a word: a letter of a script without spaces, or up to 30 characters of anything else, so that no "word" is without end
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]{1,30}")
SENTENCE = re.compile(r"[^.!?…。！？]*(?:[.!?…]+[\"'”’)\]]*(?=\s|$)\s*|[。！？]+|[.!?…]+|$)")


def pieces(paragraphs: Iterable[str], words: int) -> Iterator[str]:
    """Paragraphs joined and cut into texts of at most `words` words, between paragraphs where possible, else between sentences, else words."""
    kept: list[str] = []
    size = 0
    for paragraph in paragraphs:
        paragraph = " ".join(paragraph.split())
        for text, count in _within(paragraph, words):
            if kept and size + count > words:
                yield "\n".join(kept)
                kept, size = [], 0
            kept.append(text)
            size += count
    if kept:
        yield "\n".join(kept)


def _within(paragraph: str, words: int) -> Iterator[tuple[str, int]]:
    """The paragraph, or parts of it that have at most `words` words, with their number of words."""
    count = sum(1 for _ in WORD.finditer(paragraph))
    if not count:
        return
    if count <= words:
        yield paragraph, count
        return
    start = end = size = 0
    for found in SENTENCE.finditer(paragraph):
        spans = [(found.start() + each.start(), found.start() + each.end()) for each in WORD.finditer(found[0])]
        if size and size + len(spans) > words:
            yield paragraph[start:end].strip(), size
            start, size = found.start(), 0
        done = 0
        while len(spans) - done > words:
            yield paragraph[start : spans[done + words - 1][1]].strip(), words
            done += words
            start = spans[done][0]
        size, end = size + len(spans) - done, found.end()
    if size:
        yield paragraph[start:end].strip(), size

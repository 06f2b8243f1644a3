"""The catalogue: which methods there are, what their cards say, what was measured. Imports nothing heavy, so that a list is there at once.

A method is `wellread/<chapter>/<method>.py` with its card `<method>.md` beside it: YAML front matter, then text. Nothing is registered.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from wellread.errors import BadInput


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the C parser is ten times as fast; not every platform has it
    """YAML in which only true and false are truth values: in a claim, `on` is a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class Card:
    name: str  # "model-soup", as the command line calls it
    chapter: str  # "merge"
    title: str  # of the paper
    paper: dict[str, Any]  # authors, year, arxiv or doi or url, perhaps code
    wish: str
    brings: str
    gets: str
    claims: list[dict[str, Any]]  # on, metric, baseline, method, source
    body: str  # Markdown
    draft: bool
    path: Path  # of the card

    @property
    def module(self) -> str:
        return f"wellread.{self.chapter}.{self.path.stem}"

    @property
    def code(self) -> Path:
        return self.path.with_suffix(".py")


def chapters() -> dict[str, str]:
    """Chapter names with their wish, the first line of the chapter's docstring."""
    found = {}
    for root in _roots():
        for start in sorted(root.glob("*/__init__.py")):
            if any(_cards(start.parent)):
                found[start.parent.name] = (ast.get_docstring(ast.parse(start.read_text("utf-8"))) or "").partition("\n")[0]
    return found


def methods(include_drafts: bool = False) -> list[Card]:
    """All cards, by chapter and name."""
    cards = [read_card(path) for root in _roots() for start in root.glob("*/__init__.py") for path in _cards(start.parent)]
    return sorted((card for card in cards if include_drafts or not card.draft), key=lambda card: (card.chapter, card.name))


def card(name: str) -> Card:
    """The card of method `name` (hyphens or underscores), drafts included. Raises `BadInput` with the nearest names."""
    stem = name.replace("-", "_")
    for root in _roots():
        for path in root.glob(f"*/{stem}.md") if stem.isidentifier() else ():
            if path.with_suffix(".py").exists() and (path.parent / "__init__.py").exists():
                return read_card(path)
    near = get_close_matches(name.lower().replace("_", "-"), [known.name for known in methods()], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "wellread list shows the methods"
    raise BadInput(f"there is no method {name!r}: {hint}")


def function(name: str) -> Callable[..., Any]:
    """The method itself. This imports it, and with it torch."""
    entry = card(name)
    return getattr(importlib.import_module(entry.module), entry.path.stem)


def signature(name: str) -> str:
    """The source of the method's signature and its docstring, one parameter a line, read without importing it."""
    entry = card(name)
    for node in ast.parse(entry.code.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry.path.stem:
            lines = _parameter_lines(node.args)
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            text = f"{node.name}(\n" + "".join(f"    {line},\n" for line in lines) + f"){returns}"
            docstring = ast.get_docstring(node)
            return f"{text}\n\n{docstring}" if docstring else text
    raise BadInput(f"{entry.code.name} has no function {entry.path.stem!r}: the method must be named like its file")


def measurements(name: str) -> dict[str, Any] | None:
    """What the bench of method `name` wrote, or None when it was never run."""
    entry = card(name)
    root = entry.path.parent.parent
    for folder in (root / "bench_results", root.parent / "bench" / "results"):  # in a wheel; in the repository
        path = folder / f"{entry.path.stem}.json"
        if path.exists():
            return json.loads(path.read_text("utf-8"))
    return None


def code_sha256(name: str) -> str:
    """SHA-256 of the method's file."""
    return hashlib.sha256(card(name).code.read_bytes()).hexdigest()


def stale(name: str) -> bool:
    """Whether the method's file is no longer the one that was measured; False when nothing was measured."""
    measured = measurements(name)
    return measured is not None and measured.get("code_sha256") != code_sha256(name)


def shown(value: float | None) -> str:
    """A measured number in four figures; "nothing" for one that did not come out."""
    return "nothing" if value is None else f"{value:.4g}"


def find(cards: list[Card], words: tuple[str, ...] | list[str]) -> list[Card]:
    """The cards in which every word occurs, in any case: in name, chapter, title, authors, wish, brings or gets."""

    def text(entry: Card) -> str:
        parts = (entry.name, entry.chapter, entry.title, str(entry.paper.get("authors", "")), entry.wish, entry.brings, entry.gets)
        return " ".join(parts).lower()

    return [entry for entry in cards if all(word.lower() in text(entry) for word in words)]


def check_card(entry: Card) -> list[str]:
    """What a finished card lacks, one sentence each; an empty list when nothing."""
    problems = [f"{key} is missing or empty" for key in ("title", "wish", "brings", "gets", "body") if not getattr(entry, key).strip()]
    paper = entry.paper
    if not paper.get("authors"):
        problems.append("paper has no authors")
    if not isinstance(paper.get("year"), int):
        problems.append("paper has no year")
    if not any(paper.get(key) for key in ("arxiv", "doi", "url")):
        problems.append("paper has none of arxiv, doi, url")
    elif "arxiv" in paper and not (isinstance(paper["arxiv"], str) and re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}", paper["arxiv"])):
        problems.append(f"paper.arxiv {paper['arxiv']!r} is not an arXiv number: quote it, YAML drops a last zero")
    if not entry.claims:
        problems.append("claims is missing or empty")
    for number, claim in enumerate(entry.claims, 1):
        problems += [f"claim {number} has no {key!r}" for key in ("on", "metric", "method", "source") if claim.get(key) in (None, "")]
        if str(claim.get("source", "")).lower().startswith("memory"):
            problems.append(f"claim {number} has no source that can be looked up")
    words = entry.body.split()
    if len(words) < 80:
        problems.append(f"the body has {len(words)} words: say in at least 80 what it does, when to use it, when not to, what to watch")
    if not re.search(r"when\s+not\b|\b(do not|don't|not to) use\b|\bnot\s+for\b", entry.body, re.IGNORECASE):
        problems.append("the body does not say when not to use the method: write 'When not to use it: ...'")
    quotes = re.findall(r"[\"“]([^\"”\n]+)[\"”]", entry.body) + re.findall(r"^>\s?(.+)$", entry.body, re.MULTILINE)
    problems += [f"a quotation of more than 12 words ('{quote[:40]}...'): use own words" for quote in quotes if len(quote.split()) > 12]
    if shared_words(entry.wish + " " + entry.body, entry.title) >= 8:
        problems.append("wish or body repeats the paper's title: use own words")
    return problems


def shared_words(first: str, second: str) -> int:
    """Length of the longest run of words that both texts contain, ignoring case and punctuation."""
    a, b = re.findall(r"\w+", first.lower()), re.findall(r"\w+", second.lower())
    longest, ends = 0, [0] * (len(b) + 1)
    for word in a:
        ends = [0] + [ends[j] + 1 if word == other else 0 for j, other in enumerate(b)]
        longest = max(longest, *ends)
    return longest


class Chapter(ModuleType):
    """A chapter's package in which a method's name means the function, although a submodule has the same name.

    `wellread.merge.model_soup(...)` calls; `from wellread.merge.model_soup import running_mean` still reaches into the file.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in {path.stem for path in _cards(Path(self.__path__[0]))}:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        importlib.import_module(f"{self.__name__}.{name}")  # stores the function here, through __setattr__
        return self.__dict__[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType):  # the import system stores each submodule in its package
            value = getattr(value, name, value)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        finished = {path.stem for path in _cards(Path(self.__path__[0])) if not read_card(path).draft}
        return sorted(finished | set(super().__dir__()))


def chapter(name: str) -> None:
    """Make the package `name` a `Chapter`: `catalog.chapter(__name__)` is all that a chapter's __init__.py holds beside its docstring."""
    sys.modules[name].__class__ = Chapter


def read_card(path: Path) -> Card:
    """The card in the file `path`. Raises `BadInput` when its front matter cannot be read."""
    return _read_card(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1024)
def _read_card(path: Path, _changed: int) -> Card:
    where = f"{path.parent.name}/{path.name}"
    start, _, rest = path.read_text("utf-8").partition("---\n")
    front, end, body = rest.partition("\n---\n")
    if start.strip() or not end:
        raise BadInput(f"the card {where} has no front matter: begin it with '---', YAML, '---'")
    try:
        fields = yaml.load(front, Loader=_Loader)  # a safe loader
    except yaml.YAMLError as error:
        raise BadInput(f"the front matter of the card {where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise BadInput(f"the front matter of the card {where} has no keys: give title, paper, wish, brings, gets, claims")
    paper, claims = fields.get("paper") or {}, fields.get("claims") or []
    if not isinstance(paper, dict) or not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
        raise BadInput(f"the card {where}: paper must be a mapping and claims a list of mappings")
    texts = {key: str(fields.get(key) or "").strip() for key in ("title", "wish", "brings", "gets")}
    name = path.stem.replace("_", "-")
    return Card(name, path.parent.name, paper=paper, claims=claims, body=body.strip(), draft=bool(fields.get("draft")), path=path, **texts)


def _roots() -> list[Path]:
    return [Path(folder) for folder in sys.modules["wellread"].__path__]


def _cards(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*.md") if path.with_suffix(".py").exists())


def _parameter_lines(arguments: ast.arguments) -> list[str]:
    def line(argument: ast.arg, default: ast.expr | None) -> str:
        text = ast.unparse(argument)
        return text if default is None else f"{text} = {ast.unparse(default)}"

    positional = arguments.posonlyargs + arguments.args
    missing: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    lines = [line(*pair) for pair in zip(positional, missing + list(arguments.defaults), strict=True)]
    named = [line(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return lines + (["*", *named] if named else [])

"""Texts as words, for search: split, stop words, stems, and the stretch of a text that answers a query."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from wellread.errors import BadInput, optional

STEMMERS = {
    "ar": "arabic", "ca": "catalan", "cs": "czech", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "et": "estonian",
    "eu": "basque", "fa": "persian", "fi": "finnish", "fr": "french", "ga": "irish", "hi": "hindi", "hu": "hungarian", "hy": "armenian", "id": "indonesian",
    "it": "italian", "lt": "lithuanian", "ne": "nepali", "nl": "dutch", "no": "norwegian", "pl": "polish", "pt": "portuguese", "ro": "romanian",
    "ru": "russian", "sr": "serbian", "sv": "swedish", "ta": "tamil", "tr": "turkish",
}  # fmt: skip
SIGNS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # of scripts without spaces, where each is a word
WORD = re.compile(rf"[{SIGNS}]|[^\W_{SIGNS}]+")


def check_language(language: str | None) -> None:
    """Raises `BadInput` for a language without a stemmer."""
    if language is not None and language not in STEMMERS:
        raise BadInput(f"the language {language!r} is not known: choose {', '.join(STEMMERS)}, or none to take words as they are")


@lru_cache
def words(language: str | None) -> Callable[[str], list[str]]:
    """The function from a text to its words: lower case, without stop words, stemmed."""
    if language is None:
        return lambda text: WORD.findall(text.lower())
    stem = optional("Stemmer", "retrieve").Stemmer(STEMMERS[language]).stemWords
    lists = optional("bm25s.stopwords", "retrieve")
    stop = frozenset(getattr(lists, f"STOPWORDS_{'EN_PLUS' if language == 'en' else STEMMERS[language].upper()}", ()))
    return lambda text: stem([word for word in WORD.findall(text.lower()) if word not in stop])


def excerpt(text: str, query: str, language: str | None, mark: Callable[[str], str], length: int = 60) -> str:
    """The stretch of `length` words that holds most of the query's words, on one line, with those words marked."""
    wanted, split = set(words(language)(query)), words(language)
    text = " ".join(text.split())
    spans = [(found.start(), found.end(), bool(wanted & set(split(found[0])))) for found in WORD.finditer(text)]
    if not spans:
        return text[: 8 * length]
    hits = np.concatenate([[0], np.cumsum([hit for _, _, hit in spans])])
    starts = np.arange(max(len(spans) - length, 0) + 1)
    first = int(np.argmax(hits[np.minimum(starts + length, len(spans))] - hits[starts]))
    last = min(first + length, len(spans))
    begin, end = (spans[first][0] if first else 0), (spans[last - 1][1] if last < len(spans) else len(text))
    shown, at = "… " if first else "", begin
    for start, stop, hit in spans[first:last]:
        shown += text[at:start] + (mark(text[start:stop]) if hit else text[start:stop])
        at = stop
    return shown + text[at:end] + (" …" if last < len(spans) else "")

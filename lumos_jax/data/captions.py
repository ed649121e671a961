"""Captions: reading text in any encoding, which caption a record trains with, wrong ones on purpose, and cleaning.

A record has a raw caption (alt text, a title) and may have a detailed one (of a captioning model); training mixes the two
[PixArt-Sigma; the paper uses both]. Everything random is a function of the seed and the record's position.
"""

from __future__ import annotations

import codecs
import functools
import html
import io
import json
import os
import re
import urllib.parse
import zlib
from typing import TextIO

import numpy as np
from absl import logging

from lumos_jax.data import storage
from lumos_jax.data.base import Captions, CorruptRecord

# Under which names records of other makers have them, the first that is there.
RAW_NAMES = ("caption", "text", "txt")
DETAILED_NAMES = ("caption/detailed", "caption_detailed", "detailed")


def choose(captions: Captions, draw: float, detailed: float) -> int:
    """Which of (raw, detailed) a record trains with: the detailed one if `draw`, a number in [0, 1) from the record's own
    stream, is below the probability `detailed`; the other where that one is empty."""
    wanted = int(draw < detailed)
    return wanted if captions[wanted] else 1 - wanted if captions[1 - wanted] else 0


def partner(record: int, count: int, fraction: float, seed: int) -> int:
    """Which of `count` records a record takes its caption from, if a fraction of the captions is exchanged (paper Fig. 2a).

    A fixed seed pairs the records up, and a share `fraction` of the pairs exchanges captions: no caption is lost or doubled,
    and nothing is remembered.
    """
    if not fraction:
        return record
    middle = zlib.crc32(f"caption pairs {seed}".encode()) % count
    other = (middle - record) % count
    pair = np.array([seed, min(record, other)], np.uint64)
    return other if np.random.Philox(key=pair).random_raw() < int(fraction * 2**64) else record


_RULES = (
    (r"<person>", "person"),
    (r"(?:https?://|www\.)\S+|\b[\w.-]+\.(?:com|net|org|co|ru|info|edu|gov)\b(?:/\S*)?", ""),
    (r"<[^<>]*>", " "),  # HTML
    (r"@[\w\d]+\b", ""),  # names of accounts
    (r"[\u31c0-\u33ff\u3400-\u9fff]+", ""),  # strokes, compatibility forms and ideographs of CJK
    (r"[\u2010-\u2015\u2212\u2e3a\u2e3b\ufe58\ufe63\uff0d]+", "-"),
    (r"[\u201c\u201d\u00ab\u00bb\u201e]", '"'),
    (r"[\u2018\u2019`\u00b4]", "'"),
    (r"&(?:quot|amp);?", ""),
    (r"\b\d{1,3}(?:\.\d{1,3}){3}\b", " "),  # IP addresses
    (r"#\d+\b|\b\d{6,}\b", ""),  # numbers of articles
    (r"\S+\.(?:png|jpe?g|gif|bmp|webp|eps|svg|pdf|mp4)\b", ""),  # names of files
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_LONGEST = 2000  # characters; some of the rules take time with the square of it


@functools.lru_cache(maxsize=1 << 12)
def clean(caption: str) -> str:
    """A caption as PixArt's recipe cleans it, twice over: lower case, without addresses, HTML, CJK ideographs and odd
    punctuation, its encoding repaired. May leave nothing; of what is too long for any text encoder, the beginning counts."""
    return _clean_once(_clean_once(caption[:_LONGEST]))


def _clean_once(text: str) -> str:
    import ftfy  # a moment to import, and only captions from the web need it

    text = ftfy.fix_text(urllib.parse.unquote_plus(text))  # repaired first: capitals tell what went wrong
    text = text.strip().lower()
    for pattern, by in _RULES:
        text = re.sub(pattern, by, text)
    if text.count("-") + text.count("_") > 3:  # a file's name rather than a sentence
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(text))
    return " ".join(re.sub(r"^[\s\"'_,\-:+.]+|[\s\"'_,\-:+]+$", "", text).split())


_MARKS = {  # of the four bytes first: the mark of UTF-16 is the beginning of the one of UTF-32
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"
}  # fmt: skip


def _encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with these four bytes: by its byte order mark, or UTF-8 with or without one."""
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "utf-8-sig")


def open_text(path: str | os.PathLike, errors: str, newline: str | None = None) -> TextIO:
    """A text file in any of these encodings, on disk or behind a URL; see `open`. Raises OSError as `open_regular`."""
    file = storage.open_read(os.fspath(path))
    head = file.read(4)
    file.seek(0)
    return io.TextIOWrapper(file, _encoding_of(head), errors, newline)


def decode_text(data: bytes) -> str:
    """A text on one line; bytes that its encoding does not have become replacement characters.
    Raises CorruptRecord: zero bytes in it: something else than text, or UTF-16 without a byte order mark."""
    text = data.decode(_encoding_of(data), errors="replace")
    if "\0" in text:
        raise CorruptRecord("its caption holds zero bytes: no text, or UTF-16 without a byte order mark")
    return one_line(text)


def one_line(text: str) -> str:
    """The text without line breaks and doubled blanks; half a surrogate pair (of a cut JSON string) is replaced."""
    return " ".join(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())


def captions_of_json(data: bytes) -> tuple[str | None, str | None]:
    """The raw and the detailed caption in a JSON object, None where there is none. Raises CorruptRecord: it is no JSON."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptRecord(f"its .json is none: {error}") from error
    fields = fields if isinstance(fields, dict) else {}
    texts = ([fields[n] for n in names if isinstance(fields.get(n), str)] for names in (RAW_NAMES, DETAILED_NAMES))
    return tuple(one_line(found[0]) if found else None for found in texts)


def read_jsonl(path: str | os.PathLike) -> dict[str, Captions]:
    """Lines {"file": relative name, "caption": ..., "detailed": ...}, "detailed" where there is one -> name -> captions.
    Raises ValueError: a line is something else; says which."""
    found, twice = {}, 0
    with open_text(path, "replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name, *texts = entry["file"], entry["caption"], entry.get("detailed") or ""
                name, texts = os.path.normpath(name), tuple(map(one_line, texts))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
                wrong = f"{type(error).__name__}: {error}"
                raise ValueError(f'{path}, line {number}: not an object with "file" and "caption" ({wrong})') from error
            twice += name in found
            found[name] = texts
    if twice:
        logging.warning("%s: %d files have several lines, of which the last counts", path, twice)
    return found

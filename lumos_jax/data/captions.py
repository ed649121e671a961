"""Captions: reading text in any encoding, which caption a record trains with, wrong ones on purpose, and cleaning.

A record has a raw caption (alt text, a title) and may have a detailed one (of a captioning model); training mixes the two
[PixArt-Sigma; the paper uses both]. Everything random is a function of the seed and the record's position.
"""

from __future__ import annotations

import codecs
import functools
import html
import json
import os
import pathlib
import re
import urllib.parse
import zlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from lumos_jax.data.base import Captions, CorruptRecord
from lumos_jax.data.files import open_regular

# Under which names records of other makers have them, the first that is there.
RAW_NAMES = ("caption", "text", "txt")
DETAILED_NAMES = ("caption/detailed", "caption_detailed", "detailed")


def choose(captions: Captions, draw: float, detailed: float) -> int:
    """Which caption a record trains with: 0, the raw, or 1, the detailed one.

    Args:
      captions: (raw, detailed); where one is empty, it is the other.
      draw: a number in [0, 1) from the record's own stream.
      detailed: probability of the detailed one.
    """
    wanted = int(draw < detailed)
    return wanted if captions[wanted] else 1 - wanted if captions[1 - wanted] else 0


def partner(record: int, count: int, fraction: float, seed: int) -> int:
    """The record whose caption a record is given when a fraction of the captions is exchanged (paper Fig. 2a).

    A fixed seed pairs the records up, and a share `fraction` of the pairs exchanges captions: no caption is lost or doubled,
    and nothing is remembered.

    Args:
      record: in [0, count).
      count: records of the source.
      fraction: share of records with another's caption, in [0, 1].
      seed: of the pairs.
    """
    if not fraction:
        return record
    middle = zlib.crc32(f"caption pairs {seed}".encode()) % count
    other = (middle - record) % count
    pair = np.array([seed, min(record, other)], np.uint64)
    return other if np.random.Philox(key=pair).random_raw() < int(fraction * 2**64) else record


_RULES: Sequence[tuple[re.Pattern, str]] = [
    (re.compile(pattern), by)
    for pattern, by in (
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
]
_LONGEST = 2000  # characters; some of the rules take time with the square of it
_SEPARATORS = re.compile(r"[-_]")
_EDGES = re.compile(r"^[\s\"'_,\-:+.]+|[\s\"'_,\-:+]+$")


@functools.lru_cache(maxsize=1 << 12)
def clean(caption: str) -> str:
    """A caption as PixArt's recipe cleans it, twice over: lower case, without addresses, HTML, CJK ideographs and odd
    punctuation, its encoding repaired. May leave nothing; of what is too long for any text encoder, the beginning counts."""
    return _clean_once(_clean_once(caption[:_LONGEST]))


def _clean_once(text: str) -> str:
    import ftfy  # a moment to import, and only captions from the web need it

    text = (
        ftfy.fix_text(urllib.parse.unquote_plus(text)).strip().lower()
    )  # repaired first: capitals tell what went wrong
    for pattern, by in _RULES:
        text = pattern.sub(by, text)
    if len(_SEPARATORS.findall(text)) > 3:  # a file's name rather than a sentence
        text = _SEPARATORS.sub(" ", text)
    text = html.unescape(html.unescape(text))
    return " ".join(_EDGES.sub("", text).split())


_MARKS = {  # of the four bytes first: the mark of UTF-16 is the beginning of the one of UTF-32
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"
}  # fmt: skip


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins with these four bytes: by its byte order mark, or UTF-8 with or without one."""
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "utf-8-sig")


def decode_text(data: bytes) -> str:
    """A text on one line; bytes that its encoding does not have become replacement characters.

    Raises:
      CorruptRecord: zero bytes in it: something else than text, or UTF-16 without a byte order mark.
    """
    text = data.decode(encoding_of(data), errors="replace")
    if "\0" in text:
        raise CorruptRecord("its caption holds zero bytes: no text, or UTF-16 without a byte order mark")
    return one_line(text)


def one_line(text: str) -> str:
    """The text without line breaks and doubled blanks; half a surrogate pair (of a cut JSON string) is replaced."""
    return " ".join(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").split())


def read_jsonl(path: pathlib.Path) -> dict[str, Captions]:
    """Lines {"file": relative name, "caption": ..., "detailed": ...}, "detailed" where there is one -> name -> captions.

    Raises:
      ValueError: a line is something else; says which.
    """
    found, twice = {}, 0
    with open_regular(path) as file:
        head = file.read(4)
    with open(path, encoding=encoding_of(head), errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                texts = entry["file"], entry["caption"], entry.get("detailed") or ""
                if not all(isinstance(part, str) for part in texts):
                    raise TypeError("a value is no text")
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f'{path}, line {number}: not an object with "file" and "caption" ({type(error).__name__}: {error})'
                ) from error
            name = os.path.normpath(texts[0])
            twice += name in found
            found[name] = tuple(map(one_line, texts[1:]))
    if twice:
        logging.warning("%s: %d files have several lines, of which the last counts", path, twice)
    return found

"""The text of a prompt's ids: which tokens a character belongs to, and where a text occurs."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy

IMAGE = "\ufffc"
"""The character of a visual token in the text."""

# Byte-level tokenizers write a byte as a printable character: itself, or the next one from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + index): byte for index, byte in enumerate(_UNPRINTABLE)}
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
_JOINER = "\u200d"
_SELECTORS = "\ufe0e\ufe0f"
# First words of the Unicode names of scripts without spaces between words; Korean has none before particles.
_SPACELESS = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "HANGUL", "YI"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
)


class PromptText:
    """The text of a row of ids, of which `visual` are visual tokens.

    Raises ValueError if the tokenizer does not decode the ids to the text of its tokens one by one.
    """

    def __init__(self, tokenizer: Any, ids: Sequence[int], visual: Sequence[bool]) -> None:
        written = [id for id, image in zip(ids, visual, strict=True) if not image]
        pieces = iter(_pieces(tokenizer, written))
        tokens = [IMAGE.encode() if image else next(pieces) for image in visual]
        # A byte that is not part of a character becomes a character itself.
        self.text = b"".join(tokens).decode("utf-8", "surrogateescape")
        self._tokens = [0, *accumulate(map(len, tokens))]
        self._characters = [0, *accumulate(_sizes(self.text))]
        # The first character of the first image.
        self.first = self.begin(visual.index(True)) if any(visual) else 0

    def tokens(self, start: int, stop: int) -> list[int]:
        """The tokens that hold at least one byte of the characters from `start` to before `stop`."""
        first = bisect_right(self._tokens, self._characters[start]) - 1
        last = bisect_left(self._tokens, self._characters[stop])
        return [token for token in range(first, last) if self._tokens[token] < self._tokens[token + 1]]

    def begin(self, token: int) -> int:
        """The first character that begins in a token or after it."""
        return bisect_left(self._characters, self._tokens[token])


def spellings(tokenizer: Any, text: str, unknown: bool = False) -> Iterator[str]:
    """A text itself and, if the tokenizer changes it (lower case, no accents), the changed text.

    With `unknown`, also a changed text that contains unknown tokens.
    """
    yield text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    known = [id for id in ids if id != unknown_id]
    # Unknown tokens alone may be any text.
    if len(known) == len(ids) or (unknown and _decode(tokenizer, known).strip()):
        written = _decode(tokenizer, ids).strip()
        if written and written != text:
            yield written


def special_tokens(tokenizer: Any) -> set[str]:
    """The special tokens of a tokenizer, the unknown token included."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {token.content for token in added if token.special} | set(
        getattr(tokenizer, "all_special_tokens", None) or ()
    )


def unknown_of(tokenizer: Any) -> str | None:
    """The unknown token of a tokenizer; None if it has another use as well."""
    token: str | None = getattr(tokenizer, "unk_token", None)
    return None if token in {getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad")} else token


def find_last(text: str, wanted: str, word: bool, start: int = 0) -> tuple[int, int] | None:
    """The span of the last occurrence of `wanted`, in the same case if there is one; None if there is none.

    Any white space matches any other, and accents may be separate characters. A `word` has no letter or digit next to
    it, except in scripts without spaces.
    """
    bare = wanted.strip().rstrip(_SELECTORS) or wanted.strip()
    forms = dict.fromkeys([bare, *(unicodedata.normalize(form, bare) for form in ("NFC", "NFD"))])
    pattern = "|".join(r"\s+".join(map(re.escape, form.split())) for form in forms)
    for flags in (0, re.IGNORECASE):
        expression = re.compile(f"(?=((?:{pattern})[{_SELECTORS}]?))", flags)
        spans = [match.span(1) for match in expression.finditer(text, start)]
        for first, stop in reversed(spans):
            if not _is_inside(text, first, word) and not _is_inside(text, stop, word):
                return first, stop
    return None


def find_written(text: str, wanted: str, start: int = 0) -> list[tuple[int, int]]:
    """The spans of all occurrences of a template's text, up to white space, which tokenizers may change."""
    letters = "".join(wanted.split())
    if not letters:
        return []
    expression = re.compile(r"\s*".join(map(re.escape, letters)))
    return [match.span() for match in expression.finditer(text, start)]


def _is_inside(text: str, index: int, word: bool) -> bool:
    """Whether the characters before and after an index belong to one character, or to one word."""
    if index in (0, len(text)):
        return False
    left, right = text[index - 1], text[index]
    if _JOINER in (left, right) or _is_mark(right):
        return True
    return word and all(
        (side.isalnum() or _is_mark(side)) and not unicodedata.name(side, "").startswith(_SPACELESS)
        for side in (left, right)
    )


def _is_mark(character: str) -> bool:
    """Whether a character is an accent, a vowel sign or a skin tone, and so part of the character before it."""
    return unicodedata.category(character)[0] == "M" or "\U0001f3fb" <= character <= "\U0001f3ff"


def _pieces(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """The bytes of each token, by the first spelling of tokens that agrees with the tokenizer's decoding."""
    distinct = sorted(set(ids))
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(distinct)]
    expected = _normalize(_decode(tokenizer, ids))
    for spell in (_byte_level, _sentence_piece, partial(_words, close=".,?!"), partial(_words, close="")):
        spelled = dict(zip(distinct, map(spell, tokens), strict=True))
        pieces = [spelled[id] for id in ids]
        if _normalize(b"".join(pieces).decode("utf-8", "replace")) == expected:
            return pieces
    raise ValueError(
        f"processor: expected a tokenizer that decodes tokens one by one, got {type(tokenizer).__name__}, which does "
        "not; give rows as positions"
    )


def _byte_level(token: str) -> bytes:
    codes = [_BYTES.get(character) for character in token]
    return token.encode() if None in codes else bytes(codes)  # type: ignore[arg-type]


def _sentence_piece(token: str) -> bytes:
    byte = _FALLBACK.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()


def _words(token: str, close: str) -> bytes:
    """A word with a space before it, except a continuation and the marks in `close`."""
    if token.startswith("##"):
        return token[2:].encode()
    return token.encode() if token[:1] and token[0] in close else f" {token}".encode()


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _normalize(text: str) -> str:
    """A text without what decoders differ in: replacement characters, and the space before the first word."""
    return text.replace("\ufffd", "").lstrip(" ")


def _sizes(text: str) -> list[int]:
    """The UTF-8 size of each character; a surrogate is one stray byte."""
    codes = numpy.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    sizes[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1
    result: list[int] = sizes.tolist()
    return result

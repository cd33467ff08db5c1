"""What kind of content a job works on, from whatever the caller gives."""

from __future__ import annotations

import mimetypes

_MAIN_TYPES = frozenset(
    ("application", "audio", "example", "font", "haptics", "image", "message", "model", "multipart", "text", "video")
)


def main_type(given: str) -> str:
    """The main type of a MIME type (``image/png``) or of a file name (``scan.PNG``), or the word itself (``image``)."""
    word = given.strip().lower()
    head, slash, _ = word.partition("/")
    if slash and head in _MAIN_TYPES:
        return head
    guessed, _ = mimetypes.guess_type(word)
    return guessed.partition("/")[0] if guessed else word

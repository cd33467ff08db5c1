"""What kind of content a job works on, from whatever the caller gives."""

from __future__ import annotations

import mimetypes
import re

_MAIN_TYPES = frozenset(
    ("application", "audio", "example", "font", "haptics", "image", "message", "model", "multipart", "text", "video")
)

UNKNOWN = "unknown"


def main_type(given: str | None) -> str | None:
    """The main type of a MIME type (``image/png``) or of a file name (``scan.PNG``), or the word itself (``image``).

    None if nothing is given. What can be none of these is :data:`UNKNOWN`: it comes from a client, and stands in the log.
    """
    if given is None:
        return None
    word = given.strip().lower()
    head, slash, _ = word.partition("/")
    if slash and head in _MAIN_TYPES:
        return head
    guessed, _ = mimetypes.guess_type(word)
    if guessed:
        return guessed.partition("/")[0]
    return word if re.fullmatch(r"[a-z0-9.+-]{,64}", word) else UNKNOWN

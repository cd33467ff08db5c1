"""Which files the service accepts: of a kind that is told by their bytes, by the very libraries that will decode them."""

from __future__ import annotations

from typing import BinaryIO, Literal, get_args

import soundfile
from PIL import Image

Kind = Literal["image", "audio"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_BYTES = 50 * 1024 * 1024


def kind_of(file: BinaryIO) -> Kind | None:
    """The kind that the file can be decoded as, None for any other; leaves the file at its start."""
    for kind in KINDS:
        if _opens_as(kind, file):
            return kind
    return None


def _opens_as(kind: Kind, file: BinaryIO) -> bool:
    file.seek(0)
    try:
        match kind:
            case "image":
                Image.open(file)
            case "audio":
                soundfile.info(file)
    except (OSError, soundfile.LibsndfileError, Image.DecompressionBombError):
        return False
    else:
        return True
    finally:
        file.seek(0)

"""One image file as training will see it: whether it decodes whole, its size, its digest, and what it looks like. Imported by worker processes: keep it light."""

import contextlib
import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from pipeline.likeness import Likeness, likeness

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What the servers' clients send too; PIL's other decoders are not offered to files that we do not know."""
MAX_PIXELS = 50_000_000
"""Twice what GLM-4.5V looks at; one such image costs a worker 150 to 400 MB, and a small file can claim any size."""
SCALE = "scale it down, the model sees less than half of that"
MAX_ASPECT = 200
"""Longer side over shorter; GLM-4.5V's image processor raises above it."""
ORIENTATION = 0x0112
"""The EXIF tag."""


@dataclass(frozen=True)
class Look:
    """What a file holds: either `fault`, or all the rest."""

    digest: str
    """SHA-256 of the file's bytes, in hex."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""
    likeness: Likeness | None = None
    fault: str = ""
    doubt: str = ""
    """Why a server would see it otherwise than training does."""


def look(path: Path) -> Look:
    """Decodes the whole image and forgets it again; never raises on a file's content."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a doubt of PIL's about metadata is none about the picture
                return _decoded(file, digest)
    except Image.DecompressionBombError:
        return Look("", fault=f"claims more than {MAX_PIXELS} pixels; {SCALE}")
    except UnidentifiedImageError:
        return Look("", fault=f"does not decode as {', '.join(FORMATS)}; save the picture again as one of these")
    except Exception as error:  # a decoder at work on any bytes may raise anything
        return Look("", fault=f"does not decode ({str(error) or type(error).__name__}); save the picture again")


def _decoded(file: Any, digest: str) -> Look:
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            return Look(digest, fault=f"has {width}x{height} pixels, more than {MAX_PIXELS}; {SCALE}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            return Look(digest, fault=f"is {width}x{height}, longer than {MAX_ASPECT} times its width; cut it into pieces")
        if image.format in ("GIF", "WEBP", "PNG") and getattr(image, "is_animated", False):
            return Look(digest, fault="is an animation; give one picture")
        if image.mode.startswith(("I", "F")):
            return Look(digest, fault="has more than 8 bits a channel, which training cuts off at white; save it with 8")
        image.load()
        return Look(digest, (width, height), likeness(image), doubt=_doubt(image))


def _doubt(image: Image.Image) -> str:
    """vLLM turns an image by its EXIF tag and puts a transparent one on white; ms-swift does neither."""
    orientation = 1
    with contextlib.suppress(Exception):  # what cannot be read turns nothing
        orientation = image.getexif().get(ORIENTATION, 1)
    if orientation not in (0, 1):
        return "is turned by an EXIF tag, which serving heeds and training does not: save it upright"
    alpha = image.getchannel("A") if "A" in image.getbands() else image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if alpha and any(alpha.histogram()[:255]):
        return "is transparent, which serving shows on white and training does not: save it without an alpha channel"
    return ""


def look_at_all(paths: Sequence[Path]) -> list[Look]:
    """A chunk of work for a worker process."""
    return [look(path) for path in paths]


@dataclass(frozen=True)
class ImageTokens:
    """How many tokens an image becomes, as transformers' Glm4vImageProcessor resizes it (`smart_resize`, one image standing for two frames)."""

    patch: int
    merge: int
    frames: int
    min_pixels: int
    """Over all frames, as is max_pixels."""
    max_pixels: int

    def count(self, width: int, height: int) -> int:
        """Tokens of an image of this size in pixels, without the two that enclose it."""
        factor = self.patch * self.merge
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        rows, columns = round(height / factor), round(width / factor)
        area = self.frames * height * width
        if self.frames * rows * columns * factor**2 > self.max_pixels:
            beta = math.sqrt(area / self.max_pixels)
            rows, columns = max(1, math.floor(height / beta / factor)), max(1, math.floor(width / beta / factor))
        elif self.frames * rows * columns * factor**2 < self.min_pixels:
            beta = math.sqrt(self.min_pixels / area)
            rows, columns = math.ceil(height * beta / factor), math.ceil(width * beta / factor)
        return rows * columns

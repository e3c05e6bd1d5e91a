"""Pictures made smaller for training: Pillow's LANCZOS, written as JPEG, 4:2:0."""

import io
import struct
import zlib
from typing import NamedTuple

from PIL import Image

from pipeline.exif import upright
from pipeline.params import Reencode

# What Pillow shows with the colours of TensorFlow's decoding to three channels, alpha dropped. It does not so for CMYK
# (which has two conventions) and 16-bit grey: such files stay as they came.
MODES = {"JPEG": {"L": "L", "RGB": "RGB"}}
MODES["MPO"] = MODES["JPEG"]  # a JPEG with further pictures behind it, as telephones write it
MODES["PNG"] = {**MODES["JPEG"], "1": "L", "LA": "L", "P": "RGB", "RGBA": "RGB"}
# What Pillow raises for a damaged file.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class Smaller(NamedTuple):
    """A picture that was made smaller."""

    encoded: bytes  # JPEG
    height: int  # pixels
    width: int


def smaller(encoded: bytes, orientation: int, settings: Reencode) -> Smaller | None:
    """The JPEG or PNG turned as its orientation, 1..8, says, its longer side `settings.max_side` pixels.

    None where the picture is not larger, or its colours are in doubt: then the file stays as it came. One of DAMAGED
    is raised where it cannot be decoded.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        longer = max(image.size)
        mode = MODES.get(image.format or "", {}).get(image.mode)
        if mode is None or longer <= settings.max_side:
            return None
        width, height = (max(1, round(side * settings.max_side / longer)) for side in image.size)
        # A JPEG of more than twice the size needs not be decoded in full; `part` is the picture's place in the result.
        part = (image.draft(None, (2 * width, 2 * height)) or (None, None))[1]
        resized = image.convert(mode).resize((width, height), Image.Resampling.LANCZOS, part)
    turned = upright(resized, orientation)
    file = io.BytesIO()
    turned.save(file, "JPEG", quality=settings.quality)
    return Smaller(file.getvalue(), turned.height, turned.width)

"""Image files as tensors, and which files of a data set do not decode."""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from sltt.data.cache import key_of

log = logging.getLogger("sltt")

# not EPS, on which Pillow starts Ghostscript
FORMATS = ["BMP", "TIFF", "PPM", "JPEG", "PNG", "GIF", "WEBP"]


def decode(path: str) -> Tensor:
    """Return the RGB image [3, H, W] in a file, straight to a tensor."""
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.functional import pil_to_tensor
    from torchvision.transforms.v2.functional import to_dtype

    try:
        return to_dtype(decode_image(path, ImageReadMode.RGB), torch.uint8, scale=True)  # where it has 16 bits
    except RuntimeError as error:
        with suppress(Exception), Image.open(path, formats=FORMATS) as image:  # what decode_image does not read
            return pil_to_tensor(image.convert("RGB"))
        raise ValueError(f"{path} does not decode as an image: {error}; restore or remove it") from error


def find_undecodable(paths: Sequence[str], root: Path) -> list[str]:
    """List the images that do not decode; found once for the same files, and warned about every time."""
    found = root / ".sltt-cache" / f"undecodable-{key_of(paths)}.json"
    if found.exists():
        bad = json.loads(found.read_text(encoding="utf-8"))
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            bad = [path for path, good in zip(paths, pool.map(_decodes, paths), strict=True) if not good]
        with suppress(OSError):  # in a folder that may not be written to, they are sought again the next time
            found.parent.mkdir(exist_ok=True)
            part = found.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(bad), encoding="utf-8")
            os.replace(part, found)
    if bad:
        log.warning("%d of %d images skipped, which do not decode: %s", len(bad), len(paths), ", ".join(bad[:5]))
    return bad


def _decodes(path: str) -> bool:
    try:
        decode(path)
    except ValueError:
        return False
    return True

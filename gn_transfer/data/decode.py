"""From a file to RGB pixels. numpy, OpenCV, Pillow and simplejpeg: ``predict`` uses it without torch.

What a file holds is read from its first bytes, never from its name: Pets has a GIF and PNGs named ``.jpg``.
"""

from __future__ import annotations

import importlib.util
import io
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from gn_transfer.config import ConfigError
from gn_transfer.data.file_headers import SUFFIX_FORMATS, JpegHeader, jpeg_reduction, read_jpeg_header, video_kind

_READS_HEIF = importlib.util.find_spec("pillow_heif") is not None
_READS_AVIF = bool(features.check("avif"))

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
    | ({".heic", ".heif"} if _READS_HEIF else set())
    | ({".avif"} if _READS_AVIF else set())
)
"""Endings, in any case, of the files that count as images; others, and hidden ones, are left alone."""

OPTIONAL_SUFFIXES = {
    **({} if _READS_HEIF else dict.fromkeys((".heic", ".heif"), "pip install pillow-heif reads them")),
    **({} if _READS_AVIF else {".avif": "Pillow 11.3 or newer reads them"}),
}
"""Endings of images that could be read with another installation, and with which."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: Pillow's own bound, 256 MiB of RGB pixels."""

MAX_BYTES = 2**30
"""Larger files are refused before they are read: more than 16-bit RGBA of :data:`MAX_PIXELS`, uncompressed."""

_JPEG = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = b"\xff\xda"
_MOST_SCANS = 100  # progressive files have some ten
_PNG = b"\x89PNG\r\n\x1a\n"
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "MPO", "AVIF", "HEIF")
"""Pillow's readers that may look at a file: none that starts a program, as that of EPS does."""
_OPENCV_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class BadImageError(ConfigError):
    """An image that cannot be decoded.

    A DataLoader worker's error reaches the main process as ``type(error)(text)``, where ``text`` quotes the worker's
    whole traceback: a single argument is therefore accepted, and of a quoted traceback only the message is kept.

    Args:
        path: The file, or a whole message when ``reason`` is None.
        reason: What is wrong with it.

    Attributes:
        path: The file; empty where only a message is known.
        reason: What is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str | None = None) -> None:
        self.path = "" if reason is None else os.fspath(path)
        self.reason = os.fspath(path) if reason is None else reason
        if reason is None and self.reason.startswith("Caught "):
            self.reason = self.reason.rstrip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(f"{self.path}: {self.reason}" if self.path else self.reason)

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, ...]]:
        return type(self), (self.path, self.reason) if self.path else (self.reason,)


def decode_image(image: str | os.PathLike[str] | bytes, *, least_side: int | None = None) -> npt.NDArray[np.uint8]:
    """Decode any image to upright 8-bit RGB.

    Ordinary JPEGs go through libjpeg-turbo (simplejpeg, or OpenCV where there is EXIF rotation or a fault in the data),
    everything else through Pillow: the first frame of a GIF, alpha laid over white, grey, palette, CMYK, 16 bits per
    channel (its upper 8). EXIF rotation is applied. A JPEG that lacks its end marker is refused: decoders fill what is
    missing with grey and only warn. So is a PNG whose checksums are wrong. Faulty data *before* the end marker of a
    JPEG is tolerated as every reader of Pets does (beagle_116, chihuahua_121).

    Args:
        image: Path of the file, whose extension is not looked at, or its content.
        least_side: None decodes at full scale. Otherwise a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale where its
            short side still has at least so many pixels.

    Returns:
        Pixels, shape ``(H, W, 3)``, RGB, contiguous.

    Raises:
        BadImageError: Missing, empty, truncated, of no known format, or larger than :data:`MAX_PIXELS`.
    """
    path = "the image" if isinstance(image, bytes) else image
    data = _checked(image) if isinstance(image, bytes) else _read(image)
    if data.startswith(_JPEG):
        header = _whole_jpeg_header(data, path)
        if header.components != 4 and header.precision == 8:
            pixels = _decode_jpeg(data, header, jpeg_reduction(header, least_side))
            if pixels is not None:
                return pixels
    with _open_with_pillow(data, path) as opened:
        return pillow_to_rgb(opened, path)


def decode_mask(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Decode a mask: one number per pixel, of a grey, palette or black-and-white image. No EXIF rotation is applied.

    Args:
        path: The file.

    Returns:
        Values, shape ``(H, W)``: grey levels, indices of the palette, or 0 and 1.

    Raises:
        BadImageError: Missing, truncated or no image, in colours, with more than 8 bits, or in a format that loses
            detail.
    """
    data = _read(path)
    with _open_with_pillow(data, path) as image:
        if image.format in ("JPEG", "MPO"):
            raise BadImageError(path, "a JPEG, which changes the values of a mask; save masks as PNG")
        if image.mode not in ("L", "P", "1"):
            what = {"RGB": "in colours", "RGBA": "in colours", "CMYK": "in colours"}.get(image.mode)
            what = what or ("of 16 bits" if image.mode.startswith("I") else f"of Pillow's mode {image.mode}")
            raise BadImageError(
                path, f"a mask {what}; save it as an 8-bit grey or palette PNG whose values are the numbers of classes"
            )
        try:
            return np.array(image, dtype=np.uint8)
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
            raise BadImageError(path, f"cannot be decoded: {_flat(error)}") from error


def pillow_to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """Give a Pillow image's first frame as upright 8-bit RGB; see :func:`decode_image`.

    Args:
        image: Of any mode.
        path: What to call it in messages.

    Returns:
        Pixels, shape ``(H, W, 3)``, RGB.

    Raises:
        BadImageError: It cannot be decoded, is too large, or holds floating-point pixels.
    """
    _check_size(*image.size, path)
    if image.mode == "F":
        raise BadImageError(path, "holds floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
    try:
        return np.array(_to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        raise BadImageError(path, f"cannot be decoded: {_flat(error)}") from error


def check_image(path: str | os.PathLike[str]) -> None:
    """Look at a file's two ends: finds what is missing, empty, truncated or no image, in some 50 us.

    Not a promise that it decodes; :func:`decode_image` is.

    Args:
        path: The file.

    Raises:
        BadImageError: As :func:`decode_image`, for faults that show without decoding.
    """
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - half the time, which counts for 100,000 files
            head = file.read(16)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 12))
            tail = file.read()
    except OSError as error:
        raise BadImageError(path, _os_reason(error)) from error
    if (head.startswith(_JPEG) and tail.endswith(_JPEG_END)) or (head.startswith(_PNG) and b"IEND" in tail):
        return
    data = _read(path)  # the rare rest pays for a closer look
    if data.startswith(_JPEG):
        _whole_jpeg_header(data, path)
    elif data.startswith(_PNG) and b"IEND" not in data:
        raise BadImageError(path, f"truncated PNG: {len(data):,} bytes without its end chunk")
    else:
        with _open_with_pillow(data, path):
            pass


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read an image's size from its header.

    Args:
        path: The file.

    Returns:
        Height and width in pixels, as :func:`decode_image` gives them: upright.

    Raises:
        BadImageError: Missing, or no image.
    """
    _register_heif()
    try:
        with Image.open(path, formats=_known_formats()) as image:
            on_its_side = _orientation(image) >= 5 and image.format != "TIFF"  # which Pillow turns as it opens it
            return (image.width, image.height) if on_its_side else (image.height, image.width)
    except Exception as error:  # a corrupt header surfaces as whatever its parser ran into
        raise BadImageError(path, f"cannot be opened: {_flat(error)}") from error


def is_turned(path: str | os.PathLike[str]) -> bool:
    """Say whether EXIF turns or mirrors an image; not for what cannot be opened."""
    try:
        with Image.open(path, formats=_known_formats()) as image:
            return _orientation(image) > 1
    except Exception:  # a corrupt header surfaces as whatever its parser ran into
        return False


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation: 1 as it is, 2 to 8 turned or mirrored, from 5 on with sides swapped."""
    exif = image.getexif()
    if image.format in ("JPEG", "MPO") and image.mode != "CMYK":  # OpenCV obeys EXIF alone, and Pillow XMP as well
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
    found = exif.get(ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


class FileKind(NamedTuple):
    """What a file is, whatever its name says.

    Attributes:
        format: Pillow's name: JPEG, PNG, GIF, ...
        mode: Pillow's name of its channels: RGB, L, CMYK, ...
        warning: What is suspicious about it, or empty.
    """

    format: str
    mode: str
    warning: str


def describe_file(path: str | os.PathLike[str]) -> FileKind:
    """Tell what a file is, and what is suspicious about it.

    Args:
        path: The file.

    Returns:
        Its kind. A warning where the name promises another format, and where a JPEG's data are faulty, which decoders
        pass over with a message or none.

    Raises:
        BadImageError: Missing, empty or no image.
    """
    data = _read(path)
    with _open_with_pillow(data, path) as image:
        kind, mode = str(image.format), image.mode
    kind = "JPEG" if kind == "MPO" else kind  # a JPEG with further images behind it
    warnings = []
    promised = SUFFIX_FORMATS.get(Path(path).suffix.lower())
    if promised is not None and promised != kind:
        warnings.append(f"a {kind} by content")
    if kind == "JPEG":
        _check_scans(data, path)
        try:
            simplejpeg.decode_jpeg(data, "CMYK" if mode == "CMYK" else "RGB", strict=True)
        except ValueError as error:
            warnings.append(f"faulty JPEG data ({error})")
    return FileKind(kind, mode, "; ".join(warnings))


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(16)
            if kind := video_kind(data):
                raise BadImageError(path, f"{kind} video, not an image; extract its frames first")
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise BadImageError(path, f"larger than {MAX_BYTES / 2**20:.0f} MiB")
            data += file.read()
    except OSError as error:
        raise BadImageError(path, _os_reason(error)) from error
    if not data:
        raise BadImageError(path, "empty file (0 bytes)")
    return data


def _checked(data: bytes) -> bytes:  # as _read does
    if not data:
        raise BadImageError("the image", "empty (0 bytes)")
    if kind := video_kind(data[:16]):
        raise BadImageError("the image", f"{kind} video, not an image; extract its frames first")
    if len(data) > MAX_BYTES:
        raise BadImageError("the image", f"larger than {MAX_BYTES / 2**20:.0f} MiB")
    return data


def _flat(error: Exception) -> str:
    """A library's message on one line."""
    return " ".join(str(error).split())


def _os_reason(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else error.strerror or type(error).__name__


def _whole_jpeg_header(data: bytes, path: str | os.PathLike[str]) -> JpegHeader:
    header = read_jpeg_header(data)
    # Inside a scan every 0xFF byte is followed by 0x00 or a restart marker, so an end marker behind the scan's start is
    # the real one; one before it belongs to the EXIF thumbnail.
    if header is None:
        raise BadImageError(path, f"corrupt JPEG: {len(data):,} bytes, but no pixel data behind its header")
    if not data.endswith(_JPEG_END) and data.find(_JPEG_END, header.scan_start) < 0:
        raise BadImageError(path, f"truncated JPEG: {len(data):,} bytes without an end marker")
    _check_scans(data, path)
    _check_size(header.width, header.height, path)
    return header


def _check_scans(data: bytes, path: str | os.PathLike[str]) -> None:
    if data.count(_JPEG_SCAN) > _MOST_SCANS:
        raise BadImageError(path, f"a JPEG of more than {_MOST_SCANS} scans, which would take minutes")


def _decode_jpeg(data: bytes, header: JpegHeader, divisor: int) -> npt.NDArray[np.uint8] | None:
    if divisor == 1 and not header.has_exif:
        try:
            return np.asarray(simplejpeg.decode_jpeg(data, "RGB"), dtype=np.uint8)
        except ValueError:  # faulty data, which OpenCV tolerates, or a kind of JPEG that it does not know
            pass
    pixels_BGR = cv2.imdecode(np.frombuffer(data, np.uint8), _OPENCV_FLAGS[divisor])  # applies EXIF rotation
    return None if pixels_BGR is None else np.asarray(cv2.cvtColor(pixels_BGR, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _check_size(width: int, height: int, path: str | os.PathLike[str]) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(
            path, f"{width:,} x {height:,} = {width * height / 1e6:,.0f} megapixels; at most {MAX_PIXELS / 1e6:.0f}"
        )


def _open_with_pillow(data: bytes, path: str | os.PathLike[str]) -> Image.Image:
    _register_heif()
    try:
        image = Image.open(io.BytesIO(data), formats=_known_formats())
        if image.format == "PNG":  # Pillow compares the checksums of pixels only here, and then has to begin anew
            image.verify()
            image = Image.open(io.BytesIO(data), formats=_known_formats())
    except UnidentifiedImageError as error:
        if data[4:8] == b"ftyp":
            kind = ".avif" if data[8:12] in (b"avif", b"avis") else ".heic"
            name = kind.removeprefix(".").upper()
            why = OPTIONAL_SUFFIXES.get(kind, f"{len(data):,} bytes, truncated or corrupt")
            raise BadImageError(path, f"{'an' if kind == '.avif' else 'a'} {name} image; {why}") from error
        raise BadImageError(path, f"not an image: its first bytes are {data[:8].hex(' ')}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(path, f"more than {MAX_PIXELS / 1e6:.0f} megapixels: {error}") from error
    except Exception as error:  # a corrupt header surfaces as whatever its parser ran into
        raise BadImageError(path, f"cannot be opened: {_flat(error)}") from error
    _check_size(*image.size, path)  # before a pixel is decoded
    return image


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def _register_heif() -> None:
    if _READS_HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: convert("RGB") would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")

"""From a file to RGB pixels. numpy, OpenCV, Pillow and simplejpeg: ``predict`` uses it without torch.

What a file holds is read from its first bytes, never from its name: Pets has a GIF and PNGs named ``.jpg``.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from gn_transfer.config import ConfigError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"})
"""Endings, in any case, of the files that count as images; others, and hidden ones, are left alone."""

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: Pillow's own bound, 256 MiB of RGB pixels."""

MAX_BYTES = 2**30
"""Larger files are refused before they are read: more than 16-bit RGBA of :data:`MAX_PIXELS`, uncompressed."""

_JPEG = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_PNG = b"\x89PNG\r\n\x1a\n"
_SUFFIX_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_IMAGE_BRANDS = {b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_STANDALONE_MARKERS = {0x01, *range(0xD0, 0xD8)}  # TEM and RSTn carry no length
_OPENCV_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOFn; the three others are DHT, JPG and DAC


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


class JpegHeader(NamedTuple):
    """What the segments before a JPEG's pixel data say.

    Attributes:
        width: In pixels, before any EXIF rotation.
        height: In pixels, before any EXIF rotation.
        components: 1 grey, 3 colour, 4 CMYK.
        precision: Bits per component.
        scan_start: Byte offset of the first start-of-scan marker.
        has_exif: Whether there is an EXIF segment, which may ask for a rotation.
    """

    width: int
    height: int
    components: int
    precision: int
    scan_start: int
    has_exif: bool


def decode_image(path: str | os.PathLike[str], *, least_side: int | None = None) -> npt.NDArray[np.uint8]:
    """Decode any image to upright 8-bit RGB.

    Ordinary JPEGs go through libjpeg-turbo (simplejpeg, or OpenCV where there is EXIF rotation or a fault in the data),
    everything else through Pillow: the first frame of a GIF,
    alpha laid over white, grey, palette, CMYK, 16 bits per channel (its upper 8). EXIF rotation is applied.
    A JPEG that lacks its end marker is refused: decoders fill what is missing with grey and only warn. Faulty
    data *before* the end marker is tolerated as every reader of Pets does (beagle_116, chihuahua_121).

    Args:
        path: The file; its extension is not looked at.
        least_side: None decodes at full scale. Otherwise a JPEG is decoded at 1/2, 1/4 or 1/8 of its scale where its
            short side still has at least so many pixels.

    Returns:
        Pixels, shape ``(H, W, 3)``, RGB, contiguous.

    Raises:
        BadImageError: Missing, empty, truncated, of no known format, or larger than :data:`MAX_PIXELS`.
    """
    data = _read(path)
    if data.startswith(_JPEG):
        header = _whole_jpeg_header(data, path)
        if header.components != 4 and header.precision == 8:
            pixels = _decode_jpeg(data, header, jpeg_reduction(header, least_side))
            if pixels is not None:
                return pixels
    return _decode_with_pillow(data, path)


def jpeg_reduction(header: JpegHeader, least_side: int | None) -> int:
    """Choose the divisor of a JPEG's scale.

    Args:
        header: Its header.
        least_side: See :func:`decode_image`.

    Returns:
        1, 2, 4 or 8.

    Example:
        >>> jpeg_reduction(JpegHeader(500, 375, 3, 8, 0, False), 64)
        4
    """
    if least_side is None:
        return 1
    short = min(header.width, header.height)
    return next((divisor for divisor in (8, 4, 2) if short // divisor >= least_side), 1)


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
        raise BadImageError(path, f"cannot be decoded: {error}") from error


def check_image(path: str | os.PathLike[str]) -> None:
    """Look at a file's two ends: finds what is missing, empty, truncated or no image, in some 50 us.

    Not a promise that it decodes; :func:`decode_image` is.

    Args:
        path: The file.

    Raises:
        BadImageError: As :func:`decode_image`, for faults that show without decoding.
    """
    try:
        with Path(path).open("rb") as file:
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
        Height and width in pixels; those of an image that EXIF rotates may be replaced.

    Raises:
        BadImageError: Missing, or no image.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:  # a corrupt header surfaces as whatever its parser ran into
        raise BadImageError(path, f"cannot be opened: {error}") from error


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
    promised = _SUFFIX_FORMATS.get(Path(path).suffix.lower())
    if promised is not None and promised != kind:
        warnings.append(f"a {kind} by content")
    if kind == "JPEG":
        try:
            simplejpeg.decode_jpeg(data, "CMYK" if mode == "CMYK" else "RGB", strict=True)
        except ValueError as error:
            warnings.append(f"faulty JPEG data ({error})")
    return FileKind(kind, mode, "; ".join(warnings))


def video_kind(head: bytes) -> str | None:
    """Recognize a video by its first bytes.

    Args:
        head: At least 12 bytes of the file.

    Returns:
        Name of the container, or None for anything that is no video; AVIF and HEIC images share MP4's container and
        are none.

    Example:
        >>> video_kind(b"\\x00\\x00\\x00\\x20ftypisom")
        'an MP4'
    """
    if head[4:8] == b"ftyp":
        return None if head[8:12] in _IMAGE_BRANDS else "an MP4"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "an AVI"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "a Matroska or WebM"
    if head.startswith((b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3")):
        return "an MPEG"
    return None


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Walk the segments of a JPEG up to its pixel data.

    Source: ITU-T T.81, annex B.

    Args:
        data: The whole file.

    Returns:
        The header, or None where the segments do not lead to a frame and a scan.
    """
    position, has_exif = 2, False
    frame: tuple[int, int, int, int] | None = None
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in _STANDALONE_MARKERS:
            position += 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in _FRAME_MARKERS and position + 10 <= len(data):
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            frame = (width, height, data[position + 9], data[position + 4])
        if marker == 0xE1 and data[position + 4 : position + 8] == b"Exif":
            has_exif = True
        if marker == 0xDA:
            return None if frame is None else JpegHeader(*frame, scan_start=position, has_exif=has_exif)
        position += 2 + length
    return None


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
    _check_size(header.width, header.height, path)
    return header


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
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise BadImageError(path, f"not an image: starts with {data[:8]!r}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(path, f"more than {MAX_PIXELS / 1e6:.0f} megapixels: {error}") from error
    except Exception as error:  # a corrupt header surfaces as whatever its parser ran into
        raise BadImageError(path, f"cannot be opened: {error}") from error
    _check_size(*image.size, path)  # before a pixel is decoded
    return image


def _decode_with_pillow(data: bytes, path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    with _open_with_pillow(data, path) as image:
        return pillow_to_rgb(image, path)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: convert("RGB") would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")

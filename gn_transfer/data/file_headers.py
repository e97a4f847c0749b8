"""What the first bytes of a file say, before anything is decoded: a JPEG's segments, a video."""

from __future__ import annotations

from typing import NamedTuple

SUFFIX_FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    ".png": "PNG",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".webp": "WEBP",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".heic", ".heif"), "HEIF"),
    ".avif": "AVIF",
}
"""Pillow's name of the format that a file name promises."""

_IMAGE_BRANDS = {b"avif", b"avis", b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_STANDALONE_MARKERS = {0x01, *range(0xD0, 0xD8)}  # TEM and RSTn carry no length
_NO_SEGMENTS = {0x00, 0xD8, 0xD9}  # a stuffed byte, and the two ends of an image
_FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOFn; the three others are DHT, JPG and DAC


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
        if marker in _NO_SEGMENTS:  # decoders read on behind it, and would find another frame
            return None
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

"""Whatever a file holds becomes upright RGB, or an error that names it."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from gn_transfer.config import ConfigError
from gn_transfer.data import decode
from gn_transfer.data.decode import (
    BadImageError,
    check_image,
    decode_image,
    decode_mask,
    describe_file,
    is_turned,
    read_size,
)
from gn_transfer.data.file_headers import read_jpeg_header

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def gradient() -> Image.Image:
    """40 x 24 pixels, red grows to the right, green downwards."""
    y, x = np.mgrid[:24, :40]
    return Image.fromarray(np.stack([x * 6, y * 10, np.full_like(x, 60)], axis=2).astype(np.uint8))


def test_jpeg_equals_pillow(tmp_path: Path, gradient: Image.Image) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(gradient, "JPEG", quality=95))
    expected = np.asarray(Image.open(path)).astype(int)
    pixels = decode_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.abs(pixels - expected).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_the_content_counts_not_the_name(tmp_path: Path, gradient: Image.Image, kind: str) -> None:
    path = tmp_path / "lies.jpg"
    image = gradient.quantize(64) if kind == "GIF" else gradient
    path.write_bytes(encode(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    check_image(path)
    np.testing.assert_array_equal(decode_image(path), np.asarray(image.convert("RGB")))


def test_gif_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in (RED, (0, 0, 255))]
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (decode_image(path) == RED).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (*RED, 255))
    for x in (2, 3):
        for y in (0, 1):
            image.putpixel((x, y), (0, 0, 0, 0))  # invisible black
    path = tmp_path / "a.png"
    path.write_bytes(encode(image.convert(mode), "PNG"))
    pixels = decode_image(path)
    assert (pixels[:, 2:] == WHITE).all()
    expected = RED if mode != "LA" else (76, 76, 76)
    assert np.abs(pixels[:, :2].astype(int) - expected).max() <= 4  # a palette rounds


def test_half_transparent_red_becomes_pink(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.new("RGBA", (3, 3), (*RED, 128)), "PNG"))
    assert tuple(decode_image(path)[0, 0]) == (255, 127, 127)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_gets_three_equal_channels(tmp_path: Path, gradient: Image.Image, kind: str) -> None:
    path = tmp_path / "grey.jpg"
    path.write_bytes(encode(gradient.convert("L"), kind))
    pixels = decode_image(path)
    assert pixels.shape == (24, 40, 3)
    np.testing.assert_array_equal(pixels[..., 0], np.asarray(Image.open(path)))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "cmyk.jpg"
    path.write_bytes(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    header = read_jpeg_header(path.read_bytes())
    assert header is not None
    assert header.components == 4
    assert np.abs(decode_image(path).astype(int) - RED).max() <= 3


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(encode(Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16)), "PNG"))
    assert decode_image(path)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_on_both_paths(tmp_path: Path, gradient: Image.Image, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encode(gradient, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path))).astype(int)
    assert expected.shape[:2] == ((24, 40) if orientation < 5 else (40, 24))
    assert np.abs(decode_image(path) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_pixels(
    tmp_path: Path, gradient: Image.Image, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    path.write_bytes(encode(gradient, kind, exif=exif))
    assert read_size(path) == decode_image(path).shape[:2] == ((24, 40) if orientation < 5 else (40, 24))
    assert is_turned(path) == (orientation > 1)


def test_a_jpeg_is_turned_by_exif_and_not_by_xmp(tmp_path: Path, gradient: Image.Image) -> None:
    """What decodes JPEGs does not know XMP, and what reads their size must not either."""
    path = tmp_path / "turned.jpg"
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path.write_bytes(encode(gradient, "JPEG", xmp=packet.encode()))
    with Image.open(path) as image:
        assert image.getexif().get(0x0112) == 6  # Pillow looks there
    assert read_size(path) == decode_image(path).shape[:2] == (24, 40)
    assert not is_turned(path)


def test_header_of_a_progressive_jpeg_with_thumbnail(gradient: Image.Image) -> None:
    thumbnail = encode(gradient.resize((8, 8)), "JPEG")
    data = encode(gradient, "JPEG", progressive=True, exif=b"Exif\x00\x00" + thumbnail)
    header = read_jpeg_header(data)
    assert header is not None
    assert header[:4] == (40, 24, 3, 8)
    assert header.scan_start > data.index(thumbnail) + len(thumbnail)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_is_refused_by_both_looks(tmp_path: Path, gradient: Image.Image, kind: str, keep: float) -> None:
    # a complete thumbnail in the header must not pass for the end of the file
    thumbnail = b"Exif\x00\x00" + encode(gradient.resize((8, 8)), "JPEG")
    data = encode(gradient.resize((400, 240)), kind, **({"exif": thumbnail} if kind == "JPEG" else {}))
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(BadImageError, match=rf"cut\.jpg: (truncated|corrupt) {kind}"):
        check_image(path)
    with pytest.raises(BadImageError, match=r"cut\.jpg: "):
        decode_image(path)


@pytest.mark.parametrize("read", [decode_image, decode_mask])
def test_a_png_whose_checksums_are_wrong_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """Pillow decodes it to other pixels, without a word."""
    path, noise = tmp_path / "x.png", np.random.default_rng(0).integers(0, 3, (40, 36), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    read(path)
    whole = path.read_bytes()
    for place in range(len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:place] + bytes(200) + whole[place + 200 :])
        with suppress(OSError):
            if (np.asarray(Image.open(path)) != noise).any():
                break
    else:
        pytest.skip("this Pillow reads no such file")
    with pytest.raises(BadImageError, match=r"x\.png: cannot be opened: broken PNG file"):
        read(path)


def test_a_jpeg_of_thousands_of_scans_is_not_decoded(tmp_path: Path, gradient: Image.Image) -> None:
    content = io.BytesIO()
    gradient.save(content, "JPEG", progressive=True)
    data = content.getvalue()
    last = data.rindex(b"\xff\xda")
    assert data.count(b"\xff\xda") < 20
    with pytest.raises(BadImageError, match="more than 100 scans"):
        decode_image(data[:last] + data[last:-2] * 101 + b"\xff\xd9")

    path = tmp_path / "scans.jpg"
    path.write_bytes(data[:last] + data[last:-2] * 101 + b"\xff\xd9")
    with pytest.raises(BadImageError, match="more than 100 scans"):
        describe_file(path)


@pytest.mark.parametrize("marker", [b"\xff\x00", b"\xff\xd8", b"\xff\xd9"])
def test_a_frame_behind_what_is_no_segment_does_not_hide_the_real_one(gradient: Image.Image, marker: bytes) -> None:
    """Decoders read on behind such a marker; a reader that skips its length would see the size of another frame."""
    data = encode(gradient, "JPEG")
    frame = data.index(b"\xff\xc0")
    small = data[frame : frame + 5] + b"\x00\x02\x00\x02" + data[frame + 9 : frame + 19]
    comment = b"\xff\xfe" + (len(small) + 2).to_bytes(2, "big")
    hidden = data[2 : data.index(b"\xff\xda")] + comment
    changed = b"\xff\xd8" + marker + (len(hidden) + 2).to_bytes(2, "big") + hidden + small + data[2 + len(hidden) - 4 :]
    assert read_jpeg_header(data) is not None
    assert read_jpeg_header(changed) is None
    with pytest.raises(BadImageError, match="corrupt JPEG"):
        decode_image(changed)


@pytest.mark.parametrize("content", [b"P1\n2 2\n0 1 1 0\n", b"P3\n1 1\n255\n1 2 3\n"])
def test_formats_of_plain_text_are_no_images(content: bytes) -> None:
    with pytest.raises(BadImageError, match="not an image"):
        decode_image(content)


def test_faulty_data_before_the_end_marker_is_tolerated(
    tmp_path: Path, gradient: Image.Image, capfd: pytest.CaptureFixture[str]
) -> None:
    data = encode(gradient.resize((400, 240)), "JPEG")
    path = tmp_path / "beagle_116.jpg"
    path.write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    check_image(path)
    assert decode_image(path).shape == (240, 400, 3)
    capfd.readouterr()  # libjpeg warns on standard error


def test_bytes_behind_the_end_marker_are_tolerated(tmp_path: Path, gradient: Image.Image) -> None:
    path = tmp_path / "padded.jpg"
    path.write_bytes(encode(gradient, "JPEG") + bytes(100))
    check_image(path)
    assert decode_image(path).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>500 Internal Server Error</html>", "not an image: its first bytes are 3c 68 74 6d 6c 3e 35 30"),
        (b"\xff\xd8\xff\xe0", "corrupt JPEG: 4 bytes"),
        (b"GIF89a", "GIF|not an image|cannot be"),
    ],
)
def test_no_image(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    for look in (check_image, decode_image):
        with pytest.raises(BadImageError, match=reason):
            look(path)


def test_missing_file(tmp_path: Path) -> None:
    for look in (check_image, decode_image):
        with pytest.raises(BadImageError, match=r"gone\.jpg: no such file"):
            look(tmp_path / "gone.jpg")


def test_floating_point_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "float.tif"
    path.write_bytes(encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
    with pytest.raises(BadImageError, match="floating-point"):
        decode_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_before_decoding(
    tmp_path: Path, gradient: Image.Image, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.jpg"
    path.write_bytes(encode(gradient, kind))
    monkeypatch.setattr(decode, "MAX_PIXELS", 40 * 24 - 1)
    with pytest.raises(BadImageError, match=r"bomb\.jpg: 40 x 24 = "):
        decode_image(path)


def test_pillows_own_bomb_guard_becomes_our_error(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"  # 400 megapixels of one bit each: 50 kB
    path.write_bytes(encode(Image.new("1", (20_000, 20_000)), "PNG"))
    with pytest.raises(BadImageError, match="megapixels"):
        decode_image(path)


def test_error_survives_pickling_and_a_workers_traceback() -> None:
    error = BadImageError("a/b.jpg", "truncated JPEG: 7 bytes")
    assert isinstance(error, ConfigError)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.reason, str(copy)) == (
        "a/b.jpg",
        "truncated JPEG: 7 bytes",
        "a/b.jpg: truncated JPEG: 7 bytes",
    )
    quoted = (
        "Caught BadImageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        f'  File "x.py", line 1, in y\n    raise error\ngn_transfer.data.decode.BadImageError: {error}\n'
    )
    assert str(BadImageError(quoted)) == str(error)


def test_decode_and_preprocess_need_no_torch() -> None:
    code = (
        "import sys; from gn_transfer.data import decode_image, preprocess_image; "
        "print(sorted({'torch', 'lightning', 'torchvision', 'albumentations'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_quirks_of_pets(real_data: Path) -> None:
    quirks = real_data / "pet_originals" / "quirks"
    assert decode_image(quirks / "Abyssinian_34.jpg").shape == (202, 250, 3)  # a GIF
    pixels = decode_image(quirks / "Abyssinian_5.jpg")  # a PNG with alpha
    assert pixels.shape == (150, 200, 3)
    assert pixels.std() > 20


def test_all_original_pets_decode_as_pillow_does(real_data: Path) -> None:
    files = sorted((real_data / "pet_originals").glob("*.jpg"))
    assert len(files) == 60
    for path in files[::6]:
        expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert np.abs(decode_image(path) - expected).max() <= 4, path


@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_scale_is_near_the_whole_and_upright(tmp_path: Path, orientation: int) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "large.jpg"
    path.write_bytes(
        encode(Image.fromarray(coarse).resize((480, 320), Image.Resampling.BICUBIC), "JPEG", exif=exif, quality=95)
    )
    whole = decode_image(path)
    for least, divisor in ((320, 1), (161, 1), (160, 2), (80, 4), (40, 8), (5, 8)):
        pixels = decode_image(path, least_side=least)
        assert pixels.shape == (whole.shape[0] // divisor, whole.shape[1] // divisor, 3)
        expected = np.asarray(Image.fromarray(whole).resize(pixels.shape[1::-1], Image.Resampling.BOX)).astype(int)
        assert np.abs(pixels - expected).mean() < 1.0


def test_the_fast_decoder_gives_the_pixels_of_opencv(real_data: Path) -> None:
    for path in sorted((real_data / "pet_originals").glob("*.jpg"))[::7]:
        expected = cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(decode_image(path), expected)

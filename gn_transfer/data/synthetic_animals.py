"""Portraits of cats and dogs of invented breeds, drawn with numpy and OpenCV from a seed.

A breed is a shape (ears, head, muzzle) and a coat pattern. Its colours are drawn anew for every image, as are pose,
light and background, so that single pixels tell little about the breed: the model has to see shapes and texture.

Coordinates: the head's centre is (0, 0), its half width about 1, y points down; arrays ``(H, W)`` or ``(3, H, W)`` are
float32 in 0-255, RGB.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
AnyArray = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.uint8]  # 0-255, anti-aliased
Color = tuple[float, float, float]
Points = list[tuple[float, float]]

_SUPERSAMPLING = 1.5  # drawn larger, then averaged down: smooth edges and fine fur


@dataclass(frozen=True)
class Breed:
    """What all animals of a breed share.

    Attributes:
        name: As in an image id; a capital first letter marks a cat, as in Oxford-IIIT Pet.
        ears: Shape of the ears.
        coat: Pattern of the fur.
        head: Half width and half height of the head.
    """

    name: str
    ears: Literal["pointed", "tufted", "floppy", "round", "prick"]
    coat: Literal["stripes", "mask", "patches", "spots", "saddle"]
    head: tuple[float, float]

    @property
    def is_cat(self) -> bool:
        """Whether it is a cat."""
        return self.name[0].isupper()


BREEDS = (
    Breed("Moor_Tiger", "pointed", "stripes", (1.0, 0.86)),
    Breed("Lantern_Cat", "tufted", "mask", (0.96, 0.9)),
    Breed("river_spaniel", "floppy", "patches", (0.84, 0.95)),
    Breed("bramble_hound", "round", "spots", (0.76, 1.02)),
    Breed("harbour_spitz", "prick", "saddle", (0.9, 0.86)),
)
"""The breeds of the sample, in the order of their class ids."""

_COATS: tuple[Color, ...] = (
    (38, 34, 34),  # black
    (92, 60, 40),  # chocolate
    (140, 92, 56),  # brown
    (196, 122, 58),  # ginger
    (216, 180, 130),  # fawn
    (236, 222, 198),  # cream
    (122, 126, 136),  # blue grey
    (176, 176, 180),  # silver
)
_CAT_EYES: tuple[Color, ...] = ((120, 170, 70), (214, 160, 50), (90, 150, 200), (170, 180, 90))
_DOG_EYES: tuple[Color, ...] = ((84, 50, 26), (60, 38, 24), (120, 78, 36))


def render_animal(
    breed: Breed, size: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Draw one portrait.

    Args:
        breed: What to draw.
        size: Side in pixels.
        rng: Source of pose, colours, background, light and noise.

    Returns:
        Pixels RGB, shape ``(size, size, 3)``, and how much of each the animal covers, 0 to 255, ``(size, size)``.
    """
    canvas = _Canvas(round(size * _SUPERSAMPLING), rng)
    _draw_background(canvas)
    coat = _Coat(breed, canvas)
    _draw_body(canvas, coat)
    _draw_head(canvas, coat)
    cover = np.asarray(cv2.resize(canvas.cover, (size, size), interpolation=cv2.INTER_AREA), np.uint8)
    return _photograph(canvas, size), cover


class _Canvas:
    """Pixels, and the pose of the head in them."""

    def __init__(self, side: int, rng: np.random.Generator) -> None:
        self.side = side
        self.rng = rng
        self.pixels: Array = np.zeros((3, side, side), np.float32)
        self.cover: Mask = np.zeros((side, side), np.uint8)  # by what was painted opaque
        self.radius = side * rng.uniform(0.24, 0.31)
        angle = rng.normal(0.0, 0.14)
        self.center = (side * rng.uniform(0.39, 0.61), side * rng.uniform(0.45, 0.59))
        stretch = rng.uniform(0.92, 1.08)
        cos, sin = self.radius * np.cos(angle), self.radius * np.sin(angle)
        self.pose = np.array([[cos * stretch, -sin / stretch], [sin * stretch, cos / stretch]])
        self.turn = rng.uniform(-0.22, 0.22)  # of the face to one side
        inverse = np.linalg.inv(self.pose)
        y, x = np.mgrid[:side, :side].astype(np.float32)
        x -= self.center[0]
        y -= self.center[1]
        self.u: Array = (inverse[0, 0] * x + inverse[0, 1] * y).astype(np.float32)
        self.v: Array = (inverse[1, 0] * x + inverse[1, 1] * y).astype(np.float32)

    def mask(self, *polygons: Points) -> Mask:
        """Cover polygons."""
        cover = np.zeros((self.side, self.side), np.uint8)
        for points in polygons:
            placed = np.asarray(points) @ self.pose.T + self.center
            cv2.fillPoly(cover, [np.round(placed * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
        return cover

    def paint(self, mask: Mask, color: AnyArray | Color, opacity: float = 1.0) -> None:
        """Lay a colour, or an image of colours, over what is there."""
        x, y, width, height = cv2.boundingRect(mask)
        box = (slice(None), slice(y, y + height), slice(x, x + width))
        color = np.asarray(color, np.float32)
        share = mask[box[1:]].astype(np.float32) * np.float32(opacity / 255)
        if opacity == 1.0:
            np.maximum(self.cover[box[1:]], mask[box[1:]], out=self.cover[box[1:]])
        self.pixels[box] += share * ((color[:, None, None] if color.ndim == 1 else color[box]) - self.pixels[box])

    def smooth_noise(self, cells: int, channels: int = 1) -> Array:
        """Random values of mean 0 and deviation 1 that change over ``side / cells`` pixels."""
        shape = (cells, cells) if channels == 1 else (channels, cells, cells)
        coarse = self.rng.standard_normal(shape, np.float32)
        sides = (self.side, self.side)
        if channels == 1:
            return np.asarray(cv2.resize(coarse, sides, interpolation=cv2.INTER_CUBIC), np.float32)
        return np.stack([cv2.resize(plane, sides, interpolation=cv2.INTER_CUBIC) for plane in coarse], dtype=np.float32)


class _Coat:
    """Furs of one animal over the whole canvas, of which parts are cut out.

    Attributes:
        plain: The ground colour.
        marking: The marking's colour, which may be the lighter one.
        colors: The two in the breed's pattern.
    """

    def __init__(self, breed: Breed, canvas: _Canvas) -> None:
        rng = canvas.rng
        self.breed = breed
        first, second = rng.choice(len(_COATS), 2, replace=False)
        while abs(sum(_COATS[first]) - sum(_COATS[second])) < 200:  # the pattern must show
            first, second = rng.choice(len(_COATS), 2, replace=False)
        tint = rng.normal(0.0, 6.0, 3)
        base = (np.array(_COATS[first]) + tint).astype(np.float32)
        marking = (np.array(_COATS[second]) + tint).astype(np.float32)
        amount = _pattern(breed, canvas)
        fur = cv2.blur(rng.standard_normal((canvas.side, canvas.side), np.float32), (1, 5))
        shade = (1.0 + 0.13 * fur + 0.05 * canvas.smooth_noise(9)).astype(np.float32)
        self.plain: Array = base[:, None, None] * shade
        self.marking: Array = marking[:, None, None] * shade
        self.colors: Array = self.plain + amount * (self.marking - self.plain)


def _pattern(breed: Breed, canvas: _Canvas) -> Array:
    """How much of the marking's colour, 0-1, is where."""
    rng, u, v = canvas.rng, canvas.u, canvas.v
    wobble = 0.12 * canvas.smooth_noise(7)
    if breed.coat == "stripes":  # bars over the head, rings on the body
        waves = np.sin(
            (np.where(v < 0.9, u * (1.0 - 0.25 * v), v) + wobble) * rng.uniform(12.0, 16.0) + rng.uniform(0, 6)
        )
        return _step(waves, 0.1, 0.35)
    if breed.coat == "spots":
        spots = np.zeros((canvas.side, canvas.side), np.uint8)
        spacing = rng.uniform(0.4, 0.48)
        for row, y in enumerate(np.arange(-1.5, 4.0, spacing)):
            for x in np.arange(-3.0, 3.0, spacing) + spacing / 2 * (row % 2):
                place = np.array([x, y]) + rng.normal(0.0, 0.06, 2)
                center = np.round((canvas.pose @ place + canvas.center) * 16).astype(int)
                radius = round(canvas.radius * rng.uniform(0.11, 0.15) * 16)
                cv2.circle(spots, (int(center[0]), int(center[1])), radius, 255, -1, cv2.LINE_AA, 4)
        return spots.astype(np.float32) / np.float32(255)
    if breed.coat == "patches":
        return _step(canvas.smooth_noise(int(rng.integers(5, 7))) + 0.5 * wobble, 0.0, 0.12)
    face_u = u - canvas.turn
    if breed.coat == "mask":  # around muzzle and eyes
        return _step(1.0 - (face_u / 0.68) ** 2 - ((v - 0.25) / 0.62) ** 2 + wobble, 0.0, 0.35) * (v < 1.2)
    # saddle: the upper half of the head and the back, a blaze left free
    blaze = _step(0.2 + 0.12 * v - np.abs(face_u), 0.0, 0.05)
    return _step(0.02 - v + wobble, 0.0, 0.12) * (1.0 - blaze) + _step(v - 1.9 + wobble, 0.0, 0.2)


def _draw_background(canvas: _Canvas) -> None:
    rng = canvas.rng
    far, near = ((rng.uniform(60, 205) + rng.normal(0.0, 24.0, 3)).astype(np.float32) for _ in range(2))
    horizon = canvas.side * rng.uniform(0.3, 0.85)
    tilt = rng.normal(0.0, 0.12)
    y, x = np.mgrid[: canvas.side, : canvas.side].astype(np.float32)
    ground = _step(y - horizon + tilt * (x - canvas.side / 2), 0.0, canvas.side * rng.uniform(0.01, 0.15))
    canvas.pixels = far[:, None, None] + ground * (near - far)[:, None, None]
    canvas.pixels += np.float32(rng.uniform(4, 12)) * canvas.smooth_noise(int(rng.integers(3, 9)), 3)
    canvas.pixels += np.float32(rng.uniform(2, 8)) * (canvas.smooth_noise(int(rng.integers(16, 48))) * ground)
    for _ in range(int(rng.integers(0, 4))):  # lights, leaves and furniture, out of focus
        blob = np.zeros((canvas.side, canvas.side), np.uint8)
        center = tuple(int(value) for value in rng.integers(0, canvas.side, 2))
        axes = tuple(int(value) for value in rng.uniform(0.04, 0.22, 2) * canvas.side)
        cv2.ellipse(blob, center, axes, float(rng.uniform(0, 180)), 0, 360, 255, -1)
        soft = cv2.blur(blob, (canvas.side // 16 + 1,) * 2)
        canvas.paint(
            np.asarray(soft, np.uint8), (rng.uniform(40, 220) + rng.normal(0.0, 22.0, 3)).astype(np.float32), 0.6
        )


def _draw_body(canvas: _Canvas, coat: _Coat) -> None:
    width = canvas.rng.uniform(0.95, 1.25) * (0.9 if coat.breed.is_cat else 1.05)
    lean = canvas.rng.normal(0.0, 0.18)
    body = canvas.mask(_ellipse(lean, 2.5, width, 2.0), _ellipse(0.0, 0.75, 0.72 * width, 0.7))
    canvas.paint(body, coat.colors * (0.72 + 0.1 * np.clip(np.abs(canvas.u), 0, 1.5)))
    if canvas.rng.random() < 0.5:  # a collar
        band = _step(0.09 - np.abs(canvas.v - 1.12 - 0.25 * (1 - canvas.u**2)), 0.0, 0.04)
        canvas.paint(np.asarray(body * band, np.uint8), canvas.rng.uniform(20, 230, 3).astype(np.float32))


def _draw_head(canvas: _Canvas, coat: _Coat) -> None:
    rng, breed = canvas.rng, coat.breed
    width, height = breed.head
    shadow = cv2.blur(canvas.mask(_ellipse(0.0, 0.3, width, height)), (int(canvas.radius * 0.4),) * 2)
    canvas.paint(np.asarray(shadow, np.uint8), (0.0, 0.0, 0.0), 0.3)
    behind = breed.ears != "floppy"
    if breed.ears == "prick":  # a spitz has a mane
        spikes = np.linspace(0, 2 * np.pi, 36, endpoint=False) + rng.uniform(0, 0.3)
        reach = np.where(np.arange(36) % 2, 1.16, 1.42) + rng.normal(0.0, 0.03, 36)
        mane = list(zip((reach * np.cos(spikes)).tolist(), (0.34 + reach * np.sin(spikes)).tolist(), strict=True))
        canvas.paint(canvas.mask(mane), coat.plain * np.float32(0.9))
    if behind:
        _draw_ears(canvas, coat)
    round_light = 1.08 - 0.3 * (canvas.u**2 + canvas.v**2) * 0.6
    head = canvas.mask(_head_outline(breed, width, height))
    canvas.paint(head, coat.colors * np.clip(round_light, 0.6, 1.1))
    _draw_muzzle(canvas, coat)
    _draw_eyes(canvas, coat)
    if not behind:
        _draw_ears(canvas, coat)
    if breed.is_cat:
        _draw_whiskers(canvas, bright=bool(rng.random() < 0.8))


def _draw_ears(canvas: _Canvas, coat: _Coat) -> None:
    rng, ears = canvas.rng, coat.breed.ears
    for side in (-1.0, 1.0):
        wiggle = rng.normal(0.0, 0.05)
        stretch = 1.0 - side * canvas.turn * 0.6  # the ear that turns away looks narrower

        def place(points: Points, side: float = side, wiggle: float = wiggle, stretch: float = stretch) -> Points:
            return [(side * x * stretch + wiggle * (0.4 - y), y) for x, y in points]

        if ears in ("pointed", "tufted"):
            tip = -1.42 if ears == "tufted" else -1.28
            outer = place([(0.98, -0.05), (0.96, -0.7), (0.86, tip), (0.5, -1.0), (0.14, -0.78)])
            inner = place([(0.86, -0.45), (0.84, -0.8), (0.81, tip + 0.2), (0.55, -0.9), (0.36, -0.72)])
            canvas.paint(canvas.mask(outer), (coat.marking if ears == "tufted" else coat.colors) * np.float32(0.85))
            canvas.paint(canvas.mask(inner), (205.0, 150.0, 145.0), 0.75)
            if ears == "tufted":
                tuft = place([(0.8, tip + 0.16), (0.97, tip - 0.42), (0.92, tip + 0.2)])
                canvas.paint(canvas.mask(tuft), coat.marking * np.float32(0.6))
        elif ears == "prick":
            outer = place([(0.88, -0.15), (0.86, -0.85), (0.72, -1.34), (0.48, -1.2), (0.2, -0.72)])
            inner = place([(0.74, -0.5), (0.74, -0.85), (0.67, -1.12), (0.54, -1.04), (0.36, -0.68)])
            canvas.paint(canvas.mask(_rounded(outer)), coat.colors * np.float32(0.85))
            canvas.paint(canvas.mask(_rounded(inner)), (120.0, 84.0, 80.0), 0.7)
        elif ears == "floppy":
            drop = _ellipse(1.0, 0.32, 0.34, 0.98, degrees=-9.0)
            texture = coat.marking if rng.random() < 0.5 else coat.plain
            canvas.paint(canvas.mask(place(_ellipse(1.03, 0.36, 0.37, 1.02, degrees=-9.0))), (0.0, 0.0, 0.0), 0.25)
            canvas.paint(canvas.mask(place(drop)), texture * (0.95 - 0.15 * canvas.v))
        else:
            canvas.paint(canvas.mask(place(_ellipse(0.68, -0.82, 0.4, 0.4))), coat.colors * np.float32(0.85))
            canvas.paint(canvas.mask(place(_ellipse(0.7, -0.78, 0.22, 0.24))), (190.0, 136.0, 130.0), 0.7)


def _draw_muzzle(canvas: _Canvas, coat: _Coat) -> None:
    rng, turn = canvas.rng, canvas.turn * 1.3
    pale = np.clip(coat.plain * np.float32(0.55) + np.float32(105.0), 0, 250)
    ink: Color = (36.0, 26.0, 26.0)
    if coat.breed.is_cat:
        lips = canvas.mask(_ellipse(turn - 0.17, 0.42, 0.22, 0.17), _ellipse(turn + 0.17, 0.42, 0.22, 0.17))
        chin = canvas.mask(_ellipse(turn, 0.56, 0.16, 0.14))
        own = coat.breed.coat == "mask"
        canvas.paint(np.maximum(lips, chin), coat.marking * np.float32(1.08) if own else pale, 0.8)
        nose: Color = (196.0, 120.0, 116.0) if rng.random() < 0.6 else (70.0, 48.0, 50.0)
        canvas.paint(canvas.mask([(turn - 0.1, 0.22), (turn + 0.1, 0.22), (turn, 0.34)]), nose)
        canvas.paint(canvas.mask(_stroke([(turn, 0.34), (turn, 0.44)], 0.02)), ink, 0.8)
        for side in (-1, 1):
            smile = [(turn, 0.44), (turn + side * 0.1, 0.51), (turn + side * 0.22, 0.48)]
            canvas.paint(canvas.mask(_stroke(smile, 0.018)), ink, 0.8)
        return
    length = 0.5 if coat.breed.ears == "floppy" else 0.42
    snout = canvas.mask(_ellipse(turn, 0.5, 0.4, length))
    own_snout = rng.random() < 0.5
    canvas.paint(snout, coat.colors * np.float32(1.1) if own_snout else pale, 0.9)
    if rng.random() < 0.35:  # tongue
        canvas.paint(canvas.mask(_ellipse(turn, 0.86, 0.12, 0.2)), (214.0, 110.0, 118.0))
    mouth = [(turn - 0.26, 0.66), (turn - 0.12, 0.76), (turn, 0.7), (turn + 0.12, 0.76), (turn + 0.26, 0.66)]
    canvas.paint(canvas.mask(_stroke(mouth, 0.022), _stroke([(turn, 0.4), (turn, 0.7)], 0.02)), ink, 0.8)
    canvas.paint(canvas.mask(_ellipse(turn, 0.29, 0.17, 0.13)), ink)
    canvas.paint(canvas.mask(_ellipse(turn - 0.05, 0.25, 0.05, 0.03)), (190.0, 190.0, 195.0), 0.7)


def _draw_eyes(canvas: _Canvas, coat: _Coat) -> None:
    rng, turn = canvas.rng, canvas.turn
    cat = coat.breed.is_cat
    palette = _CAT_EYES if cat else _DOG_EYES
    iris = palette[int(rng.integers(len(palette)))]
    width, height = (0.2, rng.uniform(0.12, 0.17)) if cat else (0.13, 0.13)
    for side in (-1.0, 1.0):
        x, y = turn + side * (0.42 if cat else 0.34), -0.1 if cat else -0.16
        tilt = side * (-12.0 if cat else 0.0)
        canvas.paint(canvas.mask(_ellipse(x, y, width + 0.04, height + 0.04, tilt)), (28.0, 22.0, 22.0), 0.85)
        canvas.paint(canvas.mask(_ellipse(x, y, width, height, tilt)), iris)
        pupil = (rng.uniform(0.04, 0.07), height * 0.95) if cat else (0.075, 0.075)
        canvas.paint(canvas.mask(_ellipse(x, y, *pupil)), (14.0, 12.0, 14.0))
        canvas.paint(canvas.mask(_ellipse(x + 0.05, y - 0.05, 0.03, 0.03)), (250.0, 250.0, 250.0), 0.95)


def _draw_whiskers(canvas: _Canvas, *, bright: bool) -> None:
    rng, turn = canvas.rng, canvas.turn * 1.3
    strokes = [
        _stroke(
            [(turn + side * 0.25, 0.4 + 0.05 * row), (turn + side * 1.15, 0.3 + 0.17 * row + rng.normal(0, 0.05))],
            0.011,
        )
        for side in (-1, 1)
        for row in range(3)
    ]
    color: Color = (240.0, 240.0, 240.0) if bright else (50.0, 45.0, 45.0)
    canvas.paint(canvas.mask(*strokes), color, 0.7)


def _photograph(canvas: _Canvas, size: int) -> npt.NDArray[np.uint8]:
    """Light from one side, its temperature, exposure; then the sensor's resolution and noise."""
    rng = canvas.rng
    direction = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0.0, 0.22) * (np.cos(direction) * canvas.u + np.sin(direction) * canvas.v) * 0.6
    temperature = 1.0 + rng.normal(0.0, 0.07) * np.array([1.0, 0.0, -1.0])
    lit = canvas.pixels * (1.0 + slope.astype(np.float32))
    gain = temperature * rng.uniform(0.75, 1.2)
    small = cv2.resize(lit.transpose(1, 2, 0), (size, size), interpolation=cv2.INTER_AREA) * gain.astype(np.float32)
    small += np.float32(rng.uniform(2.0, 6.0)) * rng.standard_normal(small.shape, np.float32) + rng.uniform(-12, 12)
    return np.asarray(np.clip(small, 0, 255), np.uint8)


def _step(values: AnyArray, middle: float, width: float) -> Array:
    """0 below, 1 above, a ramp of the given width between."""
    return np.asarray(np.clip((values - middle) / width + 0.5, 0.0, 1.0), np.float32)


def _ellipse(x: float, y: float, width: float, height: float, degrees: float = 0.0) -> Points:
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    turn = np.deg2rad(degrees)
    along, across = width * np.cos(angle), height * np.sin(angle)
    xs = x + along * np.cos(turn) - across * np.sin(turn)
    ys = y + along * np.sin(turn) + across * np.cos(turn)
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def _head_outline(breed: Breed, width: float, height: float) -> Points:
    """An ellipse with a cat's cheeks or a dog's jaw."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    jaw = 1.0 + (0.07 if breed.is_cat else -0.08) * np.sin(angle) * np.abs(np.cos(angle)) * 2
    xs, ys = width * jaw * np.cos(angle), height * np.sin(angle)
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def _rounded(points: Points) -> Points:
    """Cut a polygon's corners twice (Chaikin 1974)."""
    for _ in range(2):
        ring = [*points, points[0]]
        points = [
            (a[0] * (1 - share) + b[0] * share, a[1] * (1 - share) + b[1] * share)
            for a, b in pairwise(ring)
            for share in (0.25, 0.75)
        ]
    return points


def _stroke(points: Points, half_width: float) -> Points:
    """Give a line a width."""
    line = np.asarray(points)
    step = np.gradient(line, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], 1) / (np.linalg.norm(step, axis=1, keepdims=True) + 1e-9) * half_width
    outline = np.concatenate([line + normal, (line - normal)[::-1]])
    return [(float(x), float(y)) for x, y in outline]

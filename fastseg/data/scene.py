"""Synthetic street scenes with CamVid's 11 classes: the drawing of one.

A scene is a small world in metres (x right, y up from the road, z ahead of the camera), painted far to near by Pillow.
It is the same world at every size: all its random numbers are drawn before anything that depends on the size, the noise
of single pixels comes last. Classes share their colours on purpose (grey sky, road and houses; green cars; dark coats
before dark poles), so colour alone labels little and a network has to learn shape and place.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fastseg.data.classes import VOID, Color
from fastseg.errors import UsageError

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
FAR = 120.0  # metres; the street ends here

_GREYS = ((70, 70, 72), (95, 95, 98), (120, 118, 116), (140, 140, 140), (105, 100, 95), (165, 163, 160))
_SKIES = ((120, 160, 210), (205, 205, 205), (150, 150, 155), (235, 235, 235), (190, 150, 130), (95, 100, 115))
_FACADES = (*_GREYS, (160, 90, 70), (200, 185, 150), (215, 212, 205), (110, 125, 95), (170, 130, 95), (130, 150, 170))
_LEAVES = ((60, 85, 45), (90, 105, 50), (50, 60, 40), (120, 95, 50), (95, 95, 75), (140, 130, 60))
_PAINTS = (*_GREYS, (35, 35, 38), (215, 215, 215), (70, 95, 60), (140, 40, 35), (50, 70, 130), (190, 175, 130))
_CLOTHES = (*_PAINTS, (30, 30, 35), (45, 45, 60), (95, 70, 50), (150, 100, 110))
_PLATES = ((40, 70, 150), (180, 40, 40), (225, 225, 225), (200, 170, 50), (50, 110, 70), (120, 120, 125))

Point = tuple[float, float, float]


class _Scene:
    """Image and label under one pen, with the camera and the weather. Every number here is free of the image's size."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng = rng
        self.height, self.width = size
        self.image, self.label = Image.new("RGB", size[::-1]), Image.new("L", size[::-1], SKY)
        self.shade = Image.new("L", size[::-1], 255)
        self.pen, self.mark, self.dim = (ImageDraw.Draw(i) for i in (self.image, self.label, self.shade))
        u = self.uniform
        self.focal, self.eye = u(0.8, 1.05), u(1.25, 1.6)  # focal length in image heights, camera in metres
        self.horizon, self.vanish = u(0.4, 0.52), u(0.36, 0.64)  # fractions of height and width
        self.bend = u(-1.2e-3, 1.2e-3)  # the street's curve, 1/m
        self.sun = self.chance(0.5)  # hard shadows
        self.dusk = self.chance(0.25)
        self.haze, self.clear = self.tone(_SKIES), u(60, 400)  # what far things fade to, and over how many metres
        widths = [u(2.6, 3.8), u(3.6, 6.5)]
        left, right = widths if self.chance(0.5) else widths[::-1]
        self.kerb = {-1: -left, 1: right}
        self.wall = {side: self.kerb[side] + side * u(1.4, 3.4) for side in (-1, 1)}

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def tone(self, palette: Sequence[Color], spread: float = 10) -> Color:
        """One of the palette's colours, lighter or darker and a little off."""
        base = np.array(palette[int(self.rng.integers(len(palette)))])
        r, g, b = (
            np.clip(base * self.rng.uniform(0.75, 1.2) + self.rng.normal(0, spread, 3), 8, 250).astype(int).tolist()
        )
        return r, g, b

    def scale(self, z: float) -> float:
        """Pixels per metre at depth z."""
        return self.focal * self.height / z

    def at(self, point: Point) -> tuple[float, float]:
        """Pixel (x, y) of a world point."""
        x, y, z = point
        k = self.scale(z)
        return self.vanish * self.width + k * (x + self.bend * z * z), self.horizon * self.height + k * (self.eye - y)

    def hazed(self, color: Color, z: float) -> Color:
        fade = 1 - math.exp(-z / self.clear)
        r, g, b = (int(c + (h - c) * fade) for c, h in zip(color, self.haze, strict=True))
        return r, g, b

    def poly(self, points: Sequence[Point], color: Color, cls: int | None = None) -> None:
        """Fill a polygon; without a class only the image changes: detail of the thing below."""
        spots = [self.at(p) for p in points]
        self.pen.polygon(spots, self.hazed(color, sum(p[2] for p in points) / len(points)))
        if cls is not None:
            self.mark.polygon(spots, cls)

    def disc(self, center: Point, rx: float, ry: float, color: Color, cls: int | None = None) -> None:
        (x, y), k = self.at(center), self.scale(center[2])
        box = (x - rx * k, y - ry * k, x + rx * k, y + ry * k)
        self.pen.ellipse(box, self.hazed(color, center[2]))
        if cls is not None:
            self.mark.ellipse(box, cls)

    def bar(self, start: Point, end: Point, width: float, color: Color, cls: int | None = None) -> None:
        """A line `width` metres thick; with a class at least 2 px, so that no size in use loses it."""
        ends = [self.at(start), self.at(end)]
        pixels = max(1 if cls is None else 2, round(width * self.scale(start[2])))
        self.pen.line(ends, self.hazed(color, start[2]), pixels)
        if cls is not None:
            self.mark.line(ends, cls, pixels)

    def strip(self, x0: float, x1: float, z0: float, z1: float, color: Color, cls: int | None = None) -> None:
        """A band on the ground along the street, following its bend."""
        zs = np.geomspace(z0, z1, 2 if z1 < 3 * z0 else 9).tolist()
        self.poly([(x0, 0, z) for z in zs] + [(x1, 0, z) for z in reversed(zs)], color, cls)

    def face(self, x0: float, x1: float, y0: float, y1: float, z: float, color: Color, cls: int | None = None) -> None:
        """An upright rectangle that faces the camera."""
        self.poly([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], color, cls)

    def side(self, x: float, y0: float, y1: float, z0: float, z1: float, color: Color, cls: int | None = None) -> None:
        """An upright rectangle along the street."""
        self.poly([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], color, cls)

    def shadow(self, x: float, z: float, rx: float, rz: float) -> None:
        """A dark patch on the ground: the image alone is dimmed, later."""
        corners = [(x - rx, z - rz), (x + rx, z - rz), (x + rx, z + rz), (x - rx, z + rz)]
        self.dim.polygon([self.at((a, 0, max(1.0, b))) for a, b in corners], 110 if self.sun else 190)


def _shaded(color: Color, factor: float) -> Color:
    r, g, b = (min(250, int(c * factor)) for c in color)
    return r, g, b


def _sky_and_ground(s: _Scene) -> None:
    top, u = s.tone(_SKIES), s.uniform
    for row in range(24):
        share = row / 24
        color = tuple(int(a + (b - a) * share) for a, b in zip(top, s.haze, strict=True))
        y = s.horizon * s.height * share
        s.pen.rectangle((0, y, s.width, s.height), color)
    for _ in range(int(s.rng.integers(0, 9))):
        s.disc((u(-90, 90), u(12, 60), FAR), u(8, 30), u(1, 6), s.tone([s.haze, top]))
    far = s.rng.random()
    if far < 0.35:
        for x in np.linspace(-80, 80, 9).tolist():
            s.face(x, x + u(15, 30), 0, u(4, 22), FAR, s.tone(_FACADES), BUILDING)
    elif far < 0.75:
        leaf = s.tone(_LEAVES)
        for x in np.linspace(-80, 80, 17).tolist():
            s.disc((x, 2, FAR), u(8, 14), u(6, 15), _shaded(leaf, u(0.8, 1.2)), TREE)
    slabs, asphalt = s.tone(_GREYS, 14), s.tone(_GREYS, 14)
    s.strip(-90, 90, 1, FAR, slabs, PAVEMENT)
    s.strip(s.kerb[-1], s.kerb[1], 1, FAR, asphalt, ROAD)
    for _ in range(5):  # repairs and worn tracks
        x, z = u(s.kerb[-1], s.kerb[1] - 1), u(2, 15)
        s.strip(x, x + u(0.4, 1), z, z * u(1.2, 3), _shaded(asphalt, u(0.85, 1.15)))
    for z in np.geomspace(3, 20, 8).tolist():
        for side in (-1, 1):
            s.strip(s.kerb[side], s.wall[side], z, z * 1.02, _shaded(slabs, 0.85))
    for side in (-1, 1):
        s.strip(s.kerb[side], s.kerb[side] + side * 0.2, 1, FAR, _shaded(slabs, 1.15))
    _markings(s, _shaded((225, 222, 205), u(0.6, 1)))
    if s.sun:
        side = -1 if s.chance(0.5) else 1
        for z in np.geomspace(3, 60, 6).tolist():  # the houses' shadow, gaps between them
            s.shadow(s.wall[side], z, abs(s.wall[side]) * u(0.3, 1.3), z * u(0.05, 0.25))


def _markings(s: _Scene, paint: Color) -> None:
    """Painted lines: road like all the rest of it."""
    middle = (s.kerb[-1] + s.kerb[1]) / 2
    if s.chance(0.75):
        start, step = s.uniform(2, 4), s.uniform(3, 6)
        for i in range(9):
            s.strip(middle - 0.09, middle + 0.09, start + i * step, start + (i + s.uniform(0.4, 0.6)) * step, paint)
    for side in (-1, 1):
        if s.chance(0.5):
            s.strip(s.kerb[side] - side * 0.4, s.kerb[side] - side * 0.55, 1, FAR, paint)
    if s.chance(0.2):
        z = s.uniform(5, 12)
        for x in np.arange(s.kerb[-1] + 0.3, s.kerb[1] - 0.3, 1.0).tolist():
            s.strip(x, x + 0.5, z, z + 2.5, paint)


def _house(s: _Scene, side: int, x: float, z0: float, z1: float, height: float) -> None:
    color, u = s.tone(_FACADES), s.uniform
    glass, light = s.tone(_GREYS) if s.chance(0.6) else s.haze, u(0.7, 1.2)
    if s.dusk and s.chance(0.5):
        glass = (235, 200, 120)
    if s.chance(0.4):
        ridge, roof = height + u(1, 3), s.tone(_FACADES)
        back = x + side * 3
        s.poly([(x, height, z0), (x, height, z1), (back, ridge, z1), (back, ridge, z0)], roof, BUILDING)
        s.poly([(x, height, z0), (back, ridge, z0), (x + side * 6, height, z0)], _shaded(color, light), BUILDING)
    s.face(x, x + side * 12, 0, height, z0, _shaded(color, light), BUILDING)
    s.side(x, 0, height, z0, z1, color, BUILDING)
    shop, columns = s.chance(0.4), int(s.rng.integers(2, 5))
    if shop:
        s.side(x, 0.4, 2.6, z0 + 0.4, z1 - 0.4, s.tone(_GREYS))
        s.side(x, 2.7, 3.4, z0 + 0.2, z1 - 0.2, s.tone(_PLATES))
    pitch = (z1 - z0) / columns
    for floor in np.arange(3.9 if shop else 1, height - 1.5, 2.9).tolist():
        for column in range(columns):
            z = z0 + (column + 0.3) * pitch
            s.side(x, floor, floor + 1.5, z, z + 0.45 * pitch, _shaded(glass, u(0.8, 1.1)))
            s.face(x + side * (1 + 2.5 * column), x + side * (2.2 + 2.5 * column), floor, floor + 1.5, z0, glass)


def _garden(s: _Scene, side: int, x: float, z0: float, z1: float) -> None:
    """A gap between houses: hedge, board fence or railing, and trees behind it."""
    for _ in range(int(s.rng.integers(0, 4))):
        _tree(s, x + side * s.uniform(1.5, 5), s.uniform(z0, z1))
    hedge = s.tone(_LEAVES)
    s.face(x, x + side * 12, 0, s.uniform(1, 2), z0, hedge, TREE)
    if s.chance(0.45) or z0 > 20:
        s.side(x, 0, s.uniform(1, 2.2), z0, z1, _shaded(hedge, 1.1), TREE)
    else:
        s.side(x, 0, 1, z0, z1, hedge, TREE)
        _fence(s, x, z0, z1)


def _fence(s: _Scene, x: float, z0: float, z1: float) -> None:
    """Labelled as a whole, as in CamVid, though one sees through its bars."""
    height, color = s.uniform(0.9, 1.7), s.tone((*_GREYS, (120, 90, 60), (70, 90, 70), (40, 40, 45)))
    if s.chance(0.4):
        s.side(x, 0, height, z0, z1, color, FENCE)
    corners = [s.at(p) for p in ((x, 0, z0), (x, 0, z1), (x, height, z1), (x, height, z0))]
    s.mark.polygon(corners, FENCE)
    bars = _shaded(color, s.uniform(0.7, 1.2))
    for share in np.linspace(0, 1, 12).tolist():
        z = z0 * (z1 / z0) ** share
        s.bar((x, 0, z), (x, height, z), 0.07, bars)
    for y in (0.2, height):
        s.bar((x, y, z0), (x, y, z1), 0.08, bars)


def _tree(s: _Scene, x: float, z: float) -> None:
    height, spread, leaf, u = s.uniform(4, 9), s.uniform(1, 2.2), s.tone(_LEAVES), s.uniform
    s.shadow(x, z, spread, 1.5)
    s.bar((x, 0, z), (x + u(-0.3, 0.3), height * 0.6, z), u(0.25, 0.45), s.tone(((80, 65, 50), (60, 58, 55))), TREE)
    for _ in range(14):
        spot = (x + u(-1, 1) * spread, height * u(0.45, 0.95), z)
        s.disc(spot, spread * u(0.3, 0.6), height * u(0.08, 0.16), _shaded(leaf, u(0.65, 1.25)), TREE)
    for _ in range(24):  # clumps of leaves, lit or not
        spot = (x + u(-1, 1) * spread, height * u(0.45, 0.95), z)
        s.disc(spot, u(0.1, 0.25), u(0.1, 0.25), _shaded(leaf, u(0.5, 1.5)))


def _pole(s: _Scene, side: int, x: float, z: float, sign: bool) -> None:
    """A lamp post, or a sign or traffic light on its pole."""
    color, u = s.tone((*_GREYS, (40, 40, 42), (95, 75, 55))), s.uniform
    height = u(2.6, 3.6) if sign else u(4.5, 7.5)
    s.bar((x, 0, z), (x, height, z), u(0.17, 0.27), color, POLE)
    if not sign:
        if s.chance(0.6):
            s.bar((x, height, z), (x - side * u(0.8, 1.8), height + 0.2, z), 0.16, color, POLE)
        return
    plate, kind, r = s.tone(_PLATES), int(s.rng.integers(5)), u(0.45, 0.7)
    y, inner = height - r, s.tone(_PLATES)
    if kind == 0:
        s.disc((x, y, z), r, r, plate, SIGN)
        s.disc((x, y, z), 0.65 * r, 0.65 * r, inner)
    elif kind == 1:
        for size, cls, paint in ((1.0, SIGN, plate), (0.55, None, inner)):
            s.poly([(x - r * size, y - r * size, z), (x + r * size, y - r * size, z), (x, y + r * size, z)], paint, cls)
    elif kind == 2:  # traffic light
        s.face(x - 0.3, x + 0.3, y - 0.7, y + 0.7, z, (35, 35, 35), SIGN)
        lamp = int(s.rng.integers(3))
        s.disc((x, y - 0.45 + 0.45 * lamp, z), 0.2, 0.2, ((60, 210, 120), (240, 180, 50), (235, 60, 50))[lamp])
    else:  # a board: parking, directions
        w, h = r * (1 if kind == 3 else 1.7), r * 0.9
        s.face(x - w, x + w, y - h, y + h, z, plate, SIGN)
        s.face(x - 0.6 * w, x + 0.6 * w, y - 0.2 * h, y + 0.5 * h, z, inner)


def _car(s: _Scene, x: float, z: float) -> None:
    """A box with a cabin: the face towards us and, where it stands aside, the flank."""
    paint, u = s.tone(_PAINTS), s.uniform
    half, long, waist, roof = u(0.8, 0.95), u(3.6, 4.8), u(0.8, 1.0), u(1.35, 1.9)
    glass, flank = s.tone(((40, 45, 50), (90, 100, 110), (150, 160, 170))), x - math.copysign(half, x)
    s.shadow(x, z + long / 2, half + 0.3, long / 2 + 0.4)
    inset = 0.12
    s.poly([(flank, waist, z + 0.2), (flank, waist, z + long * 0.8), (flank, roof, z + long * 0.6),
            (flank, roof, z + 0.5)], paint, CAR)  # fmt: skip
    s.poly([(flank, waist, z + 0.5), (flank, waist, z + long * 0.7), (flank, roof - 0.1, z + long * 0.57),
            (flank, roof - 0.1, z + 0.7)], glass)  # fmt: skip
    s.side(flank, 0.2, waist, z, z + long, _shaded(paint, 0.9), CAR)
    for wheel in (z + long * 0.18, z + long * 0.8):
        narrow = 0.33 * min(1.0, abs(flank) / wheel)  # a wheel seen along the street is a thin ellipse
        s.disc((flank, 0.33, wheel), max(narrow, 0.1), 0.33, (25, 25, 27), CAR)
    s.face(x - half, x + half, 0.25, waist, z, paint, CAR)
    s.poly([(x - half, waist, z), (x + half, waist, z), (x + half - inset, roof, z + 0.5),
            (x - half + inset, roof, z + 0.5)], paint, CAR)  # fmt: skip
    s.poly([(x - half + 0.12, waist, z), (x + half - 0.12, waist, z), (x + half - 0.25, roof - 0.12, z + 0.4),
            (x - half + 0.25, roof - 0.12, z + 0.4)], glass)  # fmt: skip
    lamps = (190, 40, 35) if s.chance(0.6) else (245, 240, 220)
    for sign in (-1, 1):
        s.face(x + sign * half, x + sign * (half - 0.25), 0.55, 0.75, z, lamps)
        s.face(x + sign * half, x + sign * (half - 0.22), 0, 0.28, z, (25, 25, 27), CAR)
    s.face(x - 0.26, x + 0.26, 0.38, 0.52, z, (220, 215, 190))


def _pedestrian(s: _Scene, x: float, z: float) -> None:
    """Legs, a coat, a head; tall and narrow, in colours that cars and poles have too."""
    coat, legs, u = s.tone(_CLOTHES), s.tone(_CLOTHES), s.uniform
    height, half = u(1.55, 1.9), u(0.2, 0.28)
    hip, neck, stride = 0.48 * height, 0.82 * height, u(0.02, 0.22)
    s.shadow(x, z, 0.4, 0.3)
    for sign in (-1, 1):
        s.bar((x + sign * stride, 0, z), (x + sign * 0.08, hip, z), 0.17, legs, PEDESTRIAN)
    s.poly([(x - half, neck, z), (x + half, neck, z), (x + 0.85 * half, hip, z), (x - 0.85 * half, hip, z)],
           coat, PEDESTRIAN)  # fmt: skip
    s.disc((x, height - 0.12, z), 0.12, 0.15, s.tone(((200, 160, 130), (120, 85, 65), (60, 45, 40))), PEDESTRIAN)
    if s.chance(0.4):
        s.face(x + half, x + half + 0.2, hip - 0.1, hip + 0.4, z, s.tone(_PAINTS), PEDESTRIAN)


def _bicyclist(s: _Scene, x: float, z: float) -> None:
    """A rider above two wheels, seen from the side or from behind; rider and bicycle are one class, as in CamVid."""
    coat, frame, u = s.tone(_CLOTHES), s.tone(_PAINTS), s.uniform
    reach = u(0.15, 0.62)  # half the distance between the wheels' axles, as we see it
    wheel = max(0.08, 0.34 * reach / 0.55)
    s.shadow(x, z, reach + 0.3, 0.4)
    for sign in (-1, 1):
        s.disc((x + sign * reach, 0.34, z), wheel, 0.34, (30, 30, 32), BICYCLIST)
        s.disc((x + sign * reach, 0.34, z), 0.7 * wheel, 0.25, _shaded(s.haze, 0.7))
    s.bar((x - reach, 0.36, z), (x + reach, 0.75, z), 0.1, frame, BICYCLIST)
    s.bar((x - 0.1, 0.9, z), (x + 0.1, 0.35, z), 0.2, s.tone(_CLOTHES), BICYCLIST)
    lean = u(0, 0.35) * reach
    s.poly([(x - 0.2, 0.9, z), (x + 0.2, 0.9, z), (x + lean + 0.24, 1.45, z), (x + lean - 0.24, 1.45, z)],
           coat, BICYCLIST)  # fmt: skip
    s.bar((x + lean, 1.35, z), (x + reach, 1.0, z), 0.12, coat, BICYCLIST)
    s.disc((x + lean + 0.05, 1.62, z), 0.14, 0.17, s.tone((*_PLATES, (60, 45, 40))), BICYCLIST)


def _street(s: _Scene) -> None:
    """Everything that stands on the ground, far to near, so that near things cover far ones."""
    u, things = s.uniform, []
    for side in (-1, 1):
        z, wall = u(3, 9), s.wall[side]
        while z < FAR * 0.8:
            length = u(7, 16)
            height = u(5, 16)
            if s.chance(0.68):
                things.append((z, partial(_house, s, side, wall, z, z + length, height)))
            else:
                things.append((z, partial(_garden, s, side, wall, z, z + length)))
            z += length + (u(0, 3) if s.chance(0.3) else 0)
        verge = s.kerb[side] + side * 0.5  # street furniture stands along the kerb
        for z in np.cumsum(s.rng.uniform(5, 14, 6)).tolist():
            kind = s.rng.random()
            if kind < 0.6:
                things.append((z, partial(_pole, s, side, verge, z, s.chance(0.55))))
            elif kind < 0.8:
                things.append((z, partial(_tree, s, verge + side * 0.3, z)))
            elif kind < 0.9:
                things.append((z, partial(_fence, s, s.kerb[side] + side * 0.3, z, z + u(3, 6))))
        for _ in range(int(s.rng.integers(1, 4))):
            z = u(4, 22)
            things.append((z, partial(_pedestrian, s, (s.kerb[side] + wall) / 2 + u(-0.5, 0.5), z)))
        for z in np.cumsum(s.rng.uniform(4.5, 15, int(s.rng.integers(0, 4)))).tolist():
            things.append((z, partial(_car, s, s.kerb[side] - side * u(1.0, 1.3), z)))
    middle = (s.kerb[-1] + s.kerb[1]) / 2
    for _ in range(int(s.rng.integers(0, 3))):
        z = u(8, 45)
        things.append((z, partial(_car, s, middle + u(-0.6, 0.6) * s.kerb[1], z)))
    for _ in range(int(s.rng.integers(0, 3))):
        z = u(4, 18)
        things.append((z, partial(_bicyclist, s, u(s.kerb[-1] + 0.8, s.kerb[1] - 0.8), z)))
    if s.chance(0.3):
        z = u(5, 15)
        things.append((z, partial(_pedestrian, s, u(s.kerb[-1], s.kerb[1]), z)))
    for _, draw in sorted(things, key=lambda thing: -thing[0]):
        draw()


def draw_scene(seed: int, index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of `seed`: image uint8[H, W, 3] and label uint8[H, W], classes 0..10 in CamVid's order, VOID = 255.

    Raises:
        UsageError: a size below 32 x 32, where classes vanish.
    """
    if min(size) < 32:
        raise UsageError(f"--size {size[0]}x{size[1]}: scenes need 32x32 or more")
    s = _Scene(np.random.default_rng([seed, index]), size)
    _sky_and_ground(s)
    _street(s)
    s.mark.rectangle((0, s.height - max(1, s.height // 60), s.width, s.height), VOID)  # the car's own bonnet
    s.pen.rectangle((0, s.height - max(1, s.height // 60), s.width, s.height), (30, 30, 32))
    tint, gain = s.rng.normal(1, 0.05, 3), s.uniform(0.45, 0.75) if s.dusk else s.uniform(0.85, 1.2)
    gamma, blur, grain = s.uniform(0.8, 1.25), s.uniform(0, 0.9), s.uniform(2, 9)
    noise = np.random.default_rng(
        [seed, index, 1]
    )  # of single pixels, so that the scene itself is the same at any size
    soft = s.image.filter(ImageFilter.GaussianBlur(blur * s.height / 360))
    shade = np.asarray(s.shade.filter(ImageFilter.GaussianBlur(s.height / 120)), np.float32)[..., None] / 255
    # Shade falls on the ground only: what stands on it keeps its light.
    label = np.asarray(s.label)
    ground = np.isin(label, (ROAD, PAVEMENT))[..., None]
    lit = np.asarray(soft, np.float32) / 255 * np.where(ground, shade, 1)
    light = (lit ** np.float32(gamma) * (gain * tint)).astype(np.float32) * 255
    light += noise.normal(0, grain, light.shape).astype(np.float32)
    light += noise.normal(0, 3, (*light.shape[:2], 1)).astype(np.float32)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8), label.copy()

"""Shapes: the built-in synthetic data set, drawn when asked for. It needs no download.

    Shapes("train")                    480 scenes: picture, exact mask, five captions
    Shapes("test", modality="depth")   120 scenes, each with a depth, thermal or flow picture too
    Shapes("train", view="top")        seen from above: small objects on farmland, sea and airfields
    Shapes("train", named=True)        only what captions mention is salient, among equal objects

view="side" shows 1 to 3 salient objects of 8 classes and 8 colours over six kinds of textured
background under uneven light. Each covers about 3 to 25 % of the picture; they are rotated and
shaded and seldom overlap. Everything else is not salient: specks and lines in the objects'
colours, blotches, regions of another texture and colour.

view="top" is a target for transfer in the manner of remote sensing: 1 to 6 objects of four other
classes, of 0.4 to 2.5 % each, with muted colours, even light and hard shadows.

named=True is a test of meaning: the 2 to 4 objects of a scene do not differ in size, colour or
paint, and captions mention only the stars, crosses, hearts and crescents. Those are salient.

Definitions
    scene       depends on (seed, split, view, index) alone, up to the last bit of floating point.
                Layout, paint, words, and each modality have random streams of their own: asking for
                one does not change the others, and a scene keeps its layout at every size.
    mask        255 where an object covers half of the pixel or more: the union of `objects(i)`.
    depth       brighter is nearer: a sloping ground, objects in front of it, noise, holes of 0.
    thermal     brighter is warmer: warm objects, lukewarm clutter, blur, noise.
    flow        hue is the direction of motion, saturation is the speed, and white does not move.
                The background drifts, turns and zooms, with parallax; objects move otherwise.
    left of, right of, above, below
                by the centroids of the visible masks: at least `MARGIN` of the picture apart along
                that axis, and further apart along it than across it.

Difficulty: Otsu's threshold on the distance to the border's mean colour reaches a mean F
(beta^2 = 0.3) of 0.56 on the test split and 0.48 on that of "top". With the Mahalanobis distance
it reaches 0.78 and 0.83.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import Dataset

from common.runtime import UserError

RGB = {
    "red": (205, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 215, 60),
    "green": (50, 150, 60),
    "blue": (45, 85, 200),
    "purple": (135, 60, 165),
    "white": (238, 238, 234),
    "black": (32, 32, 36),
}
COLOURS = tuple(RGB)
TOP_COLOURS = ("red", "yellow", "blue", "white")
CLASSES = ("disc", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
TOP_CLASSES = ("plane", "ship", "tank", "house")
BACKGROUNDS = ("smooth", "striped", "mottled", "chequered", "spotted", "hilly")
GROUNDS = {"farmland": ("house", "tank"), "the sea": ("ship",), "an airfield": ("plane",)}
NAMED = ("star", "cross", "heart", "crescent")  # the classes that captions of a named set mention
COUNTS = {"train": 480, "test": 120}
VIEWS = ("side", "top")
MODALITIES = ("depth", "thermal", "flow")
STREAMS = ("layout", "paint", "words", *MODALITIES)
MARGIN = 0.12
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


# ---- Outlines: everything drawn is a polygon in [0, 1] x [0, 1], x right, y down -----------------
CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3)]  # its right half; the rest is opposite
CROSS += [(-x, -y) for x, y in CROSS]
HALF_SHIP = [(1, 0), (0.75, 0.16), (0.4, 0.24), (-0.85, 0.24), (-1, 0.15)]  # from bow to stern
HOUSE = [(-1, -0.7), (1, -0.7), (1, 0.1), (0.2, 0.1), (0.2, 0.8), (-1, 0.8)]
HALF_PLANE = [(1, 0), (0.85, 0.1), (0.35, 0.13), (-0.2, 0.95), (-0.42, 0.95)]  # from nose to tail
HALF_PLANE += [(-0.15, 0.13), (-0.7, 0.1), (-0.92, 0.4), (-1.05, 0.4), (-0.95, 0)]


def arc(start: float, stop: float, count: int = 60, radius: float | np.ndarray = 1.0) -> np.ndarray:
    """`count` points around the origin from `start` to `stop` degrees. [count, 2]"""
    angle = np.radians(np.linspace(start, stop, count))
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(radius, (-1, 1))


def direction(angle: float) -> np.ndarray:
    """The unit vector (cos, sin) of an angle in degrees. [2]"""
    return arc(angle, angle, 1)[0]


def mirrored(half: Sequence[tuple[float, float]]) -> np.ndarray:
    """Close a half outline, given from nose to tail, by its mirror image. [2 * len(half), 2]"""
    return np.concatenate([half, np.multiply(half, (1, -1))[::-1]])


def heart() -> np.ndarray:
    """The heart curve x = 16 sin^3 t, y = -(13 cos t - 5 cos 2t - 2 cos 3t - cos 4t). [72, 2]"""
    t = np.linspace(0, 2 * np.pi, 72)
    x = 16 * np.sin(t) ** 3
    y = 5 * np.cos(2 * t) - 13 * np.cos(t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    return np.stack([x, y], 1)


def crescent() -> np.ndarray:
    """The unit circle from 50 to 310 degrees, closed by a circle around (0.5, 0). [120, 2]"""
    tip = direction(50) - (0.5, 0)  # seen from the centre of the inner circle
    radius = np.hypot(*tip)
    angle = np.degrees(np.arctan2(tip[1], tip[0]))
    inner = arc(360 - angle, angle, radius=radius) + (0.5, 0)
    return np.concatenate([arc(50, 310), inner])


@lru_cache(None)
def outline(name: str) -> np.ndarray:
    """The polygon of a class, with area 1 and the box's middle at the origin. [N, 2]"""
    points = {
        "disc": arc(0, 360),
        "square": arc(0, 360, 5),
        "triangle": arc(0, 360, 4),
        "star": arc(0, 360, 11, np.where(np.arange(11) % 2, 0.42, 1)),
        "ring": np.concatenate([arc(0, 360), arc(360, 0, radius=0.55)]),
        "cross": np.array(CROSS),
        "heart": heart(),
        "crescent": crescent(),
        "plane": mirrored(HALF_PLANE),
        "ship": mirrored(HALF_SHIP),
        "tank": arc(0, 360),
        "house": np.array(HOUSE),
    }[name]
    points = points - (points.min(0) + points.max(0)) / 2

    # The shoelace formula gives the polygon's area.
    x, y = points.T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    return points / np.sqrt(area)


def coverage(polygons: list[np.ndarray], size: int) -> np.ndarray:
    """The share of each pixel that the polygons cover, drawn at 4x and reduced. [H, W] in [0, 1]"""
    canvas = Image.new("L", (4 * size, 4 * size))
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        corners = np.floor(polygon * 4 * size)  # the pixels that hold the corners
        draw.polygon(corners.ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(4), np.float32) / 255


# ---- Layout: what is where -----------------------------------------------------------------------
@dataclass(frozen=True)
class Thing:
    """An object: class, name of its colour, painted colour [3] in 0..255, outline [N, 2]."""

    kind: str
    colour: str
    rgb: np.ndarray
    polygon: np.ndarray


class Layout(NamedTuple):
    """A scene: kind of background, its two colours [2, 3], things from the back to the front."""

    ground: str
    pair: np.ndarray | None  # None in the view "top"
    things: list[Thing]


def lay_out(rng: np.random.Generator, view: str, named: bool = False) -> Layout:
    """Choose background and colours; place 1 to 3 things, 2 to 4 if `named`, or 1 to 6 of "top"."""
    if view == "top":
        ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
        pair = None
        classes = GROUNDS[ground]
        colours = TOP_COLOURS
        most = 6
        areas = (0.004, 0.025)
    else:
        ground = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        pair = background_colours(rng)
        classes = CLASSES
        colours = visible_colours(pair)
        most = 3
        areas = (0.03, 0.25)
    fewest = 1
    if named:
        fewest = 2
        areas = (0.03, 0.12)
    crowding = 0.8 if rng.random() < 0.15 else 1  # below 1: things may overlap a little

    things = []
    taken = []  # centre and radius of each thing
    for k in range(rng.integers(fewest, most + fewest)):
        pool = classes
        if named and k == 0:  # at least one thing is salient,
            pool = NAMED
        elif named and k == 1:  # and at least one is not
            pool = [name for name in classes if name not in NAMED]
        kind = str(rng.choice(pool))
        colour = str(rng.choice(colours))
        tint = np.clip(RGB[colour] + rng.uniform(-16, 16, 3), 0, 255)
        if view == "top":
            tint = 0.65 * tint + 45  # muted
        polygon = find_place(rng, kind, areas, taken, crowding)
        if polygon is not None:
            things.append(Thing(kind, colour, tint, polygon))
    return Layout(ground, pair, things)


def background_colours(rng: np.random.Generator) -> np.ndarray:
    """Two colours of a background: greys with a random tint. [2, 3] in 15..240"""
    grey = rng.uniform(50, 210, (2, 1))
    tint = rng.uniform(-1, 1, (2, 3))
    return np.clip(grey + tint * rng.uniform(10, 75), 15, 240)


def visible_colours(pair: np.ndarray) -> list[str]:
    """The colours far from both of the background's: others would camouflage an object."""
    gap = {name: np.linalg.norm(pair - RGB[name], axis=1).min() for name in COLOURS}
    return [name for name in COLOURS if gap[name] > 75] or [max(gap, key=gap.get)]


def find_place(
    rng: np.random.Generator,
    kind: str,
    areas: tuple[float, float],
    taken: list[tuple[np.ndarray, float]],
    crowding: float,
) -> np.ndarray | None:
    """The polygon of a thing that fits between the others, or None if 20 attempts fail.

    areas: bounds of its share of the picture. taken: (centre, radius) of the things that are there;
    the new one is added. crowding: what share of the radii must lie between two centres. [N, 2]
    """
    for _ in range(20):
        # Draw size, angle and stretch, and turn the outline.
        area = np.exp(rng.uniform(*np.log(areas)))
        cos, sin = direction(rng.uniform(0, 360))
        stretch = np.exp(rng.uniform(-0.12, 0.12))
        points = outline(kind) * (stretch, 1 / stretch) * np.sqrt(area)
        points = points @ np.array([[cos, sin], [-sin, cos]])

        # Draw its place; a corner may leave the picture.
        radius = np.linalg.norm(points, axis=1).max()
        edge = min(0.85 * radius, 0.5)
        centre = rng.uniform(edge, 1 - edge, 2)
        gaps = [np.linalg.norm(centre - other) - crowding * (radius + r) for other, r in taken]
        if radius < 0.45 and all(gap > 0 for gap in gaps):
            taken.append((centre, radius))
            return points + centre
    return None


def describe(things: list[Thing], shares: list[np.ndarray]) -> list[dict]:
    """What `Shapes.objects` returns, from the things and their coverages [H, W]."""
    found = []
    hidden = np.zeros(shares[0].shape, bool)
    for thing, share in zip(things[::-1], shares[::-1]):  # from the front: it hides the rest
        mask = (share >= 0.5) & ~hidden
        hidden |= mask
        rows = np.flatnonzero(mask.any(1))
        columns = np.flatnonzero(mask.any(0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        one = {"class": thing.kind, "colour": thing.colour, "mask": mask}
        one["box"] = tuple(int(edge) for edge in box)
        one["centre"] = tuple(float(axis[mask].mean()) for axis in grid(len(mask)))
        found.append(one)
    return found[::-1]


# ---- Paint ---------------------------------------------------------------------------------------
@lru_cache(4)
def grid(size: int) -> np.ndarray:
    """The pixel centres, x then y. [2, H, W] in [0, 1]"""
    return (np.mgrid[:size, :size][::-1].astype(np.float32) + 0.5) / size


def turned(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Axes u and v, each [H, W]: those of the grid, turned at random about the picture's middle."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = grid(size) - 0.5
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    return u, v


def noise(rng: np.random.Generator, size: int, *cells: int) -> np.ndarray:
    """Smooth noise, mean 0 and deviation about 1: a sum over grids of `cells` x `cells`. [H, W]"""
    total = np.zeros((size, size), np.float32)
    for count in cells:
        coarse = rng.standard_normal((count + 2, count + 2), np.float32)
        total += Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return total * (1.3 / len(cells) ** 0.5)  # 1.3: what interpolation took away


def step(x: np.ndarray, width: float) -> np.ndarray:
    """0 for negative x, 1 for positive, with a ramp of `width` around x = 0."""
    return np.clip(x / width + 0.5, 0, 1)


def blur(x: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of [H, W] in [0, 1] by a deviation of `radius` pixels, in 8 bits."""
    image = Image.fromarray((np.clip(x, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def rgb(*colour: float) -> np.ndarray:
    """A colour that broadcasts over pictures. [3, 1, 1]"""
    return np.array(colour, np.float32).reshape(3, 1, 1)


def blend(below: np.ndarray, above: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Lay `above` over `below`, each [3, H, W] or [3, 1, 1], with opacity `weight` [H, W]."""
    return below + (above - below) * weight


def texture(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    """One of `BACKGROUNDS`, as the share of its second colour. [H, W] in [0, 1]"""
    u, v = turned(rng, size)
    waves = rng.uniform(20, 55)
    if kind == "smooth":
        return step(u, 1.2)
    if kind == "striped":
        return step(np.sin(waves * u + 0.4 * noise(rng, size, 4)), rng.uniform(0.3, 2))
    if kind == "mottled":
        return step(noise(rng, size, 6, 14, 30), 3.5)
    if kind == "chequered":
        return step(np.sin(waves * u) * np.sin(waves * v), rng.uniform(0.2, 0.8))
    if kind == "spotted":
        return step(noise(rng, size, rng.integers(8, 16)) - 0.7, 0.6)

    # Hilly: three skylines, one behind the other.
    skylines = [height + 0.06 * noise(rng, size, 5)[:1] for height in (0.35, 0.55, 0.75)]
    return sum(step(grid(size)[1] - skyline, 0.02) for skyline in skylines) / 3


def paint_side(rng: np.random.Generator, layout: Layout, size: int) -> np.ndarray:
    """A textured background with everything on it that is not salient. float [3, H, W], 0..255"""
    pair = layout.pair
    image = blend(rgb(*pair[0]), rgb(*pair[1]), texture(rng, layout.ground, size))

    # Lay regions of another texture over it, unless they would hide a thing of their colour.
    for _ in range(rng.integers(1, 4)):
        two = np.clip(pair + rng.uniform(-90, 90, (2, 3)), 10, 245)
        if min(np.linalg.norm(two - thing.rgb, axis=1).min() for thing in layout.things) < 60:
            continue
        region = blend(rgb(*two[0]), rgb(*two[1]), texture(rng, str(rng.choice(BACKGROUNDS)), size))
        image = blend(image, region, step(noise(rng, size, 2) - 0.8, rng.uniform(0.1, 1)))

    # Draw specks and lines in three of the objects' colours.
    for colour in rng.choice(COLOURS, 3):
        marks = specks(rng, rng.integers(8), 12, (0.006, 0.018))
        for _ in range(rng.integers(3)):
            start = rng.uniform(0, 1, 2)
            angle = rng.uniform(0, 360)
            along = direction(angle) * rng.uniform(0.1, 0.6)
            across = direction(angle + 90) * rng.uniform(0.002, 0.006)
            line = [along + across, along - across, -along - across, across - along]
            marks.append(start + line)
        image = blend(image, rgb(*RGB[colour]), coverage(marks, size) * rng.uniform(0.5, 1))

    # Add blotches.
    return image + noise(rng, size, 5) * rng.uniform(0, 12)


def specks(
    rng: np.random.Generator, count: int, corners: int, radii: tuple[float, float]
) -> list[np.ndarray]:
    """`count` small discs anywhere in the picture, each a polygon [corners, 2]."""
    return [arc(0, 360, corners, rng.uniform(*radii)) + rng.uniform(0, 1, 2) for _ in range(count)]


def paint_sea(
    rng: np.random.Generator,
    u: np.ndarray,
    grain: np.ndarray,
    shares: list[np.ndarray],
    size: int,
) -> np.ndarray:
    """Waves and a coast, which keeps away from the ships' `shares`. float [3, H, W], 0..255"""
    waves = 3 * np.sin(140 * u + 2 * noise(rng, size, 6))
    ships = blur(sum(shares), 0.05 * size)
    coast = noise(rng, size, 2) + 1.5 * u - rng.uniform(0.4, 1.4) - 8 * ships
    image = blend(rgb(52, 82, 96) + waves + 4 * grain, rgb(150, 165, 160), step(coast, 0.3))
    return blend(image, rgb(118, 112, 86) + 9 * grain, step(coast - 0.1, 0.05))


def paint_farmland(
    rng: np.random.Generator,
    u: np.ndarray,
    v: np.ndarray,
    grain: np.ndarray,
    field: np.ndarray,
    size: int,
) -> np.ndarray:
    """Fields with furrows, a road, and trees. field: number of each pixel's field, int [H, W].

    float [3, H, W], 0..255
    """
    # Each field has a crop's colour, and furrows along one of two directions.
    crops = np.array([(98, 108, 70), (132, 124, 88), (84, 98, 66), (146, 138, 104)])
    tints = (rng.choice(crops, 14) + rng.uniform(-14, 14, (14, 3))).astype(np.float32)
    furrows = np.sin(150 * np.where(rng.random(14)[field] < 0.5, u, v))
    furrows *= rng.uniform(0, 7, 14).astype(np.float32)[field]
    image = tints[field].transpose(2, 0, 1) + furrows + 5 * grain

    # A winding road, and trees over everything.
    road = abs(u + 0.05 * noise(rng, size, 3) + rng.uniform(-0.3, 0.3))
    image = blend(image, rgb(158, 152, 142), step(0.016 - road, 0.008))
    trees = specks(rng, rng.integers(5, 40), 9, (0.007, 0.017))
    return blend(image, rgb(58, 72, 50), 0.8 * coverage(trees, size))


def paint_top(
    rng: np.random.Generator, ground: str, shares: list[np.ndarray], size: int
) -> np.ndarray:
    """Farmland, sea or airfield from above. float [3, H, W], 0..255"""
    u, v = turned(rng, size)
    grain = noise(rng, size, 10, 24, 60)
    if ground == "the sea":
        return paint_sea(rng, u, grain, shares, size)

    # 14 sites divide the ground: each pixel belongs to the nearest.
    sites = rng.uniform(-0.6, 0.6, (14, 2)).astype(np.float32)
    field = np.stack([np.maximum(abs(u - a), 1.4 * abs(v - b)) for a, b in sites]).argmin(0)
    if ground == "farmland":
        return paint_farmland(rng, u, v, grain, field, size)

    # An airfield: slabs of concrete, grass, a runway and its middle line.
    slabs = rng.uniform(-7, 7, 14).astype(np.float32)[field]
    image = rgb(136, 136, 132) + slabs + 4 * grain
    image = blend(image, rgb(104, 112, 82) + 8 * grain, step(noise(rng, size, 3) - 0.6, 0.1))
    middle = abs(v + rng.uniform(-0.3, 0.3))
    image = blend(image, rgb(98, 98, 100), step(0.09 - middle, 0.01))
    return blend(image, rgb(205, 205, 200), step(0.006 - middle, 0.006) * step(np.sin(50 * u), 0.4))


def paint(
    rng: np.random.Generator, view: str, layout: Layout, shares: list[np.ndarray], size: int
) -> np.ndarray:
    """The picture of a layout whose things have the coverages `shares`. uint8 [3, H, W]"""
    if view == "top":
        image = paint_top(rng, layout.ground, shares, size)
        offset = (0.012, 0.012)  # of the shadows
        haze = 0.004
    else:
        image = paint_side(rng, layout, size)
        offset = rng.uniform(-0.03, 0.03, 2)
        haze = 0.03

    # The shadows of all things fall on the background.
    shadow = coverage([thing.polygon + offset for thing in layout.things], size)
    image = image * (1 - 0.35 * blur(shadow, haze * size))

    # Each thing is shaded across, and some are faintly striped.
    for thing, share in zip(layout.things, shares):
        slope = turned(rng, size)[0]
        slope = slope - (slope * share).sum() / share.sum()
        slope /= float(np.ptp(thing.polygon, 0).max())  # about -0.5 to 0.5 across the thing
        shade = 1 + rng.uniform(0.1, 0.5) * slope + 0.06 * noise(rng, size, 8, 20)
        if rng.random() < 0.3:
            shade = shade + 0.12 * np.sin(30 * slope)
        image = blend(image, rgb(*thing.rgb) * shade, share)

    # Uneven light falls on everything, and the camera adds noise.
    if view == "side":
        light = rng.uniform(0, 0.45) * turned(rng, size)[0] + 0.12 * noise(rng, size, 2)
        image = image * (1 + light)
    image += rng.standard_normal(image.shape, np.float32) * rng.uniform(2, 7)
    return np.clip(image, 0, 255).astype(np.uint8, order="C")


# ---- Other modalities ----------------------------------------------------------------------------
def depth(rng: np.random.Generator, shares: list[np.ndarray], size: int) -> np.ndarray:
    """A sloping ground and things in front of it. [H, W] in [0, 1]"""
    x, y = grid(size)
    near = 0.2 + rng.uniform(0.1, 0.35) * y + rng.uniform(-0.12, 0.12) * x
    near = near + 0.03 * noise(rng, size, 3, 6)
    for share in shares:
        level = (near * share).sum() / share.sum() + rng.uniform(0.15, 0.35)
        near = blend(near, level + 0.015 * noise(rng, size, 4), share)

    # A sensor blurs the depth, and finds none here and there.
    near = blur(near, 0.006 * size) + 0.015 * rng.standard_normal((size, size), np.float32)
    holes = noise(rng, size, 12) + 0.5 * noise(rng, size, 40) > 2.6
    return np.where(holes, 0, near)


def thermal(rng: np.random.Generator, shares: list[np.ndarray], size: int) -> np.ndarray:
    """Warm things before cooler ground with lukewarm clutter. [H, W] in [0, 1]"""
    heat = 0.28 + 0.05 * noise(rng, size, 2, 5, 11) + rng.uniform(-0.15, 0.15) * grid(size)[1]
    heat = heat + rng.uniform(0.1, 0.3) * step(noise(rng, size, 4) - 1.4, 0.5)
    for share in shares:
        level = (heat * share).sum() / share.sum() + rng.uniform(0.15, 0.45)
        heat = blend(heat, level + 0.04 * noise(rng, size, 5, 9), share)
    return blur(heat, 0.012 * size) + 0.03 * rng.standard_normal((size, size), np.float32)


def flow(rng: np.random.Generator, shares: list[np.ndarray], size: int) -> np.ndarray:
    """Motion (1 is the fastest) on the colour wheel. [3, H, W] in [0, 1]"""

    def anywhere() -> np.ndarray:  # a random direction that broadcasts over pictures, [2, 1, 1]
        return direction(rng.uniform(0, 360)).reshape(2, 1, 1).astype(np.float32)

    # The background zooms, turns and drifts; two parts of it move by parallax.
    x, y = grid(size) - 0.5
    zoom, turn = rng.uniform(-0.4, 0.4, 2).tolist()
    motion = np.stack([zoom * x - turn * y, zoom * y + turn * x])
    motion = motion + anywhere() * rng.uniform(0, 0.5)
    for _ in range(2):
        motion = motion + anywhere() * rng.uniform(0.1, 0.4) * step(noise(rng, size, 3) - 0.9, 0.2)

    # Each thing moves against what is around it.
    for share in shares:
        around = (motion * share).sum((1, 2), keepdims=True) / share.sum()
        motion = blend(motion, around + anywhere() * rng.uniform(0.35, 0.7), share)
    motion = motion + 0.03 * np.stack([noise(rng, size, 8, 20), noise(rng, size, 8, 20)])

    # Direction and speed become hue and saturation.
    hue = np.arctan2(motion[1], motion[0]) / (2 * math.pi) % 1
    speed = np.hypot(*motion).clip(0, 1)
    bands = (hue, speed, np.ones_like(speed))
    bands = [Image.fromarray((255 * band).astype(np.uint8)) for band in bands]
    wheel = Image.merge("HSV", bands).convert("RGB")
    wheel = wheel.filter(ImageFilter.GaussianBlur(0.006 * size))
    return np.asarray(wheel, np.float32).transpose(2, 0, 1) / 255


# ---- Words ---------------------------------------------------------------------------------------
def phrase(colour: str, kind: str, count: int = 1) -> str:
    """'a red star', 'an orange ring', 'two blue crosses'."""
    if count > 1:
        return f"{NUMBERS[count]} {colour} {kind}{'es' if kind.endswith('s') else 's'}"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}"


def relation(one: dict, two: dict) -> str | None:
    """Where the first object lies as seen from the second: 'left of', …; None if it is unclear."""
    dx, dy = np.subtract(one["centre"], two["centre"])
    if max(abs(dx), abs(dy)) < MARGIN:
        return None
    if abs(dy) > abs(dx):
        return "above" if dy < 0 else "below"
    return "left of" if dx < 0 else "right of"


def write_captions(rng: np.random.Generator, ground: str, objects: list[dict]) -> list[str]:
    """Five true sentences: all objects on their background, up to three relations, lists."""
    # List all objects; those of one colour and class are counted.
    seen = [(one["colour"], one["class"]) for one in objects]
    groups = [phrase(*pair, seen.count(pair)) for pair in dict.fromkeys(seen)]
    rng.shuffle(groups)
    everything = groups[-1]
    if len(groups) > 1:
        everything = ", ".join(groups[:-1]) + " and " + everything
    where = f"on a {ground} background" if ground in BACKGROUNDS else f"on {ground}"

    # Collect the relations between objects that differ in colour or class.
    relations = []
    for a, one in zip(seen, objects):
        for b, two in zip(seen, objects):
            word = relation(one, two)
            if a != b and word:
                relations.append(f"{phrase(*a)} {word} {phrase(*b)}")
    relations = list(dict.fromkeys(relations))
    rng.shuffle(relations)

    # Fill up with other ways to list them.
    verb = "are" if len(seen) > 1 else "is"
    lists = [
        f"a picture of {everything}",
        f"{where}, {everything}",
        f"{everything} in the picture",
        f"there {verb} {everything}",
    ]
    rng.shuffle(lists)
    return [f"{everything} {where}", *relations[:3], *lists][:5]


# ---- The data set --------------------------------------------------------------------------------
class Shapes(Dataset):
    """Synthetic scenes; see the head of the file.

    split: "train" (480 scenes) or "test" (120). modality: None, "depth", "thermal" or "flow".
    view: "side" or "top". size: height and width in pixels, 32 or more so that all can be seen.
    count: another number of scenes, which begin with the same ones. seed: another world, 0 or more.
    named: only things of the classes `NAMED` are salient and described (view "side" alone).
    `classes` are the view's class names, `names` the scenes' names, `title` is for messages,
    `left_out` is empty: no scene is left out.
    Raises `UserError` for an unknown split, modality or view, and for a smaller size.
    """

    def __init__(
        self,
        split: str = "train",
        modality: str | None = None,
        view: str = "side",
        size: int = 160,
        count: int | None = None,
        seed: int = 0,
        named: bool = False,
    ):
        for what, value, known in (
            ("split", split, tuple(COUNTS)),
            ("view", view, VIEWS),
            ("modality", modality, (None, *MODALITIES)),
        ):
            if value not in known:
                raise UserError(f"shapes have no {what} {value!r}; choose one of {known}")
        if size < 32:
            raise UserError(f"shapes cannot be drawn at size {size}; choose 32 or more")
        self.split = split
        self.modality = modality
        self.view = view
        self.size = size
        self.seed = seed
        self.named = named
        self.classes = CLASSES if view == "side" else TOP_CLASSES
        self.left_out = []

        # Scenes are called "shapes-top-train-00012".
        stem = "shapes"
        if named:
            stem += "-named"
        if view == "top":
            stem += "-top"
        stem += f"-{split}"
        count = COUNTS[split] if count is None else count
        self.names = [f"{stem}-{i:05d}" for i in range(count)]
        self.title = f"{stem} with {modality}" if modality else stem

    def __len__(self) -> int:
        return len(self.names)

    def bytes(self, index: int) -> int:
        """The size of the photo's file: a drawn scene has none."""
        return 0

    def photo(self, index: int, at_least: int) -> torch.Tensor:
        """The picture alone, uint8 [3, H, W]."""
        return self[index]["image"]

    def stream(self, index: int, name: str) -> np.random.Generator:
        """The random numbers of a scene for one of `STREAMS`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.title} has {len(self)} scenes, not one of number {index}")
        split = list(COUNTS).index(self.split)
        view = VIEWS.index(self.view)
        return np.random.default_rng((self.seed, split, view, int(index), STREAMS.index(name)))

    def layout(self, index: int) -> Layout:
        """What is where in a scene; draws nothing."""
        return lay_out(self.stream(index, "layout"), self.view, self.named)

    def labels(self, index: int) -> torch.Tensor:
        """1 for the classes in a scene, else 0; draws nothing. float [len(self.classes)]"""
        kinds = {thing.kind for thing in self.layout(index).things}
        return torch.tensor([float(name in kinds) for name in self.classes])

    def objects(self, index: int) -> list[dict]:
        """The salient objects of a scene from the back to the front; paints nothing.

        Each is {"class": str, "colour": str, "mask": what is visible of it, bool [H, W],
        "box": (left, top, right, bottom) in pixels, the last two exclusive,
        "centre": (x, y), the mask's centroid in [0, 1]}.
        """
        things = self.layout(index).things
        return self.salient(things, self.shares(things))

    def shares(self, things: list[Thing]) -> list[np.ndarray]:
        """The coverage of each thing, [H, W] in [0, 1]."""
        return [coverage([thing.polygon], self.size) for thing in things]

    def salient(self, things: list[Thing], shares: list[np.ndarray]) -> list[dict]:
        """The objects of a scene that are salient: all, or with `named` those of `NAMED`."""
        objects = describe(things, shares)
        return [one for one in objects if not self.named or one["class"] in NAMED]

    def __getitem__(self, index: int) -> dict:
        """The sample: image uint8 [3, H, W], mask uint8 [1, H, W] of 0 and 255, modality
        uint8 [3, H, W] or None, caption (five sentences), name, size (H, W)."""
        layout = self.layout(index)
        shares = self.shares(layout.things)
        objects = self.salient(layout.things, shares)
        image = paint(self.stream(index, "paint"), self.view, layout, shares, self.size)
        mask = np.any([one["mask"] for one in objects], 0)[None]  # [1, H, W]

        modality = None
        if self.modality:
            draw = {"depth": depth, "thermal": thermal, "flow": flow}[self.modality]
            picture = draw(self.stream(index, self.modality), shares, self.size)
            picture = (picture.clip(0, 1) * 255).astype(np.uint8)
            modality = torch.from_numpy(picture).expand(3, -1, -1).contiguous()  # grey: 3 times
        return {
            "image": torch.from_numpy(image),
            "mask": torch.from_numpy(mask * np.uint8(255)),
            "modality": modality,
            "caption": write_captions(self.stream(index, "words"), layout.ground, objects),
            "name": self.names[index],
            "size": (self.size, self.size),
        }

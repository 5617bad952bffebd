"""Shapes: the built-in synthetic data set, drawn when asked for. It needs no download.

    Shapes("train")                    480 scenes: picture, exact mask, five captions
    Shapes("test", modality="depth")   120 scenes, each with a depth, thermal or flow picture too
    Shapes("train", view="top")        seen from above: small objects on farmland, sea and airfields
    Shapes("train", named=True)        only what captions mention is salient, among equal objects

view="side": 1 to 3 salient objects of 8 classes and 8 colours, about 3 to 25 % of the picture each,
rotated, shaded, seldom overlapping, over six kinds of textured background under uneven light. What
else is there is not salient: specks and lines in the objects' colours, blotches, regions of another
texture and colour. view="top" is a target for transfer in the manner of remote sensing: 1 to 6
objects of 0.4 to 2.5 % and of four other classes, muted colours, even light, hard shadows.
named=True is a test of meaning: 2 to 4 objects, alike in size, colour and paint, of which captions
mention only the stars, crosses, hearts and crescents. Those are salient; the others are not.

Definitions
    scene       depends on (seed, split, view, index) alone, up to the last bit of floating point.
                Layout, paint, words, and each modality have random streams of their own: asking for
                one does not change the others, and a scene keeps its layout at every size.
    mask        255 where an object covers half of the pixel or more: the union of `objects(i)`.
    depth       brighter is nearer: a sloping ground, objects in front of it, noise, holes of 0.
    thermal     brighter is warmer: warm objects, lukewarm clutter, blur, noise.
    flow        hue is the direction of motion, saturation the speed, white stands still: a
                drifting, turning, zooming background with parallax, objects that move otherwise.
    left of, right of, above, below
                by the centroids of the visible masks: at least `MARGIN` of the picture apart along
                that axis, and further apart along it than across it.

How hard it is: Otsu's threshold on the distance to the border's mean colour reaches a mean F
(beta^2 = 0.3) of 0.56 on the test split and 0.48 on that of "top"; with the Mahalanobis distance,
0.78 and 0.83.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

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
COLOURS, TOP_COLOURS = tuple(RGB), ("red", "yellow", "blue", "white")
CLASSES = ("disc", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
TOP_CLASSES = ("plane", "ship", "tank", "house")
BACKGROUNDS = ("smooth", "striped", "mottled", "chequered", "spotted", "hilly")
NAMED = ("star", "cross", "heart", "crescent")
GROUNDS = {"farmland": ("house", "tank"), "the sea": ("ship",), "an airfield": ("plane",)}
COUNTS = {"train": 480, "test": 120}
VIEWS = ("side", "top")
MODALITIES = ("depth", "thermal", "flow")
STREAMS = ("layout", "paint", "words", *MODALITIES)
MARGIN = 0.12
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


# ---- Outlines: everything drawn is a polygon in [0, 1] x [0, 1], x right, y down ----------------
def arc(start: float, stop: float, count: int = 60, radius: float | np.ndarray = 1.0) -> np.ndarray:
    """`count` points around the origin from `start` to `stop` degrees. [count, 2]"""
    angle = np.radians(np.linspace(start, stop, count))
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(radius, (-1, 1))


def mirror(*half: tuple[float, float]) -> np.ndarray:
    """Close a half outline, given from nose to tail, by its mirror image. [2 * len(half), 2]"""
    return np.concatenate([half, np.multiply(half, (1, -1))[::-1]])


@lru_cache(None)
def outline(name: str) -> np.ndarray:
    """The polygon of a class, with area 1 and the box's middle at the origin. [N, 2]"""
    t = np.linspace(0, 2 * np.pi, 72)
    horn = arc(50, 50, 1)[0] - (0.5, 0)  # crescent: a tip seen from its hollow
    hollow, bend = np.hypot(*horn), np.degrees(np.arctan2(horn[1], horn[0]))
    points = {
        "disc": arc(0, 360),
        "square": arc(0, 360, 5),
        "triangle": arc(0, 360, 4),
        "star": arc(0, 360, 11, np.where(np.arange(11) % 2, 0.42, 1)),
        "ring": np.concatenate([arc(0, 360), arc(360, 0, radius=0.55)]),
        "cross": np.array(
            [
                (1, 3),
                (1, 1),
                (3, 1),
                (3, -1),
                (1, -1),
                (1, -3),
                (-1, -3),
                (-1, -1),
                (-3, -1),
                (-3, 1),
                (-1, 1),
                (-1, 3),
            ]
        ),
        "heart": np.stack(
            [
                16 * np.sin(t) ** 3,
                5 * np.cos(2 * t) - 13 * np.cos(t) + 2 * np.cos(3 * t) + np.cos(4 * t),
            ],
            1,
        ),
        "crescent": np.concatenate([arc(50, 310), arc(360 - bend, bend, radius=hollow) + (0.5, 0)]),
        "plane": mirror(
            (1, 0),
            (0.85, 0.1),
            (0.35, 0.13),
            (-0.2, 0.95),
            (-0.42, 0.95),
            (-0.15, 0.13),
            (-0.7, 0.1),
            (-0.92, 0.4),
            (-1.05, 0.4),
            (-0.95, 0),
        ),
        "ship": mirror((1, 0), (0.75, 0.16), (0.4, 0.24), (-0.85, 0.24), (-1, 0.15)),
        "tank": arc(0, 360),
        "house": np.array([(-1, -0.7), (1, -0.7), (1, 0.1), (0.2, 0.1), (0.2, 0.8), (-1, 0.8)]),
    }[name]
    points = points - (points.min(0) + points.max(0)) / 2
    x, y = points.T
    return points / np.sqrt(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)


def coverage(polygons: list[np.ndarray], size: int) -> np.ndarray:
    """The share of each pixel that the polygons cover, drawn at 4x and reduced. [H, W] in [0, 1]"""
    canvas = Image.new("L", (4 * size, 4 * size))
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        corners = np.floor(polygon * 4 * size)  # the pixels that hold the corners
        draw.polygon(corners.ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(4), np.float32) / 255


# ---- Layout: what is where ---------------------------------------------------------------------
@dataclass(frozen=True)
class Thing:
    """A salient object: class, name of its colour, painted colour [3] in 0..255, outline [N, 2]."""

    kind: str
    colour: str
    rgb: np.ndarray
    polygon: np.ndarray


def lay_out(
    rng: np.random.Generator, view: str, named: bool = False
) -> tuple[str, np.ndarray, list[Thing]]:
    """Return (kind of background, its two colours [2, 3], things from the back to the front)."""
    if view == "top":
        ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
        classes, names, most, areas, pair = GROUNDS[ground], TOP_COLOURS, 6, (0.004, 0.025), None
    else:
        ground = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        pair = rng.uniform(50, 210, (2, 1)) + rng.uniform(-1, 1, (2, 3)) * rng.uniform(10, 75)
        pair = np.clip(pair, 15, 240)
        # an object in a colour of the background would be camouflaged, not salient
        gap = {name: np.linalg.norm(pair - RGB[name], axis=1).min() for name in COLOURS}
        names = [name for name in COLOURS if gap[name] > 75] or [max(gap, key=gap.get)]
        classes, most, areas = CLASSES, 3, (0.03, 0.25)
    fewest, areas = (2, (0.03, 0.12)) if named else (1, areas)
    crowding = 0.8 if rng.random() < 0.15 else 1  # below 1: things may overlap a little
    things, taken = [], []
    for k in range(rng.integers(fewest, most + fewest)):
        pool = classes if not named or k > 1 else [c for c in classes if (c in NAMED) == (k == 0)]
        kind, colour = str(rng.choice(pool)), str(rng.choice(names))
        tint = np.clip(RGB[colour] + rng.uniform(-16, 16, 3), 0, 255)
        tint = tint if view == "side" else 0.65 * tint + 45  # muted
        for _ in range(20):  # until it fits, else do without it
            area, angle = np.exp(rng.uniform(*np.log(areas))), rng.uniform(0, 360)
            along, stretch = arc(angle, angle, 1)[0], np.exp(rng.uniform(-0.12, 0.12))
            points = outline(kind) * (stretch, 1 / stretch) * np.sqrt(area)
            points = points @ np.stack([along, along[::-1] * (-1, 1)])
            radius = np.linalg.norm(points, axis=1).max()
            edge = min(0.85 * radius, 0.5)  # a corner may leave the picture
            centre = rng.uniform(edge, 1 - edge, 2)
            if radius < 0.45 and all(
                np.linalg.norm(centre - other) > crowding * (radius + reach)
                for other, reach in taken
            ):
                things.append(Thing(kind, colour, tint, points + centre))
                taken.append((centre, radius))
                break
    return ground, pair, things


def describe(things: list[Thing], shares: list[np.ndarray]) -> list[dict]:
    """What `Shapes.objects` returns, from the things and their coverages [H, W]."""
    found, hidden = [], np.zeros(shares[0].shape, bool)
    for thing, share in zip(things[::-1], shares[::-1]):  # from the front: it hides the rest
        mask = (share >= 0.5) & ~hidden
        hidden |= mask
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        found.append(
            {
                "class": thing.kind,
                "colour": thing.colour,
                "mask": mask,
                "box": (*map(int, (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)),),
                "centre": (*(float(axis[mask].mean()) for axis in grid(len(mask))),),
            }
        )
    return found[::-1]


# ---- Paint -------------------------------------------------------------------------------------
@lru_cache(4)
def grid(size: int) -> np.ndarray:
    """The pixel centres, x then y. [2, H, W] in [0, 1]"""
    return (np.mgrid[:size, :size][::-1].astype(np.float32) + 0.5) / size


def turned(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Axes u and v, each [H, W]: those of the grid, turned at random about the picture's middle."""
    angle = rng.uniform(0, 2 * math.pi)
    x, y = grid(size) - 0.5
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


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
    (u, v), waves = turned(rng, size), rng.uniform(20, 55)
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
    skylines = [height + 0.06 * noise(rng, size, 5)[:1] for height in (0.35, 0.55, 0.75)]  # hilly
    return sum(step(grid(size)[1] - skyline, 0.02) for skyline in skylines) / 3


def paint_side(
    rng: np.random.Generator, kind: str, pair: np.ndarray, things: list[Thing], size: int
) -> np.ndarray:
    """A textured background with everything on it that is not salient. float [3, H, W], 0..255"""
    image = blend(rgb(*pair[0]), rgb(*pair[1]), texture(rng, kind, size))
    for _ in range(rng.integers(1, 4)):  # regions of another texture
        two = np.clip(pair + rng.uniform(-90, 90, (2, 3)), 10, 245)
        if min(np.linalg.norm(two - thing.rgb, axis=1).min() for thing in things) < 60:
            continue  # it would hide a thing of its colour
        region = blend(rgb(*two[0]), rgb(*two[1]), texture(rng, str(rng.choice(BACKGROUNDS)), size))
        image = blend(image, region, step(noise(rng, size, 2) - 0.8, rng.uniform(0.1, 1)))
    for colour in rng.choice(COLOURS, 3):  # lines and specks
        marks = [
            arc(0, 360, 12, rng.uniform(0.006, 0.018)) + rng.uniform(0, 1, 2)
            for _ in range(rng.integers(8))
        ]
        for _ in range(rng.integers(3)):
            start, angle = rng.uniform(0, 1, 2), rng.uniform(0, 360)
            along = arc(angle, angle, 1)[0] * rng.uniform(0.1, 0.6)
            across = arc(angle + 90, angle + 90, 1)[0] * rng.uniform(0.002, 0.006)
            marks.append(start + [along + across, along - across, -along - across, across - along])
        image = blend(image, rgb(*RGB[colour]), coverage(marks, size) * rng.uniform(0.5, 1))
    return image + noise(rng, size, 5) * rng.uniform(0, 12)  # blotches


def paint_top(
    rng: np.random.Generator, ground: str, shares: list[np.ndarray], size: int
) -> np.ndarray:
    """Farmland, sea or airfield from above. float [3, H, W], 0..255"""
    u, v = turned(rng, size)
    grain = noise(rng, size, 10, 24, 60)
    if ground == "the sea":
        waves = 3 * np.sin(140 * u + 2 * noise(rng, size, 6))
        ships = blur(sum(shares), 0.05 * size)  # the land keeps away from them
        coast = noise(rng, size, 2) + 1.5 * u - rng.uniform(0.4, 1.4) - 8 * ships
        image = blend(rgb(52, 82, 96) + waves + 4 * grain, rgb(150, 165, 160), step(coast, 0.3))
        return blend(image, rgb(118, 112, 86) + 9 * grain, step(coast - 0.1, 0.05))
    sites = rng.uniform(-0.6, 0.6, (14, 2)).astype(np.float32)  # each pixel belongs to the nearest
    field = np.stack([np.maximum(abs(u - a), 1.4 * abs(v - b)) for a, b in sites]).argmin(0)
    if ground == "farmland":
        crops = np.array([(98, 108, 70), (132, 124, 88), (84, 98, 66), (146, 138, 104)])
        tints = (rng.choice(crops, 14) + rng.uniform(-14, 14, (14, 3))).astype(np.float32)
        furrows = np.sin(150 * np.where(rng.random(14)[field] < 0.5, u, v))
        furrows *= rng.uniform(0, 7, 14).astype(np.float32)[field]
        image = tints[field].transpose(2, 0, 1) + furrows + 5 * grain
        road = abs(u + 0.05 * noise(rng, size, 3) + rng.uniform(-0.3, 0.3))
        image = blend(image, rgb(158, 152, 142), step(0.016 - road, 0.008))
        trees = [
            arc(0, 360, 9, rng.uniform(0.007, 0.017)) + rng.uniform(0, 1, 2)
            for _ in range(rng.integers(5, 40))
        ]
        return blend(image, rgb(58, 72, 50), 0.8 * coverage(trees, size))
    slabs = rng.uniform(-7, 7, 14).astype(np.float32)[field]  # an airfield
    image = rgb(136, 136, 132) + slabs + 4 * grain
    image = blend(image, rgb(104, 112, 82) + 8 * grain, step(noise(rng, size, 3) - 0.6, 0.1))
    middle = abs(v + rng.uniform(-0.3, 0.3))  # of the runway
    image = blend(image, rgb(98, 98, 100), step(0.09 - middle, 0.01))
    return blend(image, rgb(205, 205, 200), step(0.006 - middle, 0.006) * step(np.sin(50 * u), 0.4))


def paint(
    rng: np.random.Generator, view: str, layout: tuple, shares: list[np.ndarray], size: int
) -> np.ndarray:
    """The picture of a layout whose things have the coverages `shares`. uint8 [3, H, W]"""
    ground, _, things = layout
    if view == "top":
        image, sun, haze = paint_top(rng, ground, shares, size), (0.012, 0.012), 0.004
    else:
        image, sun, haze = paint_side(rng, *layout, size), rng.uniform(-0.03, 0.03, 2), 0.03
    shadow = coverage([thing.polygon + sun for thing in things], size)
    image = image * (1 - 0.35 * blur(shadow, haze * size))
    for thing, share in zip(things, shares):
        slope = turned(rng, size)[0]
        slope = slope - (slope * share).sum() / share.sum()
        slope /= float(np.ptp(thing.polygon, 0).max())  # about -0.5 to 0.5 across the thing
        shade = 1 + rng.uniform(0.1, 0.5) * slope + 0.06 * noise(rng, size, 8, 20)
        if rng.random() < 0.3:  # some are faintly striped
            shade = shade + 0.12 * np.sin(30 * slope)
        image = blend(image, rgb(*thing.rgb) * shade, share)
    if view == "side":  # uneven light on everything
        light = rng.uniform(0, 0.45) * turned(rng, size)[0] + 0.12 * noise(rng, size, 2)
        image = image * (1 + light)
    image += rng.standard_normal(image.shape, np.float32) * rng.uniform(2, 7)
    return np.clip(image, 0, 255).astype(np.uint8, order="C")


# ---- Other modalities --------------------------------------------------------------------------
def depth(rng: np.random.Generator, shares: list[np.ndarray], size: int) -> np.ndarray:
    """A sloping ground and things in front of it. [H, W] in [0, 1]"""
    x, y = grid(size)
    near = 0.2 + rng.uniform(0.1, 0.35) * y + rng.uniform(-0.12, 0.12) * x
    near = near + 0.03 * noise(rng, size, 3, 6)
    for share in shares:
        level = (near * share).sum() / share.sum() + rng.uniform(0.15, 0.35)
        near = blend(near, level + 0.015 * noise(rng, size, 4), share)
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

    def direction() -> np.ndarray:
        return arc(*[rng.uniform(0, 360)] * 2, 1).reshape(2, 1, 1).astype(np.float32)

    x, y = grid(size) - 0.5
    zoom, turn = rng.uniform(-0.4, 0.4, 2).tolist()
    motion = np.stack([zoom * x - turn * y, zoom * y + turn * x])
    motion = motion + direction() * rng.uniform(0, 0.5)
    for _ in range(2):  # parallax of the background's parts
        motion = motion + direction() * rng.uniform(0.1, 0.4) * step(noise(rng, size, 3) - 0.9, 0.2)
    for share in shares:
        around = (motion * share).sum((1, 2), keepdims=True) / share.sum()
        motion = blend(motion, around + direction() * rng.uniform(0.35, 0.7), share)
    motion = motion + 0.03 * np.stack([noise(rng, size, 8, 20), noise(rng, size, 8, 20)])
    hue, speed = np.arctan2(motion[1], motion[0]) / (2 * math.pi) % 1, np.hypot(*motion).clip(0, 1)
    wheel = Image.merge(
        "HSV",
        [
            Image.fromarray((255 * band).astype(np.uint8))
            for band in (hue, speed, np.ones_like(speed))
        ],
    ).convert("RGB")
    wheel = wheel.filter(ImageFilter.GaussianBlur(0.006 * size))
    return np.asarray(wheel, np.float32).transpose(2, 0, 1) / 255


# ---- Words -------------------------------------------------------------------------------------
def phrase(colour: str, kind: str, count: int = 1) -> str:
    """'a red star', 'an orange ring', 'two blue crosses'."""
    if count > 1:
        return f"{NUMBERS[count]} {colour} {kind}{'es' if kind.endswith('s') else 's'}"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}"


def write_captions(rng: np.random.Generator, ground: str, objects: list[dict]) -> list[str]:
    """Five true sentences: all objects on their background, up to three relations, lists."""
    seen = [(one["colour"], one["class"]) for one in objects]
    groups = [phrase(*pair, seen.count(pair)) for pair in dict.fromkeys(seen)]
    rng.shuffle(groups)
    everything = " and ".join(filter(None, [", ".join(groups[:-1]), groups[-1]]))
    where = f"on a {ground} background" if ground in BACKGROUNDS else f"on {ground}"
    relations = []
    for a, one in zip(seen, objects):
        for b, two in zip(seen, objects):
            dx, dy = np.subtract(one["centre"], two["centre"])
            if a != b and max(abs(dx), abs(dy)) >= MARGIN:
                word = (
                    ("above" if dy < 0 else "below")
                    if abs(dy) > abs(dx)
                    else ("left of" if dx < 0 else "right of")
                )
                relations.append(f"{phrase(*a)} {word} {phrase(*b)}")
    relations = list(dict.fromkeys(relations))
    rng.shuffle(relations)
    lists = [
        f"a picture of {everything}",
        f"{where}, {everything}",
        f"{everything} in the picture",
        f"there {'are' if len(seen) > 1 else 'is'} {everything}",
    ]
    rng.shuffle(lists)
    return [f"{everything} {where}", *relations[:3], *lists][:5]


# ---- The data set ------------------------------------------------------------------------------
class Shapes(Dataset):
    """Synthetic scenes; the head of the file says of what.

    split: "train" (480 scenes) or "test" (120). modality: None, "depth", "thermal" or "flow".
    view: "side" or "top". size: height and width in pixels, 32 or more so that all can be seen.
    count: another number of scenes, which begin with the same ones. seed: another world, 0 or more.
    named: only things of the classes `NAMED` are salient and described (view "side" alone).
    `classes` are the view's class names, `names` the scenes' names, `title` is for messages.
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
        self.split, self.modality, self.view = split, modality, view
        self.size, self.seed, self.named = size, seed, named
        self.classes = CLASSES if view == "side" else TOP_CLASSES
        stem = f"shapes{'-named' * named}{'-top' * (view == 'top')}-{split}"
        self.names = [f"{stem}-{i:05d}" for i in range(COUNTS[split] if count is None else count)]
        self.title = f"{stem} with {modality}" if modality else stem

    def __len__(self) -> int:
        return len(self.names)

    def stream(self, i: int, name: str) -> np.random.Generator:
        """The random numbers of scene `i` for one of `STREAMS`."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.title} has {len(self)} scenes, not one of number {i}")
        return np.random.default_rng(
            (
                self.seed,
                list(COUNTS).index(self.split),
                VIEWS.index(self.view),
                int(i),
                STREAMS.index(name),
            )
        )

    def labels(self, i: int) -> torch.Tensor:
        """1 for the classes in scene `i`, else 0; draws nothing. float [len(self.classes)]"""
        things = lay_out(self.stream(i, "layout"), self.view, self.named)[2]
        kinds = {thing.kind for thing in things}
        return torch.tensor([float(name in kinds) for name in self.classes])

    def objects(self, i: int) -> list[dict]:
        """The salient objects of scene `i` from the back to the front; paints nothing.

        Each is {"class": str, "colour": str, "mask": what is visible of it, bool [H, W],
        "box": (left, top, right, bottom) in pixels, the last two exclusive,
        "centre": (x, y), the mask's centroid in [0, 1]}.
        """
        things = lay_out(self.stream(i, "layout"), self.view, self.named)[2]
        shares = [coverage([thing.polygon], self.size) for thing in things]
        return self.salient(describe(things, shares))

    def salient(self, objects: list[dict]) -> list[dict]:
        """Those of a scene's objects that are salient: all, or with `named` the named ones."""
        return [one for one in objects if not self.named or one["class"] in NAMED]

    def __getitem__(self, i: int) -> dict:
        """The sample: image uint8 [3, H, W], mask uint8 [1, H, W] of 0 and 255, modality
        uint8 [3, H, W] or None, caption (five sentences), name, size (H, W)."""
        layout = ground, _, things = lay_out(self.stream(i, "layout"), self.view, self.named)
        shares = [coverage([thing.polygon], self.size) for thing in things]
        objects = self.salient(describe(things, shares))
        image = paint(self.stream(i, "paint"), self.view, layout, shares, self.size)
        mask = np.any([one["mask"] for one in objects], 0)[None]  # [1, H, W]
        modality = None
        if self.modality:
            draw = {"depth": depth, "thermal": thermal, "flow": flow}[self.modality]
            picture = draw(self.stream(i, self.modality), shares, self.size)
            picture = (picture.clip(0, 1) * 255).astype(np.uint8)
            modality = torch.from_numpy(picture).expand(3, -1, -1).contiguous()  # grey: 3 times
        return {
            "image": torch.from_numpy(image),
            "mask": torch.from_numpy(mask * np.uint8(255)),
            "modality": modality,
            "caption": write_captions(self.stream(i, "words"), ground, objects),
            "name": self.names[i],
            "size": (self.size, self.size),
        }

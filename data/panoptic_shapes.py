"""Draw a tiny panoptic set in COCO's file formats, so that data/relabel.py runs out of the box.

    python -m data.panoptic_shapes DIR           # DIR/COCO: 120 scenes of train2017, 30 of val2017
    python -m data.relabel --data-root DIR       # choose the salient objects by hand

The photos are scenes of data/shapes.py, cut to 4:3, 3:4 or 1:1, with their captions. Their
objects are things, their textures are stuff, and a seam of void runs around every thing, as in
COCO. What is not salient comes in four kinds, painted in faded colours of the background:

    pebbles     things that no caption names, or only one of the five
    a twin      a thing of an object's class, but of 0.3 % of the picture
    a crowd     a swarm of an object's class in one segment, iscrowd = 1
    the ground  stuff that all captions name

COCO/annotations/salient_<split>.json, which COCO lacks, lists the salient objects' ids per photo.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from common import flags
from common.runtime import cli, progress, save_json, save_png, say, write_atomic
from data.panoptic import encode_ids
from data.shapes import BACKGROUNDS, CLASSES, Shapes, blend, coverage, outline, rgb

SPLITS = {"train2017": ("train", 0), "val2017": ("test", 500_000)}  # shapes' split, first id
SIDE = 320  # of a scene before it is cut
THINGS = (*CLASSES, "pebble")
TINTS = {  # near these colours lie the ids of a category's segments
    "disc": (220, 20, 60),
    "square": (0, 60, 200),
    "triangle": (0, 160, 90),
    "star": (250, 170, 30),
    "ring": (150, 60, 190),
    "cross": (0, 200, 220),
    "heart": (255, 90, 180),
    "crescent": (240, 230, 40),
    "pebble": (130, 110, 90),
    "smooth": (100, 130, 160),
    "striped": (140, 150, 100),
    "mottled": (170, 120, 130),
    "chequered": (90, 90, 110),
    "spotted": (190, 180, 150),
    "hilly": (70, 120, 80),
}
NUMBER = {name: 2 * i + 1 for i, name in enumerate(TINTS)}  # ids with gaps, as COCO's have
CATEGORIES = [
    {
        "supercategory": "shape" if name in THINGS else "ground",
        "color": list(tint),
        "isthing": 1 if name in THINGS else 0,
        "id": NUMBER[name],
        "name": name,
    }
    for name, tint in TINTS.items()
]


class Layer(NamedTuple):
    """A segment of a scene: category, is it a crowd, is it salient, and where: bool [H, W]."""

    category: str
    crowd: bool
    salient: bool
    mask: np.ndarray


def thicken(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A bool mask [H, W] grown by so many pixels, 7 at most, in every direction."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.filter(ImageFilter.BoxBlur(pixels))) > 0  # much faster than MaxFilter


def place(rng: np.random.Generator, kind: str, share: float, free: np.ndarray) -> np.ndarray | None:
    """The coverage [H, W] of a thing with `share` of the picture, where all is free; or None."""
    for _ in range(30):
        polygon = outline(kind) * np.sqrt(share) + rng.uniform(0.08, 0.92, 2)
        found = coverage([polygon], SIDE)
        if free[thicken(found > 0, 6)].all():
            return found


def clutter(
    rng: np.random.Generator, kinds: list[str], free: np.ndarray
) -> Iterator[tuple[str, bool, np.ndarray]]:
    """What is not salient beside objects of the classes `kinds`: (category, crowd, coverage)."""
    # Category, share of the picture, and number of pebbles, of a twin and of a crowd.
    wanted = [("pebble", rng.uniform(0.006, 0.02), 1) for _ in range(rng.integers(1, 5))]
    for share, count in ((0.003, 1), (0.002, 9)):
        kind = str(rng.choice(kinds))
        if rng.random() < 0.4:
            wanted.append((kind, share, count))

    for category, share, count in wanted:
        total = np.zeros_like(free, np.float32)
        for _ in range(count):
            one = place(rng, "disc" if category == "pebble" else category, share, free)
            if one is not None:
                total = np.maximum(total, one)
                free = free & ~thicken(one > 0, 4)
        if total.any():
            yield category, count > 1, total


def window(objects: list[dict], index: int) -> tuple[slice, slice]:
    """Rows and columns of a 4:3 or 3:4 cut that holds all objects, else of the whole picture."""
    left, top, right, bottom = np.array([one["box"] for one in objects]).T
    spans = [(top.min(), bottom.max()), (left.min(), right.max())]
    cut = [slice(0, SIDE), slice(0, SIDE)]
    side = SIDE * 3 // 4
    for axis in (index % 2, 1 - index % 2):
        low, high = map(int, spans[axis])
        if high - low <= side:
            start = min(low, SIDE - side)
            cut[axis] = slice(start, start + side)
            break
    return cut[0], cut[1]


def draw_scene(scenes: Shapes, index: int, seed: int) -> tuple[np.ndarray, list[Layer], list[str]]:
    """Photo uint8 [H, W, 3]; segments, the ground last; five captions."""
    rng = np.random.default_rng((seed, scenes.split == "train", index))
    sample = scenes[index]
    objects = scenes.objects(index)
    image = sample["image"].numpy()  # [3, H, W]
    captions = list(sample["caption"])
    rows, columns = window(objects, index)

    # The objects of the scene are salient.
    layers = [Layer(one["class"], False, True, one["mask"]) for one in objects]
    covered = thicken(np.any([one["mask"] for one in objects], 0), 2)
    inside = np.zeros_like(covered)
    inside[rows, columns] = True
    free = inside & ~covered

    # Clutter is painted in faded colours of the background.
    faded = image[:, free].mean(1)
    for category, crowd, share in clutter(rng, [one["class"] for one in objects], free):
        tint = rgb(*(faded + rng.uniform(-35, 35)).clip(0, 255))
        image = blend(image, tint, 0.6 * share)
        layers.append(Layer(category, crowd, False, share >= 0.5))
    if rng.random() < 0.5:
        captions[-1] += " with some pebbles"

    # The ground is everything else, up to a seam of void.
    seam = thicken(np.any([layer.mask for layer in layers], 0), 2)
    ground = next(name for name in BACKGROUNDS if any(name in text.split() for text in captions))
    layers.append(Layer(ground, False, False, ~seam))

    # Cut everything.
    layers = [layer._replace(mask=layer.mask[rows, columns]) for layer in layers]
    photo = image[:, rows, columns].astype(np.uint8).transpose(1, 2, 0)
    return photo, layers, captions


def annotate(
    layers: list[Layer], rng: np.random.Generator
) -> tuple[np.ndarray, list[dict], list[int]]:
    """Ids int [H, W] near the categories' colours, COCO's segments_info, ids of the salient."""
    ids = np.zeros(layers[0].mask.shape, np.int64)
    infos = []
    salient = []
    for layer in layers:
        # Draw an id until it is new.
        number = 0
        while number == 0 or number in [info["id"] for info in infos]:
            colour = (TINTS[layer.category] + rng.integers(-30, 31, 3)).clip(0, 255)
            number = int(colour @ (1, 256, 65536))
        ids[layer.mask] = number
        if layer.salient:
            salient.append(number)

        # Describe the segment as COCO does.
        rows = np.flatnonzero(layer.mask.any(1))
        columns = np.flatnonzero(layer.mask.any(0))
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        infos.append(
            {
                "id": number,
                "category_id": NUMBER[layer.category],
                "iscrowd": 1 if layer.crowd else 0,
                "bbox": [int(edge) for edge in box],
                "area": int(layer.mask.sum()),
            }
        )
    return ids, infos, salient


def write_split(root: Path, split: str, count: int, seed: int) -> None:
    """Write `count` scenes: photos, PNGs, and the JSON files of segments and captions."""
    source, first = SPLITS[split]
    scenes = Shapes(source, size=SIDE, count=count, seed=seed)
    folder = root / "annotations"
    images = []
    annotations = []
    captions = []
    salient = {}
    for index in progress(range(count), f"draw {split}"):
        number = first + index + 1
        stem = f"{number:012d}"
        photo, layers, texts = draw_scene(scenes, index, seed)
        ids, infos, salient[stem] = annotate(layers, np.random.default_rng((seed, number)))
        save_jpeg(root / split / f"{stem}.jpg", photo)
        save_png(folder / f"panoptic_{split}" / f"{stem}.png", encode_ids(ids))

        # What the JSON files say of the scene.
        height, width = ids.shape
        image = {"license": 0, "file_name": f"{stem}.jpg", "height": height, "width": width}
        images.append(image | {"id": number})
        annotations.append({"segments_info": infos, "file_name": f"{stem}.png", "image_id": number})
        for k, text in enumerate(texts):
            captions.append({"image_id": number, "id": 10 * number + k, "caption": text})

    info = {"info": {"description": "shapes in COCO's formats"}, "licenses": [], "images": images}
    panoptic = info | {"annotations": annotations, "categories": CATEGORIES}
    save_json(folder / f"panoptic_{split}.json", panoptic)
    save_json(folder / f"captions_{split}.json", info | {"annotations": captions})
    save_json(folder / f"salient_{split}.json", salient)


def save_jpeg(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as JPEG atomically."""
    picture = Image.fromarray(pixels)
    write_atomic(path, lambda part: picture.save(part, "JPEG", quality=92))


def main(argv: list[str] | None = None) -> None:
    """Write DIR/COCO with the splits train2017 and val2017."""
    parser = argparse.ArgumentParser(
        prog="python -m data.panoptic_shapes", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a data root")
    parser.add_argument(
        "--count", type=flags.positive, default=120, metavar="N", help="scenes of train2017 [120]"
    )
    parser.add_argument("--seed", type=flags.seed, default=0, help="of the scenes [0]")
    args = parser.parse_args(argv)
    root = args.folder / "COCO"
    write_split(root, "train2017", args.count, args.seed)
    write_split(root, "val2017", math.ceil(args.count / 4), args.seed)
    say(f"label them: python -m data.relabel --data-root {args.folder}")


if __name__ == "__main__":
    cli(main)

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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from common.runtime import cli, progress, save_json, save_png, write_atomic
from data.panoptic import encode_ids
from data.shapes import BACKGROUNDS, CLASSES, Shapes, blend, coverage, outline, rgb

SPLITS = {"train2017": ("train", 0), "val2017": ("test", 500_000)}  # shapes' split, first id
SIDE = 320
THINGS = (*CLASSES, "pebble")
TINTS = dict(
    zip(
        (*THINGS, *BACKGROUNDS),
        (
            (220, 20, 60),
            (0, 60, 200),
            (0, 160, 90),
            (250, 170, 30),
            (150, 60, 190),
            (0, 200, 220),
            (255, 90, 180),
            (240, 230, 40),
            (130, 110, 90),
            (100, 130, 160),
            (140, 150, 100),
            (170, 120, 130),
            (90, 90, 110),
            (190, 180, 150),
            (70, 120, 80),
        ),
    )
)
CATEGORIES = [
    {
        "supercategory": "shape" if name in THINGS else "ground",
        "color": list(tint),
        "isthing": int(name in THINGS),
        "id": 2 * i + 1,
        "name": name,
    }  # COCO's have gaps
    for i, (name, tint) in enumerate(TINTS.items())
]
NUMBER = {category["name"]: category["id"] for category in CATEGORIES}


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
    wanted = [("pebble", rng.uniform(0.006, 0.02), 1) for _ in range(rng.integers(1, 5))]
    wanted += [(str(rng.choice(kinds)), 0.003, 1)] * int(rng.random() < 0.4)  # a twin
    wanted += [(str(rng.choice(kinds)), 0.002, 9)] * int(rng.random() < 0.4)  # a crowd
    for category, share, count in wanted:
        crowd = np.zeros_like(free, np.float32)
        for _ in range(count):
            one = place(rng, "disc" if category == "pebble" else category, share, free)
            if one is not None:
                crowd = np.maximum(crowd, one)
                free = free & ~thicken(one > 0, 4)
        if crowd.any():
            yield category, count > 1, crowd


def window(objects: list[dict], index: int) -> tuple[slice, slice]:
    """Rows and columns of a 4:3 or 3:4 cut that holds all objects, else of the whole picture."""
    left, top, right, bottom = np.array([one["box"] for one in objects]).T
    spans = [(top.min(), bottom.max()), (left.min(), right.max())]
    cut, side = [slice(0, SIDE), slice(0, SIDE)], SIDE * 3 // 4
    for axis in (index % 2, 1 - index % 2):
        low, high = map(int, spans[axis])
        if high - low <= side:
            start = min(low, SIDE - side)
            cut[axis] = slice(start, start + side)
            break
    return cut[0], cut[1]


def draw_scene(scenes: Shapes, index: int, seed: int) -> tuple[np.ndarray, list, list[str]]:
    """Photo uint8 [H, W, 3]; layers (category, crowd, salient, mask [H, W]); five captions."""
    rng = np.random.default_rng((seed, scenes.split == "train", index))
    sample, objects = scenes[index], scenes.objects(index)
    image, captions = sample["image"].numpy(), list(sample["caption"])
    rows, columns = window(objects, index)
    covered = thicken(np.any([one["mask"] for one in objects], 0), 2)
    inside = np.zeros_like(covered)
    inside[rows, columns] = True
    layers = [(one["class"], False, True, one["mask"]) for one in objects]
    faded = image[:, inside & ~covered].mean(1)
    for category, crowd, share in clutter(
        rng, [one["class"] for one in objects], inside & ~covered
    ):
        tint = rgb(*(faded + rng.uniform(-35, 35)).clip(0, 255))
        image = blend(image, tint, 0.6 * share)
        layers.append((category, crowd, False, share >= 0.5))
    if rng.random() < 0.5:
        captions[-1] += " with some pebbles"
    seam = thicken(np.any([mask for *_, mask in layers], 0), 2)
    ground = next(name for name in BACKGROUNDS if any(name in text.split() for text in captions))
    layers.append((ground, False, False, ~seam))
    layers = [(*what, mask[rows, columns]) for *what, mask in layers]
    return image[:, rows, columns].astype(np.uint8).transpose(1, 2, 0), layers, captions


def annotate(layers: list, rng: np.random.Generator) -> tuple[np.ndarray, list[dict], list[int]]:
    """Ids int [H, W] near the categories' colours, COCO's segments_info, ids of the salient."""
    ids, infos, salient = np.zeros(layers[0][-1].shape, np.int64), [], []
    for category, crowd, is_salient, mask in layers:
        new = 0
        while new == 0 or new in [info["id"] for info in infos]:
            colour = (TINTS[category] + rng.integers(-30, 31, 3)).clip(0, 255)
            new = int(colour @ (1, 256, 65536))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        ids[mask] = new
        infos.append(
            {
                "id": new,
                "category_id": NUMBER[category],
                "iscrowd": int(crowd),
                "bbox": [*map(int, box)],
                "area": int(mask.sum()),
            }
        )
        salient += [new] * is_salient
    return ids, infos, salient


def write_split(root: Path, split: str, count: int, seed: int) -> None:
    """Write `count` scenes: photos, PNGs, and the JSON files of segments and captions."""
    source, first = SPLITS[split]
    scenes = Shapes(source, size=SIDE, count=count, seed=seed)
    images, annotations, captions, salient = [], [], [], {}
    for index in progress(range(count), f"draw {split}"):
        number = first + index + 1
        stem = f"{number:012d}"
        photo, layers, texts = draw_scene(scenes, index, seed)
        ids, infos, salient[stem] = annotate(layers, np.random.default_rng((seed, number)))
        write_atomic(
            root / split / f"{stem}.jpg",
            lambda part, pixels=photo: Image.fromarray(pixels).save(part, "JPEG", quality=92),
        )
        save_png(root / "annotations" / f"panoptic_{split}" / f"{stem}.png", encode_ids(ids))
        images.append(
            {
                "license": 0,
                "file_name": f"{stem}.jpg",
                "height": photo.shape[0],
                "width": photo.shape[1],
                "id": number,
            }
        )
        annotations.append({"segments_info": infos, "file_name": f"{stem}.png", "image_id": number})
        captions += [
            {"image_id": number, "id": 10 * number + k, "caption": text}
            for k, text in enumerate(texts)
        ]
    info = {"info": {"description": "shapes in COCO's formats"}, "licenses": [], "images": images}
    folder = root / "annotations"
    save_json(
        folder / f"panoptic_{split}.json",
        info | {"annotations": annotations, "categories": CATEGORIES},
    )
    save_json(folder / f"captions_{split}.json", info | {"annotations": captions})
    save_json(folder / f"salient_{split}.json", salient)


def main(argv: list[str] | None = None) -> None:
    """Write DIR/COCO with the splits train2017 and val2017."""
    parser = argparse.ArgumentParser(
        prog="python -m data.panoptic_shapes", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a data root")
    parser.add_argument("--count", type=int, default=120, help="scenes of train2017 [120]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for split, count in (("train2017", args.count), ("val2017", -(-args.count // 4))):
        write_split(args.folder / "COCO", split, count, args.seed)
    print(f"label them: python -m data.relabel --data-root {args.folder}")


if __name__ == "__main__":
    cli(main)

"""COCO's panoptic annotations: every pixel belongs to one named segment, or to none (void).

    scenes = Panoptic("data/COCO", "val2017")
    scenes.segments(0)      [Segment(id=3226956, category="person", thing=True, …), …]
    scenes.labels(0)        uint16 [H, W]: 0 is void, k is segments(0)[k - 1]
    scenes[0]               a sample like any other data set's, with "segments" and "labels"

Files, as COCO's archives hold them:

    annotations/panoptic_val2017.json     categories, images, one annotation per image
    annotations/panoptic_val2017/*.png    or panoptic_val2017/*.png
    val2017/*.jpg                         the photos

A PNG spells the id of a pixel's segment as its colour: id = R + 256 G + 65536 B, 0 is void. Things
(isthing) can be counted, stuff (sky, grass) cannot; a crowd (iscrowd) is several things in one
segment. Photos that are not there are left out, so a part of COCO will do.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from common.datasets import MissingSet, load_image, read, some
from common.runtime import UserError


class Segment(NamedTuple):
    """One segment of an image; area in pixels, box (left, top, width, height)."""

    id: int
    category: str
    thing: bool
    crowd: bool
    area: int
    box: tuple[int, int, int, int]


class Row(NamedTuple):
    """One image of the JSON: file names, (H, W), and segments_info as it is."""

    photo: str
    size: tuple[int, int]
    png: str
    segments: list[dict]


def decode_ids(pixels: np.ndarray) -> np.ndarray:
    """Colours to ids, id = R + 256 G + 65536 B. uint8 [H, W, 3] -> int32 [H, W], below 2^24"""
    return pixels.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """Ids from 0 to 2^24 - 1 to colours. int [H, W] -> uint8 [H, W, 3]"""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)


class Panoptic(Dataset):
    """The panoptic annotations of one split, in the order of its JSON.

    root: the folder of COCO's archives;  split: train2017, val2017, …;  only: these stems.
    `names` are the photos' stems, `categories` is {id: (name, is a thing)}.
    Raises `UserError`: missing or malformed annotations, no photos; when a scene is read: a PNG
    that is missing, broken, or fits neither its photo nor the JSON.
    """

    def __init__(self, root: str | Path, split: str, only: Iterable[str] | None = None):
        self.root, self.split, self.title = Path(root), split, f"panoptic {split}"
        self.json = self.root / "annotations" / f"panoptic_{split}.json"
        self.categories, rows = read_annotations(self.json)
        folder = self.root / split
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        self.rows = [row for row in rows if row.photo in there]
        if not self.rows:
            raise MissingSet(
                f"none of the {len(rows)} photos of {self.json} are in {folder}; "
                f"unpack {split}.zip there, see data/README.md"
            )
        if only is not None:
            wanted = set(only)
            self.rows = [row for row in self.rows if Path(row.photo).stem in wanted]
            lost = sorted(wanted.difference(Path(row.photo).stem for row in self.rows))
            if lost or not wanted:
                raise UserError(
                    f"{len(lost)} of the {len(wanted)} stems asked for are not in "
                    f"{self.title}: {some(lost)}"
                )
        self.names = [Path(row.photo).stem for row in self.rows]
        homes = [base / f"panoptic_{split}" for base in (self.json.parent, self.root)]
        self.folder = next((home for home in homes if home.is_dir()), None)
        if self.folder is None:
            raise MissingSet(
                f"there is no folder {homes[0]}; the archive of the annotations holds "
                f"panoptic_{split}.zip, which is to be unpacked, too"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def photo(self, i: int) -> Path:
        """The file of photo `i`."""
        return self.root / self.split / self.rows[i].photo

    def size(self, i: int) -> tuple[int, int]:
        """(H, W) of scene `i` according to the JSON."""
        return self.rows[i].size

    def segments(self, i: int) -> list[Segment]:
        """The segments of scene `i`, as the JSON lists them; opens no picture."""
        try:
            return [
                Segment(
                    s["id"],
                    *self.categories[s["category_id"]],
                    bool(s["iscrowd"]),
                    s["area"],
                    tuple(s["bbox"]),
                )
                for s in self.rows[i].segments
            ]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.json}: a segment of {self.names[i]} is malformed ({error!r}); "
                "fetch the annotations again"
            ) from None

    def labels(self, i: int) -> np.ndarray:
        """Which segment each pixel of scene `i` belongs to: 0 is void, k is segments(i)[k - 1].
        uint16 [H, W]"""
        path, (height, width) = self.folder / self.rows[i].png, self.size(i)
        picture = read(path)
        if picture.mode != "RGB" or picture.size != (width, height):
            raise UserError(
                f"{path} is a {picture.mode} picture of {picture.width} x "
                f"{picture.height} pixels, not RGB of {width} x {height} as in "
                f"{self.json.name}; fetch the panoptic annotations again"
            )
        found = decode_ids(np.asarray(picture))
        known = np.array([0] + [segment.id for segment in self.segments(i)])
        order = np.argsort(known)
        place = np.searchsorted(known, found, sorter=order).clip(max=len(known) - 1)
        labels = order[place].astype(np.uint16)  # [H, W]
        strange = np.unique(found[known[labels] != found])
        absent = np.setdiff1d(np.arange(len(known)), [0, *np.unique(labels)])
        if len(strange) or len(absent):
            ids = [str(id) for id in (*strange, *known[absent])]
            where = "the picture" if len(strange) else self.json.name
            raise UserError(
                f"{path} does not belong to {self.json.name}: id {some(ids)} in "
                f"{where} only; fetch the panoptic annotations again"
            )
        return labels

    def mask(self, i: int, chosen: Iterable[int]) -> np.ndarray:
        """The union of the segments with the ids `chosen` of scene `i`. uint8 [H, W], 0 or 255"""
        chosen = set(chosen)
        table = [0] + [255 * (segment.id in chosen) for segment in self.segments(i)]
        return np.array(table, np.uint8)[self.labels(i)]

    def __getitem__(self, i: int) -> dict:
        image, labels = load_image(self.photo(i)), self.labels(i)
        if image.shape[1:] != labels.shape:
            raise UserError(
                f"{self.photo(i)} is {image.shape[2]} x {image.shape[1]} pixels, but "
                f"its PNG is {labels.shape[1]} x {labels.shape[0]}; fetch it again"
            )
        return {
            "image": image,
            "mask": None,
            "modality": None,
            "caption": None,
            "labels": labels,
            "name": self.names[i],
            "size": self.size(i),
            "segments": self.segments(i),
        }


def read_annotations(path: Path) -> tuple[dict[int, tuple[str, bool]], list[Row]]:
    """({category id: (name, is a thing)}, one row per annotated image).

    Raises `UserError` for a file of another form, and for file names that leave their folder.
    """
    if not path.is_file():
        raise MissingSet(
            f"there is no file {path}; unpack COCO's panoptic annotations into "
            f"{path.parent.parent}, see data/README.md"
        )
    try:
        content = json.loads(path.read_bytes())
        categories = {c["id"]: (c["name"], bool(c["isthing"])) for c in content["categories"]}
        photos = {
            image["id"]: (image["file_name"], (image["height"], image["width"]))
            for image in content["images"]
        }
        rows = [
            Row(*photos[a["image_id"]], a["file_name"], a["segments_info"])
            for a in content["annotations"]
        ]
        outside = [
            name for row in rows for name in (row.photo, row.png) if re.search(r"[/\\]|^\.*$", name)
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} does not hold panoptic annotations ({error!r}); fetch it again"
        ) from None
    if outside:
        raise UserError(f"{path} names files outside of their folder: {some(outside)}")
    return categories, rows

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

The JSON is checked once, when it is opened (`read_annotations`); a scene's PNG and the size of its
photo are checked where they are read (`Panoptic.labels`).
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from common.datasets import MissingSet, some
from common.images import load_image, read
from common.runtime import UserError

IDS = 1 << 24  # ids are below this number: a PNG's colour has 24 bits


class Segment(NamedTuple):
    """One segment of an image; area in pixels, box (left, top, width, height)."""

    id: int
    category: str
    thing: bool
    crowd: bool
    area: int
    box: tuple[int, int, int, int]


class Row(NamedTuple):
    """One image of the JSON: file names, (H, W), and segments."""

    photo: str
    size: tuple[int, int]
    png: str
    segments: list[Segment]


def decode_ids(pixels: np.ndarray) -> np.ndarray:
    """Colours to ids, id = R + 256 G + 65536 B. uint8 [H, W, 3] -> int32 [H, W], below 2^24"""
    return pixels.astype(np.int32) @ np.array([1, 1 << 8, 1 << 16], np.int32)


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """Ids from 0 to 2^24 - 1 to colours. int [H, W] -> uint8 [H, W, 3]"""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)


class Panoptic(Dataset):
    """The panoptic annotations of one split, in the order of its JSON.

    root: the folder of COCO's archives;  split: train2017, val2017, …;  only: these stems.
    `names` are the photos' stems.
    Raises `UserError`: missing or malformed annotations, no photos; when a scene is read: a PNG
    that is missing, broken, or fits neither its photo nor the JSON.
    """

    def __init__(self, root: str | Path, split: str, only: Iterable[str] | None = None):
        self.root = Path(root)
        self.split = split
        self.title = f"panoptic {split}"
        self.json = self.root / "annotations" / f"panoptic_{split}.json"
        photos = self.root / split
        there = {path.name for path in photos.iterdir()} if photos.is_dir() else set()
        self.categories, self.rows = read_annotations(self.json, there)
        if not self.rows:
            raise MissingSet(
                f"none of the photos of {self.json} are in {photos}; "
                f"unpack {split}.zip there, see data/README.md"
            )
        if only is not None:
            self.keep(set(only))
        self.names = [Path(row.photo).stem for row in self.rows]

        # The PNGs lie beside the JSON, or beside the photos.
        homes = [base / f"panoptic_{split}" for base in (self.json.parent, self.root)]
        self.folder = next((home for home in homes if home.is_dir()), None)
        if self.folder is None:
            raise MissingSet(
                f"there is no folder {homes[0]}; the archive of the annotations holds "
                f"panoptic_{split}.zip, which is to be unpacked, too"
            )

    def keep(self, wanted: set[str]) -> None:
        """Keep the images with these stems alone; raises `UserError` if one is not there."""
        self.rows = [row for row in self.rows if Path(row.photo).stem in wanted]
        lost = sorted(wanted.difference(Path(row.photo).stem for row in self.rows))
        if lost or not wanted:
            raise UserError(
                f"{len(lost)} of the {len(wanted)} stems asked for are not in "
                f"{self.title}: {some(lost)}"
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
        return self.rows[i].segments

    def labels(self, i: int) -> np.ndarray:
        """Which segment each pixel of scene `i` belongs to: 0 is void, k is segments(i)[k - 1].

        uint16 [H, W]. Raises `UserError` for a PNG that does not fit the JSON, and for a photo of
        another size.
        """
        path = self.folder / self.rows[i].png
        height, width = self.size(i)
        picture = read(path)
        if picture.mode != "RGB" or picture.size != (width, height):
            raise UserError(
                f"{path} is a {picture.mode} picture of {picture.width} x "
                f"{picture.height} pixels, not RGB of {width} x {height} as in "
                f"{self.json.name}; fetch the panoptic annotations again"
            )
        rows, columns = photo_size(self.photo(i))
        if (rows, columns) != (height, width):
            raise UserError(
                f"{self.photo(i)} is {columns} x {rows} pixels, but its PNG is "
                f"{width} x {height}; fetch the photo again"
            )

        # Look each pixel's id up among the ids of the JSON, of which 0 is void.
        found = decode_ids(np.asarray(picture))
        known = np.array([0] + [segment.id for segment in self.segments(i)])
        order = np.argsort(known)
        place = np.searchsorted(known, found, sorter=order).clip(max=len(known) - 1)
        labels = order[place].astype(np.uint16)  # [H, W]

        # Every id must occur in both.
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
        values = [0]  # of void
        for segment in self.segments(i):
            values.append(255 if segment.id in chosen else 0)
        return np.array(values, np.uint8)[self.labels(i)]

    def __getitem__(self, i: int) -> dict:
        labels = self.labels(i)
        return {
            "image": load_image(self.photo(i)),
            "mask": None,
            "modality": None,
            "caption": None,
            "labels": labels,
            "name": self.names[i],
            "size": self.size(i),
            "segments": self.segments(i),
        }


def photo_size(path: Path) -> tuple[int, int]:
    """(H, W) of a photo, turned as its EXIF tag says, from the head of its file."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception:  # decoding the whole photo tells what is wrong with it, if anything is
        return tuple(load_image(path).shape[1:])
    return (width, height) if turned else (height, width)


# ---- The JSON ------------------------------------------------------------------------------------
Categories = dict[int, tuple[str, bool]]  # {id: (name, is a thing)}


def read_annotations(path: Path, there: set[str]) -> tuple[Categories, list[Row]]:
    """Categories, and one row for each annotated image whose photo is among the names `there`.

    Raises `UserError` for a file of another form, and for file names that leave their folder.
    """
    if not path.is_file():
        raise MissingSet(
            f"there is no file {path}; unpack COCO's panoptic annotations into "
            f"{path.parent.parent}, see data/README.md"
        )
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also bytes that are no text
        raise UserError(f"{path} is not readable JSON ({error}); fetch it again") from None

    try:
        categories = {c["id"]: (text(c["name"]), flag(c["isthing"])) for c in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        if len(images) < len(content["images"]):
            raise ValueError("two images have one id")
        annotations = [(images[a["image_id"]], a) for a in content["annotations"]]
        stems = {Path(file_name(image, path)).stem for image, _ in annotations}
        if len(stems) < len(annotations):
            raise ValueError("a photo is listed twice")
        rows = []
        for image, annotation in annotations:
            if image["file_name"] in there:
                rows.append(read_row(image, annotation, categories, path))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not hold panoptic annotations ({reason(error)}); fetch it again"
        ) from None
    return categories, rows


def read_row(image: dict, annotation: dict, categories: Categories, path: Path) -> Row:
    """The row of one image and its annotation."""
    photo = image["file_name"]
    height = image["height"]
    width = image["width"]
    if not type(height) is type(width) is int or min(height, width) < 1:
        raise ValueError(f"the size of {photo} is {width} x {height}")
    try:
        segments = [read_segment(info, categories) for info in annotation["segments_info"]]
        if len({segment.id for segment in segments}) < len(segments):
            raise ValueError("two segments have one id")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: the segments of {photo} are malformed ({reason(error)}); fetch the "
            "annotations again"
        ) from None
    return Row(photo, (height, width), file_name(annotation, path), segments)


def read_segment(info: dict, categories: Categories) -> Segment:
    """A segment from an entry of segments_info."""
    number = info["id"]
    box = info["bbox"]
    if type(number) is not int or not 0 < number < IDS:
        raise ValueError(f"id {number!r} is not a whole number from 1 to {IDS - 1}")
    if info["category_id"] not in categories:
        raise ValueError(f"category_id {info['category_id']} is none of the file's categories")
    if not is_size(info["area"]):
        raise ValueError(f"area {info['area']!r} is not a number of at least 0")
    if not isinstance(box, list) or len(box) != 4 or not all(is_size(edge) for edge in box):
        raise ValueError(f"bbox {box!r} is not four numbers of at least 0")
    name, thing = categories[info["category_id"]]
    return Segment(number, name, thing, flag(info["iscrowd"]), info["area"], tuple(box))


def is_size(value) -> bool:
    """Whether a value of a JSON is a number of at least 0."""
    return type(value) in (int, float) and 0 <= value < 1 << 31


def reason(error: Exception) -> str:
    """What is wrong with an entry of the JSON."""
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def flag(value) -> bool:
    """A value 0 or 1 of a JSON; else a `ValueError`."""
    if value not in (0, 1):
        raise ValueError(f"{value!r} is neither 0 nor 1")
    return bool(value)


def text(value) -> str:
    """`value`, if it is text; else a `ValueError`."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a name")
    return value


def file_name(entry: dict, path: Path) -> str:
    """The file name in an entry of the JSON `path`; raises `UserError` if it leaves its folder."""
    name = text(entry["file_name"])
    if re.search(r"[/\\\0]|^\.*$", name):
        raise UserError(f"{path} names a file outside of its folder: {name!r}")
    return name

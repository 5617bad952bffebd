"""COCO's panoptic annotations: ids, void, crowds, and what bad files say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.runtime import UserError
from data.panoptic import Panoptic, decode_ids, encode_ids

ROOT = Path(__file__).parent.parent
IDS = np.array([[5, 5, 0, 0], [5, 70000, 70000, 0], [16777215, 16777215, 70000, 0]])  # [3, 4]
CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1, "supercategory": "person"},
    {"id": 17, "name": "cat", "isthing": 1, "supercategory": "animal"},
    {"id": 187, "name": "sky-other-merged", "isthing": 0, "supercategory": "sky"},
]
SEGMENTS = [
    {"id": 70000, "category_id": 17, "iscrowd": 1, "area": 3, "bbox": [1, 1, 2, 2]},
    {"id": 5, "category_id": 187, "iscrowd": 0, "area": 3, "bbox": [0, 0, 2, 2]},
    {"id": 16777215, "category_id": 1, "iscrowd": 0, "area": 2, "bbox": [0, 2, 2, 1]},
]


def annotations(stems=("000000000009",)) -> dict:
    """The JSON of images that are all 4 wide and 3 high, with the segments above."""
    return {
        "categories": [*CATEGORIES],
        "images": [{"id": int(s), "file_name": f"{s}.jpg", "height": 3, "width": 4} for s in stems],
        "annotations": [
            {"image_id": int(s), "file_name": f"{s}.png", "segments_info": SEGMENTS} for s in stems
        ],
    }


def make(root: Path, content: dict | None = None, home: str = "annotations") -> Path:
    """A set of the images in `content`, in COCO's layout."""
    content = content or annotations()
    for folder in (root / "val2017", root / "annotations", root / home / "panoptic_val2017"):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
    for image in content["images"]:
        stem = Path(image["file_name"]).stem
        Image.new("RGB", (4, 3), (9, 9, 9)).save(root / "val2017" / f"{stem}.jpg")
        Image.fromarray(encode_ids(IDS)).save(root / home / "panoptic_val2017" / f"{stem}.png")
    return root


def error(call, *args) -> str:
    """The one-line message of the `UserError` that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Ids -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "colour, number",
    [
        ((0, 0, 0), 0),
        ((1, 0, 0), 1),
        ((0, 1, 0), 256),
        ((0, 0, 1), 65536),
        ((255, 0, 0), 255),
        ((255, 255, 0), 65535),
        ((12, 34, 56), 3678732),
        ((255, 255, 255), 2**24 - 1),
    ],
)
def test_ids_by_hand(colour, number):
    pixels = np.array([[colour]], np.uint8)
    assert decode_ids(pixels).tolist() == [[number]]
    assert encode_ids(np.array([[number]])).tolist() == pixels.tolist()


def test_every_id_survives_a_png(tmp_path):
    ids = np.random.default_rng(0).integers(0, 1 << 24, (50, 70))
    Image.fromarray(encode_ids(ids)).save(tmp_path / "a.png")
    assert (decode_ids(np.asarray(Image.open(tmp_path / "a.png"))) == ids).all()


# ---- A scene -------------------------------------------------------------------------------------
@pytest.mark.parametrize("home", ["annotations", "."])  # where panoptic_val2017/ was unpacked
def test_scene_of_things_stuff_crowd_and_void(tmp_path, home):
    scenes = Panoptic(make(tmp_path, home=home), "val2017")
    assert scenes.names == ["000000000009"] and scenes.size(0) == (3, 4)
    assert [tuple(s) for s in scenes.segments(0)] == [
        (70000, "cat", True, True, 3, (1, 1, 2, 2)),
        (5, "sky-other-merged", False, False, 3, (0, 0, 2, 2)),
        (16777215, "person", True, False, 2, (0, 2, 2, 1)),
    ]
    labels = scenes.labels(0)
    assert labels.dtype == np.uint16
    assert labels.tolist() == [[2, 2, 0, 0], [2, 1, 1, 0], [3, 3, 1, 0]]
    assert scenes.mask(0, [70000, 16777215]).tolist() == [
        [0, 0, 0, 0],
        [0, 255, 255, 0],
        [255, 255, 255, 0],
    ]
    assert scenes.mask(0, []).max() == 0  # void is never chosen
    sample = scenes[0]
    assert sample["image"].shape == (3, 3, 4) and sample["size"] == (3, 4)
    assert (sample["labels"] == labels).all() and sample["segments"] == scenes.segments(0)


def test_photos_that_are_not_there_are_left_out(tmp_path):
    make(tmp_path, annotations(["000000000001", "000000000002", "000000000003"]))
    (tmp_path / "val2017/000000000002.jpg").unlink()
    assert Panoptic(tmp_path, "val2017").names == ["000000000001", "000000000003"]
    assert Panoptic(tmp_path, "val2017", ["000000000003"]).names == ["000000000003"]
    text = error(Panoptic, tmp_path, "val2017", ["000000000002", "000000000003"])
    assert "1 of the 2 stems" in text and "000000000002" in text
    assert "0 of the 0" in error(Panoptic, tmp_path, "val2017", [])


# ---- Bad files -----------------------------------------------------------------------------------
def test_what_is_missing_is_named(tmp_path):
    assert "panoptic_val2017.json" in error(Panoptic, tmp_path, "val2017")
    make(tmp_path)
    (tmp_path / "annotations/panoptic_val2017/000000000009.png").unlink()
    assert "000000000009.png" in error(Panoptic(tmp_path, "val2017").labels, 0)
    (tmp_path / "annotations/panoptic_val2017").rmdir()
    assert "panoptic_val2017.zip" in error(Panoptic, tmp_path, "val2017")
    (tmp_path / "val2017/000000000009.jpg").unlink()
    assert "none of the photos" in error(Panoptic, tmp_path, "val2017")


@pytest.mark.parametrize(
    "pixels, said",
    [
        (IDS[:, :3], "RGB picture of 3 x 3 pixels, not RGB of 4 x 3"),
        (np.where(IDS == 5, 6, IDS), "id 6, 5 in the picture only"),
        (np.where(IDS == 5, 0, IDS), "id 5 in panoptic_val2017.json only"),
        (np.where(IDS == 0, 16777214, IDS), "id 16777214 in the picture only"),
    ],
)
def test_a_png_of_another_image_is_refused(tmp_path, pixels, said):
    scenes = Panoptic(make(tmp_path), "val2017")
    path = tmp_path / "annotations/panoptic_val2017/000000000009.png"
    Image.fromarray(encode_ids(pixels)).save(path)
    text = error(scenes.labels, 0)
    assert said in text and str(path) in text


def test_a_broken_or_grey_png_is_refused(tmp_path):
    scenes = Panoptic(make(tmp_path), "val2017")
    path = tmp_path / "annotations/panoptic_val2017/000000000009.png"
    for content in (b"", b"no picture", path.read_bytes()[:60]):
        path.write_bytes(content)
        assert "000000000009.png" in error(scenes.labels, 0)
    Image.fromarray(IDS.astype(np.uint8)).save(path)  # a semantic map: one byte per pixel
    assert "L picture" in error(scenes.labels, 0)


def test_a_photo_of_another_size_is_refused(tmp_path):
    scenes = Panoptic(make(tmp_path), "val2017")
    path = tmp_path / "val2017/000000000009.jpg"
    Image.new("RGB", (3, 4)).save(path)
    for call in (scenes.__getitem__, scenes.labels):  # also where the photo itself is not read
        text = error(call, 0)
        assert "000000000009.jpg is 3 x 4" in text and "4 x 3" in text
    path.write_bytes(b"no photo")
    assert "000000000009.jpg" in error(scenes.labels, 0)

    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side: 4 x 3 when it is shown
    Image.new("RGB", (3, 4)).save(path, exif=turned)
    assert scenes[0]["image"].shape == (3, 3, 4)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "is not readable JSON"),
        (b"{", "is not readable JSON"),
        (b"[" * 100_000, "is not readable JSON"),
        (b"\xff\xfe\xfa", "is not readable JSON"),
        (json.dumps(annotations()).encode()[:-60], "is not readable JSON"),
        (b"[]", "does not hold panoptic annotations"),
        (b"null", "does not hold panoptic annotations"),
        (b'{"images": []}', "('categories' is missing)"),
    ],
)
def test_a_broken_json_is_refused(tmp_path, content, said):
    make(tmp_path)
    path = tmp_path / "annotations/panoptic_val2017.json"
    path.write_bytes(content)
    text = error(Panoptic, tmp_path, "val2017")
    assert said in text and str(path) in text


@pytest.mark.parametrize(
    "part, change, said",
    [
        ("annotations", {"image_id": 2}, "(2 is missing)"),
        ("annotations", {"file_name": None}, "None is not a name"),
        ("annotations", {"segments_info": 3}, "segments of 000000000009.jpg are malformed"),
        ("images", {"height": 0}, "the size of 000000000009.jpg is 4 x 0"),
        ("images", {"width": "4"}, "the size of 000000000009.jpg is 4 x 3"),
        ("images", {"file_name": 9}, "9 is not a name"),
        ("categories", {"name": None}, "None is not a name"),
        ("categories", {"isthing": "1"}, "'1' is neither 0 nor 1"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path, part, change, said):
    content = annotations()
    content[part][0] = content[part][0] | change
    make(tmp_path)
    (tmp_path / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
    assert said in error(Panoptic, tmp_path, "val2017")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"bbox": [1, 1, 2]}, "bbox [1, 1, 2] is not four numbers of at least 0"),
        ({"bbox": [1, 1, 2, 2, 2]}, "bbox [1, 1, 2, 2, 2] is not four"),
        ({"bbox": [1, -1, 2, 2]}, "bbox [1, -1, 2, 2] is not four"),
        ({"bbox": [1, float("nan"), 2, 2]}, "bbox [1, nan, 2, 2] is not four"),
        ({"bbox": "1122"}, "bbox '1122' is not four"),
        ({"bbox": None}, "bbox None is not four"),
        ({"area": "3"}, "area '3' is not a number of at least 0"),
        ({"area": 10**400}, "is not a number of at least 0"),
        ({"area": True}, "area True is not a number of at least 0"),
        ({"id": 0}, "id 0 is not a whole number from 1 to 16777215"),
        ({"id": 2**24}, "id 16777216 is not a whole number from 1 to 16777215"),
        ({"id": 5.0}, "id 5.0 is not a whole number"),
        ({"id": 5}, "two segments have one id"),
        ({"iscrowd": 2}, "2 is neither 0 nor 1"),
        ({"category_id": 99}, "category_id 99 is none of the file's categories"),
    ],
)
def test_a_malformed_segment_is_named(tmp_path, change, said):
    """Before any scene is read; what is wrong stands in the sentence, beside the photo's name."""
    content = annotations()
    content["annotations"][0]["segments_info"] = [SEGMENTS[0] | change, *SEGMENTS[1:]]
    make(tmp_path)
    (tmp_path / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
    text = error(Panoptic, tmp_path, "val2017")
    assert said in text and "the segments of 000000000009.jpg are malformed" in text
    (tmp_path / "val2017/000000000009.jpg").unlink()  # an image that is not used may be malformed
    assert "none of the photos" in error(Panoptic, tmp_path, "val2017")


def test_a_segment_without_one_of_its_keys_is_named(tmp_path):
    make(tmp_path)
    for key in SEGMENTS[0]:
        content = annotations()
        lacking = {name: value for name, value in SEGMENTS[0].items() if name != key}
        content["annotations"][0]["segments_info"] = [lacking]
        (tmp_path / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
        assert f"('{key}' is missing)" in error(Panoptic, tmp_path, "val2017")


def test_a_photo_listed_twice_is_refused(tmp_path):
    content = annotations()
    content["annotations"] *= 2
    make(tmp_path, content)
    assert "a photo is listed twice" in error(Panoptic, tmp_path, "val2017")
    content = annotations()
    content["images"] += [content["images"][0] | {"file_name": "000000000010.jpg"}]
    make(tmp_path, content)
    assert "two images have one id" in error(Panoptic, tmp_path, "val2017")


@pytest.mark.parametrize("where, key", [("images", "file_name"), ("annotations", "file_name")])
def test_file_names_cannot_leave_their_folder(tmp_path, where, key):
    for name in ("../secret.png", "/etc/passwd", "a/../../b.jpg", "..", "C:\\a.png", ""):
        content = annotations()
        content[where][0][key] = name
        make(tmp_path)
        (tmp_path / "annotations/panoptic_val2017.json").write_text(json.dumps(content))
        assert "outside of its folder" in error(Panoptic, tmp_path, "val2017")


# ---- The real size -------------------------------------------------------------------------------
def test_a_json_of_118287_images_opens_in_seconds_and_4_gb(tmp_path):
    make(tmp_path)
    path, count = tmp_path / "annotations/panoptic_val2017.json", 118_287
    image = (
        '{"license": 3, "file_name": "%012d.jpg", "coco_url": "http://images.cocodataset.org'
        '/train2017/%012d.jpg", "height": 427, "width": 640, "date_captured": "2013-11-14", '
        '"flickr_url": "http://farm7.staticflickr.com/6116/6255_da26cf2c9e_z.jpg", "id": %d}'
    )
    segment = (
        '{"id": %d, "category_id": 1, "iscrowd": 0, "bbox": [%d, 158, 253, 1380], "area": 28400}'
    )
    with open(path, "w") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        file.write(", ".join(image % (n, n, n) for n in range(count)) + '], "annotations": [')
        for n in range(count):
            segments = ", ".join(segment % (16 * n + k, 300 + n % 300) for k in range(11))
            file.write(
                ", " * (n > 0) + f'{{"segments_info": [{segments}], '
                f'"file_name": "{n:012d}.png", "image_id": {n}}}'
            )
        file.write(f'], "categories": {json.dumps(CATEGORIES)}}}')
    for n in (9, 4711, count - 1):
        Image.new("RGB", (4, 3)).save(tmp_path / "val2017" / f"{n:012d}.jpg")
    code = (
        "import resource, sys, time; from data.panoptic import Panoptic; start = time.time();"
        f"s = Panoptic({str(tmp_path)!r}, 'val2017'); print(len(s), s.segments(2)[10].id,"
        "time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    photos, number, seconds, kilobytes = shown.stdout.split()
    assert (int(photos), int(number)) == (3, 16 * (count - 1) + 10)
    assert float(seconds) < 60 and int(kilobytes) < 4e6, shown.stdout  # about 6 s and 1.6 GB

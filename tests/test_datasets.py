"""Data sets: which files belong together, what is left out, and what bad input says."""

import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets import (
    SUFFIXES,
    check,
    join,
    main,
    open_photos,
    open_set,
    read_captions,
    read_list,
    report_left_out,
)
from common.runtime import UserError
from data import registry
from data.registry import REGISTRY, SHAPES, SOURCES, TERMS, Entry, read_split


def draw(path: Path, value: int = 0, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Path:
    """A picture of one grey value; size is (W, H)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)
    return path


def photo(path: Path) -> Path:
    """A picture of many colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pairs(folder: Path, stems, image: str = "images/{}.jpg", mask: str = "masks/{}.png") -> Path:
    """Photo i has grey value 10 i; its mask is foreground for even i."""
    for i, stem in enumerate(stems):
        draw(folder / image.format(stem), 10 * i)
        draw(folder / mask.format(stem), 255 * (i % 2 == 0), mode="L")
    return folder


def values(dataset) -> dict[str, tuple[int, int]]:
    """name -> (grey value of the photo, value of the mask)."""
    samples = [dataset[i] for i in range(len(dataset))]
    return {s["name"]: (int(s["image"][0, 0, 0]), int(s["mask"][0, 0, 0])) for s in samples}


def error(call, *args, **options) -> str:
    """The one-line message of the `UserError` that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Pairing ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "image, mask",
    [
        ("images/{}.jpg", "masks/{}.png"),
        ("imgs/{}.png", "gts/{}.png"),
        ("Imgs/{}.jpeg", "GT/{}.bmp"),
        ("RGB/{}.jpg", "gt/{}.jpg"),
        ("image/{}.jpg", "segmentations/{}.png"),
        ("{}.jpg", "{}.png"),
        ("ECSSD/images/{}.jpg", "ground_truth_mask/{}.png"),
        ("Imgs/{}.jpg", "Imgs/{}.png"),
        ("DUTS-TR-Image/{}.jpg", "DUTS-TR-Mask/{}.png"),
        ("Image/{}.JPG", "Mask/{}.PNG"),
        (
            "DUT-OMRON-image/DUT-OMRON-image/{}.jpg",
            "DUT-gt-pixelwise.zip/pixelwiseGT-new-PNG/{}.png",
        ),
        ("datasets/imgs/{}.jpg", "datasets/masks/{}.png"),
        ("{}.jpg", "GT/{}.png"),
        ("train-images/{}.jpg", "train-labels/{}.png"),
    ],
)
def test_layouts_pair_by_stem(tmp_path, image, mask):
    stems = ["b", "a", "10_28113685.growl", "2"]
    dataset = open_set(pairs(tmp_path / "set", stems, image, mask))
    draw(tmp_path / "set/__MACOSX/images/c.jpg")
    draw(tmp_path / "set/.hidden/c.jpg")
    (tmp_path / "set/.DS_Store").write_text("")
    expected = {"10_28113685.growl": (20, 255), "2": (30, 0), "a": (10, 0), "b": (0, 255)}
    assert values(dataset) == expected and values(open_set(tmp_path / "set")) == expected
    assert dataset.names == sorted(expected) and dataset.title == "set"


def test_strays_beside_a_folder_of_photos_are_no_photos(tmp_path):
    pairs(tmp_path, "ab")
    draw(tmp_path / "cover.jpg")
    draw(tmp_path / "results/a.jpg")
    assert open_set(tmp_path).names == ["a", "b"]


def test_sample_holds_what_the_docstring_says(tmp_path):
    draw(tmp_path / "images/a.jpg", 50, (6, 4))
    draw(tmp_path / "masks/a.png", 255, (6, 4))
    draw(tmp_path / "depth/a.png", 80, (12, 8), "L")  # another resolution: brought to the photo's
    (tmp_path / "captions.txt").write_text('image,caption\na.jpg,"One, two ."\na.jpg,Three\n')
    sample = open_set(tmp_path)[0]
    assert {k: tuple(sample[k].shape) for k in ("image", "mask", "modality")} == {
        "image": (3, 4, 6),
        "mask": (1, 4, 6),
        "modality": (3, 4, 6),
    }
    assert sample["modality"].unique().tolist() == [80]
    assert sample["caption"] == ["One, two .", "Three"]
    assert sample["size"] == (4, 6) and sample["name"] == "a"


def test_captions_of_clips_whose_frames_share_their_names(tmp_path):
    draw(tmp_path / "images/a/1.jpg")
    draw(tmp_path / "images/b/1.jpg")
    (tmp_path / "captions.txt").write_text("image,caption\na/1.jpg,a red dog\nb/1.jpg,a cat\n")
    assert [s["caption"] for s in open_set(tmp_path, masks=False)] == [["a red dog"], ["a cat"]]


@pytest.mark.parametrize("text", ['image,caption\n"' + "a" * 140_000, "folder"])
def test_odd_caption_files_are_one_sentence(tmp_path, text):
    draw(tmp_path / "images/a.jpg")
    file = tmp_path / "captions.txt"
    file.mkdir() if text == "folder" else file.write_text(text)
    with pytest.raises(UserError, match="captions.txt does not hold captions in a known form"):
        open_set(tmp_path, masks=False)


def test_a_caption_file_of_another_encoding_is_a_short_sentence(tmp_path):
    """Not one that repeats the whole file, as Python's own exception does."""
    content = "image,caption\n" + "a.jpg,a red dog\n" * 1000
    (tmp_path / "captions.txt").write_bytes(content.encode("utf-16"))
    text = error(read_captions, tmp_path)
    assert "'utf-8' codec can't decode byte 0xff in position 0" in text
    assert len(text) < 200 + len(str(tmp_path))


def test_clips_keep_their_folder_in_the_name(tmp_path):
    clips = ["bear/000", "bear/001", "cat/000"]
    pairs(tmp_path / "inner", clips, "JPEGImages/{}.jpg", "Annotations/{}.png")
    pairs(tmp_path / "outer", ["000", "001"], "bear/Imgs/{}.jpg", "bear/GT/{}.png")
    pairs(tmp_path / "outer", ["000"], "cat/Imgs/{}.jpg", "cat/GT/{}.png")
    assert values(open_set(tmp_path / "inner")) == {
        "bear/000": (0, 255),
        "bear/001": (10, 0),
        "cat/000": (20, 255),
    }
    assert open_set(tmp_path / "outer").names == clips
    assert open_set(tmp_path / "inner/JPEGImages/bear", masks=False).names == ["000", "001"]


def test_without_masks_nothing_of_them_is_touched(tmp_path):
    pairs(tmp_path, ["a", "b"])
    (tmp_path / "masks/a.png").write_bytes(b"broken")
    draw(tmp_path / "masks/b.jpg")  # an ambiguous mask
    dataset = open_set(tmp_path, masks=False)
    assert [dataset[i]["mask"] for i in range(2)] == [None, None]
    draw(tmp_path / "ECSSD/images/a.jpg")
    assert open_set("ECSSD", tmp_path, masks=False)[0]["mask"] is None


def test_bad_folders_say_what_is_wrong(tmp_path):
    pairs(tmp_path / "gap", "abcde")
    for stem in "abcd":
        (tmp_path / f"gap/masks/{stem}.png").unlink()
    assert "4 of 5 pictures" in (text := error(open_set, tmp_path / "gap"))
    assert "a, b, c, …" in text and "mask" in text
    pairs(tmp_path / "twice", "ab")
    draw(tmp_path / "twice/masks/b.jpg")
    text = error(open_set, tmp_path / "twice")
    assert "b.jpg" in text and "b.png" in text
    pairs(tmp_path / "size", "a")
    draw(tmp_path / "size/masks/a.png", size=(4, 6))
    text = error(open_set(tmp_path / "size").__getitem__, 0)
    assert all(t in text for t in ("images/a.jpg", "masks/a.png", "4 x 6", "6 x 4"))
    (tmp_path / "empty").mkdir()
    assert "empty" in error(open_set, tmp_path / "empty")
    pairs(tmp_path / "depth", "ab")
    draw(tmp_path / "depth/depth/a.png")
    text = error(open_set, tmp_path / "depth")
    assert "1 of 2 pictures" in text and "no depth: b" in text
    draw(tmp_path / "depth/T/a.png")
    assert "both depth and thermal" in error(open_set, tmp_path / "depth")


def test_captions_of_coco_and_flickr(tmp_path):
    draw(tmp_path / "coco/train2017/000000000009.jpg")
    draw(tmp_path / "flickr/Flicker8k_Dataset/x_1.jpg")
    coco = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}],
        "annotations": [{"image_id": 9, "caption": text} for text in ("A dog \n", "Dogs")],
    }
    (tmp_path / "coco/annotations").mkdir()
    (tmp_path / "coco/annotations/captions_train2017.json").write_text(json.dumps(coco))
    (tmp_path / "flickr/Flickr8k.token.txt").write_text("x_1.jpg#0\tA cat .\nx_1.jpg#1\tCats .\n")
    assert open_set("COCO-captions", tmp_path)[0]["caption"] == ["A dog", "Dogs"]
    assert open_set("flickr", tmp_path, masks=False)[0]["caption"] == ["A cat .", "Cats ."]
    draw(tmp_path / "coco/train2017/000000000010.jpg")
    assert "no caption: 000000000010" in error(open_set, "COCO-captions", tmp_path)
    coco["images"].append({"id": 9, "file_name": "000000000010.jpg"})
    (tmp_path / "coco/annotations/captions_train2017.json").write_text(json.dumps(coco))
    assert "two images have one id" in error(open_set, "COCO-captions", tmp_path)
    (tmp_path / "coco/annotations/captions_train2017.json").write_text("{")
    assert "captions_train2017.json" in error(open_set, "COCO-captions", tmp_path)


@pytest.mark.parametrize(
    "text, right",
    [
        ('image,caption\na.jpg,"a dog\nruns"\n', "a dog\nruns"),  # a line break inside quotes
        ("image,caption\na.jpg,a dog\u2028runs\x85fast\n", "a dog\u2028runs\x85fast"),
        ("image,caption\r\na.jpg,a dog\r\n", "a dog"),
        ('image,caption\na.jpg,"a ""dog"", runs"\n', 'a "dog", runs'),
        ("image,caption\na.jpg,a dog, running\n", "a dog, running"),  # a comma without quotes
    ],
)
def test_captions_are_cut_where_csv_says(tmp_path, text, right):
    (tmp_path / "captions.txt").write_bytes(text.encode())
    assert read_captions(tmp_path) == {"a": [right]}


def test_captions_of_flickr_are_cut_at_line_feeds_alone(tmp_path):
    text = "a.jpg#0\tone\x0btwo\x85\u2028three\nb.jpg#1\ta #1\tdog\n"
    (tmp_path / "x.token.txt").write_bytes(text.encode())
    assert read_captions(tmp_path) == {"a": ["one\x0btwo\x85\u2028three"], "b": ["a #1\tdog"]}


@pytest.mark.parametrize(
    "text", ['image,caption\na.jpg,"a dog\nb.jpg,a cat\n', "image,caption\na.jpg\n"]
)
def test_captions_with_an_open_quote_or_a_missing_column_are_refused(tmp_path, text):
    (tmp_path / "captions.txt").write_text(text)
    assert "captions.txt does not hold captions in a known form" in error(read_captions, tmp_path)


# ---- What is read and what is left out -----------------------------------------------------------
def left_out(dataset) -> dict[str, str]:
    """{name of the file: reason}"""
    return {Path(file).name: reason for file, reason in dataset.left_out}


def test_pictures_of_every_kind_are_read_and_others_counted(tmp_path, capsys):
    stems = [f"{i}{suffix}" for i, suffix in enumerate(SUFFIXES)]
    for stem in stems:
        draw(tmp_path / f"{stem}.png").rename(tmp_path / stem)
    for name in ("x.heic", "y.DNG", ".hidden.heic", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    dataset = open_set(tmp_path, masks=False)
    assert len(dataset) == len(stems) == 10
    assert left_out(dataset) == {"x.heic": "not read (.heic)", "y.DNG": "not read (.dng)"}
    report_left_out(dataset)
    text = capsys.readouterr().err
    assert "10 pictures; 2 left out: 1 not read (.heic), 1 not read (.dng)" in text
    assert text.count("\n") == 1
    report_left_out(open_set(pairs(tmp_path / "whole", "ab")))
    assert capsys.readouterr() == ("", "")


def test_the_sentence_on_what_is_missing_names_what_was_left_out(tmp_path):
    """It may be the very file that is missed: of another suffix, or called otherwise."""
    draw(tmp_path / "images/a.jpg")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/a.tga").write_bytes(b"")
    assert "masks/a.tga, not read (.tga)" in error(open_set, tmp_path)
    (tmp_path / "masks/a.tga").unlink()
    draw(tmp_path / "masks/a_mask.png")
    assert "masks/a_mask.png, mask of no picture" in error(open_set, tmp_path)
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/1.heic").write_bytes(b"")
    for call in (open_set, open_photos):
        assert "phone/1.heic, not read (.heic)" in error(call, tmp_path / "phone", "data")


def test_strays_and_masks_of_no_picture_are_counted(tmp_path):
    pairs(tmp_path / "A", "ab")
    draw(tmp_path / "A/cover.jpg")
    draw(tmp_path / "A/masks/c.png", mode="L")
    reasons = {"cover.jpg": "beside the folder of photos", "c.png": "mask of no picture"}
    dataset = open_set(tmp_path / "A")
    assert dataset.names == ["a", "b"] and left_out(dataset) == reasons
    (tmp_path / "a.txt").write_text("a\n")
    part = open_set(f"{tmp_path}/A@{tmp_path}/a.txt")  # what a list does not name is not left out
    assert len(part) == 1 and left_out(part) == reasons
    assert left_out(join([part, open_set("shapes-test")], "both")) == reasons
    draw(tmp_path / "FBMS/JPEGImages/c/0.jpg")
    pairs(tmp_path / "FBMS", ["c/1"], "JPEGImages/{}.jpg", "Annotations/{}.png")
    assert left_out(open_set("FBMS", tmp_path)) == {"0.jpg": "without a mask"}


def test_without_masks_folders_of_photos_may_be_called_anything(tmp_path):
    for folder in ("dogs", "label", "venetian-masks", "flow"):
        photo(tmp_path / folder / "1.jpg")
    names = ["dogs/1", "flow/1", "label/1", "venetian-masks/1"]
    photo(tmp_path / "few/dogs/1.jpg")
    photo(tmp_path / "few/label/1.jpg")
    assert open_set(tmp_path / "few", masks=False).names == ["dogs/1", "label/1"]
    (tmp_path / "few").rename(tmp_path.parent / "few")
    (tmp_path / "flow/1.jpg").rename(tmp_path / "flow/2.jpg")  # flow of no picture
    assert open_set(tmp_path, masks=False).names == [*names[:1], "flow/2", *names[2:]]
    photo(tmp_path.parent / "only/depth/1.jpg")
    assert open_set(tmp_path.parent / "only", masks=False).names == ["1"]
    pairs(tmp_path / "real", "ab", "{}.jpg", "GT/{}.jpg")  # these are masks, though damaged
    (tmp_path / "real/GT/a.jpg").write_bytes(b"")
    real = open_set(tmp_path / "real", masks=False)
    assert real.names == ["a", "b"]
    assert left_out(real) == {"a.jpg": "taken for a mask", "b.jpg": "taken for a mask"}


def test_two_files_of_one_stem(tmp_path):
    photo(tmp_path / "photos/a.jpg")
    photo(tmp_path / "photos/a.png")  # a photo, too: no mask holds so many colours
    text = error(open_set, tmp_path / "photos", masks=False)
    assert "a.jpg" in text and "a.png" in text and "same stem" in text
    pairs(tmp_path / "msra", "ab", "{}.jpg", "{}.png")
    dataset = open_set(tmp_path / "msra", masks=False)
    assert dataset.names == ["a", "b"] and left_out(dataset)["b.png"] == "taken for a mask"
    assert open_set(tmp_path / "msra").left_out == []


def test_links_in_circles_end(tmp_path):
    draw(tmp_path / "top/a.jpg")
    os.symlink(".", tmp_path / "top/again")
    os.symlink(tmp_path, tmp_path / "top/up")
    assert open_set(tmp_path / "top", masks=False).names == ["a"]
    for one, other in ("xy", "yx"):  # two folders that hold each other
        draw(tmp_path / f"two/{one}/{one}.jpg")
        os.symlink(tmp_path / "two" / other, tmp_path / "two" / one / "link")
    assert open_set(tmp_path / "two", masks=False).names == ["x/link/y", "x/x", "y/link/x", "y/y"]
    (tmp_path / "set").mkdir()  # a link to a folder elsewhere is followed
    draw(tmp_path / "far/a.jpg")
    os.symlink(tmp_path / "far", tmp_path / "set/images")
    assert open_set(tmp_path / "set", masks=False).names == ["a"]


@pytest.mark.parametrize("mark", [".lock", "stage1/args.json"])
def test_run_folders_feed_nothing_back(tmp_path, monkeypatch, mark):
    draw(tmp_path / "a.jpg")
    (tmp_path / "runs/x/stage1").mkdir(parents=True)
    (tmp_path / "runs/x" / mark).write_text("{}")
    for name in ("a", "b"):
        draw(tmp_path / f"runs/x/stage1/pred/set/{name}.png", mode="L")
    monkeypatch.chdir(tmp_path)
    for dataset in (open_set(".", masks=False), open_photos([Path(".")], "data")):
        assert dataset.names == ["a"]
        assert left_out(dataset) == dict.fromkeys(("a.png", "b.png"), "in a run folder")
    assert open_set("runs/x/stage1/pred/set", masks=False).names == ["a", "b"]  # asked for


def test_names_pair_in_every_unicode_form(tmp_path):
    one, other = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert one != other
    draw(tmp_path / f"images/{one}.jpg")
    draw(tmp_path / f"masks/{other}.png", 255, mode="L")
    draw(tmp_path / f"depth/{one}.png", mode="L")
    (tmp_path / "captions.txt").write_text(f"image,caption\n{other}.jpg,A cup\n", "utf-8")
    (tmp_path / "list.txt").write_text(f"{other}\n", "utf-8")
    dataset = open_set(f"{tmp_path}@{tmp_path}/list.txt")
    assert dataset.names == [one]
    assert dataset[0]["caption"] == ["A cup"] and dataset[0]["mask"].min() == 255
    draw(tmp_path / f"images/{other}.jpg")
    assert "same stem" in error(open_set, tmp_path)


def test_sixteen_bit_modalities_are_stretched(tmp_path):
    draw(tmp_path / "images/a.jpg", size=(60, 40))
    depth = np.linspace(500, 20_000, 2400).reshape(40, 60).astype(np.uint16)
    (tmp_path / "depth").mkdir()
    Image.fromarray(depth).save(tmp_path / "depth/a.png")
    got = open_set(tmp_path, masks=False)[0]["modality"]
    assert (got.min(), got.max()) == (1, 255) and len(got.unique()) == 255


def test_a_set_tells_the_bytes_of_its_photos(tmp_path):
    dataset = open_set(pairs(tmp_path / "A", "ab"))
    size = (tmp_path / "A/images/b.jpg").stat().st_size
    (tmp_path / "b.txt").write_text("b\n")
    part = open_set(f"{tmp_path}/A@{tmp_path}/b.txt")
    assert dataset.bytes(1) == part.bytes(0) == join([part], "x").bytes(0) == size
    photo(tmp_path / "A/images/b.jpg")  # another photo under the same name
    assert dataset.bytes(1) > size
    (tmp_path / "A/images/b.jpg").unlink()
    assert "b.jpg" in error(dataset.bytes, 1)


# ---- Photos to predict ---------------------------------------------------------------------------
def test_every_photo_is_predicted_whatever_its_folder(tmp_path):
    for path in ("a.jpg", "label/1.jpg", "images/1.jpg", "masks/1.png", "deep/er/x.y.webp"):
        draw(tmp_path / path, 9)
    draw(tmp_path / ".hidden/1.jpg")
    photos = open_photos(tmp_path, "data")
    assert sorted(photos.names) == ["a", "deep/er/x.y", "images/1", "label/1", "masks/1"]
    sample = photos[photos.names.index("masks/1")]
    assert sample["image"].unique().tolist() == [9] and sample["size"] == (4, 6)
    assert sample["mask"] is sample["modality"] is sample["caption"] is None
    assert sample["name"] == "masks/1" and photos.bytes(0) > 0


def test_photos_of_several_paths_have_names_of_their_own(tmp_path, monkeypatch):
    for path in ("a.jpg", "b.jpg", "x/a.jpg", "y/a.jpg", "y/a.png", "y/A.bmp"):
        draw(tmp_path / path)
    monkeypatch.chdir(tmp_path)

    def names(*paths):
        return open_photos([Path(path) for path in paths], "data").names

    assert names("a.jpg") == ["a"] and names("x/a.jpg") == ["a"]
    assert names("a.jpg", "b.jpg", "a.jpg", tmp_path / "a.jpg") == ["a", "b"]
    assert names("x/a.jpg", "y/a.jpg") == ["x/a", "y/a"]
    assert names("x", "b.jpg") == ["x/a", "b"] and names("x") == ["a"]
    assert names("y") == ["A.bmp", "a.jpg", "a.png"]  # each map has a name of its own
    assert names("x", "y/../b.jpg", "./x/../a.jpg") == ["x/a", "b", "a"]
    monkeypatch.chdir(tmp_path / "x")
    assert names("../a.jpg", "a.jpg") == ["a", "x/a"]


def test_photos_that_would_be_called_the_same_are_refused(tmp_path):
    """Names in two Unicode forms, and a map of an earlier prediction beside the two photos."""
    for names in (["e\u0301.jpg", "\u00e9.jpg"], ["a.jpg", "a.png", "a.jpg.png"]):
        folder = tmp_path / str(len(names))
        for name in names:
            draw(folder / name)
        with pytest.raises(UserError, match="would both be called"):
            open_photos(folder, "data")


def test_maps_are_not_predicted_again(tmp_path):
    draw(tmp_path / "a.jpg")
    draw(tmp_path / "predict/a.png")
    photos = open_photos([tmp_path, tmp_path / "predict/a.png"], "data", tmp_path / "predict")
    assert photos.names == ["a"] and set(left_out(photos).values()) == {"in the folder of the maps"}
    text = error(open_photos, [tmp_path / "predict"], "data", tmp_path / "predict")
    assert "no pictures" in text and "predict" in text


def test_pairs_and_registered_sets_are_predicted_as_sets(tmp_path):
    draw(tmp_path / "images/1.jpg")
    draw(tmp_path / "depth/1.png", 80, mode="L")
    photos = open_photos([tmp_path], "data")
    assert photos.names == ["1"] and photos[0]["modality"].unique().tolist() == [80]
    assert len(open_photos([Path("shapes-test")], "data")) == 120


def test_a_path_to_predict_that_is_not_there_is_named(tmp_path):
    draw(tmp_path / "a.jpg")
    for paths in ([tmp_path / "gone.jpg"], [tmp_path / "a.jpg", tmp_path / "gone"], [Path("gone")]):
        assert "gone" in error(open_photos, paths, "data")


# ---- Lists and joint sets --------------------------------------------------------------------
def test_lists_restrict_by_stem_or_by_clip(tmp_path):
    pairs(tmp_path / "set", "abcd")
    pairs(tmp_path / "clips", ["bear/0", "bear/1", "cat/0"])
    stems, clips = tmp_path / "some.txt", tmp_path / "clips.txt"
    stems.write_text("# my choice\nc.jpg\n\na\r\n")
    clips.write_text("bear\n")
    dataset = open_set(f"{tmp_path}/set@{stems}")
    assert values(dataset) == {"a": (0, 255), "c": (20, 255)} and dataset.title == "set@some"
    assert open_set(f"clips@{clips}", tmp_path).names == ["bear/0", "bear/1"]
    stems.write_text("a\ny.png\nz\n")
    text = error(open_set, f"{tmp_path}/set@{stems}")
    assert "2 of the 3 stems" in text and "y, z" in text and "some.txt" in text
    stems.write_text("\n")
    assert "empty" in error(open_set, f"{tmp_path}/set@{stems}")
    assert "gone.txt" in error(open_set, f"{tmp_path}/set@gone.txt")


def test_lists_are_cut_at_line_feeds_alone(tmp_path):
    odd = ["a\x85b", "c\u2028d", "e\x0cf", "g\x1ch"]
    (tmp_path / "list.txt").write_bytes("\r\n".join(["# odd", *odd, " i.webp "]).encode())
    assert read_list(tmp_path / "list.txt") == [*odd, "i"]


def test_lists_name_files_of_any_bytes(tmp_path):
    draw(tmp_path / os.fsdecode(b"caf\xe9.png"))  # Latin-1, which is no UTF-8
    (tmp_path / "list.txt").write_bytes(b"caf\xe9\n")
    names = open_set(f"{tmp_path}@{tmp_path}/list.txt", masks=False).names
    assert names == [os.fsdecode(b"caf\xe9")]


def test_joint_sets_prefix_names(tmp_path):
    pairs(tmp_path / "A", "ab")
    pairs(tmp_path / "B", "bc")
    (tmp_path / "c.txt").write_text("c\n")
    dataset = open_set(f"A+B@{tmp_path}/c.txt", tmp_path)
    assert values(dataset) == {"A/a": (0, 255), "A/b": (10, 0), "B@c/c": (10, 0)}
    assert dataset.title == "A+B@c"
    (tmp_path / "a.txt").write_text("a\n")
    assert open_set(f"A@{tmp_path}/a.txt+B@{tmp_path}/c.txt", tmp_path).names == ["A@a/a", "B@c/c"]
    assert "gone.txt" in error(open_set, "A@gone.txt+B", tmp_path)
    assert "A/a" in error(open_set, "A+A", tmp_path)
    assert "'nothing'" in error(open_set, "A+nothing", tmp_path)


def test_an_existing_path_wins_over_plus_and_at(tmp_path):
    for part in ("A", "B@x", "A+B", "me"):  # shorter readings of the paths below
        pairs(tmp_path / part, "z")
    pairs(tmp_path / "A+B@x", "a")
    pairs(tmp_path / "me@home/D", "de")
    (tmp_path / "d.txt").write_text("d\n")
    assert open_set(tmp_path / "A+B@x").names == ["a"]
    assert open_set(f"{tmp_path}/me@home/D@{tmp_path}/d.txt").names == ["d"]


# ---- Registered sets -------------------------------------------------------------------------
def test_msra_b_needs_no_list_to_be_split(tmp_path):
    stems = {split: read_split("MSRA-B", split) for split in ("train", "val", "test")}
    assert {split: len(set(names)) for split, names in stems.items()} == {
        "train": 2500,
        "val": 500,
        "test": 2000,
    }
    assert len(set().union(*stems.values())) == 5000
    assert "0_0_147" in stems["train"] and "0_0_610" in stems["val"] and "0_0_272" in stems["test"]
    assert set(read_split("MSRA-B", "train,val")) == {*stems["train"], *stems["val"]}
    assert error(open_set, "MSRA-B", tmp_path).startswith("MSRA-B is missing")


@pytest.mark.parametrize(
    "name, split, count, member",
    [
        ("NJUD", "train", 1485, "000347_left"),
        ("NJUD", "test", 500, "001139_left"),
        ("NLPR", "train", 700, "9_03-44-46"),
        ("NLPR", "test", 300, "10_03-02-58"),
        ("ORSSD", "train", 600, "0001"),
        ("ORSSD", "test", 200, "0004"),
        ("DAVIS", "train", 30, "bear"),
        ("DAVIS", "val", 20, "blackswan"),
    ],
)
def test_split_lists(name, split, count, member):
    stems = read_split(name, split)
    assert len(stems) == len(set(stems)) == count and member in stems
    other = {"train": "val" if name == "DAVIS" else "test"}.get(split, "train")
    assert not set(stems) & set(read_split(name, other))


def test_a_split_selects_from_the_whole_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SPLITS", tmp_path)
    (tmp_path / "MSRA-B.txt").write_text("# ours\ntrain 0_*: 1 2\nval *_x: 7\ntest 0_*: 3\n")
    pairs(tmp_path / "MSRA-B/MSRA-B", ["0_1", "0_2", "7_x", "0_3"], "{}.jpg", "{}.png")
    assert values(open_set("MSRA-B", tmp_path)) == {
        "0_1": (0, 255),
        "0_2": (10, 0),
        "7_x": (20, 255),
    }
    assert open_set("MSRA-B-val", tmp_path).names == ["7_x"]
    assert open_set("MSRA-B-test", tmp_path).names == ["0_3"]
    pairs(tmp_path / "MSB-TE", ["r"], "images/{}.jpg", "segmentations/{}.png")  # a re-pack wins
    assert open_set("MSRA-B-test", tmp_path).names == ["r"]
    (tmp_path / "DAVIS.txt").write_text("train *: bear\nval *: bus cow\n")  # clips instead of stems
    for size in ("480p", "1080p"):
        pairs(
            tmp_path / "DAVIS",
            ["bear/0", "bus/0", "cow/0", "cow/1"],
            f"JPEGImages/{size}/{{}}.jpg",
            f"Annotations/{size}/{{}}.png",
        )
    assert open_set("DAVIS", tmp_path).names == ["bus/0", "cow/0", "cow/1"]
    assert open_set("DAVIS-TR", tmp_path).names == ["bear/0"]


def test_parts_of_archives_and_names_of_repacks(tmp_path):
    for part, stem in (("Train", "a"), ("Test", "b")):
        for kind in ("RGB", "T", "GT"):
            draw(tmp_path / f"VT5000/{part}/{kind}/{stem}.png", 255)
    pairs(tmp_path / "EORSSD", ["1", "2"], "train-images/{}.jpg", "train-labels/{}.png")
    pairs(tmp_path / "EORSSD", ["3"], "test-images/{}.jpg", "test-labels/{}.png")
    pairs(tmp_path / "dut_o", ["x"])
    pairs(tmp_path / "PASCAL-S/datasets", ["1"], "imgs/pascal/{}.jpg", "masks/pascal/{}.png")
    pairs(tmp_path / "PASCAL-S/datasets", ["2"], "imgs/bruce/{}.jpg", "masks/bruce/{}.png")
    draw(tmp_path / "FBMS/JPEGImages/c/0.jpg")
    pairs(tmp_path / "FBMS", ["c/1"], "JPEGImages/{}.jpg", "Annotations/{}.png")
    names = {
        name: open_set(name, tmp_path).names
        for name in (
            "VT5000-TR",
            "VT5000-TE",
            "EORSSD",
            "EORSSD-TR",
            "DUT-OMRON",
            "PASCAL-S",
            "FBMS",
        )
    }
    assert names == {
        "VT5000-TR": ["a"],
        "VT5000-TE": ["b"],
        "EORSSD": ["3"],
        "EORSSD-TR": ["1", "2"],
        "DUT-OMRON": ["x"],
        "PASCAL-S": ["1"],
        "FBMS": ["c/1"],
    }
    assert open_set("VT5000-TE", tmp_path)[0]["modality"] is not None
    (tmp_path / "VT5000/Test/T/b.png").unlink()
    assert "no thermal: b" in error(open_set, "VT5000-TE", tmp_path)


def test_joint_registered_sets_open_from_their_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "SPLITS", tmp_path)
    for name in ("NJUD", "NLPR"):
        (tmp_path / f"{name}.txt").write_text("train *: a b\ntest *: c\n")
        pairs(tmp_path / name, "abc")
        pairs(tmp_path / name, "abc", mask="depth/{}.png")
    dataset = open_set("RGBD-TR", tmp_path)
    assert dataset.names == ["NJUD-TR/a", "NJUD-TR/b", "NLPR-TR/a", "NLPR-TR/b"]
    assert dataset.title == "RGBD-TR" and dataset[2]["modality"] is not None


def test_vsod_tr_thins_davsod_only(tmp_path):
    clips = [f"select1/{i:02}" for i in range(12)] + [f"bear/{i}" for i in range(3)]
    pairs(tmp_path / "VSOD-TR", clips, "JPEGImages/{}.jpg", "Annotations/{}.png")
    assert open_set("VSOD-TR", tmp_path).names == [
        "bear/0",
        "bear/1",
        "bear/2",
        "select1/00",
        "select1/05",
        "select1/10",
    ]


def test_wrong_count_warns(tmp_path, capsys):
    pairs(tmp_path / "ECSSD", "ab")
    assert len(open_set("ECSSD", tmp_path)) == 2
    assert "2 images instead of 1000" in capsys.readouterr().err


def test_unknown_and_missing_names_help(tmp_path):
    assert "did you mean ECSSD?" in error(open_set, "ecsd", tmp_path)
    assert "did you mean HKU-IS?" in error(open_set, "hku_is", tmp_path)
    text = error(open_set, "qqqq", tmp_path)
    assert "did you mean" not in text and "python -m common.datasets" in text
    assert "'qqqq' is neither" in error(open_set, "qqqq@x.txt", tmp_path)
    text = error(open_set, "DUTS-TR", tmp_path)
    assert all(
        t in text
        for t in (str(tmp_path / "DUTS-TR"), "http://saliencydetection.net/duts/", "data/README.md")
    )
    assert "NJUD-TR is missing" in error(open_set, "RGBD-TR", tmp_path)


def test_registry_is_consistent():
    for name, entry in REGISTRY.items():
        assert entry.origin in SOURCES and entry.origin in TERMS
        for place in entry.places.split():
            assert "+" not in place or set(place.split("+")) <= set(REGISTRY), name
            if "@" in place and entry.origin != "DAVIS":  # its list counts clips, not frames
                assert len(read_split(entry.origin, place.split("@")[1])) in entry.counts, name
    readme = (registry.SPLITS.parent / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+?) \|", readme, re.M))
    for name, entry in REGISTRY.items():
        assert rows[name] == (" or ".join(f"{c:,}" for c in entry.counts) or "-"), name


# ---- The checker -----------------------------------------------------------------------------
def test_checker_states(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(REGISTRY, "ECSSD", Entry("ECSSD", "ECSSD", (2,)))
    assert check("ECSSD", tmp_path)[0] == "missing"
    pairs(tmp_path / "ECSSD", "ab")
    pairs(tmp_path / "FBMS", "ab")
    assert check("ECSSD", tmp_path) == ("complete", 2, "")
    assert check("FBMS", tmp_path) == ("present", 2, "")
    assert check(str(tmp_path / "FBMS"), tmp_path) == ("present", 2, "")
    (tmp_path / "ECSSD/masks/b.png").write_bytes(b"x")
    assert check("ECSSD", tmp_path)[0] == "complete"  # without deep nothing is opened
    state, count, reason = check("ECSSD", tmp_path, deep=True)
    assert (state, count) == ("broken", 2) and "1 bad samples" in reason and "b.png" in reason
    (tmp_path / "ECSSD/masks/b.png").unlink()
    assert check("ECSSD", tmp_path)[0] == "broken" and "no mask: b" in check("ECSSD", tmp_path)[2]
    pairs(tmp_path / "ECSSD", "abc")
    assert check("ECSSD", tmp_path) == ("broken", 3, "3 images instead of 2")


def test_checker_counts_empty_and_full_masks(tmp_path, capsys):
    pairs(tmp_path / "A", "abcd")  # a and c are full, b and d empty
    half = np.array([[0, 0, 0, 255, 255, 255]] * 4, np.uint8)
    draw(tmp_path / "A/images/e.jpg")
    Image.fromarray(half).save(tmp_path / "A/masks/e.png")
    draw(tmp_path / "A/cover.jpg")
    main([str(tmp_path / "A"), "--deep"])
    shown, said = capsys.readouterr()
    assert "2 empty masks, the first: b; 2 full masks, the first: a" in shown
    assert "present" in shown and "A: 5 pictures; 1 left out: 1 beside the folder" in said


def test_checker_command(tmp_path, capsys):
    root = ["--data-root", str(tmp_path)]
    main(root)  # a bare listing never fails
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(REGISTRY)
    assert all(line.split()[1] == "missing" for line in lines[1:])
    pairs(tmp_path / "FBMS", "ab")
    main([*root, "FBMS"])
    shown = capsys.readouterr().out
    assert re.search(r"FBMS +present +2\n", shown) and SOURCES["FBMS"] in shown
    assert TERMS["FBMS"] in shown
    with pytest.raises(SystemExit) as status:
        main([*root, "FBMS", "SIP"])
    assert status.value.code == 1 and "SIP is missing" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*root, "ECSD"])
    assert re.search("ECSD +missing .*did you mean ECSSD", capsys.readouterr().out)


def test_shapes_open_by_name():
    dataset = open_set("shapes-depth-test")
    sample = dataset[0]
    assert sample["modality"].shape == sample["image"].shape
    assert sorted(SHAPES) == sorted(
        f"shapes{kind}{split}"
        for split in ("", "-test")
        for kind in ("", "-depth", "-thermal", "-video", "-top", "-named", "-named-60")
    )
    few, many = open_set("shapes-named-60"), open_set("shapes-named")
    assert (len(few), len(many)) == (60, 480) and torch.equal(few[59]["mask"], many[59]["mask"])
    assert not torch.equal(open_set("shapes")[0]["image"], open_set("shapes-test")[0]["image"])

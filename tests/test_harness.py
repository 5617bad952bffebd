"""What --predict writes: broken photos, names, folders of its own, overlays; pictures by hand."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ENVIRONMENT, ROOT, write_photo
from PIL import Image
from torch import nn

import class_net
from common import harness
from common.crf import dense_crf
from common.datasets import open_set
from common.flags import Settings
from common.runtime import UserError, World


def settings(tmp_path, predict, **changes) -> Settings:
    """Settings of a prediction with a network that sees 32 x 32 pixels."""
    names = Settings.__dataclass_fields__
    values = dict.fromkeys(names, False) | {
        "out": tmp_path / "run",
        "data_root": "data",
        "eval": [],
        "predict": predict,
        "size": 32,
        "batch_size": 2,
        "device": torch.device("cpu"),
        "world": World(),
    }
    return Settings(**values | changes)


def brightness(images: torch.Tensor) -> torch.Tensor:
    """A network that finds what is bright: [B, 3, S, S] -> logit [B, 1, S, S]."""
    return images.mean(1, keepdim=True) * 8 - 4


def test_one_broken_photo_does_not_end_a_folder(tmp_path):
    photos = tmp_path / "photos"
    for name in ("a", "b", "c", "d", "e"):
        write_photo(photos / f"{name}.jpg")
    (photos / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=r"1 photo\(s\) could not be read: .*b.jpg is not a picture"
    ):
        harness.predict(brightness, settings(tmp_path, [photos]))
    assert {p.stem for p in (tmp_path / "run/predict").glob("*.png")} == {"a", "c", "d", "e"}


def test_several_paths_and_names_that_collide(tmp_path):
    first = write_photo(tmp_path / "x" / "a.jpg")
    second = write_photo(tmp_path / "y" / "a.jpg", seed=1)
    third = write_photo(tmp_path / "y" / "a.png", seed=2)
    harness.predict(brightness, settings(tmp_path, [first, second, third]))
    made = {str(p.relative_to(tmp_path / "run/predict")) for p in tmp_path.glob("run/predict/*/*")}
    assert made == {"x/a.png", "y/a.jpg.png", "y/a.png.png"}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no file or folder .*nowhere.jpg"):
        harness.predict(brightness, settings(tmp_path, [tmp_path / "nowhere.jpg"]))


def test_a_cutout_may_not_replace_a_map(tmp_path):
    write_photo(tmp_path / "photos" / "a.jpg")
    write_photo(tmp_path / "photos" / "a_cutout.jpg")
    predict = [tmp_path / "photos"]
    with pytest.raises(UserError, match="2 pictures would be written to a_cutout.png"):
        harness.predict(brightness, settings(tmp_path, predict, cutout=True))
    assert not (tmp_path / "run").exists()


def test_its_own_maps_are_never_mapped(tmp_path):
    write_photo(tmp_path / "a.jpg")
    for _ in range(2):  # the run folder is the folder of the photos
        harness.predict(brightness, settings(tmp_path, [tmp_path], out=tmp_path))
    assert [p.name for p in (tmp_path / "predict").glob("*.png")] == ["a.png"]


def test_maps_are_never_taken_for_photos_to_learn(tmp_path):
    """`cd photos && python a2s.py --predict .`, then `--data .`: only the photo is one."""
    write_photo(tmp_path / "a.jpg")
    harness.predict(brightness, settings(tmp_path, [tmp_path]))
    assert (tmp_path / "run/predict/a.png").exists()
    assert open_set(tmp_path, masks=False).names == ["a"]


def test_existing_maps_are_skipped_when_asked_to(tmp_path, capsys):
    for name in ("a", "b"):
        write_photo(tmp_path / "photos" / f"{name}.jpg")
    made = tmp_path / "run" / "predict" / "a.png"
    Image.new("L", (3, 3)).save(write_photo(made))
    for count in (1, 2):
        given = settings(tmp_path, [tmp_path / "photos"])
        harness.predict(brightness, given, skip_existing=True)
        assert f"{count} of 2 maps exist already" in capsys.readouterr().out
    assert Image.open(made).size == (3, 3) and (made.parent / "b.png").exists()


def test_a_map_that_is_no_number_accuses_the_network(tmp_path):
    photo = write_photo(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="a: the network's map is not a number; its checkpoint"):
        harness.predict(lambda x: brightness(x) * float("nan"), settings(tmp_path, [photo]))


def test_overlay_by_hand():
    """A square of 2 x 2 in the middle of 6 x 6: tinted inside, one white pixel around it."""
    image = torch.full((3, 6, 6), 100, dtype=torch.uint8)
    pred = torch.zeros(6, 6, dtype=torch.uint8)
    pred[2:4, 2:4] = 255
    picture = harness.overlaid(image, pred)  # [6, 6, 3]
    assert picture[0, 0].tolist() == [100, 100, 100]
    assert picture[2, 2].tolist() == [170, 98, 55]  # 0.55 of 100, 0.45 of (255, 96, 0)
    white = (picture == 255).all(2)
    assert white.sum() == 4 * 4 - 2 * 2 and white[1, 1] and not white[2, 2] and not white[0, 1]


def test_a_predictor_takes_any_kind_of_photo():
    sod = harness.Predictor(brightness, nn.Identity(), settings(Path("."), []))
    grey = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    for photo in (grey, grey.convert("RGB"), grey.convert("RGBA"), grey.convert("P")):
        saliency = sod(photo)
        assert saliency.mode == "L" and saliency.size == (20, 10)
    assert [s.size for s in sod([grey, grey.resize((7, 5))])] == [(20, 10), (7, 5)]


def test_the_crf_of_predictions_keeps_a_thin_object_of_nearly_the_same_colour():
    """A line of three pixels, 15 grey levels lighter: srgb 13 and compat 10 erase it."""
    random = torch.Generator().manual_seed(0)
    photo = torch.randint(95, 105, (3, 40, 60), generator=random, dtype=torch.uint8)
    photo[:, 19:22] += 15
    logit = torch.full((1, 40, 60), -2.0)
    logit[:, 19:22] = 1.0
    usual = dense_crf(photo[None], torch.sigmoid(logit)[None], sxy=80.0)[0, 0]
    assert (usual[19:22] < 0.5).all()
    refined = harness.finish(logit, {"name": "", "image": photo, "size": (40, 60)}, crf=True)
    assert (refined[19:22] > 127).all()
    assert (refined[:19] < 127).all() and (refined[22:] < 127).all()


def test_a_photo_goes_from_the_standard_input_to_the_standard_output(tmp_path):
    photo = ROOT / "data" / "photos" / "cat.jpg"
    class_net.main(["--predict", str(photo), "--cutout", "--out", str(tmp_path), "--device", "cpu"])
    for flags, name in ([], "cat"), (["--cutout"], "cat_cutout"):
        command = [sys.executable, "class_net.py", "--predict", "-", "--device", "cpu", *flags]
        given = photo.read_bytes()
        done = subprocess.run(command, input=given, capture_output=True, cwd=ROOT, env=ENVIRONMENT)
        found = Image.open(io.BytesIO(done.stdout))
        assert np.array_equal(found, Image.open(tmp_path / "predict" / f"{name}.png"))
    done = subprocess.run(command, input=b"", capture_output=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 1 and done.stdout == b""
    assert b"the standard input is not a picture" in done.stderr
    assert done.stderr.count(b"error") == 1


def test_paths_that_are_given_one_by_one_are_all_mapped():
    flags = "--predict a.jpg --predict b.jpg c.jpg".split()
    args = class_net.build_parser().parse_args(flags)
    assert [str(path) for path in args.predict] == ["a.jpg", "b.jpg", "c.jpg"]

"""class_net.py as its users run it: every mode, every flag, interruption, processes, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import class_net
from common import harness
from common.backbones import backbone
from common.runtime import UserError
from data.shapes import Shapes

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small run: 16 scenes of 64 pixels, four steps per epoch, 4 test scenes."""
    folder = tmp_path_factory.mktemp("lists")
    for split, count in (("train", 16), ("test", 4)):
        (folder / f"{split}.txt").write_text("\n".join(Shapes(split).names[:count]))
    return [
        "--data",
        f"shapes@{folder}/train.txt",
        "--eval",
        f"shapes-test@{folder}/test.txt",
        "--size",
        "64",
        "--batch-size",
        "4",
        "--epochs",
        "2",
        "--device",
        "cpu",
    ]


@pytest.fixture
def flags(small, tmp_path):
    return [*small, "--out", str(tmp_path / "run")]


def command(*flags, launcher=()):
    """Run class_net.py as a program and return the finished process."""
    return subprocess.run(
        [sys.executable, *launcher, "class_net.py", *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def last(folder: Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


def same(a: Path, b: Path) -> bool:
    one, two = last(a)["model"], last(b)["model"]
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# ---- Modes ---------------------------------------------------------------------------------------
def test_train_then_eval_and_predict(flags, small, tmp_path):
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    ((title, row),) = json.loads((run / "eval.json").read_text()).items()
    assert row["n"] == 4 and 0 <= row["F_mean"] <= 1 and "F_mean" in done.stdout
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2]
    first = records[0]
    # the whole loss holds D2's terms once and those of the three deeper outputs at least in part
    assert first["loss"] > first["pixel"] + first["region"] + first["object"] > 0
    assert first["lr"] == pytest.approx(0.05 * 2 / 3)
    assert json.loads((run / "args.json").read_text())["flags"]["outputs"] == 4
    assert Image.open(run / "gallery.png").size == (3 * 160, 4 * 160)  # photo, map, truth
    assert (run / "vis" / "epoch_002.png").exists()
    assert len(list((run / "pred").glob("**/*.png"))) == 4

    again = tmp_path / "again"  # evaluation alone gives the same numbers
    done = command("--weights", run / "last.pt", "--out", again, *small[2:4], "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads((again / "eval.json").read_text()) == {title: row}

    photos = tmp_path / "photos"  # any size, also with a cut-out
    photos.mkdir()
    for stem, size in (("wide", (90, 50)), ("tall", (33, 71))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)).save(
            photos / f"{stem}.jpg"
        )
    done = command("--predict", photos, "--out", run, "--cutout", "--crf", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    made = Image.open(run / "predict" / "wide.png")
    cutout = Image.open(run / "predict" / "wide_cutout.png")
    assert made.size == (90, 50) and made.mode == "L" and cutout.mode == "RGBA"
    assert np.array_equal(np.asarray(cutout)[..., 3], np.asarray(made))


def test_the_authors_checkpoint_predicts(tmp_path):
    """A file with their keys, below the name that they give it: the network is --released."""
    description, _ = recipe.reference("class_r50")
    he = tuple(description["he_prefixes"])
    torch.save(
        {key: recipe.weights(key, shape, he) for key, shape in description["keys"]},
        tmp_path / "class.pth",
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(
        tmp_path / "photo.jpg"
    )
    class_net.main(
        [
            "--weights",
            str(tmp_path / "class.pth"),
            "--size",
            "64",
            "--predict",
            str(tmp_path / "photo.jpg"),
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
        ]
    )
    net = class_net.CLASSNet(backbone("resnet50", "none", "f3net"), released=True).eval()
    net.load_state_dict(class_net.from_released(torch.load(tmp_path / "class.pth")))
    sample = harness.Photo(tmp_path / "photo.jpg")[0]
    image = TF.resize(sample["image"], [64, 64], antialias=True)[None] / 255
    with torch.no_grad():
        want = harness.finish(net(image)[0][0], sample, False).numpy()
    made = np.asarray(Image.open(tmp_path / "predict" / "photo.png"))
    assert made.shape == (40, 60) and np.abs(made.astype(int) - want).max() <= 1


def test_dry_run_does_two_steps_of_everything(flags, tmp_path):
    class_net.main([*flags, "--dry-run", "--batch-size", "2"])
    assert json.loads((tmp_path / "run" / "eval.json").read_text())


# ---- Every flag does something -------------------------------------------------------------------
FLAGS = [
    ["--losses", "pixel"],
    ["--losses", "pixel", "region"],
    ["--region", "released"],
    ["--outputs", "1"],
    ["--attention"],
    ["--attention", "position"],
    ["--attention", "channel"],
    ["--fusion", "sum"],
    ["--augment"],
    ["--augment", "flip"],
    ["--augment", "flip", "scale", "crop"],
    ["--bn", "stored"],
    ["--released"],
    ["--lr", "0.02"],
    ["--seed", "1"],
    ["--pixels", "unit"],
    ["--backbone-weights", "none"],
    ["--amp", "bf16"],
]


@pytest.fixture(scope="module")
def base(small, tmp_path_factory):
    """A finished run that variants must differ from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    class_net.main([*small, "--out", str(folder)])
    return folder


def test_every_flag_changes_the_result(base, small, tmp_path, monkeypatch):
    monkeypatch.setattr(class_net, "evaluate", lambda net, args: None)
    unchanged = []
    for i, extra in enumerate(FLAGS):
        class_net.main([*small, "--out", str(tmp_path / str(i)), *extra])
        if same(base, tmp_path / str(i)):
            unchanged.append(extra)
    assert not unchanged


# ---- Interruption --------------------------------------------------------------------------------
def test_two_and_two_epochs_equal_four_bit_for_bit(flags, tmp_path, monkeypatch):
    flags = [*flags, "--epochs", "4", "--augment", "flip", "scale", "crop"]
    class_net.main([*flags, "--out", str(tmp_path / "whole")])
    train_epoch = class_net.train_epoch

    def interrupted(net, optimiser, bank, epoch, args):
        if epoch == 3:
            raise KeyboardInterrupt
        return train_epoch(net, optimiser, bank, epoch, args)

    monkeypatch.setattr(class_net, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        class_net.main(flags)
    assert last(tmp_path / "run")["epoch"] == 2
    monkeypatch.setattr(class_net, "train_epoch", train_epoch)
    class_net.main([*flags, "--resume"])
    assert same(tmp_path / "whole", tmp_path / "run")
    scores = [(tmp_path / run / "eval.json").read_text() for run in ("whole", "run")]
    assert scores[0] == scores[1]


def test_a_killed_run_resumes_to_the_same_weights(flags, tmp_path):
    flags = [*flags, "--epochs", "8"]
    assert command(*flags, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "class_net.py", *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 0.4))  # a random moment
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "eval.json").exists()  # it was still training
    assert command(*flags, "--resume").returncode == 0
    assert same(tmp_path / "whole", tmp_path / "run")


def test_resuming_with_other_flags_is_refused(base, small):
    with pytest.raises(UserError, match="was trained with --outputs 4: give the same flags"):
        class_net.main([*small, "--out", str(base), "--resume", "--outputs", "1"])


# ---- Two processes -------------------------------------------------------------------------------
def test_two_processes_train_one_network(flags, base, tmp_path):
    """Not equal to one process: BatchNorm of the decoder sees half of each batch."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = command(*flags, launcher=torchrun)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (base, tmp_path / "run")
    )
    assert len(two) == 2 and two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.2)
    assert two[1]["loss"] < two[0]["loss"]
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    # scored by both processes together; the checkpoint alone gives the same numbers
    class_net.main(
        [
            "--weights",
            str(tmp_path / "run" / "last.pt"),
            "--out",
            str(tmp_path / "one"),
            *flags[2:4],
            "--device",
            "cpu",
        ]
    )
    (row,), (alone,) = (
        results.values(),
        json.loads((tmp_path / "one" / "eval.json").read_text()).values(),
    )
    assert row == pytest.approx(alone, abs=1e-6) and row["n"] == 4


# ---- Bad input -----------------------------------------------------------------------------------
def test_photos_without_masks_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "photo.png")
    done = command(
        "--data",
        tmp_path,
        "--backbone",
        "tiny",
        "--backbone-weights",
        "shapes",
        "--size",
        64,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "mask" in sentence and str(tmp_path) in sentence


def test_checkpoints_of_another_method_are_refused(tmp_path):
    torch.save({"method": "a2s", "stage": 1, "args": {}}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="a2s"):
        class_net.main(["--weights", str(tmp_path / "last.pt"), "--eval", "shapes-test"])


def test_a_damaged_checkpoint_of_the_authors_names_the_key(tmp_path):
    description, _ = recipe.reference("class_r50")
    state = {key: torch.zeros(shape) for key, shape in description["keys"]}
    del state["PAM3.value_conv.bias"]
    torch.save(state, tmp_path / "class.pth")
    with pytest.raises(UserError, match="position.3.value.bias"):
        class_net.main(
            [
                "--weights",
                str(tmp_path / "class.pth"),
                "--eval",
                "shapes-test",
                "--out",
                str(tmp_path),
                "--device",
                "cpu",
            ]
        )


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(flags, tmp_path):
    class_net.main([*flags, "--epochs", "1"])
    good = last(tmp_path / "run")["model"]
    with pytest.raises(UserError, match="loss of epoch 1 is not a number"):
        class_net.main([*flags, "--lr", "1e30"])
    assert all(
        torch.equal(good[key], value) for key, value in last(tmp_path / "run")["model"].items()
    )

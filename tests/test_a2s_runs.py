"""a2s.py as its users run it: every mode, every flag, interruption, two processes, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import a2s
from common.runtime import UserError
from data.shapes import Shapes

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Text files that restrict the shapes to 16 training and 4 test scenes."""
    folder = tmp_path_factory.mktemp("lists")
    for split, count in (("train", 16), ("test", 4)):
        names = Shapes(split).names[:count]
        (folder / f"{split}.txt").write_text("\n".join(names))
    return folder


@pytest.fixture
def flags(lists, tmp_path):
    """A small run: 16 scenes of 64 pixels, four steps per epoch."""
    return [
        "--data",
        f"shapes@{lists}/train.txt",
        "--eval",
        f"shapes-test@{lists}/test.txt",
        "--size",
        "64",
        "--batch-size",
        "4",
        "--epochs",
        "3",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]


def command(*flags, launcher=()):
    """Run a2s.py as a program and return the finished process."""
    return subprocess.run(
        [sys.executable, *launcher, "a2s.py", *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def last(folder: Path, stage: int) -> dict:
    return torch.load(folder / f"stage{stage}" / "last.pt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"]) and (
        a["labels"] is None or torch.equal(a["labels"], b["labels"])
    )


# ---- Modes ---------------------------------------------------------------------------------------
def test_help_works_offline_and_names_every_group():
    done = command("--help")
    assert done.returncode == 0
    for group in ("method", "data", "backbone", "optimisation", "runtime", "output"):
        assert f"\n{group}:" in done.stdout


def test_both_stages_then_eval_and_predict(flags, tmp_path, lists):
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    results = json.loads((run / "stage2" / "eval.json").read_text())
    assert [name.rsplit("test")[-1] for name in results] == ["-activation", "-label", ""]
    assert all(row["n"] == 4 and 0 <= row["F_mean"] <= 1 for row in results.values())
    assert "F_mean" in done.stdout and "F_mean" in (run / "stage2" / "eval.md").read_text()
    assert all(f">{row}</text>" in (run / "stage2" / "curves.svg").read_text() for row in results)
    assert len(list((run / "pseudo").glob("*.png"))) == 16
    label = np.asarray(Image.open(next((run / "pseudo").glob("*.png"))))
    assert label.shape == (160, 160) and set(np.unique(label)) <= {0, 255}
    records = [json.loads(line) for line in (run / "stage1" / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert json.loads((run / "stage1" / "args.json").read_text())["flags"]["alpha"] == 0.1
    assert Image.open(run / "gallery.png").size == (5 * 160, 4 * 160)  # photo, 3 maps, truth
    assert (run / "stage1" / "vis" / "epoch_003.png").exists()

    # evaluation alone gives the same numbers
    again = tmp_path / "again"
    done = command(
        "--weights",
        run / "stage2" / "last.pt",
        "--data",
        "shapes",
        "--eval",
        f"shapes-test@{lists}/test.txt",
        "--out",
        again,
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    name = list(results)[-1]
    assert json.loads((again / "stage2" / "eval.json").read_text())[name] == results[name]

    # prediction: a folder and a photo, any size, also with a cut-out
    photos = tmp_path / "photos"
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
    done = command(
        "--predict",
        photos / "tall.jpg",
        "--weights",
        run / "stage2" / "last.pt",
        "--out",
        again,
        "--device",
        "cpu",
    )
    assert done.returncode == 0 and Image.open(again / "predict" / "tall.png").size == (33, 71)
    (again / "mine.pt").write_bytes((run / "stage2" / "last.pt").read_bytes())  # not in a stage2/
    a2s.main(
        [
            "--predict",
            str(photos / "wide.jpg"),
            "--weights",
            str(again / "mine.pt"),
            "--device",
            "cpu",
        ]
    )
    assert (again / "predict" / "wide.png").exists()


def test_dry_run_does_two_steps_of_everything(flags, tmp_path):
    a2s.main([*flags, "--dry-run", "--batch-size", "2"])
    assert len(list((tmp_path / "run" / "pseudo").glob("*.png"))) == 4
    assert (tmp_path / "run" / "stage2" / "eval.json").exists()


# ---- Every flag does something -------------------------------------------------------------------
STAGE_1 = [
    ["--alpha", "0.3"],
    ["--aux", "0", "0", "0"],
    ["--drop", "0"],
    ["--train-encoder"],
    ["--boundary", "DB1"],
    ["--boundary", "DB2"],
    ["--boundary", "DB3"],
    ["--boundary", "DB4"],
    ["--threshold", "otsu"],
    ["--threshold", "median"],
    ["--seed", "1"],
    ["--lr", "0.5"],
    ["--bn", "batch"],
    ["--pixels", "unit"],
    ["--amp", "bf16"],
    ["--backbone-weights", "none"],
]
STAGE_2 = [
    ["--detector", "conv"],
    ["--rectify", "off"],
    ["--rectify", "hma"],
    ["--lam", "0.8"],
    ["--released"],
    ["--lr", "0.002"],
    ["--seed", "1"],
]


@pytest.fixture(scope="module")
def base(lists, tmp_path_factory):
    """A finished small run, and the flags that made it: what variants must differ from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    flags = [
        "--data",
        f"shapes@{lists}/train.txt",
        "--eval",
        f"shapes-test@{lists}/test.txt",
        "--size",
        "32",
        "--batch-size",
        "8",
        "--epochs",
        "3",
        "--device",
        "cpu",
    ]
    a2s.main([*flags, "--out", str(folder)])
    return folder, flags


def test_every_flag_of_stage_1_changes_the_result(base, tmp_path, monkeypatch):
    folder, flags = base
    monkeypatch.setattr(a2s, "make_labels", lambda net, args: None)
    monkeypatch.setattr(a2s, "evaluate", lambda stage, net, args: {})
    unchanged = []
    for i, extra in enumerate(STAGE_1):
        a2s.main([*flags, "--stage", "1", "--out", str(tmp_path / str(i)), *extra])
        if last(tmp_path / str(i), 1)["model"].keys() == last(folder, 1)["model"].keys() and same(
            last(folder, 1), last(tmp_path / str(i), 1)
        ):
            unchanged.append(extra)
    assert not unchanged


def test_every_flag_of_stage_2_changes_the_result(base, tmp_path, monkeypatch):
    folder, flags = base
    monkeypatch.setattr(a2s, "evaluate", lambda stage, net, args: {})
    unchanged = []
    for i, extra in enumerate(STAGE_2):
        out = tmp_path / str(i)
        out.mkdir()
        (out / "pseudo").symlink_to(folder / "pseudo")
        a2s.main([*flags, "--stage", "2", "--out", str(out), *extra])
        if last(out, 2)["model"].keys() == last(folder, 2)["model"].keys() and same(
            last(folder, 2), last(out, 2)
        ):
            unchanged.append(extra)
    assert not unchanged


def test_labels_change_from_epoch_3_on_and_not_before(base, tmp_path):
    folder, flags = base
    stored = [
        np.asarray(Image.open(p).resize((32, 32), Image.BILINEAR))
        for p in sorted((folder / "pseudo").glob("*.png"))
    ]
    kept = {}
    for epochs in ("2", "3"):
        out = tmp_path / epochs
        out.mkdir()
        (out / "pseudo").symlink_to(folder / "pseudo")
        a2s.main([*flags, "--stage", "2", "--out", str(out), "--epochs", epochs])
        kept[epochs] = last(out, 2)["labels"][:, 0].numpy()
    assert np.abs(kept["2"].astype(int) - np.stack(stored)).mean() < 2  # only resized
    changed = np.abs(kept["3"].astype(int) - kept["2"]).reshape(16, -1).max(1)
    assert (changed > 50).all()  # all 16 in one epoch


# ---- Interruption --------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [1, 2])
def test_two_and_two_epochs_equal_four_bit_for_bit(flags, tmp_path, monkeypatch, stage):
    flags = [*flags, "--epochs", "4", "--bn", "batch"]
    a2s.main([*flags, "--out", str(tmp_path / "whole")])
    train_epoch = a2s.train_epoch

    def interrupted(at, net, optimiser, bank, labels, epoch, args):
        if (at, epoch) == (stage, 3):
            raise KeyboardInterrupt
        return train_epoch(at, net, optimiser, bank, labels, epoch, args)

    monkeypatch.setattr(a2s, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        a2s.main(flags)
    assert last(tmp_path / "run", stage)["epoch"] == 2
    monkeypatch.setattr(a2s, "train_epoch", train_epoch)
    a2s.main([*flags, "--resume"])
    for at in (1, 2):
        assert same(last(tmp_path / "whole", at), last(tmp_path / "run", at))
    scores = [(tmp_path / run / "stage2" / "eval.json").read_text() for run in ("whole", "run")]
    assert scores[0] == scores[1]


def test_a_killed_run_resumes_to_the_same_weights(flags, tmp_path):
    flags = [*flags, "--stage", "1", "--epochs", "6"]
    assert command(*flags, "--out", tmp_path / "whole").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "a2s.py", *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "run" / "stage1" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 0.4))  # a random moment
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "stage1" / "eval.json").exists()  # it was still training
    assert command(*flags, "--resume").returncode == 0
    assert same(last(tmp_path / "whole", 1), last(tmp_path / "run", 1))


def test_resuming_with_other_flags_is_refused(base, tmp_path):
    folder, flags = base
    with pytest.raises(UserError, match="was trained with --alpha 0.1: give the same flags"):
        a2s.main([*flags, "--stage", "1", "--out", str(folder), "--resume", "--alpha", "0.2"])
    for stage in (1, 2):  # the sentence can be typed: one number, that of the stage
        epochs, lr = (last(folder, stage)["args"][flag] for flag in ("epochs", "lr"))
        with pytest.raises(UserError, match=f"with --epochs {epochs}, --lr {lr}: give"):
            a2s.main(
                [
                    *flags,
                    "--stage",
                    str(stage),
                    "--out",
                    str(folder),
                    "--resume",
                    "--epochs",
                    "9",
                    "--lr",
                    "0.3",
                ]
            )


def test_resuming_on_other_photos_is_refused(base, lists, tmp_path):
    """One name replaced by another: the labels in the checkpoint would shift by one."""
    folder, flags = base
    names = (lists / "train.txt").read_text().split()
    (tmp_path / "train.txt").write_text("\n".join([*names[1:], Shapes("train").names[40]]))
    flags = [f"shapes@{tmp_path}/train.txt" if "/train.txt" in flag else flag for flag in flags]
    saved = last(folder, 1)
    saved["args"]["data"] = flags[flags.index("--data") + 1]  # the list was edited
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    torch.save(saved, tmp_path / "run" / "stage1" / "last.pt")
    with pytest.raises(UserError, match=r"other photos, 16 \(\w{8}\) instead of 16 \(\w{8}\)"):
        a2s.main([*flags, "--stage", "1", "--out", str(tmp_path / "run"), "--resume"])


def test_a_photo_is_predicted_without_evaluation_sets(base, tmp_path, monkeypatch):
    """A network of MSRA-B is judged by six sets, none of which --predict may ask for."""
    saved = last(base[0], 2)
    saved["args"]["data"] = "MSRA-B"
    torch.save(saved, tmp_path / "last.pt")
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")
    monkeypatch.setattr(a2s.harness, "present", lambda *_: pytest.fail("asked for sets"))
    a2s.main(
        [
            "--weights",
            str(tmp_path / "last.pt"),
            "--predict",
            str(tmp_path / "photo.png"),
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ]
    )
    assert Image.open(tmp_path / "predict" / "photo.png").size == (50, 40)


def test_the_unary_of_a_checkpoint_can_be_changed(base):
    for more, unary in (([], "hard"), (["--unary", "soft"], "soft")):
        args = a2s.build_parser().parse_args([*more, "--device", "cpu", "--eval", "shapes-test"])
        a2s.load(base[0] / "stage1" / "last.pt", args)
        assert args.unary == unary


@pytest.mark.parametrize(
    "flag, value",
    [("--lr", "-1"), ("--lr", "nan"), ("--lr", "fast"), ("--seed", "9" * 20), ("--seed", "-1")],
)
def test_numbers_that_cannot_be(flag, value, capsys):
    with pytest.raises(SystemExit):
        a2s.build_parser().parse_args([flag, value])
    assert f"argument {flag}: " in capsys.readouterr().err


def test_built_in_shapes_are_told_from_folders_of_that_name():
    for data, small in (
        ("shapes", True),
        ("shapes@a.txt+shapes-depth@b.txt", True),
        ("shapes_photos", False),
        ("shapes+photos", False),
    ):
        assert a2s.harness.is_shapes(data) == small


# ---- Two processes -------------------------------------------------------------------------------
def test_two_processes_equal_one_up_to_rounding(flags, tmp_path):
    """With BatchNorm's statistics frozen; with --bn batch each process sees half a batch."""
    flags = [*flags, "--bn", "stored"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = command(*flags, "--out", tmp_path / "two", launcher=torchrun)
    assert done.returncode == 0, done.stderr[-2000:]
    assert command(*flags, "--out", tmp_path / "one").returncode == 0
    for stage in (1, 2):
        one, two = last(tmp_path / "one", stage), last(tmp_path / "two", stage)
        for key, value in one["model"].items():
            other = two["model"][key]
            assert torch.allclose(value.float(), other.float(), rtol=1e-3, atol=1e-4), key
    assert (one["labels"].int() - two["labels"].int()).abs().float().mean() < 0.5
    one, two = (
        json.loads((tmp_path / run / "stage2" / "eval.json").read_text()) for run in ("one", "two")
    )
    for name, row in one.items():
        assert row == pytest.approx(two[name], abs=5e-3)


# ---- Bad input -----------------------------------------------------------------------------------
def refused(*flags) -> str:
    """The sentence with which a2s.py ends; there is exactly one, and no traceback."""
    done = command(*flags, "--device", "cpu")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")][0]


def test_stage_2_before_stage_1_prints_the_command(lists, tmp_path):
    sentence = refused(
        "--stage",
        "2",
        "--data",
        f"shapes@{lists}/train.txt",
        "--size",
        32,
        "--out",
        tmp_path / "run",
    )
    assert "16 of 16 pseudo labels are missing" in sentence
    command = f"python a2s.py --stage 1 --data shapes@{lists}/train.txt --out {tmp_path}/run"
    assert command in sentence


def test_unknown_set_suggests_a_name():
    assert "MSRA-B" in refused("--data", "MSRAB", "--backbone", "tiny")


@pytest.mark.parametrize("content", [b"", b"text"])
def test_broken_photos_are_named(tmp_path, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "photo.jpg").write_bytes(content)
    sentence = refused(
        "--data",
        tmp_path,
        "--backbone",
        "tiny",
        "--stage",
        "1",
        "--size",
        32,
        "--epochs",
        1,
        "--out",
        tmp_path / "run",
    )
    assert "photo.jpg" in sentence and not (tmp_path / "run" / "pseudo").exists()


def test_checkpoints_of_another_method_and_unwritable_folders_are_refused(tmp_path):
    torch.save({"method": "class_net", "stage": 1, "args": {}}, tmp_path / "last.pt")
    assert "class_net" in refused("--weights", tmp_path / "last.pt", "--eval", "shapes-test")
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused("--stage", "1", "--out", tmp_path / "file" / "run")


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(flags, tmp_path):
    flags = [*flags, "--stage", "1"]
    a2s.main([*flags, "--epochs", "1"])
    good = last(tmp_path / "run", 1)
    with pytest.raises(UserError, match="loss of epoch 1 is not a number"):
        a2s.main([*flags, "--lr", "1e30"])
    assert same(good, last(tmp_path / "run", 1))


def test_odd_files_work(tmp_path):
    """16-bit, CMYK, RGBA and grey photos train, are labelled and keep their sizes."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)
    Image.fromarray(pixels.astype(np.uint16) * 256).save(folder / "deep.png")
    for mode, name in (("CMYK", "print.jpg"), ("RGBA", "alpha.png"), ("L", "grey.bmp")):
        Image.fromarray(pixels).convert("RGB").convert(mode).save(folder / name)
    a2s.main(
        [
            "--data",
            str(tmp_path),
            "--backbone",
            "tiny",
            "--stage",
            "1",
            "--size",
            "32",
            "--epochs",
            "1",
            "--batch-size",
            "2",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    made = {p.stem: Image.open(p).size for p in (tmp_path / "run" / "pseudo").glob("*.png")}
    assert made == dict.fromkeys(("deep", "print", "alpha", "grey"), (50, 40))

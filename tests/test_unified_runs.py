"""unified_usod.py as its users run it: modes, flags, transfer, interruption, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import unified_usod as usod
from common.backbones import backbone
from common.runtime import UserError
from data.shapes import Shapes

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STARTS = 12  # training scenes of each task


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Text files that restrict the shapes to a few training and test scenes of each view."""
    folder = tmp_path_factory.mktemp("lists")
    for view in ("side", "top"):
        for split, count in (("train", STARTS), ("test", 4)):
            names = Shapes(split, view=view).names[:count]
            (folder / f"{view}-{split}.txt").write_text("\n".join(names))
    return folder


def flags_for(lists, out, size=64):
    """A joint run on two tasks: 24 scenes, six steps per epoch."""
    train, test = f"{lists}/side-train.txt", f"{lists}/side-test.txt"
    return [
        "--data",
        f"shapes@{train}+shapes-depth@{train}",
        "--eval",
        f"shapes@{test}".replace("shapes", "shapes-test", 1),
        f"shapes-depth-test@{test}",
        "--size",
        str(size),
        "--batch-size",
        "4",
        "--epochs",
        "2",
        "--width",
        "0.05",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]


@pytest.fixture
def flags(lists, tmp_path):
    return flags_for(lists, tmp_path / "run")


@pytest.fixture(scope="module")
def base(lists, tmp_path_factory):
    """A finished run, and the flags that made it: what variants must differ from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    flags = flags_for(lists, folder, size=32)
    usod.main(flags)
    return folder, flags


def command(*flags, launcher=()):
    """Run unified_usod.py as a program and return the finished process."""
    return subprocess.run(
        [sys.executable, *launcher, "unified_usod.py", *map(str, flags)],
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
def test_help_names_every_group(capsys):
    with pytest.raises(SystemExit):
        usod.main(["--help"])
    shown = capsys.readouterr().out
    for group in ("method", "data", "backbone", "optimisation", "runtime", "output"):
        assert f"\n{group}:" in shown


def test_both_stages_then_eval_and_predict(flags, tmp_path, lists):
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    results = json.loads((run / "stage2" / "eval.json").read_text())
    assert len(results) == 2 * 3 and all(row["n"] == 4 for row in results.values())
    assert [name.rsplit("test")[-1] for name in list(results)[::2]] == ["-cue", "-label", ""]
    assert len(list((run / "pseudo").glob("*/*.png"))) == 2 * STARTS
    label = np.asarray(Image.open(next((run / "pseudo").glob("*/*.png"))))
    assert label.shape == (160, 160) and set(np.unique(label)) <= {0, 255}
    stored = last(run, 2)["labels"]
    files = [
        run / "rectified" / f"{part}@side-train" / f"{name}.png"
        for part in ("shapes-train", "shapes-train with depth")
        for name in Shapes("train").names[:STARTS]
    ]
    assert all(np.array_equal(Image.open(file), label[0]) for file, label in zip(files, stored))
    assert Image.open(run / "gallery.png").size == (5 * 160, 4 * 160)  # photo, 3 maps, truth

    again = tmp_path / "again"  # the same numbers alone
    usod.main(
        [
            "--weights",
            str(run / "stage2" / "last.pt"),
            "--eval",
            f"shapes-depth-test@{lists}/side-test.txt",
            "--out",
            str(again),
            "--device",
            "cpu",
        ]
    )
    alone = json.loads((again / "stage2" / "eval.json").read_text())
    assert len(alone) == 1 and alone.items() <= results.items()

    photos = tmp_path / "photos"  # any size, with depth
    for folder in ("images", "depth"):
        (photos / folder).mkdir(parents=True)
        for i, (stem, size) in enumerate((("wide", (90, 50)), ("tall", (33, 71)))):
            pixels = np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), np.uint8)
            Image.fromarray(pixels).save(photos / folder / f"{stem}.png")
    done = command("--predict", photos, "--out", run, "--cutout", "--crf", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    made, cutout = (Image.open(run / "predict" / f"wide{end}.png") for end in ("", "_cutout"))
    assert made.size == (90, 50) and made.mode == "L" and cutout.mode == "RGBA"
    usod.main(
        [
            "--predict",
            str(photos / "images" / "tall.png"),
            "--weights",
            str(run / "stage1" / "last.pt"),
            "--out",
            str(again),
            "--device",
            "cpu",
        ]
    )
    assert Image.open(again / "predict" / "tall.png").size == (33, 71)


def test_the_modality_reaches_the_detector_in_evaluation(base, lists, tmp_path):
    """Without its depth a scene gets another map."""
    folder, _ = base
    maps = []
    for name in ("shapes-depth-test", "bare"):
        scene = Shapes("test", "depth", seed=1)[0]
        if name == "bare":
            (tmp_path / "bare").mkdir()
            Image.fromarray(scene["image"].permute(1, 2, 0).numpy()).save(
                tmp_path / "bare" / f"{scene['name']}.png"
            )
        else:
            (tmp_path / "one.txt").write_text(scene["name"])
        source = tmp_path / "bare" if name == "bare" else f"{name}@{tmp_path}/one.txt"
        usod.main(
            [
                "--weights",
                str(folder / "stage2" / "last.pt"),
                "--device",
                "cpu",
                "--out",
                str(tmp_path / "out"),
                "--eval" if name != "bare" else "--predict",
                str(source),
            ]
        )
    files = [
        next((tmp_path / "out").glob(pattern))
        for pattern in ("stage2/pred/*/*.png", "predict/*.png")
    ]
    maps = [np.asarray(Image.open(file)).astype(int) for file in files]
    assert maps[0].shape == maps[1].shape and np.abs(maps[0] - maps[1]).max() > 0


def test_dry_run_does_two_steps_of_everything(lists, tmp_path):
    usod.main([*flags_for(lists, tmp_path / "run", 32), "--dry-run", "--batch-size", "2"])
    assert len(list((tmp_path / "run" / "pseudo").glob("*/*.png"))) == 4
    assert (tmp_path / "run" / "stage2" / "eval.json").exists()


# ---- Every flag does something -------------------------------------------------------------------
STAGE_1 = [
    ["--sign", "area"],
    ["--pcl", "off"],
    ["--power", "annealed"],
    ["--gamma", "1"],
    ["--multi-scale", "off"],
    ["--seed", "1"],
    ["--lr", "0.5"],
    ["--bn", "batch"],
    ["--released"],
    ["--borders", "replicate", "--backbone-weights", "none"],
]
STAGE_2 = [
    ["--multi-scale", "off"],
    ["--loss", "bce"],
    ["--loss", "iou+bce"],
    ["--released"],
    ["--aux", "0", "0", "0"],
    ["--spr", "0", "0", "1"],
    ["--spr", "0", "0.5", "0.5"],
    ["--width", "0.1"],
    ["--lr", "0.002"],
    ["--pixels", "unit"],
    ["--amp", "bf16"],
]


def variant(base, tmp_path, stage, i, extra):
    """The checkpoint of a stage trained like the base but for `extra`."""
    folder, flags = base
    out = tmp_path / str(i)
    out.mkdir()
    if stage == 2:
        (out / "pseudo").symlink_to(folder / "pseudo")
    usod.main([*flags, "--stage", str(stage), "--out", str(out), *extra])
    return last(out, stage)


@pytest.mark.parametrize("stage, extras", [(1, STAGE_1), (2, STAGE_2)])
def test_every_flag_changes_the_result(base, tmp_path, monkeypatch, stage, extras):
    for name in ("make_labels", "evaluate"):
        monkeypatch.setattr(usod, name, lambda *args: {})
    want = last(base[0], stage)
    assert same(want, variant(base, tmp_path, stage, "again", []))
    unchanged = []
    for i, extra in enumerate(extras):
        found = variant(base, tmp_path, stage, i, extra)
        sizes = [[value.shape for value in one["model"].values()] for one in (found, want)]
        if sizes[0] == sizes[1] and same(found, want):
            unchanged.append(extra)
    assert not unchanged


@pytest.mark.parametrize("extra", [["--threshold", "fixed"], ["--sxy", "3"], ["--srgb", "60"]])
def test_flags_of_the_pseudo_labels_change_them(extra):
    def labels(*given):
        args = usod.build_parser().parse_args(given)
        usod.fill_defaults(args)
        return usod.refine(image, theta, args)

    scene = Shapes("test")[0]
    image = scene["image"][None] / 255
    theta = torch.linspace(-4, 1, 160).expand(1, 1, 160, 160) + scene["mask"][None] / 255
    assert not torch.equal(labels(*extra), labels())


def test_encoders_rest_in_epoch_1_and_move_slowly_later(base, tmp_path):
    states = [
        variant(base, tmp_path, 2, i, ["--epochs", epochs])["model"]
        for i, epochs in enumerate(("1", "2"))
    ]
    start = backbone("tiny").state_dict()
    for stream in (0, 1):
        first, later = (
            {key: state[f"encoders.{stream}.{key}"] for key in start} for state in states
        )
        assert all(torch.equal(first[key], start[key]) for key in start)
        assert not torch.equal(later["levels.4.0.weight"], start["levels.4.0.weight"])


def test_spr_changes_labels_from_epoch_2_on_and_no_weights_leave_them(base, tmp_path):
    kept = {
        epochs: variant(base, tmp_path, 2, epochs, ["--epochs", epochs])["labels"].int()
        for epochs in ("1", "2")
    }
    files = sorted((base[0] / "pseudo").glob("*/*.png"), key=lambda p: ("depth" in str(p), p.stem))
    stored = [np.asarray(Image.open(p).resize((32, 32), Image.BILINEAR)) for p in files]
    assert np.abs(kept["1"][:, 0].numpy() - np.stack(stored).astype(int)).mean() < 2  # resized
    changed = (kept["2"] - kept["1"]).abs().flatten(1).max(1).values
    assert (changed > 50).all()  # all in one epoch


# ---- Transfer ------------------------------------------------------------------------------------
def test_transfer_trains_the_adapter_alone_and_reports_zero_shot(base, lists):
    """Every other tensor of stage 1 stays what it was, bit for bit; the detector is a new one."""
    folder, flags = base
    target = f"shapes-top@{lists}/top-train.txt"
    usod.main([*flags, "--transfer", target, "--eval", f"shapes-top-test@{lists}/top-test.txt"])
    out = folder / "to-top-train.txt"
    before, after = last(folder, 1)["model"], last(out, 1)["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)
    new = after.keys() - before.keys()
    assert new and all(key.startswith("adapter.") for key in new)
    first = json.loads((out / "zero-shot" / "eval.json").read_text())  # kept before training
    assert len(first) == 3 and all(row.endswith("-zero-shot") for row in first)
    before, after = (last(f, 2)["model"]["heads.0.weight"] for f in (folder, out))
    assert not torch.equal(before, after)
    rows = list(json.loads((out / "stage2" / "eval.json").read_text()))
    assert [row.split("test")[-1] for row in rows] == [
        "-cue-zero-shot",
        "-label-zero-shot",
        "-zero-shot",
        "-cue",
        "-label",
        "",
    ]
    assert len(list((out / "pseudo").glob("*.png"))) == STARTS
    # an adapted checkpoint is loaded with its adapter
    args = usod.build_parser().parse_args(["--device", "cpu"])
    stage, net = usod.load(out / "stage1" / "last.pt", args)
    assert stage == 1 and net.adapter is not None


def test_the_adapter_learns(base, lists, tmp_path, monkeypatch):
    folder, flags = base
    monkeypatch.setattr(usod, "evaluate", lambda *args: {})
    target = f"shapes-top@{lists}/top-train.txt"
    states = []
    for epochs in ("1", "2"):
        usod.main([*flags, "--transfer", target, "--stage", "1", "--epochs", epochs])
        states.append(last(folder / "to-top-train.txt", 1)["model"])
    moved = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert sorted(moved) == sorted(key for key in states[0] if key.startswith("adapter."))


# ---- Interruption --------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [1, 2])
def test_two_and_two_epochs_equal_four_bit_for_bit(base, tmp_path, monkeypatch, stage):
    for name in ("make_labels", "evaluate"):
        monkeypatch.setattr(usod, name, lambda *args: {})
    more = ["--epochs", "4", "--bn", "batch"]
    whole = variant(base, tmp_path, stage, "whole", more)
    train_epoch = usod.train_epoch

    def interrupted(at, net, optimiser, bank, labels, epoch, args):
        if epoch == 3:
            raise KeyboardInterrupt
        return train_epoch(at, net, optimiser, bank, labels, epoch, args)

    monkeypatch.setattr(usod, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        variant(base, tmp_path, stage, "run", more)
    assert last(tmp_path / "run", stage)["epoch"] == 2
    monkeypatch.setattr(usod, "train_epoch", train_epoch)
    usod.main([*base[1], "--stage", str(stage), "--out", str(tmp_path / "run"), *more, "--resume"])
    assert same(whole, last(tmp_path / "run", stage))


def test_resuming_with_other_flags_is_refused(base):
    folder, flags = base
    with pytest.raises(UserError, match="was trained with --gamma 0.05: give the same flags"):
        usod.main([*flags, "--stage", "1", "--resume", "--gamma", "1"])


# ---- Two processes -------------------------------------------------------------------------------
def test_two_processes_equal_one_up_to_rounding(flags, tmp_path):
    """Stage 1 without L_btm, whose mean is over each process's boundaries. In stage 2 each process
    has statistics of its own half batch for BatchNorm: it must run, and share its labels."""
    flags = [*flags, "--size", "32", "--gamma", "0"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = command(*flags, "--out", tmp_path / "two", launcher=torchrun)
    assert done.returncode == 0, done.stderr[-2000:]
    usod.main([*flags, "--stage", "1", "--out", str(tmp_path / "one")])
    one, two = last(tmp_path / "one", 1), last(tmp_path / "two", 1)
    for key, value in one["model"].items():
        assert torch.allclose(value.float(), two["model"][key].float(), rtol=1e-3, atol=1e-4), key
    one, two = (
        json.loads((tmp_path / run / "stage1" / "eval.json").read_text()) for run in ("one", "two")
    )
    for name, row in one.items():
        assert row == pytest.approx(two[name], abs=5e-3)
    labels = last(tmp_path / "two", 2)["labels"].int()  # all are rectified
    usod.main(
        [
            *flags,
            "--epochs",
            "1",
            "--stage",
            "2",
            "--labels",
            str(tmp_path / "two/pseudo"),
            "--out",
            str(tmp_path / "start"),
        ]
    )
    start = last(tmp_path / "start", 2)["labels"].int()  # of the photos
    assert ((labels - start).abs().flatten(1).amax(1) > 20).all()


# ---- Bad input -----------------------------------------------------------------------------------
def refused(*flags) -> str:
    """The sentence with which unified_usod.py ends."""
    with pytest.raises(UserError) as error:
        usod.main([*map(str, flags), "--device", "cpu"])
    return str(error.value)


def test_stages_out_of_order_print_the_command(lists, tmp_path):
    data = f"shapes@{lists}/side-train.txt"
    done = command("--stage", "2", "--data", data, "--size", 32, "--out", tmp_path / "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith(f"error: {STARTS} of {STARTS} pseudo labels are missing")
    assert f"python unified_usod.py --stage 1 --data {data} --out {tmp_path}/run" in sentence
    sentence = refused("--transfer", "video", "--data", data, "--out", tmp_path / "run")
    assert "is missing, the network to transfer" in sentence
    assert f"python unified_usod.py --data {data} --out {tmp_path}/run" in sentence


def test_flags_that_cannot_work_are_refused(base, tmp_path):
    folder, flags = base
    checkpoint = folder / "stage1" / "last.pt"
    assert "add up to 1" in refused(*flags, "--spr", "1", "1", "1")
    assert "no --weights" in refused("--transfer", "video", "--weights", checkpoint)
    assert "give it an --out of its own" in refused(*flags, "--dry-run")
    sentence = refused(*flags, "--resume", "--lr", "0.5", "--multi-scale", "off")
    assert "was trained with --multi-scale on, --lr 0.1: give" in sentence


def test_sets_that_cannot_be_scored_are_refused_before_training(tmp_path, monkeypatch):
    for folder in ("a/photos", "b/photos"):
        for part in ("images", "masks"):
            (tmp_path / folder / part).mkdir(parents=True)
            Image.new("L", (40, 40), 255).save(tmp_path / folder / part / "x.png")
    flags = ["--data", tmp_path / "a/photos", "--backbone", "tiny", "--out", tmp_path / "run"]
    sentence = refused(*flags, "--eval", tmp_path / "a/photos", tmp_path / "b/photos")
    assert "two --eval sets are called photos" in sentence
    sample = {"image": torch.zeros(3, 8, 8), "mask": None}  # of a captioned set
    monkeypatch.setattr(usod.harness, "open_set", lambda *_: [sample])
    assert "x has no masks" in refused(*flags, "--eval", "x")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_s_run_is_above_its_stage_or_where_it_was_copied_to():
    for path, run in (("run/stage1/last.pt", "run"), ("mine/net.pt", "mine")):
        assert usod.harness.run_of(Path(path), ("stage1", "stage2")) == Path(run)


def test_weights_with_nothing_to_do_are_refused():
    args = usod.build_parser().parse_args(["--weights", "last.pt", "--batch-size", "1"])
    args.eval = []  # as of a run on photos
    with pytest.raises(UserError, match="--eval SET or --predict PATH"):
        usod.harness.prepare(args, "unified_usod")


def test_transfer_with_missing_data_is_refused_before_any_scoring(base, monkeypatch):
    folder, flags = base
    monkeypatch.setattr(usod, "zero_shot", lambda args: pytest.fail("scored first"))
    assert "nowhere" in refused(*flags, "--transfer", "nowhere/clips", "--eval", "shapes-test")


def test_transfer_takes_the_width_of_stage_2(base, monkeypatch):
    folder, _ = base
    found = [last(folder, 1), last(folder, 2)]
    found[0]["args"]["width"] = 1.0  # trained by another command, unused there
    monkeypatch.setattr(
        usod.runtime, "load_checkpoint", lambda path, *_: found["stage2" in str(path)]
    )
    args = usod.build_parser().parse_args(["--transfer", "video", "--out", str(folder)])
    usod.open_base(args)
    assert args.width == 0.05


def test_transfer_takes_the_data_from_the_base(base, monkeypatch):
    """Without --data, shapes turn to shapes; a run on photos to the registered video sets."""
    folder, _ = base
    parse = usod.build_parser().parse_args
    args = parse(["--transfer", "video", "--out", str(folder)])
    usod.open_base(args)
    assert args.data == "shapes-video" and args.out == folder / "to-video" and args.width == 0.05
    checkpoint = last(folder, 1)
    checkpoint["args"] |= {"data": "photos"}
    monkeypatch.setattr(usod.runtime, "load_checkpoint", lambda *_: checkpoint)
    args = parse(["--transfer", "rsi", "--out", str(folder)])
    usod.open_base(args)
    assert args.data == "RSSD-TR"


def test_checkpoints_of_another_method_and_unknown_sets_are_refused(tmp_path):
    torch.save({"method": "a2s", "stage": 1, "args": {}}, tmp_path / "last.pt")
    assert "a2s" in refused("--weights", tmp_path / "last.pt", "--eval", "shapes-test")
    assert "RGBD-TR" in refused("--data", "RGBDTR", "--backbone", "tiny")


def test_a_photo_without_its_depth_is_named(tmp_path):
    for folder, names in (("images", "ab"), ("depth", "a")):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("RGB", (40, 40)).save(tmp_path / folder / f"{name}.png")
    sentence = refused("--data", tmp_path, "--backbone", "tiny", "--stage", "1")
    assert "have no depth: b" in sentence


def test_a_released_checkpoint_is_loaded_by_its_keys(tmp_path):
    """What the authors' file of stage 1 holds, from our network under their names."""
    net = usod.CueExtractor(backbone("resnet50", "none"))
    theirs = {
        "gate.": "se.conv.",
        "se3.": "decoder.ad2.",
        "se4.": "decoder.ad3.",
        "se5.": "decoder.ad4.",
        "se0.": "decoder.fusion.",
        "conv.": "ad0.0.",
        "norm.": "ad0.1.",
    }
    state = {}
    for key, value in net.state_dict().items():
        if not key.startswith("encoder."):
            for ours, name in theirs.items():
                key = key.replace(ours, name)
        state[key] = value
    state |= {"decoder.ad2.se.gn.weight": torch.ones(64), "encoder.fc.bias": torch.ones(1000)}
    torch.save(state, tmp_path / "a2s.pth")
    Image.new("RGB", (64, 40)).save(tmp_path / "photo.png")
    usod.main(
        [
            "--weights",
            str(tmp_path / "a2s.pth"),
            "--predict",
            str(tmp_path / "photo.png"),
            "--out",
            str(tmp_path / "out"),
            "--size",
            "64",
            "--device",
            "cpu",
        ]
    )
    assert Image.open(tmp_path / "out" / "predict" / "photo.png").size == (64, 40)
    del state["decoder.ad3.ad0.0.weight"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(UserError, match="1 missing .se4.conv.weight"):
        usod.main(
            [
                "--weights",
                str(tmp_path / "short.pth"),
                "--predict",
                str(tmp_path / "photo.png"),
                "--out",
                str(tmp_path / "out"),
                "--device",
                "cpu",
            ]
        )

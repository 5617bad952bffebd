"""unified_usod.py as its users run it: modes, flags, transfer, interruption, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    TWO_PROCESSES,
    error_line,
    last,
    refused,
    run_script,
    same,
    write_lists,
    write_photo,
)
from PIL import Image

import unified_usod as usod
from common import flags as house
from common.backbones import backbone
from common.datasets import open_set
from common.run import Run
from data.shapes import Shapes

STARTS = 8  # training scenes of each task


def main(*flags) -> None:
    """unified_usod.py in this process, on the CPU."""
    usod.main([*map(str, flags), "--device", "cpu"])


def sentence(*flags) -> str:
    """The sentence with which it ends."""
    return refused(usod.main, *flags, "--device", "cpu")


def parse(text: str):
    """The flags of a command line, not yet completed."""
    return usod.build_parser().parse_args(text.split())


# ---- Small runs ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def side(tmp_path_factory):
    """Lists of a few scenes seen from the side."""
    return write_lists(tmp_path_factory.mktemp("side"), STARTS)


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    """Lists of a few scenes seen from above."""
    return write_lists(tmp_path_factory.mktemp("top"), STARTS, view="top")


@pytest.fixture(scope="module")
def small(side):
    """The flags of a joint run on two tasks: 16 scenes, four steps per epoch."""
    train, test = f"{side}/train.txt", f"{side}/test.txt"
    return (
        f"--data shapes@{train}+shapes-depth@{train} "
        f"--eval shapes-test@{test} shapes-depth-test@{test} "
        "--size 32 --batch-size 4 --epochs 2 --width 0.05 --lr 0.1"
    ).split()


@pytest.fixture(scope="module")
def base(small, tmp_path_factory):
    """The folder of that run."""
    folder = tmp_path_factory.mktemp("base") / "run"
    main(*small, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """The flags of a run on photos of noise, half of them with depth, and on labels that are there:
    quick enough to be repeated with one flag after the other."""
    folder = tmp_path_factory.mktemp("noise")
    for i in range(4):
        write_photo(folder / "bare" / f"{i}.png", seed=i)
        write_photo(folder / "deep" / "images" / f"{i}.png", seed=10 + i)
        write_photo(folder / "deep" / "depth" / f"{i}.png", seed=20 + i)
        for part in ("bare", "deep"):
            label = np.zeros((40, 40), np.uint8)
            label[5 + i : 30, 5 : 30 - i] = 255
            path = folder / "labels" / part / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label).save(path)
    return (
        f"--data {folder}/bare+{folder}/deep --labels {folder}/labels --backbone tiny --sxy 100 "
        "--size 32 --batch-size 4 --width 0.05 --lr 0.05"
    ).split()


@pytest.fixture
def quick(monkeypatch):
    """Leave out what comes after training."""
    for name in ("make_labels", "evaluate"):
        monkeypatch.setattr(usod, name, lambda *args: {})


def trained(noise, folder: Path, stage: int, epochs: int, extra: str = "") -> dict:
    """The checkpoint of a stage that was trained on noise."""
    main(*noise, "--stage", stage, "--out", folder, "--epochs", epochs, *extra.split())
    return last(folder, stage)


@pytest.fixture(scope="module")
def usual(noise, tmp_path_factory):
    """What variants must differ from: checkpoints by stage and number of epochs."""
    folder = tmp_path_factory.mktemp("usual")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_labels", "evaluate"):
            patch.setattr(usod, name, lambda *args: {})
        runs = [(1, 1), (2, 1), (2, 2)]
        return {run: trained(noise, folder / f"{run}", *run) for run in runs}


# ---- Modes ---------------------------------------------------------------------------------------
def test_help_names_every_group_and_default(capsys):
    with pytest.raises(SystemExit):
        usod.main(["--help"])
    text = capsys.readouterr().out
    for group in ("daily use", "method", "training", "backbone", "runtime", "output"):
        assert f"\n{group}:" in text
    text = " ".join(text.split())
    assert "[paper 20 10, shapes 1 3, small 3 9]" in text
    assert "[paper 0.1 0.005, shapes 0.1 0.02, small 0.1 0.005]" in text and "examples:" in text


def test_both_stages_then_eval(base, side, tmp_path):
    results = json.loads((base / "stage2" / "eval.json").read_text())
    assert len(results) == 2 * 3 and all(row["n"] == 4 for row in results.values())
    assert [name.rsplit("test")[-1] for name in list(results)[::2]] == ["-cue", "-label", ""]
    assert len(list((base / "pseudo").glob("*/*.png"))) == 2 * STARTS
    label = np.asarray(Image.open(next((base / "pseudo").glob("*/*.png"))))
    assert label.shape == (160, 160) and set(np.unique(label)) <= {0, 255}
    assert Image.open(base / "gallery.png").size == (5 * 160, 4 * 160)  # photo, 3 maps, truth
    for stage in (1, 2):
        assert (base / f"stage{stage}" / "vis" / "epoch_002.png").exists()

    # The labels as training left them, in the order of the joint set.
    stored = last(base, 2)["labels"]
    files = [
        base / "rectified" / f"{part}@train" / f"{name}.png"
        for part in ("shapes-train", "shapes-train with depth")
        for name in Shapes("train").names[:STARTS]
    ]
    assert all(np.array_equal(Image.open(file), label[0]) for file, label in zip(files, stored))

    # Evaluation alone gives the same numbers.
    again = tmp_path / "again"
    test = f"shapes-depth-test@{side}/test.txt"
    main("--weights", base / "stage2" / "last.pt", "--eval", test, "--out", again)
    alone = json.loads((again / "stage2" / "eval.json").read_text())
    assert len(alone) == 1 and alone.items() <= results.items()


def test_photos_of_any_size_are_predicted_with_and_without_depth(base, tmp_path):
    photos = tmp_path / "photos"
    for i, folder in enumerate(("images", "depth")):
        write_photo(photos / folder / "wide.png", 90, 50, seed=i)
        write_photo(photos / folder / "tall.png", 33, 71, seed=2 + i)
    run = tmp_path / "run"  # a copy: other tests compare the folder of the base
    shutil.copytree(base / "stage2", run / "stage2")
    main("--predict", photos, "--out", run, "--cutout", "--crf")
    made = Image.open(run / "predict" / "wide.png")
    cutout = Image.open(run / "predict" / "wide_cutout.png")
    assert made.size == (90, 50) and made.mode == "L" and cutout.mode == "RGBA"

    # One photo alone, by the program and as a function.
    photo = photos / "images" / "wide.png"
    main("--predict", photo, "--out", run)
    made = Image.open(run / "predict" / "wide.png")
    assert np.array_equal(usod.load(run / "stage2" / "last.pt", "cpu")(Image.open(photo)), made)

    cue = base / "stage1" / "last.pt"
    main("--predict", photos / "images" / "tall.png", "--weights", cue, "--out", tmp_path / "cue")
    assert Image.open(tmp_path / "cue" / "predict" / "tall.png").size == (33, 71)


def test_the_modality_reaches_the_detector_in_evaluation(base, tmp_path):
    """Without its depth a scene gets another map."""
    scene = Shapes("test", "depth", seed=1)[0]
    (tmp_path / "one.txt").write_text(scene["name"])
    photo = tmp_path / "bare" / f"{scene['name']}.png"
    photo.parent.mkdir()
    Image.fromarray(scene["image"].permute(1, 2, 0).numpy()).save(photo)
    usual = ["--weights", base / "stage2" / "last.pt", "--out", tmp_path / "out"]
    main(*usual, "--eval", f"shapes-depth-test@{tmp_path}/one.txt")
    main(*usual, "--predict", tmp_path / "bare")
    maps = []
    for pattern in ("stage2/pred/*/*.png", "predict/*.png"):
        (file,) = (tmp_path / "out").glob(pattern)
        maps.append(np.asarray(Image.open(file)).astype(int))
    assert maps[0].shape == maps[1].shape and np.abs(maps[0] - maps[1]).max() > 0


def test_stage_1_is_explained_with_the_last_label_that_of_training(base, tmp_path):
    photo = write_photo(tmp_path / "photo.png", 64, 64)
    weights = ("--weights", base / "stage1" / "last.pt")
    main(*weights, "--explain", photo, "--out", tmp_path)
    picture = Image.open(tmp_path / "explain" / "photo.png")
    assert picture.size == (5 * 260, 2 * 280)  # 10 panels of 256 x 256

    args, _, net = usod.open_checkpoint(weights[1], parse(f"--explain {photo}"))
    pair = torch.rand(1, 6, 64, 64)
    to_label = usod.label_maker(args)
    pictures = usod.explain_cue(net, pair[0, :3], pair, to_label)
    label = usod.label_logit(net, pair, "off", to_label).sigmoid().round()
    assert torch.equal(pictures[-1][1], label[0])
    left_out = (net(pair)[0].sigmoid() - 0.5).abs() < 0.2
    assert torch.equal(pictures[3][1], left_out[0])


def test_stage_2_is_explained_with_the_label_of_stage_1_if_there_is_one(base, tmp_path):
    photo = write_photo(tmp_path / f"{Shapes('train').names[0]}.png", 64, 64)
    weights = ("--weights", base / "stage2" / "last.pt")
    explain = [*weights, "--explain", photo, "--out", tmp_path]
    main(*explain)
    assert Image.open(tmp_path / "explain" / photo.name).size == (5 * 260, 280)
    folder = base / "pseudo" / "shapes-train@train"
    main(*explain, "--labels", folder)

    args, _, net = usod.open_checkpoint(weights[1], parse(f"--explain {photo}"))
    pair = torch.rand(1, 6, 160, 160)
    for file in (tmp_path / "no.png", folder / photo.name):
        pictures = usod.explain_detector(net, pair[0, :3], pair, file, args.spr, args.released)
        _, g, s, prior, corrected = [picture for _, picture in pictures]
        assert torch.allclose(corrected, 0.2 * prior + 0.6 * s + 0.2 * g)
        label = np.asarray(Image.open(file)) / 255 if file.exists() else s[0].numpy() > 0.5
        assert np.array_equal(g.squeeze(), label)
        assert ("no label" in pictures[1][0]) != file.exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_what_cannot_be_explained_is_named(base, tmp_path, stage):
    weights = ["--weights", base / f"stage{stage}" / "last.pt", "--out", tmp_path]
    assert "no.jpg" in sentence(*weights, "--explain", tmp_path / "no.jpg")
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    assert "x.jpg" in sentence(*weights, "--explain", tmp_path / "x.jpg")


def test_dry_run_does_two_steps_of_everything(small, tmp_path):
    main(*small, "--dry-run", "--batch-size", 2, "--out", tmp_path / "run")
    assert len(list((tmp_path / "run" / "pseudo").glob("*/*.png"))) == 4
    assert (tmp_path / "run" / "stage2" / "eval.json").exists()


# ---- Every flag does something -------------------------------------------------------------------
VARIANTS = [  # stage, epochs, flags
    (1, 1, "--sign area"),
    (1, 1, "--pcl off"),
    (1, 1, "--power annealed"),
    (1, 1, "--gamma 1"),
    (1, 1, "--multi-scale off"),
    (1, 1, "--seed 1"),
    (1, 1, "--lr 0.5"),
    (1, 1, "--bn batch"),
    (1, 1, "--released"),
    (1, 1, "--borders replicate --backbone-weights none"),
    (2, 1, "--multi-scale off"),
    (2, 1, "--loss bce"),
    (2, 1, "--loss iou+bce"),
    (2, 1, "--released"),
    (2, 1, "--bn batch"),
    (2, 1, "--aux 0 0 0"),
    (2, 1, "--width 0.1"),
    (2, 1, "--lr 0.002"),
    (2, 1, "--pixels unit"),
    (2, 1, "--amp bf16"),
    (2, 2, "--spr 0 0 1"),
    (2, 2, "--spr 0 0.5 0.5"),
]


def test_every_flag_changes_the_result(usual, noise, tmp_path, quick):
    unchanged = []
    for i, (stage, epochs, extra) in enumerate(VARIANTS):
        found = trained(noise, tmp_path / f"{i}", stage, epochs, extra)
        if same(found, usual[stage, epochs]):
            unchanged.append(extra)
    assert not unchanged
    assert same(trained(noise, tmp_path / "again", 1, 1), usual[1, 1])
    assert same(trained(noise, tmp_path / "again", 2, 2), usual[2, 2])


@pytest.mark.parametrize("extra", ["--threshold fixed", "--sxy 30", "--srgb 60"])
def test_flags_of_the_pseudo_labels_change_them(extra):
    scene = Shapes("test")[0]
    image = scene["image"][None] / 255
    theta = torch.linspace(-4, 1, 160).expand(1, 1, 160, 160) + scene["mask"][None] / 255
    labels = []
    for given in ("", extra):
        to_label = usod.label_maker(usod.complete(parse(given)))
        labels.append(to_label(image, theta)[-1])
    assert not torch.equal(*labels)


def test_encoders_are_frozen_in_epoch_1_and_learn_later(usual):
    start = backbone("tiny").state_dict()
    for stream in (0, 1):
        first, later = (
            {key: usual[2, epochs]["model"][f"encoders.{stream}.{key}"] for key in start}
            for epochs in (1, 2)
        )
        assert all(torch.equal(first[key], start[key]) for key in start)
        assert not torch.equal(later["levels.4.0.weight"], start["levels.4.0.weight"])


def test_spr_changes_labels_from_epoch_2_on(usual, noise):
    """Until then they are those of the files, at the size of training, and no file is written."""
    assert usual[2, 1]["labels"] is None
    names = open_set(noise[1], masks=False).names
    files = [Path(noise[3], f"{name}.png") for name in names]
    start = np.stack([np.asarray(Image.open(file).resize((32, 32))) for file in files])
    changes = (usual[2, 2]["labels"][:, 0] - torch.from_numpy(start).int()).abs()
    assert (changes.flatten(1).max(1).values > 50).all()  # all in one epoch


# ---- Transfer ------------------------------------------------------------------------------------
def test_transfer_trains_the_adapter_alone_and_reports_zero_shot(base, small, top):
    """Every other tensor of stage 1 stays what it was, bit for bit; the detector is a new one."""
    target = f"shapes-top@{top}/train.txt"
    test = f"shapes-top-test@{top}/test.txt"
    usual = [*small, "--out", base, "--transfer", target, "--eval", test]
    main(*usual, "--epochs", 1)
    out = base / "to-train.txt"
    before, after = last(base, 1)["model"], last(out, 1)["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)
    new = after.keys() - before.keys()
    assert new and all(key.startswith("adapter.") for key in new)
    heads = [last(folder, 2)["model"]["heads.0.weight"] for folder in (base, out)]
    assert not torch.equal(*heads)
    first = json.loads((out / "zero-shot" / "eval.json").read_text())  # kept before training
    assert len(first) == 3 and all(row.endswith("-zero-shot") for row in first)
    rows = list(json.loads((out / "stage2" / "eval.json").read_text()))
    ends = ["-cue-zero-shot", "-label-zero-shot", "-zero-shot", "-cue", "-label", ""]
    assert [row.split("test")[-1] for row in rows] == ends
    assert len(list((out / "pseudo").glob("*.png"))) == STARTS

    # An adapted checkpoint is loaded with its adapter.
    _, stage, net = usod.open_checkpoint(out / "stage1" / "last.pt", parse("--device cpu"))
    assert stage == 1 and net.adapter is not None

    # A second epoch changes each of the adapter's tensors, and nothing else.
    main(*usual, "--stage", 1, "--epochs", 2, "--overwrite")
    longer = last(out, 1)["model"]
    assert {key for key in longer if not torch.equal(longer[key], after[key])} == new


def test_transfer_takes_data_and_width_from_the_base(base, monkeypatch):
    """Shapes turn to shapes, photos to registered sets, the released code's with --released."""
    found = [last(base, 1), last(base, 2)]
    found[0]["args"]["width"] = 1.0  # of another command: stage 1 has no use for it
    monkeypatch.setattr(
        usod.runtime, "load_checkpoint", lambda path, method, stage: found[stage - 1]
    )

    def retargeted(task):
        return usod.retargeted(parse(f"--transfer {task} --out {base}"))

    args = retargeted("video")
    assert args.data == "shapes-video" and args.out == base / "to-video" and args.width == 0.05
    found[0]["args"]["data"] = "photos"
    assert retargeted("rsi").data == "ORSSD-TR+EORSSD-TR"  # D14
    assert retargeted("video").data == "VSOD-TR" and retargeted("a/clips").data == "a/clips"
    found[0]["args"]["released"] = True
    assert retargeted("rsi").data == "RSSD-TR"


def test_transfer_with_missing_data_is_refused_before_any_scoring(base, small, monkeypatch):
    monkeypatch.setattr(usod, "evaluate", lambda *args: pytest.fail("scored first"))
    task = ["--transfer", "nowhere/clips", "--eval", "shapes-test"]
    assert "nowhere" in sentence(*small, "--out", base, *task)


# ---- Interruption --------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [1, 2])
def test_two_epochs_and_one_equal_three_bit_for_bit(noise, tmp_path, monkeypatch, quick, stage):
    whole = trained(noise, tmp_path / "whole", stage, 3, "--bn batch")
    epochs = Run.epochs

    def interrupted(run):
        for epoch in epochs(run):
            if epoch == 3:
                raise KeyboardInterrupt
            yield epoch

    with monkeypatch.context() as patch:
        patch.setattr(Run, "epochs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(noise, tmp_path / "run", stage, 3, "--bn batch")
    assert last(tmp_path / "run", stage)["epoch"] == 2
    resumed = trained(noise, tmp_path / "run", stage, 3, "--bn batch --resume")
    assert resumed["epoch"] == 3 and same(whole, resumed)


def test_resuming_with_other_flags_is_refused(base, small):
    resume = [*small, "--out", base, "--resume"]
    other = sentence(*resume, "--stage", 1, "--gamma", 1)
    assert "was trained with --gamma 0.05: give the same flags" in other
    other = sentence(*resume, "--lr", 0.5, "--multi-scale", "off")
    assert "was trained with --lr 0.1, --multi-scale on: give" in other


# ---- Two processes -------------------------------------------------------------------------------
def test_two_processes_equal_one_up_to_rounding(small, tmp_path):
    """Stage 1 without L_btm, whose mean is over each process's boundaries. In stage 2 each process
    has statistics of its own half batch for BatchNorm: it must run, and share its labels."""
    flags = [*small, "--gamma", "0", "--device", "cpu"]
    two = tmp_path / "two"
    done = run_script("unified_usod.py", *flags, "--out", two, launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr[-2000:]
    main(*flags, "--stage", 1, "--out", tmp_path / "one")
    after = last(two, 1)["model"]
    for key, value in last(tmp_path / "one", 1)["model"].items():
        assert torch.allclose(value.float(), after[key].float(), rtol=1e-3, atol=1e-4), key
    scores = [
        json.loads((tmp_path / run / "stage1/eval.json").read_text()) for run in ("one", "two")
    ]
    for name, row in scores[0].items():
        assert row == pytest.approx(scores[1][name], abs=5e-3)

    # The labels of all photos are corrected, whichever process saw them.
    args = house.replaced(usod.complete(parse(" ".join(flags))), out=two)
    settings = house.settle(args, usod.METHOD)
    names = open_set(settings.data, masks=False).names
    start = usod.read_labels(names, two / "pseudo", settings).pixels.int()
    changes = (last(two, 2)["labels"].int() - start).abs()
    assert (changes.flatten(1).amax(1) > 20).all()


# ---- Bad input -----------------------------------------------------------------------------------
def test_stages_out_of_order_are_told_what_to_run_first(side, tmp_path):
    data = f"shapes@{side}/train.txt"
    run = tmp_path / "run"
    told = error_line(
        run_script("unified_usod.py", "--stage", 2, "--data", data, "--out", run, "--device", "cpu")
    )
    missing = f"{STARTS} of {STARTS} pseudo labels are missing ({run}/pseudo/"
    assert told.startswith(missing) and "the same command with --stage 1 makes them" in told
    told = sentence("--transfer", "video", "--data", data, "--out", run)
    assert "is missing, the network to transfer" in told
    assert f"python unified_usod.py --data {data} --out {run}" in told
    assert not (run / "stage1").exists()


def test_init_starts_one_stage_from_a_network(base, small, tmp_path):
    init = ("--init", base / "stage1" / "last.pt", "--stage", 1)
    main(*small, *init, "--lr", 1e-12, "--epochs", 1, "--out", tmp_path / "run")
    found = last(tmp_path / "run", 1)["model"]
    for key, value in last(base, 1)["model"].items():
        torch.testing.assert_close(found[key], value)
    stage_2 = (*init[:2], "--stage", 2, "--labels", base / "pseudo", "--out", tmp_path / "other")
    assert "is of stage 1, which is not trained here" in sentence(*small, *stage_2)


def test_flags_that_cannot_work_are_refused(base, small, noise, tmp_path):
    usual = [*small, "--out", base]
    assert "add up to 1" in sentence(*usual, "--spr", 1, 1, 1)
    assert "--size 31 leaves nothing" in sentence(*usual, "--size", 31)
    cue = base / "stage1" / "last.pt"
    assert "neither --weights" in sentence("--transfer", "video", "--weights", cue)
    assert "give it an --out of its own" in sentence(*usual, "--dry-run")
    assert "holds a run with --gamma 0.05" in sentence(*usual, "--gamma", 1)
    # Before stage 1, which does not need them.
    told = sentence(*small, "--labels", tmp_path, "--out", tmp_path / "run")
    assert f"16 of 16 pseudo labels are missing ({tmp_path}" in told
    assert not (tmp_path / "run").exists()


def test_a_batch_too_small_for_batchnorm_is_refused_before_stage_1(noise, tmp_path, quick):
    """A picture of 32 x 32 pixels leaves one cell of the deepest map, of 64 x 64 it is four."""
    one = [*noise, "--batch-size", 1, "--epochs", 1, "--out", tmp_path / "run"]
    assert "one picture of 32 x 32 pixels" in sentence(*one)
    assert "one picture of 32 x 32 pixels" in sentence(*one, "--stage", 1, "--bn", "batch")
    single = write_photo(tmp_path / "single" / "a.png").parent
    assert "more photos" in sentence(*one, "--batch-size", 4, "--data", single)
    main(*one, "--stage", 1)
    main(*one, "--stage", 2, "--size", 64)
    assert last(tmp_path / "run", 2)["epoch"] == 1


def test_networks_that_are_not_numbers_are_named(base, noise, tmp_path):
    """A damaged checkpoint, and a training that diverges: before its labels are made."""
    saved = last(base, 1)
    saved["model"]["se4.conv.bias"][3] = float("nan")
    torch.save(saved, tmp_path / "last.pt")
    told = sentence("--weights", tmp_path / "last.pt", "--predict", noise[3])
    assert "last.pt is damaged: se4.conv.bias" in told
    # One step: its loss is a number, and only then the weights are too large.
    once = [*noise, "--epochs", 1, "--batch-size", 8, "--lr", "1e30"]
    told = sentence(*once, "--out", tmp_path / "run")
    assert "not a number" in told and "lower --lr" in told
    assert not (tmp_path / "run" / "pseudo").exists()


def test_sets_that_cannot_be_scored_are_refused_before_training(tmp_path, monkeypatch):
    for folder in ("a/photos", "b/photos"):
        for part in ("images", "masks"):
            path = tmp_path / folder / part / "x.png"
            path.parent.mkdir(parents=True)
            Image.new("L", (40, 40), 255).save(path)
    flags = ["--data", tmp_path / "a/photos", "--backbone", "tiny", "--out", tmp_path / "run"]
    told = sentence(*flags, "--eval", tmp_path / "a/photos", tmp_path / "b/photos")
    assert "two --eval sets are called photos" in told
    bare = write_photo(tmp_path / "bare" / "x.png").parent
    assert "have no mask: x" in sentence(*flags, "--eval", bare)
    sample = {"image": torch.zeros(3, 8, 8), "mask": None}  # of a captioned set
    monkeypatch.setattr(house, "open_set", lambda *_: [sample])
    assert "x has no masks" in sentence(*flags, "--eval", "x")
    assert not (tmp_path / "run").exists()


def test_weights_with_nothing_to_do_are_refused(usual, noise, tmp_path):
    torch.save(usual[2, 1], tmp_path / "last.pt")
    assert "--eval SET or --predict PATH" in sentence("--weights", tmp_path / "last.pt")


def test_checkpoints_of_another_method_and_unknown_sets_are_refused(tmp_path):
    content = {"method": "a2s", "stage": 1, "epoch": 1, "args": {}, "model": {}}
    torch.save(content, tmp_path / "last.pt")
    assert "a2s" in sentence("--weights", tmp_path / "last.pt", "--eval", "shapes-test")
    assert "RGBD-TR" in sentence("--data", "RGBDTR", "--backbone", "tiny")


def test_a_photo_without_its_depth_is_named(tmp_path):
    for name in ("images/a", "images/b", "depth/a"):
        write_photo(tmp_path / f"{name}.png")
    told = sentence("--data", tmp_path, "--backbone", "tiny", "--stage", 1)
    assert "have no depth: b" in told


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
    photo = write_photo(tmp_path / "photo.png", 64, 40)
    predict = ["--predict", photo, "--out", tmp_path / "out", "--size", 64]
    main("--weights", tmp_path / "a2s.pth", *predict)
    assert Image.open(tmp_path / "out" / "predict" / "photo.png").size == (64, 40)
    del state["decoder.ad3.ad0.0.weight"]
    torch.save(state, tmp_path / "short.pth")
    assert "1 missing (se4.conv.weight" in sentence("--weights", tmp_path / "short.pth", *predict)

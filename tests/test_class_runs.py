"""class_net.py as its users run it: every mode, every flag, interruption, processes, bad input."""

import json
import shutil

import numpy as np
import pytest
import recipe
import torch
from helpers import (
    TWO_PROCESSES,
    kill_in_training,
    last,
    refused,
    run_script,
    same,
    small_flags,
    write_lists,
    write_photo,
)
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import class_net
from common import harness
from common.backbones import backbone
from common.images import load_image
from common.published import class_state
from common.run import Run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The flags of a small run: 8 scenes of 64 pixels, two steps in its only epoch."""
    return small_flags(write_lists(tmp_path_factory.mktemp("lists"), train=8), epochs=1)


@pytest.fixture(scope="module")
def base(small, tmp_path_factory):
    """The folder of that run: what variants must differ from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    class_net.main([*small, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def long(small):
    """The flags of a run that is long enough to be interrupted: six epochs of two steps."""
    return [*small, *"--epochs 6 --augment flip scale crop".split()]


@pytest.fixture(scope="module")
def whole(long, tmp_path_factory):
    """The folder of that run, which nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    class_net.main([*long, "--out", str(folder)])
    return folder


def main(*flags) -> None:
    """class_net.py in this process, on the CPU."""
    class_net.main([*map(str, flags), "--device", "cpu"])


def lines(folder) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().split("\n") if line]


# ---- Modes ---------------------------------------------------------------------------------------
def test_help_names_every_group_and_default(capsys):
    with pytest.raises(SystemExit):
        class_net.main(["--help"])
    text = capsys.readouterr().out
    for group in ("daily use", "method", "training", "backbone", "runtime", "output"):
        assert f"\n{group}:" in text
    text = " ".join(text.split())
    assert "[paper 100, shapes 7, small 12]" in text
    assert "[paper resnet50, shapes tiny, small mobilenet_v2]" in text and "examples:" in text


def test_train_then_eval_and_predict(small, tmp_path, capsys):
    run = tmp_path / "run"
    main(*small, "--out", run, "--epochs", 2)
    ((title, row),) = json.loads((run / "eval.json").read_text()).items()
    assert row["n"] == 4 and 0 <= row["F_mean"] <= 1 and "F_mean" in capsys.readouterr().out
    first, second = lines(run)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    # The whole loss holds D_2's terms once, and those of the three deeper outputs in part.
    assert first["loss"] > first["pixel"] + first["region"] + first["object"] > 0
    assert first["lr"] == pytest.approx(0.05 * 2 / 3)
    assert json.loads((run / "args.json").read_text())["flags"]["outputs"] == 4
    assert Image.open(run / "gallery.png").size == (3 * 160, 4 * 160)  # photo, map, truth
    assert (run / "vis" / "epoch_002.png").exists()
    assert len(list((run / "pred").glob("**/*.png"))) == 4

    # Evaluation alone gives the same numbers.
    again = tmp_path / "again"
    main("--weights", run / "last.pt", "--out", again, *small[2:4])
    assert json.loads((again / "eval.json").read_text()) == {title: row}

    # Prediction of a folder keeps every photo's size, also with a cut-out.
    photos = tmp_path / "photos"
    write_photo(photos / "wide.jpg", 90, 50)
    write_photo(photos / "tall.jpg", 33, 71)
    main("--predict", photos, "--out", run, "--cutout", "--crf")
    made = Image.open(run / "predict" / "wide.png")
    cutout = Image.open(run / "predict" / "wide_cutout.png")
    assert made.size == (90, 50) and made.mode == "L" and cutout.mode == "RGBA"
    assert Image.open(run / "predict" / "tall.png").size == (33, 71)
    assert np.array_equal(np.asarray(cutout)[..., 3], np.asarray(made))


def test_the_authors_checkpoint_predicts(tmp_path):
    """A file with their keys, below the name that they give it: the network is --released."""
    description, _ = recipe.reference("class_r50")
    he = tuple(description["he_prefixes"])
    state = {key: recipe.weights(key, shape, he) for key, shape in description["keys"]}
    torch.save(state, tmp_path / "class.pth")
    photo = write_photo(tmp_path / "photo.png", 60, 40)
    weights = f"--weights {tmp_path}/class.pth --size 64"
    main(*weights.split(), "--predict", photo, "--out", tmp_path)

    net = class_net.CLASSNet(backbone("resnet50", "none", "f3net"), released=True).eval()
    net.load_state_dict(class_state(state))
    image = TF.resize(load_image(photo), [64, 64], antialias=True)[None] / 255
    with torch.no_grad():
        logit = net(image)[0][0]
    want = harness.finish(logit, {"name": "photo", "size": (40, 60)}, crf=False).numpy()
    made = np.asarray(Image.open(tmp_path / "predict" / "photo.png"))
    assert made.shape == (40, 60) and np.abs(made.astype(int) - want).max() <= 1


def test_dry_run_does_two_steps_of_everything(small, tmp_path, monkeypatch):
    steps = []
    add = Run.add

    def counted(run, **losses):
        steps.append(run.epoch)
        add(run, **losses)

    monkeypatch.setattr(Run, "add", counted)
    main(*small, "--out", tmp_path / "run", *"--dry-run --batch-size 2 --epochs 2".split())
    assert steps == [1, 1, 2, 2]
    assert json.loads((tmp_path / "run" / "eval.json").read_text())


# ---- Every flag does something -------------------------------------------------------------------
FLAGS = """
    --losses pixel; --losses pixel region; --region released; --outputs 1; --attention
    --attention position; --attention channel; --fusion sum; --augment; --augment flip
    --augment flip scale crop; --bn stored; --released; --lr 0.02; --seed 1; --pixels unit
    --backbone-weights none; --amp bf16
"""


@pytest.fixture
def only_training(monkeypatch):
    """Leave out scores and pictures, which these tests do not look at."""
    monkeypatch.setattr(class_net, "evaluate", lambda net, settings: None)
    monkeypatch.setattr(harness, "gallery", lambda columns, settings: None)
    monkeypatch.setattr(harness, "Watch", lambda settings, photos: lambda logit, picture: {})


def test_every_flag_changes_the_result(base, small, tmp_path, only_training):
    unchanged = []
    variants = [text.strip() for text in FLAGS.replace("\n", ";").split(";") if text.strip()]
    for i, extra in enumerate(variants):
        main(*small, "--out", tmp_path / str(i), *extra.split())
        if same(last(base), last(tmp_path / str(i))):
            unchanged.append(extra)
    assert len(variants) == 18 and not unchanged


def test_init_starts_from_a_network_and_its_flags(base, small, tmp_path, only_training):
    """At a rate of nearly 0 the weights stay where they were, also under another --data."""
    start = last(base)["model"]
    for init in (base / "last.pt", tmp_path / "run" / "last.pt"):
        flags = ["--data", small[1], "--eval", small[3], "--size", 64, "--batch-size", 4]
        flags += ["--epochs", 1, "--lr", 1e-12, "--augment", "--device", "cpu"]
        main(*flags, "--init", init, "--out", tmp_path / "run", "--overwrite")
        found = last(tmp_path / "run")["model"]
        for key, value in start.items():
            if "running" not in key and "tracked" not in key:
                torch.testing.assert_close(found[key], value)
    assert last(tmp_path / "run")["args"]["backbone"] == "tiny"


def test_init_takes_the_network_flags_of_the_checkpoint(base, small, tmp_path, only_training):
    photos = tmp_path / "photos"
    for i in range(4):
        write_photo(photos / "images" / f"{i}.png", 70, 70, seed=i)
        mask = np.zeros((70, 70), np.uint8)
        mask[20:50, 10:40] = 255
        (photos / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(photos / "masks" / f"{i}.png")
    flags = ["--data", photos, "--epochs", 1, "--batch-size", 2, "--device", "cpu"]
    main(*flags, "--init", base / "last.pt", "--out", tmp_path / "run")
    saved = last(tmp_path / "run")["args"]
    assert (saved["backbone"], saved["size"], saved["preset"]) == ("tiny", 64, "paper")
    assert "there is no file" in refused(class_net.main, *flags, "--init", tmp_path / "none.pt")


# ---- Interruption --------------------------------------------------------------------------------
def test_two_and_four_epochs_equal_six_bit_for_bit(long, whole, tmp_path, monkeypatch):
    flags = [*long, "--out", tmp_path / "run"]
    batches = Run.batches

    def interrupted(run):
        if run.epoch == 3:
            raise KeyboardInterrupt
        return batches(run)

    monkeypatch.setattr(Run, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(*flags)
    assert last(tmp_path / "run")["epoch"] == 2
    assert "unfinished run, epoch 2 of 6: go on with --resume" in refused(class_net.main, *flags)
    monkeypatch.setattr(Run, "batches", batches)
    main(*flags, "--resume")
    assert same(last(whole), last(tmp_path / "run"))
    scores = [(run / "eval.json").read_text() for run in (whole, tmp_path / "run")]
    assert scores[0] == scores[1]
    losses = [[line["loss"] for line in lines(run)] for run in (whole, tmp_path / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_killed_run_resumes_to_the_same_weights(long, whole, tmp_path):
    flags = [*long, "--out", tmp_path / "run"]
    kill_in_training("class_net.py", *flags, log=tmp_path / "run" / "log.jsonl")
    assert not (tmp_path / "run" / "eval.json").exists()  # it was still training
    main(*flags, "--resume")
    assert same(last(whole), last(tmp_path / "run"))


def test_resuming_with_other_flags_is_refused(base, small):
    flags = [*small, "--out", base, "--resume", "--outputs", 1]
    sentence = refused(class_net.main, *flags)
    assert "was trained with --outputs 4: give the same flags" in sentence


def test_resume_without_a_run_is_refused(small, tmp_path):
    sentence = refused(class_net.main, *small, "--out", tmp_path / "run", "--resume")
    assert f"no {tmp_path}/run/last.pt to go on from" in sentence


def test_a_finished_run_is_overwritten_only_when_asked_to(base, small, tmp_path, only_training):
    run = shutil.copytree(base, tmp_path / "run")
    sentence = refused(class_net.main, *small, "--out", run, "--fusion", "sum")
    assert "holds a run with --fusion ffm" in sentence
    assert all(flag in sentence for flag in ("--out", "--resume", "--overwrite"))
    assert same(last(base), last(run))
    main(*small, "--out", run, *"--fusion sum --overwrite".split())
    assert last(run)["args"]["fusion"] == "sum"


# ---- Two processes -------------------------------------------------------------------------------
def test_two_processes_train_one_network(lists, tmp_path):
    """Not equal to one process: BatchNorm of the decoder sees half of each batch."""
    flags = [*small_flags(lists, epochs=2), *"--batch-size 8".split()]
    done = run_script("class_net.py", *flags, "--out", tmp_path / "two", launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr[-2000:]
    main(*flags, "--out", tmp_path / "one")
    one = lines(tmp_path / "one")
    two = lines(tmp_path / "two")
    assert len(two) == 2 and two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.2)
    assert two[1]["loss"] < two[0]["loss"]

    # Both processes scored together; the checkpoint alone gives the same numbers.
    weights = ["--weights", tmp_path / "two" / "last.pt", "--out", tmp_path / "alone"]
    main(*weights, *flags[2:4])
    (row,) = json.loads((tmp_path / "two" / "eval.json").read_text()).values()
    (alone,) = json.loads((tmp_path / "alone" / "eval.json").read_text()).values()
    assert row == pytest.approx(alone, abs=1e-6) and row["n"] == 4


# ---- Bad input -----------------------------------------------------------------------------------
def test_photos_without_masks_are_refused(tmp_path):
    write_photo(tmp_path / "images" / "photo.png")
    flags = f"--data {tmp_path} --backbone tiny --size 64 --out {tmp_path}/run --device cpu"
    sentence = refused(class_net.main, *flags.split())
    assert "mask" in sentence and str(tmp_path) in sentence


def test_a_photo_without_its_mask_is_named(small, tmp_path, monkeypatch):
    """Some registered sets open without masks; here one scene of the shapes loses its own."""
    read = class_net.Bank.__init__

    def incomplete(bank, *args, **kwargs):
        read(bank, *args, **kwargs)
        bank.has["mask"][5] = False
        bank.names[5] = "lost"

    monkeypatch.setattr(class_net.Bank, "__init__", incomplete)
    sentence = refused(class_net.main, *small, "--out", tmp_path / "run")
    assert "lost has no mask, and CLASS learns from masks" in sentence


def test_a_batch_that_batchnorm_cannot_normalise_is_refused_before_training(small, tmp_path):
    """VGG-16's poolings make one cell of 40 x 40 pixels, the smallest scale of 64."""
    vgg = f"--backbone vgg16 --backbone-weights none --batch-size 1 --out {tmp_path}/run"
    sentence = refused(class_net.main, *small, *vgg.split())
    assert "40 x 40 pixels" in sentence and "--batch-size" in sentence
    assert not (tmp_path / "run" / "last.pt").exists()
    tiny = f"--batch-size 1 --dry-run --out {tmp_path}/tiny"
    class_net.main([*small, *tiny.split()])  # four cells are enough
    assert last(tmp_path / "tiny")["epoch"] == 1


def test_too_small_pictures_are_refused(small, tmp_path):
    sentence = refused(class_net.main, *small, "--out", tmp_path, "--size", 32)
    assert "--size 32" in sentence and "at least 64" in sentence


@pytest.mark.parametrize("mode", ["--eval shapes-test", "--predict docs/gallery.png"])
def test_weights_that_are_no_numbers_are_refused(base, tmp_path, mode):
    saved = last(base)
    saved["model"]["heads.2.bias"][0] = float("nan")
    torch.save(saved, tmp_path / "last.pt")
    weights = f"--weights {tmp_path}/last.pt --out {tmp_path} --device cpu {mode}"
    sentence = refused(class_net.main, *weights.split())
    assert "last.pt is damaged: heads.2.bias" in sentence


def test_checkpoints_of_another_method_are_refused(tmp_path):
    saved = {"method": "a2s", "stage": 1, "epoch": 1, "args": {}, "model": {}}
    torch.save(saved, tmp_path / "last.pt")
    weights = f"--weights {tmp_path}/last.pt --eval shapes-test"
    assert "is a checkpoint of a2s stage 1" in refused(class_net.main, *weights.split())


def test_a_damaged_checkpoint_of_the_authors_names_the_key(tmp_path):
    description, _ = recipe.reference("class_r50")
    state = {key: torch.zeros(shape) for key, shape in description["keys"]}
    del state["PAM3.value_conv.bias"]
    torch.save(state, tmp_path / "class.pth")
    weights = f"--weights {tmp_path}/class.pth --eval shapes-test --out {tmp_path} --device cpu"
    assert "position.3.value.bias" in refused(class_net.main, *weights.split())


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(base, small, tmp_path):
    run = shutil.copytree(base, tmp_path / "run")
    flags = [*small, "--out", run, *"--lr 1e30 --overwrite".split()]
    assert "loss of epoch 1 is not a number" in refused(class_net.main, *flags)
    assert same(last(base), last(run))

"""a2s.py as its users run it: every mode, every flag, interruption, two processes, bad input."""

import json

import numpy as np
import pytest
import torch
from helpers import (
    TWO_PROCESSES,
    error_line,
    kill_in_training,
    last,
    refused,
    run_script,
    same,
    small_flags,
    write_photo,
)
from PIL import Image

import a2s
from common import flags as common_flags
from common.run import Run
from data.shapes import Shapes


@pytest.fixture
def flags(lists, tmp_path):
    """A small run: 16 scenes of 64 pixels, four steps per epoch."""
    return [*small_flags(lists), "--out", str(tmp_path / "run")]


@pytest.fixture(scope="module")
def base(lists, tmp_path_factory):
    """A finished small run, and the flags that made it: what variants must differ from."""
    folder = tmp_path_factory.mktemp("base") / "run"
    flags = [*small_flags(lists, size=32), *"--batch-size 8".split()]
    a2s.main([*flags, "--out", str(folder)])
    return folder, flags


def args_of(*flags) -> list[str]:
    """Flags as strings, on the CPU."""
    return [*map(str, flags), "--device", "cpu"]


# ---- Modes ---------------------------------------------------------------------------------------
def test_help_works_offline_and_names_every_group_and_default():
    done = run_script("a2s.py", "--help")
    assert done.returncode == 0
    for group in ("daily use", "method", "training", "backbone", "runtime", "output"):
        assert f"\n{group}:" in done.stdout
    text = " ".join(done.stdout.split())
    assert "[paper 20 25, shapes 3 3, small 3 9]" in text
    assert "[paper resnet50, shapes tiny, small mobilenet_v2]" in text and "examples:" in text


def test_both_stages_then_eval_and_predict(flags, tmp_path, lists):
    done = run_script("a2s.py", *flags)
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
    lines = (run / "stage1" / "log.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert json.loads((run / "stage1" / "args.json").read_text())["flags"]["alpha"] == 0.1
    assert Image.open(run / "gallery.png").size == (5 * 160, 4 * 160)  # photo, 3 maps, truth
    assert (run / "stage1" / "vis" / "epoch_003.png").exists()

    # Evaluation alone gives the same numbers.
    again = tmp_path / "again"
    weights = run / "stage2" / "last.pt"
    sets = f"--data shapes --eval shapes-test@{lists}/test.txt".split()
    a2s.main(args_of("--weights", weights, *sets, "--out", again))
    name = list(results)[-1]
    assert json.loads((again / "stage2" / "eval.json").read_text())[name] == results[name]

    # Prediction of a folder keeps every photo's size, also with a cut-out.
    photos = tmp_path / "photos"
    write_photo(photos / "wide.jpg", 90, 50)
    write_photo(photos / "tall.jpg", 33, 71)
    done = run_script("a2s.py", *args_of("--predict", photos, "--out", run, "--cutout", "--crf"))
    assert done.returncode == 0, done.stderr
    made = Image.open(run / "predict" / "wide.png")
    cutout = Image.open(run / "predict" / "wide_cutout.png")
    assert made.size == (90, 50) and made.mode == "L" and cutout.mode == "RGBA"
    assert np.array_equal(np.asarray(cutout)[..., 3], np.asarray(made))

    # A network in Python gives the numbers of the command line.
    sod = a2s.load(run / "stage2" / "last.pt", device="cpu")
    a2s.main(args_of("--predict", photos, "--out", run, "--overlay"))
    made = [np.asarray(Image.open(run / "predict" / f"{name}.png")) for name in ("wide", "tall")]
    pictures = [Image.open(photos / "wide.jpg"), Image.open(photos / "tall.jpg")]
    assert all(np.array_equal(a, b) for a, b in zip(made, sod(pictures)))
    assert np.array_equal(made[0], sod(pictures[0]))
    assert Image.open(run / "predict" / "tall_overlay.png").size == (33, 71)

    # A checkpoint that was copied elsewhere writes beside itself; a photo is scored sets besides.
    copy = tmp_path / "copy" / "mine.pt"
    copy.parent.mkdir()
    copy.write_bytes(weights.read_bytes())
    a2s.main(args_of("--weights", copy, "--predict", photos / "tall.jpg", *sets[2:]))
    assert Image.open(copy.parent / "predict" / "tall.png").size == (33, 71)
    assert json.loads((copy.parent / "stage2" / "eval.json").read_text())[name] == results[name]


def test_dry_run_does_two_steps_of_everything(flags, tmp_path):
    a2s.main([*flags, "--dry-run", "--batch-size", "2"])
    assert len(list((tmp_path / "run" / "pseudo").glob("*.png"))) == 4
    assert (tmp_path / "run" / "stage2" / "eval.json").exists()


# ---- Every flag does something -------------------------------------------------------------------
STAGE_1 = """
    --alpha 0.3; --aux 0 0 0; --drop 0; --train-encoder; --boundary DB1; --boundary DB2
    --boundary DB3; --boundary DB4; --threshold otsu; --threshold median; --seed 1; --lr 0.5
    --bn batch; --pixels unit; --amp bf16; --backbone-weights none
"""
STAGE_2 = """
    --detector conv; --rectify off; --rectify hma; --lam 0.8; --released; --lr 0.002; --seed 1
"""


def variants(text: str) -> list[list[str]]:
    """Flags between semicolons or on lines of their own."""
    return [part.split() for part in text.replace("\n", ";").split(";") if part.strip()]


@pytest.fixture
def only_training(monkeypatch):
    """Leave out labels and scores, which these tests do not look at."""
    monkeypatch.setattr(a2s, "make_labels", lambda *args, **kwargs: None)
    monkeypatch.setattr(a2s, "evaluate", lambda *args: {})


def test_every_flag_of_stage_1_changes_the_result(base, tmp_path, only_training):
    folder, flags = base
    unchanged = []
    for i, extra in enumerate(variants(STAGE_1)):
        a2s.main([*flags, "--stage", "1", "--out", str(tmp_path / str(i)), *extra])
        if same(last(folder, 1), last(tmp_path / str(i), 1)):
            unchanged.append(extra)
    assert not unchanged


def run_stage_2(base, out, *extra) -> dict:
    """The checkpoint of a stage 2 that starts from the labels of the base run."""
    folder, flags = base
    out.mkdir()
    (out / "pseudo").symlink_to(folder / "pseudo")
    a2s.main([*flags, "--stage", "2", "--out", str(out), *extra])
    return last(out, 2)


def test_every_flag_of_stage_2_changes_the_result(base, tmp_path, only_training):
    unchanged = []
    for i, extra in enumerate(variants(STAGE_2)):
        if same(last(base[0], 2), run_stage_2(base, tmp_path / str(i), *extra)):
            unchanged.append(extra)
    assert not unchanged


def test_init_starts_one_stage_from_a_network(base, tmp_path, only_training):
    init = ("--init", str(base[0] / "stage2" / "last.pt"))
    saved = run_stage_2(base, tmp_path / "run", *init, "--lr", "1e-12", "--epochs", "1")
    for key, value in last(base[0], 2)["model"].items():
        torch.testing.assert_close(saved["model"][key], value)
    flags = [*base[1], *init, "--stage", "1", "--out", str(tmp_path / "other")]
    assert "is of stage 2, which is not trained here" in refused(a2s.main, *flags)


def test_labels_change_in_the_same_share_of_a_short_run(base, tmp_path, only_training):
    """The paper keeps its labels for 2 of 25 epochs: of 1 epoch for all of it, of 3 for 1."""
    paths = sorted((base[0] / "pseudo").glob("*.png"))
    stored = [np.asarray(Image.open(path).resize((32, 32), Image.BILINEAR)) for path in paths]
    assert run_stage_2(base, tmp_path / "1", "--epochs", "1")["labels"] is None  # never changed
    labels = run_stage_2(base, tmp_path / "2", "--epochs", "2")["labels"][:, 0].numpy()
    changed = np.abs(labels.astype(int) - np.stack(stored)).reshape(16, -1).max(1)
    assert (changed > 50).all()  # all 16 in the second epoch


def test_olr_acts_on_the_weights_of_a_short_run(base, tmp_path, only_training):
    """With 3 epochs labels that the second one rewrote are learnt in the third one."""
    olr, off = (
        run_stage_2(base, tmp_path / kind, "--rectify", kind)["model"] for kind in ("olr", "off")
    )
    assert not all(torch.equal(olr[key], off[key]) for key in olr)


# ---- Interruption --------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", [1, 2])
def test_two_and_two_epochs_equal_four_bit_for_bit(flags, tmp_path, monkeypatch, stage):
    flags = [*flags, *"--epochs 4 --bn batch".split()]
    a2s.main([*flags, "--out", str(tmp_path / "whole")])
    batches = Run.batches

    def interrupted(run, *args, **kwargs):
        if (run.stage, run.epoch) == (stage, 3):
            raise KeyboardInterrupt
        return batches(run, *args, **kwargs)

    monkeypatch.setattr(Run, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        a2s.main(flags)
    assert last(tmp_path / "run", stage)["epoch"] == 2
    assert "unfinished run, epoch 2 of 4: go on with --resume" in refused(a2s.main, *flags)
    monkeypatch.setattr(Run, "batches", batches)
    a2s.main([*flags, "--resume"])
    for at in (1, 2):
        assert same(last(tmp_path / "whole", at), last(tmp_path / "run", at))
    scores = [(tmp_path / run / "stage2" / "eval.json").read_text() for run in ("whole", "run")]
    assert scores[0] == scores[1]


def test_a_killed_run_resumes_to_the_same_weights(flags, tmp_path):
    flags = [*flags, *"--stage 1 --epochs 6".split()]
    assert run_script("a2s.py", *flags, "--out", tmp_path / "whole").returncode == 0
    kill_in_training("a2s.py", *flags, log=tmp_path / "run" / "stage1" / "log.jsonl")
    assert not (tmp_path / "run" / "stage1" / "eval.json").exists()  # it was still training
    assert run_script("a2s.py", *flags, "--resume").returncode == 0
    assert same(last(tmp_path / "whole", 1), last(tmp_path / "run", 1))


def test_resuming_with_other_flags_is_refused(base):
    folder, flags = base
    flags = [*flags, "--out", folder, "--resume"]
    sentence = refused(a2s.main, *flags, "--stage", 1, "--alpha", 0.2)
    assert "was trained with --alpha 0.1: give the same flags" in sentence
    for stage in (1, 2):  # the sentence can be typed: one number, that of the stage
        saved = last(folder, stage)["args"]
        sentence = refused(a2s.main, *flags, "--stage", stage, "--epochs", 9, "--lr", 0.3)
        assert f"with --epochs {saved['epochs']}, --lr {saved['lr']}: give" in sentence


def test_a_finished_run_is_overwritten_only_when_asked_to(flags, tmp_path, only_training):
    flags = [*flags, *"--stage 1 --epochs 1".split()]
    a2s.main(flags)
    first = last(tmp_path / "run", 1)
    sentence = refused(a2s.main, *flags, "--seed", 7)
    assert "holds a run with --seed 0" in sentence
    assert all(flag in sentence for flag in ("--out", "--resume", "--overwrite"))
    assert same(first, last(tmp_path / "run", 1))
    a2s.main(flags)  # the same run again gives the same result
    assert same(first, last(tmp_path / "run", 1))
    a2s.main([*flags, "--seed", "7", "--overwrite"])
    assert not same(first, last(tmp_path / "run", 1))


def test_resume_without_a_run_is_refused(flags, tmp_path):
    assert f"no {tmp_path}/run/stage1/last.pt" in refused(a2s.main, *flags, "--resume")
    assert not (tmp_path / "run" / "stage1").exists()


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
    sentence = refused(a2s.main, *flags, "--stage", 1, "--out", tmp_path / "run", "--resume")
    assert "was trained on other photos, 16 (" in sentence and "instead of 16 (" in sentence


def test_a_photo_is_predicted_without_evaluation_sets(base, tmp_path, monkeypatch):
    """A network of MSRA-B is judged by six sets, none of which --predict may ask for."""
    saved = last(base[0], 2)
    saved["args"]["data"] = "MSRA-B"
    torch.save(saved, tmp_path / "last.pt")
    photo = write_photo(tmp_path / "photo.png", 50, 40)
    monkeypatch.setattr(common_flags, "present", lambda *_: pytest.fail("asked for sets"))
    weights = ("--weights", tmp_path / "last.pt")
    a2s.main(args_of(*weights, "--predict", photo, "--out", tmp_path))
    assert Image.open(tmp_path / "predict" / "photo.png").size == (50, 40)


def test_stage_1_is_explained_with_the_last_label_that_of_training(base, tmp_path):
    photo = write_photo(tmp_path / "photo.png", 64, 64)
    weights = ("--weights", base[0] / "stage1" / "last.pt")
    a2s.main(args_of(*weights, "--explain", photo, "--out", tmp_path))
    picture = Image.open(tmp_path / "explain" / "photo.png")
    assert picture.size == (5 * 260, 2 * 280)  # 9 panels of 256 x 256

    args = a2s.build_parser().parse_args(args_of(*weights, "--explain", photo))
    args, _, net = a2s.open_checkpoint(weights[1], args)
    image = torch.rand(1, 3, 32, 32)
    to_label = a2s.label_maker(args)
    pictures = a2s.explain_activation(net, image[0], image, to_label)
    label = a2s.label_logit(net, image, "off", to_label).sigmoid().round()
    assert torch.equal(pictures[-1][1], label[0])
    m = net.features(image)[0].sum(1)
    assert torch.equal(pictures[2][1], m >= m.mean())


def test_the_unary_of_a_checkpoint_can_be_changed(base):
    for more, unary in (("", "hard"), ("--unary soft", "soft")):
        flags = f"{more} --device cpu --eval shapes-test".split()
        args = a2s.build_parser().parse_args(flags)
        assert a2s.open_checkpoint(base[0] / "stage1" / "last.pt", args)[0].unary == unary


@pytest.mark.parametrize(
    "flag", ["--lr -1", "--lr nan", "--lr fast", f"--seed {'9' * 20}", "--seed -1", "--epochs 0"]
)
def test_numbers_that_cannot_be(flag, capsys):
    with pytest.raises(SystemExit):
        a2s.build_parser().parse_args(flag.split())
    assert f"argument {flag.split()[0]}: " in capsys.readouterr().err


def test_pictures_too_small_for_the_encoder_are_refused():
    assert "--size 15 leaves nothing" in refused(a2s.main, "--size", 15)


def test_built_in_shapes_are_told_from_folders_of_that_name():
    assert common_flags.is_shapes("shapes")
    assert common_flags.is_shapes("shapes@a.txt+shapes-depth@b.txt")
    assert not common_flags.is_shapes("shapes_photos")
    assert not common_flags.is_shapes("shapes+photos")


# ---- Two processes -------------------------------------------------------------------------------
def test_two_processes_equal_one_up_to_rounding(flags, tmp_path):
    """With BatchNorm's statistics frozen; with --bn batch each process sees half a batch."""
    flags = [*flags, "--bn", "stored"]
    done = run_script("a2s.py", *flags, "--out", tmp_path / "two", launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr[-2000:]
    a2s.main([*flags, "--out", str(tmp_path / "one")])
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
def test_stage_2_before_stage_1_prints_the_command(lists, tmp_path):
    out = tmp_path / "run"
    sentence = refused(a2s.main, *small_flags(lists), "--stage", 2, "--out", out)
    assert "16 of 16 pseudo labels are missing" in sentence
    assert f"python a2s.py --stage 1 --data shapes@{lists}/train.txt --out {out}" in sentence


def test_an_error_is_one_line_without_a_traceback():
    done = run_script("a2s.py", *"--data MSRAB --backbone tiny --device cpu".split())
    assert "MSRA-B" in error_line(done)


@pytest.mark.parametrize("content", [b"", b"text"])
def test_broken_photos_are_named(tmp_path, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "photo.jpg").write_bytes(content)
    flags = f"--data {tmp_path} --backbone tiny --stage 1 --size 32 --epochs 1"
    sentence = refused(a2s.main, *flags.split(), "--out", tmp_path / "run")
    assert "photo.jpg" in sentence and not (tmp_path / "run" / "pseudo").exists()


def test_checkpoints_of_another_method_and_unwritable_folders_are_refused(tmp_path):
    other = {"method": "class_net", "stage": 1, "epoch": 1, "args": {}, "model": {}}
    torch.save(other, tmp_path / "last.pt")
    weights = ("--weights", tmp_path / "last.pt", "--eval", "shapes-test")
    assert "class_net" in refused(a2s.main, *weights)
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert "cannot write" in refused(a2s.main, "--stage", 1, "--out", out)


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(flags, tmp_path, only_training):
    flags = [*flags, "--stage", "1"]
    a2s.main([*flags, "--epochs", "1"])
    good = last(tmp_path / "run", 1)
    sentence = refused(a2s.main, *flags, "--lr", "1e30", "--overwrite")
    assert "loss of epoch 1 is not a number" in sentence
    assert same(good, last(tmp_path / "run", 1))


def test_odd_files_work(tmp_path):
    """16-bit, CMYK, RGBA and grey photos train, are labelled and keep their sizes."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)
    Image.fromarray(pixels.astype(np.uint16) * 256).save(folder / "deep.png")
    for mode, name in (("CMYK", "print.jpg"), ("RGBA", "alpha.png"), ("L", "grey.bmp")):
        Image.fromarray(pixels).convert("RGB").convert(mode).save(folder / name)
    flags = f"--data {tmp_path} --backbone tiny --stage 1 --size 32 --epochs 1 --batch-size 2"
    a2s.main([*flags.split(), "--out", str(tmp_path / "run")])
    made = {p.stem: Image.open(p).size for p in (tmp_path / "run" / "pseudo").glob("*.png")}
    assert made == dict.fromkeys(("deep", "print", "alpha", "grey"), (50, 40))

"""The run folder: claimed, locked, resumed, logged; flags that become settings; what pipes do."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, last, refused, run_script, small_flags, write_photo
from PIL import Image

import class_net
from common import flags, run, runtime
from common.bank import Bank, MapBank
from common.datasets import open_set
from common.flags import Schedule
from common.runtime import UserError

SMALL = "--epochs 1 --batch-size 8"


@pytest.fixture
def trained(lists, tmp_path):
    """The flags of a small run of CLASS that is finished; its folder is tmp_path/run."""
    flags = [*small_flags(lists, size=64), *SMALL.split(), "--out", str(tmp_path / "run")]
    class_net.main(flags)
    return flags


# ---- Schedules and flags -------------------------------------------------------------------------
def test_an_epoch_reaches_a_milestone_at_the_same_share_of_any_run():
    """The paper changes something from epoch 16 of 20 on, after three quarters of its run."""
    first = {}
    for epochs in (1, 2, 4, 20, 40):
        schedule = Schedule(epochs, 1.0)
        reached = [e for e in range(1, epochs + 1) if schedule.reached(e, 16, 20)]
        first[epochs] = reached[0] if reached else None
    assert first == {1: None, 2: None, 4: 4, 20: 16, 40: 31}


PRESETS = {
    "paper": {"stage1": Schedule(20, 1.0), "stage2": Schedule(25, 0.005), "size": 320},
    "shapes": {"stage1": Schedule(3, 1.0), "stage2": Schedule(4, 0.01), "size": 160},
    "small": {"stage1": Schedule(5, 1.0), "stage2": Schedule(9, 0.02), "size": 96},
}


def test_flags_are_completed_without_being_changed():
    parser = class_net.build_parser()
    args = parser.parse_args("--data photos --epochs 3".split())
    before = dict(vars(args))
    full = flags.completed(args, PRESETS)
    assert (full.stage1, full.stage2, full.size) == (Schedule(3, 1.0), Schedule(3, 0.005), 320)
    assert flags.completed(parser.parse_args(["--size", "64"]), PRESETS).size == 64
    assert vars(args) == before


def test_the_preset_is_the_papers_unless_shapes_are_drawn_or_another_is_asked_for(capsys):
    parser = class_net.build_parser()
    for text, size in (("--data photos", 320), ("", 160), ("--data photos --preset small", 96)):
        args = flags.completed(parser.parse_args(text.split()), PRESETS)
        assert args.size == size
        flags.show_preset(args, PRESETS)
    shapes, small = capsys.readouterr().out.strip().split("\n")
    assert shapes.startswith("preset shapes: stage1 3 epochs at rate 1, ")
    assert small == "preset small: stage1 5 epochs at rate 1, stage2 9 epochs at rate 0.02, size 96"


def test_help_shows_the_defaults_of_all_presets():
    assert flags.defaults("lr", PRESETS) == "[paper 1 0.005, shapes 1 0.01, small 1 0.02]"
    assert flags.defaults("epochs", PRESETS) == "[paper 20 25, shapes 3 4, small 5 9]"
    assert flags.defaults("size", PRESETS) == "[paper 320, shapes 160, small 96]"


def test_a_sweep_over_seeds_keeps_its_runs():
    parse = class_net.build_parser().parse_args
    folders = [flags.run_folder(parse(["--seed", seed]), "m") for seed in ("0", "1", "2")]
    assert [str(folder) for folder in folders] == [
        "runs/m-shapes", "runs/m-shapes-seed1", "runs/m-shapes-seed2"
    ]  # fmt: skip


def test_explain_takes_the_network_of_the_project_and_scores_nothing():
    parse = class_net.build_parser().parse_args
    args = parse(["--explain", "a.jpg"])
    assert flags.checkpoint_of(args, "class_net", "last.pt") == flags.NETWORKS / "class_net.pt"
    assert flags.evaluation_sets(args, ["shapes-test"]) == []
    assert flags.plain_flags(args, torch.device("cpu"))["explain"] is None
    args = parse(["--explain", "a.jpg", "--data", "photos"])
    assert str(flags.checkpoint_of(args, "class_net", "last.pt")) == "runs/class_net-photos/last.pt"


# ---- The run folder ------------------------------------------------------------------------------
def test_a_folder_is_written_to_by_one_process_at_a_time(lists, tmp_path):
    small = [*small_flags(lists, size=64), *SMALL.split(), "--out", str(tmp_path / "run")]
    runtime.lock(tmp_path / "run")
    runtime.lock(tmp_path / "run")  # a process may take its own folder again
    done = run_script("class_net.py", *small)
    assert done.returncode == 1 and "another process is writing to" in done.stderr
    assert not (tmp_path / "run" / "last.pt").exists()
    runtime._LOCKS.pop(os.path.realpath(tmp_path / "run")).close()  # as the end of a process does
    assert run_script("class_net.py", *small).returncode == 0


def test_the_folder_of_the_photos_is_no_run_folder(tmp_path):
    write_photo(tmp_path / "images" / "a.jpg")
    sentence = refused(class_net.main, "--data", tmp_path, "--backbone", "tiny", "--out", tmp_path)
    assert "is the folder of the photos" in sentence


def test_temporary_files_of_a_killed_process_are_removed(trained, tmp_path):
    rest = tmp_path / "run" / "pred" / ".x.png.123.part"
    rest.write_text("half a file")
    class_net.main(trained)
    assert not rest.exists() and not list(tmp_path.glob("**/*.part"))


def test_a_folder_of_pictures_is_no_run_folder(lists, tmp_path):
    write_photo(tmp_path / "images" / "a.png")
    sentence = refused(class_net.main, *small_flags(lists), "--out", tmp_path / "images")
    assert sentence.endswith("images is a folder of pictures: give another one")
    assert not (tmp_path / "images" / ".lock").exists()


def test_a_dry_run_is_replaced_and_replaces_nothing(lists, tmp_path):
    small = [*small_flags(lists, size=64), *SMALL.split(), "--out", str(tmp_path / "run")]
    class_net.main([*small, "--dry-run"])
    class_net.main(small)  # over the dry run
    assert not last(tmp_path / "run")["args"]["dry_run"]
    assert "--dry-run would overwrite" in refused(class_net.main, *small, "--dry-run")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", {}, {"method": "class_net", "stage": 1}])
def test_a_damaged_checkpoint_is_named_and_can_be_replaced(trained, tmp_path, content):
    path = tmp_path / "run" / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    for more in ([], ["--resume"]):
        assert str(path) in refused(class_net.main, *trained, *more)
    class_net.main([*trained, "--overwrite"])
    assert last(tmp_path / "run")["epoch"] == 1


def test_a_photo_that_was_replaced_under_its_name_is_noticed(tmp_path):
    photos = tmp_path / "photos"
    for i in range(2):
        write_photo(photos / "images" / f"{i}.jpg", seed=i)
        Image.new("L", (40, 40), 255 * i).save(write_photo(photos / "masks" / f"{i}.png"))
    flags = f"--data {photos} --backbone tiny --size 64 --epochs 1 --batch-size 2 --device cpu"
    flags = [*flags.split(), "--out", str(tmp_path / "run")]
    class_net.main(flags)
    class_net.main([*flags, "--resume"])
    Image.new("RGB", (40, 40)).save(photos / "images" / "1.jpg")
    assert "was trained on other photos" in refused(class_net.main, *flags, "--resume")


def test_a_dry_run_s_network_is_told_from_a_trained_one(lists, tmp_path, capsys):
    small = [*small_flags(lists, size=64), *SMALL.split(), "--out", str(tmp_path / "run")]
    class_net.main([*small, "--dry-run"])
    capsys.readouterr()
    class_net.main(["--weights", str(tmp_path / "run" / "last.pt"), *small[2:4]])
    assert "made by --dry-run" in capsys.readouterr().out


def small_stage(lists, out, *more) -> run.Run:
    """A stage that trains one number and writes to its labels; the bank holds 16 photos."""
    parser = class_net.build_parser()
    args = parser.parse_args([*small_flags(lists, epochs=2), "--out", str(out), *more])
    settings = flags.settle(class_net.complete(args), "class_net", quiet=True)
    bank = Bank(open_set(settings.data), 8, settings.device)
    labels = MapBank(lambda i: torch.zeros(1, 8, 8, dtype=torch.uint8), 16, 8, settings.device)
    net = torch.nn.Linear(1, 1)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    return run.Run(settings, 1, bank, net, optimiser, Schedule(2, 0.1), labels)


def test_a_loss_that_is_no_number_stops(lists, tmp_path):
    stage = small_stage(lists, tmp_path)
    losses = [1.5, float("nan")]
    with pytest.raises(UserError, match="loss of epoch 2 is not a number.*of epoch 1 is kept"):
        for _, loss in zip(stage.epochs(), losses):
            for _ in stage.batches():
                stage.add(loss=torch.tensor(loss))


@pytest.mark.parametrize("phase", ["last.pt", "labels_002.pt"])
def test_a_full_disk_leaves_the_older_checkpoint_whole(lists, tmp_path, monkeypatch, phase):
    """The disk is full when the second epoch's weights, or its labels, are half written."""
    write_bytes = Path.write_bytes

    def on_full_disk(path, content):
        if phase in path.name:
            write_bytes(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    def train(stage, epoch):
        torch.nn.init.constant_(stage.raw.weight, epoch)
        stage.labels.pixels.fill_(epoch)
        stage.labels.changed = True
        stage.save()

    stage = small_stage(lists, tmp_path)
    epochs = stage.epochs()
    train(stage, next(epochs))
    monkeypatch.setattr(Path, "write_bytes", on_full_disk)
    with pytest.raises(UserError, match=f"cannot write .*{phase} .No space left on device"):
        train(stage, next(epochs))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert not list(tmp_path.glob("**/*.part"))

    again = small_stage(lists, tmp_path, "--resume")
    assert (again.done, again.raw.weight.item()) == (1, 1)
    assert (again.labels.pixels == 1).all()
    train(again, next(again.epochs()))
    done = last(tmp_path)
    assert done["epoch"] == 2 and (done["labels"] == 2).all()
    assert [path.name for path in tmp_path.glob("labels_*")] == ["labels_002.pt"]


def test_flags_of_a_damaged_checkpoint_are_refused_by_name(tmp_path):
    parser = class_net.build_parser()
    args = parser.parse_args([])
    names = ["backbone", "pixels", "attention", "released", "data", "size"]
    good = vars(parser.parse_args("--backbone tiny --size 64 --pixels unit".split()))
    path = tmp_path / "last.pt"

    def taken(**changes):
        return flags.saved_flags(parser, args, {"args": good | changes}, path, names, [])

    assert (taken().backbone, taken().size) == ("tiny", 64)
    assert taken(attention=[]).attention == [] and taken(size=None).size is None
    wrong = {
        "pixels": [[], "other", 0],
        "backbone": [5, "resnet51", ["tiny"], torch.ones(2)],
        "size": [float("nan"), 0, -1, "64", 64.0, True],
        "attention": ["channel", ["other"], None, [[]]],
        "released": [1, "yes", None],
        "data": [0, None, ["shapes"]],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(UserError, match=f"{path} is a damaged checkpoint: --{name} cannot"):
                taken(**{name: value})
    del good["size"]
    with pytest.raises(UserError, match=f"{path} was made by another version: it lacks size"):
        taken()


# ---- What a run leaves behind --------------------------------------------------------------------
def test_args_tell_what_was_run(trained, tmp_path):
    found = json.loads((tmp_path / "run" / "args.json").read_text())
    assert found["flags"]["size"] == 64 and found["flags"]["epochs"] == 1
    assert found["torch"] == torch.__version__ and found["minutes"] >= 0
    assert {"command", "date", "machine", "commit", "numpy", "pillow"} <= found.keys()


def test_long_trainings_are_announced(capsys):
    """10 epochs of 300 steps at 2 seconds are 100 minutes, at 0.1 seconds they are 5."""
    stage = run.Run.__new__(run.Run)
    stage.name, stage.steps, stage.last, stage.done = "stage 2", 300, 10, 0
    stage.announce(2.0)
    assert "stage 2 will take about 100 minutes" in capsys.readouterr().out
    stage.announce(20.0)
    assert "about 17 hours" in capsys.readouterr().out
    stage.announce(0.1)
    assert capsys.readouterr().out == ""


def test_minutes_count_what_was_before_an_interruption(tmp_path):
    log = run.Log(tmp_path, 4)
    log.lines = [{"epoch": 1, "loss": 1.0, "seconds": 90}, {"epoch": 2, "seconds": 30}]
    log.write()
    assert run.Log(tmp_path, 4, done=1).minutes == 1.5
    assert "<svg" in (tmp_path / "log.svg").read_text()


def test_pictures_are_drawn_without_evaluation_sets(tmp_path):
    photos = tmp_path / "photos"
    for i in range(2):
        write_photo(photos / "images" / f"{i}.jpg", seed=i)
        Image.new("L", (40, 40), 255 * i).save(write_photo(photos / "masks" / f"{i}.png"))
    flags = f"--data {photos} --backbone tiny --size 64 --epochs 1 --batch-size 2 --device cpu"
    class_net.main([*flags.split(), "--out", str(tmp_path / "run")])
    picture = Image.open(tmp_path / "run" / "vis" / "epoch_001.png")
    assert picture.size == (3 * 160, 2 * 160)  # photo, map, truth


# ---- Where output goes ---------------------------------------------------------------------------
def test_a_closed_pipe_does_not_stop_a_training(lists, tmp_path):
    flags = [*small_flags(lists, size=64), *SMALL.split(), "--out", str(tmp_path / "run")]
    program = subprocess.Popen(
        [sys.executable, "class_net.py", *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    program.stdout.readline()
    program.stdout.close()  # as `| head -1` does
    errors = program.stderr.read()
    assert program.wait() == 0 and b"Traceback" not in errors and b"Broken" not in errors
    assert (tmp_path / "run" / "eval.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_device_and_a_link_stay_what_they_are(tmp_path):
    with pytest.raises(UserError, match="cannot write /dev/full .No space left"):
        runtime.save_json("/dev/full", {"a": 1})
    assert os.path.exists("/dev/full") and not os.path.isfile("/dev/full")
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    runtime.save_json(tmp_path / "link.json", 7)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "7\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_log_file_on_a_full_disk_does_not_stop_a_program():
    code = "from common.runtime import say; say('a'); say('b'); say('c', error=True)"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (0, b"c\n")


def test_out_of_memory_is_not_blamed_on_a_file(capsys):
    def fail():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    with pytest.raises(SystemExit) as end:
        runtime.cli(fail)
    assert "out of memory" in str(end.value) and "--batch-size" in str(end.value)
    with pytest.raises(RuntimeError, match="another"):
        runtime.cli(lambda: (_ for _ in ()).throw(RuntimeError("another")))

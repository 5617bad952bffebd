"""sdg_sod.py as its users run it: every mode, every flag, interruption, processes, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sdg_sod
from common import harness, published, runtime
from common.backbones import backbone
from common.runtime import UserError
from data.shapes import Shapes

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STAGES = ("sod", "caption", "control", "guide")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A small run: 8 scenes at 64 pixels, two steps per epoch, two epochs per stage."""
    folder = tmp_path_factory.mktemp("lists")
    for split, count in (("train", 8), ("test", 4)):
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
        "--hidden",
        "64",
        "--beam",
        "2",
        "--width",
        "16",
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="module")
def base(flags, tmp_path_factory):
    """A finished run of all stages, made by the program, and what it printed."""
    folder = tmp_path_factory.mktemp("base") / "run"
    done = command(*flags, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def command(*flags, launcher=()):
    """Run sdg_sod.py as a program and return the finished process."""
    return subprocess.run(
        [sys.executable, *launcher, "sdg_sod.py", *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def last(folder: Path, stage: str) -> dict:
    return torch.load(folder / stage / "last.pt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a["model"].keys() == b["model"].keys() and all(
        torch.equal(a["model"][key], b["model"][key]) for key in a["model"]
    )


def prepared(flags, folder: Path):
    """The flags as the program sees them when a stage begins."""
    args = sdg_sod.build_parser().parse_args([*flags, "--out", str(folder)])
    args.lexicon = None
    sdg_sod.fill_defaults(args)
    harness.prepare(args, "sdg_sod")
    return args


# ---- Modes ---------------------------------------------------------------------------------------
def test_help_works_offline_and_names_every_group():
    done = command("--help")
    assert done.returncode == 0
    for group in ("method", "data", "backbone", "optimisation", "runtime", "output"):
        assert f"\n{group}:" in done.stdout


def test_all_stages_leave_what_they_should(base):
    folder, printed = base
    results = json.loads((folder / "guide" / "eval.json").read_text())
    assert [name.rsplit("-")[-1] for name in results] == ["sod", "control", "guide"]
    assert all(row["n"] == 4 and 0 <= row["F_mean"] <= 1 for row in results.values())
    assert "captions of shapes-test" in printed and "F_mean" in printed
    for stage in STAGES:
        lines = (folder / stage / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
        flags = json.loads((folder / stage / "args.json").read_text())["flags"]
        assert flags["hidden"] == 64 and "lexicon" not in flags
    (report,) = (folder / "caption").glob("captions-*.json")
    report = json.loads(report.read_text())
    assert len(report["captions"]) == 4 and 0 <= report["scores"]["next"] <= 1
    assert len(list((folder / "caption" / "vis").glob("*.png"))) == 4
    assert Image.open(folder / "gallery.png").size == (5 * 160, 4 * 160)  # photo, 3 maps, truth


def test_guidance_starts_from_the_other_stages_and_keeps_the_captioner(base):
    folder, _ = base
    sod, caption, guide = (last(folder, stage)["model"] for stage in ("sod", "caption", "guide"))
    assert all(torch.equal(guide[f"captioner.{key}"], value) for key, value in caption.items())
    assert set(guide) == set(sod) | {f"captioner.{key}" for key in caption} | {
        key for key in guide if key.startswith("guidance.")
    }
    assert any(value.abs().sum() > 0 for key, value in guide.items() if key.startswith("guidance"))
    assert not torch.equal(guide["decoder.predict.weight"], sod["decoder.predict.weight"])


def test_evaluation_alone_gives_the_same_numbers(base, flags, tmp_path):
    folder, _ = base
    results = json.loads((folder / "guide" / "eval.json").read_text())
    done = command(
        "--weights", folder / "guide" / "last.pt", *flags[2:4], "--out", tmp_path, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "guide" / "eval.json").read_text())
    (name,) = again
    assert again[name] == results[name]


def test_predictions_have_the_photo_s_size_and_words_can_be_drawn(base, tmp_path):
    folder, _ = base
    for stem, size in (("wide", (90, 50)), ("tall", (33, 71))):
        pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{stem}.jpg")
    done = command("--predict", tmp_path, "--out", folder, "--cutout", "--words", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    made = Image.open(folder / "predict" / "wide.png")
    cutout = Image.open(folder / "predict" / "wide_cutout.png")
    assert made.size == (90, 50) and made.mode == "L" and cutout.mode == "RGBA"
    words = next(line for line in done.stdout.splitlines() if line.startswith("wide: "))
    drawn = Image.open(folder / "predict" / "wide_words.png")
    assert drawn.size == (160 * (2 + len(words.split()) - 1), 176)  # photo, map, every word
    for stage, made in (("sod", "tall.png"), ("caption", "tall_words.png")):
        checkpoint = str(folder / stage / "last.pt")
        sdg_sod.main(
            [
                "--predict",
                str(tmp_path / "tall.jpg"),
                "--weights",
                checkpoint,
                "--out",
                str(tmp_path / stage),
                "--crf",
                "--device",
                "cpu",
            ]
        )
        assert [path.name for path in (tmp_path / stage / "predict").iterdir()] == [made]
    assert Image.open(tmp_path / "sod" / "predict" / "tall.png").size == (33, 71)


def photos(folder: Path, *stems: str) -> None:
    """Noise of 40 x 40 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, stem in enumerate(stems):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{stem}.jpg")


def test_each_stage_is_judged_by_the_sets_that_can_judge_it(base, flags, tmp_path):
    """One set has captions alone, the other masks alone."""
    folder, _ = base
    photos(tmp_path / "Flickr8k", "one", "two")
    (tmp_path / "Flickr8k" / "Flickr8k.token.txt").write_text(
        "".join(
            f"{stem}.jpg#0\tA red {thing} .\n"
            for stem in ("one", "two")
            for thing in ("star", "ring")
        )
    )
    photos(tmp_path / "masked" / "images", "three")
    (tmp_path / "masked" / "masks").mkdir()
    Image.new("L", (40, 40), 255).save(tmp_path / "masked" / "masks" / "three.png")
    sets = ["--eval", "Flickr8k", str(tmp_path / "masked"), "--data-root", str(tmp_path)]
    sdg_sod.main([*flags[:2], *flags[4:], *sets, "--dry-run", "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "guide" / "eval.json").read_text())
    assert list(results) == ["masked-sod", "masked-control", "masked-guide"]
    assert Image.open(tmp_path / "run" / "gallery.png").size == (5 * 160, 160)
    (report,) = (tmp_path / "run" / "caption").glob("captions-*.json")
    report = json.loads(report.read_text())
    assert list(report["captions"]) == ["one", "two"] and "said" in report["scores"]
    for stage, wrong, part in (
        ("sod", sets[:2], "masks"),
        ("caption", [sets[0], sets[2]], "captions"),
    ):
        assert f"stage {stage} is judged by {part}, which these sets lack" in refused(
            "--weights", folder / stage / "last.pt", *wrong, *sets[3:], "--out", tmp_path
        )


def test_duts_is_evaluated_on_the_captions_of_coco_too(monkeypatch):
    monkeypatch.setattr(harness, "present", lambda names, root: names)
    args = sdg_sod.build_parser().parse_args(["--data", "DUTS-TR"])
    sdg_sod.fill_defaults(args)
    assert args.eval == ["DUTS-TE", "ECSSD", "DUT-OMRON", "HKU-IS", "PASCAL-S", "COCO-captions-val"]
    assert (args.beam, args.scales) == (5, [1, 2, 3, 4])


def test_words_and_beam_can_be_chosen_at_prediction(base, tmp_path, monkeypatch, capsys):
    folder, _ = base
    photos(tmp_path, "photo")
    (tmp_path / "v.vocab").write_text(
        "\n".join(f"word{i}\t0" for i in range(len(last(folder, "caption")["args"]["lexicon"])))
    )
    looks, look = [], sdg_sod.Captioner.look
    monkeypatch.setattr(
        sdg_sod.Captioner, "look", lambda self, image: looks.append(self.beam) or look(self, image)
    )
    for stage in ("caption", "guide"):
        predict = [
            "--weights",
            str(folder / stage / "last.pt"),
            "--predict",
            str(tmp_path / "photo.jpg"),
            "--words",
            "--out",
            str(tmp_path / stage),
        ]
        capsys.readouterr()
        sdg_sod.main(
            [*predict, "--device", "cpu", "--beam", "3", "--vocabulary", str(tmp_path / "v.vocab")]
        )
        words = next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith("photo: ")
        ).split()[1:]
        assert words and all(word.startswith("word") for word in words)
        sdg_sod.main([*predict, "--device", "cpu"])
        times = {"caption": 1, "guide": 2}[stage]  # the map, and the map with words
        assert looks == [3] * times + [2] * times
        looks.clear()


def virtex(path: Path, words: int) -> None:
    """A small untrained captioner in a file of VirTex's form."""
    torch.manual_seed(0)
    net = sdg_sod.Captioner(backbone("resnet50", "none"), words, 64, plain=True)
    names = {ours: theirs for theirs, ours in published.VIRTEX.items()}
    state = {}
    for key, value in net.state_dict().items():
        ours = next(name for name in names if key.startswith(name))
        state[names[ours] + key.removeprefix(ours)] = value
    path.parent.mkdir()
    torch.save({"model": state, "iteration": 1}, path)


def test_virtex_s_checkpoint_describes_photos_in_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    virtex(tmp_path / "downloads" / "virtex.pth", 12)
    photos(tmp_path, "photo")
    monkeypatch.chdir(tmp_path)
    flags = [
        "--weights",
        "downloads/virtex.pth",
        "--predict",
        "photo.jpg",
        "--device",
        "cpu",
        "--beam",
        "1",
    ]
    pieces = ["<unk>", "[SOS]", "[EOS]", *(f"\u2581p{i}" for i in range(9))]
    Path("v.vocab").write_text("\n".join(pieces), encoding="utf-8")
    said = []
    for extra in ([], ["--vocabulary", "v.vocab"]):
        sdg_sod.main([*flags, *extra])
        said.append(
            next(
                line for line in capsys.readouterr().out.splitlines() if line.startswith("photo: ")
            ).split()[1:]
        )
    assert said[0] and all(word.isdigit() for word in said[0])
    assert said[1] == [f"p{int(word) - 3}" for word in said[0]]
    made = [path.name for path in Path("runs/sdg_sod-released/predict").iterdir()]
    assert made == ["photo_words.png"] and not Path("downloads/predict").exists()


def test_dry_run_does_two_steps_of_everything(flags, tmp_path):
    sdg_sod.main([*flags, "--dry-run", "--batch-size", "2", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "guide" / "eval.json").exists()


# ---- The bank of maps ----------------------------------------------------------------------------
def seen_by_the_network(args, folder: Path, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What the loss of stage guide shows to the network for the first two photos."""
    shown = []

    def spy(image, m):
        shown.extend((image, m))
        return torch.zeros(2, 1, 64, 64)

    loss = sdg_sod.sod_task("guide", args, folder)[2]
    loss(spy, torch.arange(2), torch.tensor([flip, flip]), torch.Generator().manual_seed(0))
    return shown


def test_a_mirrored_photo_takes_its_map_mirrored(base, flags):
    folder, _ = base
    args = prepared([*flags, "--crop", "0"], folder)
    (image, m), (mirrored, m2) = (seen_by_the_network(args, folder, flip) for flip in (False, True))
    assert torch.allclose(mirrored, image.flip(3), atol=1e-5)
    assert torch.allclose(m2, m.flip(3), atol=1e-5) and not torch.allclose(m2, m)
    net, count, _ = sdg_sod.sod_task("guide", args, folder)
    assert torch.allclose(m, net.captioner.eval().guidance(image), atol=1e-4)
    args.maps = "other"
    other = seen_by_the_network(args, folder, False)[1]
    assert torch.allclose(other[1], m[0], atol=1e-5) and not torch.allclose(other[0], m[0])
    args.live = True
    assert seen_by_the_network(args, folder, False)[1] is None


def test_two_processes_fill_one_bank(base, flags):
    """Each describes its share; the shares are put back in order."""
    folder, _ = base
    args = prepared(flags, folder)
    net = sdg_sod.start_net("guide", args)
    bank = sdg_sod.Bank(sdg_sod.open_set(args.data), 64, args.device, folder)
    whole = sdg_sod.map_bank(net.captioner, bank, args)

    class Half(runtime.World):
        def gather(self, value):
            halves.append(value)
            return halves if len(halves) == 2 else [value, torch.zeros_like(value)]

    halves = []
    for rank in (0, 1):
        args.world = Half(rank, 2)
        both = sdg_sod.map_bank(net.captioner, bank, args)
    assert torch.allclose(both, whole, atol=1e-5)


# ---- Every flag does something -------------------------------------------------------------------
CHANGES = {
    "sod": [
        ["--bce", "coded"],
        ["--released"],
        ["--crop", "0"],
        ["--seed", "1"],
        ["--lr", "1e-4"],
        ["--decoder", "literal"],
        ["--decoder", "psp"],
        ["--width", "8"],
        ["--amp", "bf16"],
        ["--encoder", "mit_b0", "--encoder-weights", "none"],
    ],
    "caption": [
        ["--hidden", "128"],
        ["--layers", "2"],
        ["--pixels", "unit"],
        ["--lr", "1e-4"],
        ["--backbone-weights", "none"],
        ["--seed", "1"],
        ["--no-freeze"],
        ["--taps", "1"],
        ["--plain-grid"],
        ["--captions", "ECHO"],
    ],
    "guide": [
        ["--scales", "1"],
        ["--attn-norm", "max"],
        ["--attn-norm", "mean"],
        ["--attn-norm", "l1"],
        ["--attn-row", "read"],
        ["--xi-init", "normal"],
        ["--maps", "other"],
        ["--live"],
        ["--released"],
    ],
}


@pytest.mark.parametrize("stage", CHANGES)
def test_every_flag_changes_the_result(stage, base, flags, tmp_path, monkeypatch):
    folder, _ = base
    monkeypatch.setattr(sdg_sod, "evaluate", lambda stage, net, args: {})
    other = tmp_path / "other.txt"
    other.write_text("\n".join(Shapes("train").names[8:16]))
    files = ["--sod", str(folder / "sod/last.pt"), "--captioner", str(folder / "caption/last.pt")]
    sdg_sod.main([*flags, *files, "--stage", stage, "--out", str(tmp_path / "same")])
    assert same(last(folder, stage), last(tmp_path / "same", stage))  # without a change
    unchanged = []
    for i, extra in enumerate(CHANGES[stage]):
        extra = [f"shapes@{other}" if word == "ECHO" else word for word in extra]
        out = tmp_path / str(i)
        sdg_sod.main([*flags, *files, "--stage", stage, "--out", str(out), *extra])
        if same(last(folder, stage), last(out, stage)):
            unchanged.append(extra)
    assert not unchanged


def test_the_beam_changes_the_guidance(base, flags, tmp_path, monkeypatch):
    """Of a captioner whose words are not sure: the small run's captions are two words long."""
    folder, _ = base
    monkeypatch.setattr(sdg_sod, "evaluate", lambda stage, net, args: {})
    saved = last(folder, "caption")
    torch.manual_seed(0)
    for key, value in saved["model"].items():
        if key.startswith(("forwards.", "words.", "positions.")):
            torch.nn.init.normal_(value, std=0.3)
    runtime.save_checkpoint(tmp_path / "unsure.pt", **saved)
    for beam in ("1", "2"):
        sdg_sod.main(
            [
                *flags,
                "--stage",
                "guide",
                "--sod",
                str(folder / "sod/last.pt"),
                "--beam",
                beam,
                "--captioner",
                str(tmp_path / "unsure.pt"),
                "--out",
                str(tmp_path / beam),
            ]
        )
    assert not same(last(tmp_path / "1", "guide"), last(tmp_path / "2", "guide"))


def test_stage_sod_can_start_from_a_checkpoint(base, flags, tmp_path, monkeypatch):
    folder, _ = base
    monkeypatch.setattr(sdg_sod, "train_epoch", lambda *arguments: (0.0, 1))
    sdg_sod.main(
        [
            *flags,
            "--stage",
            "sod",
            "--out",
            str(tmp_path),
            "--pretrained",
            str(folder / "sod" / "last.pt"),
        ]
    )
    assert same(last(folder, "sod"), last(tmp_path, "sod"))


# ---- Interruption, processes ---------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_two_and_two_epochs_equal_four_bit_for_bit(stage, base, flags, tmp_path, monkeypatch):
    folder, _ = base
    monkeypatch.setattr(sdg_sod, "evaluate", lambda stage, net, args: {})
    flags = [
        *flags,
        "--epochs",
        "4",
        "--stage",
        stage,
        "--sod",
        str(folder / "sod/last.pt"),
        "--captioner",
        str(folder / "caption/last.pt"),
    ]
    sdg_sod.main([*flags, "--out", str(tmp_path / "whole")])
    train_epoch = sdg_sod.train_epoch

    def interrupted(*arguments):
        if arguments[5] == 3:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(sdg_sod, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sdg_sod.main([*flags, "--out", str(tmp_path / "run")])
    assert last(tmp_path / "run", stage)["epoch"] == 2
    monkeypatch.setattr(sdg_sod, "train_epoch", train_epoch)
    torch.rand(7)  # another random state
    sdg_sod.main([*flags, "--out", str(tmp_path / "run"), "--resume"])
    assert same(last(tmp_path / "whole", stage), last(tmp_path / "run", stage))


DRIVER = """
import hashlib, sys
sys.path.insert(0, ".")
import sdg_sod
train = sdg_sod.train

def checked(stage, args):
    net = train(stage, args)
    state = b"".join(value.numpy().tobytes() for value in net.state_dict().values())
    assert len(set(args.world.gather(hashlib.sha256(state).hexdigest()))) == 1, stage
    sys.stdout.write(f"{args.world.size} processes agree on {stage}\\n")  # print writes twice
    return net
sdg_sod.train = checked
if "--crop" in sys.argv:
    sdg_sod.Block.drop_path = lambda self, x: x
sdg_sod.runtime.cli(sdg_sod.main)  # leaves the group, without which a process may abort at its end
"""


def processes(number: int, folder: Path, *flags) -> str:
    """What `number` processes print; each has the same weights after every stage."""
    (folder / "driver.py").write_text(DRIVER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    done = subprocess.run(
        [sys.executable, *torchrun, str(folder / "driver.py"), *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_train_one_network(base, flags, tmp_path):
    """Their gradients and statistics are averaged, their captions and scores gathered."""
    folder, _ = base
    printed = processes(2, tmp_path, *flags, "--out", tmp_path)
    assert all(printed.count(f"2 processes agree on {stage}\n") == 2 for stage in STAGES)
    one, two = (json.loads((run / "guide" / "eval.json").read_text()) for run in (folder, tmp_path))
    assert one.keys() == two.keys() and all(row["n"] == 4 for row in two.values())
    (report,) = (tmp_path / "caption").glob("captions-*.json")
    report = json.loads(report.read_text())
    assert len(report["captions"]) == 4 and 0 <= report["scores"]["next"] <= 1


@torch.no_grad()
def test_two_processes_equal_one_without_batchnorm_and_chance(base, flags, tmp_path):
    """No statistics of half a batch, no crops and no dropped paths: the same maps."""
    folder, _ = base
    flags = [
        *flags,
        "--decoder",
        "literal",
        "--crop",
        "0",
        "--captioner",
        str(folder / "caption" / "last.pt"),
    ]
    image, logits = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), {}
    for number in (1, 2):
        run = tmp_path / str(number)
        run.mkdir()
        processes(number, run, *flags, "--out", run)
        for stage in ("sod", "control", "guide"):
            args = sdg_sod.build_parser().parse_args(["--eval", "shapes-test", "--device", "cpu"])
            net = sdg_sod.load(run / stage / "last.pt", args)[1].eval()
            logits[stage, number] = net(image)
    for stage, other in (("sod", "control"), ("control", "sod"), ("guide", "sod")):
        assert torch.allclose(logits[stage, 1], logits[stage, 2], atol=1e-5), stage
        assert not torch.allclose(logits[stage, 1], logits[other, 1], atol=1e-3)


# ---- Bad input -----------------------------------------------------------------------------------
def refused(*flags) -> str:
    """The sentence with which sdg_sod.py ends; there is exactly one, and no traceback."""
    with pytest.raises(UserError) as error:
        sdg_sod.main([*map(str, flags), "--device", "cpu"])
    return str(error.value)


def test_a_problem_is_one_line_on_the_terminal():
    done = command("--data", "DUTSTR", "--stage", "sod")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "DUTS-TR" in done.stderr


def test_guide_before_the_other_stages_prints_the_command(flags, tmp_path):
    sentence = refused(*flags, "--stage", "guide", "--out", tmp_path)
    assert f"there is no {tmp_path}/sod/last.pt; make it: python sdg_sod.py --stage sod" in sentence
    assert f"--out {tmp_path}" in sentence


def test_sets_without_masks_or_captions_are_refused(flags, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "photo.jpg")
    rest = [
        *flags[4:],
        "--out",
        tmp_path / "run",
        "--encoder",
        "mit_b0",
        "--encoder-weights",
        "none",
        "--backbone",
        "tiny",
        "--eval",
        "shapes-test",
    ]
    assert "have no mask" in refused("--data", tmp_path, "--stage", "sod", *rest)
    assert "not every picture has a caption" in refused(
        "--data", tmp_path, "--captions", tmp_path, "--stage", "caption", *rest
    )


def test_what_stage_caption_would_refuse_is_refused_before_stage_sod(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(sdg_sod, "train", lambda *_: pytest.fail("trained first"))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "photo.jpg")
    assert "not every picture has a caption" in refused(*flags, "--captions", tmp_path)
    assert "--vocabulary is for VirTex's captioner" in refused(*flags, "--vocabulary", "a.vocab")


def test_the_caption_stage_writes_no_saliency_scores(base):
    assert not (base[0] / "caption" / "eval.json").exists()
    assert (base[0] / "guide" / "curves.svg").exists()


def test_a_captioner_brings_along_which_row_is_a_word_s_map(base, tmp_path):
    saved = last(base[0], "caption")
    saved["args"]["attn_row"] = "read"
    torch.save(saved, tmp_path / "last.pt")
    for more, row in (([], "read"), (["--attn-row", "predict"], "predict")):
        args = sdg_sod.build_parser().parse_args(["--device", "cpu", *more])
        args.lexicon, args.eval = None, ["shapes-test"]
        assert sdg_sod.load(tmp_path / "last.pt", args)[1].row == row


@pytest.mark.parametrize(
    "content",
    [
        {0: torch.ones(1)},
        {"model": [1]},
        {"method": "sdg_sod"},
        {"model": {"words.weight": torch.ones(1)}},
    ],
)
def test_odd_files_are_no_captioner(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert "x.pt" in refused("--weights", tmp_path / "x.pt", "--eval", "shapes-test")


@pytest.mark.parametrize(
    "extra, sentence",
    [
        (["--size", "31"], "--size 31 leaves nothing"),
        (["--hidden", "100"], "--hidden 100 is not a multiple of 64"),
        (["--crop", "1"], "--crop 1.0 is not a share"),
        (["--encoder", "mit_b3"], "--encoder-weights: give a file with the weights of mit_b3"),
        (["--encoder-weights", "nowhere.pth"], "--encoder-weights: there is no file nowhere.pth"),
        (
            ["--encoder-weights", "nowhere.safetensors"],
            "--encoder-weights: nowhere.safetensors is not a readable .safetensors file",
        ),
        (["--pretrained", "nowhere.pt"], "--pretrained: there is no file nowhere.pt"),
        (["--decoder", "ann", "--scales", "1"], "--decoder ann sees scales 3 and 4 alone"),
        (["--decoder", "psp", "--batch-size", "1"], "--decoder psp normalises over a batch"),
        (["--decoder", "apc", "--batch-size", "1"], "--decoder apc normalises over a batch"),
        (
            ["--decoder", "aspp", "--batch-size", "1"],
            "it needs at least two in each process's share",
        ),
        (["--lr", "1e30"], "loss of epoch 1 is not a number"),
    ],
)
def test_flags_that_cannot_be(flags, tmp_path, extra, sentence):
    assert sentence in refused(*flags, "--stage", "sod", "--out", tmp_path, *extra)


@pytest.mark.parametrize(
    "extra, sentence",
    [
        (["--captioner", "nowhere.pt"], "--captioner: there is no file nowhere.pt"),
        (["--captioner", "SOD"], "stage sod, not of sdg_sod stage caption"),
        (["--sod", "nowhere.pt"], "--sod: there is no file nowhere.pt"),
        (["--sod", "SOD", "--width", "8"], "was trained with --width 16: give the same flags"),
        (
            ["--sod", "SOD", "--encoder", "mit_b0", "--decoder", "psp"],
            "was trained with --encoder mit_tiny, --decoder mlp: give the same flags",
        ),
        (["--backbone-weights", "nowhere.pth"], "--backbone-weights nowhere.pth: no such file"),
    ],
)
def test_files_of_later_stages_are_checked_before_the_first(
    base, flags, tmp_path, monkeypatch, extra, sentence
):
    folder, _ = base

    def train(stage, args):
        raise AssertionError(f"stage {stage} was trained before")

    monkeypatch.setattr(sdg_sod, "train", train)
    extra = [folder / "sod" / "last.pt" if word == "SOD" else word for word in extra]
    assert sentence in refused(*flags, "--out", tmp_path, *extra)


@pytest.mark.parametrize("stage", ["sod", "control"])
def test_words_need_a_captioner(base, tmp_path, stage):
    folder, _ = base
    photos(tmp_path, "photo")
    assert f"is of stage {stage}, which knows no words" in refused(
        "--weights", folder / stage / "last.pt", "--predict", tmp_path, "--words"
    )


def test_other_checkpoints_are_refused(base, flags, tmp_path):
    folder, _ = base
    assert "is a checkpoint of sdg_sod stage sod, not of sdg_sod stage caption" in refused(
        *flags, "--stage", "guide", "--out", folder, "--captioner", folder / "sod" / "last.pt"
    )
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pt")
    assert "holds neither a captioner" in refused("--weights", tmp_path / "x.pt", *flags)
    assert "was trained with --crop 0.125" in refused(
        *flags, "--stage", "sod", "--out", folder, "--resume", "--crop", "0.2"
    )
    assert "was trained with --epochs 2, --lr 0.001: give" in refused(
        *flags, "--stage", "sod", "--out", folder, "--resume", "--epochs", "4", "--lr", "0.002"
    )


@pytest.mark.parametrize("stage, flag", [("caption", "--captions"), ("guide", "--captioner")])
def test_another_vocabulary_is_refused_in_a_short_sentence(
    base, flags, tmp_path, monkeypatch, stage, flag
):
    """The captions of a set, or the file of a captioner, have changed under the same name."""
    folder, _ = base
    other = last(folder, stage)
    other["args"]["lexicon"] = [*other["args"]["lexicon"], "zebra"]
    runtime.save_checkpoint(tmp_path / stage / "last.pt", **other)
    sentence = refused(
        *flags,
        "--stage",
        stage,
        "--out",
        tmp_path,
        "--resume",
        "--sod",
        folder / "sod" / "last.pt",
        "--captioner",
        folder / "caption" / "last.pt",
    )
    assert "the captioner's vocabulary is another" in sentence and f"the same {flag}," in sentence
    assert "zebra" not in sentence and len(sentence) < 300


def test_a_resumed_run_looks_with_the_captioner_of_its_checkpoint(
    base, flags, tmp_path, monkeypatch
):
    """Also if the file of --captioner holds another one by now."""
    folder, _ = base
    saved, seen = last(folder, "guide"), []
    for key in saved["model"]:
        if key.startswith("captioner.projection."):
            saved["model"][key] = torch.full_like(saved["model"][key], 0.25)
    saved["args"] |= {
        "sod": str(folder / "sod" / "last.pt"),
        "epochs": 3,
        "captioner": str(folder / "caption" / "last.pt"),
    }
    runtime.save_checkpoint(tmp_path / "guide" / "last.pt", **saved)
    map_bank = sdg_sod.map_bank
    monkeypatch.setattr(
        sdg_sod,
        "map_bank",
        lambda captioner, *rest: (
            seen.append(captioner.projection.weight.unique().tolist()) or map_bank(captioner, *rest)
        ),
    )
    sdg_sod.main(
        [
            *flags,
            "--epochs",
            "3",
            "--stage",
            "guide",
            "--out",
            str(tmp_path),
            "--resume",
            "--sod",
            saved["args"]["sod"],
            "--captioner",
            saved["args"]["captioner"],
        ]
    )
    assert seen == [[0.25]]

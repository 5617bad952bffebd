"""sdg_sod.py as its users run it: every mode, every flag, interruption, processes, bad input."""

import contextlib
import dataclasses
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ENVIRONMENT,
    ROOT,
    TWO_PROCESSES,
    last,
    same,
    small_flags,
    write_lists,
    write_photo,
)
from helpers import refused as refused_by
from PIL import Image

import sdg_sod
from common import flags as common_flags
from common import harness, published, runtime
from common.backbones import backbone
from common.bank import Bank
from common.datasets import open_set
from common.images import to_tensor
from common.run import Run
from data import captions
from data.ladder import mask_map, others
from data.shapes import Shapes

STAGES = ("sod", "caption", "control", "guide")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A small run: 8 scenes at 64 pixels, two steps per epoch, two epochs per stage."""
    lists = write_lists(tmp_path_factory.mktemp("lists"), train=8)
    return [*small_flags(lists, epochs=2), *"--hidden 64 --beam 2 --width 16".split()]


@pytest.fixture(scope="module")
def base(flags, tmp_path_factory):
    """A finished run of all stages, and what it printed."""
    folder = tmp_path_factory.mktemp("base") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(*flags, "--out", folder)
    return folder, printed.getvalue()


@pytest.fixture
def quick(monkeypatch):
    """Train without evaluating, neither afterwards nor after every epoch."""
    monkeypatch.setattr(sdg_sod, "evaluate", lambda *_: {})
    monkeypatch.setattr(sdg_sod, "study", lambda *_: None)
    monkeypatch.setattr(sdg_sod, "study_maps", lambda *_: None)
    monkeypatch.setattr(harness, "Watch", lambda *_: lambda *_: {})


def main(*flags) -> None:
    """Run sdg_sod.py in this process."""
    sdg_sod.main([str(flag) for flag in flags])


def refused(*flags) -> str:
    """The sentence with which sdg_sod.py ends."""
    return refused_by(sdg_sod.main, *flags, "--device", "cpu")


def given(folder: Path) -> list[str]:
    """The flags that take the results of the first two stages from a run."""
    return f"--sod {folder}/sod/last.pt --captioner {folder}/caption/last.pt".split()


def words_of(printed: str, name: str) -> list[str]:
    """The caption that was printed for a photo."""
    (line,) = [line for line in printed.split("\n") if line.startswith(f"{name}: ")]
    return line.split()[1:]


def loaded(path: Path, *more):
    """A checkpoint as the program loads it: flags, stage, network."""
    words = ["--eval", "shapes-test", "--device", "cpu", *more]
    return sdg_sod.open_checkpoint(path, sdg_sod.build_parser().parse_args(words))


def settled(args, out: Path):
    """The settings of flags that a checkpoint brought along."""
    return common_flags.settle(common_flags.replaced(args, out=out), "sdg_sod")


# ---- Modes ---------------------------------------------------------------------------------------
def test_help_works_offline_and_names_every_group(capsys):
    with pytest.raises(SystemExit) as ended:
        main("--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    groups = "daily use, method, saliency branch, guidance, captioner, backbone, training, output"
    for group in groups.split(", "):
        assert f"\n{group}:" in printed


def test_all_stages_leave_what_they_should(base):
    folder, printed = base
    results = json.loads((folder / "guide" / "eval.json").read_text())
    assert [name.rsplit("-")[-1] for name in results] == ["sod", "control", "guide"]
    assert all(row["n"] == 4 and 0 <= row["F_mean"] <= 1 for row in results.values())
    assert "captions of shapes-test" in printed and "F_mean" in printed
    assert "AUC of 7 x 7 maps on 4 masks of shapes-test" in printed
    for stage in STAGES:
        lines = (folder / stage / "log.jsonl").read_text().split("\n")[:-1]
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
        flags = json.loads((folder / stage / "args.json").read_text())["flags"]
        assert flags["hidden"] == 64 and "captioner_plan" not in flags
    (report,) = (folder / "caption").glob("captions-*.json")
    report = json.loads(report.read_text())
    assert len(report["captions"]) == 4 and 0 <= report["scores"]["next"] <= 1
    (ladder,) = (folder / "caption").glob("maps-*.json")
    ladder = json.loads(ladder.read_text())
    assert ladder["photos"] == 4 and 0.9 < ladder["auc"]["mask"] <= 1
    assert len(ladder["auc"]) == 8 and 0 < ladder["auc"]["captioner"] < 1
    assert len(list((folder / "caption" / "vis").glob("*.png"))) == 4
    assert Image.open(folder / "gallery.png").size == (5 * 160, 4 * 160)  # photo, 3 maps, truth


def test_control_belongs_to_the_default_stages_on_every_set():
    """Else 80 epochs would be compared with 120."""
    parse = sdg_sod.build_parser().parse_args
    assert sdg_sod.stages_to_train(parse("--data DUTS-TR".split())) == list(STAGES)
    assert sdg_sod.stages_to_train(parse("--stage control".split())) == ["control"]
    assert sdg_sod.stages_to_train(parse("--sod a --captioner b".split())) == ["control", "guide"]
    assert sdg_sod.PAPER["stage_control"] == sdg_sod.PAPER["stage_guide"]
    assert sdg_sod.SHAPES["stage_control"] == sdg_sod.SHAPES["stage_guide"]


def test_guidance_starts_from_the_other_stages_and_keeps_the_captioner(base):
    folder, _ = base
    sod, caption, guide = (last(folder, stage)["model"] for stage in ("sod", "caption", "guide"))
    assert all(torch.equal(guide[f"captioner.{key}"], value) for key, value in caption.items())
    own = {key for key in guide if key.startswith("guidance.")}
    assert set(guide) == {*sod, *(f"captioner.{key}" for key in caption), *own, "mean_map"}
    assert any(guide[key].abs().sum() > 0 for key in own)
    assert not torch.equal(guide["decoder.predict.weight"], sod["decoder.predict.weight"])


def test_evaluation_alone_gives_the_same_numbers(base, flags, tmp_path):
    folder, _ = base
    results = json.loads((folder / "guide" / "eval.json").read_text())
    main(
        "--weights", folder / "guide" / "last.pt", *flags[2:4], "--device", "cpu", "--out", tmp_path
    )
    again = json.loads((tmp_path / "guide" / "eval.json").read_text())
    (name,) = again
    assert again[name] == results[name]


def test_predictions_have_the_photo_s_size_and_words_can_be_drawn(base, tmp_path, capsys):
    folder, _ = base
    write_photo(tmp_path / "photos" / "wide.jpg", 90, 50)
    write_photo(tmp_path / "photos" / "tall.jpg", 33, 71)
    options = "--cutout --words --device cpu".split()
    main("--predict", tmp_path / "photos", "--out", folder, *options)
    made = Image.open(folder / "predict" / "wide.png")
    cutout = Image.open(folder / "predict" / "wide_cutout.png")
    assert made.size == (90, 50) and made.mode == "L" and cutout.mode == "RGBA"
    words = words_of(capsys.readouterr().out, "wide")
    drawn = Image.open(folder / "predict" / "wide_words.png")
    assert drawn.size == (160 * (2 + len(words)), 176)  # photo, map, every word
    for stage, made in (("sod", "tall.png"), ("caption", "tall_words.png")):
        photo = tmp_path / "photos" / "tall.jpg"
        weights = folder / stage / "last.pt"
        out = tmp_path / stage
        main("--predict", photo, "--weights", weights, "--out", out, "--crf", "--device", "cpu")
        assert [path.name for path in (out / "predict").glob("*.png")] == [made]
    assert Image.open(tmp_path / "sod" / "predict" / "tall.png").size == (33, 71)


def test_every_stage_is_explained(base, tmp_path):
    """Panels of 256 x 256, with a title and a margin 260 x 280, in rows of three or four."""
    folder, _ = base
    photo = write_photo(tmp_path / "photo.png", 64, 64)
    _, _, captioner = loaded(folder / "caption" / "last.pt")
    image = to_tensor(Image.open(photo))[None] / 255
    words = len(sdg_sod.explain_words(captioner, image))
    panels = {"sod": 6, "control": 6, "guide": 12 + words, "caption": 1 + words}
    for stage, count in panels.items():
        columns = min(4 if stage in ("guide", "caption") else 3, count)
        weights = ["--weights", folder / stage / "last.pt", "--device", "cpu"]
        main(*weights, "--explain", photo, "--out", tmp_path / stage)
        picture = Image.open(tmp_path / stage / "explain" / "photo.png")
        assert picture.size == (columns * 260, -(-count // columns) * 280), stage
        sentence = refused(*weights, "--explain", tmp_path / "no.jpg", "--out", tmp_path)
        assert "no.jpg" in sentence

    guide = ["--weights", folder / "guide" / "last.pt", "--explain", photo, "--out", tmp_path]
    main(*guide, "--test-maps", "mean", "--device", "cpu")
    assert Image.open(tmp_path / "explain" / "photo.png").size == (4 * 260, 3 * 280)
    sentence = refused(*guide, "--test-maps", "mask")
    assert "a photo alone has no map of the kind mask" in sentence


def test_the_explained_maps_are_those_of_the_network(base):
    folder, _ = base
    args, _, net = loaded(folder / "guide" / "last.pt")
    image = torch.rand(1, 3, 64, 64)
    torch.nn.init.normal_(net.guidance.xi["1"].weight)
    pictures = dict(sdg_sod.explain_saliency(net, image[0], image, "own"))
    guided = sdg_sod.saliency_logit(net, image, "off").sigmoid()[0]
    assert torch.equal(pictures["S with guidance"], guided)
    net.guidance = None
    plain = sdg_sod.saliency_logit(net, image, "off").sigmoid()[0]
    assert torch.equal(pictures["S without guidance"], plain)
    assert not torch.allclose(plain, guided)


def test_a_network_is_a_function_of_photos(base, tmp_path):
    """Its numbers are those that --predict writes; a captioner alone makes no maps."""
    folder, _ = base
    photo = write_photo(tmp_path / "photo.png", 50, 30)
    weights = folder / "guide" / "last.pt"
    main("--predict", photo, "--weights", weights, "--out", tmp_path, "--device", "cpu")
    made = np.asarray(Image.open(tmp_path / "predict" / "photo.png"))
    assert np.array_equal(sdg_sod.load(weights, "cpu")(Image.open(photo)), made)
    with pytest.raises(runtime.UserError, match="is of stage caption, which makes no"):
        sdg_sod.load(folder / "caption" / "last.pt", "cpu")


@pytest.mark.parametrize("stage", ["caption", "guide"])
def test_a_broken_photo_is_named_when_the_others_are_described(base, tmp_path, stage):
    folder, _ = base
    write_photo(tmp_path / "photos" / "good.jpg")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no picture")
    weights = folder / stage / "last.pt"
    out = ["--out", tmp_path / "out"]
    sentence = refused("--predict", tmp_path / "photos", "--weights", weights, "--words", *out)
    assert "1 photo(s) could not be read" in sentence and "broken.jpg" in sentence
    made = {path.name for path in (tmp_path / "out" / "predict").glob("*.png")}
    assert made == {"good_words.png"} | ({"good.png"} if stage == "guide" else set())


def test_each_stage_is_judged_by_the_sets_that_can_judge_it(base, flags, tmp_path, capsys):
    """One set has captions alone, the other masks alone; a dry run does two steps of all."""
    folder, _ = base
    lines = []
    for stem in ("one", "two"):
        write_photo(tmp_path / "Flickr8k" / f"{stem}.jpg")
        lines += [f"{stem}.jpg#0\tA red {thing} .\n" for thing in ("star", "ring")]
    (tmp_path / "Flickr8k" / "Flickr8k.token.txt").write_text("".join(lines))
    write_photo(tmp_path / "masked" / "images" / "three.jpg")
    (tmp_path / "masked" / "masks").mkdir()
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 20:30] = 255
    Image.fromarray(mask).save(tmp_path / "masked" / "masks" / "three.png")

    root = ["--data-root", tmp_path]
    sets = ["--eval", "Flickr8k", tmp_path / "masked", *root]
    run = tmp_path / "run"
    main(*flags[:2], *flags[4:], *sets, *"--dry-run --batch-size 2 --out".split(), run)
    progress = capsys.readouterr().err
    assert all(f"{stage} epoch {epoch}: 2 in" in progress for stage in STAGES for epoch in (1, 2))
    results = json.loads((run / "guide" / "eval.json").read_text())
    assert list(results) == ["masked-sod", "masked-control", "masked-guide"]
    assert Image.open(run / "gallery.png").size == (5 * 160, 160)
    (report,) = (run / "caption").glob("captions-*.json")
    report = json.loads(report.read_text())
    assert list(report["captions"]) == ["one", "two"] and "said" in report["scores"]
    assert [path.name for path in (run / "caption").glob("maps-*")] == ["maps-masked.json"]
    weights = ["--weights", folder / "sod" / "last.pt", "--out", tmp_path]
    sentence = refused(*weights, "--eval", "Flickr8k", *root)
    assert "stage sod is judged by masks, which these sets lack" in sentence


def test_duts_is_evaluated_on_the_captions_of_coco_too(monkeypatch):
    monkeypatch.setattr(common_flags, "present", lambda names, root: names)
    args = sdg_sod.complete(sdg_sod.build_parser().parse_args(["--data", "DUTS-TR"]))
    assert args.eval == ["DUTS-TE", "ECSSD", "DUT-OMRON", "HKU-IS", "PASCAL-S", "COCO-captions-val"]
    assert (args.beam, args.scales) == (5, [1, 2, 3, 4])


def test_words_and_beam_can_be_chosen_at_prediction(base, tmp_path, monkeypatch, capsys):
    folder, _ = base
    photo = write_photo(tmp_path / "photo.jpg")
    count = len(last(folder, "caption")["args"]["captioner_plan"]["lexicon"])
    (tmp_path / "v.vocab").write_text("\n".join(f"word{i}\t0" for i in range(count)))
    beams, attend = [], sdg_sod.Captioner.attend

    def spy(self, image):
        beams.append(self.beam)
        return attend(self, image)

    monkeypatch.setattr(sdg_sod.Captioner, "attend", spy)
    for stage in ("caption", "guide"):
        weights = folder / stage / "last.pt"
        predict = ["--weights", weights, "--predict", photo, "--words", "--out", tmp_path / stage]
        capsys.readouterr()
        main(*predict, *"--device cpu --beam 3 --vocabulary".split(), tmp_path / "v.vocab")
        words = words_of(capsys.readouterr().out, "photo")
        assert words and all(word.startswith("word") for word in words)
        main(*predict, "--device", "cpu")
        times = {"caption": 1, "guide": 2}[stage]  # the map, and the map with words
        assert beams == [3] * times + [2] * times
        beams.clear()


def virtex(path: Path, words: int) -> None:
    """A small untrained captioner in a file of VirTex's form."""
    torch.manual_seed(0)
    encoder = backbone("resnet50", "none")
    net = sdg_sod.Captioner(encoder, captions.numbers(words), 64, plain=True)
    names = {ours: theirs for theirs, ours in published.VIRTEX.items()}
    state = {}
    for key, value in net.state_dict().items():
        ours = next(name for name in names if key.startswith(name))
        state[names[ours] + key.removeprefix(ours)] = value
    path.parent.mkdir()
    torch.save({"model": state, "iteration": 1}, path)


def test_virtex_s_checkpoint_describes_photos_in_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    virtex(tmp_path / "downloads" / "virtex.pth", 12)
    write_photo(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    predict = "--weights downloads/virtex.pth --predict photo.jpg --device cpu --beam 1".split()
    pieces = ["<unk>", "[SOS]", "[EOS]", *(f"\u2581p{i}" for i in range(9))]
    Path("v.vocab").write_text("\n".join(pieces), encoding="utf-8")
    said = []
    for extra in ([], ["--vocabulary", "v.vocab"]):
        main(*predict, *extra)
        said.append(words_of(capsys.readouterr().out, "photo"))
    assert said[0] and all(word.isdigit() for word in said[0])
    assert said[1] == [f"p{int(word) - 3}" for word in said[0]]
    made = [path.name for path in Path("runs/sdg_sod-released/predict").glob("*.png")]
    assert made == ["photo_words.png"] and not Path("downloads/predict").exists()


# ---- Maps that guide -----------------------------------------------------------------------------
def test_a_mirrored_photo_takes_its_map_mirrored(base, flags, tmp_path, quick, monkeypatch):
    """Every image that stage guide is trained on comes with its own photo's map, both mirrored."""
    folder, _ = base
    shown, forward = [], sdg_sod.SDGSOD.forward

    def spy(self, image, m=None):
        if self.training:
            shown.append((image, m))
        return forward(self, image, m)

    monkeypatch.setattr(sdg_sod.SDGSOD, "forward", spy)
    main(*flags, *given(folder), *"--stage guide --crop 0 --watch 0 --out".split(), tmp_path)
    args, _, net = loaded(tmp_path / "guide" / "last.pt")
    bank = Bank(open_set(args.data), 64, torch.device("cpu"))
    maps = sdg_sod.own_maps(net.captioner, bank, settled(args, tmp_path))
    assert torch.equal(net.mean_map, maps.mean(0, keepdim=True))
    mirrored = 0
    for image, m in zip(*(torch.cat(parts) for parts in zip(*shown))):
        index = torch.arange(8)
        straight = (bank.images(index) - image).abs().amax((1, 2, 3)) < 1e-4
        flipped = (bank.images(index).flip(3) - image).abs().amax((1, 2, 3)) < 1e-4
        mirrored += int(flipped.sum())
        (i,) = (straight | flipped).nonzero()
        own = maps[i].flip(3) if flipped[i] else maps[i]
        own = F.interpolate(own, (16, 16), mode="bilinear", align_corners=False)
        assert torch.allclose(m, own[0], atol=1e-5)
    assert 0 < mirrored < 16


def test_kinds_of_maps(base, flags, tmp_path):
    """Own, another photo's, their mean, a Gaussian, the mask at 7 x 7."""
    folder, _ = base
    args, _, net = loaded(folder / "guide" / "last.pt")
    settings = settled(args, tmp_path)
    bank = Bank(open_set(args.data), 64, torch.device("cpu"), parts=("image", "mask"))
    made = {kind: sdg_sod.make_maps(kind, net.captioner, bank, settings) for kind in sdg_sod.MAPS}
    assert all(m.shape == (8, 1, 7, 7) for m in made.values())
    own = made["own"]
    everyone = torch.arange(8)
    assert torch.allclose(own, net.captioner.guidance(bank.images(everyone)), atol=1e-5)
    of = others(8, runtime.generator("cpu", 0, "other maps"))
    assert (of != everyone).all() and torch.equal(made["other"], own[of])
    assert torch.equal(made["mean"], own.mean(0, keepdim=True).expand(8, -1, -1, -1))
    assert torch.allclose(made["mask"], mask_map(bank.masks(everyone)))
    assert made["centre"][5, 0, 3, 3] == 1 and made["centre"].std(0).max() == 0


def test_maps_at_test_are_of_the_kind_asked_for(base, flags, tmp_path, monkeypatch):
    """Each photo of the set is scored with the map made for it."""
    folder, _ = base
    seen, forward = [], sdg_sod.SDGSOD.forward

    def spy(self, image, m=None):
        seen.append((image, m))
        return forward(self, image, m)

    monkeypatch.setattr(sdg_sod.SDGSOD, "forward", spy)
    bank = Bank(open_set(flags[3]), 64, torch.device("cpu"), parts=("image", "mask"))
    evaluate = ["--weights", folder / "guide" / "last.pt", *flags[2:4], "--device", "cpu"]
    for kind in ("mask", "mean"):
        seen.clear()
        main(*evaluate, "--test-maps", kind, "--batch-size", 3, "--out", tmp_path)
        (name,) = json.loads((tmp_path / "guide" / "eval.json").read_text())
        assert name.endswith(f"-guide-{kind}")
        assert torch.allclose(torch.cat([image for image, _ in seen]), bank.images(torch.arange(4)))
        maps = torch.cat([m.expand(len(image), 1, 7, 7) for image, m in seen])
        if kind == "mask":
            assert torch.allclose(maps, mask_map(bank.masks(torch.arange(4))))
        else:
            assert torch.equal(maps[:1], last(folder, "guide")["model"]["mean_map"])
    photo = write_photo(tmp_path / "photo.jpg")
    sentence = refused(*evaluate, "--predict", photo, "--test-maps", "mask", "--out", tmp_path)
    assert "a photo alone has no map of the kind mask" in sentence


def test_networks_are_tested_with_the_constant_or_the_oracle_of_training():
    kinds = {kind: sdg_sod.usual_test_maps(kind) for kind in sdg_sod.MAPS}
    assert kinds == {
        "own": "own",
        "other": "own",
        "mean": "mean",
        "centre": "mean",
        "mask": "mask",
    }


def test_two_processes_fill_one_bank(base, tmp_path):
    """Each describes its share; the shares are put back in order."""
    folder, _ = base
    args, _, net = loaded(folder / "guide" / "last.pt")
    settings = settled(args, tmp_path)
    bank = Bank(open_set(args.data), 64, torch.device("cpu"))
    whole = sdg_sod.own_maps(net.captioner, bank, settings)

    class Half(runtime.World):
        def gather(self, value):
            halves.append(value)
            return halves if len(halves) == 2 else [value, torch.zeros_like(value)]

    halves = []
    for rank in (0, 1):
        half = dataclasses.replace(settings, world=Half(rank, 2))
        both = sdg_sod.own_maps(net.captioner, bank, half)
    assert torch.allclose(both, whole, atol=1e-5)


# ---- Every flag does something -------------------------------------------------------------------
CHANGES = {
    "sod": "--bce coded | --released | --crop 0 | --seed 1 | --lr 1e-4 | --decoder literal | "
    "--decoder psp | --width 8 | --amp bf16 | --encoder mit_b0 --encoder-weights none",
    "caption": "--hidden 128 | --layers 2 | --pixels unit | --lr 1e-4 | --backbone-weights none | "
    "--seed 1 | --no-freeze | --taps 1 | --plain-grid | --captions ECHO",
    "guide": "--scales 1 | --attn-norm max | --attn-norm mean | --attn-norm l1 | --attn-row read | "
    "--maps other | --maps mean | --maps centre | --maps mask | --live | "
    "--released",
}


@pytest.mark.parametrize("stage", CHANGES)
def test_every_flag_changes_the_result(stage, base, flags, tmp_path, quick):
    """One epoch, of two steps, tells; the flags of the base run are repeated first."""
    folder, _ = base
    other = tmp_path / "other.txt"
    other.write_text("\n".join(Shapes("train").names[8:16]))
    flags = [*flags, *given(folder), "--epochs", 1, "--stage", stage]
    main(*flags, "--out", tmp_path / "same")
    unchanged = []
    for i, extra in enumerate(CHANGES[stage].split(" | ")):
        out = tmp_path / str(i)
        main(*flags, "--out", out, *extra.replace("ECHO", f"shapes@{other}").split())
        if same(last(tmp_path / "same", stage), last(out, stage)):
            unchanged.append(extra)
    assert not unchanged


def test_the_beam_changes_the_guidance(base, flags, tmp_path, quick):
    """Of a captioner whose words are not sure: the small run's captions are two words long."""
    folder, _ = base
    saved = last(folder, "caption")
    torch.manual_seed(0)
    for key, value in saved["model"].items():
        if key.startswith(("forwards.", "words.", "positions.")):
            torch.nn.init.normal_(value, std=0.3)
    runtime.save_checkpoint(tmp_path / "unsure.pt", **saved)
    files = f"--sod {folder}/sod/last.pt --captioner {tmp_path}/unsure.pt".split()
    for beam in ("1", "2"):
        main(
            *flags,
            *files,
            *"--epochs 1 --stage guide --beam".split(),
            beam,
            "--out",
            tmp_path / beam,
        )
    assert not same(last(tmp_path / "1", "guide"), last(tmp_path / "2", "guide"))


def test_stage_sod_can_start_from_a_checkpoint(base, flags, tmp_path, quick, monkeypatch):
    folder, _ = base
    starts = []
    monkeypatch.setattr(
        sdg_sod, "train_saliency", lambda stage, net, *_, **__: starts.append(net.state_dict())
    )
    first = folder / "sod" / "last.pt"
    main(*flags, "--stage", "sod", "--out", tmp_path, "--init", first)
    assert same({"model": starts[0]}, {"model": last(folder, "sod")["model"]})


# ---- Interruption, processes ---------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_equals_the_whole_bit_for_bit(
    stage, base, flags, tmp_path, quick, monkeypatch
):
    """Killed after its first epoch and resumed with another random state, also given the files of
    the other stages; the whole run is the base, where all stages follow each other."""
    folder, _ = base
    flags = [*flags, *given(folder), "--stage", stage, "--out", tmp_path]
    epochs = Run.epochs

    def interrupted(self):
        yield next(epochs(self))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "epochs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(*flags)
    assert last(tmp_path, stage)["epoch"] == 1
    torch.rand(7)
    main(*flags, "--resume")
    assert last(tmp_path, stage)["epoch"] == 2
    assert same(last(folder, stage), last(tmp_path, stage))


DRIVER = """
import hashlib, sys
sys.path.insert(0, ".")
import sdg_sod

def check(net, settings, stage):
    state = b"".join(value.numpy().tobytes() for value in net.state_dict().values())
    assert len(set(settings.world.gather(hashlib.sha256(state).hexdigest()))) == 1, stage
    sys.stdout.write(f"{settings.world.size} processes agree on {stage}\\n")  # print writes twice

def saliency(stage, net, settings, *rest, **options):
    train_saliency(stage, net, settings, *rest, **options)
    check(net, settings, stage)

def captioner(net, settings, *rest):
    train_captioner(net, settings, *rest)
    check(net, settings, "caption")

train_saliency, sdg_sod.train_saliency = sdg_sod.train_saliency, saliency
train_captioner, sdg_sod.train_captioner = sdg_sod.train_captioner, captioner

def main():
    at = sys.argv.index("THEN")
    sdg_sod.main(sys.argv[1:at])
    sdg_sod.Block.drop_path = lambda self, x: x
    sdg_sod.main(sys.argv[at + 1:])

sdg_sod.runtime.cli(main)  # leaves the group, without which a process may abort at its end
"""
PLAIN = (
    "--epochs 1 --decoder literal --crop 0 --captioner"  # no statistics of half a batch, no chance
)


@pytest.fixture(scope="module")
def two(base, flags, tmp_path_factory):
    """Two processes: a default run, one without BatchNorm and chance, and what they printed."""
    folder, _ = base
    made = tmp_path_factory.mktemp("two")
    (made / "driver.py").write_text(DRIVER)
    plain = [*flags, *PLAIN.split(), folder / "caption" / "last.pt", "--out", made / "plain"]
    default = [*flags, "--epochs", 1, "--out", made / "run"]
    words = [*TWO_PROCESSES, made / "driver.py", *default, "THEN", *plain]
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return made, done.stdout


def test_two_processes_train_one_network(base, two):
    """Their gradients and statistics are averaged, their captions and scores gathered."""
    folder, _ = base
    made, printed = two
    agreed = {stage: printed.count(f"2 processes agree on {stage}\n") for stage in STAGES}
    assert agreed == {"sod": 4, "caption": 2, "control": 4, "guide": 4}  # the last three ran twice
    runs = [json.loads((run / "guide" / "eval.json").read_text()) for run in (folder, made / "run")]
    assert runs[0].keys() == runs[1].keys() and all(row["n"] == 4 for row in runs[1].values())
    (report,) = (made / "run" / "caption").glob("captions-*.json")
    report = json.loads(report.read_text())
    assert len(report["captions"]) == 4 and 0 <= report["scores"]["next"] <= 1
    ladders = []
    for run in (folder, made / "run"):
        (path,) = (run / "caption").glob("maps-*.json")
        ladders.append(json.loads(path.read_text()))
    assert ladders[0]["photos"] == ladders[1]["photos"] == 4
    assert ladders[0]["auc"]["mask"] == pytest.approx(ladders[1]["auc"]["mask"])


@torch.no_grad()
def test_two_processes_equal_one_without_batchnorm_and_chance(
    base, two, flags, tmp_path, quick, monkeypatch
):
    """No statistics of half a batch, no crops and no dropped paths: the same maps."""
    folder, _ = base
    with monkeypatch.context() as patch, torch.enable_grad():
        patch.setattr(sdg_sod.Block, "drop_path", lambda self, x: x)
        main(*flags, *PLAIN.split(), folder / "caption" / "last.pt", "--out", tmp_path)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits = {}
    for number, run in ((1, tmp_path), (2, two[0] / "plain")):
        for stage in ("sod", "control", "guide"):
            logits[stage, number] = loaded(run / stage / "last.pt")[2].eval()(image)
    for stage, other in (("sod", "control"), ("control", "sod"), ("guide", "sod")):
        assert torch.allclose(logits[stage, 1], logits[stage, 2], atol=1e-5), stage
        assert not torch.allclose(logits[stage, 1], logits[other, 1], atol=1e-3)


# ---- Bad input -----------------------------------------------------------------------------------
def test_a_problem_is_one_line_on_the_terminal(monkeypatch):
    words = "sdg_sod.py --data DUTSTR --stage sod --device cpu".split()
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "sdg_sod.py"), run_name="__main__")
    sentence = ended.value.code
    assert sentence.startswith("error: ") and "DUTS-TR" in sentence and "\n" not in sentence


def test_guide_before_the_other_stages_prints_the_command(flags, tmp_path):
    sentence = refused(*flags, "--stage", "guide", "--out", tmp_path)
    assert f"there is no {tmp_path}/sod/last.pt; make it: python sdg_sod.py --stage sod" in sentence
    assert f"--out {tmp_path}" in sentence


def test_sets_without_masks_or_captions_are_refused(flags, tmp_path):
    write_photo(tmp_path / "images" / "photo.jpg")
    rest = (
        "--encoder mit_b0 --encoder-weights none --backbone tiny --eval shapes-test --out".split()
    )
    rest = [*flags[4:], *rest, tmp_path / "run"]
    assert "have no mask" in refused("--data", tmp_path, "--stage", "sod", *rest)
    both = ["--data", tmp_path, "--captions", tmp_path]
    sentence = "not every picture has a caption"
    assert sentence in refused(*both, "--stage", "caption", *rest)


@pytest.fixture
def untrained(monkeypatch):
    """Whatever begins to train fails."""
    for name in ("train_saliency", "train_captioner"):
        monkeypatch.setattr(sdg_sod, name, lambda *_: pytest.fail("trained first"))


def test_what_stage_caption_would_refuse_is_refused_before_stage_sod(flags, tmp_path, untrained):
    write_photo(tmp_path / "images" / "photo.jpg")
    out = ["--out", tmp_path / "run"]
    sentence = refused(*flags, "--captions", tmp_path, *out)
    assert "not every picture has a caption" in sentence
    sentence = refused(*flags, "--vocabulary", "a.vocab", *out)
    assert "--vocabulary is for VirTex's captioner" in sentence
    assert not (tmp_path / "run").exists()


def test_the_caption_stage_writes_no_saliency_scores(base):
    assert not (base[0] / "caption" / "eval.json").exists()
    assert (base[0] / "guide" / "curves.svg").exists()


def test_a_captioner_brings_along_which_row_is_a_word_s_map(base, tmp_path):
    saved = last(base[0], "caption")
    saved["args"]["attn_row"] = "read"
    torch.save(saved, tmp_path / "last.pt")
    for more, row in (([], "read"), (["--attn-row", "predict"], "predict")):
        assert loaded(tmp_path / "last.pt", *more)[2].row == row


@pytest.mark.parametrize(
    "content",
    [
        {0: torch.ones(1)},
        {"model": [1]},
        {"method": "sdg_sod"},
        {"model": {"words.weight": torch.ones(1)}},
        {"model": {"words.weight": torch.ones(4, 32)}},
    ],
)
def test_odd_files_are_no_captioner(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    assert "x.pt" in refused("--weights", tmp_path / "x.pt", "--eval", "shapes-test")


@pytest.mark.parametrize("stage", ["caption", "guide"])
def test_a_checkpoint_without_a_sound_plan_is_refused(base, tmp_path, stage):
    saved = last(base[0], stage)
    plan = saved["args"]["captioner_plan"]
    for broken, sentence in (
        (None, "it lacks the plan of its captioner"),
        (plan | {"lexicon": [1, 2]}, "it lacks the plan of its captioner"),
        ({"lexicon": ["a"], "hidden": 64}, "it lacks layers, taps, plain_grid"),
        (plan | {"backbone": "resnet"}, "damaged checkpoint: --backbone cannot be 'resnet'"),
        (plan | {"hidden": 100}, "damaged checkpoint: --hidden cannot be 100"),
    ):
        saved["args"]["captioner_plan"] = broken
        torch.save(saved, tmp_path / "last.pt")
        assert sentence in refused("--weights", tmp_path / "last.pt", "--eval", "shapes-test")


# fmt: off
FLAGS_THAT_CANNOT_BE = {
    "--size 31": "--size 31 leaves nothing",
    "--crop 1": "--crop 1.0 is not a share",
    "--encoder mit_b3": "--encoder-weights: give a file with the weights of mit_b3",
    "--encoder-weights nowhere.pth": "--encoder-weights: there is no file nowhere.pth",
    "--encoder-weights nowhere.safetensors": "--encoder-weights: cannot read nowhere.safetensors",
    "--init nowhere.pt": "--init: there is no file nowhere.pt",
    "--decoder ann --scales 1": "--decoder ann sees scales 3 and 4 alone",
    "--decoder psp --batch-size 1": "--decoder psp normalises over a batch",
    "--decoder apc --batch-size 1": "--decoder apc normalises over a batch",
    "--decoder aspp --batch-size 1": "it needs at least two in each process's share",
    "--decoder ann --batch-size 1 --size 32": "--decoder ann normalises over a batch",
    "--live --maps other": "leave out --maps",
    "--live --test-maps mean": "leave out --maps and --test-maps mean",
    "--lr 1e30": "loss of epoch 1 is not a number",
}
# fmt: on


@pytest.mark.parametrize("extra", FLAGS_THAT_CANNOT_BE)
def test_flags_that_cannot_be(flags, tmp_path, extra):
    sentence = refused(*flags, "--stage", "sod", "--out", tmp_path, *extra.split())
    assert FLAGS_THAT_CANNOT_BE[extra] in sentence


# fmt: off
FILES_THAT_CANNOT_BE = {
    "--captioner nowhere.pt": "--captioner: there is no file nowhere.pt",
    "--captioner SOD": "stage sod, not of sdg_sod stage caption",
    "--sod nowhere.pt": "--sod: there is no file nowhere.pt",
    "--sod SOD --width 8": "was trained with --width 16: give the same flags",
    "--sod SOD --encoder mit_b0 --decoder psp":
        "was trained with --encoder mit_tiny, --decoder mlp: give the same flags",
    "--sod NAN": "--sod: nan.pt is damaged: decoder.predict.weight holds values that are not",
    "--hidden 100": "--hidden 100 is not a multiple of 64",
    "--backbone-weights nowhere.pth": "--backbone-weights nowhere.pth: no such file",
}
# fmt: on


@pytest.mark.parametrize("extra", FILES_THAT_CANNOT_BE)
def test_files_of_later_stages_are_checked_before_the_first(
    base, flags, tmp_path, untrained, monkeypatch, extra
):
    folder, _ = base
    saved = last(folder, "sod")
    saved["model"]["decoder.predict.weight"][0] = float("nan")
    torch.save(saved, tmp_path / "nan.pt")
    monkeypatch.chdir(tmp_path)
    words = extra.replace("SOD", f"{folder}/sod/last.pt").replace("NAN", "nan.pt")
    sentence = refused(*flags, "--out", tmp_path / "run", *words.split())
    assert FILES_THAT_CANNOT_BE[extra] in sentence


@pytest.mark.parametrize("decoder", ["psp", "apc", "aspp", "ann"])
def test_a_batch_of_one_works_where_it_is_not_refused(decoder, flags, tmp_path, quick):
    """Two photos in each batch always do; one does for ann with more than one cell."""
    batch, size = (1, 64) if decoder == "ann" else (2, 32)
    more = f"--decoder {decoder} --batch-size {batch} --size {size} --epochs 1 --dry-run".split()
    main(*flags, "--stage", "sod", "--out", tmp_path, *more)
    assert last(tmp_path, "sod")["epoch"] == 1


@pytest.mark.parametrize("stage", ["sod", "control"])
def test_words_need_a_captioner(base, tmp_path, stage):
    weights = base[0] / stage / "last.pt"
    photo = write_photo(tmp_path / "photo.jpg")
    sentence = refused("--weights", weights, "--predict", photo, "--words")
    assert f"is of stage {stage}, which knows no words" in sentence


def test_other_checkpoints_are_refused(base, flags, tmp_path):
    folder, _ = base
    sod = folder / "sod" / "last.pt"
    files = ["--sod", sod, "--captioner", sod, "--out", tmp_path]
    sentence = refused(*flags, "--stage", "guide", *files)
    assert "is a checkpoint of sdg_sod stage sod, not of sdg_sod stage caption" in sentence
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pt")
    assert "holds neither a captioner" in refused("--weights", tmp_path / "x.pt", *flags)
    again = [*flags, "--stage", "sod", "--out", folder]
    sentence = refused(*again, *"--resume --crop 0.2".split())
    assert "was trained with --crop 0.125" in sentence
    sentence = refused(*again, *"--resume --epochs 4 --lr 0.002".split())
    assert "was trained with --epochs 2, --lr 0.001: give" in sentence
    assert "holds a run with --crop 0.125" in refused(*again, "--crop", "0.2")


@pytest.mark.parametrize("stage", ["caption", "guide"])
def test_another_vocabulary_is_refused_in_a_short_sentence(base, flags, tmp_path, stage):
    """The captions of a set, or the file of a captioner, have changed under the same name."""
    folder, _ = base
    files = given(folder)
    other = last(folder, stage)
    other["args"]["captioner_plan"]["lexicon"].append("zebra")
    other["args"] |= {"sod": files[1], "captioner": files[3]}
    runtime.save_checkpoint(tmp_path / stage / "last.pt", **other)
    sentence = refused(*flags, *files, "--stage", stage, "--out", tmp_path, "--resume")
    assert "was trained with another captioner plan" in sentence
    assert "zebra" not in sentence and len(sentence) < 300


def test_a_resumed_run_is_guided_by_the_captioner_of_its_checkpoint(
    base, flags, tmp_path, quick, monkeypatch
):
    """Also if the file of --captioner holds another one by now."""
    folder, _ = base
    files = given(folder)
    saved = last(folder, "guide")
    for key in saved["model"]:
        if key.startswith("captioner.projection."):
            saved["model"][key] = torch.full_like(saved["model"][key], 0.25)
    saved["args"] |= {"sod": files[1], "captioner": files[3], "epochs": 3}
    runtime.save_checkpoint(tmp_path / "guide" / "last.pt", **saved)
    seen, own_maps = [], sdg_sod.own_maps

    def spy(captioner, *rest):
        seen.append(captioner.projection.weight.unique().tolist())
        return own_maps(captioner, *rest)

    monkeypatch.setattr(sdg_sod, "own_maps", spy)
    more = ["--epochs", 3, "--stage", "guide", "--out", tmp_path, "--resume"]
    main(*flags, *files, *more)
    assert seen == [[0.25]]

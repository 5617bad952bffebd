"""The caption vote rule by rule, the choices on the disk, and the tiny panoptic set."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.bank import Bank
from common.datasets import open_set
from common.runtime import UserError
from data import panoptic_shapes, relabel
from data.panoptic import Panoptic, Segment, decode_ids
from data.relabel import (
    Choices,
    count_votes,
    judge,
    mean_saliency,
    mentioned,
    plural,
    read_words,
    score,
    verdict_on_image,
)

ROOT = Path(__file__).parent.parent
THINGS = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush""".replace("\n", " ").split(", ")
STUFF = ["flower", "fruit", "food-other-merged", "banner", "tent"]  # of 53: what may be salient
OTHER_STUFF = ["sky-other-merged", "grass-merged", "sea", "road", "table-merged"]


class Coco:
    """What `read_words` asks of a panoptic set: COCO's categories."""

    categories = dict(
        enumerate(
            [(name, True) for name in THINGS] + [(name, False) for name in STUFF + OTHER_STUFF]
        )
    )


WORDS = read_words(Coco)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A data root with the tiny set, never written to."""
    root = tmp_path_factory.mktemp("drawn")
    panoptic_shapes.main([str(root), "--count", "24"])
    return root


@pytest.fixture
def root(drawn, tmp_path) -> Path:
    """A copy to be labelled."""
    shutil.copytree(drawn, tmp_path / "data")
    return tmp_path / "data"


def open_split(root: Path, split: str = "train2017") -> Panoptic:
    return Panoptic(root / "COCO", split)


def mask_of(root: Path, name: str, split: str = "train2017") -> np.ndarray | None:
    path = root / "COCO/sod/masks" / split / f"{name}.png"
    return np.asarray(Image.open(path)) if path.exists() else None


def error(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Rules 1 and 2: what captions mention --------------------------------------------------------
def test_plurals():
    assert [
        plural(word) for word in ("dog", "bench", "bus", "box", "puppy", "boy", "stop sign")
    ] == ["dogs", "benches", "buses", "boxes", "puppies", "boys", "stop signs"]


@pytest.mark.parametrize(
    "caption, categories",
    [
        ("A man riding a horse.", "person, horse"),
        ("Two MEN, three women & a child's puppies", "person, dog"),
        ("a jet above people", "airplane, person"),
        ("The sofa; a television", "couch, tv"),
        ("a hot dog on a plate", "hot dog"),
        ("two hot dogs for a dog", "hot dog, dog"),
        ("a teddy bear beside a bear", "teddy bear, bear"),
        ("a baby elephant", "elephant"),
        ("train tracks and flower pots", ""),
        ("mickey mouse ears", ""),
        ("a train at the train station", "train"),
        ("people at a train station", "person"),
        ("a skier on a ski slope", "person"),
        ("skis on a snowy hill", "skis"),
        ("a baseball player swings a bat", "person, baseball bat"),
        ("a baseball", "sports ball"),
        ("an orange cat", "cat"),
        ("a bowl of oranges", "bowl, orange"),
        ("a man with glasses", "person"),
        ("two wine glasses", "wine glass"),
        ("a glass", "cup, wine glass"),
        ("a bag", "backpack, handbag, suitcase"),
        ("a couple of dogs", "dog"),
        ("a couple with a dog", "person, dog"),
        ("knives, mice and geese", "knife, mouse, bird"),
        ("a coffee table", ""),
        ("a bouquet under a blue sky on the grass", "flower"),
        ("a category", ""),
        ("", ""),
    ],
)
def test_words(caption, categories):
    assert mentioned(caption, WORDS) == set(filter(None, categories.split(", ")))


def test_every_thing_of_coco_has_its_name_and_a_plural():
    assert len(THINGS) == 80
    for name in THINGS:
        assert name == "orange" or mentioned(f"a {name} here", WORDS) == {name}
        assert name in mentioned(f"some {plural(name)} here", WORDS), name
    lines = relabel.WORDS.read_text().splitlines()
    listed = {line.partition(": ")[0] for line in lines if not line.startswith("#")}
    assert listed - {"-", *THINGS} == set(STUFF)
    assert set().union(*WORDS.values()) == {*THINGS, *STUFF}  # no other stuff, nothing misspelt
    assert not any(set(phrase) - set("abcdefghijklmnopqrstuvwxyz -") for phrase in WORDS)


def test_a_caption_votes_once():
    votes = count_votes(["a dog and a dog", "dogs", "a cat"], WORDS)
    assert votes == Counter({"dog": 2, "cat": 1})


# ---- Rules 3 to 6: what is chosen ----------------------------------------------------------------
SIZE = (100, 200)  # 20,000 pixels


def segment(
    number: int,
    category: str = "dog",
    area: int = 2000,
    box=(80, 30, 40, 40),
    thing: bool = True,
    crowd: bool = False,
) -> Segment:
    return Segment(number, category, thing, crowd, area, box)


def verdicts(*segments: Segment, agreement=None, **votes: int) -> list[str]:
    return judge(list(segments), Counter(votes), SIZE, agreement)


def test_rule_1_two_captions():
    assert verdicts(segment(1), dog=2) == ["chosen"]
    assert verdicts(segment(1), dog=1) == verdicts(segment(1)) == ["not mentioned"]


def test_rule_2_stuff():
    tent, sky = (segment(1, name, thing=False) for name in ("tent", "sky-other-merged"))
    votes = count_votes(["a tent below the sky"] * 5, WORDS)
    assert judge([tent, sky], votes, SIZE) == ["chosen", "not mentioned"]


def test_rule_3_crowds_small_ones_and_relatives():
    assert verdicts(segment(1, crowd=True), segment(2), dog=5) == ["crowd", "chosen"]
    assert verdicts(segment(1, area=99), dog=5) == ["small"]
    assert verdicts(segment(1, area=100), dog=5) == ["chosen"]  # 0.5 % of the image
    # the largest counts among what is left: a crowd does not make others small
    herd = segment(1, area=4000), segment(2, area=799), segment(3, area=800)
    assert verdicts(*herd, dog=5)[1] == "small for its kind"
    assert verdicts(*herd, dog=5)[2] != "small for its kind"
    crowd = segment(1, area=15000, crowd=True)
    assert verdicts(crowd, segment(2, area=800), dog=5) == ["crowd", "chosen"]


def test_rule_3_a_table_with_something_on_it():
    table = segment(1, "dining table", 9000, (0, 20, 100, 80))
    votes = {"dining table": 5, "cat": 5}
    on, beside = (segment(2, "cat", 4000, (left, 10, 30, 60)) for left in (40, 140))
    assert judge([table, on], Counter(votes), SIZE) == ["carries others", "chosen"]
    assert judge([table, beside], Counter(votes), SIZE) == ["chosen", "chosen"]
    assert judge([table, on], Counter(votes | {"cat": 1}), SIZE) == ["chosen", "not mentioned"]


def test_rule_4_saliency_maps():
    two = segment(1), segment(2)
    assert verdicts(*two, agreement=[0.5, 0.51], dog=5) == ["map disagrees", "chosen"]


def test_rule_5_score_by_hand():
    # centre (100, 50): no distance; 3 votes, a tenth of the image
    assert score(segment(1), 3, SIZE) == pytest.approx(3 * 0.1**0.5)
    # centre (150, 75): a quarter of the image off in x and in y is half of the half diagonal
    assert score(segment(1, box=(140, 65, 20, 20)), 3, SIZE) == pytest.approx(3 * 0.1**0.5 * 0.75)
    assert score(segment(1, box=(0, 0, 0, 0)), 1, SIZE) == pytest.approx(0.1**0.5 * 0.5)


def test_rule_5_counts_distances_in_sides_of_the_image():
    """SIZE is 100 high and 200 wide: the middles of all four borders are equally far."""
    tenth = 3 * 0.1**0.5
    middle_of_a_border = 1 - 0.5 / 0.5**0.5 / 2  # a corner is at 1, so it is at 0.70711
    for box in ((0, 50, 0, 0), (200, 50, 0, 0), (100, 0, 0, 0), (100, 100, 0, 0)):
        assert score(segment(1, box=box), 3, SIZE) == pytest.approx(tenth * middle_of_a_border)
    assert tenth * middle_of_a_border == pytest.approx(0.61327, abs=1e-5)
    # (140, 20) is 0.2 of the width and 0.3 of the height off: sqrt(0.13) / sqrt(0.5) = 0.50990
    found = score(segment(1, box=(130, 10, 20, 20)), 3, SIZE)
    assert found == pytest.approx(tenth * (1 - 0.50990 / 2), rel=1e-5)


def test_rule_5_a_third_of_the_best():
    best = segment(1, area=9000)
    assert verdicts(best, segment(2, "cat", 1001), dog=4, cat=4) == ["chosen", "chosen"]
    assert verdicts(best, segment(2, "cat", 999), dog=4, cat=4) == ["chosen", "low score"]
    assert verdicts(best, segment(2, "cat", 1001), dog=5, cat=4) == ["chosen", "low score"]
    far = segment(2, "cat", 1001, (0, 0, 20, 20))
    assert verdicts(best, far, dog=4, cat=4) == ["chosen", "low score"]


def test_rule_6_the_image():
    inner, half = (80, 30, 40, 40), 10_000
    assert verdict_on_image([], SIZE) == "nothing chosen"
    assert verdict_on_image([segment(1, area=199)], SIZE) == "too small"
    assert verdict_on_image([segment(1, area=200)], SIZE) == "kept"
    assert verdict_on_image([segment(1, area=half, box=inner)] * 2, SIZE) == "too large"
    assert verdict_on_image([segment(1, area=14_000)], SIZE) == "kept"
    assert verdict_on_image([segment(1, area=14_001)], SIZE) == "too large"
    three = segment(1, area=half, box=(0, 0, 200, 60))  # left, top, right
    assert verdict_on_image([three], SIZE) == "kept"
    both = [three, segment(2, box=(80, 60, 40, 40))]  # and, by another segment, the bottom
    assert verdict_on_image(both, SIZE) == "touches all borders"


def test_mean_saliency_by_hand(root):
    scenes = open_split(root)
    labels, maps = scenes.labels(0), root / "maps"
    grey = (labels * 20).astype(np.uint8)  # segment k has grey 20 k
    grey[labels == 1] = 0
    grey[np.unravel_index(np.flatnonzero(labels == 1)[::2], labels.shape)] = 255
    maps.mkdir()
    Image.fromarray(grey).save(maps / f"{scenes.names[0]}.png")
    means = mean_saliency(scenes, 0, maps)
    assert means[0] == pytest.approx(0.5, abs=0.001)
    assert means[1:] == pytest.approx([20 * k / 255 for k in range(2, len(means) + 1)])
    Image.fromarray(grey[:-1]).save(maps / f"{scenes.names[0]}.png")
    assert "--predict" in error(mean_saliency, scenes, 0, maps)


# ---- The tiny set --------------------------------------------------------------------------------
def test_the_tiny_set_has_cocos_form(drawn):
    folder = drawn / "COCO/annotations"
    content = json.loads((folder / "panoptic_train2017.json").read_text())
    assert {"info", "licenses", "images", "annotations", "categories"} <= content.keys()
    assert all(
        c.keys() == {"supercategory", "color", "isthing", "id", "name"}
        for c in content["categories"]
    )
    kinds = Counter()
    sizes = {(image["width"], image["height"]) for image in content["images"]}
    assert {(320, 240), (240, 320)} <= sizes
    for image, annotation in zip(content["images"], content["annotations"]):
        assert image["file_name"] == f"{image['id']:012d}.jpg"
        assert annotation.keys() == {"segments_info", "file_name", "image_id"}
        ids = decode_ids(
            np.asarray(Image.open(folder / "panoptic_train2017" / annotation["file_name"]))
        )
        assert ids.shape == (image["height"], image["width"])
        photo = Image.open(drawn / "COCO/train2017" / image["file_name"])
        assert photo.format == "JPEG" and photo.size == (image["width"], image["height"])
        for info in annotation["segments_info"]:
            assert info.keys() == {"id", "category_id", "iscrowd", "bbox", "area"}
            rows, columns = np.nonzero(ids == info["id"])
            assert info["area"] == len(rows)
            assert info["bbox"] == [
                columns.min(),
                rows.min(),
                np.ptp(columns) + 1,
                np.ptp(rows) + 1,
            ]
            kinds["crowd" if info["iscrowd"] else "other"] += 1
        kinds["void"] += (ids == 0).any()
    assert kinds["void"] == 24 and kinds["crowd"] > 3
    captions = json.loads((folder / "captions_train2017.json").read_text())["annotations"]
    assert Counter(c["image_id"] for c in captions) == {i["id"]: 5 for i in content["images"]}


def test_the_tiny_set_depends_on_its_seed_alone(drawn, tmp_path):
    panoptic_shapes.main([str(tmp_path / "a"), "--count", "2"])
    panoptic_shapes.main([str(tmp_path / "b"), "--count", "2", "--seed", "1"])
    name = "COCO/annotations/panoptic_train2017/000000000002.png"
    assert (tmp_path / "a" / name).read_bytes() == (drawn / name).read_bytes()
    assert (tmp_path / "b" / name).read_bytes() != (drawn / name).read_bytes()


# ---- The vote ------------------------------------------------------------------------------------
def test_vote_finds_the_known_salient_objects(root):
    for split in ("train2017", "val2017"):
        relabel.main(["--data-root", str(root), "--split", split, "--auto"])
        scenes = open_split(root, split)
        choices = Choices(scenes)
        known = json.loads((root / f"COCO/annotations/salient_{split}.json").read_text())
        chosen = {(name, id) for name, choice in choices.made.items() for id in choice["chosen"]}
        right = {(name, id) for name, ids in known.items() for id in ids}
        assert len(chosen & right) / len(chosen) >= 0.95
        assert len(chosen & right) / len(right) >= 0.95
        for i, name in enumerate(scenes.names):  # pixels
            wanted = scenes.mask(i, known[name])
            got = mask_of(root, name, split)
            assert ((got > 0) != (wanted > 0)).mean() < 0.1
        log = (root / f"COCO/sod/vote-{split}.jsonl").read_text().splitlines()
        records = {record["name"]: record for record in map(json.loads, log)}
        reasons = Counter(s["verdict"] for r in records.values() for s in r["segments"])
        assert {"chosen", "not mentioned", "crowd", "small"} <= reasons.keys()
        for name, choice in choices.made.items():
            assert choice["chosen"] == sorted(
                s["id"] for s in records[name]["segments"] if s["verdict"] == "chosen"
            )
        assert Image.open(root / f"COCO/sod/vote-{split}.png").width == 6 * 160


def test_a_vote_replaces_old_votes_but_nothing_done_by_hand(root, capsys):
    flags = ["--data-root", str(root), "--auto"]
    relabel.main(flags)
    assert "recall" in capsys.readouterr().out
    choices = Choices(open_split(root))
    first, second, third = choices.scenes.names[:3]
    other = [s.id for s in choices.scenes.segments(0)][-1:]
    choices.save(0, other)
    choices.save(1, [], skipped=True)
    path = root / "COCO/annotations/captions_train2017.json"
    captions = json.loads(path.read_text())
    for annotation in captions["annotations"]:
        if f"{annotation['image_id']:012d}" == third:
            annotation["caption"] = "nothing to see"
    path.write_text(json.dumps(captions))
    relabel.main(flags)
    assert "21 kept, 2 done by hand, 1 nothing chosen" in capsys.readouterr().out
    again = Choices(open_split(root))
    assert again.made[first] == {"chosen": other, "skipped": False, "by": "hand"}
    assert again.made[second]["skipped"] and mask_of(root, second) is None
    assert third not in again.made and mask_of(root, third) is None


def test_vote_without_captions_is_refused(root):
    (root / "COCO/annotations/captions_train2017.json").unlink()
    assert "captions_train2017.json" in error(relabel.main, ["--data-root", str(root), "--auto"])


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"000000000001": 3}', "[" * 100_000])
def test_a_broken_list_of_known_objects_is_named_before_the_vote(root, content):
    path = root / "COCO/annotations/salient_train2017.json"
    path.write_text(content)
    assert f"{path} does not list" in error(relabel.main, ["--data-root", str(root), "--auto"])
    assert not list((root / "COCO/sod").rglob("*.json"))
    path.unlink()
    relabel.main(["--data-root", str(root), "--auto"])


def test_a_closed_pipe_does_not_stop_the_vote(root):
    process = subprocess.Popen(
        [sys.executable, "-m", "data.relabel", "--data-root", str(root), "--auto"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()  # as `| head -0` would
    assert "Error" not in process.stderr.read() and process.wait() == 0
    assert len(list((root / "COCO/sod/masks/train2017").glob("*.png"))) == 24
    assert (root / "COCO/sod/vote-train2017.png").exists()


def test_the_vote_says_what_it_is_not_for(capsys):
    with pytest.raises(SystemExit):
        relabel.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "captions confound" in shown and "future work" in shown


def test_vote_with_maps_and_lists(root, capsys):
    scenes = open_split(root)
    maps = root / "maps"
    maps.mkdir()
    for i, name in enumerate(scenes.names[:4]):  # the maps disagree with two images
        Image.fromarray(np.full(scenes.size(i), 255 * (i < 2), np.uint8)).save(maps / f"{name}.png")
    (root / "four.txt").write_text("\n".join(scenes.names[:4]))
    relabel.main(
        ["--data-root", str(root), "--auto", "--agree", str(maps), "--only", str(root / "four.txt")]
    )
    shown = capsys.readouterr().out
    assert "images: 2 kept, 2 nothing chosen" in shown and "map disagrees" in shown
    assert sorted(Choices(scenes).made) == scenes.names[:2]


# ---- Choices -------------------------------------------------------------------------------------
def test_choices_are_json_and_mask(root):
    choices = Choices(open_split(root))
    name, ids = choices.scenes.names[3], [s.id for s in choices.scenes.segments(3)][:2]
    assert choices.counts() == {"hand": 0, "vote": 0, "skipped": 0, "count": 24}
    choices.save(3, ids[::-1] + ids[:1])
    stored = json.loads((root / f"COCO/sod/choices/train2017/{name}.json").read_text())
    assert stored == {"chosen": sorted(ids), "skipped": False, "by": "hand"}
    mask = mask_of(root, name)
    areas = {s.id: s.area for s in choices.scenes.segments(3)}
    assert set(np.unique(mask)) == {0, 255} and (mask == 255).sum() == sum(areas[i] for i in ids)
    assert mask.shape == choices.scenes.size(3)
    again = Choices(open_split(root))
    assert again.made == choices.made and again.start == 3 and again.counts()["hand"] == 1
    again.save(3, ids, skipped=True)  # what is chosen is not skipped
    assert again.counts()["hand"] == 1 and again.counts()["skipped"] == 0
    again.save(3, [])  # cleared: as if it had never been made
    assert mask_of(root, name) is None and not Choices(open_split(root)).made
    with pytest.raises(ValueError):
        choices.save(3, [123])
    assert not list((root / "COCO/sod").rglob("*.part"))


def test_masks_follow_the_choices(root):
    choices = Choices(open_split(root))
    names = choices.scenes.names
    ids = [[s.id for s in choices.scenes.segments(i)] for i in range(3)]
    for i in range(3):
        choices.save(i, ids[i][:1])
    (root / f"COCO/sod/masks/train2017/{names[0]}.png").unlink()  # lost
    before = mask_of(root, names[1])
    for i, text in (
        (1, {"chosen": ids[1][1:2], "skipped": False, "by": "hand"}),  # edited by hand
        (2, {"chosen": [], "skipped": True, "by": "hand"}),
    ):
        path = root / f"COCO/sod/choices/train2017/{names[i]}.json"
        path.write_text(json.dumps(text))
        os.utime(path, (2e9 + i, 2e9 + i))
    again = Choices(open_split(root))
    assert (mask_of(root, names[0]) == again.scenes.mask(0, ids[0][:1])).all()
    assert (mask_of(root, names[1]) == again.scenes.mask(1, ids[1][1:2])).all()
    assert (mask_of(root, names[1]) != before).any()
    assert mask_of(root, names[2]) is None
    assert again.start == 2 and again.undone(2) == 3 and again.undone(23) == 3


def test_malformed_choices_are_named(root):
    scenes = open_split(root)
    path = root / f"COCO/sod/choices/train2017/{scenes.names[0]}.json"
    path.parent.mkdir(parents=True)
    good = {"chosen": [scenes.segments(0)[0].id], "skipped": False, "by": "hand"}
    for text in (
        "",
        "{",
        "[]",
        "{}",
        json.dumps(good | {"chosen": [1]}),
        "[" * 100_000,
        json.dumps(good | {"chosen": None}),
        json.dumps(good | {"by": "nobody"}),
        json.dumps(good | {"skipped": 1}),
    ):
        path.write_text(text)
        assert f"{scenes.names[0]}.json is not a choice" in error(Choices, scenes)
    path.write_text('{"chosen": [], "skipped": true}')
    assert "('by' is missing)" in error(Choices, scenes)
    path.write_text(json.dumps(good))
    (path.parent / "stranger.json").write_text("{}")  # of an image that is not in this list
    assert Choices(scenes).counts()["hand"] == 1


# ---- Training on the result ----------------------------------------------------------------------
def test_coco_sod_opens_what_is_labelled(root):
    assert "data/README.md" in error(open_set, "COCO-SOD", root)
    scenes = open_split(root)
    relabel.main(["--data-root", str(root), "--auto"])
    relabel.main(["--data-root", str(root), "--split", "val2017", "--auto"])
    choices = Choices(scenes)
    choices.save(5, [], skipped=True)
    dataset = open_set("COCO-SOD", root)
    assert dataset.names == [name for i, name in enumerate(scenes.names) if i != 5]
    for i in (0, 5, 22):
        sample = dataset[i]
        wanted = choices.scenes.mask(
            scenes.names.index(sample["name"]), choices.made[sample["name"]]["chosen"]
        )
        assert torch.equal(sample["mask"][0], torch.from_numpy(wanted))
        assert len(sample["caption"]) == 5
    assert len(open_set("COCO-SOD-val", root)) == 6
    assert len(open_set("COCO-captions", root)) == 24  # the masks are no photos
    bank = Bank(dataset, 64, torch.device("cpu"), parts=("image", "mask"))
    share = bank.masks(torch.arange(23)).mean((1, 2, 3))
    assert bank.has["mask"].all() and 0.01 < share.min() and share.max() < 0.7


def test_from_the_command_line(tmp_path):
    lost = subprocess.run(
        [sys.executable, "-m", "data.relabel", "--data-root", str(tmp_path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert (lost.returncode, lost.stdout) == (1, "") and lost.stderr.count("\n") == 1
    assert "panoptic_train2017.json" in lost.stderr

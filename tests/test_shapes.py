"""The built-in data set: reproducible, and every statement of a sample true of its pixels."""

import itertools
import re

import numpy as np
import pytest
import torch

from common.runtime import UserError
from data.shapes import (
    CLASSES,
    COLOURS,
    MARGIN,
    MODALITIES,
    RGB,
    TOP_CLASSES,
    VIEWS,
    Shapes,
    coverage,
    outline,
    phrase,
    write_captions,
)

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
THING = (
    rf"(?:{'|'.join(NUMBERS)}) (?:{'|'.join(COLOURS)}) "
    rf"(?:{'|'.join(CLASSES + TOP_CLASSES)})(?:e?s)?"
)


def same(one: dict, two: dict) -> bool:
    """Are two samples equal, key by key?"""
    return all(
        torch.equal(one[k], two[k]) if isinstance(one[k], torch.Tensor) else one[k] == two[k]
        for k in one
    )


def grown(mask: np.ndarray, steps: int) -> np.ndarray:
    """A mask [H, W] grown by `steps` pixels in the four directions."""
    for _ in range(steps):
        wide = np.pad(mask, 1)
        mask = mask | wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]
    return mask


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("modality", (None, *MODALITIES))
def test_a_scene_is_the_same_in_any_order_and_any_instance(view, modality):
    data, again = Shapes("train", modality, view), Shapes("train", modality, view, count=9)
    forward = [data[i] for i in range(6)]
    np.random.seed(1), torch.manual_seed(1)  # global generators play no part
    for i in (5, 0, 3, 2, 4, 1):
        assert same(again[i], forward[i])


def test_modality_does_not_change_the_scene():
    plain = Shapes("test")[7]
    assert plain["modality"] is None
    for modality in MODALITIES:
        sample = Shapes("test", modality)[7]
        assert sample["modality"].shape == (3, 160, 160) and sample["modality"].dtype == torch.uint8
        assert same({**sample, "modality": None}, plain)


def test_splits_views_and_seeds_differ():
    worlds = [Shapes("train"), Shapes("test"), Shapes("train", view="top"), Shapes("train", seed=1)]
    pictures = [sample["image"] for data in worlds for sample in (data[0], data[1])]
    for one, two in itertools.combinations(pictures, 2):
        assert (one.float() - two.float()).abs().mean() > 5


def test_length_names_iteration_and_sample_format():
    assert (len(Shapes("train")), len(Shapes("test")), len(Shapes(count=3))) == (480, 120, 3)
    data = Shapes("test", "flow", count=3)
    assert data.names[2] == "shapes-test-00002"
    assert Shapes("train", view="top").names[12] == "shapes-top-train-00012"
    assert data.left_out == [] and data.bytes(2) == 0  # what a set of files would tell
    samples = list(data)  # stops by itself
    assert [sample["name"] for sample in samples] == data.names
    for sample in samples:
        for key, channels in (("image", 3), ("mask", 1), ("modality", 3)):
            assert sample[key].shape == (channels, 160, 160) and sample[key].dtype == torch.uint8
            assert sample[key].is_contiguous()
        assert set(sample["mask"].unique().tolist()) == {0, 255}
        assert sample["size"] == (160, 160)
        assert len(sample["caption"]) == len(set(sample["caption"])) == 5
    for beyond in (3, -1):
        with pytest.raises(IndexError, match="3 scenes"):
            data[beyond]


@pytest.mark.parametrize(
    "bad", ({"split": "val"}, {"view": "front"}, {"modality": "sound"}, {"size": 8})
)
def test_a_wrong_argument_is_one_sentence(bad):
    ((what, value),) = bad.items()
    with pytest.raises(UserError, match=f"{what}.*{value}"):
        Shapes(**bad)


@pytest.mark.parametrize("name", CLASSES + TOP_CLASSES)
def test_outlines_have_unit_area_when_drawn(name):
    points = outline(name)
    np.testing.assert_allclose(points.min(0), -points.max(0), atol=1e-9)
    drawn = coverage([points * 0.3 + 0.5], 160).mean()  # area 0.09 of the picture
    assert drawn == pytest.approx(0.09, rel=0.03)


def test_coverage_is_anti_aliased_to_the_hand_computed_share():
    square = np.array([(2.55, 2.05), (5.95, 2.05), (5.95, 5.2), (2.55, 5.2)]) / 8
    found = coverage([square], 8)
    expected = np.zeros((8, 8))  # quarters: 10..23 across, 8..20 down
    expected[2:5, 3:6], expected[2:5, 2], expected[5, 3:6], expected[5, 2] = 1, 0.5, 0.25, 0.125
    np.testing.assert_allclose(found, expected, atol=2 / 255)


@pytest.mark.parametrize("view", VIEWS)
def test_mask_labels_and_boxes_follow_from_the_objects(view):
    data = Shapes("train", view=view, count=40)
    assert data.classes == (CLASSES if view == "side" else TOP_CLASSES)
    counts = set()
    for i in range(len(data)):
        objects, mask = data.objects(i), data[i]["mask"][0].numpy()
        assert (sum(one["mask"].astype(int) for one in objects) * 255 == mask).all()  # and disjoint
        present = {one["class"] for one in objects}
        assert data.labels(i).tolist() == [name in present for name in data.classes]
        for one in objects:
            left, top, right, bottom = one["box"]
            assert one["mask"].sum() == one["mask"][top:bottom, left:right].sum()
            inside = one["mask"][top:bottom, left:right]
            assert inside[[0, -1]].any(1).all() and inside[:, [0, -1]].any(0).all()  # a tight box
            y, x = np.nonzero(one["mask"])
            centre = (x.mean() + 0.5) / 160, (y.mean() + 0.5) / 160
            assert one["centre"] == pytest.approx(centre, abs=1e-4)
            low, high = (0.025, 0.26) if view == "side" else (0.003, 0.03)
            assert low < one["mask"].mean() < high
        counts.add(len(objects))
    assert counts == set(range(1, 4 if view == "side" else 7))


def test_every_class_and_colour_occurs_evenly():
    data = Shapes("train")
    total = sum(data.labels(i) for i in range(len(data)))
    assert total.min() > 60 and total.max() < 140  # 480 scenes, 1.7 objects, 8 classes
    colours = [one["colour"] for i in range(80) for one in Shapes("train", size=32).objects(i)]
    assert set(colours) == set(COLOURS)


@pytest.mark.parametrize("view", VIEWS)
def test_painted_colour_is_the_named_one(view):
    """Of all colours that have a name, the named one is the nearest to what was painted."""
    data, hits = Shapes("test", view=view, count=60), []
    for i in range(len(data)):
        image = data[i]["image"].numpy()
        for one in data.objects(i):
            mean = image[:, one["mask"]].mean(1)
            if view == "top":  # undo the muting
                mean = (mean - 45) / 0.65
            gap = {name: np.linalg.norm(mean - value) for name, value in RGB.items()}
            hits.append(min(gap, key=gap.get) == one["colour"])
    assert np.mean(hits) > 0.9  # light and shade mislead now and then


def relation_holds(one: dict, word: str, two: dict) -> bool:
    """The definition of the head of shapes.py, from the masks alone."""
    (ya, xa), (yb, xb) = (np.argwhere(o["mask"]).mean(0) / len(o["mask"]) for o in (one, two))
    along, across = {
        "left of": (xb - xa, yb - ya),
        "right of": (xa - xb, ya - yb),
        "above": (yb - ya, xb - xa),
        "below": (ya - yb, xa - xb),
    }[word]
    return along > MARGIN - 1e-6 and along > abs(across) - 1e-6


@pytest.mark.parametrize("view", VIEWS)
def test_captions_are_true(view):
    data, words = Shapes("train", view=view, count=60), set()
    for i in range(len(data)):
        objects = data.objects(i)
        for caption in data[i]["caption"]:
            relation = re.fullmatch(rf"({THING}) (left of|right of|above|below) ({THING})", caption)
            if relation:
                a, word, b = relation.groups()
                pairs = itertools.permutations(objects, 2)
                assert any(
                    phrase(p["colour"], p["class"]) == a
                    and relation_holds(p, word, q)
                    and phrase(q["colour"], q["class"]) == b
                    for p, q in pairs
                ), caption
                words.add(word)
                continue
            told = {}  # every object, in the right number
            for thing in re.findall(THING, caption):
                number, colour, kind = thing.split()
                kind = next(name for name in data.classes if kind.startswith(name))  # singular
                told[colour, kind] = told.get((colour, kind), 0) + NUMBERS[number]
            seen = [(one["colour"], one["class"]) for one in objects]
            assert told == {pair: seen.count(pair) for pair in seen}, caption
    assert words == {"left of", "right of", "above", "below"}


def test_relations_need_the_margin_and_a_clear_axis():
    def relations(dx: float, dy: float) -> set[str]:
        objects = [
            {"colour": "red", "class": "star", "centre": (0.5 + dx, 0.5 + dy)},
            {"colour": "blue", "class": "ring", "centre": (0.5, 0.5)},
        ]
        captions = write_captions(np.random.default_rng(0), "striped", objects)
        assert len(captions) == len(set(captions)) == 5
        return {
            word
            for word in ("left of", "right of", "above", "below")
            for caption in captions
            if caption == f"a red star {word} a blue ring"
        }

    assert relations(-0.13, 0.05) == {"left of"} and relations(0.2, -0.19) == {"right of"}
    assert relations(0.05, -0.13) == {"above"} and relations(-0.19, 0.2) == {"below"}
    assert relations(-0.11, 0.11) == relations(0, 0) == set()


def test_background_word_is_told_first():
    for view, pattern in (
        ("side", r" on a \w+ background$"),
        ("top", r" on (farmland|the sea|an airfield)$"),
    ):
        data = Shapes("train", view=view, count=20)
        grounds = {re.search(pattern, data[i]["caption"][0]).group() for i in range(20)}
        assert len(grounds) > 2


def test_phrases():
    assert phrase("orange", "ring") == "an orange ring"
    assert phrase("blue", "cross", 2) == "two blue crosses"
    assert phrase("white", "plane", 3) == "three white planes"


@pytest.mark.parametrize("view", VIEWS)
def test_depth_and_thermal_are_brighter_inside_each_object_than_around_it(view):
    for modality in ("depth", "thermal"):
        data, gains = Shapes("test", modality, view, count=20), []
        for i in range(len(data)):
            sample = data[i]
            picture, mask = sample["modality"].numpy().astype(float), sample["mask"][0].numpy() > 0
            assert (picture == picture[0]).all()  # three equal channels
            for one in data.objects(i):
                around = grown(one["mask"], 9) & ~grown(mask, 2)
                gains.append(np.median(picture[0][one["mask"]]) - np.median(picture[0][around]))
        assert min(gains) > 0 and np.median(gains) > 30


def test_depth_has_holes_and_a_slope():
    samples = Shapes("test", "depth", count=20)
    pictures = torch.stack([sample["modality"][0].float() for sample in samples])
    assert 0.003 < (pictures == 0).float().mean() < 0.05
    assert pictures[:, -30:].mean() > pictures[:, :30].mean() + 20  # the ground comes nearer


@pytest.mark.parametrize("view", VIEWS)
def test_flow_differs_inside_each_object_from_around_it(view):
    data, gaps = Shapes("test", "flow", view, count=30), []
    for i in range(len(data)):
        sample = data[i]
        picture, mask = sample["modality"].numpy().astype(float), sample["mask"][0].numpy() > 0
        assert (picture.max(0) > 240).mean() > 0.95  # hue and saturation say everything
        for one in data.objects(i):
            around = grown(one["mask"], 9) & ~grown(mask, 2)
            gaps.append(
                np.linalg.norm(
                    np.median(picture[:, one["mask"]], 1) - np.median(picture[:, around], 1)
                )
            )
    assert min(gaps) > 20 and np.median(gaps) > 60


@pytest.mark.parametrize("size", (32, 97, 256))
def test_other_sizes_show_the_same_scene(size):
    for view in VIEWS:
        small, usual = Shapes("test", "thermal", view, size=size), Shapes("test", "thermal", view)
        for i in range(4):
            one, two = small[i], usual[i]
            assert one["image"].shape == one["modality"].shape == (3, size, size)
            assert one["caption"][0] == two["caption"][0]
            assert torch.equal(small.labels(i), usual.labels(i))
            share = (one["mask"] > 0).float().mean().item()
            assert share == pytest.approx((two["mask"] > 0).float().mean().item(), rel=6 / size)


def test_frozen_scenes():
    """Mean colour and mask area of a few scenes, with room for other versions of Pillow."""
    frozen = {
        ("train", "side", 0): ([90.0, 110.5, 99.2], 3518),
        ("train", "side", 100): ([62.1, 59.7, 57.9], 1111),
        ("test", "side", 5): ([66.8, 96.8, 55.1], 2187),
        ("train", "top", 3): ([120.4, 118.1, 90.7], 783),
        ("test", "top", 8): ([119.1, 120.3, 110.6], 1310),
    }
    for (split, view, i), (colour, area) in frozen.items():
        sample = Shapes(split, view=view)[i]
        assert sample["image"].float().mean((1, 2)).tolist() == pytest.approx(colour, abs=1.5)
        assert (sample["mask"] > 0).sum().item() == pytest.approx(area, rel=0.02)


def test_a_colour_threshold_does_not_solve_it():
    """Otsu's threshold on the distance to the border's mean colour: mean F on the test split."""
    scores = []
    for sample in Shapes("test", count=60):
        image, mask = sample["image"].numpy().astype(float), sample["mask"][0].numpy() > 0
        frame = np.ones_like(mask)
        frame[8:-8, 8:-8] = False
        distance = np.linalg.norm(image - image[:, frame].mean(1)[:, None, None], axis=0)
        count, edges = np.histogram(distance, 256)
        level = (edges[1:] + edges[:-1]) / 2
        below, total = count.cumsum(), (count * level).cumsum()
        spread = (total[-1] * below - total * below[-1]) ** 2 / (below * (below[-1] - below) + 1e-9)
        found = distance > level[spread[:-1].argmax()]
        hit = (found & mask).sum()
        scores.append(1.3 * hit / (0.3 * mask.sum() + found.sum()))
    assert 0.4 < np.mean(scores) < 0.7

"""Metrics against hand-computed numbers, brute force, and frozen values of PySODMetrics 1.6.2."""

import csv
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import load_map
from common.metrics import (
    NAMES,
    Metrics,
    count,
    evaluate_folders,
    find_images,
    main,
    score_files,
    table,
    to_uint8,
)
from common.runtime import UserError
from common.weighted_f import column_gap, far_search, weighted_f

# MAE F_mean F_adp F_max E_mean E_adp E_max S wF IoU of the pairs that `pair` makes
REFERENCE = {
    "wide": (
        0.22223602541628135,
        0.6503189518474461,
        0.8513989637305701,
        0.9164835164835166,
        0.6630485235792754,
        0.8839466382327562,
        0.9590917952300504,
        0.7826980778770618,
        0.5755173521042113,
        0.845841784989858,
    ),
    "tall": (
        0.2242869609402616,
        0.6447104851260174,
        0.8438999747410962,
        0.9088471849865951,
        0.6615293743729951,
        0.882992989147789,
        0.956222424821437,
        0.7765278395366838,
        0.5740447966311902,
        0.8329238329238329,
    ),
    "two": (
        0.230053777100271,
        0.5549090791766949,
        0.8169934640522876,
        0.8195507912200102,
        0.6475884490436477,
        0.9480218157053198,
        0.9480290950778707,
        0.5777827456157573,
        0.4291934530512165,
        0.6906077348066298,
    ),
    "thin": (
        0.2262691326530612,
        0.012338670963272411,
        0.0,
        0.038512996941896034,
        0.5961368597562023,
        0.9617525337689586,
        0.9619586336022526,
        0.4387872661954364,
        0.04592693498038721,
        0.0,
    ),
    "narrow": (
        0.18658854166666666,
        0.7184585841569707,
        0.9399889888052855,
        1.0,
        0.7007286489959141,
        0.9251491510499036,
        1.0005211047420517,
        0.8589694833597654,
        0.6324110685180648,
        1.0,
    ),
    "binary": (
        0.10104166666666667,
        0.8033454778852169,
        0.8052575917812357,
        0.8052575917812357,
        0.9001440670043157,
        0.9026931406938016,
        0.9026931406938016,
        0.7845638074246349,
        0.8179386751701822,
        0.6788079470198676,
    ),
    "noise": (
        0.5055935329861111,
        0.26514347735174937,
        0.05232892466935021,
        0.3157564344005022,
        0.3924518959464319,
        0.2818709755529603,
        0.6406751618683783,
        0.317280614901948,
        0.3124365356883373,
        0.1972062448644207,
    ),
    "soft": (
        0.16567401960784314,
        0.6579305063206029,
        0.7647058823529413,
        0.7702482333756115,
        0.7181236105566711,
        0.8778990512081677,
        0.8786640284611794,
        0.7409020079939259,
        0.631694627911106,
        0.5667244367417678,
    ),
}


def pair(kind):
    """A map (uint8) and a mask (bool) made from whole numbers, the same on every machine."""
    h, w = {"wide": (31, 57), "tall": (64, 23)}.get(kind, (48, 40))
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    noise = (y * 7919 + x * 104729 + y * x * 31) % 97
    gt = (y - h // 2) ** 2 * 4 + (x - w // 3) ** 2 * 9 < (h * w) // 2
    if kind == "two":
        gt = ((y - 10) ** 2 + (x - 9) ** 2 < 40) | ((y - 35) ** 2 + (x - 30) ** 2 < 60)
    if kind == "thin":
        gt = (x + 2 * y) % 40 == 11
    maps = {
        "narrow": 60 + gt * 40 + noise // 4,
        "binary": (gt.roll(3, 1) | (noise == 5)) * 255,
        "noise": noise * 2 + 20,
        "soft": 255 - ((y - 20) ** 2 + (x - 16) ** 2).clamp(max=255),
    }
    pred = maps.get(kind, (gt.roll(2, 0) * 150 + noise).clamp(max=255))
    return pred.to(torch.uint8), gt


def score(pred, gt, **options):
    """Scores of one pair, given as tensors or nested lists."""
    metrics = Metrics(**options)
    metrics.add(torch.as_tensor(pred, dtype=torch.uint8), torch.as_tensor(gt, dtype=torch.bool))
    return metrics.scores()


def random_pair(h, w, seed, share=0.3):
    rng = torch.Generator().manual_seed(seed)
    pred = torch.randint(0, 256, (h, w), generator=rng, dtype=torch.uint8)
    return pred, torch.rand(h, w, generator=rng) < share


def assert_close(found, expected, tolerance=1e-9):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=tolerance), name


# ---- Reference values ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", REFERENCE)
def test_values_of_pysodmetrics(kind):
    assert_close(score(*pair(kind)), dict(zip(NAMES, REFERENCE[kind])))


def test_mean_over_a_data_set():
    metrics = Metrics()
    for kind in REFERENCE:
        metrics.add(*pair(kind))
    found, per_image = metrics.scores(), metrics.per_image()
    for i, name in enumerate(NAMES):
        values = [REFERENCE[kind][i] for kind in REFERENCE]
        assert per_image[name].tolist() == pytest.approx(values, abs=1e-9)
        if not name.endswith("_max"):
            assert found[name] == pytest.approx(sum(values) / 8, abs=1e-9)
    # one threshold for all images, not the best of each
    assert found["F_max"] == pytest.approx(metrics.curves()["F"].max().item())
    assert found["F_max"] < per_image["F_max"].mean() - 0.005
    assert found["n"] == 8 and isinstance(found["n"], int)


# ---- By hand -------------------------------------------------------------------------------------
GT = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
PRED = [[255, 255, 0, 0], [255, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 255]]


def test_threshold_scores_by_hand():
    f_all = 1.3 * 0.25 / (0.3 * 0.25 + 1)  # everything positive, at threshold 0
    e = (3 + 11 + 2 * (1 - 0.6) ** 2 / 4) / 15  # a = 1 on the 14 right pixels, else -0.6
    expected = {
        "MAE": 2 / 16,
        "IoU": 3 / 5,
        "F_adp": 0.75,
        "F_max": 0.75,
        "E_adp": e,
        "E_max": e,
        "F_mean": (255 * 0.75 + f_all) / 256,
        "E_mean": (255 * e + 16 / 4 / 15) / 256,
    }
    assert_close(score(PRED, GT), expected, 1e-12)


def test_s_by_hand():
    on_fg = 1.5 / (0.75**2 + 1 + 0.5)  # values 1 1 1 0: mean 3/4, sd 1/2
    on_bg = (22 / 12) / ((11 / 12) ** 2 + 1 + math.sqrt(1 / 12))
    s_object = on_fg / 4 + on_bg * 3 / 4
    # The centre (0.5, 0.5) rounds to 0: blocks of 1, 3, 3, 9 pixels, the first three are perfect,
    # in the last one x = y = c_x = c_y = 1/9 and c = -1/72.
    s_region = (1 + 3 + 3 + 9 * -0.125) / 16
    assert_close(score(PRED, GT), {"S": (s_object + s_region) / 2}, 1e-12)


def test_s_is_never_negative():
    gt = torch.zeros(8, 8, dtype=torch.bool)
    gt[2:6, 2:6] = True
    assert score(~gt * 255, gt)["S"] == 0  # the inverted mask, -.29 without max(0, )


def test_weighted_f_by_hand():
    cost = 2 - 0.5 ** (1 / 5)  # one wrong pixel at distance 1
    precision = 1 / (1 + cost)
    assert_close(score([[255, 255]], [[1, 0]]), {"wF": 2 * precision / (1 + precision)}, 1e-12)


def test_curves_are_counted_at_every_threshold():
    pred, gt = random_pair(20, 30, 3)
    pred[0, 0], pred[0, 1] = 0, 255  # full range, so t = v / 255
    metrics = Metrics()
    metrics.add(pred, gt)
    curves = metrics.curves()
    for i in range(256):
        positive = pred >= 255 - i
        tp = (positive & gt).sum().item()
        precision, recall = tp / positive.sum().item(), tp / gt.sum().item()
        f = 1.3 * precision * recall / (0.3 * precision + recall) if tp else 0
        assert [curves[name][i].item() for name in ("precision", "recall", "F")] == pytest.approx(
            [precision, recall, f], abs=1e-12
        )


def test_level_equal_to_the_adaptive_threshold_is_positive():
    pred = [[255, 85, 0, 0, 0, 0, 0, 0]]  # 2 mean = 2 * 340 / 8 = 85
    found = score(pred, [[1, 1, 0, 0, 0, 0, 0, 0]])
    assert_close(found, {"F_adp": 1.0, "E_adp": 8 / 7})
    # 2 mean = 2 * 11 / 11 = 2; PySODMetrics gives .8125, its 2 * mean(t) being above 2 / 9
    assert_close(score([[9, 2] + [0] * 9], [[1, 1] + [0] * 9]), {"F_adp": 1.0})


def test_adaptive_threshold_is_at_most_one():
    assert_close(score([[255, 255, 255, 0]], [[1, 1, 1, 0]]), {"F_adp": 1.0})


def test_stretch():
    pred, gt = [[51, 102, 102, 51]], [[0, 1, 1, 0]]
    assert_close(score(pred, gt), {"MAE": 0, "S": 1, "wF": 1, "IoU": 1})
    assert_close(score(pred, gt, stretch=False), {"MAE": (0.2 + 0.6 + 0.6 + 0.2) / 4, "IoU": 0})


def test_curve_levels_are_truncated_like_the_reference():
    """Level 2 in 1..86 has 255 t = 3, but PySODMetrics computes 2.99.. and truncates it to 2."""
    metrics = Metrics()
    metrics.add(torch.tensor([[1, 2, 86]], dtype=torch.uint8), torch.tensor([[False, True, False]]))
    assert metrics.curves()["recall"][255 - 3 :].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("value", [7, 14, 30, 200])  # n t / n != t for some of them
def test_constant_map_has_no_variance_in_any_block(value):
    gt = torch.zeros(99, 97, dtype=torch.bool)
    gt[10:30, 10:30] = gt[69:89, 67:87] = True  # the top left block is 50 x 49
    m, area = value / 255, 99 * 97
    share = 800 / area
    s_object = share * 2 * m / (m * m + 1) + (1 - share) * 2 * (1 - m) / ((1 - m) ** 2 + 1)
    s_region = (50 * 48 + 49 * 49) / area  # 1 in the two blocks without foreground
    assert_close(score(torch.full((99, 97), value), gt), {"S": (s_object + s_region) / 2})


def test_empty_and_full_masks():
    pred = torch.tensor([[0, 255, 255, 255]], dtype=torch.uint8)
    empty, full = torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    assert_close(score(pred, empty), {"S": 0.25, "E_adp": 1 / 3, "F_max": 0, "wF": 0, "IoU": 0})
    assert_close(
        score(pred, full), {"S": 0.75, "E_adp": 3 / 3, "F_adp": 1.3 * 0.75 / 1.05, "IoU": 0.75}
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (1, 9), (9, 1), (2, 2), (7, 5)])
@pytest.mark.parametrize("mask", ["empty", "full", "first", "last", "last row", "random"])
@pytest.mark.parametrize("values", ["black", "white", "grey", "random"])
def test_always_finite(shape, mask, values):
    pred, gt = random_pair(*shape, seed=5)
    if values != "random":
        pred.fill_({"black": 0, "white": 255, "grey": 127}[values])
    if mask != "random":
        gt.fill_(mask == "full")
        gt[{"first": (0, 0), "last": (-1, -1), "last row": -1}.get(mask, slice(0, 0))] = True
    found = score(pred, gt)
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert found["E_max"] <= 2 and all(found[k] <= 1 + 1e-12 for k in ("F_max", "S", "wF", "IoU"))


def test_perfect_map_with_an_empty_block():
    assert_close(score([[0, 255]], [[0, 1]]), {"S": 1, "wF": 1, "F_adp": 1, "MAE": 0})


# ---- Brute force ---------------------------------------------------------------------------------
def weighted_f_by_definition(pred, gt):
    """Loops over pixels; t = v / 255."""
    h, w = gt.shape
    fg = [(y, x) for y in range(h) for x in range(w) if gt[y, x]]
    t, g = (pred.double() / 255).tolist(), gt.int().tolist()
    error = {(y, x): abs(t[y][x] - g[y][x]) for y in range(h) for x in range(w)}
    nearest = {
        (y, x): min(fg, key=lambda p: ((p[0] - y) ** 2 + (p[1] - x) ** 2, p[1], p[0]))
        for y, x in error
    }
    weight = {(i, j): math.exp(-(i * i + j * j) / 50) for i in range(-3, 4) for j in range(-3, 4)}
    total = sum(weight.values())
    cost_fg = cost_bg = 0
    for (y, x), e in error.items():
        if gt[y, x]:
            near = [(k, (y + i, x + j)) for (i, j), k in weight.items() if (y + i, x + j) in error]
            cost_fg += min(e, sum(k * error[nearest[p]] for k, p in near) / total)
        else:
            d = math.dist((y, x), nearest[y, x])
            cost_bg += e * (2 - math.exp(math.log(0.5) / 5 * d))
    tp = len(fg) - cost_fg
    recall, precision = tp / len(fg), tp / (tp + cost_bg)
    return 2 * recall * precision / (recall + precision)


@pytest.mark.parametrize(
    "h, w, share",
    [
        (14, 17, 0.4),
        (17, 14, 0.05),
        (23, 21, 0.01),
        (9, 9, 1.0),
        (1, 30, 0.1),
        (30, 1, 0.1),
        (26, 19, 0.15),
    ],
)
def test_weighted_f_by_definition(h, w, share):
    pred, gt = random_pair(h, w, h * w, share)
    gt[h // 2, w // 3] = gt[0, 0] = True  # the rows above the first do not exist
    expected = weighted_f_by_definition(pred, gt)
    assert weighted_f(pred, gt, 0, 255) == pytest.approx(expected, abs=1e-12)


def test_ties_between_nearest_pixels():
    """Symmetric masks: every tie counts. Leftmost first, then topmost."""
    for points in ([(4, 2), (4, 8)], [(2, 5), (8, 5)], [(3, 3), (3, 7), (7, 3), (7, 7)]):
        gt = torch.zeros(11, 11, dtype=torch.bool)
        pred = torch.full((11, 11), 30, dtype=torch.uint8)
        for i, p in enumerate(points):
            gt[p], pred[p] = True, 40 + 50 * i
        expected = weighted_f_by_definition(pred, gt)
        assert weighted_f(pred, gt, 0, 255) == pytest.approx(expected, abs=1e-12)
        mirrored = weighted_f(pred.flip(0, 1), gt.flip(0, 1), 0, 255)
        assert abs(mirrored - expected) > 1e-6


def test_distance_transform_is_exact():
    for seed in range(4):
        gt = random_pair(75, 110, seed, 0.002)[1]
        sites = gt.nonzero()
        y, x = (~gt).nonzero(as_tuple=True)
        expected = (y[:, None] - sites[:, 0]) ** 2 + (x[:, None] - sites[:, 1]) ** 2
        found = far_search(column_gap(gt), y.int(), x.int())
        assert torch.equal(found.long(), expected.amin(1))


# ---- Invariances ---------------------------------------------------------------------------------
def test_flips_and_transposition():
    pred, gt = pair("soft")
    base = score(pred, gt)
    for axes in ((0,), (1,), (0, 1)):
        flipped = score(pred.flip(axes), gt.flip(axes))
        assert_close(flipped, {k: base[k] for k in NAMES if k not in ("S", "wF")}, 1e-12)
    turned = score(pred.T, gt.T)  # blocks change places, ties their winner
    assert_close(turned, {k: base[k] for k in NAMES if k != "wF"}, 1e-12)
    assert turned["wF"] == pytest.approx(base["wF"], abs=1e-3)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ],
)
def test_a_batch_equals_single_images(device):
    pairs = [pair(kind) for kind in ("two", "thin", "narrow", "binary", "noise", "soft")]
    pairs.append((pairs[0][0], torch.zeros_like(pairs[0][1])))
    single, batch = Metrics(), Metrics()
    for pred, gt in pairs:
        single.add(pred, gt)
    batch.add(*(torch.stack(x).to(device) for x in zip(*pairs)))
    for name, values in single.per_image().items():
        assert torch.equal(values, batch.per_image()[name]), name
    assert single.scores() == batch.scores()
    alone = torch.cat([count(pred[None], gt[None]) for pred, gt in pairs])
    for times in (1, 3):  # as on a GPU; 16 and more in int32
        together = count(*(torch.stack(x * times).to(device) for x in zip(*pairs)))
        assert torch.equal(together, alone.repeat(times, 1, 1, 1))


def test_merge_in_any_order_and_across_processes():
    parts = []
    for kind in ("two", "wide", "soft"):
        parts.append(Metrics())
        parts[-1].add(*pair(kind))
    a, b = Metrics(), Metrics()
    for part in parts:
        a.merge(part)
    for part in parts[::-1]:
        b.merge(pickle.loads(pickle.dumps(part)))
    assert_close(a.scores(), b.scores(), 1e-12)
    assert a.per_image()["S"].tolist() == b.per_image()["S"].flip(0).tolist()
    a.merge(Metrics())  # a process may have had no image
    assert a.scores()["n"] == 3
    for other in (Metrics(stretch=False), Metrics(wf=False)):
        with pytest.raises(ValueError, match="options"):
            a.merge(other)


def test_many_images_are_scored_in_parts():
    metrics, one = Metrics(wf=False), Metrics(wf=False)
    pred, gt = pair("two")
    one.add(pred, gt)
    for _ in range(3):
        metrics.add(pred.expand(100, -1, -1), gt.expand(100, -1, -1))
    assert_close(metrics.scores(), {**one.scores(), "n": 300, "wF": None}, 1e-12)


def test_without_weighted_f():
    found = score(*pair("soft"), wf=False)
    assert list(found) == ["n", *NAMES] and found.pop("wF") is None
    assert_close(found, {k: v for k, v in score(*pair("soft")).items() if k != "wF"}, 0)


# ---- Input ---------------------------------------------------------------------------------------
def test_to_uint8_rounds():
    prob = torch.tensor([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 0.999, 1.2])
    assert to_uint8(prob).tolist() == [0, 0, 0, 1, 255, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.5, math.nan]))


def test_wrong_tensors():
    pred, gt = pair("soft")
    for bad in (
        (pred.float(), gt),
        (pred, gt.byte()),
        (pred[1:], gt),
        (pred[:0], gt[:0]),
        (pred[None, None], gt[None, None]),
    ):
        with pytest.raises(ValueError, match="uint8 and bool"):
            Metrics().add(*bad)
    with pytest.raises(ValueError, match="below 16000"):
        weighted_f(torch.zeros(16000, 1, dtype=torch.uint8), torch.ones(16000, 1).bool(), 0, 255)
    with pytest.raises(UserError, match="no pair"):
        Metrics().scores()


def test_titles_with_special_characters():
    scores = {"a&b_50%|c": dict.fromkeys(NAMES, 0.5) | {"n": 7}}
    latex = table(scores, "latex").split("\n")
    assert r" F\_mean " in latex[1]
    assert latex[3].startswith(r"a\&b\_50\%|c & ")
    assert table(scores, "markdown").split("\n")[2].startswith(r"| a&b_50%\|c |")


def test_tables():
    scores = dict.fromkeys(NAMES, 0.12345) | {"n": 7, "wF": None}
    lines = table({"A_B": scores, "C": scores}, "markdown").split("\n")
    assert lines[0].split() == ["|", "|", "n", "|", *" | ".join(NAMES).split(), "|"]
    assert set(lines[1]) == set("|-: ") and len({len(line) for line in lines}) == 1
    cells = ["A_B", "7", *["0.123"] * 8, "-", "0.123"]
    assert lines[2].strip("|").replace("|", " ").split() == cells
    latex = table({"A_B": scores}, "latex").split("\n")
    assert latex[0] == r"\begin{tabular}{lrrrrrrrrrrr}" and latex[-1] == r"\end{tabular}"
    assert latex[3].startswith(r"A\_B & ") and latex[3].endswith(r" \\")
    assert table({"C": scores}).split("\n")[1].split() == ["C", "7", *["0.123"] * 8, "-", "0.123"]


def test_the_best_of_each_column_is_bold():
    rivals = {
        "A": dict.fromkeys(NAMES, 0.5) | {"n": 7},
        "B": dict.fromkeys(NAMES, 0.6) | {"n": 7},
        "C": dict.fromkeys(NAMES, 0.6001) | {"n": 7},
    }  # shown like B
    best = {"A": ["MAE"], "B": NAMES[1:], "C": NAMES[1:]}
    for style, form in (("markdown", "**{}**"), ("latex", r"\textbf{{{}}}"), ("text", "{}")):
        lines = table(rivals, style, mark_best=True).split("\n")
        for title, names in best.items():
            line = next(line for line in lines if line.strip("| ").startswith(title))
            cells = [cell for cell in line.removesuffix(r"\\").split() if "." in cell]
            shown = f"{rivals[title]['MAE']:.3f}"
            assert cells == [form.format(shown) if name in names else shown for name in NAMES]
    for scores in rivals.values():
        scores["wF"] = None
    assert "**-**" not in table(rivals, "markdown", mark_best=True)
    assert "**" not in table(rivals, "markdown")  # rows may be data sets


# ---- Folders -------------------------------------------------------------------------------------
KINDS = ("soft", "two", "binary")


@pytest.fixture
def folders(tmp_path):
    """pred/ and gt/ with three pairs, one of them in a sub-folder."""
    for kind in KINDS:
        pred, gt = pair(kind)
        for folder, pixels in (("pred", pred), ("gt", gt * 255)):
            path = tmp_path / folder / ("video" if kind == "two" else "") / f"{kind}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return tmp_path / "pred", tmp_path / "gt"


def save(path, pixels, **options):
    Image.fromarray(np.asarray(pixels)).save(path, **options)


def test_folders_and_files(folders, tmp_path, capsys):
    main([*map(str, folders), "--json", str(tmp_path / "s.json"), "--csv", str(tmp_path / "s.csv")])
    written = json.loads((tmp_path / "s.json").read_text())
    assert " ".join(written) == "n MAE F_mean F_adp F_max E_mean E_adp E_max S wF IoU options"
    assert written["options"] == {
        "gt_rule": "128",
        "stretch": True,
        "resize": "bilinear",
        "empty": "keep",
    }
    average = [sum(REFERENCE[kind][i] for kind in KINDS) / 3 for i in range(len(NAMES))]
    assert_close(written, {k: v for k, v in zip(NAMES, average) if not k.endswith("_max")})
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["binary", "soft", "video/two"]
    for row, kind in zip(rows, ("binary", "soft", "two")):
        assert_close({k: float(row[k]) for k in NAMES}, dict(zip(NAMES, REFERENCE[kind])))
    shown = capsys.readouterr().out
    assert "mask > 128, stretched, resize bilinear, empty masks keep" in shown
    assert f"{average[0]:.3f}" in shown


def test_curves_as_numbers(folders, tmp_path):
    main([*map(str, folders), "--no-wf", "--curves", str(tmp_path / "c.csv")])
    with open(tmp_path / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = evaluate_folders(*folders, wf=False)[0].curves()
    assert [float(row["threshold"]) for row in rows] == [i / 255 for i in range(255, -1, -1)]
    for name, values in expected.items():
        assert [float(row[name]) for row in rows] == values.tolist()


def test_report_names_every_problem(folders, capsys):
    pred, gt = folders
    (pred / "soft.png").write_bytes(b"not an image")
    (pred / "video" / "two.png").rename(pred / "other.png")
    save(gt / "nothing.png", np.zeros((20, 30), np.uint8))
    save(pred / "nothing.jpg", np.full((10, 15), 9, np.uint8))
    metrics, names, report = evaluate_folders(pred, gt)
    assert names == ["binary", "nothing"] and metrics.scores()["n"] == 2
    assert "soft.png is not a picture" in report.pop("unreadable")[0]
    assert report == {
        "missing": ["video/two"],
        "extra": ["other"],
        "resized": ["nothing"],
        "empty mask": ["nothing"],
        "full mask": [],
        "constant map": ["nothing"],
    }
    assert evaluate_folders(pred, gt, empty="skip")[1] == ["binary"]

    out = pred.parent / "s.json"
    with pytest.raises(UserError, match="2 of the pairs .* cannot be scored .*--allow-missing"):
        main([str(pred), str(gt), "--json", str(out)])
    assert not out.exists()
    shown = capsys.readouterr()
    assert "1 missing: video/two" in shown.out
    assert "unreadable: " in shown.err and "soft.png is not a picture" in shown.err
    main([str(pred), str(gt), "--json", str(out), "--allow-missing", "--no-wf"])
    assert json.loads(out.read_text())["n"] == 2 and json.loads(out.read_text())["wF"] is None


def test_processes_and_threads_give_the_same(folders, monkeypatch):
    (folders[0] / "soft.png").write_bytes(b"not an image")
    metrics, *found = evaluate_folders(*folders)
    monkeypatch.setattr(sys, "platform", "elsewhere")  # where forking is not safe
    others, *expected = evaluate_folders(*folders)
    assert found == expected and metrics.scores() == others.scores()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_devices_links_and_closed_pipes(folders, tmp_path):
    command = [sys.executable, "-m", "common.metrics", *map(str, folders), "--no-wf"]
    root = Path(__file__).parents[1]
    options = dict(capture_output=True, text=True, cwd=root)

    # A device that is full is named, and stays a device.
    run = subprocess.run([*command, "--json", "/dev/full"], **options)
    assert run.returncode == 1 and "error: cannot write /dev/full" in run.stderr
    assert not os.path.isfile("/dev/full")

    # A link stays one; what it points to is written.
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    run = subprocess.run([*command, "--csv", str(tmp_path / "link.csv")], **options)
    assert run.returncode == 0 and (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text().startswith("folder,image,MAE")

    # A reader that has gone changes nothing but the output.
    read, write = os.pipe()
    os.close(read)
    command += ["--json", str(tmp_path / "s.json")]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=root)
    os.close(write)
    assert run.returncode == 0 and "Traceback" not in run.stderr and "Broken" not in run.stderr
    assert json.loads((tmp_path / "s.json").read_text())["n"] == 3


def test_a_full_memory_is_not_the_files_fault(folders, monkeypatch):
    def no_memory(path):
        raise MemoryError

    monkeypatch.setattr("common.metrics.load_map", no_memory)
    with pytest.raises(MemoryError):
        evaluate_folders(*folders)


def die(pair, **options):
    os._exit(9)


@pytest.mark.skipif(sys.platform != "linux", reason="there are no processes elsewhere")
def test_a_killed_process_is_no_traceback(folders, monkeypatch):
    monkeypatch.setattr("common.metrics.score_files", die)
    with pytest.raises(UserError, match="killed, most likely because the memory is full"):
        evaluate_folders(*folders)


def test_exit_status(folders):
    (folders[0] / "soft.png").unlink()
    command = [sys.executable, "-m", "common.metrics", *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 1 and run.stderr.split("\n")[-2].startswith("error: 1 of the pairs")


def test_foreground_rule(folders):
    pred, gt = folders
    for path in find_images(gt).values():
        path.unlink()
    ramp = np.array([[0, 100, 128, 129, 255]], np.uint8)
    save(gt / "soft.png", ramp)
    save(pred / "soft.png", np.array([[0, 0, 0, 255, 255]], np.uint8))
    assert evaluate_folders(pred, gt)[0].scores()["IoU"] == 1  # 128 itself is background
    assert evaluate_folders(pred, gt, gt_rule="half")[0].scores()["IoU"] == pytest.approx(2 / 3)
    save(gt / "soft.png", ramp // 129)  # 0 and 1
    for rule in ("128", "half"):
        assert evaluate_folders(pred, gt, gt_rule=rule)[0].scores()["IoU"] == 1


def test_masks_are_read_as_data_sets_do(folders):
    """Every one of these masks shows the same object, and every map is perfect."""
    pred, gt = folders
    inside = np.zeros((20, 30), bool)
    inside[5:15, 8:20] = True
    alpha = np.dstack([np.full((20, 30, 3), 90), inside * 255]).astype(np.uint8)
    masks = {
        "zero_one": inside.astype(np.uint8),
        "dark": (inside * 38).astype(np.uint8),
        "sixteen_bits": (inside * 1000).astype(np.uint16),
        "painted": (inside[..., None] * np.array([0, 0, 200])).astype(np.uint8),
        "alpha": alpha,
    }
    for stem, pixels in masks.items():
        save(gt / f"{stem}.png", pixels)
        save(pred / f"{stem}.png", (inside * 255).astype(np.uint8))
        metrics, notes = score_files(
            (pred / f"{stem}.png", gt / f"{stem}.png"), True, True, "128", "bilinear", "keep"
        )
        assert notes == {}, stem
        assert_close(metrics.scores(), {"MAE": 0, "F_max": 1, "S": 1, "wF": 1, "IoU": 1})

    # What cannot be decided is not guessed.
    labels = np.repeat(np.arange(3, dtype=np.uint8), 10)[None]
    save(gt / "labels.png", labels)
    save(pred / "labels.png", labels)
    metrics, notes = score_files(
        (pred / "labels.png", gt / "labels.png"), True, True, "128", "bilinear", "keep"
    )
    assert metrics is None and "labels.png" in notes["unreadable"]


def test_a_cut_out_is_scored_by_its_alpha(folders):
    pred, gt = folders
    grey, _ = pair("soft")
    noise = np.random.default_rng(0).integers(0, 256, (*grey.shape, 3))
    save(pred / "soft.png", np.dstack([noise, grey]).astype(np.uint8))
    metrics, names, _ = evaluate_folders(pred, gt)
    at = names.index("soft")
    found = {name: values[at].item() for name, values in metrics.per_image().items()}
    assert_close(found, dict(zip(NAMES, REFERENCE["soft"])))


def test_empty_and_full_masks_are_counted_aloud(folders, capsys):
    pred, gt = folders
    save(gt / "soft.png", np.zeros((48, 40), np.uint8))
    save(gt / "binary.png", np.full((48, 40), 255, np.uint8))
    main([str(pred), str(gt)])
    shown = capsys.readouterr().err
    assert "1 empty mask: soft" in shown and "1 full mask: binary" in shown


def test_what_is_left_out_is_counted_aloud(folders, capsys):
    pred, gt = folders
    (pred / "soft.heic").write_bytes(b"")
    (pred / "run").mkdir()
    (pred / "run" / "args.json").write_text("{}")
    save(pred / "run" / "soft.png", np.zeros((48, 40), np.uint8))
    assert sorted(find_images(pred)) == ["binary", "soft", "video/two"]
    assert "3 pictures; 2 left out" in capsys.readouterr().err


def test_resizing_and_stretching_options_count(folders):
    pred, gt = folders
    for path in find_images(pred).values():
        with Image.open(path) as image:
            small = image.resize((17, 23))
        small.point(lambda v: v // 2 + 20).save(path)
    base, _, report = evaluate_folders(pred, gt)
    assert len(report["resized"]) == 3
    for change in ({"resize": "nearest"}, {"resize": "bicubic"}, {"stretch": False}):
        other = evaluate_folders(pred, gt, **change)[0]
        assert abs(base.scores()["MAE"] - other.scores()["MAE"]) > 1e-5, change


def test_several_folders(folders, tmp_path, capsys):
    pred, gt = folders
    other = tmp_path / "other"
    for stem, path in find_images(gt).items():
        (other / stem).parent.mkdir(parents=True, exist_ok=True)
        (other / f"{stem}.png").write_bytes(path.read_bytes())
    main([str(pred), str(other), str(gt), "--json", str(tmp_path / "s.json"), "--markdown"])
    written = json.loads((tmp_path / "s.json").read_text())
    assert list(written) == [str(pred), str(other)]
    assert written[str(other)]["F_max"] == 1 and written[str(other)]["MAE"] == 0
    assert f"| {other} " in capsys.readouterr().out


def test_hidden_folders_are_left_out_and_links_followed(folders, tmp_path):
    pred, gt = folders
    for name in (".ipynb_checkpoints/a.png", "__MACOSX/a.png", ".a.png"):
        (gt / name).parent.mkdir(exist_ok=True)
        save(gt / name, np.zeros((4, 4), np.uint8))
    (gt / "folder.png").mkdir()
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "set").symlink_to(gt)
    assert sorted(find_images(gt)) == ["binary", "soft", "video/two"]
    assert sorted(find_images(tmp_path / "all")) == ["set/binary", "set/soft", "set/video/two"]


@pytest.mark.skipif(sys.platform != "linux", reason="the file system refuses such names")
def test_names_that_cannot_be_encoded(folders, tmp_path):
    """A byte that is no text, and a terminal whose alphabet lacks a letter."""
    pred, gt = folders
    (gt / os.fsdecode(b"\xe9.png")).write_bytes((gt / "soft.png").read_bytes())
    (gt / "\u663e.png").write_bytes((gt / "soft.png").read_bytes())
    (pred / os.fsdecode(b"\xe9.png")).write_bytes((pred / "soft.png").read_bytes())
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "common.metrics",
            *map(str, folders),
            "--csv",
            str(tmp_path / "s.csv"),
            "--allow-missing",
        ],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert rb"1 missing: \u663e" in done.stdout and rb"\udce9" in (tmp_path / "s.csv").read_bytes()


def test_too_large_for_weighted_f(tmp_path):
    for folder in ("pred", "gt"):
        for stem, height in (("a", 16000), ("b", 9)):
            (tmp_path / folder).mkdir(exist_ok=True)
            save(tmp_path / folder / f"{stem}.png", np.eye(height, 3, dtype=np.uint8) * 255)
    metrics, names, report = evaluate_folders(tmp_path / "pred", tmp_path / "gt")
    assert names == ["b"] and "gt/a.png has 16000 pixels" in report["unreadable"][0]
    assert evaluate_folders(tmp_path / "pred", tmp_path / "gt", wf=False)[1] == ["a", "b"]


def test_bad_folders(folders, tmp_path):
    pred, gt = folders
    with pytest.raises(UserError, match="c.png must end in .svg or .csv"):
        main([str(pred), str(gt), "--curves", "c.png"])
    with pytest.raises(UserError, match="nowhere is not a folder with images"):
        evaluate_folders(tmp_path / "nowhere", gt)
    with pytest.raises(UserError, match="no file in .* has the stem"):
        evaluate_folders(pred / "video", gt)
    with pytest.raises(UserError, match=r"^cannot write .*s.json \((?!.*--out)"):
        main([str(pred), str(gt), "--no-wf", "--json", str(pred / "soft.png" / "s.json")])
    save(pred / "soft.jpg", np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match="same stem"):
        evaluate_folders(pred, gt)


def test_all_image_modes_are_read(tmp_path):
    grey = np.array([[0, 255], [255, 0]], np.uint8)
    for mode in ("L", "1", "P", "RGB", "RGBA", "LA", "I;16"):
        image = (
            Image.fromarray(grey).convert(mode)
            if mode != "I;16"
            else Image.fromarray(grey.astype(np.uint16) * 257)
        )
        image.save(tmp_path / "x.png")
        assert np.array_equal(np.asarray(load_map(tmp_path / "x.png")), grey), mode
    Image.fromarray(np.array([[1000, 30000]], np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(load_map(tmp_path / "x.png")).tolist() == [[4, 117]]


def test_two_outputs_of_one_name_are_refused_before_anything_is_scored(tmp_path):
    out = str(tmp_path / "s")
    with pytest.raises(UserError, match="must name different files"):
        main([str(tmp_path), str(tmp_path), "--json", out, "--csv", out])

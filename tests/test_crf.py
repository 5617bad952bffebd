"""Dense CRF: brute force, frozen results, invariances; the median filter; the program."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import crf
from common.crf import dense_crf, hard_unary, median_filter
from common.runtime import UserError

ROOT = Path(__file__).parent.parent
REFERENCE = np.load(Path(__file__).parent / "reference" / "crf.npz")
SETTINGS = {"prob": dict(sxy=20.0, srgb=13.0), "label": dict(sxy=15.0, srgb=5.0)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads would only wait for each other: the images are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- Brute force ---------------------------------------------------------------------------------
def brute_kernel(image, sxy, srgb=None):
    """All N x N entries, in float64, normalised: image [3, H, W] -> [N, N]."""
    y, x = np.indices(image.shape[1:])
    features = [y.ravel() / sxy, x.ravel() / sxy]
    if srgb:
        features += [c.ravel() / srgb for c in np.asarray(image, np.float64)]
    f = np.stack(features, 1)
    kernel = np.exp(-0.5 * ((f[:, None] - f) ** 2).sum(-1))
    root = np.sqrt(kernel.sum(1))
    return kernel / root[:, None] / root


def brute_crf(
    image, prob, sxy=80.0, srgb=13.0, compat=10.0, sxy_gauss=3.0, compat_gauss=3.0, iterations=10
):
    """Mean field of the two labels as such: energies, Potts penalties and a softmax over labels."""
    appearance, smooth = brute_kernel(image, sxy, srgb), brute_kernel(image, sxy_gauss)
    p = np.clip(np.asarray(prob, np.float64).ravel(), 1e-5, 1 - 1e-5)
    energy = -np.log(np.stack([1 - p, p]))
    q = np.exp(-energy)
    for _ in range(iterations):
        logit = -energy + compat * q @ appearance + compat_gauss * q @ smooth
        q = np.exp(logit - logit.max(0))
        q /= q.sum(0)
    return q[1].reshape(image.shape[1:])


def scene(height, width, seed=0):
    """An image (smooth background, two objects, noise) and a coarse map of the objects."""
    g = np.random.default_rng(seed)
    y, x = np.indices((height, width))
    y, x = y / height, x / width
    image = np.stack([90 + 60 * np.sin(3 * x + k) * np.cos(2 * y + k) for k in range(3)])
    disc = (y - 0.4) ** 2 + (x - 0.35) ** 2 < 0.05
    box = (abs(y - 0.7) < 0.15) & (abs(x - 0.75) < 0.15)
    image += disc * np.array([70.0, -30, 10]).reshape(3, 1, 1)
    image += box * np.array([-20.0, 20, 90]).reshape(3, 1, 1)
    image = (image + g.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)
    soft = np.exp(-((y - 0.45) ** 2 + (x - 0.35) ** 2) / 0.06)
    soft += np.exp(-((y - 0.7) ** 2 + (x - 0.7) ** 2) / 0.03)
    prob = (0.05 + 0.9 * soft + g.normal(0, 0.05, y.shape)).clip(0, 1)
    return torch.from_numpy(image)[None], torch.from_numpy(prob).float()[None, None]


def difference(a, b):
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


def iou(a, b):
    a, b = np.asarray(a) > 0.5, np.asarray(b) > 0.5
    return (a & b).sum() / (a | b).sum()


# ---- Accuracy ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "height,width,sxy,srgb", [(32, 40, 10.0, 13.0), (45, 27, 6.0, 5.0), (24, 24, 80.0, 13.0)]
)
def test_one_product_with_the_appearance_kernel(height, width, sxy, srgb):
    image, prob = scene(height, width)
    v = 2 * prob[0, 0].double().numpy().ravel() - 1
    exact = brute_kernel(image[0].numpy(), sxy, srgb) @ v
    vertex, share, exchange = crf.colour_grid(image, srgb)
    assert torch.allclose(share.sum(-1), torch.ones(()), atol=1e-5) and (share >= 0).all()
    fy, fx = crf.space_functions(height, width, sxy)
    pixels = crf.Pixels(vertex, share, len(exchange), fy, fx, 1, fy.shape[1])
    scale = crf.appearance(pixels, exchange, pixels, torch.ones(height * width)).rsqrt()
    values = pixels.to_list(torch.from_numpy(v).float().view(1, 1, height, width))
    got = pixels.to_map(scale * crf.appearance(pixels, exchange, pixels, scale * values)).numpy()
    assert 0.5 < np.abs(exact).max() and np.abs(got.ravel() - exact).max() < 0.06
    assert difference(got.ravel(), exact) < 0.015


def test_grid_shares_interpolate_the_colour():
    """A linear function of the colour is read back from 4 grid colours without error."""
    image = torch.randint(0, 256, (1, 3, 9, 11), generator=torch.Generator().manual_seed(0))
    image[..., 0, 0], image[..., 0, 1] = 0, 255
    vertex, share, exchange = crf.colour_grid(image.byte(), 13.0)
    assert vertex.unique().numel() == len(exchange) == int(vertex.max()) + 1
    stretch = torch.eye(3).double() + (crf.STRETCH - 1) / 3  # 1 across grey, STRETCH along grey
    axis = image.permute(0, 2, 3, 1).double() @ stretch
    axis = axis / (13 * crf.spacing(13) * stretch.det() ** (1 / 3))
    linear = (axis * torch.tensor([1.0, 2, 5])).sum(-1)
    grid = torch.full((len(exchange),), torch.nan, dtype=torch.float64)
    low, order = axis.floor(), (axis - axis.floor()).argsort(-1, descending=True)
    for k in range(4):  # the walk from the lower corner, channel after channel
        corner = low + sum(torch.nn.functional.one_hot(order[..., j], 3) for j in range(k))
        grid[vertex[..., k].long()] = (corner * torch.tensor([1.0, 2, 5])).sum(-1)
    assert torch.allclose((grid[vertex.long()] * share).sum(-1), linear, atol=1e-4)


def test_space_functions_add_up_to_the_gaussian():
    fy, fx = crf.space_functions(30, 50, 9.0)
    y, x = np.indices((30, 50)).reshape(2, -1) / 9.0
    exact = np.exp(-0.5 * ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2))
    phi = (fy[:, None] * fx).flatten(0, 1).numpy()
    assert phi.shape[1] % 8 == 0
    assert difference(phi @ phi.T, exact) < 0.01
    assert np.linalg.norm(phi @ phi.T - exact) < 0.05 * np.linalg.norm(exact)


def test_smoothness_is_the_exact_gaussian():
    image, _ = scene(44, 31)
    v = np.random.default_rng(0).normal(size=(44, 31))
    along_y, along_x = (crf.smoothness(torch.arange(n), torch.arange(n), 3.0) for n in (44, 31))
    got = along_y.to_dense().double().numpy() @ v @ along_x.to_dense().double().numpy().T
    assert np.abs(got.ravel() - brute_kernel(image[0].numpy(), 3.0) @ v.ravel()).max() < 1e-5


@pytest.mark.parametrize(
    "height,width,sxy,srgb",
    [
        (40, 32, 10.0, 13.0),
        (32, 40, 7.0, 5.0),
        (33, 17, 80.0, 13.0),
        (1, 60, 15.0, 13.0),
        (2, 3, 80.0, 13.0),
        (9, 1, 3.0, 5.0),
    ],
)
def test_mean_field_of_two_labels(height, width, sxy, srgb):
    image, prob = scene(height, width, seed=height)
    exact = brute_crf(image[0].numpy(), prob, sxy, srgb)
    assert difference(dense_crf(image, prob, sxy, srgb)[0, 0], exact) < 0.002
    exact = brute_crf(image[0].numpy(), prob, sxy, srgb, 2.0, 1.5, 0.7, 3)
    got = dense_crf(image, prob, sxy, srgb, 2.0, 1.5, 0.7, 3)
    assert got.shape == prob.shape and got.dtype == torch.float32
    assert difference(got[0, 0], exact) < 0.003


@pytest.mark.parametrize("name,limit", [("prob", 0.0005), ("label", 0.0009)])
@pytest.mark.parametrize("case", [0, 1])
def test_frozen_float64_results(case, name, limit):
    image = torch.from_numpy(REFERENCE[f"image{case}"]).permute(2, 0, 1)[None]
    prob = torch.from_numpy(REFERENCE[f"prob{case}"])[None, None] / 255
    exact = REFERENCE[f"exact_{name}{case}"]
    unary = prob if name == "prob" else hard_unary(prob > 0.5)
    got = dense_crf(image, unary, **SETTINGS[name])[0, 0]
    error = difference(got, exact)
    assert error < limit and error < 0.35 * REFERENCE[f"pydensecrf_error_{name}{case}"]
    assert iou(got, exact) > 0.99
    assert difference(prob[0, 0], exact) > 20 * limit  # the CRF had something to do


def test_one_pixel_follows_the_formula():
    """One pixel hears itself alone, with weight 1 in both kernels."""
    u = q = math.log(0.6 / 0.4)
    q = 0.6
    for _ in range(4):
        q = 1 / (1 + math.exp(-u - (0.3 + 0.2) * (2 * q - 1)))
    got = dense_crf(
        torch.full((1, 3, 1, 1), 77),
        torch.full((1, 1, 1, 1), 0.6),
        compat=0.3,
        compat_gauss=0.2,
        iterations=4,
    )
    assert got.item() == pytest.approx(q, abs=1e-6)


def test_constant_image_is_a_wide_gaussian():
    """Without colours the appearance kernel is separable too, so plain matrices give the result."""
    height, width = 70, 50
    prob = torch.rand(height, width, generator=torch.Generator().manual_seed(0)).double()
    along = [
        [
            crf.smoothness(torch.arange(n), torch.arange(n), s).to_dense().double()
            for n in (height, width)
        ]
        for s in (12.0, 3.0)
    ]
    u, q = torch.logit(prob), prob
    for _ in range(5):
        v = 2 * q - 1
        q = torch.sigmoid(u + sum(w * ky @ v @ kx for w, (ky, kx) in zip((1.0, 0.5), along)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a black image is as good as any
        black = dense_crf(
            torch.zeros(1, 3, height, width), prob[None, None], 12.0, 13.0, 1.0, 3.0, 0.5, 5
        )[0, 0]
    assert (black - q).abs().max() < 0.004
    image = torch.full((1, 3, height, width), 137, dtype=torch.uint8)
    got = dense_crf(image, prob[None, None], 12.0, 13.0, 1.0, 3.0, 0.5, 5)[0, 0]
    assert (got - q).abs().max() < 0.004
    sure = dense_crf(image, torch.full((1, 1, height, width), 0.9))
    assert (sure > 0.9).all()


# ---- What it is for ------------------------------------------------------------------------------
def test_a_lone_colour_far_from_its_like():
    """The functions of the place sum to less than 0 at the corner: its row sum is held at 0.1."""
    image, prob = torch.full((1, 3, 40, 60), 60, dtype=torch.uint8), torch.full((1, 1, 40, 60), 0.2)
    image[..., :20], prob[..., :20] = 220, 0.9
    image[..., 0, 59], prob[..., 0, 59] = 220, 0.6
    exact = brute_crf(image[0].numpy(), prob, 10.0, 13.0)
    assert difference(dense_crf(image, prob, 10.0)[0, 0], exact) < 1e-4  # else .2


def test_coarse_map_moves_to_the_edges_and_a_crisp_mask_stays():
    truth = torch.zeros(1, 1, 60, 80)
    truth[..., 20:45, 30:60] = 1
    noise = torch.randn(1, 3, 60, 80, generator=torch.Generator().manual_seed(0))
    image = (60 + 120 * truth + 4 * noise).clamp(0, 255)
    coarse = torch.nn.functional.interpolate(truth[..., 5::10, 5::10], (60, 80), mode="bilinear")
    assert iou(coarse, truth) < 0.9
    assert iou(dense_crf(image, coarse), truth) > 0.99
    assert torch.equal((dense_crf(image, hard_unary(truth), 50, 5) > 0.5).float(), truth)
    assert torch.equal((dense_crf(image, truth) > 0.5).float(), truth)


def test_colour_matters_and_every_setting_changes_the_result():
    image, prob = scene(30, 30)
    base = dense_crf(image, prob, 8.0, compat=2.0, compat_gauss=1.0)
    for change in (
        dict(sxy=4.0),
        dict(srgb=40.0),
        dict(compat=1.0),
        dict(sxy_gauss=1.0),
        dict(compat_gauss=0.0),
        dict(iterations=3),
        dict(stride=2),
    ):
        other = dense_crf(image, prob, **{**dict(sxy=8.0, compat=2.0, compat_gauss=1.0), **change})
        assert difference(base, other) > 1e-4, change
    assert difference(base, dense_crf(torch.zeros_like(image), prob, 8.0, compat=2.0)) > 0.01


# ---- Invariances ---------------------------------------------------------------------------------
def batch_of_scenes(count=4, height=36, width=44):
    images, probs = zip(*(scene(height, width, seed) for seed in range(count)))
    return torch.cat(images), torch.cat(probs)


def test_a_batch_equals_its_images_and_follows_a_permutation():
    image, prob = batch_of_scenes()
    together = dense_crf(image, prob, 10.0)
    alone = torch.cat([dense_crf(i[None], p[None], 10.0) for i, p in zip(image, prob)])
    assert torch.equal(together, alone)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(dense_crf(image[order], prob[order], 10.0), together[order])


@pytest.mark.parametrize("stride", [1, 2])
def test_images_refined_together_do_not_mix(stride):
    """The path of CUDA: several images share the sparse matrices."""
    image, prob = batch_of_scenes()
    settings = (10.0, 13.0, 10.0, 3.0, 3.0, 10, stride, 100)
    together = crf.mean_field(image, torch.logit(prob), *settings)
    alone = torch.cat(
        [crf.mean_field(i[None], torch.logit(p)[None], *settings) for i, p in zip(image, prob)]
    )
    assert (together - alone).abs().max() < 1e-3 and difference(together, alone) < 1e-6


def test_memory_plan():
    assert crf.plan(3000, 4000, 1000, 13.0, 4e9) == (1, 8)
    images, functions = crf.plan(320, 320, 16, 13.0, 4e9)
    assert 32 <= images <= 100 and functions == 16
    assert crf.plan(320, 320, 16, 13.0, 8e9)[0] in (2 * images, 2 * images + 1)
    assert crf.plan(1, 1, 1, 13.0, 1) == (1, 1)
    assert crf.plan(32, 32, 8, 1.0, 1e12)[0] == 30  # grid colours are numbered in int32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_numbers_of_the_cpu():
    image, prob = batch_of_scenes()
    wanted = dense_crf(image, prob, 10.0)
    for max_bytes in (4e9, 1):
        got = dense_crf(image.to("cuda"), prob.to("cuda"), 10.0, max_bytes=max_bytes)
        assert got.is_cuda and difference(got.cpu(), wanted) < 1e-4


def test_blocks_of_functions_give_the_same_numbers(monkeypatch):
    image, prob = batch_of_scenes(2)
    blocks = []
    original = crf.Pixels.make_phi
    monkeypatch.setattr(
        crf.Pixels, "make_phi", lambda self, block: blocks.append(block) or original(self, block)
    )
    whole = dense_crf(image, prob, 5.0)
    assert set(blocks) == {0}
    parts = dense_crf(image, prob, 5.0, max_bytes=1)
    assert max(blocks) >= 3
    assert (whole - parts).abs().max() < 1e-3 and difference(whole, parts) < 1e-5


def test_swapping_the_labels_swaps_the_result():
    image, prob = scene(40, 30)
    for settings in SETTINGS.values():
        a, b = (dense_crf(image, p, **settings) for p in (prob, 1 - prob))
        assert difference(a, 1 - b) < 1e-5


def test_more_evidence_never_lowers_the_result():
    image, prob = scene(40, 30)
    low = dense_crf(image, prob, 10.0, compat=3.0)
    high = dense_crf(image, (prob + 0.1).clamp(max=1), 10.0, compat=3.0)
    assert (high > low - 1e-3).all() and (high - low).mean() > 0.01


def test_flips_and_float_images():
    image, prob = scene(31, 26)
    base = dense_crf(image, prob, 10.0)
    assert difference(dense_crf(image.flip(3), prob.flip(3), 10.0).flip(3), base) < 1e-5
    assert torch.equal(dense_crf(image.float(), prob, 10.0), base)
    assert torch.equal(dense_crf(image, prob.double(), 10.0), base)
    with pytest.warns(UserWarning, match="multiply it by 255"):
        dense_crf(image.float() / 255, prob, 10.0)
    strided = image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(dense_crf(strided, prob, 10.0), base)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dense_crf(image, prob, 10.0), base)
    assert not dense_crf(image, prob.clone().requires_grad_(), 10.0).requires_grad


def test_stride_is_close_and_safe_for_tiny_images():
    image = torch.from_numpy(REFERENCE["image0"]).permute(2, 0, 1)[None]
    prob = torch.from_numpy(REFERENCE["prob0"])[None, None] / 255
    got = dense_crf(image, prob, stride=2, **SETTINGS["prob"])[0, 0]
    assert difference(got, REFERENCE["exact_prob0"]) < 0.002
    assert iou(got, REFERENCE["exact_prob0"]) > 0.99
    for size in ((1, 1), (2, 5), (1, 4)):
        tiny = dense_crf(torch.full((1, 3, *size), 9), torch.full((1, 1, *size), 0.8), stride=3)
        assert (tiny > 0.8).all()


# ---- Unaries, errors -----------------------------------------------------------------------------
def test_hard_unary_energies():
    prob = hard_unary(torch.tensor([[True, False]]))
    assert (-prob.log()).flatten().tolist() == pytest.approx([0.3567, 1.2040], abs=5e-5)
    assert hard_unary(torch.tensor([255, 0, 1]), 0.9).tolist() == pytest.approx([0.9, 0.1, 0.9])
    for wrong in (0.5, 1.0, math.nan):
        with pytest.raises(ValueError, match="gt_prob"):
            hard_unary(torch.zeros(1), wrong)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(image=torch.zeros(3, 8, 8)), "B, 3, H, W"),
        (dict(image=torch.zeros(1, 1, 8, 8)), "B, 3, H, W"),
        (dict(image=torch.zeros(1, 3, 8, 9)), "of one size"),
        (dict(image=torch.zeros(2, 3, 8, 8)), "of one size"),
        (dict(prob=torch.zeros(1, 8, 8)), "of one size"),
        (dict(image=torch.full((1, 3, 8, 8), 300.0)), "0 to 255"),
        (dict(image=torch.full((1, 3, 8, 8), math.nan)), "0 to 255"),
        (dict(prob=torch.full((1, 1, 8, 8), 1.1)), "0 to 1"),
        (dict(prob=torch.full((1, 1, 8, 8), math.nan)), "0 to 1"),
        (dict(prob=torch.zeros(1, 1, 8, 8, device="meta")), "meta"),
        (dict(sxy=0.0), "sxy"),
        (dict(srgb=0.5), "srgb"),
        (dict(iterations=0), "iterations"),
        (dict(stride=0), "stride"),
        (dict(sxy_gauss=math.nan), "sxy_gauss"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = dict(image=torch.zeros(1, 3, 8, 8), prob=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=message):
        dense_crf(**{**good, **change})


def test_a_device_without_sparse_products_is_named():
    with pytest.raises(UserError, match="meta.*CPU"):
        dense_crf(torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(1, 1, 8, 8, device="meta"))


# ---- Median --------------------------------------------------------------------------------------
def brute_median(x, size):
    padded = np.pad(x, size // 2, mode="edge")
    return np.array(
        [
            [
                np.sort(padded[i : i + size, j : j + size].ravel())[size * size // 2]
                for j in range(x.shape[1])
            ]
            for i in range(x.shape[0])
        ],
        x.dtype,
    )


@pytest.mark.parametrize("size", [1, 3, 7, 9])
@pytest.mark.parametrize("kind", ["bool", "0/255", "0/1 float", "two values", "grey", "float"])
def test_median_equals_sorting_every_window(size, kind):
    g = np.random.default_rng(size)
    binary = g.random((2, 1, 13, 10)) < 0.5
    x = {
        "bool": binary,
        "0/255": binary.astype(np.uint8) * 255,
        "0/1 float": binary.astype(np.float32),
        "two values": np.where(binary, 3, -7),
        "grey": g.integers(0, 256, binary.shape).astype(np.uint8),
        "float": g.normal(size=binary.shape),
    }[kind]
    got = median_filter(torch.from_numpy(x), size).numpy()
    assert got.dtype == x.dtype
    for k in range(2):
        assert np.array_equal(got[k, 0], brute_median(x[k, 0], size))


def test_median_of_small_and_large_maps():
    corner = torch.tensor([[[[5, 9, 1]]]])
    assert median_filter(corner, 3).tolist() == [[[[5, 5, 1]]]]  # three equal rows
    assert median_filter(corner, 7).tolist() == [[[[5, 5, 1]]]]
    x = torch.randint(0, 256, (1, 1, 300, 500), generator=torch.Generator().manual_seed(0)).byte()
    whole = median_filter(x, 9)  # larger than one piece of rows
    part = median_filter(x[..., 10:50, 20:70], 9)
    assert torch.equal(whole[..., 20:40, 30:60], part[..., 10:30, 10:40])
    for wrong in ((x, 4), (x[0], 3), (x[..., :0], 3), (x, -1)):
        with pytest.raises(ValueError, match="median_filter needs"):
            median_filter(*wrong)


# ---- Program -------------------------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path):
    for k in range(2):
        image, prob = scene(40 + k, 50, k)
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "maps").mkdir(exist_ok=True)
        Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{k}.png")
        grey = Image.fromarray((prob[0, 0] * 255).round().byte().numpy())
        grey.save(tmp_path / "maps" / f"{k}.png")
    return tmp_path


def run(*arguments, **options):
    """`python -m common.crf`, on the CPU."""
    command = [sys.executable, "-m", "common.crf", *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_program_refines_one_pair_as_the_function_does(folders):
    out = folders / "out/x.png"
    done = run(folders / "photos/0.png", folders / "maps/0.png", "-o", out, "--sxy", 10)
    assert done.returncode == 0 and "arning" not in done.stderr, done.stderr
    image = torch.from_numpy(np.array(Image.open(folders / "photos/0.png"))).permute(2, 0, 1)[None]
    prob = torch.from_numpy(np.array(Image.open(folders / "maps/0.png")))[None, None] / 255
    wanted = (dense_crf(image, prob, 10.0)[0, 0] * 255).round()
    got = np.array(Image.open(out))
    assert got.dtype == np.uint8 and difference(got, wanted) < 0.01


def refine(folders, flags, out="out"):
    """The program on photos/ and maps/, in this process."""
    crf.main(f"photos maps -o {out} --sxy 10 --device cpu {flags}".split())


def test_program_makes_labels_of_folders(folders, monkeypatch):
    monkeypatch.chdir(folders)
    small = Image.open("maps/1.png").resize((10, 8))
    small.save("maps/1.png")  # maps may be smaller than the photo
    refine(folders, "--hard --median 7")
    assert sorted(p.name for p in (folders / "out").iterdir()) == ["0.png", "1.png"]
    for k in range(2):
        got = Image.open(folders / f"out/{k}.png")
        assert got.size == (50, 40 + k) and got.mode == "L"
        assert set(np.unique(got)) == {0, 255}
        got = torch.from_numpy(np.array(got))[None, None]
        assert difference(median_filter(got, 3), got) < 255 * 0.01


def test_a_broken_file_does_not_end_a_folder(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    refine(folders, "", "whole")
    Image.open("photos/0.png").save("photos/2.png")
    Image.open("maps/0.png").save("maps/2.png")
    Path("photos/0.png").write_bytes(Path("photos/0.png").read_bytes()[:200])
    Path("maps/2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="^2 of 3 maps are not refined.*others are in out"):
        refine(folders, "")
    reasons = capsys.readouterr().err.split("\n")[-3:-1]
    assert "photos/0.png" in reasons[0] and "maps/2.png" in reasons[1]
    assert [path.name for path in Path("out").iterdir()] == ["1.png"]
    assert Path("out/1.png").read_bytes() == Path("whole/1.png").read_bytes()

    done = run(folders / "photos", folders / "maps", "-o", folders / "out", "--sxy", 10)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.rstrip().split("\n")[-1].startswith("error: 2 of 3 maps")


def test_a_photo_too_large_for_the_memory_is_named_and_the_others_are_refined(
    folders, monkeypatch, capsys
):
    def needs_memory(image, *settings):
        if image.shape[2] == 40:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")
        return dense_crf(image, *settings)

    monkeypatch.chdir(folders)
    monkeypatch.setattr(crf, "dense_crf", needs_memory)
    with pytest.raises(UserError, match="1 of 2 maps"):
        refine(folders, "")
    assert "photos/0.png of 50 x 40 pixels needs more memory" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["1.png"]

    # Another error is a fault of the program and is not hidden.
    def broken(*arguments):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(crf, "dense_crf", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        refine(folders, "")


def test_inputs_are_never_overwritten(folders, monkeypatch):
    monkeypatch.chdir(folders)
    Path("link").symlink_to("maps")
    for out in ("maps", "photos", "link"):
        with pytest.raises(UserError, match=f"-o {out} would overwrite {out}/0.png"):
            refine(folders, "", out)
    with pytest.raises(UserError, match="would overwrite maps/0.png"):
        crf.main("photos/0.png maps/0.png -o maps/0.png".split())


def test_a_cut_out_is_refined_by_its_alpha_and_photos_without_a_map_are_counted(
    folders, monkeypatch, capsys
):
    monkeypatch.chdir(folders)
    refine(folders, "", "grey")
    grey = Image.open("maps/0.png")
    cut_out = Image.new("RGBA", grey.size, (9, 99, 200, 0))
    cut_out.putalpha(grey)
    cut_out.save("maps/0.png")
    Path("maps/1.png").unlink()
    capsys.readouterr()
    refine(folders, "", "alpha")
    assert Path("alpha/0.png").read_bytes() == Path("grey/0.png").read_bytes()
    assert "photos: 1 photos have no map in maps" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_links_and_full_devices(folders):
    files = folders / "photos/0.png", folders / "maps/0.png"
    (folders / "link.png").symlink_to("real.png")
    (folders / "full.png").symlink_to("/dev/full")
    assert run(*files, "-o", folders / "link.png", "--sxy", 10).returncode == 0
    assert (folders / "link.png").is_symlink() and (folders / "real.png").stat().st_size > 100
    done = run(*files, "-o", folders / "full.png", "--sxy", 10)
    assert done.returncode == 1 and "error: cannot write" in done.stderr
    assert (folders / "full.png").is_symlink() and not Path("/dev/full").is_file()


def test_sxy_grows_with_large_photos():
    assert crf.photo_sxy(300, 400) == 80 and crf.photo_sxy(20, 30, 50) == 50
    assert crf.photo_sxy(3000, 4000) == 800


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["photos/0.png", "maps", "-o", "out"], "two files or two folders"),
        (["photos/none.png", "maps/0.png", "-o", "x.png"], "none.png"),
        (["photos/0.png", "maps/0.png", "-o", "x"], "-o"),
        (["photos", "maps", "-o", "x.png"], "-o"),
        (["photos", "extra", "-o", "out"], "other.png.*no photo"),
        (["photos/0.png", "maps/broken.png", "-o", "x.png"], "broken.png"),
        (["photos/0.png", "maps/0.png", "-o", "x.png", "--median", "4"], "odd"),
        (["photos/0.png", "maps/0.png", "-o", "x.png", "--srgb", "0"], "--srgb"),
        (["photos/0.png", "maps/0.png", "-o", "x.png", "--sxy", "nan"], "--sxy"),
    ],
)
def test_program_names_the_problem(folders, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    Path("extra").mkdir()
    Path("maps/0.png").rename("extra/other.png")
    Image.new("L", (50, 40)).save("maps/0.png")
    if "broken" in " ".join(arguments):
        Path("maps/broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=message):
        crf.main([*arguments, "--device", "cpu"])

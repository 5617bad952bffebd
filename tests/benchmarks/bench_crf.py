"""Dense CRF: processor time beside pydensecrf, accuracy, other sparse products, speed on CUDA.

    pip install pydensecrf2                                            # for this benchmark alone
    python tests/benchmarks/bench_crf.py [--images FOLDER] [--masks FOLDER] [--threads 2]
    python tests/benchmarks/bench_crf.py --large

Time: 320 x 320, 10 iterations, building the filters included, one thread. Each round runs both
programs in turn; what is counted is processor time, see turns.py. Printed are the fewest
milliseconds of all rounds, the ratio of these, and the ratio of the medians, each for the median
photo. Without pydensecrf the other program is the exact sum, at the size of the reference images,
as it is slow. --threads also prints ratios of wall-clock time with several threads for ours;
pydensecrf uses one in any case. They need an idle machine.
The sparse products W v and W^T v of common/crf.py are timed beside other ways to write them.
Images: photos from a folder, else those of tests/reference/crf.npz, enlarged.
Accuracy: mean absolute difference to the exact sums in float64, at half of the usual sxy, of the
images of tests/reference/crf.npz; with --images and --masks (of the same stems) also of six photos,
at 160 pixels along the longer side, whose masks are shrunk to 10 to 40 cells and made noisy.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from turns import processor_ms, turns  # noqa: E402

from common.crf import (  # noqa: E402
    Pixels,
    colour_grid,
    dense_crf,
    gaussian,
    hard_unary,
    photo_sxy,
    space_functions,
)
from common.images import load_image, load_mask  # noqa: E402
from common.metrics import find_images  # noqa: E402

try:
    import pydensecrf.densecrf as pydensecrf
except ImportError:
    pydensecrf = None

SETTINGS = {"prob": (80.0, 13.0), "label": (50.0, 5.0)}  # sxy, srgb
# photos of ECSSD, and the seeds of the noise on their masks
SIX = {"0029": 20, "0206": 150, "0409": 290, "0566": 400, "0739": 520, "0922": 650}


def with_pydensecrf(image, prob, sxy, srgb):
    """image uint8 [1, 3, H, W], prob [1, 1, H, W] -> prob [H, W]."""
    height, width = prob.shape[2:]
    p = prob[0, 0].clamp(1e-5, 1 - 1e-5).flatten()
    crf = pydensecrf.DenseCRF2D(width, height, 2)
    crf.setUnaryEnergy(-torch.stack([1 - p, p]).log().contiguous().numpy())
    crf.addPairwiseGaussian(sxy=3, compat=3)
    rgb = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=rgb, compat=10)
    return np.array(crf.inference(10))[1].reshape(height, width)


def with_exact_sums(image, prob, sxy, srgb, dtype=torch.float32):
    """The same with all N x N entries of the appearance kernel."""
    places = [torch.arange(n, dtype=dtype) for n in prob.shape[2:]]
    features = torch.cat([torch.cartesian_prod(*places) / sxy, image[0].flatten(1).T / srgb], 1)
    kernel = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    kernel.square_().mul_(-0.5).clamp_(min=-80).exp_()  # [N, N]
    y, x = (gaussian(place, place, 3.0) for place in places)
    for k in (kernel, y, x):
        root = k.sum(1).rsqrt()
        k.mul_(root[:, None]).mul_(root)
    prob = prob.to(dtype)
    u, q = torch.logit(prob.clamp(1e-5, 1 - 1e-5)), prob
    for _ in range(10):
        v = 2 * q - 1
        q = torch.sigmoid(u + 10 * (kernel @ v.flatten()).view_as(v) + 3 * (y @ v @ x))
    return q[0, 0].numpy()


def load_cases(folder, size):
    """(image uint8 [1, 3, H, W], coarse map [1, 1, H, W]) of up to four photos."""
    data = np.load(ROOT / "tests" / "reference" / "crf.npz")
    cases = []
    for k in range(4 if folder else 2):
        image = torch.from_numpy(data[f"image{k % 2}"]).permute(2, 0, 1)
        if folder:
            paths = list(find_images(folder).values())
            image = load_image(paths[k * len(paths) // 4])
        image, prob = image[None].float(), torch.from_numpy(data[f"prob{k % 2}"])[None, None] / 255
        if size:
            image, prob = (
                F.interpolate(t, (size, size), mode="bilinear", align_corners=False)
                for t in (image, prob)
            )
        cases.append((image.round().byte(), prob.clamp(0, 1)))
    return cases


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def processor_seconds(function, *arguments):
    return processor_ms(function, *arguments) / 1000


def time_cpu(cases, other, rounds):
    """Processor time on one thread: ours, the other program, ours with stride 2."""
    torch.set_num_threads(1)
    print(f"load of the machine {os.getloadavg()[0]:.1f}")
    print(
        f"{'processor time':16}{'ours ms':>9}{'other ms':>10}{'of minima':>11}{'of medians':>11}",
        end="",
    )
    print(f"{'stride 2':>10}")
    for name, settings in SETTINGS.items():
        items = [
            (image, prob if name == "prob" else hard_unary(prob > 0.5), *settings)
            for image, prob in cases
        ]

        def strided(*item):
            dense_crf(*item, stride=2)

        spent = turns([dense_crf, other, strided], items, rounds)  # [3, rounds, photos]
        ours, theirs, fast = np.median(spent.min(1), 1)
        ratio = np.median(np.median(spent[0], 0) / np.median(spent[1], 0))
        print(
            f"{name:16}{ours:9.1f}{theirs:10.1f}{ours / theirs:11.2f}{ratio:11.2f}"
            f"{fast / theirs:10.2f}"
        )


def time_threads(cases, other, rounds, threads):
    """Ratios of wall-clock time with several threads for ours; they need an idle machine."""
    torch.set_num_threads(threads)
    for name, settings in SETTINGS.items():
        ratios = []
        for image, prob in cases:
            unary = prob if name == "prob" else hard_unary(prob > 0.5)
            for turn in range(rounds + 1):  # the first one only warms up
                ours, theirs = (seconds(f, image, unary, *settings) for f in (dense_crf, other))
                ratios += [ours / theirs] if turn else []
        print(
            f"{name:16}{threads} threads, wall clock: {statistics.median(ratios):.2f} of its time"
        )


def accuracy_on_photos(images, masks):
    """Errors on six photos: those in SIX where they are, else others."""
    photos, masks = find_images(images), find_images(masks)
    both = [stem for stem in photos if stem in masks]
    stems = {stem: seed for stem, seed in SIX.items() if stem in both} or {
        stem: seed for seed, stem in enumerate(both[:: max(1, len(both) // 6)])
    }
    errors = {name: [] for name in SETTINGS}
    for (stem, seed), cells in zip(stems.items(), (10, 15, 20, 25, 30, 40)):
        image, mask = load_image(photos[stem])[None].float(), load_mask(masks[stem])[None] / 255
        height, width = (round(n * 160 / max(image.shape)) for n in image.shape[2:])
        image = F.interpolate(image, (height, width), mode="bilinear", antialias=True).round()
        coarse = F.interpolate(mask, (max(2, round(cells * height / width)), cells), mode="area")
        noise = torch.randn(coarse.shape, generator=torch.Generator().manual_seed(seed))
        prob = (0.1 + 0.8 * coarse + 0.05 * noise).clamp(0.02, 0.98)
        image, prob = image.byte(), F.interpolate(prob, (height, width), mode="bilinear")
        for name, (sxy, srgb) in SETTINGS.items():
            case = image, prob if name == "prob" else hard_unary(prob > 0.5), sxy / 2, srgb
            exact = with_exact_sums(*case, dtype=torch.float64)
            programs = [dense_crf, with_pydensecrf] if pydensecrf else [dense_crf]
            results = [np.asarray(program(*case)).reshape(exact.shape) for program in programs]
            a, b = results[0] > 0.5, exact > 0.5
            errors[name].append(
                [
                    (a & b).sum() / (a | b).sum(),
                    *(np.abs(result - exact).mean() for result in results),
                ]
            )
    for name, rows in errors.items():
        iou, ours, theirs = (*np.mean(rows, 0), np.nan)[:3]
        print(f"{f'{name} {len(rows)} photos':18}{ours:9.5f}{theirs:12.5f}{iou:14.4f}")


def accuracy():
    data = np.load(ROOT / "tests" / "reference" / "crf.npz")
    print(f"\n{'error to float64':18}{'ours':>9}{'pydensecrf':>12}{'IoU of ours':>14}")
    for name, settings in {"prob": (20.0, 13.0), "label": (15.0, 5.0)}.items():
        for k in range(2):
            image = torch.from_numpy(data[f"image{k}"]).permute(2, 0, 1)[None]
            prob = torch.from_numpy(data[f"prob{k}"])[None, None] / 255
            unary = prob if name == "prob" else hard_unary(prob > 0.5)
            got = dense_crf(image, unary, *settings)[0, 0].numpy()
            error = np.abs(got - data[f"exact_{name}{k}"].astype(np.float64)).mean()
            print(f"{f'{name} {k}':18}{error:9.5f}{data[f'pydensecrf_error_{name}{k}']:12.5f}")


def time_products(cases, device):
    """W v and W^T v with r functions of the place, milliseconds per photo: CSR and its rivals."""
    image = cases[0][0].to(device)
    print(
        f"\n{f'on {device}, ms':16}"
        + "".join(
            f"{name:>15}"
            for name in (
                "W, as used",
                "embedding_bag",
                "gather",
                "W^T, as used",
                "index_add",
                "segment_reduce",
            )
        )
    )
    for name, (sxy, srgb) in SETTINGS.items():
        vertex, share, blur = colour_grid(image, srgb)
        fy, fx = (f.to(device) for f in space_functions(*image.shape[2:], sxy))
        pixels = Pixels(vertex, share, len(blur), fy, fx, 1, fy.shape[1])
        phi, at, weight = pixels.phi(0), pixels.vertex, pixels.share[..., None]  # at [n, 4]
        table = pixels.splat @ phi  # [V, r]
        ends, entry = pixels.splat.crow_indices().long(), at.view(-1).argsort(stable=True)

        def index_add():
            return torch.zeros_like(table).index_add_(
                0, at.view(-1), (phi[:, None] * weight).flatten(0, 1)
            )

        def segment_reduce():
            sent = phi[entry // 4] * weight.flatten()[entry, None]
            return torch.segment_reduce(sent, "sum", offsets=ends)

        out = torch.empty_like(phi)
        ways = [
            lambda: torch.addmm(out, pixels.slice, table, beta=0, out=out),
            lambda: F.embedding_bag(at, table, per_sample_weights=pixels.share, mode="sum"),
            lambda: (table[at] * weight).sum(1),
            lambda: pixels.splat @ phi,
            index_add,
            segment_reduce,
        ]
        for way in ways:
            assert torch.allclose(way(), ways[ways.index(way) // 3 * 3](), atol=1e-3)

        def timed(way):
            way()
            if image.is_cuda:
                torch.cuda.synchronize()

        clock = seconds if image.is_cuda else processor_seconds
        spent = [1000 * statistics.median(clock(timed, way) for _ in range(9)) for way in ways]
        print(f"{name:16}" + "".join(f"{ms:15.2f}" for ms in spent))


def time_batches(cases, device):
    """Images per second, and the share of the time that the memory alone would need.

    A product with A reads 4 vertices and 4 shares of a pixel twice and streams its r functions of
    the place about five times; there are 11, one of them for the row sums.
    """

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    block = torch.zeros(2**28, dtype=torch.uint8, device=device)
    copies = [seconds(lambda: (block.clone(), wait())) for _ in range(7)]
    bandwidth = 2 * len(block) / min(copies)
    print(f"\n{f'on {device.type}':16}" + "".join(f"{f'batch {b}':>20}" for b in (1, 8, 32)))
    for name, settings in SETTINGS.items():
        cells = []
        for batch in (1, 8, 32):
            image, prob = (
                torch.cat([case[k] for case in cases] * 32)[:batch].to(device) for k in (0, 1)
            )
            unary = prob if name == "prob" else hard_unary(prob > 0.5)

            def run():
                dense_crf(image, unary, *settings, max_bytes=32e9)
                wait()

            run()
            spent = statistics.median(seconds(run) for _ in range(7))
            functions = space_functions(*image.shape[2:], settings[0])[0].shape[1]
            floor = 11 * prob.numel() * (64 + 20 * functions) / bandwidth
            cells.append(f"{batch / spent:.1f} /s ({floor / spent:.0%})")
        print(f"{name:16}" + "".join(f"{cell:>20}" for cell in cells))


def refine_large():
    """Time and memory of one image of 4,000 x 3,000 pixels, in this process alone."""
    (image, prob), *_ = load_cases(None, None)
    image, prob = (F.interpolate(t.float(), (3000, 4000), mode="bilinear") for t in (image, prob))
    spent = seconds(dense_crf, image.byte(), prob, photo_sxy(3000, 4000))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"4,000 x 3,000 pixels: {spent:.0f} s, {peak:.1f} GB at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", help="folder of photos")
    parser.add_argument("--masks", help="folder of their masks, for the accuracy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="also wall-clock time with so many threads")
    parser.add_argument("--large", action="store_true", help="only time a 4,000 x 3,000 image")
    options = parser.parse_args()
    if options.large:
        sys.exit(refine_large())
    rival, edge = (with_pydensecrf, 320) if pydensecrf else (with_exact_sums, None)
    print(f"other: {'pydensecrf' if pydensecrf else 'the exact sums, float32'}")
    time_cpu(load_cases(options.images, edge), rival, options.rounds)
    if options.threads:
        time_threads(load_cases(options.images, edge), rival, options.rounds, options.threads)
    accuracy()
    if options.images and options.masks:
        accuracy_on_photos(options.images, options.masks)
    torch.set_num_threads(1)
    time_products(load_cases(options.images, 320), torch.device("cpu"))
    if torch.cuda.is_available():
        time_products(load_cases(options.images, 320), torch.device("cuda"))
        time_batches(load_cases(options.images, 320), torch.device("cuda"))
    else:
        print("on CUDA: not run (no CUDA device)")

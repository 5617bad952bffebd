"""Time of the metrics per image, beside PySODMetrics if it is installed, else beside plain code.

    python tests/benchmarks/bench_metrics.py [--folders PRED GT] [--images 96] [--rounds 3]

Without folders the pairs are generated: an ellipse as mask, a shifted, soft, noisy ellipse as map.
In each round the one side scores all images, then the other, so that a busy machine slows both; an
entry is the median over images of the best of the rounds, on one CPU thread. Ours turns counts into
scores once per data set; that time, divided by the images, is added. From files, both sides decode
with the same function, which has a line of its own: no ratio can exceed (reference + that) / that.
Then whole folders (of five times as many generated pairs) are scored by one process and by one per
core, starting them included, and the counting of a batch is timed on the CPU and on CUDA. At the
end: the largest difference of a score of one image from PySODMetrics.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.datasets import load_grey
from common.metrics import Metrics, evaluate_folders, find_images, score_files
from common.weighted_f import weighted_f

try:
    import py_sod_metrics
except ImportError:
    py_sod_metrics = None


def generate(index: int, h: int = 300, w: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """One map and one mask, uint8 [h, w]; like a good map it is 0 on most of the background."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:h, :w]
    cy, cx = rng.uniform(0.3 * h, 0.7 * h), rng.uniform(0.3 * w, 0.7 * w)
    ry, rx = rng.uniform(0.1 * h, 0.35 * h), rng.uniform(0.1 * w, 0.3 * w)
    mask = np.hypot((y - cy) / ry, (x - cx) / rx) < 1
    soft = np.clip(640 * (1.3 - np.hypot((y - cy - 5) / ry, (x - cx + 5) / rx)), 0, 255)
    grey = np.clip(soft - rng.uniform(0, 20, (h, w)), 0, 255)
    return grey.astype(np.uint8), mask * np.uint8(255)


def ours(pred: np.ndarray, gt: np.ndarray, wf: bool) -> None:
    Metrics(wf).add(torch.from_numpy(pred), torch.from_numpy(gt > 128))


def ours_wf(pred: np.ndarray, gt: np.ndarray) -> None:
    weighted_f(torch.from_numpy(pred), torch.from_numpy(gt > 128), int(pred.min()), int(pred.max()))


def pysod(pred: np.ndarray, gt: np.ndarray, names: str) -> None:
    for name in names.split():
        measure = getattr(py_sod_metrics, name)()
        measure.step(pred, gt)
        measure.get_results()


def plain(pred: np.ndarray, gt: np.ndarray, names: str) -> None:
    """MAE, F and E threshold by threshold, as the formulas are printed (no S, no weighted F)."""
    t, g = pred / 255.0, gt > 128
    np.abs(t - g).mean()
    for threshold in range(256):
        b = pred >= threshold
        tp = (b & g).sum()
        tp / max(b.sum(), 1), tp / max(g.sum(), 1)
        x, y = b - b.mean(), g - g.mean()
        ((2 * x * y / (x * x + y * y + 1e-16) + 1) ** 2 / 4).sum()


def interleaved(functions: list, items: list, rounds: int) -> list[float]:
    """Median over items of the best time of each function, in milliseconds."""
    best = np.full((len(functions), len(items)), np.inf)
    for _ in range(rounds):
        for mine, function in zip(best, functions):
            for i, item in enumerate(items):
                start = time.perf_counter()
                function(*item)
                mine[i] = min(mine[i], time.perf_counter() - start)
    return (1000 * np.median(best, 1)).tolist()


def row(name: str, reference: float | None, mine: float) -> None:
    first = "-" if reference is None else f"{reference:.2f}"
    ratio = "" if reference is None else f"{reference / mine:6.1f}x"
    print(f"{name:44s} {first:>10} {mine:10.2f} {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folders", nargs=2, type=Path, metavar=("PRED", "GT"))
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.folders:
            args.folders = [Path(scratch) / name for name in ("pred", "gt")]
            for i in range(5 * args.images):
                for folder, pixels in zip(args.folders, generate(i)):
                    folder.mkdir(exist_ok=True)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        run(*args.folders, args.images, args.rounds)


def run(pred: Path, gt: Path, images: int, rounds: int) -> None:
    """Print the table for pairs of files with equal stems."""
    maps, masks = find_images(pred), find_images(gt)
    everything = [(maps[name], masks[name]) for name in sorted(maps.keys() & masks.keys())]
    files = everything[:images]
    pairs = [tuple(np.array(load_grey(path)) for path in pair) for pair in files]
    other, name = (pysod, "PySODMetrics") if py_sod_metrics else (plain, "plain code")
    print(
        f"{len(pairs)} pairs, the first {pairs[0][0].shape}, torch {torch.__version__}, "
        f"reference: {name}"
    )
    print(f"{'milliseconds per image':44s} {'reference':>10} {'ours':>10}   ratio")

    def decoding(*functions):
        return [
            lambda p, g, f=f: f(np.array(load_grey(p)), np.array(load_grey(g))) for f in functions
        ]

    metrics = Metrics()
    for p, g in pairs:
        metrics.add(torch.from_numpy(p), torch.from_numpy(g > 128))
    spent = interleaved([metrics.scores], [()], rounds)[0] / len(pairs)

    def compare(title, both, items):
        """A row whose ratio counts the scores, too."""
        reference, mine = interleaved(both, items, rounds)
        row(title, reference, mine + spent)

    quick, slow = "MAE Fmeasure Emeasure Smeasure", "WeightedFmeasure"
    both = [lambda p, g: other(p, g, quick), lambda p, g: ours(p, g, False)]
    compare("all but wF, in memory", both, pairs)
    compare("all but wF, from files", decoding(*both), files)
    if py_sod_metrics:
        both = [lambda p, g: other(p, g, slow), ours_wf]
        row("wF, in memory", *interleaved(both, pairs, rounds))
        rng = np.random.default_rng(0)
        noise = [(rng.integers(0, 256, p.shape, dtype=np.uint8), g) for p, g in pairs[:6]]
        row("wF of pure noise, in memory", *interleaved(both, noise, rounds))
        both = [lambda p, g: other(p, g, f"{quick} {slow}"), lambda p, g: ours(p, g, True)]
        compare("all, in memory", both, pairs)
        compare("all, from files", decoding(*both), files)
    row("decoding the two files", None, *interleaved(decoding(lambda p, g: None), files, rounds))
    row("scores from the counts, once per data set", None, spent)
    for wf in (True, False):

        def one():
            for pair in everything:
                score_files(pair, wf, True, "128", "bilinear", "keep")

        def cores():
            with contextlib.redirect_stderr(io.StringIO()):
                evaluate_folders(pred, gt, wf)

        spent = (ms / len(everything) for ms in interleaved([one, cores], [()], rounds))
        row(f"folder, one core / {os.cpu_count()} cores{'' if wf else ', no wF'}", *spent)

    p, g = (torch.from_numpy(pairs[0][i])[None].repeat(32, 1, 1) for i in (0, 1))
    batch = {"cpu": (p, g > 128)}
    if torch.cuda.is_available():
        batch["cuda"] = (p.to("cuda"), (g > 128).to("cuda"))
    for device, (p, g) in batch.items():
        spent = interleaved([lambda p, g: Metrics(wf=False).add(p, g)], [(p, g)], 5)[0] / 32
        row(f"counting in batches of 32 on {device}", None, spent)
    if "cuda" not in batch:
        print("counting in batches of 32 on cuda: not run (no CUDA device)")
    if py_sod_metrics:
        report_differences(metrics.per_image(), pairs)


def report_differences(scores: dict[str, torch.Tensor], pairs: list) -> None:
    """Print the largest difference from PySODMetrics over all images, for each score."""
    names = {
        "MAE": ("MAE",),
        "Smeasure": ("S",),
        "WeightedFmeasure": ("wF",),
        "Fmeasure": ("F_adp", "F_mean", "F_max"),
        "Emeasure": ("E_adp", "E_mean", "E_max"),
    }
    worst = dict.fromkeys((name for group in names.values() for name in group), 0.0)
    for i, (pred, gt) in enumerate(pairs):
        for measure, group in names.items():
            found = getattr(py_sod_metrics, measure)()
            found.step(pred, gt)
            (value,) = (v for key, v in found.get_results().items() if key != "pr")
            values = (
                [value]
                if len(group) == 1
                else [value["adp"], value["curve"].mean(), value["curve"].max()]
            )
            for name, expected in zip(group, values):
                difference = abs(scores[name][i].item() - expected)
                worst[name] = max(worst[name], difference, key=lambda v: (v != v, v))  # NaN first
    print(
        "largest difference per image: "
        + ", ".join(f"{name} {value:.0e}" for name, value in worst.items())
    )


if __name__ == "__main__":
    main()

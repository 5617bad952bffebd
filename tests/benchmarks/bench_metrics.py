"""Processor time of the metrics per image, beside PySODMetrics if it is installed.

    pip install pysodmetrics                                          # for this benchmark alone
    python tests/benchmarks/bench_metrics.py [--folders PRED GT] [--images N] [--cores]

Without folders the pairs are generated: an ellipse as mask, a shifted, soft, noisy ellipse as map.
Without PySODMetrics the reference is plain code, threshold by threshold, and has fewer rows.
In each round the one side scores all images, then the other, on one CPU thread; what is counted is
processor time, see turns.py. Printed are, for the median image, the fewest milliseconds of all
rounds, their ratio, and the ratio of the median rounds. PySODMetrics is used at its best: a pair is
normalised once for all measures, which are kept over the data set. Both sides turn what they
collected into scores once per data set; this time, divided by the images, is added. From files,
both sides read with the same functions (`load_map`, `load_mask`), which have a row of their own: no
ratio can exceed (reference + that) / that.
--cores also scores whole folders by one process and by one per core, starting them included; this
row is wall-clock time and needs an idle machine. At the end: the largest difference of a score of
one image from PySODMetrics.
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
sys.path.insert(0, str(Path(__file__).resolve().parent))
from turns import processor_ms, turns

from common.images import load_map, load_mask
from common.metrics import Metrics, evaluate_folders, find_images, score_files
from common.weighted_f import weighted_f

try:
    import py_sod_metrics
    from py_sod_metrics.utils import prepare_data
except ImportError:
    py_sod_metrics = None

QUICK, SLOW = ["MAE", "Fmeasure", "Emeasure", "Smeasure"], ["WeightedFmeasure"]


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


def read(pred: Path, gt: Path) -> tuple[np.ndarray, np.ndarray]:
    """A map and a mask, uint8 [h, w] each."""
    return np.array(load_map(pred)), load_mask(gt)[0].numpy()


# ---- Both sides: `add` a pair of uint8 arrays, then `results` ------------------------------------
class Ours:
    """All scores, or all but weighted F."""

    def __init__(self, wf: bool):
        self.wf, self.metrics = wf, Metrics(wf)

    def add(self, pred: np.ndarray, gt: np.ndarray) -> None:
        self.metrics.add(torch.from_numpy(pred), torch.from_numpy(gt > 128))

    def results(self) -> None:
        self.metrics.scores()


class PySOD:
    """Measures of PySODMetrics that share one normalisation of a pair."""

    def __init__(self, names: list[str]):
        self.measures = [getattr(py_sod_metrics, name)() for name in names]

    def add(self, pred: np.ndarray, gt: np.ndarray) -> None:
        pred, gt = prepare_data(pred, gt)
        for measure in self.measures:
            measure.step(pred, gt, normalize=False)

    def results(self) -> None:
        for measure in self.measures:
            measure.get_results()


class Plain:
    """MAE, F and E threshold by threshold, as the formulas are printed (no S, no weighted F)."""

    def add(self, pred: np.ndarray, gt: np.ndarray) -> None:
        t, g = pred / 255.0, gt > 128
        np.abs(t - g).mean()
        for threshold in range(256):
            b = pred >= threshold
            tp = (b & g).sum()
            tp / max(b.sum(), 1), tp / max(g.sum(), 1)
            x, y = b - b.mean(), g - g.mean()
            ((2 * x * y / (x * x + y * y + 1e-16) + 1) ** 2 / 4).sum()

    def results(self) -> None:
        pass


def ours_wf(pred: np.ndarray, gt: np.ndarray) -> None:
    """Weighted F alone."""
    weighted_f(torch.from_numpy(pred), torch.from_numpy(gt > 128), int(pred.min()), int(pred.max()))


# ---- Rows ----------------------------------------------------------------------------------------
def row(name: str, reference: np.ndarray | None, mine: np.ndarray) -> None:
    """Print a row from milliseconds [rounds, images] of both sides."""
    least = np.median(mine.min(0))
    if reference is None:
        print(f"{name:36s} {'-':>10} {least:8.2f}", flush=True)
        return
    ratio = np.median(reference.min(0)) / least
    usual = np.median(np.median(reference, 0)) / np.median(np.median(mine, 0))
    first = np.median(reference.min(0))
    print(f"{name:36s} {first:10.2f} {least:8.2f} {ratio:10.1f} {usual:10.1f}", flush=True)


def compare(name: str, reference, ours: Ours, pairs: list, files: list, rounds: int) -> None:
    """Rows in memory and from files, with the scores of the data set."""
    sides = (reference, ours)

    def from_files(side):
        return lambda pred, gt: side.add(*read(pred, gt))

    in_memory = turns([side.add for side in sides], pairs, rounds)
    read_too = turns([from_files(side) for side in sides], files, rounds)
    added = 2 * (rounds + 1) * len(pairs)  # how many pairs each side has by now
    for k, side in enumerate(sides):
        spent = min(processor_ms(side.results) for _ in range(rounds)) / added
        in_memory[k] += spent
        read_too[k] += spent
    row(f"{name}, in memory", *in_memory)
    row(f"{name}, from files", *read_too)


def cores(pred: Path, gt: Path, everything: list) -> None:
    """Wall-clock time of a folder by one process and by one per core."""

    def one(wf):
        for pair in everything:
            score_files(pair, wf, True, "128", "bilinear", "keep")

    def all_cores(wf):
        with contextlib.redirect_stderr(io.StringIO()):
            evaluate_folders(pred, gt, wf)

    for wf in (True, False):
        best = []
        for way in (one, all_cores):
            spent = []
            for _ in range(3):
                start = time.perf_counter()
                way(wf)
                spent.append(time.perf_counter() - start)
            best.append(1000 * min(spent) / len(everything))
        print(
            f"folder{'' if wf else ', no wF'}, wall clock: {best[0]:.2f} ms per image on one core, "
            f"{best[1]:.2f} on {os.cpu_count()}, {best[0] / best[1]:.1f} times faster"
        )


def run(pred: Path, gt: Path, args: argparse.Namespace) -> None:
    """Print the table for pairs of files with equal stems."""
    maps, masks = find_images(pred), find_images(gt)
    everything = [(maps[name], masks[name]) for name in sorted(maps.keys() & masks.keys())]
    files = everything[: args.images]
    pairs = [read(*pair) for pair in files]
    name = "PySODMetrics" if py_sod_metrics else "plain code"
    print(
        f"{len(pairs)} pairs, the first {pairs[0][0].shape}, torch {torch.__version__}, one "
        f"thread, reference: {name}, load of the machine {os.getloadavg()[0]:.1f}"
    )
    print(f"{'processor time, ms per image':36s} {'reference':>10} {'ours':>8}", end=" ")
    print(f"{'of minima':>10} {'of medians':>10}")

    quick = PySOD(QUICK) if py_sod_metrics else Plain()
    compare("all but wF", quick, Ours(False), pairs, files, args.rounds)
    if py_sod_metrics:
        compare("all", PySOD(QUICK + SLOW), Ours(True), pairs, files, args.rounds)
        functions = [PySOD(SLOW).add, ours_wf]
        row("wF, in memory", *turns(functions, pairs, args.rounds))
        rng = np.random.default_rng(0)
        noise = [(rng.integers(0, 256, p.shape, dtype=np.uint8), g) for p, g in pairs[:6]]
        row("wF of pure noise, in memory", *turns(functions, noise, args.rounds))
    row("reading the two files", None, turns([read], files, args.rounds)[0])

    p, g = (torch.from_numpy(pairs[0][i])[None].repeat(32, 1, 1) for i in (0, 1))
    row("counting in batches of 32", None, counting(p, g > 128, args.rounds))
    if torch.cuda.is_available():
        row("the same on CUDA", None, counting(p.to("cuda"), (g > 128).to("cuda"), args.rounds))
    if args.cores:
        cores(pred, gt, everything)
    if py_sod_metrics:
        report_differences(pairs)


def counting(pred: torch.Tensor, gt: torch.Tensor, rounds: int) -> np.ndarray:
    """Milliseconds per image [rounds, 1] of a batch; the results reach the CPU, so it waits."""
    add = lambda p, g: Metrics(wf=False).add(p, g)  # noqa: E731
    return turns([add], [(pred, gt)], rounds)[0] / len(pred)


def report_differences(pairs: list) -> None:
    """Print the largest difference from PySODMetrics over all images, for each score."""
    metrics = Metrics()
    for pred, gt in pairs:
        metrics.add(torch.from_numpy(pred), torch.from_numpy(gt > 128))
    scores = metrics.per_image()
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
            values = [value]
            if len(group) > 1:
                values = [value["adp"], value["curve"].mean(), value["curve"].max()]
            for name, expected in zip(group, values):
                difference = abs(scores[name][i].item() - expected)
                worst[name] = max(worst[name], difference, key=lambda v: (v != v, v))  # NaN first
    print(
        "largest difference per image: "
        + ", ".join(f"{name} {value:.0e}" for name, value in worst.items())
    )


def main() -> None:
    """Make the pairs if none are given, and time them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folders", nargs=2, type=Path, metavar=("PRED", "GT"))
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", action="store_true", help="also wall-clock time on all cores")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if not args.folders:
            args.folders = [Path(scratch) / name for name in ("pred", "gt")]
            for i in range(10 * args.images if args.cores else args.images):
                for folder, pixels in zip(args.folders, generate(i)):
                    folder.mkdir(exist_ok=True)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        run(*args.folders, args)


if __name__ == "__main__":
    main()

"""Scores of saliency maps: MAE, F, E, S, weighted F, IoU, and precision-recall curves.

    python -m common.metrics PRED GT                     # two folders, files paired by stem
    python -m common.metrics ours/ theirs/ GT --latex    # several methods, the same masks

    metrics = Metrics()
    metrics.add(to_uint8(prob), mask > 0)                # [B, H, W] on any device, batch by batch
    print(table({"ECSSD": metrics.scores()}))

A map has grey levels v = 0..255, a mask G is boolean, N is the number of pixels, e = 2^-52. Every
map is first stretched to its full range, t = (v - min) / (max - min); for a constant map, and for
every map with `stretch=False`, t = v / 255. B is the binarised map, B = (t >= threshold). A score
is computed for each image; the score of a data set is the plain mean over its images.

  MAE   mean |t - G|                                                    [Perazzi, CVPR 2012]
  F     1.3 P R / (0.3 P + R), precision P = TP / (TP + FP), recall R = TP / (TP + FN);
        0 wherever a denominator is 0                                   [Achanta, CVPR 2009]
  E     sum over pixels of (a + 1)^2 / 4, divided by N - 1; a = 2xy / (x^2 + y^2 + e) compares
        x = B - mean B with y = G - mean G                              [Fan, IJCAI 2018]
  S     (S_object + S_region) / 2 of grey maps, see `s_measure`         [Fan, ICCV 2017]
  wF    F whose errors are weighted by their place, see weighted_f.py   [Margolin, CVPR 2014]
  IoU   TP / (TP + FP + FN) of t > 0.5; 0 if both are empty

F and E need a threshold, so there are three versions of each:
  _mean  the mean over the 256 thresholds 0/255 .. 255/255
  _max   the best single threshold for the whole data set: the maximum of the averaged curve
  _adp   the adaptive threshold min(2 mean(t), 1), which differs from image to image
Papers call both _mean and _adp "average F" (the code released with A2S computes _adp). Numbers
can be compared only if version, stretching, rounding to 8 bits and resizing are the same.

Every score except wF can be computed from a joint histogram of map, mask and block: how many
pixels lie in block k of S, in class G, at grey level v. `count` makes these 4 x 2 x 256 numbers in
one pass. The rest is arithmetic on them, and they can be stored, sent between processes and merged.

The values equal those of PySODMetrics 1.6 to 1e-9, except where it fails or depends on rounding:
a block of S without pixels counts 0 (there NaN), a block of one grey level has no variance, a
level equal to the adaptive threshold is above it, and E of a single pixel is divided by 1, not 0.
"""

import argparse
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.curves import write_curves
from common.datasets import SUFFIXES, by_name, pictures
from common.images import load_map, load_mask
from common.runtime import UserError, cli, parallel_map, progress, save_csv, save_json, say
from common.weighted_f import FAR, weighted_f

EPS = 2.0**-52
BETA2 = 0.3  # of F: a value below 1 gives precision more weight than recall
NAMES = ("MAE", "F_mean", "F_adp", "F_max", "E_mean", "E_adp", "E_max", "S", "wF", "IoU")


def to_uint8(prob: Tensor) -> Tensor:
    """Probabilities of any shape to the nearest grey levels 0..255, as a PNG stores them.

    Values outside [0, 1] are clamped, as resizing may overshoot. Raises ValueError for NaN.
    """
    if prob.isnan().any():
        raise ValueError("the prediction contains NaN and cannot be scored")
    return (prob.float().clamp(0, 1) * 255).round().to(torch.uint8)


# ---- Pixels to counts ----------------------------------------------------------------------------
def count(pred: Tensor, gt: Tensor) -> Tensor:
    """Joint histogram of each image: uint8 and bool [B, H, W] -> int32 [B, 4, 2, 256] on the CPU.

    Axes: block of S (top left, top right, bottom left, bottom right), class (background,
    foreground), grey level. The four blocks meet at the foreground's centre of mass.
    """
    b, h, w = pred.shape
    y = torch.arange(h, device=gt.device)
    x = torch.arange(w, device=gt.device)

    # The centre of mass. Halves are rounded to even numbers.
    in_row = gt.sum(2, dtype=torch.int32)  # [B, H]
    in_col = gt.sum(1, dtype=torch.int32)  # [B, W]
    n_fg = in_row.sum(1, keepdim=True).clamp(min=1).cpu().double()  # [B, 1]
    cy = ((in_row * y).sum(1, keepdim=True).cpu() / n_fg).round().to(y)
    cx = ((in_col * x).sum(1, keepdim=True).cpu() / n_fg).round().to(x)

    # Every pixel gets the number of its bin, of 2048 per image; int16 holds those of 15 images.
    # The top left block includes the centre.
    kind = torch.int16 if b < 16 else torch.int32
    image = torch.arange(b, device=gt.device, dtype=kind)[:, None]
    row = 2048 * image + 1024 * (y > cy).to(kind)  # [B, H]
    key = row[:, :, None] + 512 * (x > cx).to(kind)[:, None]  # [B, H, W]
    key.add_(gt, alpha=256).add_(pred)
    counts = torch.bincount(key.flatten(), minlength=2048 * b)
    return counts.view(b, 4, 2, 256).int().cpu()


def value_range(counts: Tensor, stretch: bool) -> tuple[Tensor, Tensor]:
    """The grey levels that become t = 0 and t = 1: counts [N, 4, 2, 256] -> two int64 [N]."""
    used = (counts.sum((1, 2)) > 0).int()  # [N, 256]
    low = used.argmax(1)
    high = 255 - used.flip(1).argmax(1)
    fixed = (low == high) | (not stretch)
    return torch.where(fixed, 0, low), torch.where(fixed, 255, high)


# ---- Counts to scores ----------------------------------------------------------------------------
def score_images(counts: Tensor, stretch: bool) -> dict[str, Tensor]:
    """Per image: NAMES but wF, float64 [N]; precision, recall, F, E at thresholds 255..0, [N, 256].

    counts: int32 [N, 4, 2, 256] from `count`.
    """
    low, high = (level[:, None].double() for level in value_range(counts, stretch))  # [N, 1]
    v = torch.arange(256, dtype=torch.float64)
    # This order of operations gives trunc(255 t) below the same value as in the reference.
    t = ((v / 255 - low / 255) / (high / 255 - low / 255)).clamp(0, 1)  # [N, 256]
    counts = counts.double()
    bg, fg = counts.sum(1).unbind(1)  # [N, 256]
    n_fg = fg.sum(1, keepdim=True)  # [N, 1]
    n = (bg + fg).sum(1, keepdim=True)  # [N, 1]

    # Curves: column i counts the pixels with trunc(255 t) >= 255 - i.
    level = (t * 255).long()

    def at_least(pixels: Tensor) -> Tensor:
        return torch.zeros_like(t).scatter_add_(1, level, pixels).flip(1).cumsum(1)

    tp = at_least(fg)  # [N, 256]
    fp = at_least(bg)
    precision, recall, f = f_measure(tp, fp, n_fg)
    e = e_measure(tp, fp, n_fg, n)

    # The adaptive threshold: t >= min(2 mean(t), 1), times n (high - low) on both sides, so that
    # only whole numbers are compared and ties are exact.
    rise = v - low
    twice_mean = 2 * ((bg + fg) * rise).sum(1, keepdim=True)
    adaptive = n * rise >= torch.minimum(twice_mean, n * (high - low))  # [N, 256]
    tp = (fg * adaptive).sum(1, keepdim=True)  # [N, 1]
    fp = (bg * adaptive).sum(1, keepdim=True)
    f_adp = f_measure(tp, fp, n_fg)[2]
    e_adp = e_measure(tp, fp, n_fg, n)

    # IoU = TP / (TP + FP + FN), and TP + FN is the foreground.
    tp = (fg * (t > 0.5)).sum(1, keepdim=True)  # [N, 1]
    fp = (bg * (t > 0.5)).sum(1, keepdim=True)
    iou = divide(tp, fp + n_fg)
    return {
        "MAE": (bg * t + fg * (1 - t)).sum(1) / n[:, 0],
        "S": s_measure(counts, t),
        "F_mean": f.mean(1),
        "F_adp": f_adp[:, 0],
        "F_max": f.amax(1),
        "E_mean": e.mean(1),
        "E_adp": e_adp[:, 0],
        "E_max": e.amax(1),
        "IoU": iou[:, 0],
        "precision": precision,
        "recall": recall,
        "F": f,
        "E": e,
    }


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0; a is then 0, too, wherever this is called."""
    return a / torch.where(b == 0, 1, b)


def f_measure(tp: Tensor, fp: Tensor, n_fg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F from numbers of pixels: tp, fp [N, K], n_fg [N, 1] -> [N, K] each."""
    precision = divide(tp, tp + fp)
    recall = divide(tp, n_fg)
    f = divide((1 + BETA2) * precision * recall, BETA2 * precision + recall)
    return precision, recall, f


def e_measure(tp: Tensor, fp: Tensor, n_fg: Tensor, n: Tensor) -> Tensor:
    """E from numbers of pixels: tp, fp [N, K], n_fg, n [N, 1] -> [N, K].

    B and G are binary, so there are only four kinds of pixels, and all of a kind have the same
    summand. For an empty (full) mask the sum is the number of pixels that B calls background
    (foreground).
    """
    mean_b = (tp + fp) / n
    mean_g = n_fg / n
    fn = n_fg - tp
    tn = n - n_fg - fp
    total = torch.zeros_like(tp)
    for b, g, pixels in ((1, 1, tp), (1, 0, fp), (0, 1, fn), (0, 0, tn)):
        x = b - mean_b
        y = g - mean_g
        total += pixels * (2 * x * y / (x * x + y * y + EPS) + 1) ** 2 / 4

    total = torch.where(n_fg == 0, n - tp - fp, total)
    total = torch.where(n_fg == n, tp + fp, total)
    return total / (n - 1).clamp(min=1)


def s_measure(counts: Tensor, t: Tensor) -> Tensor:
    """S = max(0, (S_object + S_region) / 2): counts float64 [N, 4, 2, 256], t [N, 256] -> [N].

    S_object is the mean of O(t) on the foreground and O(1 - t) on the background, S_region the
    mean of the similarities of map and mask in the four blocks; both are weighted by area.
    For an empty (full) mask S is 1 - mean t (mean t).
    """
    bg, fg = counts.sum(1).unbind(1)  # [N, 256]
    n_fg = fg.sum(1)  # [N]
    n = (bg + fg).sum(1)

    share = n_fg / n
    s_object = share * object_score(fg, t) + (1 - share) * object_score(bg, 1 - t)
    area = counts.sum((2, 3)) / n[:, None]  # [N, 4]
    s_region = (area * block_similarity(counts, t[:, None])).sum(1)
    s = ((s_object + s_region) / 2).clamp(min=0)

    mean = ((bg + fg) * t).sum(1) / n
    s = torch.where(n_fg == 0, 1 - mean, s)
    return torch.where(n_fg == n, mean, s)


def object_score(pixels: Tensor, value: Tensor) -> Tensor:
    """O = 2m / (m^2 + 1 + sd): pixels [N, 256], value [N, 256] -> [N].

    value[:, i] occurs pixels[:, i] times. m is the mean, sd the standard deviation with the divisor
    n - 1 (0 for one pixel).
    """
    n = pixels.sum(1)
    m = divide((pixels * value).sum(1), n)
    variance = (pixels * (value - m[:, None]) ** 2).sum(1) / (n - 1).clamp(min=1)
    return 2 * m / (m * m + 1 + variance.sqrt())


def block_similarity(counts: Tensor, t: Tensor) -> Tensor:
    """4xyc / ((x^2 + y^2)(c_x + c_y)) in each block: [N, 4, 2, 256], t [N, 1, 256] -> [N, 4].

    x, y: means of t and G in the block; c_x, c_y, c: variances and covariance, divisor n - 1.
    1 if the denominator is 0: both are constant (whatever the constants), or both are empty.
    """
    bg, fg = counts.unbind(2)  # [N, 4, 256]
    both = bg + fg
    n_bg = bg.sum(2)  # [N, 4]
    n_fg = fg.sum(2)
    n = n_bg + n_fg
    x = divide((both * t).sum(2), n)
    y = divide(n_fg, n)

    # In floating point the mean of a constant may differ from it; its deviation is set to 0.
    constant = (both > 0).sum(2, keepdim=True) == 1
    dx = torch.where(constant, 0, t - x[..., None])  # [N, 4, 256]

    free = (n - 1).clamp(min=1)
    c_x = (both * dx**2).sum(2) / free
    c_y = (n_fg * (1 - y) ** 2 + n_bg * y**2) / free
    c = ((fg * dx).sum(2) * (1 - y) - (bg * dx).sum(2) * y) / free
    top = 4 * x * y * c
    bottom = (x**2 + y**2) * (c_x + c_y)
    return torch.where(top != 0, top / (bottom + EPS), (bottom == 0).double())


# ---- The scores of a data set --------------------------------------------------------------------
class Metrics:
    """Collects what the scores need from predictions and masks, 8 KB per image.

    wf=False leaves out weighted F, which takes most of the time. stretch=False scores t = v / 255.
    """

    def __init__(self, wf: bool = True, stretch: bool = True):
        self.wf, self.stretch = wf, stretch
        # numpy arrays, because every tensor sent to another process costs an open file
        self._counts: list[np.ndarray] = []  # int32 [b, 4, 2, 256]
        self._wf: list[float] = []

    def add(self, pred: Tensor, gt: Tensor) -> None:
        """Add pred uint8 and gt bool, both [B, H, W] or [H, W]; ValueError for anything else.

        They are counted on their device; weighted F is computed on the CPU.
        """
        fits = pred.dtype == torch.uint8 and gt.dtype == torch.bool and pred.shape == gt.shape
        if not fits or pred.dim() not in (2, 3) or pred.numel() == 0:
            raise ValueError(
                "prediction and mask must be uint8 and bool, both [B, H, W] or [H, W] and not "
                f"empty, but are {pred.dtype} {list(pred.shape)} and {gt.dtype} {list(gt.shape)}; "
                "see to_uint8"
            )
        pred = pred.reshape(-1, *pred.shape[-2:])  # [B, H, W]
        gt = gt.reshape(-1, *gt.shape[-2:])

        # On the CPU one image at a time is faster, as it fits the cache.
        size = 1 if pred.device.type == "cpu" else len(pred)
        counts = torch.cat([count(p, g) for p, g in zip(pred.split(size), gt.split(size))])
        self._counts.append(counts.numpy())
        if self.wf:
            low, high = value_range(counts, self.stretch)
            images = zip(pred.cpu(), gt.cpu(), low.tolist(), high.tolist())
            self._wf += [weighted_f(*image) for image in images]

    def merge(self, other: "Metrics") -> None:
        """Append the images of another `Metrics` (of another process: it can be pickled).

        Raises ValueError if the two have different options.
        """
        if (self.wf, self.stretch) != (other.wf, other.stretch):
            raise ValueError("metrics with different options (wf, stretch) cannot be merged")
        self._counts += other._counts
        self._wf += other._wf

    def _images(self) -> dict[str, Tensor]:
        """`score_images` of everything, and wF."""
        if not self._counts:
            raise UserError("there is no pair of map and mask to score")
        counts = torch.from_numpy(np.concatenate(self._counts))
        parts = [score_images(part, self.stretch) for part in counts.split(256)]
        images = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.wf:
            images["wF"] = torch.tensor(self._wf, dtype=torch.float64)
        return images

    def per_image(self) -> dict[str, Tensor]:
        """float64 [n] for each of NAMES, in the order of `add`; without wF if wf=False.

        F_max and E_max use the best threshold of each image: their means exceed those of `scores`.
        """
        images = self._images()
        return {name: images[name] for name in NAMES if name in images}

    def curves(self) -> dict[str, Tensor]:
        """precision, recall, F, E at thresholds 255..0, means over images: float64 [256] each."""
        images = self._images()
        return {name: images[name].mean(0) for name in ("precision", "recall", "F", "E")}

    def scores(self) -> dict[str, float | None]:
        """n and NAMES, means over images; wF is None if wf=False. UserError without images."""
        images = self._images()
        result = {"n": len(images["MAE"])}
        for name in NAMES:
            result[name] = images[name].mean().item() if name in images else None
        for name in ("F", "E"):  # one threshold for all images, not the best of each
            result[f"{name}_max"] = images[name].mean(0).max().item()
        return result


# ---- Tables --------------------------------------------------------------------------------------
def table(results: Mapping[str, Mapping], style: str = "text", mark_best: bool = False) -> str:
    """{row title: scores} as a table with three decimals; style: text, markdown or latex.

    mark_best: markdown and LaTeX show the best of each column bold (rows are rivals, not sets).
    """
    make, bold = {
        "text": (text_table, "{}"),
        "markdown": (markdown_table, "**{}**"),
        "latex": (latex_table, r"\textbf{{{}}}"),
    }[style]
    return make(rows_of(results, bold if mark_best else "{}"))


def rows_of(results: Mapping[str, Mapping], bold: str) -> list[list[str]]:
    """The header and a row of cells per title; `bold` is the form of the best of each column."""
    titles = ["", *results]
    counts = ["n", *(str(scores["n"]) for scores in results.values())]
    columns = [titles, counts]
    for name in NAMES:
        values = [scores[name] for scores in results.values()]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        best = min(cells, default="") if name == "MAE" else max(cells, default="")
        if None not in values:
            cells = [bold.format(cell) if cell == best else cell for cell in cells]
        columns.append([name, *cells])
    return [list(row) for row in zip(*columns)]


def escaped(rows: list[list[str]], special: str) -> list[list[str]]:
    """The cells with a backslash before every special letter."""

    def escape(cell: str) -> str:
        return "".join("\\" + letter if letter in special else letter for letter in cell)

    return [[escape(cell) for cell in row] for row in rows]


def aligned(rows: list[list[str]]) -> list[list[str]]:
    """Cells of equal width in each column: titles to the left, numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    return [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        for row in rows
    ]


def text_table(rows: list[list[str]]) -> str:
    """For the terminal."""
    return "\n".join("  ".join(row) for row in aligned(rows))


def markdown_table(rows: list[list[str]]) -> str:
    """For a README."""
    head, *body = aligned(escaped(rows, "|"))
    rule = ["-" * len(head[0]), *("-" * (len(cell) - 1) + ":" for cell in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def latex_table(rows: list[list[str]]) -> str:
    """For a paper."""
    head, *body = [" & ".join(row) + r" \\" for row in aligned(escaped(rows, "_&%#$"))]
    begin = r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}"
    return "\n".join([begin, head, r"\hline", *body, r"\end{tabular}"])


# ---- Folders -------------------------------------------------------------------------------------
def find_images(folder: str | Path) -> dict[str, Path]:
    """{path below `folder` without suffix: file}, with sub-folders.

    What is left out is said on stderr. Raises UserError if there is no picture, or if two differ
    only in the suffix.
    """
    rows = []
    left_out = []
    for base, files in pictures(Path(folder), left_out):
        below = base.relative_to(folder).parts
        rows += [([], below, base / file) for file in files]
    if left_out:
        file, reason = left_out[0]
        say(
            f"{folder}: {len(rows)} pictures; {len(left_out)} left out (the first: {file}, "
            f"{reason})",
            error=True,
        )
    if not rows:
        raise UserError(f"{folder} is not a folder with images ({', '.join(SUFFIXES)})")
    return by_name(rows)


def load_foreground(path: Path, gt_rule: str) -> np.ndarray:
    """The foreground of a mask, bool [H, W].

    gt_rule: '128' decides as the data sets do (`load_mask`: grey above 128, but also masks of 0 and
    1, painted ones, and more); 'half' takes what is above half of the mask's maximum.
    """
    if gt_rule == "128":
        return load_mask(path)[0].numpy() > 0
    levels = np.asarray(load_map(path))
    return levels > levels.max() / 2


def score_files(
    pair: tuple[Path, Path], wf: bool, stretch: bool, gt_rule: str, resize: str, empty: str
) -> tuple[Metrics | None, dict[str, str]]:
    """Metrics of one map and mask (None if they are not scored), and {problem: what it is}.

    A cut-out (RGBA) given as a map is read by its alpha. For the options see `evaluate_folders`.
    """
    try:
        grey = load_map(pair[0])
        inside = load_foreground(pair[1], gt_rule)
    except UserError as error:
        return None, {"unreadable": str(error)}
    height, width = inside.shape
    if wf and max(height, width) >= FAR:
        return None, {
            "unreadable": f"{pair[1]} has {max(height, width)} pixels on a side, too many for wF; "
            "leave wF out with --no-wf"
        }

    low, high = grey.getextrema()
    found = {
        "resized": grey.size != (width, height),
        "empty mask": not inside.any(),
        "full mask": inside.all(),
        "constant map": low == high,
    }
    notes = {problem: "" for problem, holds in found.items() if holds}
    if empty == "skip" and "empty mask" in notes:
        return None, notes

    if "resized" in notes:
        grey = grey.resize((width, height), Image.Resampling[resize.upper()])
    metrics = Metrics(wf, stretch)
    metrics.add(torch.from_numpy(np.array(grey)), torch.from_numpy(inside))
    return metrics, notes


def evaluate_folders(
    pred: str | Path,
    gt: str | Path,
    wf: bool = True,
    stretch: bool = True,
    gt_rule: str = "128",
    resize: str = "bilinear",
    empty: str = "keep",
) -> tuple[Metrics, list[str], dict[str, list[str]]]:
    """Score the maps in `pred` against the masks in `gt`, paired by stem, on all cores.

    gt_rule: what is foreground, '128' or 'half', see `load_foreground`. resize: the filter for a
    map of another size than its mask. empty: 'keep' or 'skip' empty masks.
    Returns the metrics, the stems scored, {problem: files}. Raises UserError if nothing pairs up.
    """
    maps = find_images(pred)
    masks = find_images(gt)
    names = sorted(maps.keys() & masks.keys())
    if not names:
        raise UserError(f"no file in {pred} has the stem of a mask in {gt}; check both folders")
    report = {
        "missing": sorted(masks.keys() - maps.keys()),
        "unreadable": [],
        "extra": sorted(maps.keys() - masks.keys()),
        "resized": [],
        "empty mask": [],
        "full mask": [],
        "constant map": [],
    }
    score = partial(
        score_files, wf=wf, stretch=stretch, gt_rule=gt_rule, resize=resize, empty=empty
    )
    pairs = [(maps[name], masks[name]) for name in names]
    total = Metrics(wf, stretch)
    scored = []

    # One image per core is faster than all cores on one image.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = progress(parallel_map(score, pairs, processes=True), str(pred), len(names))
        for name, (metrics, notes) in zip(names, results):
            for problem, reason in notes.items():
                report[problem].append(reason or name)
            if metrics:
                total.merge(metrics)
                scored.append(name)
    except BrokenProcessPool:
        raise UserError(
            f"a process that scored {pred} was killed, most likely because the memory is full: end "
            "other programs, or score smaller pictures"
        ) from None
    finally:
        torch.set_num_threads(threads)
    return total, scored, report


def show_report(report: dict[str, list[str]]) -> None:
    """Print what was found in a folder; what its masks and the broken files are goes to stderr."""
    for problem, files in report.items():
        count = f"  {len(files)} {problem}"
        if not files:
            continue
        if problem == "unreadable":
            for reason in files:
                say(f"  unreadable: {reason}", error=True)
        elif problem == "missing":
            say(f"{count}: {', '.join(files)}")
        else:
            more = ", ..." if len(files) > 4 else ""
            on_stderr = problem in ("empty mask", "full mask")
            say(f"{count}: {', '.join(files[:4])}{more}", error=on_stderr)


# ---- Command line --------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m common.metrics`."""
    parser = argparse.ArgumentParser("python -m common.metrics", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("pred", nargs="+", type=Path, help="folder of maps or cut-outs; several are compared")
    add("gt", type=Path, help="folder of masks with the same stems")
    add(
        "--gt-rule",
        choices=("128", "half"),
        default="128",
        help="128: masks are read as in data sets, grey is foreground above 128; half: above half "
        "of the mask's maximum [128]",
    )
    add(
        "--resize",
        choices=("bilinear", "bicubic", "nearest"),
        default="bilinear",
        help="filter for maps of another size than their mask [bilinear]",
    )
    add("--no-stretch", dest="stretch", action="store_false", help="score v / 255, no stretching")
    add(
        "--empty",
        choices=("keep", "skip"),
        default="keep",
        help="images with an empty mask, whose F, wF and IoU are 0 [keep]",
    )
    add("--no-wf", dest="wf", action="store_false", help="leave out weighted F, for speed")
    add("--allow-missing", action="store_true", help="score what can be read, whatever is missing")
    add("--json", type=Path, metavar="FILE", help="write the scores; of several folders, by folder")
    add("--csv", type=Path, metavar="FILE", help="write the scores of each image")
    add(
        "--curves",
        type=Path,
        metavar="FILE",
        help="draw precision-recall, F and E curves (.svg), or write their numbers (.csv)",
    )
    add("--markdown", dest="style", action="store_const", const="markdown", default="text")
    add("--latex", dest="style", action="store_const", const="latex")
    return parser


def csv_rows(title: str, names: list[str], metrics: Metrics) -> list[list]:
    """The scores of each image of a folder, a row per image; wF is empty if it was left out."""
    images = {name: values.tolist() for name, values in metrics.per_image().items()}
    blank = [""] * len(names)
    return [[title, *row] for row in zip(names, *(images.get(name, blank) for name in NAMES))]


def main(argv: list[str] | None = None) -> None:
    """Score folders, print a report and a table; UserError if a pair cannot be scored."""
    args = build_parser().parse_args(argv)
    if args.curves and args.curves.suffix.lower() not in (".svg", ".csv"):
        raise UserError(f"--curves {args.curves} must end in .svg or .csv")
    files = [file for file in (args.json, args.csv, args.curves) if file]
    if len(set(files)) < len(files):
        raise UserError("--json, --csv and --curves must name different files")

    options = {name: getattr(args, name) for name in ("gt_rule", "stretch", "resize", "empty")}
    results = {}
    curves = {}
    rows = [["folder", "image", *NAMES]]
    lost = 0
    for folder in args.pred:
        metrics, names, report = evaluate_folders(folder, args.gt, args.wf, **options)
        say(f"{folder}: {len(names)} images")
        show_report(report)
        lost += len(report["missing"]) + len(report["unreadable"])
        title = folder.as_posix()
        results[title] = metrics.scores() | {"options": options}
        if args.curves:
            curves[title] = metrics.curves()
        if args.csv:
            rows += csv_rows(title, names, metrics)
    if lost and not args.allow_missing:
        raise UserError(
            f"{lost} of the pairs of map and mask cannot be scored (listed above), and "
            "the scores of the others would not compare; complete the folders or use "
            "--allow-missing"
        )

    stretched = "stretched" if args.stretch else "not stretched"
    say(
        f"options: mask > {args.gt_rule}, {stretched}, resize {args.resize}, empty masks "
        f"{args.empty}; beta^2 is 0.3 in F, 1 in wF; IoU at 0.5"
    )
    say(table(results, args.style, mark_best=len(results) > 1))
    if args.json:
        save_json(args.json, results if len(results) > 1 else results[title])
    if args.csv:
        save_csv(args.csv, rows)
    if args.curves:
        write_curves(args.curves, curves)


if __name__ == "__main__":
    cli(main)

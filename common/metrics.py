"""Scores of saliency maps: MAE, F, E, S, weighted F, IoU, and precision-recall curves.

    python -m common.metrics PRED GT                     # two folders, files paired by stem
    python -m common.metrics ours/ theirs/ GT --latex    # several methods, the same masks

    metrics = Metrics()
    metrics.add(to_uint8(prob), mask > 0)                # [B, H, W] on any device, batch by batch
    print(table({"ECSSD": metrics.scores()}))

A map has grey levels v = 0..255, a mask G is boolean, N is the number of pixels, e = 2^-52. Every
map is first stretched to its full range, t = (v - min) / (max - min); a constant map, and every
map with `stretch=False`, is t = v / 255. B is the map made binary, B = (t >= threshold). A score
is computed for each image; the score of a data set is the plain mean over its images.

  MAE   mean |t - G|                                                    [Perazzi, CVPR 2012]
  F     1.3 P R / (0.3 P + R), precision P = TP / (TP + FP), recall R = TP / (TP + FN);
        0 wherever a denominator is 0                                   [Achanta, CVPR 2009]
  E     sum over pixels of (a + 1)^2 / 4, divided by N - 1; a = 2xy / (x^2 + y^2 + e) compares
        x = B - mean B with y = G - mean G                              [Fan, IJCAI 2018]
  S     (S_object + S_region) / 2 of grey maps, see `s_measure`         [Fan, ICCV 2017]
  wF    F with errors weighted by their place, see weighted_f.py        [Margolin, CVPR 2014]
  IoU   TP / (TP + FP + FN) of t > 0.5; 0 if both are empty

F and E need a threshold, hence three versions of each:
  _mean  mean over the 256 thresholds 0/255 .. 255/255
  _max   best single threshold for the whole data set: the maximum of the averaged curve
  _adp   adaptive threshold min(2 mean(t), 1), another one for every image
Papers call both _mean and _adp "average F" (the code released with A2S computes _adp). Numbers
compare only if version, stretching, rounding to 8 bits and resizing are the same.

No score but wF needs the image, only a joint histogram of it: how many pixels lie in block k of
S, in class G, at level v. `count` makes these 4 x 2 x 256 numbers in one pass, the rest is
arithmetic on them, and they can be stored, sent between processes and merged.

The values are those of PySODMetrics 1.6 to 1e-9, except where it fails or depends on rounding:
a block of S without pixels counts 0 (there NaN), a block of one grey level has no variance, a
level equal to the adaptive threshold is above it, E of a single pixel is divided by 1, not by 0.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.curves import write_curves
from common.datasets import SUFFIXES, by_name, load_grey, pictures
from common.runtime import UserError, cli, parallel_map, progress, save_csv, save_json
from common.weighted_f import FAR, weighted_f

EPS = 2.0**-52
BETA2 = 0.3  # in F; below 1 precision matters more than recall
NAMES = ("MAE", "F_mean", "F_adp", "F_max", "E_mean", "E_adp", "E_max", "S", "wF", "IoU")


def to_uint8(prob: Tensor) -> Tensor:
    """Probabilities of any shape to the nearest grey levels 0..255, as a PNG stores them.

    Values outside [0, 1] are clamped, for resizing overshoots. Raises ValueError for NaN.
    """
    if prob.isnan().any():
        raise ValueError("the prediction contains NaN and cannot be scored")
    return (prob.float().clamp(0, 1) * 255).round().to(torch.uint8)


# ---- Pixels to counts ------------------------------------------------------------------------
def count(pred: Tensor, gt: Tensor) -> Tensor:
    """Joint histogram of each image: uint8 and bool [B, H, W] -> int32 [B, 4, 2, 256] on the CPU.

    Axes: block of S (top left, top right, bottom left, bottom right), class (background,
    foreground), grey level. The four blocks meet at the foreground's centre of mass.
    """
    b, h, w = pred.shape
    kind = torch.int16 if b < 16 else torch.int32  # 2048 bins per image
    y, x = torch.arange(h, device=gt.device), torch.arange(w, device=gt.device)
    in_row, in_col = gt.sum(2, dtype=torch.int32), gt.sum(1, dtype=torch.int32)  # [B, H], [B, W]
    n_fg = in_row.sum(1, keepdim=True).clamp(min=1).cpu().double()  # [B, 1]
    # The top left block includes the centre. Halves are rounded to even numbers.
    cy = ((in_row * y).sum(1, keepdim=True).cpu() / n_fg).round().to(y)
    cx = ((in_col * x).sum(1, keepdim=True).cpu() / n_fg).round().to(x)
    image = torch.arange(b, device=gt.device, dtype=kind)[:, None]
    row = 2048 * image + 1024 * (y > cy).to(kind)  # [B, H]
    key = row[:, :, None] + 512 * (x > cx).to(kind)[:, None]  # [B, H, W]
    key.add_(gt, alpha=256).add_(pred)
    return torch.bincount(key.flatten(), minlength=b << 11).view(b, 4, 2, 256).int().cpu()


def value_range(counts: Tensor, stretch: bool) -> tuple[Tensor, Tensor]:
    """The grey levels that become t = 0 and t = 1: counts [N, 4, 2, 256] -> two int64 [N]."""
    used = (counts.sum((1, 2)) > 0).int()  # [N, 256]
    low, high = used.argmax(1), 255 - used.flip(1).argmax(1)
    fixed = (low == high) | (not stretch)
    return torch.where(fixed, 0, low), torch.where(fixed, 255, high)


# ---- Counts to scores ------------------------------------------------------------------------
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
    n_fg, n = fg.sum(1, keepdim=True), (bg + fg).sum(1, keepdim=True)  # [N, 1]

    # Curves: column i counts the pixels with trunc(255 t) >= 255 - i.
    level = (t * 255).long()
    tp, fp = (torch.zeros_like(t).scatter_add_(1, level, x).flip(1).cumsum(1) for x in (fg, bg))
    precision, recall, f = f_measure(tp, fp, n_fg)  # [N, 256]
    e = e_measure(tp, fp, n_fg, n)

    # t >= min(2 mean(t), 1) in whole numbers (times n and high - low), so that ties are exact.
    rise = v - low
    twice_mean = 2 * ((bg + fg) * rise).sum(1, keepdim=True)
    adaptive = n * rise >= torch.minimum(twice_mean, n * (high - low))  # [N, 256]
    tp, fp = ((x * adaptive).sum(1, keepdim=True) for x in (fg, bg))  # [N, 1]
    f_adp, e_adp = f_measure(tp, fp, n_fg)[2], e_measure(tp, fp, n_fg, n)
    tp, fp = ((x * (t > 0.5)).sum(1, keepdim=True) for x in (fg, bg))
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
    """a / b; where b is 0, so is a here, and the result is 0."""
    return a / torch.where(b == 0, 1, b)


def f_measure(tp: Tensor, fp: Tensor, n_fg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F from numbers of pixels: tp, fp [N, K], n_fg [N, 1] -> [N, K] each."""
    precision, recall = divide(tp, tp + fp), divide(tp, n_fg)
    return precision, recall, divide((1 + BETA2) * precision * recall, BETA2 * precision + recall)


def e_measure(tp: Tensor, fp: Tensor, n_fg: Tensor, n: Tensor) -> Tensor:
    """E from numbers of pixels: tp, fp [N, K], n_fg, n [N, 1] -> [N, K].

    B and G are binary, so there are only four kinds of pixels, each with one summand. For an
    empty (full) mask the sum is the number of pixels that B calls background (foreground).
    """
    mean_b, mean_g = (tp + fp) / n, n_fg / n
    total = torch.zeros_like(tp)
    for b, g, pixels in ((1, 1, tp), (1, 0, fp), (0, 1, n_fg - tp), (0, 0, n - n_fg - fp)):
        x, y = b - mean_b, g - mean_g
        total += pixels * (2 * x * y / (x * x + y * y + EPS) + 1) ** 2 / 4
    total = torch.where(n_fg == 0, n - tp - fp, torch.where(n_fg == n, tp + fp, total))
    return total / (n - 1).clamp(min=1)


def s_measure(counts: Tensor, t: Tensor) -> Tensor:
    """S = max(0, (S_object + S_region) / 2): counts float64 [N, 4, 2, 256], t [N, 256] -> [N].

    S_object is the mean of O(t) on the foreground and O(1 - t) on the background, S_region the
    mean of the similarities of map and mask in the four blocks; both are weighted by area.
    For an empty (full) mask S is 1 - mean t (mean t).
    """
    bg, fg = counts.sum(1).unbind(1)  # [N, 256]
    n_fg, n = fg.sum(1), (bg + fg).sum(1)  # [N]
    share, mean = n_fg / n, ((bg + fg) * t).sum(1) / n
    s_object = share * object_score(fg, t) + (1 - share) * object_score(bg, 1 - t)
    area = counts.sum((2, 3)) / n[:, None]  # [N, 4]
    s_region = (area * block_similarity(counts, t[:, None])).sum(1)
    s = ((s_object + s_region) / 2).clamp(min=0)
    return torch.where(n_fg == 0, 1 - mean, torch.where(n_fg == n, mean, s))


def object_score(pixels: Tensor, value: Tensor) -> Tensor:
    """O = 2m / (m^2 + 1 + sd) of the values [N, 256], the i-th occurring pixels[:, i] times -> [N].

    m: mean, sd: standard deviation with divisor n - 1 (0 for one pixel).
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
    both, n_bg, n_fg = bg + fg, bg.sum(2), fg.sum(2)
    n = n_bg + n_fg  # [N, 4]
    x, y = divide((both * t).sum(2), n), divide(n_fg, n)
    # In floating point the mean of a constant may differ from it, so say that it does not.
    constant = (both > 0).sum(2, keepdim=True) == 1
    dx = torch.where(constant, 0, t - x[..., None])  # [N, 4, 256]
    free = (n - 1).clamp(min=1)
    c_x = (both * dx**2).sum(2) / free
    c_y = (n_fg * (1 - y) ** 2 + n_bg * y**2) / free
    c = ((fg * dx).sum(2) * (1 - y) - (bg * dx).sum(2) * y) / free
    top, bottom = 4 * x * y * c, (x**2 + y**2) * (c_x + c_y)
    return torch.where(top != 0, top / (bottom + EPS), (bottom == 0).double())


# ---- The scores of a data set ----------------------------------------------------------------
class Metrics:
    """Collects what the scores need from predictions and masks, 8 KB per image.

    wf=False leaves out weighted F, which takes most of the time. stretch=False scores t = v / 255.
    """

    def __init__(self, wf: bool = True, stretch: bool = True):
        self.wf, self.stretch = wf, stretch
        # numpy, for a tensor that is sent to another process costs an open file
        self._counts: list[np.ndarray] = []  # int32 [b, 4, 2, 256]
        self._wf: list[float] = []

    def add(self, pred: Tensor, gt: Tensor) -> None:
        """Add pred uint8 and gt bool, both [B, H, W] or [H, W]; ValueError for anything else.

        They are counted on their device; weighted F is computed on the CPU.
        """
        given = [(x.dtype, tuple(x.shape)) for x in (pred, gt)]
        if (
            (pred.dtype, gt.dtype) != (torch.uint8, torch.bool)
            or pred.shape != gt.shape
            or pred.dim() not in (2, 3)
            or pred.numel() == 0
        ):
            raise ValueError(
                "prediction and mask must be uint8 and bool, both [B, H, W] or [H, W] "
                f"and not empty, but are {given[0]} and {given[1]}; see to_uint8"
            )
        pred, gt = (x.reshape(-1, *x.shape[-2:]) for x in (pred, gt))
        size = 1 if pred.device.type == "cpu" else len(pred)  # one image fits the CPU's cache
        counts = torch.cat([count(p, g) for p, g in zip(pred.split(size), gt.split(size))])
        self._counts.append(counts.numpy())
        if self.wf:
            levels = [level.tolist() for level in value_range(counts, self.stretch)]
            self._wf += [weighted_f(*one) for one in zip(pred.cpu(), gt.cpu(), *levels)]

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
        result = {name: images[name].mean().item() if name in images else None for name in NAMES}
        best = {f"{name}_max": images[name].mean(0).max().item() for name in ("F", "E")}
        return {"n": len(images["MAE"])} | result | best


def table(results: Mapping[str, Mapping], style: str = "text", mark_best: bool = False) -> str:
    """{row title: scores} as a table with three decimals; style: text, markdown or latex.

    mark_best: markdown and LaTeX show the best of each column bold (rows are rivals, not sets).
    """
    bold = {"markdown": "**{}**", "latex": r"\textbf{{{}}}"}.get(style, "{}")
    special = {"markdown": "|", "latex": "_&%#$"}.get(style, "")
    columns = [["", *results], ["n", *(str(scores["n"]) for scores in results.values())]]
    for name in NAMES:
        cells = [
            "-" if scores[name] is None else f"{scores[name]:.3f}" for scores in results.values()
        ]
        if mark_best and "-" not in cells:
            best = (min if name == "MAE" else max)(cells)
            cells = [bold.format(cell) if cell == best else cell for cell in cells]
        columns.append([name, *cells])
    rows = [
        ["".join("\\" * (letter in special) + letter for letter in cell) for cell in row]
        for row in zip(*columns)
    ]
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    if style == "markdown":
        rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    left, gap, right = {
        "text": ("", "  ", ""),
        "markdown": ("| ", " | ", " |"),
        "latex": ("", " & ", r" \\"),
    }[style]
    lines = []
    for title, *cells in rows:
        cells = [title.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
        lines.append(left + gap.join(cells) + right)
    if style == "latex":
        begin = r"\begin{tabular}{l" + "r" * len(widths[1:]) + "}"
        lines = [begin, lines[0], r"\hline", *lines[1:], r"\end{tabular}"]
    return "\n".join(lines)


# ---- Folders ---------------------------------------------------------------------------------
def find_images(folder: str | Path) -> dict[str, Path]:
    """{path below `folder` without suffix: file}, with sub-folders.

    Raises UserError if there is none, or if two differ in the suffix alone.
    """
    rows = [
        ([], base.relative_to(folder).parts, base / file)
        for base, files in pictures(Path(folder))
        for file in files
    ]
    if not rows:
        raise UserError(f"{folder} is not a folder with images ({', '.join(SUFFIXES)})")
    return by_name(rows)


def score_files(
    pair: tuple[Path, Path], wf: bool, stretch: bool, gt_rule: str, resize: str, empty: str
) -> tuple[Metrics | None, dict[str, str]]:
    """Metrics of one map and mask (None if they are not scored), and {problem: what it is}."""
    try:
        grey, mask = (load_grey(path) for path in pair)
    except UserError as error:
        return None, {"unreadable": str(error)}
    levels, size = np.asarray(mask), mask.size
    if wf and max(size) >= FAR:
        return None, {
            "unreadable": f"{pair[1]} ({max(size)} pixels on a side, too many for wF; "
            "leave it out with --no-wf)"
        }
    inside = torch.from_numpy(levels > (128 if gt_rule == "128" else levels.max() / 2))
    low, high = grey.getextrema()
    found = {
        "resized": grey.size != size,
        "empty mask": not inside.any(),
        "constant map": low == high,
    }
    notes = {problem: "" for problem, holds in found.items() if holds}
    if empty == "skip" and "empty mask" in notes:
        return None, notes
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling[resize.upper()])
    metrics = Metrics(wf, stretch)
    metrics.add(torch.from_numpy(np.array(grey)), inside)
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

    gt_rule: foreground is above '128', or above 'half' of the mask's maximum (masks of 0 and 1).
    resize: filter for a map of another size than its mask. empty: 'keep' or 'skip' empty masks.
    Returns the metrics, the stems scored, {problem: files}. Raises UserError if nothing pairs up.
    """
    maps, masks = find_images(pred), find_images(gt)
    names = sorted(maps.keys() & masks.keys())
    if not names:
        raise UserError(f"no file in {pred} has the stem of a mask in {gt}; check both folders")
    report = {
        "missing": sorted(masks.keys() - maps.keys()),
        "unreadable": [],
        "extra": sorted(maps.keys() - masks.keys()),
        "resized": [],
        "empty mask": [],
        "constant map": [],
    }
    total, scored, threads = Metrics(wf, stretch), [], torch.get_num_threads()
    torch.set_num_threads(1)  # one image per core beats all cores on one image
    try:
        score = partial(
            score_files, wf=wf, stretch=stretch, gt_rule=gt_rule, resize=resize, empty=empty
        )
        pairs = [(maps[name], masks[name]) for name in names]
        results = progress(parallel_map(score, pairs, processes=True), str(pred), len(names))
        for name, (metrics, notes) in zip(names, results):
            for problem, text in notes.items():
                report[problem].append(text or name)
            if metrics:
                total.merge(metrics)
                scored.append(name)
    finally:
        torch.set_num_threads(threads)
    return total, scored, report


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m common.metrics`."""
    parser = argparse.ArgumentParser("python -m common.metrics", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("pred", nargs="+", type=Path, help="folder of maps, png or jpg; several are compared")
    add("gt", type=Path, help="folder of masks with the same stems")
    add(
        "--gt-rule",
        choices=("128", "half"),
        default="128",
        help="foreground is > 128, or > half of the mask's maximum (default: 128)",
    )
    add(
        "--resize",
        choices=("bilinear", "bicubic", "nearest"),
        default="bilinear",
        help="filter for maps of another size than their mask (default: bilinear)",
    )
    add("--no-stretch", dest="stretch", action="store_false", help="score v / 255, no stretching")
    add(
        "--empty",
        choices=("keep", "skip"),
        default="keep",
        help="images with an empty mask, whose F, wF and IoU are 0 (default: keep)",
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


def main(argv: list[str] | None = None) -> None:
    """Score folders, print a report and a table; UserError if a pair cannot be scored."""
    args = build_parser().parse_args(argv)
    if args.curves and args.curves.suffix.lower() not in (".svg", ".csv"):
        raise UserError(f"--curves {args.curves} must end in .svg or .csv")
    options = {name: getattr(args, name) for name in ("gt_rule", "stretch", "resize", "empty")}
    results, curves, lines, lost = {}, {}, [["folder", "image", *NAMES]], 0
    for folder in args.pred:
        metrics, names, report = evaluate_folders(folder, args.gt, args.wf, **options)
        print(f"{folder}: {len(names)} images")
        for problem, files in report.items():
            if files:
                shown = files if problem in ("missing", "unreadable") else files[:4]
                more = ", ..." * (len(shown) < len(files))
                print(f"  {len(files)} {problem}: {', '.join(shown)}{more}")
        if report["empty mask"] and args.gt_rule == "128":
            print("  (masks of 0 and 1 look empty: read them with --gt-rule half)")
        lost += len(report["missing"]) + len(report["unreadable"])
        title = folder.as_posix()
        results[title] = metrics.scores() | {"options": options}
        if args.curves:
            curves[title] = metrics.curves()
        if args.csv:
            images = {key: value.tolist() for key, value in metrics.per_image().items()}
            lines += [
                [title, name, *(images[key][i] if key in images else "" for key in NAMES)]
                for i, name in enumerate(names)
            ]
    if lost and not args.allow_missing:
        raise UserError(
            f"{lost} of the pairs of map and mask cannot be scored (listed above), and "
            "the scores of the others would not compare; complete the folders or use "
            "--allow-missing"
        )
    print(
        f"options: mask > {args.gt_rule}, {'' if args.stretch else 'not '}stretched, resize "
        f"{args.resize}, empty masks {args.empty}; beta^2 is 0.3 in F, 1 in wF; IoU at 0.5"
    )
    print(table(results, args.style, mark_best=len(results) > 1))
    if args.json:
        save_json(args.json, results if len(results) > 1 else results[title])
    if args.csv:
        save_csv(args.csv, lines)
    if args.curves:
        write_curves(args.curves, curves)


if __name__ == "__main__":
    cli(main)

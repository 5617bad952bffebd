"""Curves as SVG: scores over thresholds, the log of a run over epochs, and several runs compared.

    write_curves("curves.svg", {"A2S": metrics.curves(), "CLASS": ...})    # or curves.csv
    write_log("log.svg", read_log("runs/a2s-shapes/stage1/log.jsonl"))
    python -m common.curves runs/a2s-seed0 runs/a2s-seed1 runs/class --out runs.svg    # or runs.csv

The threshold curves are means over images, as in the papers' figures; their vertical axis starts
at the highest tenth that hides no point. Runs whose folders differ only in the ending -seed0,
-seed1, ... are drawn as one: a line for their mean, and a band from their smallest to their largest
value. SVG is text: any browser shows it, LaTeX and editors import it. A file named *.csv gets the
numbers instead, for a plot of your own.
"""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from common.runtime import UserError, cli, save_csv, save_text, say

PANEL, GAP, LINE = 300, 60, 18  # pixels: side of the axes, between them, height of a line of text
COLUMNS = 3  # panels side by side
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
PANELS = (("recall", "precision"), ("threshold", "F"), ("threshold", "E"))
NOT_DRAWN = ("epoch", "images_per_s", "memory_gb")  # they tell of the machine, not of the network


# ---- Drawing -------------------------------------------------------------------------------------
class Axis(NamedTuple):
    """An axis from `low` to `high` with labelled ticks."""

    name: str
    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        """The place of a value: 0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)


class Curve(NamedTuple):
    """Points (x, y), and the ends of the band around each y if there is one."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Panel(NamedTuple):
    """A pair of axes; curve number i has the colour of row i of the legend."""

    x: Axis
    y: Axis
    curves: list[Curve]


class Svg:
    """The elements of a picture; places are pixels from the top left corner."""

    def __init__(self, width: int, height: int):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="none">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def text(self, x: float, y: float, content: str, anchor: str = "middle") -> None:
        """One line of text; anchor: start, middle or end of it lies at x."""
        self.parts.append(
            f'<text x="{x:.0f}" y="{y:.0f}" fill="black" text-anchor="{anchor}">'
            f"{escape(content)}</text>"
        )

    def line(self, points: list[tuple[float, float]], stroke: str, width: float) -> None:
        """A line through points; a single one becomes a dot."""
        if len(points) == 1:
            points, width = points * 2, 4 * width
            stroke += ' stroke-linecap="round"'
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{places}" stroke-width="{width}" {stroke}/>')

    def area(self, points: list[tuple[float, float]], colour: str) -> None:
        """A pale area within points."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon points="{places}" fill="{colour}" fill-opacity="0.2"/>')


def colour(row: int) -> str:
    """The colour of a row of the legend."""
    return COLOURS[row % len(COLOURS)]


def stroke(row: int) -> str:
    """The same as an attribute. After as many rows as there are colours these return, dashed."""
    dashed = row // len(COLOURS) % 2 == 1
    return f'stroke="{colour(row)}"' + (' stroke-dasharray="6 3"' if dashed else "")


def draw(panels: Sequence[Panel], titles: Sequence[str]) -> str:
    """The SVG of panels in rows of COLUMNS, with a legend of `titles` below them."""
    rows = math.ceil(len(panels) / COLUMNS)
    bottom = rows * (PANEL + GAP)
    svg = Svg(COLUMNS * (PANEL + GAP), bottom + LINE * (len(titles) + 1))
    for i, panel in enumerate(panels):
        row, column = divmod(i, COLUMNS)
        draw_panel(svg, panel, GAP + column * (PANEL + GAP) - 15, LINE + row * (PANEL + GAP))

    # The legend: a short thick line and a title in each row.
    for i, title in enumerate(titles):
        y = bottom + LINE * (i + 1)
        svg.line([(GAP, y - 4), (GAP + 24, y - 4)], stroke(i), 3)
        svg.text(GAP + 32, y, title, "start")
    return "\n".join([*svg.parts, "</svg>\n"])


def draw_panel(svg: Svg, panel: Panel, left: float, top: float) -> None:
    """Axes, their names and ticks, and the curves."""

    def place(x: float, y: float) -> tuple[float, float]:
        return left + PANEL * panel.x.share(x), top + PANEL * (1 - panel.y.share(y))

    # Grid lines mark the ticks of the vertical axis; the horizontal one has labels alone.
    for tick in panel.y.ticks:
        _, y = place(panel.x.low, tick)
        svg.line([(left, y), (left + PANEL, y)], 'stroke="#dddddd"', 1)
        svg.text(left - 5, y + 4, f"{tick:g}", "end")
    for tick in panel.x.ticks:
        x, _ = place(tick, panel.y.low)
        svg.text(x, top + PANEL + 16, f"{tick:g}")
    svg.text(left + PANEL / 2, top + PANEL + 32, panel.x.name)
    svg.text(left + PANEL / 2, top - 6, panel.y.name)

    # The bands lie below all lines.
    for row, curve in enumerate(panel.curves):
        if curve.low != curve.high:
            there = list(map(place, curve.x, curve.high))
            back = list(map(place, curve.x, curve.low))
            svg.area(there + back[::-1], colour(row))
    for row, curve in enumerate(panel.curves):
        if curve.x:
            svg.line(list(map(place, curve.x, curve.y)), stroke(row), 1.5)


def round_step(low: float, high: float) -> float:
    """The distance of round ticks: 1, 2 or 5 times a power of ten, 3 to 6 times in the range."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-99) / 3))
    for factor in (1, 2, 5):
        if (high - low) / (factor * step) <= 6:
            break
    return factor * step


# ---- Curves over thresholds ----------------------------------------------------------------------
def write_curves(path: str | Path, curves: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write {title: `Metrics.curves()`} to a .svg or .csv file, atomically."""
    rows = {}
    for title, tensors in curves.items():
        rows[title] = {"threshold": [i / 255 for i in range(255, -1, -1)]}
        rows[title] |= {name: values.tolist() for name, values in tensors.items()}
    if Path(path).suffix.lower() == ".csv":
        lines = [("title", *next(iter(rows.values())))]
        for title, columns in rows.items():
            lines += [(title, *numbers) for numbers in zip(*columns.values())]
        save_csv(path, lines)
    else:
        save_text(path, draw([threshold_panel(rows, *names) for names in PANELS], list(rows)))


def threshold_panel(rows: Mapping[str, Mapping[str, list[float]]], across: str, up: str) -> Panel:
    """The panel of one score `up` over `across`, both from 0 to 1; E slightly exceeds 1."""
    values = [value for columns in rows.values() for value in columns[up]]
    first = min(int(10 * min(values)), 9)  # in tenths
    x = Axis(across, 0, 1, [tenth / 10 for tenth in range(0, 11, 2)])
    y = Axis(up, first / 10, max(1, *values), [tenth / 10 for tenth in range(first, 11)])
    return Panel(x, y, [Curve(columns[across], columns[up]) for columns in rows.values()])


# ---- Logs of runs --------------------------------------------------------------------------------
Series = dict[int, float]  # a quantity's value after each epoch
Log = dict[tuple[str, str], list[Series]]  # by stage and quantity; a series of each run


def read_log(path: str | Path) -> list[dict]:
    """The lines of a log.jsonl; lines that are broken are left out, and named on stderr."""
    try:
        text = Path(path).read_text("utf-8", "replace")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None

    # Other ends of lines than "\n" are part of a text.
    lines = []
    for number, content in enumerate(text.split("\n"), 1):
        try:
            line = json.loads(content) if content else None
        except (ValueError, RecursionError):
            line = "broken"
        if isinstance(line, dict) and isinstance(line.get("epoch"), int):
            lines.append(line)
        elif line is not None:
            say(f"warning: line {number} of {path} is broken and left out", error=True)
    return lines


def series_of(lines: Sequence[dict]) -> dict[str, Series]:
    """{quantity: {epoch: value}} of the lines of a log; what is no finite number is left out."""
    found = {}
    for line in lines:
        for name, value in line.items():
            if name in NOT_DRAWN or not isinstance(value, (int, float)):
                continue
            if abs(value) < 1e99 and abs(line["epoch"]) < 1e99:  # neither NaN nor infinite
                found.setdefault(name, {})[line["epoch"]] = value
    return found


def write_log(path: str | Path, lines: Sequence[dict]) -> None:
    """Draw the log of one stage as SVG, atomically: a panel over epochs for each quantity."""
    log = {("", name): [series] for name, series in series_of(lines).items()}
    save_text(path, draw(log_panels([log]), []))


def read_runs(folders: Sequence[Path]) -> dict[str, Log]:
    """The logs of run folders, or of stage folders, by name without the seed.

    Raises `UserError` for a folder without a log, or if none has a finished epoch.
    """
    groups = {}
    for folder in folders:
        paths = [*folder.glob("log.jsonl"), *sorted(folder.glob("*/log.jsonl"))]
        if not paths:
            raise UserError(
                f"{folder} holds no log.jsonl, nor does a folder in it; give a run folder"
            )

        # Runs of one name without the seed are one group.
        name = re.sub(r"-seed\d+(?=/|$)", "", folder.as_posix())
        group = groups.setdefault(name, {})
        for path in paths:
            stage = path.parent.relative_to(folder).name
            for quantity, series in series_of(read_log(path)).items():
                group.setdefault((stage, quantity), []).append(series)
    if not any(groups.values()):
        raise UserError(f"the log of {folders[0]} holds no finished epoch; train first")
    return groups


def mean_and_band(series: Sequence[Series]) -> Curve:
    """The mean of several runs at each epoch that one of them has, and their extremes."""
    epochs = sorted(set().union(*series))
    values = [[one[epoch] for one in series if epoch in one] for epoch in epochs]
    mean = [sum(several) / len(several) for several in values]
    return Curve(epochs, mean, list(map(min, values)), list(map(max, values)))


def log_panels(logs: Sequence[Log]) -> list[Panel]:
    """A panel for each stage and quantity that one of the logs has."""
    panels = []
    for key in dict.fromkeys(key for log in logs for key in log):
        curves = [mean_and_band(log.get(key, [])) for log in logs]

        # The axes fit all runs, and all values of their bands.
        epochs = [epoch for curve in curves for epoch in curve.x]
        values = [value for curve in curves for value in (*curve.low, *curve.high)]
        name = " ".join(key).strip()  # "stage1 loss", or "loss"
        panels.append(Panel(epoch_axis(epochs), value_axis(name, values), curves))
    return panels


def epoch_axis(epochs: Sequence[int]) -> Axis:
    """An axis from the first to the last epoch, with ticks at whole numbers."""
    low = min(epochs)
    high = max(*epochs, low + 1)
    step = max(1, round(round_step(low, high)))
    return Axis("epoch", low, high, list(range(math.ceil(low / step) * step, high + 1, step)))


def value_axis(name: str, values: Sequence[float]) -> Axis:
    """An axis between round numbers around all values; a constant lies in its middle."""
    low = min(values)
    high = max(values)
    largest = max(abs(low), abs(high)) or 1
    if high - low < 1e-6 * largest:
        low, high = low - largest / 2, high + largest / 2

    # From the last tick below all values to the first one above them.
    step = round_step(low, high)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return Axis(name, first * step, last * step, [i * step for i in range(first, last + 1)])


def compare(folders: Sequence[Path], out: Path) -> None:
    """Draw the logs of several runs as SVG, or write their means and extremes as CSV."""
    groups = read_runs(folders)
    if out.suffix.lower() == ".csv":
        rows = [("run", "stage", "quantity", "epoch", "mean", "min", "max", "runs")]
        for title, log in groups.items():
            for key, series in log.items():
                for epoch, *numbers in zip(*mean_and_band(series)):
                    runs = sum(epoch in one for one in series)
                    rows.append((title, *key, epoch, *numbers, runs))
        save_csv(out, rows)
    else:
        save_text(out, draw(log_panels(list(groups.values())), list(groups)))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare runs; UserError for a folder that holds none."""
    parser = argparse.ArgumentParser(
        "python -m common.curves",
        description="Draw what several runs logged after each epoch. Runs whose folders differ "
        "only in the ending -seed0, -seed1, ... become one line (their mean) and a band (their "
        "smallest and largest values).",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or the folder of a stage"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default="runs.svg",
        metavar="FILE",
        help="picture (.svg) or numbers (.csv) [runs.svg]",
    )
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".svg", ".csv"):
        raise UserError(f"--out {args.out} must end in .svg or .csv")
    compare(args.runs, args.out)
    say(f"wrote {args.out}")


if __name__ == "__main__":
    cli(main)

"""Threshold curves of saliency maps, drawn as SVG: precision over recall, F and E over threshold.

    write_curves("curves.svg", {"A2S": metrics.curves(), "CLASS": ...})    # or curves.csv

The curves are means over images, as in the papers' figures. A vertical axis starts at the highest
tenth that hides no point. SVG is text: any browser shows it, LaTeX and editors import it. A file
named *.csv gets the numbers instead, for a plot of your own.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from torch import Tensor

from common.runtime import save_csv, save_text

PANEL, GAP, LINE = 300, 60, 18  # pixels: axes, between them, text
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
PANELS = (("recall", "precision"), ("threshold", "F"), ("threshold", "E"))


def write_curves(path: str | Path, curves: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write {title: `Metrics.curves()`} to a .svg or .csv file, atomically."""
    rows = {
        title: {"threshold": [i / 255 for i in range(255, -1, -1)]}
        | {name: values.tolist() for name, values in four.items()}
        for title, four in curves.items()
    }
    if Path(path).suffix.lower() == ".csv":
        lines = [("title", "threshold", *next(iter(curves.values())))]
        lines += [
            (title, *numbers) for title, four in rows.items() for numbers in zip(*four.values())
        ]
        save_csv(path, lines)
    else:
        save_text(path, draw(rows))


def draw(rows: Mapping[str, Mapping[str, list[float]]]) -> str:
    """The SVG of {title: {threshold, precision, recall, F, E: 256 numbers each}}."""
    width, height = 3 * (PANEL + GAP), PANEL + GAP + LINE * (len(rows) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="none">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]

    def text(x: float, y: float, content: str, anchor: str = "middle") -> None:
        parts.append(
            f'<text x="{x:.0f}" y="{y:.0f}" fill="black" text-anchor="{anchor}">'
            f"{escape(content)}</text>"
        )

    def line(points: list[tuple[float, float]], stroke: str, size: float) -> None:
        parts.append(
            '<polyline points="'
            + " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            + f'" stroke-width="{size}" {stroke}/>'
        )

    # After as many rows as there are colours these come again, dashed.
    turns = (divmod(i, len(COLOURS)) for i in range(len(rows)))
    strokes = [
        f'stroke="{COLOURS[i]}"' + ' stroke-dasharray="6 3"' * (turn % 2) for turn, i in turns
    ]
    for panel, (across, up) in enumerate(PANELS):
        x0, y0 = GAP + panel * (PANEL + GAP) - 15, LINE  # the axes' top left corner
        lowest, highest = (
            pick(value for four in rows.values() for value in four[up]) for pick in (min, max)
        )
        first = min(int(10 * lowest), 9)  # of the axis, in tenths
        unit = PANEL / (max(10, 10 * highest) - first)  # pixels per tenth; E exceeds 1
        for tenth in range(first, 11):
            y = y0 + PANEL - unit * (tenth - first)
            line([(x0, y), (x0 + PANEL, y)], 'stroke="#dddddd"', 1)
            text(x0 - 14, y + 4, f"{tenth / 10:.1f}")
        for tenth in range(0, 11, 2):
            text(x0 + PANEL * tenth / 10, y0 + PANEL + 16, f"{tenth / 10:.1f}")
        text(x0 + PANEL / 2, y0 + PANEL + 32, across)
        text(x0 + PANEL / 2, y0 - 6, up)
        for four, stroke in zip(rows.values(), strokes):
            line(
                [
                    (x0 + PANEL * x, y0 + PANEL - unit * (10 * y - first))
                    for x, y in zip(four[across], four[up])
                ],
                stroke,
                1.5,
            )
    for i, (title, stroke) in enumerate(zip(rows, strokes)):
        y = PANEL + GAP + LINE * (i + 1)
        line([(GAP, y - 4), (GAP + 24, y - 4)], stroke, 3)
        text(GAP + 32, y, title, "start")
    return "\n".join([*parts, "</svg>\n"])

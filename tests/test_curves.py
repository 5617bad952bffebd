"""Curves: places in the SVG by hand, means and bands of several runs, broken logs, the program."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from common.curves import main, read_log, value_axis, write_curves, write_log
from common.runtime import UserError

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def curve(value):
    return {name: torch.full((256,), value) for name in ("precision", "recall", "F", "E")}


def shapes(path, kind):
    """[(points, element)] of all polylines or polygons of an SVG but its grid lines."""
    found = []
    for element in ElementTree.parse(path).getroot().iter(SVG + kind):
        points = [tuple(map(float, point.split(","))) for point in element.get("points").split()]
        if element.get("stroke") != "#dddddd":
            found.append((points, element))
    return found


def texts(path):
    return [text.text for text in ElementTree.parse(path).getroot().iter(SVG + "text")]


def write_run(folder, *lines):
    """A log.jsonl of lines given as dicts or as text."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "log.jsonl").write_text("".join(row + "\n" for row in rows))
    return folder


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- Curves over thresholds ----------------------------------------------------------------------
def test_curves_are_drawn_where_they_belong(tmp_path):
    """Axes of 300 pixels, from the tenth below all points, here 0.4, to 1: a tenth is 50 pixels."""
    low = curve(0.45) | {"recall": torch.linspace(0, 1, 256)}
    rows = {"a & b": low} | {f"row {i}": curve(1.0) for i in range(8)}
    write_curves(tmp_path / "c.svg", rows)
    lines = [line for line in shapes(tmp_path / "c.svg", "polyline") if len(line[0]) == 256]
    assert len(lines) == 3 * 9
    for (points, _), left in zip(lines[::9], (45, 405, 765)):
        assert {y for _, y in points} == {18 + 300 - 0.5 * 50}
        assert sorted({x for x, _ in points})[::255] == [left, left + 300]
    assert {points[0][1] for points, _ in lines[1:9]} == {18.0}
    strokes = {(line.get("stroke"), line.get("stroke-dasharray")) for _, line in lines}
    assert len(strokes) == 9
    assert "a & b" in texts(tmp_path / "c.svg")
    assert shapes(tmp_path / "c.svg", "polygon") == []


def test_curves_as_numbers(tmp_path):
    rows = {"A": curve(0.25), "B": curve(0.5) | {"E": torch.linspace(0, 1, 256).double()}}
    write_curves(tmp_path / "c.csv", rows)
    found = table(tmp_path / "c.csv")
    assert list(found[0]) == ["title", "threshold", "precision", "recall", "F", "E"]
    assert [row["title"] for row in found] == ["A"] * 256 + ["B"] * 256
    thresholds = [i / 255 for i in range(255, -1, -1)]
    assert [float(row["threshold"]) for row in found[256:]] == thresholds
    assert [float(row["E"]) for row in found[256:]] == rows["B"]["E"].tolist()
    assert {row["F"] for row in found[:256]} == {"0.25"}


# ---- The log of a run ----------------------------------------------------------------------------
def test_a_log_is_drawn_where_it_belongs(tmp_path):
    """Three panels; loss from 1 to 4 over epochs 1 to 3 is a line across the first one."""
    lines = [
        {"epoch": 1, "loss": 4.0, "lr": 0.1, "images_per_s": 30.0, "memory_gb": 0.0},
        {"epoch": 2, "loss": 2.5, "lr": 0.1, "watch_F": 0.5, "images_per_s": 31.0},
        {"epoch": 3, "loss": 1.0, "lr": 0.1, "images_per_s": 32.0, "note": "text", "bad": math.nan},
    ]
    write_log(tmp_path / "log.svg", lines)
    drawn = [points for points, _ in shapes(tmp_path / "log.svg", "polyline")]
    assert drawn[0] == [(45, 18), (195, 168), (345, 318)]
    assert drawn[1] == [(405, 168), (555, 168), (705, 168)]  # a constant lies in the middle
    assert drawn[2] == [(765, 168), (765, 168)]  # a single epoch is a dot
    assert len(drawn) == 3 and shapes(tmp_path / "log.svg", "polygon") == []
    found = texts(tmp_path / "log.svg")
    names = [name for name in found if name.isidentifier()]
    assert names == "epoch loss epoch lr epoch watch_F".split()
    assert found[:4] == ["1", "2", "3", "4"]  # the ticks of the loss
    write_log(tmp_path / "empty.svg", [])  # nothing is trained yet
    assert texts(tmp_path / "empty.svg") == []


@pytest.mark.parametrize(
    "values",
    [[0.0], [1e-320, 0.0], [-1e98, 1e98], [5.0, 5.0000001], [-0.3, 12.7], [1e-9, 3e-9], [7]],
)
def test_axes_enclose_their_values(values):
    axis = value_axis("loss", values)
    assert axis.low <= min(values) <= max(values) <= axis.high and axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 9
    assert axis.ticks[0] == axis.low and axis.ticks[-1] == axis.high


def test_broken_lines_are_left_out_and_named(tmp_path, capsys):
    whole = {"epoch": 2, "loss": 0.5}
    broken = ['{"epoch": 1, "lo', "7", "[" * 100_000, '{"loss": 3}', '{"epoch": "2"}', "\x0c"]
    folder = write_run(tmp_path / "run", *broken, whole)
    assert read_log(folder / "log.jsonl") == [whole]
    warned = capsys.readouterr().err.split("\n")[:-1]
    assert [line.split()[2] for line in warned] == ["1", "2", "3", "4", "5", "6"]
    with pytest.raises(UserError, match="cannot read .*none"):
        read_log(tmp_path / "none")


def test_a_line_separator_inside_a_text_does_not_cut_the_line(tmp_path, capsys):
    line = {"epoch": 1, "loss": 1.0, "note": "a\u2028b\x85c"}
    (tmp_path / "log.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8")
    assert read_log(tmp_path / "log.jsonl") == [line] and capsys.readouterr().err == ""


# ---- Several runs --------------------------------------------------------------------------------
@pytest.fixture
def runs(tmp_path):
    """Two seeds of a run with two stages, and a run of another method without stages."""
    first, second = tmp_path / "a2s-seed0", tmp_path / "a2s-seed12"
    write_run(first / "stage1", {"epoch": 1, "loss": 4.0}, {"epoch": 2, "loss": 2.0})
    write_run(second / "stage1", {"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0})
    write_run(first / "stage2", {"epoch": 1, "loss": 9.0}, {"epoch": 2, "loss": 8.0})
    write_run(second / "stage2", {"epoch": 1, "loss": 7.0})
    write_run(tmp_path / "class", {"epoch": 1, "loss": 0.5}, {"epoch": 3, "loss": 0.25})
    return [first, second, tmp_path / "class"]


def test_seeds_become_mean_and_extremes(runs, tmp_path):
    out = tmp_path / "runs.csv"
    main([*map(str, runs), "--out", str(out)])
    a2s, other = (tmp_path / "a2s").as_posix(), (tmp_path / "class").as_posix()
    assert [list(row.values()) for row in table(out)] == [
        [a2s, "stage1", "loss", "1", "3.0", "2.0", "4.0", "2"],
        [a2s, "stage1", "loss", "2", "1.5", "1.0", "2.0", "2"],
        [a2s, "stage2", "loss", "1", "8.0", "7.0", "9.0", "2"],
        [a2s, "stage2", "loss", "2", "8.0", "8.0", "8.0", "1"],
        [other, "", "loss", "1", "0.5", "0.5", "0.5", "1"],
        [other, "", "loss", "3", "0.25", "0.25", "0.25", "1"],
    ]


def test_seeds_are_drawn_as_a_line_and_a_band(runs, tmp_path):
    """In the first panel the axis goes from 1 to 4, so that 1 is 100 pixels."""
    out = tmp_path / "runs.svg"
    main([*map(str, runs), "--out", str(out)])
    bands = [points for points, _ in shapes(out, "polygon")]
    assert bands[0] == [(45, 18), (345, 218), (345, 318), (45, 218)]
    assert len(bands) == 2  # of stage1 and of stage2; a single run has none
    lines = [points for points, element in shapes(out, "polyline")]
    assert lines[0] == [(45, 118), (345, 268)]
    colours = {element.get("stroke") for _, element in shapes(out, "polyline")}
    assert len(colours) == 2 and "stage1 loss" in texts(out)
    assert texts(out)[-2:] == [(tmp_path / "a2s").as_posix(), (tmp_path / "class").as_posix()]


def test_folders_of_a_stage(runs, tmp_path):
    out = tmp_path / "stage.csv"
    main([str(runs[0] / "stage1"), str(runs[1] / "stage1"), "--out", str(out)])
    stage = (tmp_path / "a2s" / "stage1").as_posix()
    rows = table(out)
    assert {(row["run"], row["stage"]) for row in rows} == {(stage, "")}
    assert [row["mean"] for row in rows] == ["3.0", "1.5"]


def test_bad_runs_and_a_full_disk(runs, tmp_path):
    with pytest.raises(UserError, match="--out runs.png must end in .svg or .csv"):
        main([str(runs[0]), "--out", "runs.png"])
    with pytest.raises(UserError, match="nowhere holds no log.jsonl"):
        main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.svg")])
    empty = write_run(tmp_path / "empty")
    with pytest.raises(UserError, match="empty holds no finished epoch"):
        main([str(empty), "--out", str(tmp_path / "x.svg")])
    (tmp_path / "full.svg").symlink_to("/dev/full")
    command = [sys.executable, "-m", "common.curves", runs[2], "--out", tmp_path / "full.svg"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "full.svg" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "full.svg").is_symlink()

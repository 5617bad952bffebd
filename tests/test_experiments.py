"""What the experiments share: means and ranges, tables between markers, commands without paths."""

import json
from argparse import Namespace

import pytest

from tests.experiments import tables


def test_spread_shows_the_mean_and_the_range_over_seeds():
    assert tables.spread([0.719, 0.739, 0.702]) == ".720 (.702 to .739)"
    assert tables.spread([0.5]) == ".500 (one seed)"
    assert tables.spread([1.0, 0.0]) == ".500 (.000 to 1.000)"


def test_commands_are_shown_without_the_paths_of_a_machine():
    args = Namespace(data_root="/home/me/sets", backbone_weights="/home/me/w.pth")
    command = "python a2s.py --data-root /home/me/sets  --backbone-weights /home/me/w.pth --seed 0 "
    expected = "python a2s.py --data-root DIR --backbone-weights FILE --seed 0"
    assert tables.shown(args, command) == expected
    args = Namespace(data_root="data", backbone_weights="imagenet")
    assert tables.shown(args, "python a2s.py --data-root data") == "python a2s.py --data-root data"


def test_a_table_is_written_between_its_markers_and_nowhere_else(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- table: t -->\nold\n<!-- end -->\nb\n<!-- table: u -->\nu\n<!-- end -->"
    )
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.write_table("page.md", "t", ["x", "y"], [["1", "2"]], ["`command`"])
    table = "| x | y |\n|---|---|\n| 1 | 2 |\n\n`command`"
    rest = "b\n<!-- table: u -->\nu\n<!-- end -->"
    assert page.read_text() == f"a\n<!-- table: t -->\n{table}\n<!-- end -->\n{rest}"
    with pytest.raises(SystemExit, match="no place for the table"):
        tables.write_table("page.md", "v", ["x"], [], [])


def test_a_finished_row_is_not_trained_again(tmp_path):
    args = Namespace(out=tmp_path)
    folder = tables.run_folder(args, "a2s/A3, the paper's seed 0")
    assert folder == tmp_path / "a2s" / "a3-the-paper-s-seed-0"
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text('{"minutes": 3}')
    assert tables.train(args, "nothing.py", folder, "")["minutes"] == 3


def test_a_table_shows_what_was_trained_and_says_what_was_not(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("<!-- table: t -->\n<!-- end -->")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    args = Namespace(out=tmp_path / "runs", seeds=[0, 1], rows=["none of them"])
    for seed, mae in ((0, 0.1), (1, 0.3)):
        folder = tables.run_folder(args, f"t/first seed {seed}")
        folder.mkdir(parents=True)
        run = {"scores": {"": {"MAE": mae}}, "minutes": 2.0, "command": "c", "commit": "abc"}
        (folder / "experiment.json").write_text(json.dumps(run))
    rows = {"first": "", "second": "--lr 1"}
    tables.table(args, "page.md", "t", "a2s.py", "", rows, {"MAE": tables.score("", "MAE")})
    lines = (tmp_path / "page.md").read_text().split("\n")
    assert lines[1] == "| row | MAE | minutes |"
    assert lines[3:5] == ["| first | .200 (.100 to .300) | 2 |", "| second | not run | not run |"]
    assert lines[6:8] == ["First row: `c`, commit abc.", "The others add: second: `--lr 1`."]

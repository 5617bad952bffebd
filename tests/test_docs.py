"""README, docs/ and the other pages: links lead somewhere, flags exist, the code to fork runs."""

import functools
import importlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import a2s
from common.backbones import Pyramid

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("a2s", "class_net", "unified_usod", "sdg_sod")
FOREIGN = {"--index-url", "--nproc_per_node", "--olr"}  # of pip, torchrun, the released code


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


@functools.cache
def options(script):
    """{'--data', ...}: the flags of a script."""
    return set(importlib.import_module(script).build_parser()._option_string_actions)


@functools.cache
def other_options():
    """The flags of everything else that can be run."""
    files = [*ROOT.glob("common/*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("tests/*/*.py")]
    return {flag for file in files for flag in re.findall(r'"(--[a-z][\w-]*)"', file.read_text())}


def slugs(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def code(text):
    """All that stands in backticks: inline code and fenced blocks."""
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.S)
    return fenced + re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


@each([*PAGES, ROOT / "data" / "README.md"])
def test_links_lead_to_files_and_headings(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S))
    for target in targets:
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            file = (page.parent / path) if path else page
            assert file.exists(), target
            assert not anchor or anchor in slugs(file), target


@each(PAGES)
def test_pages_are_wrapped(page):
    written = re.sub(r"<!-- table: .*?<!-- end -->", "", page.read_text(), flags=re.S)
    long = [line for line in written.splitlines() if len(line) > 120]
    assert [line for line in long if not line.startswith("|")] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 2500


@each(PAGES)
def test_flags_exist(page):
    known = set.union(FOREIGN, other_options(), *map(options, SCRIPTS))
    if page.stem in SCRIPTS:
        known = FOREIGN | other_options() | options(page.stem)
    used = {flag for part in code(page.read_text()) for flag in re.findall(r"--[a-z][\w-]*", part)}
    assert used - known == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_departures_are_explained_on_the_script_s_page_and_marked_in_its_code(script):
    """D1 to Dn without a gap, as many as the docstring says."""
    page = (ROOT / "docs" / f"{script}.md").read_text()
    listed = {int(number) for number in re.findall(r"^\* \*\*D(\d+)\*\*", page, re.M)}
    assert listed == set(range(1, len(listed) + 1))
    _, docstring, source = (ROOT / f"{script}.py").read_text().split('"""', 2)
    assert f"D1 to D{len(listed)}" in docstring

    source = re.sub(r"D1 to D\d+", "", source)  # a list, no mark
    marked = {int(number) for number in re.findall(r"\bD(\d+)\b", source)}
    assert marked == listed


@each(PAGES)
def test_measured_tables_stand_between_markers(page):
    marks = re.findall(r"<!-- (end|[^>]*?) -->", page.read_text())
    assert marks[1::2] == ["end"] * (len(marks) // 2) and "end" not in marks[::2]


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    use, loss, encoder = re.findall(r"```python\n(.*?)```", readme, re.S)
    shutil.copy(ROOT / "data" / "photos" / "cat.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(use, names)
    saliency = np.asarray(names["saliency"])
    assert saliency.shape == (300, 451)
    assert saliency[150, 200] > 200 and saliency[20, 440] < 50  # the cat, and what is behind it

    names = {"F": F, "torch": torch, "Tensor": torch.Tensor, "iou_loss": a2s.iou_loss}
    exec(loss, names)
    y = torch.tensor([[[[0.0, 0.0]]]])
    g = torch.tensor([[[[1.0, 0.0]]]])  # p = 0.5, 0.5: BCE log 2, IoU 0.5 / 1.5
    expected = torch.tensor(2.0).log() + 1 - 1 / 3
    torch.testing.assert_close(names["detector_loss"](y, g), expected)

    names = {"Pyramid": Pyramid, "torchvision": torchvision}
    exec(encoder.replace('"DEFAULT"', "None"), names)
    net = names["EfficientNet"]().eval()
    with torch.no_grad():
        taps = net(torch.rand(1, 3, 64, 64))
    shapes = [(channels, 64 // stride) for channels, stride in zip(net.channels, (2, 4, 8, 16, 32))]
    assert [tuple(tap.shape[1:3]) for tap in taps] == shapes
    a2s.ActivationNet(net)  # a method asks for no more

"""House rules that a machine can check: budgets, imports, and a README that says what CI runs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for at in (".", "common", "data", "tests") for p in (ROOT / at).glob("*.py"))
SCRIPTS = [p for p in FILES if p.parent == ROOT]
BANNERS = ["Config", "Model", "Losses", "Training", "Evaluation", "Main"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_lines_are_at_most_100_wide_and_functions_at_most_70_long(path):
    lines = path.read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno > 70] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_only_the_five_packages_are_imported(path):
    allowed = set(sys.stdlib_module_names) | {
        "torch",
        "torchvision",
        "numpy",
        "PIL",
        "pytest",
        "common",
        "data",
        "recipe",
        "helpers",
    }
    allowed |= {p.stem for p in SCRIPTS} if path.parent.name == "tests" else set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert [n for n in names if n.split(".")[0] not in allowed] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_have_the_same_banners_in_the_same_order(path):
    titles = [
        line.strip("# -").split(":")[0]
        for line in path.read_text().splitlines()
        if line.startswith("# ---- ")
    ]
    places = [
        min(i for i, title in enumerate(titles) if title.startswith(banner)) for banner in BANNERS
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name != "tests"], ids=lambda p: p.name
)
def test_public_functions_and_classes_have_docstrings(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_importing_has_no_side_effects(tmp_path, path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {path.stem}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_lists_of_stems_in_the_docs_are_in_the_repository():
    pages = [ROOT / "README.md", ROOT / "data" / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text() for page in pages)
    lists = set(re.findall(r"(?:@|LIST=|`)((?:data/splits/)?[\w-]+\d\.txt)", text))
    lists = {name if "/" in name else f"data/splits/{name}" for name in lists}
    assert len(lists) > 3 and not [name for name in lists if not (ROOT / name).is_file()]
    stems = {
        name: {line for line in (ROOT / name).read_text().splitlines() if line[0] != "#"}
        for name in lists
    }
    for name in lists:  # SET-train560.txt holds 560 stems, and none of SET-test140.txt
        assert len(stems[name]) == int(re.search(r"(\d+)\.txt", name)[1])
        assert "test" not in name or not [
            other for other in lists - {name} if stems[other] & stems[name]
        ]


def test_ci_runs_the_commands_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    setup = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt"
    assert setup in readme and setup.replace("install", "install -q") in ci
    assert "\npython -m pytest -q\n" in readme and "\npython -m pytest -q\n" in ci

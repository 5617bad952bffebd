"""House rules that a machine can check: budgets, imports, and pages that name what is there."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.registry import REGISTRY, SHAPES

ROOT = Path(__file__).parent.parent
FILES = sorted(p for at in (".", "common", "data", "tests") for p in (ROOT / at).glob("*.py"))
PRODUCT = [p for p in FILES if p.parent.name != "tests"]
SCRIPTS = [p for p in FILES if p.parent == ROOT]
PAGES = [ROOT / "README.md", *(ROOT / at / "README.md" for at in ("data", "tests"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BANNERS = ["Config", "Model", "Losses", "Training", "Evaluation", "Main"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_lines_are_at_most_100_wide_and_functions_at_most_70_long(path):
    lines = path.read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno > 70] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_only_the_five_packages_are_imported(path):
    packages = "torch torchvision numpy PIL pytest common data tests recipe helpers"
    allowed = set(sys.stdlib_module_names) | set(packages.split())
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


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: p.name)
def test_public_functions_and_classes_have_docstrings(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: p.name)
def test_terminal_output_goes_through_say_and_text_is_cut_at_line_feeds(path):
    """`print` fails on a closed pipe; `splitlines` also cuts at nine characters of other kinds."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "print" or called.endswith(".splitlines"):
                found.append(f"line {node.lineno}: {called}")
    if path.name == "runtime.py":  # `say` itself
        assert len(found) == 1 and found[0].endswith("print")
    else:
        assert found == []


@pytest.mark.skipif(not shutil.which("ruff"), reason="ruff is not installed: it is not needed")
@pytest.mark.parametrize("command", ["ruff check --no-cache .", "ruff format --no-cache --check ."])
def test_the_formatter_leaves_the_tree_as_it_is(command):
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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


# ---- Files that the pages name -------------------------------------------------------------------
def code_of(text: str) -> list[str]:
    """All that stands in backticks: the fenced blocks, then the inline code."""
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.S)
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    return fenced + re.findall(r"`([^`]+)`", rest)


def missing_files(text: str) -> list[str]:
    """Files of the repository that a page names in backticks and that are not there.

    These are Python files, and what lies in a folder of the repository; not files that a run writes
    and not copies that the page tells to make (`cp a2s.py mine.py`).
    """
    there = {path.name for path in ROOT.glob("**/*.py")} | set(
        re.findall(r"cp [\w./]+ ([\w./]+)", text)
    )
    missing = []
    for code in code_of(text):
        for name in re.findall(r"(?<![\w./-])[\w./-]+\.(?:py|md|html|txt|png|svg|pt|npz)\b", code):
            in_a_folder = name.split("/")[0] in ("common", "data", "docs", "tests", ".ci")
            if in_a_folder and not (ROOT / name).exists():
                missing.append(name)
            elif name.endswith(".py") and Path(name).name not in there:
                missing.append(name)
    return missing


def test_missing_files_are_found():
    text = "`common/bank.py` `common/nothing.py` `cp a2s.py mine.py` `mine.py` `run.py` `walk.py`"
    text += " `runs/x/last.pt` common/prose.py\n```\ndata/shapes.py\ntests/none.py\n```\n"
    assert missing_files(text) == ["tests/none.py", "common/nothing.py", "walk.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    assert missing_files(page.read_text()) == []


def script_commands(text: str) -> list[list[str]]:
    """The words of every command `python X.py …` of a page whose X.py is one of the scripts."""
    names = {path.name for path in SCRIPTS}
    commands = []
    for code in code_of(text):
        for line in re.split(r"\n|&&", code.replace("\\\n", " ")):
            words = shlex.split(line, comments=True) if line.strip().startswith("python ") else []
            if len(words) > 1 and words[1] in names:
                commands.append(words[1:])
    return commands


def unknown_names(words: list[str], text: str) -> list[str]:
    """What a command names and a reader lacks; exits where the script does not know a flag.

    Known are registered sets, folders (they end with /: one's own photos), lists and weights that
    are in the repository, files of a run, and files of which the page speaks elsewhere.
    """
    script, *flags = words
    args = importlib.import_module(Path(script).stem).build_parser().parse_args(flags)
    unknown = []
    for spec in [args.data, *(args.eval or [])]:
        for part in spec.split("+"):
            name, _, stems = part.partition("@")
            if not name.endswith("/") and name not in REGISTRY | SHAPES:
                unknown.append(name)
            if stems and not (ROOT / stems).is_file():
                unknown.append(stems)
    run_folders = ("runs/", *re.findall(r"--out ([\w./-]+)", text))
    for word in flags:
        if re.search(r"^[^@=]+\.(pth|pt|safetensors|tar|json|jpg|png|vocab)$", word):
            there = word.startswith(run_folders) or (ROOT / word).is_file()
            if not there and text.count(word) < 2:
                unknown.append(word)
    return unknown


@pytest.mark.parametrize(
    "command, unknown",
    [
        ("python a2s.py --data photos/ --eval ECSSD shapes-test", []),
        ("python a2s.py --data ECSSD@data/splits/ECSSD-train560.txt+photos/", []),
        ("python a2s.py --data ECSD+photos/", ["ECSD"]),
        (
            "python a2s.py --data ECSSD@data/splits/ECSSD-train56.txt",
            ["data/splits/ECSSD-train56.txt"],
        ),
        (
            "python a2s.py --predict photo.jpg --weights runs/a2s-shapes/stage2/last.pt",
            ["photo.jpg"],
        ),
    ],
)
def test_unknown_names_are_found(command, unknown):
    (words,) = script_commands(f"x\n```bash\ncd here && {command}  # a comment\n```\n")
    assert unknown_names(words, command) == unknown


def test_files_of_which_a_page_speaks_are_known():
    words = "a2s.py --predict photo.jpg --weights coco/last.pt".split()
    assert unknown_names(words, " ".join(words)) == ["photo.jpg", "coco/last.pt"]
    assert unknown_names(words, f"{words}: a `photo.jpg` and what `--out coco` has written") == []


def test_unknown_flags_are_found(capsys):
    with pytest.raises(SystemExit):
        unknown_names("a2s.py --epoch 3 --nonsense".split(), "")
    assert "--nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_of_a_page_are_understood_and_name_what_is_there(page):
    commands = [words for words in script_commands(page.read_text()) if "--help" not in words]
    everything = "".join(other.read_text() for other in (*PAGES, *SCRIPTS))
    found = [unknown_names(words, everything) for words in commands if "$" not in str(words)]
    assert sum(found, []) == []
    assert page != ROOT / "README.md" or len(found) > 5

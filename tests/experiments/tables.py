"""What the experiments share: train a row of a table unless it has been, write the table to a page.

    args = options(__doc__)                            # where photos and weights lie, which seeds
    table(args, "docs/a2s.md", "a2s_photos", "a2s.py", flags, ROWS, COLUMNS)

A row is a name and what it changes in the flags; a column is a name and what it takes from a run,
the record that `train` returns. A run lies in its own folder below --out. It is finished when
experiment.json is there; an interrupted one continues with --resume. So a queue of tables can be
stopped and started again.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TRAIN = "ECSSD@data/splits/ECSSD-train560.txt"
TEST = "ECSSD@data/splits/ECSSD-test140.txt"


def options(doc: str) -> argparse.Namespace:
    """The flags that all experiments have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", default="data", help="where ECSSD lies [data]")
    parser.add_argument("--backbone-weights", default="imagenet", help="MobileNetV2's [imagenet]")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only rows whose name starts like one of these")
    return parser.parse_args()


def wanted(args: argparse.Namespace, name: str) -> bool:
    """Whether --rows asks for a row."""
    return not args.rows or any(name.startswith(row) for row in args.rows)


def photo_flags(args: argparse.Namespace, size: int) -> str:
    """The flags of a run on the photos: MobileNetV2, fp32."""
    return (
        f"--data {TRAIN} --eval {TEST} --data-root {args.data_root} --backbone mobilenet_v2 "
        f"--backbone-weights {args.backbone_weights} --size {size} --amp off"
    )


def table(
    args: argparse.Namespace,
    page: str,
    name: str,
    script: str,
    flags: str,
    rows: dict[str, str],
    columns: dict[str, Callable[[dict], float]],
    before: Callable[[Path, int], None] = lambda folder, seed: None,
) -> None:
    """Train the rows that are asked for with every seed, and write a table of means and ranges.

    Rows that nobody has trained say "not run". before(folder, seed): is called before a run.
    """
    lines, notes = [], []
    for row, change in rows.items():
        found = []
        for seed in args.seeds:
            folder = run_folder(args, f"{name}/{row} seed {seed}")
            if wanted(args, row):
                before(folder, seed)
                found.append(train(args, script, folder, f"{flags} --seed {seed} {change}"))
            elif (folder / "experiment.json").exists():
                found.append(json.loads((folder / "experiment.json").read_text()))
        cells = [spread([take(run) for run in found]) for take in columns.values()]
        minutes = f"{sum(run['minutes'] for run in found) / len(found):.0f}" if found else "not run"
        lines.append([row, *cells, minutes])
        if found and not notes:
            notes = [f"First row: `{found[0]['command']}`, commit {found[0]['commit']}."]
    changes = "; ".join(f"{row}: `{change}`" for row, change in rows.items() if change)
    notes.append(f"The others add: {changes}." if changes else "")
    write_table(page, name, ["row", *columns, "minutes"], lines, notes)


def share_labels(args: argparse.Namespace, row: str) -> Callable[[Path, int], None]:
    """A `before` of `table`: a stage 2 finds the pseudo labels of the stage 1 named "TABLE/ROW"."""

    def share(folder: Path, seed: int) -> None:
        labels = run_folder(args, f"{row} seed {seed}") / "pseudo"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "pseudo").exists():
            (folder / "pseudo").symlink_to(labels)

    return share


def score(title: str, name: str) -> Callable[[dict], float]:
    """A column: a score of a run, for example of the title "-label"; "" is the method's map."""
    return lambda run: run["scores"][title][name]


def run_folder(args: argparse.Namespace, name: str) -> Path:
    """Where the run of a row lies: its name in plain letters, below --out."""
    return args.out.resolve() / re.sub("[^a-z0-9/]+", "-", name.lower())


def train(args: argparse.Namespace, script: str, folder: Path, flags: str) -> dict:
    """Run `script` with `flags` into a run folder, unless it is finished.

    Returns experiment.json: command, commit, minutes of training, scores {title: {name: value}} of
    all stages, the last line of each stage's log, and the folder.
    """
    record = folder / "experiment.json"
    if record.exists():
        return json.loads(record.read_text())
    command = [script, *flags.split(), "--out", str(folder)]
    if list(folder.glob("**/last.pt")):
        command.append("--resume")
    print("python", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)

    # What the stages of the run have left.
    scores, logs, about = {}, {}, []
    for file in sorted(folder.glob("**/eval.json")):
        scores |= json.loads(file.read_text())
    for file in sorted(folder.glob("**/log.jsonl")):
        logs[file.parent.name] = json.loads(file.read_text().strip().split("\n")[-1])
    for file in sorted(folder.glob("**/args.json")):
        about.append(json.loads(file.read_text()))
    result = {
        "command": shown(args, f"python {script} {flags}"),
        "commit": about[-1]["commit"],
        "minutes": sum(one["minutes"] for one in about),
        "scores": {title.split("test140")[-1]: row for title, row in scores.items()},
        "logs": logs,
        "folder": str(folder),
    }
    record.write_text(json.dumps(result, indent=2) + "\n")
    return result


def shown(args: argparse.Namespace, command: str) -> str:
    """A command as the pages show it: DIR and FILE instead of the paths of this machine."""
    if args.data_root != "data":
        command = command.replace(args.data_root, "DIR")
    if args.backbone_weights != "imagenet":
        command = command.replace(args.backbone_weights, "FILE")
    return " ".join(command.split())


def spread(values: Sequence[float]) -> str:
    """'.719 (.712 to .731)': the mean over seeds, the least and the greatest; or "not run"."""

    def short(value: float) -> str:
        return f"{value:.3f}".replace("0.", ".", 1)

    if not values:
        return "not run"
    mean = short(sum(values) / len(values))
    if len(values) == 1:
        return f"{mean} (one seed)"
    return f"{mean} ({short(min(values))} to {short(max(values))})"


def write_table(
    page: str, name: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    """Write a Markdown table, and notes below it, between the markers of `name` on a page."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    text = "\n".join([*lines, "", *notes])
    print(text, flush=True)
    path = ROOT / page
    start = f"<!-- table: {name} -->"
    pattern = re.compile(re.escape(start) + r".*?<!-- end -->", re.S)
    old = path.read_text(encoding="utf-8")
    if not pattern.search(old):
        raise SystemExit(f"{page} has no place for the table: {start} … <!-- end -->")
    path.write_text(pattern.sub(lambda _: f"{start}\n{text}\n<!-- end -->", old), encoding="utf-8")

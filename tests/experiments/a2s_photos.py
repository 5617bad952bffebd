"""A2S on 560 photos of ECSSD, scored on 140 others: both stages, and one change at a time.

    python -m tests.experiments.a2s_photos --data-root DIR --backbone-weights FILE

Stage 1 has 3 epochs, stage 2 has 6. Rows of stage 2 start from the labels of the first row with the
same seed. F is F_mean. `mirror` is the correlation of maps of photos and of mirrored photos.
"""

from tests.experiments.tables import (
    options,
    photo_flags,
    run_folder,
    shown,
    spread,
    train,
    wanted,
    write_table,
)

STAGE_1 = {
    "A3, the paper's": "",
    "replicated borders": "--borders replicate",
    "A0, the encoder learns": "--train-encoder",
    "A1, no auxiliary losses": "--aux 0 0 0",
    "A2, no pixel drop": "--drop 0",
    "alpha 0": "--alpha 0",
    "alpha 0.2": "--alpha 0.2",
    "alpha 0.3": "--alpha 0.3",
}
STAGE_2 = {
    "OLR, RAM, the paper's": "",
    "labels as they are": "--rectify off",
    "HMA": "--rectify hma",
    "convolution instead of RAM": "--detector conv",
}


def main() -> None:
    """Train what is missing, then write the two tables."""
    args = options(__doc__)
    header = "stage 1 | activation F | activation MAE | label F | label MAE | mirror | minutes"
    table(args, 1, STAGE_1, "--stage 1 --epochs 3", stage_1_cells, "a2s_photos", header)
    header = "stage 2 | F | F_max | S | MAE | minutes"
    table(args, 2, STAGE_2, "--stage 2 --epochs 6", stage_2_cells, "a2s_stage2", header)


def table(args, stage: int, changes: dict, of_stage: str, cells, name: str, header: str) -> None:
    """Train the rows of a stage that are asked for; the others say "not run"."""
    header = header.split(" | ")
    flags = photo_flags(args, size=160)
    rows, commands = [], []
    for row, change in changes.items():
        if not wanted(args, row):
            rows.append([row, *["not run"] * (len(header) - 1)])
            continue
        found = []
        for seed in args.seeds:
            folder = f"a2s/stage{stage} {row} seed {seed}"
            if stage == 2:
                share_labels(args, folder, seed)
            command = f"{flags} {of_stage} --seed {seed} {change}"
            found.append(train(args, "a2s.py", folder, command))
        rows.append([row, *cells(found)])
        command = shown(args, found[0]["command"])
        commands.append(f"`{command}`, commit {found[0]['commit']}")
    if commands:
        write_table("docs/a2s.md", name, header, rows, commands[:1])


def share_labels(args, folder: str, seed: int) -> None:
    """Let a stage 2 find the pseudo labels of the first row of stage 1."""
    first = next(iter(STAGE_1))
    labels = run_folder(args, f"a2s/stage1 {first} seed {seed}") / "pseudo"
    link = run_folder(args, folder) / "pseudo"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(labels)


def stage_1_cells(found: list[dict]) -> list[str]:
    """Scores of the activation and of the label, mirror, and minutes."""
    cells = []
    for title in ("-activation", "-label"):
        cells.append(spread([one["scores"][title]["F_mean"] for one in found]))
        cells.append(spread([one["scores"][title]["MAE"] for one in found]))
    cells.append(spread([one["logs"]["stage1"]["mirror"] for one in found]))
    cells.append(f"{sum(one['minutes'] for one in found) / len(found):.0f}")
    return cells


def stage_2_cells(found: list[dict]) -> list[str]:
    """Scores of the detector, and minutes."""
    cells = []
    for name in ("F_mean", "F_max", "S", "MAE"):
        cells.append(spread([one["scores"][""][name] for one in found]))
    cells.append(f"{sum(one['minutes'] for one in found) / len(found):.0f}")
    return cells


if __name__ == "__main__":
    main()

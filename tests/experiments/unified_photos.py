"""Unified USOD on 560 photos of ECSSD, scored on 140 others: both stages, one change at a time.

    python -m tests.experiments.unified_photos --data-root DIR --backbone-weights FILE

Rows of stage 2 start from the labels of the first row with the same seed. F is F_mean.
"""

from tests.experiments.tables import options, photo_flags, score, share_labels, table

STAGE_1 = {
    "PCL, the paper's": "",
    "no curriculum": "--pcl off",
    "no texture matching": "--gamma 0",
    "one scale": "--multi-scale off",
}
STAGE_2 = {
    "SPR, the paper's": "",
    "labels as they are": "--spr 0 0 1",
    "posterior alone": "--spr 0 0.8 0.2",
}
OF_STAGE_1 = {
    "cue F": score("-cue", "F_mean"),
    "cue MAE": score("-cue", "MAE"),
    "label F": score("-label", "F_mean"),
    "label MAE": score("-label", "MAE"),
    "mirror": lambda run: run["logs"]["stage1"]["mirror"],
}
OF_STAGE_2 = {name: score("", name) for name in ("F_mean", "F_max", "S", "MAE")}


def main() -> None:
    """Train what is missing, then write the two tables."""
    args = options(__doc__)
    page = "docs/unified_usod.md"
    flags = photo_flags(args, size=160)
    stage_1 = f"{flags} --stage 1 --epochs 3"
    table(args, page, "unified_photos", "unified_usod.py", stage_1, STAGE_1, OF_STAGE_1)

    labels = share_labels(args, "unified_photos/PCL, the paper's")
    stage_2 = f"{flags} --stage 2 --epochs 15 --lr 0.01 --width 0.25"
    table(args, page, "unified_stage2", "unified_usod.py", stage_2, STAGE_2, OF_STAGE_2, labels)


if __name__ == "__main__":
    main()

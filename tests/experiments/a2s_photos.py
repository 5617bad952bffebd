"""A2S on 560 photos of ECSSD, scored on 140 others: both stages, and one change at a time.

    python -m tests.experiments.a2s_photos --data-root DIR --backbone-weights FILE

Rows of stage 2 start from the labels of the first row with the same seed. F is F_mean. `mirror` is
the correlation of maps of photos and of mirrored photos.
"""

from tests.experiments.tables import options, photo_flags, score, share_labels, table

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
OF_STAGE_1 = {
    "activation F": score("-activation", "F_mean"),
    "activation MAE": score("-activation", "MAE"),
    "label F": score("-label", "F_mean"),
    "label MAE": score("-label", "MAE"),
    "mirror": lambda run: run["logs"]["stage1"]["mirror"],
}
OF_STAGE_2 = {name: score("", name) for name in ("F_mean", "F_max", "S", "MAE")}


def main() -> None:
    """Train what is missing, then write the two tables."""
    args = options(__doc__)
    page = "docs/a2s.md"
    flags = photo_flags(args, size=160)
    stage_1 = f"{flags} --stage 1 --epochs 3"
    table(args, page, "a2s_photos", "a2s.py", stage_1, STAGE_1, OF_STAGE_1)

    labels = share_labels(args, "a2s_photos/A3, the paper's")
    stage_2 = f"{flags} --stage 2 --epochs 12"
    table(args, page, "a2s_stage2", "a2s.py", stage_2, STAGE_2, OF_STAGE_2, labels)


if __name__ == "__main__":
    main()

"""CLASS on 560 photos of ECSSD with masks, scored on 140 others: rows of Table 2.

    python -m tests.experiments.class_photos --data-root DIR --backbone-weights FILE

F_mean favours saturated maps, so F_max and S stand beside it. alpha and beta are the learnt weights
of position and channel attention, which start at 0: the greatest of the three levels.
"""

import torch

from tests.experiments.tables import options, photo_flags, score, table

ROWS = {
    "10, the paper's": "",
    "1, pixel loss": "--attention --fusion sum --outputs 1 --losses pixel",
    "3, three losses": "--attention --fusion sum --outputs 1",
    "4, four outputs": "--attention --fusion sum",
    "9, all but the losses": "--losses pixel",
}


def greatest(name: str):
    """A column: the greatest of the parameters of that name in the run's last checkpoint."""

    def take(run: dict) -> float:
        model = torch.load(f"{run['folder']}/last.pt", weights_only=True)["model"]
        found = [abs(value.item()) for key, value in model.items() if key.endswith(f".{name}")]
        return max(found, default=0.0)

    return take


def main() -> None:
    """Train what is missing, then write the table."""
    args = options(__doc__)
    flags = f"{photo_flags(args, size=160)} --epochs 12 --batch-size 8 --lr 0.03"
    columns = {name: score("", name) for name in ("F_mean", "F_max", "S", "MAE")}
    columns |= {name: greatest(name) for name in ("alpha", "beta")}
    table(args, "docs/class_net.md", "class_photos", "class_net.py", flags, ROWS, columns)


if __name__ == "__main__":
    main()

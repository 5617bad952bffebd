"""What the tests of the scripts share: small runs, programs, checkpoints, photos of noise.

done = run_script("a2s.py", *small_flags(lists), "--out", folder)    # lists: see conftest.py
assert same(last(folder, "stage1"), last(other, "stage1"))
assert "--lr" in refused(a2s.main, "--lr", "1e30")
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.runtime import UserError
from data.shapes import Shapes

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TWO_PROCESSES = "-m torch.distributed.run --standalone --nproc_per_node 2".split()


# ---- Small runs ----------------------------------------------------------------------------------
def write_lists(folder: Path, train: int = 16, test: int = 4, view: str = "side") -> Path:
    """Write train.txt and test.txt, which restrict the shapes to that many scenes; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        names = Shapes(split, view=view).names[:count]
        (folder / f"{split}.txt").write_text("\n".join(names))
    return folder


def small_flags(lists: Path, size: int = 64, epochs: int = 3) -> list[str]:
    """The flags of a run on the scenes of `write_lists`, four in a batch, on the CPU."""
    sets = f"--data shapes@{lists}/train.txt --eval shapes-test@{lists}/test.txt"
    return f"{sets} --size {size} --batch-size 4 --epochs {epochs} --device cpu".split()


# ---- Programs ------------------------------------------------------------------------------------
def run_script(script: str, *flags, launcher=()) -> subprocess.CompletedProcess:
    """Run a script of the repository's root as a program and return the finished process.

    launcher: flags of Python before the script, for example `TWO_PROCESSES`.
    """
    return subprocess.run(
        [sys.executable, *launcher, script, *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def kill_in_training(script: str, *flags, log: Path) -> None:
    """Start a script as a program and kill it at some moment after its second epoch is logged."""
    process = subprocess.Popen(
        [sys.executable, script, *map(str, flags)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 0.4))
    process.send_signal(signal.SIGKILL)
    process.wait()


def error_line(done: subprocess.CompletedProcess) -> str:
    """The sentence with which a program ended; there is exactly one, and no traceback."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (sentence,) = [line for line in done.stderr.split("\n") if line.startswith("error: ")]
    return sentence.removeprefix("error: ")


def refused(main: Callable, *flags) -> str:
    """The sentence of the `UserError` with which `main([flags])` ends; in this process."""
    with pytest.raises(UserError) as error:
        main([str(flag) for flag in flags])
    return str(error.value)


# ---- Files ---------------------------------------------------------------------------------------
def last(folder: Path, stage: str | int | None = None) -> dict:
    """The checkpoint of a run folder with its labels; stage: "sod", or 1 for the folder stage1."""
    if isinstance(stage, int):
        stage = f"stage{stage}"
    folder = Path(folder, stage or "")
    saved = torch.load(folder / "last.pt", weights_only=True)
    if saved["labels"]:  # the name of their file
        saved["labels"] = torch.load(folder / saved["labels"], weights_only=True)["labels"]
    return saved


def same(a: dict, b: dict) -> bool:
    """Whether two checkpoints hold the same weights and labels, bit for bit."""
    if a["model"].keys() != b["model"].keys():
        return False
    if not all(torch.equal(value, b["model"][key]) for key, value in a["model"].items()):
        return False
    if a.get("labels") is None or b.get("labels") is None:
        return a.get("labels") is None and b.get("labels") is None
    return torch.equal(a["labels"], b["labels"])


def write_photo(path: Path, width: int = 40, height: int = 40, seed: int = 0) -> Path:
    """Write a photo of coloured noise; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path

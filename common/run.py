"""The bookkeeping of a training stage: run folder, resuming, log, checkpoints.

    claim(settings, {"stage1": schedule})              # this run's folder, and nobody else's
    run = Run(settings, 1, bank, net, optimiser, schedule, folder="stage1")
    for epoch in run.epochs():                         # with --resume from last.pt on
        for index, flip in run.batches():              # the samples of one step, and their flips
            ...                                        # forward, loss
            optimiser.zero_grad()
            run.scaler.scale(loss).backward()          # scaled in fp16 alone
            run.scaler.step(optimiser)
            run.scaler.update()
            run.add(loss=loss)
        run.end_epoch(lr=lr)                           # a line of the log, last.pt

Nothing here computes a loss or touches a gradient. What a run sees in an epoch depends on
(seed, epoch) alone, so an interrupted run continues exactly, and the number of processes does not
change the order of the samples.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common import runtime
from common.bank import Bank, MapBank, batches, epoch_order
from common.curves import read_log, write_log
from common.datasets import is_picture, is_run
from common.flags import Schedule, Settings
from common.runtime import UserError, say

# ---- Checkpoints ---------------------------------------------------------------------------------
# Flags that do not change what is learnt: they may differ between a run and its continuation.
FREE = {
    "out", "data_root", "device", "compile", "deterministic", "eval", "watch", "resume",
    "overwrite", "weights", "stage", "predict", "explain", "cutout", "overlay", "skip_existing",
    "crf", "preset", "base", "photos", "test_maps", "words",
}  # fmt: skip


def spell(name: str, value: object) -> str:
    """A flag as one types it: '--aux 0.1 0.3 0.5', '--compile', 'no --compile'."""
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return f"no {flag}"
    if value is True:
        return flag
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join([flag, *map(str, values)])


def other_flags(saved: dict, flags: dict) -> str:
    """The flags of a checkpoint that differ from `flags`, as one types them; '' if none does."""
    differ = [name for name in flags if name not in FREE and flags[name] != saved.get(name)]
    return ", ".join(spell(name, saved.get(name)) for name in differ)


# ---- The run folder ------------------------------------------------------------------------------
def claim(settings: Settings, stages: dict[str, Schedule]) -> None:
    """Take the run folder for this process, before anything is trained.

    stages: those to train, {folder below the run folder: schedule}.
    Raises `UserError` where something would be lost or mixed up: another process writes to the
    folder, a run with other flags or an unfinished one is there, --resume finds nothing to resume,
    or --dry-run meets a full run.
    """
    photos = Path(settings.data)
    if photos.is_dir() and photos.resolve() == settings.out.resolve():
        raise UserError(f"--out {settings.out} is the folder of the photos: give another one")
    if not is_run(settings.out) and any(is_picture(file.name) for file in settings.out.glob("*")):
        raise UserError(f"--out {settings.out} is a folder of pictures: give another one")
    if settings.world.main:
        runtime.lock(settings.out)
        runtime.remove_parts(settings.out)
    paths = {settings.out / folder / "last.pt": one for folder, one in stages.items()}
    there = [path for path in paths if path.exists()]
    if settings.resume and not there:
        raise UserError(
            f"--resume: there is no {' or '.join(map(str, paths))} to go on from; check --out, or "
            "leave --resume out to start anew"
        )
    if not settings.resume and not settings.overwrite:
        for path in there:
            refuse_to_overwrite(path, settings, paths[path])


def refuse_to_overwrite(path: Path, settings: Settings, schedule: Schedule) -> None:
    """Raise `UserError` unless the checkpoint is of the same run, or of a dry run."""
    saved = runtime.load_checkpoint(path, settings.method)
    flags = settings.flags | schedule._asdict()
    if saved["args"].get("dry_run"):
        return
    if settings.dry_run:
        raise UserError(f"--dry-run would overwrite {path}: give it an --out of its own")
    other = other_flags(saved["args"], flags)
    if other:
        raise UserError(
            f"{path} holds a run with {other}: give another --out for a new run, the same flags "
            "and --resume to continue that one, or --overwrite to replace it"
        )
    if saved["epoch"] < schedule.epochs:
        raise UserError(
            f"{path} holds an unfinished run, epoch {saved['epoch']} of {schedule.epochs}: go on "
            "with --resume, give another --out, or start anew with --overwrite"
        )


# ---- One stage -----------------------------------------------------------------------------------
class Run:
    """One training stage; the head of this file shows how it is used.

    stage: its number or name. folder: of the stage, below the run folder. labels: a `MapBank` that
    training writes to, and that last.pt therefore has to hold. extra: what a checkpoint needs to
    know besides the flags (a vocabulary).
    Raises `UserError` if a checkpoint is there that is of other flags or other photos.
    """

    def __init__(
        self,
        settings: Settings,
        stage: int | str,
        bank: Bank,
        net: nn.Module,
        optimiser: torch.optim.Optimizer,
        schedule: Schedule,
        labels: MapBank | None = None,
        folder: str = ".",
        extra: dict | None = None,
    ):
        self.settings = settings
        self.stage = stage
        self.name = "training" if folder == "." else f"stage {stage}"  # on the terminal
        self.world = settings.world
        self.folder = settings.out / folder
        self.bank = bank
        self.optimiser = optimiser
        self.labels = labels
        self.labels_file = None  # the name of the file with the labels of last.pt
        self.extra = extra or {}
        self.last = schedule.epochs
        self.flags = settings.flags | schedule._asdict() | {"photos": photos_of(bank)}

        # fp16 needs losses that are scaled up before backward, lest small gradients become 0.
        half = runtime.precision(settings.device, settings.amp) is torch.float16
        self.scaler = torch.amp.GradScaler(settings.device.type, enabled=half)

        # `raw` is the network itself, which is saved. `net` is what training calls: with several
        # processes a wrapper of it that averages gradients.
        self.raw = net
        self.done = self.resume()  # finished epochs
        self.log = Log(self.folder, self.last, self.done, quiet=not self.world.main)
        if self.world.main:
            self.about = self.surroundings()
            self.save_args()
        self.net = self.world.parallel(net)

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to do, from 1."""
        for epoch in range(self.done + 1, self.last + 1):
            self.epoch = epoch
            self.raw.train()
            yield epoch

    def batches(self, flips: str = "anew") -> Iterator[tuple[Tensor, Tensor]]:
        """(index [b], flip [b]) of every step of this epoch.

        index: numbers of samples of the bank, int64 on the CPU. flip: bool, see `bank.batches`.
        Before each step `self.time` is the number of epochs done, a fraction, and `self.step` that
        of steps. Afterwards the means of what was added are in `self.means`; a loss that is not a
        number is refused, and BatchNorm's statistics are averaged over the processes.
        """
        settings = self.settings
        world = self.world

        # The samples of this epoch in their order, whole batches only.
        self.order, self.batch = epoch_order(
            len(self.bank), settings.batch_size, settings.seed, self.epoch, world
        )
        self.steps = len(self.order) // self.batch
        drawn = batches(self.order, self.batch, settings.seed, self.epoch, world, flips)

        # Hand out one step after the other; the first six of a run tell how long it will take.
        self.sums = {}
        start = time.time()
        steps = runtime.progress(drawn, f"{self.name} epoch {self.epoch}", self.steps)
        for done, (index, flip) in enumerate(steps):
            self.time = self.epoch - 1 + done / self.steps
            self.step = (self.epoch - 1) * self.steps + done
            yield index, flip
            if done == 5 and self.epoch == self.done + 1:
                self.announce((time.time() - start) / (done + 1))

        # The means over all steps and processes.
        self.means = {}
        for name, total in self.sums.items():
            self.means[name] = sum(world.gather(float(total) / self.steps)) / world.size
        self.seconds = time.time() - start
        if not math.isfinite(self.means["loss"]):
            raise UserError(
                f"the loss of epoch {self.epoch} is not a number; the checkpoint of epoch "
                f"{self.epoch - 1} is kept: start again with a lower --lr"
            )
        world.average_statistics(self.raw)

    def announce(self, seconds: float) -> None:
        """Say how long the stage will take, from the seconds of its first steps, if it is long."""
        minutes = seconds * self.steps * (self.last - self.done) / 60
        if minutes >= 10:
            span = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
            say(f"{self.name} will take about {span} at these settings; --preset small takes less")

    @property
    def mine(self) -> slice:
        """This process's part of something that was drawn for the whole batch."""
        share = self.batch // self.world.size
        return slice(self.world.rank * share, (self.world.rank + 1) * share)

    @property
    def picture(self) -> Path:
        """Where this epoch's picture belongs."""
        return self.folder / "vis" / f"epoch_{self.epoch:03d}.png"

    def add(self, **values: Tensor) -> None:
        """Add a step's losses to the epoch's means; "loss" must be among them."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def end_epoch(self, **shown: float) -> None:
        """Log the means and what is `shown`; write last.pt."""
        self.log.epoch(self.epoch, len(self.order), self.seconds, **self.means, **shown)
        if self.world.main:
            self.save()
            self.save_args()
        self.world.barrier()

    def save(self) -> None:
        """Write all that `resume` needs to go on as if nothing had happened.

        Labels have a file of their own, written only in epochs that changed them: of 3,000 photos
        at 320 pixels they are 307 MB, the rest of last.pt 208 MB (ResNet-50). last.pt names the
        file that belongs to it, so a crash between the two leaves the older pair whole.
        """
        if self.labels and self.labels.changed:
            self.labels_file = f"labels_{self.epoch:03d}.pt"
            runtime.save_checkpoint(self.folder / self.labels_file, labels=self.labels.pixels.cpu())
            self.labels.changed = False
        runtime.save_checkpoint(
            self.folder / "last.pt",
            method=self.settings.method,
            stage=self.stage,
            epoch=self.epoch,
            args=self.flags | self.extra,
            model=self.raw.state_dict(),
            optimiser=self.optimiser.state_dict(),
            scaler=self.scaler.state_dict(),
            labels=self.labels_file,
        )
        for file in self.folder.glob("labels_*.pt"):
            if file.name != self.labels_file:
                file.unlink()

    def resume(self) -> int:
        """Restore all that `end_epoch` wrote; the number of finished epochs, 0 without --resume."""
        path = self.folder / "last.pt"
        if not path.exists() or not self.settings.resume:
            return 0

        # The checkpoint must be of the same photos, flags and files.
        saved = runtime.load_checkpoint(path, self.settings.method, self.stage)
        before = saved["args"]
        differ = []
        if before.get("photos") != self.flags["photos"]:
            photos = f"{before.get('photos')} instead of {self.flags['photos']}"
            differ.append(f"on other photos, {photos}")
        if other := other_flags(before, self.flags):
            differ.append(f"with {other}")
        for name, value in self.extra.items():
            if before.get(name) != value:
                differ.append(f"with another {name.replace('_', ' ')}")
        if differ:
            raise UserError(
                f"{path} was trained {', '.join(differ)}: give the same flags and files to "
                "--resume, or another --out for a new run"
            )

        # Network, optimiser, scale of the loss, labels.
        runtime.load_state(self.raw, saved["model"], path)
        load_optimiser(self.optimiser, saved.get("optimiser"), path)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.labels_file = saved.get("labels")
        if self.labels and self.labels_file:
            self.labels.pixels.copy_(self.read_labels(self.folder / str(self.labels_file)))
        return saved["epoch"]

    def read_labels(self, path: Path) -> Tensor:
        """The labels that belong to a checkpoint; raises `UserError` if they do not fit."""
        pixels = runtime.torch_load(path).get("labels")
        wanted = self.labels.pixels
        fits = isinstance(pixels, Tensor) and pixels.dtype == wanted.dtype
        if not fits or pixels.shape != wanted.shape:
            raise UserError(
                f"{path} does not hold {len(wanted)} labels of this size: it is damaged"
            )
        return pixels

    def surroundings(self) -> dict:
        """What stays the same in args.json: command, digests of files, environment."""
        digests = {}
        for value in self.flags.values():
            if isinstance(value, str) and os.path.isfile(value):
                digests[value] = hashlib.sha256(Path(value).read_bytes()).hexdigest()
        return {
            "command": " ".join(sys.argv),
            "sha256": digests,
            **runtime.environment(self.settings.device),
        }

    def save_args(self) -> None:
        """Write args.json: flags, minutes so far, and `surroundings`."""
        content = {"flags": self.flags, "minutes": self.log.minutes, **self.about}
        runtime.save_json(self.folder / "args.json", content)


def load_optimiser(optimiser: torch.optim.Optimizer, saved: object, path: Path) -> None:
    """Restore what an optimiser keeps for each parameter: tensors of its shape, or single numbers.

    Learning rates and other options are those of the training. Raises `UserError` if something is
    missing or does not fit.
    """
    # What is kept: {number of a parameter: {"momentum_buffer": tensor, ...}}.
    state = saved.get("state") if isinstance(saved, dict) else None
    shapes = [p.shape for group in optimiser.param_groups for p in group["params"]]

    def fits(number: object, entry: object) -> bool:
        known = isinstance(number, int) and number in range(len(shapes))
        if not known or not isinstance(entry, dict):
            return False
        right = (shapes[number], torch.Size([]))
        return all(isinstance(value, Tensor) and value.shape in right for value in entry.values())

    whole = isinstance(state, dict) and all(fits(*item) for item in state.items())
    if not whole or len({frozenset(entry) for entry in state.values()}) > 1:
        raise UserError(
            f"{path} is a damaged checkpoint: its optimiser does not fit the network; start anew "
            "with --overwrite"
        )

    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def photos_of(bank: Bank) -> str:
    """'3000 (a1b2c3d4)': how many photos are trained on, and a digest of their names and files.

    The sizes of the files in bytes tell a photo that was replaced by another of the same name.
    """
    lines = [f"{name} {size}" for name, size in zip(bank.names, bank.file_sizes)]
    text = "\n".join(lines).encode(errors="backslashreplace")
    return f"{len(bank)} ({hashlib.sha256(text).hexdigest()[:8]})"


class Log:
    """One line per epoch on the terminal and in `log.jsonl`; `log.svg` draws them."""

    def __init__(self, folder: Path, epochs: int, done: int = 0, quiet: bool = False):
        self.folder = folder
        self.epochs = epochs
        self.done = done
        self.quiet = quiet
        self.start = time.time()
        self.last = self.start  # when the epoch before ended
        self.lines = []
        path = folder / "log.jsonl"
        if done and path.exists():  # a resumed run leaves out what came after its checkpoint
            self.lines = [line for line in read_log(path) if line["epoch"] <= done]
        self.write()

    def epoch(self, epoch: int, images: int, seconds: float, **values: float) -> None:
        """Report epoch number `epoch` (from 1) with its `values`.

        images, seconds: how many photos were trained on, and for how long; `seconds` of the log is
        the whole epoch, with pictures and checkpoint.
        """
        # What is shown: means, speed, memory, and the time that the rest will take.
        now = time.time()
        rate = images / seconds
        eta = (now - self.start) / (epoch - self.done) * (self.epochs - epoch)
        memory = torch.cuda.max_memory_allocated() / 1e9  # 0 without a GPU
        shown = [f"epoch {epoch:2d}/{self.epochs}"]
        shown += [f"{name} {value:.4g}" for name, value in values.items()]
        shown.append(f"{rate:.0f} img/s")
        if memory:
            shown.append(f"{memory:.1f} GB")
        shown.append(f"eta {eta // 60:.0f}m{eta % 60:02.0f}s")
        say(" | ".join(shown))

        # What is kept, in log.jsonl.
        line = {"epoch": epoch, **values, "images_per_s": rate, "memory_gb": memory}
        self.lines.append(line | {"seconds": now - self.last})
        self.last = now
        self.write()

    @property
    def minutes(self) -> float:
        """How long all epochs took, those before an interruption included."""
        return round(sum(line.get("seconds", 0) for line in self.lines) / 60, 2)

    def write(self) -> None:
        """Write both files anew, atomically."""
        if not self.quiet:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            runtime.save_text(self.folder / "log.jsonl", text)
            if self.lines:
                write_log(self.folder / "log.svg", self.lines)

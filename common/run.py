"""Flags, the settings that they become, and the bookkeeping of a training stage.

    parser = ...; add_flags(parser, PAPER, SHAPES)     # the flags that all scripts share
    settings = settle(args, "a2s")                     # device, processes, run folder; checked
    claim(settings, {"stage1": Schedule(20, 1.0)})     # this run's folder, and nobody else's

    run = Run(settings, 1, bank, net, optimiser, Schedule(20, 1.0), folder="stage1")
    for epoch in run.epochs():                         # with --resume from last.pt on
        for index, flip in run.batches():              # the samples of one step, and their flips
            ...                                        # forward, loss, backward, optimiser.step()
            run.add(loss=loss)
        run.end_epoch(lr=lr)                           # a line of the log, last.pt

Nothing here computes a loss or touches a gradient. What a run sees in an epoch depends on
(seed, epoch) alone, so an interrupted run continues exactly, and the number of processes does not
change the order of the samples.
"""

import argparse
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import runtime
from common.backbones import BACKBONES, PIXELS
from common.bank import Bank, MapBank, batches, epoch_order
from common.datasets import MissingSet, open_set
from common.runtime import UserError, World, say
from data.registry import SHAPES


# ---- Flags ---------------------------------------------------------------------------------------
class Schedule(NamedTuple):
    """How long a stage trains, and its highest learning rate."""

    epochs: int
    lr: float


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def learning_rate(text: str) -> float:
    """An argparse type: a learning rate above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def seed(text: str) -> int:
    """An argparse type: a seed of torch's generators."""
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def defaults(name: str, paper: dict, shapes: dict) -> str:
    """'[paper 320, shapes 160]': the default of a flag, for its help.

    epochs and lr are looked up in the schedules of the stages: '[paper 20 25, shapes 3 3]'.
    """

    def value(preset: dict) -> str:
        if name in preset:
            return str(preset[name])
        schedules = [one for one in preset.values() if isinstance(one, Schedule)]
        return " ".join(f"{getattr(schedule, name):g}" for schedule in schedules)

    return f"[paper {value(paper)}, shapes {value(shapes)}]"


def add_flags(parser: argparse.ArgumentParser, paper: dict, shapes: dict) -> None:
    """The flags that all scripts share, daily ones first; None stands for the preset's value."""
    daily = parser.add_argument_group("daily use")
    daily.add_argument(
        "--data",
        default="shapes",
        metavar="SET",
        help="a folder of photos, a registered set (python -m common.datasets lists them), sets "
        "joined with +, each restricted by SET@stems.txt [shapes]",
    )
    daily.add_argument(
        "--predict", type=Path, nargs="+", metavar="PATH", help="map photos or folders of them"
    )
    daily.add_argument(
        "--weights", type=Path, metavar="FILE", help="a checkpoint, for --eval and --predict"
    )
    daily.add_argument(
        "--eval", nargs="+", metavar="SET", help="sets to score on, spelt like --data"
    )
    daily.add_argument("--out", type=Path, metavar="DIR", help="run folder [runs/<script>-<data>]")
    daily.add_argument(
        "--resume",
        action="store_true",
        help="continue from the run folder's last.pt; with --stage 2 without making the labels of "
        "stage 1 again",
    )
    daily.add_argument(
        "--dry-run",
        action="store_true",
        help="two steps of every epoch, two batches of everything else",
    )
    add_training_flags(parser, paper, shapes)
    add_output_flags(parser)
    parser.set_defaults(pairs=False)  # True: the networks see a photo and its modality


def add_training_flags(parser: argparse.ArgumentParser, paper: dict, shapes: dict) -> None:
    """What decides on the result besides the method's own flags, and where it is computed."""
    train = parser.add_argument_group("training")
    for name, kind, text in (
        ("epochs", positive, "of each stage"),
        ("lr", learning_rate, "highest learning rate, of each stage"),
        ("batch-size", positive, "over all processes"),
        ("size", positive, "the network sees size x size pixels"),
    ):
        default = defaults(name.replace("-", "_"), paper, shapes)
        train.add_argument(f"--{name}", type=kind, metavar="N", help=f"{text} {default}")
    train.add_argument("--seed", type=seed, default=0, help="of all random numbers [0]")
    net = parser.add_argument_group("backbone")
    net.add_argument(
        "--backbone",
        choices=BACKBONES,
        help=f"the pretrained encoder {defaults('backbone', paper, shapes)}",
    )
    net.add_argument(
        "--backbone-weights",
        metavar="W",
        help="moco800, moco200, imagenet, none, or a file [the paper's]",
    )
    net.add_argument(
        "--pixels",
        choices=PIXELS,
        default="imagenet",
        help="how the backbone's weights want their pixels [imagenet]",
    )
    net.add_argument(
        "--borders",
        choices=("zeros", "replicate"),
        default="zeros",
        help="what the backbone's convolutions see beyond the border [zeros]",
    )
    place = parser.add_argument_group("runtime")
    place.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    place.add_argument(
        "--amp",
        choices=("auto", "bf16", "off"),
        default="auto",
        help="bf16 autocast; auto: on CUDA only. Losses are always fp32 [auto]",
    )
    place.add_argument("--compile", action="store_true", help="torch.compile the network")
    place.add_argument(
        "--data-root", default="data", metavar="DIR", help="where registered sets lie [data]"
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """What is written besides checkpoints and scores."""
    out = parser.add_argument_group("output")
    out.add_argument("--cutout", action="store_true", help="--predict also writes RGBA cut-outs")
    out.add_argument("--crf", action="store_true", help="refine predicted maps with the dense CRF")
    out.add_argument(
        "--watch",
        type=int,
        default=0,
        metavar="N",
        help="score N photos of the first --eval set after every epoch: to look at, never to "
        "choose an epoch by [0]",
    )
    out.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in a run folder that holds a run with other flags",
    )


def is_shapes(data: str) -> bool:
    """Whether --data names nothing but built-in sets: 'shapes+shapes-depth@list.txt'."""
    return all(part.split("@")[0] in SHAPES for part in data.split("+"))


def replaced(args: argparse.Namespace, **changes) -> argparse.Namespace:
    """A copy of the flags with some of them changed; flags are never changed in place."""
    return argparse.Namespace(**{**vars(args), **changes})


def completed(args: argparse.Namespace, preset: dict) -> argparse.Namespace:
    """A copy of the flags in which every None is replaced by the preset's value.

    A `Schedule` of the preset (key "stage1", ...) takes --epochs and --lr where they are given.
    """
    changes = {}
    for name, value in preset.items():
        if isinstance(value, Schedule):
            changes[name] = Schedule(args.epochs or value.epochs, args.lr or value.lr)
        elif getattr(args, name) is None:
            changes[name] = value
    return replaced(args, **changes)


def evaluation_sets(args: argparse.Namespace, usual: Sequence[str]) -> list[str]:
    """--eval, else what is there of the sets that the method usually scores on.

    --predict alone scores nothing. Sets that are not there are named on the terminal.
    """
    if args.eval is not None:
        return args.eval
    return [] if args.predict else present(usual, args.data_root)


def present(names: Sequence[str], root: str) -> list[str]:
    """Those of `names` that are there; the others are named on the terminal. Raises `UserError`
    for a set that is broken."""
    found = []
    for name in names:
        try:
            open_set(name, root)
        except MissingSet:
            continue
        found.append(name)
    missing = [name for name in names if name not in found]
    if missing:
        say("evaluation sets not found: " + ", ".join(missing))
    return found


def show_preset(args: argparse.Namespace, preset: dict) -> None:
    """Print the small preset, where it is used to train."""
    if is_shapes(args.data):
        shown = []
        for name in preset:
            value = getattr(args, name)
            if isinstance(value, Schedule):
                value = f"{value.epochs} epochs at rate {value.lr:g}"
            shown.append(f"{name} {value}")
        say("preset for shapes: " + ", ".join(shown))


# ---- Settings ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """What all functions of a run need to know. Made once from the flags, never changed."""

    method: str
    out: Path
    data: str
    data_root: str
    eval: list[str]
    predict: list[Path] | None
    size: int
    batch_size: int
    seed: int
    device: torch.device
    world: World
    amp: str
    compile: bool
    pairs: bool
    resume: bool
    overwrite: bool
    dry_run: bool
    watch: int
    crf: bool
    cutout: bool
    flags: dict = field(repr=False)  # all flags as plain values, for args.json and checkpoints


def settle(args: argparse.Namespace, method: str, captions: bool = False) -> Settings:
    """Resolve the device, join torchrun's processes, choose the run folder; print the choices.

    Raises `UserError` for what would come to light only after hours of training: an --eval set
    that is not there, has no masks (unless `captions` will do), or the name of another.
    """
    device, reason = runtime.pick_device(args.device)
    world = runtime.join_world(device)
    if args.batch_size % world.size:
        raise UserError(
            f"--batch-size {args.batch_size} cannot be split over {world.size} processes"
        )
    if args.weights and not args.eval and not args.predict:
        raise UserError(
            "--weights needs --eval SET or --predict PATH (training goes on with --resume)"
        )
    check_evaluation_sets(args, captions)
    names = Settings.__dataclass_fields__.keys() & vars(args).keys()
    values = {name: getattr(args, name) for name in names}
    values |= {"out": run_folder(args, method), "device": device, "world": world}
    settings = Settings(method=method, flags=plain_flags(args, device), **values)
    say(
        f"device {device} ({reason}), {world.size} process(es), backbone {args.backbone}, "
        f"{args.size} px, run folder {settings.out}"
    )
    return settings


def check_evaluation_sets(args: argparse.Namespace, captions: bool) -> None:
    """Raise `UserError` for an --eval set that cannot be scored; see `settle`."""
    titles = set()
    for spec in args.eval:
        dataset = open_set(spec, args.data_root)
        if not captions and dataset[0]["mask"] is None:
            raise UserError(f"--eval {spec} has no masks: there is nothing to score with")
        if dataset.title in titles:
            raise UserError(
                f"two --eval sets are called {dataset.title}, so the maps of one would overwrite "
                "those of the other: rename a folder"
            )
        titles.add(dataset.title)


def run_folder(args: argparse.Namespace, method: str) -> Path:
    """--out, or runs/<method>-<data>."""
    data = re.sub("[^A-Za-z0-9_.+-]+", "-", args.data).strip("-")
    return args.out or Path("runs", f"{method}-{data}")


def run_of(checkpoint: Path, stages: Sequence[str]) -> Path:
    """The run folder of <run>/<stage>/last.pt; of a checkpoint copied elsewhere its own folder."""
    folder = checkpoint.parent
    return folder.parent if folder.name in stages else folder


def plain_flags(args: argparse.Namespace, device: torch.device) -> dict:
    """The flags as plain values, for checkpoints and args.json."""
    plain = (int, float, str, list, tuple, type(None))
    flags = {}
    for name, value in vars(args).items():
        if not isinstance(value, Schedule):  # a stage's own is added by `Run`
            flags[name] = value if isinstance(value, plain) else str(value)
    return flags | {"device": str(device), "predict": None}


# ---- Checkpoints ---------------------------------------------------------------------------------
# Flags that do not change what is learnt: they may differ between a run and its continuation.
FREE = {
    "out", "data_root", "device", "compile", "eval", "watch", "resume", "overwrite", "weights",
    "stage", "predict", "cutout", "crf", "base", "photos",
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


def saved_flags(
    args: argparse.Namespace, saved: dict, fixed: Sequence[str], free: Sequence[str]
) -> argparse.Namespace:
    """A copy of the flags that fits a checkpoint.

    fixed: names of flags that describe its network; they become those of its training.
    free: names of flags that do so only where they were not given.
    """
    names = [*fixed, *(name for name in free if getattr(args, name) is None)]
    lost = [name for name in names if name not in saved["args"]]
    if lost:
        raise UserError(
            f"the checkpoint was made by another version: it does not tell {', '.join(lost)}; train "
            "again"
        )
    return replaced(args, **{name: saved["args"][name] for name in names})


# ---- The run folder ------------------------------------------------------------------------------
def claim(settings: Settings, stages: dict[str, Schedule]) -> None:
    """Take the run folder for this process, before anything is trained.

    stages: those to train, {folder below the run folder: schedule}.
    Raises `UserError` where something would be lost or mixed up: another process writes to the
    folder, a run with other flags or an unfinished one is there, --resume finds nothing to resume,
    or --dry-run meets a full run.
    """
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
        self.settings, self.stage, self.world = settings, stage, settings.world
        self.bank, self.optimiser, self.labels = bank, optimiser, labels
        self.folder, self.last = settings.out / folder, schedule.epochs
        self.raw = net
        self.flags = settings.flags | schedule._asdict() | {"photos": photos_of(bank)}
        self.extra = extra or {}
        self.done = self.resume()
        self.save_args()
        self.log = Log(self.folder, self.last, self.done, quiet=not self.world.main)
        self.net = self.world.parallel(net)  # averages gradients over the processes

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to do, from 1."""
        for epoch in range(self.done + 1, self.last + 1):
            self.epoch = epoch
            self.raw.train()
            yield epoch

    def batches(self, flips: str = "anew") -> Iterator[tuple[Tensor, Tensor]]:
        """(index [b], flip [b]) of every step of this epoch; two steps with --dry-run.

        Before each step `self.time` is the number of epochs done, a fraction, and `self.step` that
        of steps. Afterwards the means of what was added are in `self.means`; a loss that is not a
        number is refused, and BatchNorm's statistics are averaged over the processes.
        """
        settings, world = self.settings, self.world
        order, self.batch = epoch_order(
            len(self.bank), settings.batch_size, settings.seed, self.epoch, world
        )
        self.steps = len(order) // self.batch
        todo = min(2, self.steps) if settings.dry_run else self.steps
        drawn = batches(order, self.batch, settings.seed, self.epoch, world, flips)
        self.order = order[: todo * self.batch]  # the samples that this epoch really sees
        self.sums, start = {}, time.time()
        for done, (index, flip) in enumerate(
            runtime.progress(islice(drawn, todo), f"{self.name} epoch {self.epoch}", todo)
        ):
            self.time = self.epoch - 1 + done / self.steps
            self.step = (self.epoch - 1) * self.steps + done
            yield index, flip

        self.means = {}
        for name, total in self.sums.items():
            self.means[name] = sum(world.gather(float(total) / todo)) / world.size
        self.seconds = time.time() - start
        runtime.require_finite(self.means["loss"], self.epoch)
        world.average_statistics(self.raw)

    @property
    def name(self) -> str:
        """What the terminal calls this stage."""
        return f"stage {self.stage}" if isinstance(self.stage, int) else self.stage

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
            runtime.save_checkpoint(
                self.folder / "last.pt",
                method=self.settings.method,
                stage=self.stage,
                epoch=self.epoch,
                args=self.flags | self.extra,
                model=self.raw.state_dict(),
                optimiser=self.optimiser.state_dict(),
                labels=self.labels.pixels if self.labels else None,
            )
        self.world.barrier()

    def resume(self) -> int:
        """Restore all that `end_epoch` wrote; the number of finished epochs, 0 without --resume."""
        path = self.folder / "last.pt"
        if not path.exists() or not self.settings.resume:
            return 0
        saved = runtime.load_checkpoint(path, self.settings.method, self.stage)
        photos = saved["args"].get("photos")
        if photos != self.flags["photos"]:
            raise UserError(
                f"{path} was trained on other photos, {photos} instead of "
                f"{self.flags['photos']}: give another --out for a new run"
            )
        other = other_flags(saved["args"], self.flags)
        if other:
            raise UserError(
                f"{path} was trained with {other}: give the same flags to --resume, or another "
                "--out for a new run"
            )
        self.raw.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        if self.labels:
            self.labels.pixels.copy_(saved["labels"])
        return saved["epoch"]

    def save_args(self) -> None:
        """Write args.json: flags, versions, commit, digests of the files that flags name."""
        if not self.world.main:
            return
        digests = {}
        for value in self.flags.values():
            if isinstance(value, str) and os.path.isfile(value):
                digests[value] = runtime.sha256(value)
        content = {"flags": self.flags, "sha256": digests, **runtime.environment()}
        runtime.save_json(self.folder / "args.json", content)


def photos_of(bank: Bank) -> str:
    """'3000 (a1b2c3d4)': how many photos are trained on, and a digest of their names."""
    names = "\n".join(bank.names).encode(errors="backslashreplace")
    return f"{len(bank)} ({hashlib.sha256(names).hexdigest()[:8]})"


class Log:
    """One line per epoch on the terminal and one JSON object per epoch in `log.jsonl`."""

    def __init__(self, folder: Path, epochs: int, done: int = 0, quiet: bool = False):
        self.path, self.epochs, self.done, self.quiet = folder / "log.jsonl", epochs, done, quiet
        self.start = time.time()
        self.lines = []
        if done and self.path.exists():  # a resumed run forgets what came after its checkpoint
            self.lines = [line for line in read_log(self.path) if line["epoch"] <= done]
        self.write()

    def epoch(self, epoch: int, images: int, seconds: float, **values: float) -> None:
        """Report epoch number `epoch` (from 1), which saw `images` images, with its `values`."""
        rate = images / seconds
        eta = (time.time() - self.start) / (epoch - self.done) * (self.epochs - epoch)
        memory = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0) / 1e9
        shown = [f"epoch {epoch:2d}/{self.epochs}"]
        shown += [f"{name} {value:.4g}" for name, value in values.items()]
        shown.append(f"{rate:.0f} img/s")
        if memory:
            shown.append(f"{memory:.1f} GB")
        say(" | ".join([*shown, f"eta {eta // 60:.0f}m{eta % 60:02.0f}s"]))
        self.lines.append({"epoch": epoch, **values, "images_per_s": rate, "memory_gb": memory})
        self.write()

    def write(self) -> None:
        """Write the file anew, atomically."""
        if not self.quiet:
            runtime.save_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; lines that are broken are left out, and named on stderr."""
    lines = []
    for number, text in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        try:
            line = json.loads(text) if text else None
        except ValueError:
            line = "broken"
        if isinstance(line, dict) and isinstance(line.get("epoch"), int):
            lines.append(line)
        elif line is not None:
            say(f"warning: line {number} of {path} is broken and left out", error=True)
    return lines

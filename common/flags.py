"""Flags that all scripts share, and the settings that they become.

    add_flags(parser, PRESETS)                         # spelt once: they mean the same everywhere
    args = completed(args, PRESETS)                    # a value for every flag; args stay unchanged
    settings = settle(args, "a2s")                     # device, processes, run folder; checked

A preset is a dict of flags and, under the keys stage1, stage2, ..., a `Schedule` per stage; PRESETS
are those of a script by name.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from common import runtime
from common.backbones import BACKBONES, PIXELS
from common.datasets import MissingSet, View, open_set
from common.runtime import UserError, World, say
from data.registry import SHAPES

STDIN = Path("-")  # of --predict
NETWORKS = Path(__file__).parent.parent / "data" / "networks"  # what comes with the project


# ---- Flags ---------------------------------------------------------------------------------------
class Schedule(NamedTuple):
    """How long a stage trains, and its highest learning rate."""

    epochs: int
    lr: float

    def reached(self, epoch: int, milestone: int, paper_epochs: int) -> bool:
        """Whether `epoch` is as late in this run as epoch `milestone` is in the paper's.

        Both count from 1. What is compared is the share of the run that lies before an epoch, so a
        change that the paper makes after 14 of 25 epochs comes after 4 of 6, and at the paper's
        length exactly at its milestone.
        """
        return (epoch - 1) * paper_epochs >= (milestone - 1) * self.epochs


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


def defaults(name: str, presets: dict[str, dict]) -> str:
    """'[paper 320, shapes 160, small 192]': the default of a flag in every preset, for its help.

    epochs and lr are looked up in the schedules of the stages: '[paper 20 25, shapes 3 3, …]'.
    """

    def value(preset: dict) -> str:
        if name in preset:
            return str(preset[name])
        schedules = [one for one in preset.values() if isinstance(one, Schedule)]
        return " ".join(f"{getattr(schedule, name):g}" for schedule in schedules)

    return "[" + ", ".join(f"{of} {value(preset)}" for of, preset in presets.items()) + "]"


def add_flags(parser: argparse.ArgumentParser, presets: dict[str, dict]) -> None:
    """The flags that all scripts share, daily ones first; None stands for the preset's value.

    presets: "paper", "shapes" for the built-in pictures, "small" for one's own photos.
    """
    add = parser.add_argument_group("daily use").add_argument
    add(
        "--data",
        default="shapes",
        metavar="SET",
        help="a folder of photos, a registered set (python -m common.datasets lists them), sets "
        "joined with +, each restricted by SET@stems.txt [%(default)s]",
    )
    text = "map photos or folders of them; - maps one from the standard input to standard output"
    add("--predict", type=Path, nargs="+", action="extend", metavar="PATH", help=text)
    text = "draw the method at work on one photo: <out>/explain/NAME.png"
    add("--explain", type=Path, metavar="PHOTO", help=text)
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a checkpoint, for --eval, --predict and --explain; photos: the one that comes with "
        "the project",
    )
    text = "sets to score on, spelt like --data"
    add("--eval", nargs="+", metavar="SET", help=text)
    add("--out", type=Path, metavar="DIR", help="run folder [runs/SCRIPT-DATA, and -seedN]")
    add(
        "--preset",
        choices=[*presets],
        help="small: MobileNetV2, small pictures and few epochs, for your own photos on any "
        "computer; whatever else is given holds [paper; shapes for built-in pictures]",
    )
    text = "continue from last.pt, which the run folder holds for every stage"
    add("--resume", action="store_true", help=text)
    text = "try everything on two batches of every set"
    add("--dry-run", action="store_true", help=text)
    add_training_flags(parser, presets)
    add_output_flags(parser)
    parser.set_defaults(pairs=False)  # True: the networks see a photo and its modality


def add_training_flags(parser: argparse.ArgumentParser, presets: dict[str, dict]) -> None:
    """What decides on the result besides the method's own flags, and where it is computed."""
    add = parser.add_argument_group("training").add_argument
    for name, kind, text in (
        ("epochs", positive, "of each stage"),
        ("lr", learning_rate, "highest learning rate, of each stage"),
        ("batch-size", positive, "over all processes"),
        ("size", positive, "the network sees size x size pixels"),
    ):
        usual = defaults(name.replace("-", "_"), presets)
        add(f"--{name}", type=kind, metavar="N", help=f"{text} {usual}")
    add("--seed", type=seed, default=0, help="of all random numbers [0]")
    add(
        "--init",
        type=Path,
        metavar="FILE",
        help="a checkpoint whose stage starts from its weights and network flags (fine-tuning); "
        "photos: the one that comes with the project",
    )

    add = parser.add_argument_group("backbone").add_argument
    usual = defaults("backbone", presets)
    add("--backbone", choices=BACKBONES, help=f"the pretrained encoder {usual}")
    text = "moco800, moco200, imagenet, none, or a file [the paper's]"
    add("--backbone-weights", metavar="W", help=text)
    text = "how the backbone's weights want their pixels [imagenet, or what --released uses]"
    add("--pixels", choices=PIXELS, default="imagenet", help=text)
    text = "what the backbone's convolutions see beyond the border [zeros]"
    add("--borders", choices=("zeros", "replicate"), default="zeros", help=text)

    add = parser.add_argument_group("runtime").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    text = "half precision outside the losses; auto: on CUDA, bf16 where the GPU has it [auto]"
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help=text)
    add("--compile", action="store_true", help="torch.compile the network")
    text = "the same bits in every run on CUDA, too, as far as torch can; slower"
    add("--deterministic", action="store_true", help=text)
    add("--data-root", default="data", metavar="DIR", help="where registered sets lie [data]")


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """What is written besides checkpoints and scores."""
    add = parser.add_argument_group("output").add_argument
    add("--cutout", action="store_true", help="--predict also writes RGBA cut-outs")
    text = "--predict also writes photos with the object tinted"
    add("--overlay", action="store_true", help=text)
    add("--skip-existing", action="store_true", help="--predict leaves out photos with a map")
    add("--crf", action="store_true", help="refine predicted maps with the dense CRF")
    add(
        "--watch",
        type=int,
        default=0,
        metavar="N",
        help="score N photos of the first --eval set after every epoch: to look at, never to "
        "choose an epoch by [0]",
    )
    text = "start anew in a run folder that holds a run with other flags"
    add("--overwrite", action="store_true", help=text)


def is_shapes(data: str) -> bool:
    """Whether --data names nothing but built-in sets: 'shapes+shapes-depth@list.txt'."""
    return all(part.split("@")[0] in SHAPES for part in data.split("+"))


def replaced(args: argparse.Namespace, **changes) -> argparse.Namespace:
    """A copy of the flags with some of them changed; flags are never changed in place."""
    return argparse.Namespace(**{**vars(args), **changes})


def completed(args: argparse.Namespace, presets: dict[str, dict]) -> argparse.Namespace:
    """A copy of the flags in which every None is replaced by the value of the preset.

    That is --preset, else "shapes" for built-in pictures and "paper" for others. A `Schedule` of
    it (key "stage1", ...) takes --epochs and --lr where they are given.
    """
    preset = args.preset or ("shapes" if is_shapes(args.data) else "paper")
    changes = {"preset": preset}
    for name, value in presets[preset].items():
        if isinstance(value, Schedule):
            changes[name] = Schedule(args.epochs or value.epochs, args.lr or value.lr)
        elif getattr(args, name) is None:
            changes[name] = value
    return replaced(args, **changes)


def evaluation_sets(args: argparse.Namespace, usual: Sequence[str]) -> list[str]:
    """--eval, else those of the sets that the method usually scores on which are there.

    --predict or --explain alone scores nothing.
    """
    if args.eval is not None:
        return args.eval
    return [] if args.predict or args.explain else present(usual, args.data_root)


def present(names: Sequence[str], root: str) -> list[str]:
    """The sets that are there; the others are named on the terminal. Raises `UserError` for a set
    that is broken."""
    found = []
    missing = []
    for name in names:
        try:
            open_set(name, root)
            found.append(name)
        except MissingSet:
            missing.append(name)
    if missing:
        say("evaluation sets not found: " + ", ".join(missing))
    return found


def show_preset(args: argparse.Namespace, presets: dict[str, dict]) -> None:
    """Print what the preset and the flags have made of its values, unless it is the paper's."""
    if args.preset != "paper":
        shown = []
        for name in presets[args.preset]:
            value = getattr(args, name)
            if isinstance(value, Schedule):
                value = f"{value.epochs} epochs at rate {value.lr:g}"
            shown.append(f"{name} {value}")
        say(f"preset {args.preset}: " + ", ".join(shown))


def could_be(action: argparse.Action, value: object) -> bool:
    """Whether a parser could have made `value` of this flag; None stands for the preset's value."""
    if isinstance(action.default, bool):
        return isinstance(value, bool)
    if value is None:
        return action.default is None
    if action.nargs not in ("*", "+"):
        value = [value]
    elif not isinstance(value, (list, tuple)):
        return False

    kind = action.type or str
    try:
        whole = all(kind(str(one)) == one for one in value)
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return whole and (not action.choices or all(one in action.choices for one in value))


def saved_flags(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    saved: dict,
    path: Path,
    fixed: Sequence[str],
    free: Sequence[str],
) -> argparse.Namespace:
    """A copy of the flags that fits the checkpoint `saved` of the file `path`.

    fixed: names of flags that describe its network; they become those of its training.
    free: names of flags that do so only where they were not given.
    Raises `UserError` for values that the parser would not take.
    """
    names = [*fixed, *(name for name in free if getattr(args, name) is None)]
    lost = [name for name in names if name not in saved["args"]]
    if lost:
        raise UserError(
            f"{path} was made by another version: it lacks {', '.join(lost)}; train again"
        )
    for action in parser._actions:
        value = saved["args"].get(action.dest)
        if action.dest in names and not could_be(action, value):
            flag = action.option_strings[0]
            raise UserError(
                f"{path} is a damaged checkpoint: {flag} cannot be {value!r}; make it again"
            )
    if saved["args"].get("dry_run"):
        say("warning: this network was made by --dry-run and has learnt next to nothing")
    return replaced(args, **{name: saved["args"][name] for name in names})


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

    def training_set(self, masks: bool = True, spec: str | None = None) -> Dataset:
        """The pictures of --data, or of the set `spec`; with --dry-run two batches of them."""
        photos = open_set(spec or self.data, self.data_root, masks)
        count = 2 * self.batch_size
        if not self.dry_run or len(photos) <= count:
            return photos
        chosen = [len(photos) * i // count for i in range(count)]
        return View([(photos, i, photos.names[i]) for i in chosen], photos.title)

    def place(self, net: nn.Module, channels_last: bool = True) -> nn.Module:
        """The network on the device, compiled if --compile asks for it.

        channels_last: the order in memory that convolutions of half precision want on a GPU and
        that speeds up prediction on the CPU, too. See `trains_channels_last`.
        """
        memory = torch.channels_last if channels_last else torch.contiguous_format
        net = net.to(self.device, memory_format=memory)
        if self.compile:
            net.compile()
        return net

    @property
    def trains_channels_last(self) -> bool:
        """Whether wide convolutions on large maps train well in channels-last order.

        Not on a CPU without AVX-512: there the weight gradient of 192 to 64 channels at 160 x 160
        takes 3.4 times as long as in contiguous order (2.39 against 0.71 s for 8 photos).
        """
        return self.device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"


def settle(
    args: argparse.Namespace, method: str, captions: bool = False, quiet: bool = False
) -> Settings:
    """Resolve the device, join torchrun's processes, choose the run folder.

    The choices are printed unless `quiet`.

    Raises `UserError` for what would come to light only after hours of training: an --eval set
    that is not there, has no masks (unless `captions` will do), or the name of another.
    """
    # Where it runs. A picture in the standard output tolerates no text.
    quiet = quiet or args.predict == [STDIN]
    device, reason = runtime.pick_device(args.device)
    if args.deterministic:
        runtime.be_deterministic()
    if args.amp == "bf16" and runtime.precision(device, args.amp) is None and not quiet:
        say("--amp bf16: this processor has no bf16 instructions, so fp32 is used, which is faster")
    world = runtime.join_world(device)

    # What cannot work is refused.
    if args.batch_size % world.size:
        raise UserError(
            f"--batch-size {args.batch_size} cannot be split over {world.size} processes"
        )
    used = args.eval or args.predict or args.explain or quiet
    if args.weights and not used:
        raise UserError(
            "--weights needs --eval SET or --predict PATH or --explain PHOTO (training goes on "
            "with --resume)"
        )
    check_evaluation_sets(args, captions)

    # Fields of `Settings` that are named like a flag have its value.
    names = Settings.__dataclass_fields__.keys() & vars(args).keys()
    values = {name: getattr(args, name) for name in names}
    values |= {"out": run_folder(args, method), "device": device, "world": world}
    settings = Settings(method=method, flags=plain_flags(args, device), **values)
    if not quiet:
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
    """--out, or runs/<method>-<data>, with -seed<N> unless the seed is 0."""
    data = re.sub("[^A-Za-z0-9_.+-]+", "-", args.data).strip("-")
    seed = f"-seed{args.seed}" if args.seed else ""
    return args.out or Path("runs", f"{method}-{data}{seed}")


def checkpoint_of(args: argparse.Namespace, method: str, own: str) -> Path:
    """The checkpoint that --eval, --predict and --explain use.

    own: the method's usual one below a run folder. It is that of --weights ("photos": the network
    that comes with the project); else of the run that --data or --out name; else, for --predict and
    --explain, the one that comes with the project. Raises `UserError` if that does not exist.
    """
    if args.weights:
        return named_checkpoint(args.weights, method)

    # Without --weights the run's own, unless no run is named and a network comes with the project.
    shipped = NETWORKS / f"{method}.pt"
    of_run = run_folder(args, method) / own
    named = (args.out is not None and of_run.exists()) or args.data != "shapes"
    photos = args.predict or args.explain
    if named or not photos or not shipped.exists():
        return of_run
    note = f"; --weights {of_run} is your own" if of_run.exists() else ""
    say(f"using the network that comes with the project, {shipped}{note}", error=True)
    return shipped


def named_checkpoint(file: Path, method: str) -> Path:
    """What --weights or --init names: a file, or by "photos" the network of the project.

    Raises `UserError` if no network of this method comes with the project.
    """
    shipped = NETWORKS / f"{method}.pt"
    if str(file) != "photos" or file.is_file():
        return file
    if not shipped.exists():
        raise UserError(
            f"photos: no network of this method comes with the project ({shipped}); train one, or "
            f"use one of {', '.join(path.stem for path in NETWORKS.glob('*.pt'))}"
        )
    return shipped


def taken_from(
    other: argparse.Namespace, args: argparse.Namespace, names: Sequence[str]
) -> argparse.Namespace:
    """A copy of the flags in which those called `names` are those of `other`."""
    return replaced(args, **{name: getattr(other, name) for name in names})


def out_of(args: argparse.Namespace, path: Path, method: str, stages: Sequence[str] = ()) -> Path:
    """Where results of a checkpoint go: --out, else the run folder that it lies in.

    That is <run> of <run>/<stage>/last.pt, of a checkpoint copied elsewhere its own folder, and for
    the networks that come with the project runs/<method>-photos.
    """
    folder = path.parent
    if path.parent == NETWORKS:
        folder = Path("runs", f"{method}-photos")
    elif folder.name in stages:
        folder = folder.parent
    return args.out or folder


def plain_flags(args: argparse.Namespace, device: torch.device) -> dict:
    """The flags as plain values, for checkpoints and args.json."""
    plain = (int, float, str, list, tuple, type(None))
    flags = {}
    for name, value in vars(args).items():
        if not isinstance(value, Schedule):  # a stage's own is added by `Run`
            flags[name] = value if isinstance(value, plain) else str(value)
    return flags | {"device": str(device), "predict": None, "explain": None}

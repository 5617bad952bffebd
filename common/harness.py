"""What every script does the same way: flags, run folder, evaluation, prediction.

The flags are spelt once here, so that they mean the same in every script. Nothing here knows a
method: a network is a function from images [B, 3, S, S] in [0, 1] to saliency logits [B, 1, S, S].
"""

import argparse
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from common import runtime
from common.backbones import BACKBONES, PIXELS
from common.bank import Bank, MapBank
from common.crf import dense_crf, photo_sxy
from common.curves import write_curves
from common.datasets import MissingSet, load_image, open_set
from common.metrics import Metrics, table, to_uint8
from common.runtime import UserError, progress, save_json, save_png, save_text
from data.registry import SHAPES


# ---- Flags -----------------------------------------------------------------------------------
def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def rate(text: str) -> float:
    """An argparse type: a learning rate above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def seed(text: str) -> int:
    """An argparse type: a seed of torch's generators."""
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all scripts share; a default of None stands for the method's own."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="shapes",
        metavar="SET",
        help="a registered set (python -m common.datasets lists them), a folder of "
        "photos, sets joined with +, each restricted by SET@stems.txt [shapes]",
    )
    data.add_argument(
        "--data-root", default="data", metavar="DIR", help="where registered sets lie [data]"
    )
    data.add_argument("--eval", nargs="+", metavar="SET", help="evaluation sets, spelt like --data")
    data.add_argument("--size", type=positive, help="the network sees size x size pixels")
    net = parser.add_argument_group("backbone")
    net.add_argument("--backbone", choices=BACKBONES)
    net.add_argument(
        "--backbone-weights", metavar="W", help="moco800, moco200, imagenet, none, or a file"
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
    train = parser.add_argument_group("optimisation")
    train.add_argument("--epochs", type=positive, help="total number of epochs, of each stage")
    train.add_argument("--batch-size", type=positive, help="over all processes")
    train.add_argument("--lr", type=rate, help="highest learning rate, of each stage")
    train.add_argument("--seed", type=seed, default=0)
    run = parser.add_argument_group("runtime")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    run.add_argument(
        "--amp",
        choices=("auto", "bf16", "off"),
        default="auto",
        help="bf16 autocast; auto: on CUDA only. Losses are always fp32 [auto]",
    )
    run.add_argument("--compile", action="store_true", help="torch.compile the network")
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="two steps of every epoch, two batches of everything else",
    )
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="DIR", help="run folder [runs/<script>-<data>]")
    out.add_argument(
        "--resume",
        action="store_true",
        help="continue from the run folder's last.pt; with --stage 2 without making "
        "the labels of stage 1 again",
    )
    out.add_argument("--weights", type=Path, metavar="FILE", help="for --eval and --predict")
    out.add_argument("--predict", type=Path, metavar="PATH", help="map a photo or a folder of them")
    out.add_argument("--cutout", action="store_true", help="--predict also writes RGBA cut-outs")
    out.add_argument("--crf", action="store_true", help="refine predicted maps with the dense CRF")
    out.add_argument(
        "--watch",
        type=int,
        default=0,
        metavar="N",
        help="score N photos of the first --eval set after every epoch: to look at, "
        "never to choose an epoch by [0]",
    )
    parser.set_defaults(pairs=False)  # True: the networks see a photo and its modality, `stack`


def is_shapes(data: str) -> bool:
    """Whether --data names nothing but built-in sets: 'shapes+shapes-depth@list.txt'."""
    return all(part.split("@")[0] in SHAPES for part in data.split("+"))


def use_preset(args: argparse.Namespace, paper: dict, shapes: dict) -> bool:
    """Replace every None that is named there by the paper's value, or on the built-in shapes by the
    small preset's; without --eval, --predict scores nothing. -> True on shapes"""
    small = is_shapes(args.data)
    if args.predict:
        args.eval = args.eval or []
    for name, value in (shapes if small else paper).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return small


def show_preset(args: argparse.Namespace, shapes: dict) -> None:
    """Print the small preset, where it is used to train."""
    if is_shapes(args.data) and not args.weights and os.environ.get("RANK", "0") == "0":
        print("preset for shapes: " + ", ".join(f"{name} {getattr(args, name)}" for name in shapes))


def prepare(args: argparse.Namespace, method: str, captions: bool = False) -> None:
    """Resolve the device, join torchrun's processes, choose the run folder; print the choices.

    Raises `UserError` for what would come to light only after hours of training: an --eval set
    that is not there, has no masks (unless `captions` will do), or the name of another.
    """
    args.device, reason = runtime.pick_device(args.device)
    args.world = runtime.join_world(args.device)
    if args.batch_size % args.world.size:
        raise UserError(
            f"--batch-size {args.batch_size} cannot be split over {args.world.size} processes"
        )
    args.out = run_folder(args, method)
    if args.weights and not args.eval and not args.predict:
        raise UserError(
            "--weights needs --eval SET or --predict PATH (training goes on with --resume)"
        )
    titles = set()
    for spec in args.eval:
        dataset = open_set(spec, args.data_root)
        if not captions and dataset[0]["mask"] is None:
            raise UserError(f"--eval {spec} has no masks: there is nothing to score with")
        if dataset.title in titles:
            raise UserError(
                f"two --eval sets are called {dataset.title}, so the maps of one would "
                "overwrite those of the other: rename a folder"
            )
        titles.add(dataset.title)
    if args.world.main:
        print(
            f"device {args.device} ({reason}), {args.world.size} process(es), "
            f"backbone {args.backbone}, {args.size} px, run folder {args.out}"
        )


def run_folder(args: argparse.Namespace, method: str) -> Path:
    """--out, or runs/<method>-<data>."""
    data = re.sub("[^A-Za-z0-9_.+-]+", "-", args.data).strip("-")
    return args.out or Path("runs", f"{method}-{data}")


def run_of(checkpoint: Path, stages: Sequence[str]) -> Path:
    """The run folder of <run>/<stage>/last.pt; of a checkpoint copied elsewhere its own folder."""
    folder = checkpoint.parent
    return folder.parent if folder.name in stages else folder


def present(names: list[str], root: str) -> list[str]:
    """Those of `names` that are there; the others are named on the terminal. Raises `UserError`
    for a set that is broken."""

    def there(name: str) -> bool:
        try:
            open_set(name, root)
        except MissingSet:
            return False
        return True

    found = [name for name in names if there(name)]
    if len(found) < len(names) and os.environ.get("RANK", "0") == "0":
        print("evaluation sets not found: " + ", ".join(n for n in names if n not in found))
    return found


def plain_flags(args: argparse.Namespace, photos: Sequence[str]) -> dict:
    """The flags as plain values, for checkpoints and args.json, and which photos are trained on:
    their number, and a digest of their names."""
    plain = (int, float, str, list, tuple, type(None))
    names = "\n".join(photos).encode(errors="backslashreplace")
    flags = {
        key: value if isinstance(value, plain) else str(value)
        for key, value in vars(args).items()
        if key != "world"
    }
    return flags | {"photos": f"{len(photos)} ({hashlib.sha256(names).hexdigest()[:8]})"}


def save_args(flags: dict, args: argparse.Namespace, folder: Path) -> None:
    """Write args.json: flags, versions, commit, device, digests of the files that flags name."""
    if args.world.main:
        files = {value for value in flags.values() if isinstance(value, str)}
        digests = {file: runtime.sha256(file) for file in sorted(files) if os.path.isfile(file)}
        save_json(
            folder / "args.json", {"flags": flags, "sha256": digests, **runtime.environment()}
        )


def save(
    folder: Path,
    method: str,
    stage: int,
    epoch: int,
    flags: dict,
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    labels: MapBank | None = None,
) -> None:
    """Write <folder>/last.pt: all that `resume` needs to go on as if nothing had happened."""
    runtime.save_checkpoint(
        folder / "last.pt",
        method=method,
        stage=stage,
        epoch=epoch,
        args=flags,
        model=net.state_dict(),
        optimiser=optimiser.state_dict(),
        labels=labels.pixels if labels else None,
    )


def resume(
    folder: Path,
    method: str,
    stage: int,
    flags: dict,
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    labels: MapBank | None = None,
) -> int:
    """Restore all that `save` wrote and return the number of finished epochs, 0 without --resume.

    Raises `UserError` if the checkpoint was trained with other flags or on other photos, or if a
    dry run would overwrite that of a full one.
    """
    path = folder / "last.pt"
    if not path.exists() or not flags["resume"] and not flags["dry_run"]:
        return 0
    saved = runtime.load_checkpoint(path, method, stage)
    if not flags["resume"]:
        if not saved["args"].get("dry_run"):
            raise UserError(f"--dry-run would overwrite {path}: give it an --out of its own")
        return 0
    photos = saved["args"].get("photos", flags["photos"])
    if photos != flags["photos"]:
        raise UserError(
            f"{path} was trained on other photos, {photos} instead of "
            f"{flags['photos']}: give another --out for a new run"
        )
    free = {
        "out",
        "data_root",
        "device",
        "compile",
        "eval",
        "watch",
        "resume",
        "weights",
        "stage",
        "predict",
        "cutout",
        "crf",
        "base",
        "photos",
    }
    other = [
        spell(key, saved["args"].get(key))
        for key in flags
        if key not in free and flags[key] != saved["args"].get(key)
    ]
    if other:
        raise UserError(
            f"{path} was trained with {', '.join(other)}: give the same flags to "
            "--resume, or another --out for a new run"
        )
    net.load_state_dict(saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    if labels:
        labels.pixels.copy_(saved["labels"])
    return saved["epoch"]


def spell(key: str, value: object) -> str:
    """A flag as one types it."""
    flag = "--" + key.replace("_", "-")
    if value is None or value is False:
        return f"no {flag}"
    values = value if isinstance(value, (list, tuple)) else [value] * (value is not True)
    return " ".join([flag, *map(str, values)])


def restore(
    path: Path, method: str, args: argparse.Namespace, names: Sequence[str], free: Sequence[str]
) -> dict:
    """A finished checkpoint of `method`. The flags in `names`, and those in `free` that were not
    given, are set as they were in its training."""
    saved = runtime.load_checkpoint(path, method)
    if not {"args", "model"} <= saved.keys():
        raise UserError(f"{path} lacks the flags or the weights of a checkpoint; make it again")
    for name in (*names, *(name for name in free if getattr(args, name) is None)):
        setattr(args, name, saved["args"][name])
    return saved


# ---- Evaluation ------------------------------------------------------------------------------
Forward = Callable[[Tensor], Tensor]
Results = dict[str, Metrics]  # by the title of a row of the table


def stack(samples: list[dict], args: argparse.Namespace) -> Tensor:
    """Images [B, 3, S, S] in [0, 1] on the device; with args.pairs [B, 6, S, S], each followed by
    its modality, or by itself for want of one."""
    parts = [[s["image"] for s in samples]]
    if args.pairs:
        parts += [[s["image"] if s.get("modality") is None else s["modality"] for s in samples]]
    small = [
        torch.stack([TF.resize(x, [args.size] * 2, antialias=True) for x in part]) for part in parts
    ]
    return torch.cat(small, 1).to(args.device).float() / 255


def batches_of(
    dataset: Dataset, args: argparse.Namespace, text: str
) -> Iterator[tuple[list[dict], Tensor]]:
    """This process's share of a set: samples, and what the networks see of them, see `stack`."""
    count = min(len(dataset), 2 * args.batch_size) if args.dry_run else len(dataset)
    index = args.world.share(range(count))
    chunks = [index[i : i + args.batch_size] for i in range(0, len(index), args.batch_size)]
    for chunk in progress(chunks, text):
        samples = list(runtime.parallel_map(dataset.__getitem__, chunk))
        yield samples, stack(samples, args)


def at_size(logit: Tensor, sample: dict) -> Tensor:
    """Logit [1, S, S] -> probability [H, W] at the photo's own size."""
    size = tuple(sample["size"])
    logit = F.interpolate(logit[None].float(), size, mode="bilinear", align_corners=False)
    return torch.sigmoid(logit)[0, 0]


def finish(logit: Tensor, sample: dict, crf: bool) -> Tensor:
    """Logit [1, S, S] -> uint8 map [H, W] at the photo's own size, refined by the CRF if asked."""
    prob = at_size(logit, sample)
    if crf:
        image = sample["image"][None].to(prob.device)
        prob = dense_crf(image, prob[None, None], sxy=photo_sxy(*prob.shape))[0, 0]
    return to_uint8(prob).cpu()


@torch.inference_mode()
def evaluate(forward: Forward, args: argparse.Namespace, folder: Path, row: str = "") -> Results:
    """Metrics of every set in args.eval; maps go to <folder>/pred/<set><row>/<stem>.png.

    Returns {"<set><row>": metrics}; every process returns those of all processes' images.
    """
    results = {}
    for spec in args.eval:
        dataset, metrics = open_set(spec, args.data_root), Metrics()
        title = dataset.title + row
        for samples, images in batches_of(dataset, args, f"evaluate {title}"):
            for sample, logit in zip(samples, forward(images)):
                if sample["mask"] is None:
                    raise UserError(f"{title}: {sample['name']} has no mask and cannot be scored")
                pred = finish(logit, sample, args.crf)
                save_png(folder / "pred" / title / f"{sample['name']}.png", pred)
                metrics.add(pred, sample["mask"][0] > 127)
        results[title] = Metrics()
        for part in args.world.gather(metrics):
            results[title].merge(part)
    return results


def save_results(results: Results, args: argparse.Namespace, folder: Path) -> None:
    """Print the table of scores; write eval.json, eval.md, curves.svg. Nothing without --eval."""
    if args.world.main and results:
        scores = {title: metrics.scores() for title, metrics in results.items()}
        print(table(scores))
        save_json(folder / "eval.json", scores)
        save_text(folder / "eval.md", table(scores, "markdown") + "\n")
        write_curves(folder / "curves.svg", {t: metrics.curves() for t, metrics in results.items()})


def gallery(columns: list[str], args: argparse.Namespace) -> None:
    """Save <out>/gallery.png: photo, a map of each folder below <out> ("{}": the set), truth."""
    if not args.eval or not args.world.main:
        return
    dataset = open_set(args.eval[0], args.data_root)
    folders = [args.out / column.format(dataset.title) for column in columns]
    rows = []
    for sample in (dataset[i] for i in range(min(8, len(dataset)))):
        files = [folder / f"{sample['name']}.png" for folder in folders]
        if all(file.exists() for file in files):
            maps = [load_image(file)[:1] / 255 for file in files]
            rows.append([sample["image"] / 255, *maps, sample["mask"] / 255])
    if rows:
        runtime.picture_strip(args.out / "gallery.png", rows)


@torch.inference_mode()
def mirror(forward: Forward, bank: Bank) -> float:
    """Correlation between the maps of the first 64 photos and of the same photos mirrored.

    Without masks it tells a map that follows the photo (near 1) from one that follows the place in
    the picture (near 0 or below), the way in which unsupervised training fails on small pictures.
    """
    index = torch.arange(min(64, len(bank))).split(8)
    maps = [
        torch.cat(
            [torch.sigmoid(forward(bank.images(i, torch.full((len(i),), flip)))) for i in index]
        )
        for flip in (False, True)
    ]
    return torch.corrcoef(torch.stack([maps[0].flatten(), maps[1].flip(3).flatten()]))[0, 1].item()


class Watch:
    """A few photos of the first evaluation set, scored and drawn after every epoch."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.samples = args, []
        if args.eval and args.world.main:
            dataset = open_set(args.eval[0], args.data_root)
            count = min(max(args.watch, 6), len(dataset))
            self.samples = list(runtime.parallel_map(dataset.__getitem__, range(count)))

    @torch.inference_mode()
    def __call__(self, forward: Forward, picture: Path) -> dict[str, float]:
        """Save image, map and truth of six photos; return their scores if --watch asks for them."""
        if not self.samples:
            return {}
        metrics, rows = Metrics(wf=False), []
        for at in range(0, len(self.samples), self.args.batch_size):
            part = self.samples[at : at + self.args.batch_size]
            images = stack(part, self.args)
            for sample, image, logit in zip(part, images, forward(images)):
                pred = finish(logit, sample, False)
                metrics.add(pred, sample["mask"][0] > 127)
                rows.append([image[:3], pred[None] / 255, sample["mask"] / 255])
        runtime.picture_strip(picture, rows[:6])
        scores = metrics.scores()
        return {"watch_F": scores["F_mean"], "watch_MAE": scores["MAE"]} if self.args.watch else {}


# ---- Prediction ------------------------------------------------------------------------------
@torch.inference_mode()
def predict(forward: Forward, args: argparse.Namespace) -> None:
    """Write <out>/predict/<stem>.png (8 bits, the photo's size) for a photo or a folder."""
    single = args.predict.is_file()
    photos = Photo(args.predict) if single else open_set(args.predict, args.data_root, masks=False)
    folder = args.out / "predict"
    for samples, images in batches_of(photos, args, "predict"):
        for sample, logit in zip(samples, forward(images)):
            pred = finish(logit, sample, args.crf)
            save_png(folder / f"{sample['name']}.png", pred)
            if args.cutout:
                rgba = torch.cat([sample["image"], pred[None]]).permute(1, 2, 0)
                save_png(folder / f"{sample['name']}_cutout.png", rgba)
    if args.world.main:
        print(f"wrote {len(photos)} map(s) to {folder}")


class Photo(Dataset):
    """A single photo as a data set."""

    def __init__(self, path: Path):
        self.path, self.names, self.title = path, [path.stem], path.name

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        image = load_image(self.path)
        return {"image": image, "name": self.path.stem, "size": tuple(image.shape[1:])}

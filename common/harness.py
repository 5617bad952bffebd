"""Evaluation and prediction: a network's maps of whole sets and of your own photos.

    results = evaluate(forward, settings, folder)      # scores of every --eval set, maps as PNG
    save_results(results, settings, folder)            # the table; eval.json, eval.md, curves.svg
    predict(forward, settings)                         # maps of the photos that --predict names
    watch = Watch(settings, photos)                    # a few of them, drawn after every epoch
    watch(forward, picture)

Nothing here knows a method: a network is a function `forward` from images [B, 3, S, S] in [0, 1]
on the device to saliency logits [B, 1, S, S].
"""

import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from common import runtime
from common.bank import Bank
from common.crf import dense_crf, photo_sxy
from common.curves import write_curves
from common.datasets import View, load_image, open_photos, open_set, report_left_out
from common.flags import STDIN, Settings
from common.images import to_tensor
from common.metrics import Metrics, table, to_uint8
from common.runtime import UserError, progress, save_json, save_png, save_text, say

# The CRF of --crf. With its usual 13 and 10 it erodes thin objects and those of the background's
# colour, see docs/crf.md.
CRF_SRGB = 5.0
CRF_COMPAT = 3.0

Forward = Callable[[Tensor], Tensor]
Results = dict[str, Metrics]  # by the title of a row of the table


# ---- From samples to maps ------------------------------------------------------------------------
def stack(samples: list[dict], settings: Settings) -> Tensor:
    """Images [B, 3, S, S] in [0, 1] on the device.

    With settings.pairs (unified_usod.py) [B, 6, S, S]: each photo is followed by its depth, thermal
    or flow picture, or by itself where it has none.
    """
    size = [settings.size, settings.size]
    images = []
    for sample in samples:
        image = TF.resize(sample["image"], size)
        if settings.pairs:
            modality = sample.get("modality")
            second = image if modality is None else TF.resize(modality, size)
            image = torch.cat([image, second])
        images.append(image)
    return torch.stack(images).to(settings.device).float() / 255


def batches_of(
    dataset: Dataset, settings: Settings, text: str, broken: list[str] | None = None
) -> Iterator[tuple[list[dict], Tensor]]:
    """This process's share of a set: samples, and what the network sees of them, see `stack`.

    broken: a list that takes the reasons why samples could not be read; without it the first such
    sample raises its `UserError`.
    """
    batch = settings.batch_size
    count = min(len(dataset), 2 * batch) if settings.dry_run else len(dataset)
    index = settings.world.share(range(count))

    def read(i: int) -> dict | None:
        try:
            return dataset[i]
        except UserError as error:
            if broken is None:
                raise
            broken.append(str(error))

    # Photos are decoded on all cores while the network works on the batch before.
    photos = progress(runtime.parallel_map(read, index), text, len(index))
    while chunk := list(islice(photos, batch)):
        samples = [sample for sample in chunk if sample is not None]
        if samples:
            yield samples, stack(samples, settings)


def at_size(logit: Tensor, sample: dict) -> Tensor:
    """Logit [1, S, S] -> probability [H, W] at the photo's own size."""
    size = tuple(sample["size"])
    logit = F.interpolate(logit[None].float(), size, mode="bilinear", align_corners=False)
    return torch.sigmoid(logit)[0, 0]


def finish(logit: Tensor, sample: dict, crf: bool) -> Tensor:
    """Logit [1, S, S] -> uint8 map [H, W] at the photo's own size, refined by the CRF if asked.

    Raises `UserError` where the network's output is not a number.
    """
    prob = at_size(logit, sample)
    if not prob.isfinite().all():
        raise UserError(
            f"{sample['name']}: the network's map is not a number; its checkpoint is damaged, or "
            "the training diverged: train again with a lower --lr"
        )
    if crf:
        image = sample["image"][None].to(prob.device)
        sxy = photo_sxy(*prob.shape)
        prob = dense_crf(image, prob[None, None], sxy, srgb=CRF_SRGB, compat=CRF_COMPAT)[0, 0]
    return to_uint8(prob).cpu()


# ---- Evaluation ----------------------------------------------------------------------------------
@torch.inference_mode()
def evaluate(
    forward: Forward, settings: Settings, folder: Path, row: str = "", crf: bool | None = None
) -> Results:
    """Metrics of every --eval set; maps go to <folder>/pred/<set><row>/<stem>.png.

    crf: whether the CRF refines the maps; None: as --crf says.
    Returns {"<set><row>": metrics}; every process returns those of all processes' images.
    """
    crf = settings.crf if crf is None else crf
    results = {}
    for spec in settings.eval:
        dataset = open_set(spec, settings.data_root)
        report_left_out(dataset)
        title = dataset.title + row
        maps = final_maps(forward, dataset, settings, f"evaluate {title}", crf)
        metrics = Metrics()

        def score(pair: tuple[dict, Tensor]) -> Metrics:
            sample, pred = pair
            if sample["mask"] is None:
                raise UserError(f"{title}: {sample['name']} has no mask and cannot be scored")
            save_png(folder / "pred" / title / f"{sample['name']}.png", pred)
            scores = Metrics()
            scores.add(pred, sample["mask"][0] > 127)
            return scores

        # Maps are written and scored on all cores while the network makes the next ones.
        for scores in runtime.parallel_map(score, maps):
            metrics.merge(scores)
        results[title] = Metrics()
        for part in settings.world.gather(metrics):
            results[title].merge(part)
    return results


def final_maps(
    forward: Forward, dataset: Dataset, settings: Settings, text: str, crf: bool, broken=None
) -> Iterator[tuple[dict, Tensor]]:
    """Samples and their uint8 maps [H, W], one after the other; broken: see `batches_of`."""
    for samples, images in batches_of(dataset, settings, text, broken):
        for sample, logit in zip(samples, forward(images)):
            yield sample, finish(logit, sample, crf)


def save_results(results: Results, settings: Settings, folder: Path) -> None:
    """Print the table of scores; write eval.json, eval.md, curves.svg. Nothing without --eval."""
    if settings.world.main and results:
        scores = {title: metrics.scores() for title, metrics in results.items()}
        say(table(scores))
        save_json(folder / "eval.json", scores)
        save_text(folder / "eval.md", table(scores, "markdown") + "\n")
        curves = {title: metrics.curves() for title, metrics in results.items()}
        write_curves(folder / "curves.svg", curves)


def gallery(columns: list[str], settings: Settings) -> None:
    """Save <out>/gallery.png: photo, a map of each folder below <out> ("{}": the set), truth."""
    if not settings.eval or not settings.world.main:
        return
    dataset = open_set(settings.eval[0], settings.data_root)
    folders = [settings.out / column.format(dataset.title) for column in columns]
    rows = []
    for sample in (dataset[i] for i in range(min(8, len(dataset)))):
        files = [folder / f"{sample['name']}.png" for folder in folders]
        if all(file.exists() for file in files):
            maps = [load_image(file)[:1] / 255 for file in files]
            rows.append([sample["image"] / 255, *maps, sample["mask"] / 255])
    if rows:
        runtime.picture_strip(settings.out / "gallery.png", rows)


# ---- While training ------------------------------------------------------------------------------
@torch.inference_mode()
def mirror(forward: Forward, bank: Bank) -> float:
    """Correlation between the maps of the first 64 photos and of the same photos mirrored.

    Without masks it tells a map that follows the photo (near 1) from one that follows the place in
    the picture (near 0 or below), the way in which unsupervised training fails on small pictures.
    """

    def maps(flip: bool) -> Tensor:
        parts = []
        for index in torch.arange(min(64, len(bank))).split(8):
            images = bank.images(index, torch.full((len(index),), flip))
            parts.append(torch.sigmoid(forward(images)))
        return torch.cat(parts)  # [64, 1, S, S]

    straight = maps(False).flatten()
    mirrored = maps(True).flip(3).flatten()
    return torch.corrcoef(torch.stack([straight, mirrored]))[0, 1].item()


class Watch:
    """A few photos, drawn after every epoch: of the first --eval set, where they are scored too,
    else of the photos that are trained on."""

    def __init__(self, settings: Settings, photos: Dataset):
        self.settings = settings
        self.samples = []
        if settings.eval:
            photos = open_set(settings.eval[0], settings.data_root)
        if settings.world.main:
            count = min(max(settings.watch, 6), len(photos))
            self.samples = list(runtime.parallel_map(photos.__getitem__, range(count)))

    @torch.inference_mode()
    def __call__(self, forward: Forward, picture: Path) -> dict[str, float]:
        """Save photo, map and truth of six photos; return their scores if --watch asks for them."""
        if not self.samples:
            return {}
        metrics = Metrics(wf=False)
        rows = []
        batch = self.settings.batch_size
        for at in range(0, len(self.samples), batch):
            part = self.samples[at : at + batch]
            images = stack(part, self.settings)
            for sample, image, logit in zip(part, images, forward(images)):
                pred = finish(logit, sample, crf=False)
                row = [image[:3], pred[None] / 255]
                if sample["mask"] is not None:
                    metrics.add(pred, sample["mask"][0] > 127)
                    row.append(sample["mask"] / 255)
                rows.append(row)

        runtime.picture_strip(picture, rows[:6])
        if not self.settings.watch or not self.settings.eval:
            return {}
        scores = metrics.scores()
        return {"watch_F": scores["F_mean"], "watch_MAE": scores["MAE"]}


# ---- Prediction ----------------------------------------------------------------------------------
@torch.inference_mode()
def predict(
    forward: Forward, settings: Settings, overlay: bool = False, skip_existing: bool = False
) -> None:
    """Write <out>/predict/<name>.png (8 bits, the photo's size) for every photo of --predict.

    --cutout adds <name>_cutout.png, RGBA with the map as alpha; overlay adds <name>_overlay.png.
    skip_existing: leave out photos whose map is there already.
    --predict - maps one photo from the standard input to the standard output, see `stream`.
    Raises `UserError` if two files would have the same name, before anything is written, and, when
    all others are done, if photos could not be read.
    """
    if settings.predict == [STDIN]:
        stream(forward, settings, overlay)
        return

    folder = settings.out / "predict"
    photos = open_photos(settings.predict, settings.data_root, skip=folder)
    report_left_out(photos)
    kinds = {"": True, "_cutout": settings.cutout, "_overlay": overlay}
    suffixes = [suffix for suffix, asked in kinds.items() if asked]
    check_names([name + suffix for name in photos.names for suffix in suffixes])
    if settings.world.main:
        runtime.lock(folder)  # which also tells data sets that no photos lie here
    if skip_existing:
        todo = [i for i, name in enumerate(photos.names) if not (folder / f"{name}.png").exists()]
        say(f"{len(photos) - len(todo)} of {len(photos)} maps exist already")
        if not todo:
            return
        photos = View([(photos, i, photos.names[i]) for i in todo], photos.title)

    def save(pair: tuple[dict, Tensor]) -> None:
        sample, pred = pair
        for suffix in suffixes:
            pixels = VIEWS[suffix](sample["image"], pred)
            save_png(folder / f"{sample['name']}{suffix}.png", pixels)

    broken = []
    maps = final_maps(forward, photos, settings, "predict", settings.crf, broken)
    written = sum(1 for _ in runtime.parallel_map(save, maps))
    written = sum(settings.world.gather(written))

    broken = [reason for part in settings.world.gather(broken) for reason in part]
    say(f"wrote {written} map(s) of {len(photos)} photo(s) to {folder}")
    if broken:
        raise UserError(f"{len(broken)} photo(s) could not be read: " + "; ".join(broken))


def stream(forward: Forward, settings: Settings, overlay: bool) -> None:
    """Write the map of the photo in the standard input as PNG to the standard output.

    --cutout or overlay write that picture instead of the map. Nothing else goes to that output.
    """
    image = load_image(STDIN)
    sample = {"image": image, "size": tuple(image.shape[1:]), "name": "the standard input"}
    pred = finish(forward(stack([sample], settings))[0], sample, settings.crf)
    kind = "_overlay" if overlay else "_cutout" if settings.cutout else ""
    picture = Image.fromarray(VIEWS[kind](image, pred).numpy())
    memory = io.BytesIO()
    picture.save(memory, "PNG")
    try:
        sys.stdout.buffer.write(memory.getbuffer())
        sys.stdout.buffer.flush()
    except OSError as error:
        runtime.silence(sys.stdout)  # Python writes the rest again when it ends
        raise UserError(f"cannot write to the standard output ({error.strerror})") from None


def cutout(image: Tensor, pred: Tensor) -> Tensor:
    """Photo [3, H, W] and map [H, W], uint8 -> RGBA [H, W, 4], the map as alpha."""
    return torch.cat([image, pred[None]]).permute(1, 2, 0)


def overlaid(image: Tensor, pred: Tensor) -> Tensor:
    """Photo [3, H, W] and map [H, W], uint8 -> [H, W, 3]: the object tinted, with an outline."""
    share = 0.45 * pred.float() / 255
    orange = torch.tensor([255.0, 96.0, 0.0]).view(3, 1, 1)
    picture = image * (1 - share) + orange * share  # [3, H, W]

    # The outline lies just outside: what a dilation adds to the object.
    width = max(1, round(max(pred.shape) / 300))
    inside = (pred > 127).float()[None, None]
    grown = F.max_pool2d(inside, 2 * width + 1, stride=1, padding=width)
    outline = (grown > inside)[0, 0]
    picture[:, outline] = 255.0
    return picture.round().byte().permute(1, 2, 0)


VIEWS = {"": lambda image, pred: pred, "_cutout": cutout, "_overlay": overlaid}


class Predictor:
    """A trained network as a function: a Pillow photo in, its saliency map (mode "L") out."""

    def __init__(self, forward: Forward, net: nn.Module, settings: Settings):
        """net: the network of `forward`, for those who want it itself."""
        self.forward = forward
        self.net = net
        self.settings = settings

    @torch.inference_mode()
    def __call__(self, photo: Image.Image | Sequence[Image.Image]):
        """The map has the photo's size; a list of photos gives a list of maps.

        The numbers are those that --predict writes.
        """
        if not isinstance(photo, Image.Image):
            return [self(one) for one in photo]
        image = to_tensor(photo)
        sample = {"image": image, "size": tuple(image.shape[1:]), "name": "the photo"}
        logit = self.forward(stack([sample], self.settings))[0]
        return Image.fromarray(finish(logit, sample, self.settings.crf).numpy())


def check_names(names: Sequence[str]) -> None:
    """Raise `UserError` if two files would be written under one name."""
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(
            f"{times} pictures would be written to {name}.png: rename one of their photos, or "
            "predict them one at a time"
        )

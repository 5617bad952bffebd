"""What every part of the project costs on a GPU, in one command.

    python -m tests.benchmarks.gpu [--backbone-weights FILE]     # under 9 minutes on a GPU
    python -m tests.benchmarks.gpu --tiny                        # every line of it, on the CPU
    python -m tests.benchmarks.gpu --whole                       # A2S at the paper's length

It draws 3,000 photos of 400 x 300 pixels as JPEG, trains A2S on them as the paper does, and times
the CRF, the scores, and a training step and a prediction of every method. Phases that are finished
are in DIR/phases.json (--out) and are not run again, so a run that was cut off goes on.

Times are medians of several rounds after a warm-up, and the device has finished all work whenever
the clock is read. The floor of a step is its arithmetic at the rate of a large matrix product, that
of the CRF its memory traffic at the rate of a large copy, both measured by the first phase.
The output is in Markdown, its rows are those of the table in docs/speed.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import a2s
import class_net
import sdg_sod
import unified_usod as usod
from common import bank, crf, harness, run, runtime
from common.backbones import backbone
from common.datasets import open_set
from common.metrics import Metrics
from common.runtime import World, autocast, generator, parallel_map, precision
from data.captions import numbers

ROOT = Path(__file__).parents[2]
PAPER = {
    "photos": 3000,
    "tests": 1000,  # photos of the evaluation set
    "epochs": 5,
    "size": 320,
    "large": 352,  # the size of CLASS and SDG-SOD
    "backbone": "resnet50",
    "weights": "none",
    "encoder": "mit_b3",
    "hidden": 1024,
    "words": 10_000,
    "width": 1.0,
    "warm": 3,
    "rounds": 15,
    "most": 32,  # photos in a batch
    "batches": (1, 8, 32),
    "class_batches": (1, 4, 8, 16, 32),
    "matrix": 8192,
    "compiler": "inductor",
}
TINY = {
    "photos": 8,
    "tests": 2,
    "epochs": 1,
    "size": 64,
    "large": 64,
    "backbone": "tiny",
    "weights": "none",
    "encoder": "mit_tiny",
    "hidden": 64,
    "words": 20,
    "width": 0.05,
    "warm": 0,
    "rounds": 1,
    "most": 2,
    "batches": (1, 2),
    "class_batches": (1, 2),
    "matrix": 512,
    "compiler": "eager",
}
MAPS = 3 * (1000 + 2000 + 5168 + 850 + 5019 + 4447)  # of the six sets, by both stages: 55,452
COLUMNS = "what | machine | before | after | ratio | floor | share of the floor"


@dataclass
class Kit:
    """What all phases need. device, name: the GPU; plan: the numbers of `PAPER` or `TINY`."""

    device: torch.device
    name: str
    plan: argparse.Namespace
    out: Path
    done: dict  # the results of the finished phases


# ---- Clocks --------------------------------------------------------------------------------------
def wait(device: torch.device) -> None:
    """Until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable, kit: Kit) -> float:
    """The median time of a call, after calls that do not count."""
    for _ in range(kit.plan.warm):
        function()
    times = []
    for _ in range(kit.plan.rounds):
        wait(kit.device)
        start = time.perf_counter()
        function()
        wait(kit.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Clock:
    """Seconds of the parts of a run; a part within another is not counted there."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = defaultdict(float)
        self.running = []
        self.last = 0.0

    def turn(self) -> None:
        """Give the time since the last turn to the innermost part."""
        wait(self.device)
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens in a `with` statement."""
        self.turn()
        self.running.append(name)
        try:
            yield
        finally:
            self.turn()
            self.running.pop()

    def timed(self, owner: object, name: str, part: str) -> mock._patch:
        """A patch that counts each call of owner.name as time of a part."""
        function = getattr(owner, name)

        def call(*args, **kwargs):
            with self.part(part):
                return function(*args, **kwargs)

        return mock.patch.object(owner, name, call)


def row(kit: Kit, what: str, before="not run", after="", ratio="", floor="", share="") -> list[str]:
    """A row of the table."""
    return [what, kit.name, before, after, ratio, floor, share]


def milliseconds(time: float) -> str:
    return f"{1000 * time:.1f} ms"


# ---- Photos --------------------------------------------------------------------------------------
def draw_photos(folder: Path, count: int) -> Path:
    """Draw photos of 400 x 300 pixels, one object in each, and their masks, unless they are there.

    folder: gets images/ and masks/.
    """
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)

    def draw(i: int) -> None:
        photo = folder / "images" / f"{i:04d}.jpg"
        if photo.exists():
            return
        random = np.random.default_rng(i)
        ground = Image.fromarray(random.integers(60, 200, (6, 8, 3), np.uint8))
        ground = ground.resize((400, 300), Image.Resampling.BICUBIC)
        x, y = random.integers(40, 200, 2)
        box = [x, y, x + random.integers(60, 180), y + random.integers(40, 90)]
        mask = Image.new("L", (400, 300))
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        ground.paste(tuple(random.integers(0, 255, 3).tolist()), mask=mask)
        grain = random.normal(0, 8, (300, 400, 1))
        pixels = (np.asarray(ground) + grain).clip(0, 255).astype(np.uint8)
        mask.save(folder / "masks" / f"{i:04d}.png")
        Image.fromarray(pixels).save(photo, quality=90)

    for _ in parallel_map(draw, range(count)):
        pass
    return folder


def loaded(kit: Kit, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Drawn photos uint8 [B, 3, size, size] and their masks float [B, 1, size, size].

    B is `count`, in a tiny run 2 at most.
    """
    count = min(count, kit.plan.most)
    photos = open_set(str(kit.out / "test"))
    samples = [photos[i % len(photos)] for i in range(count)]
    images = torch.stack([bank.resize(sample["image"], size) for sample in samples])
    masks = torch.stack([bank.resize(sample["mask"], size) for sample in samples])
    return images.to(kit.device), masks.to(kit.device) / 255


# ---- The machine ---------------------------------------------------------------------------------
def machine(kit: Kit) -> dict:
    """The rates that floors are computed with."""
    dtype = precision(kit.device, "auto") or torch.float32
    n = kit.plan.matrix
    a = torch.rand(n, n, device=kit.device, dtype=dtype)
    product = min(seconds(lambda: a @ a, kit) for _ in range(5))
    block = torch.zeros(n * n * 4, dtype=torch.uint8, device=kit.device)
    copy = min(seconds(lambda: block.clone(), kit) for _ in range(5))
    flops = 2 * n**3 / product
    bandwidth = 2 * len(block) / copy
    text = f"{flops / 1e12:.3g} TFLOP/s ({dtype}), {bandwidth / 1e9:.3g} GB/s"
    return {"flops": flops, "bandwidth": bandwidth, "rows": [row(kit, "rates", "", text)]}


# ---- A2S at the paper's size ---------------------------------------------------------------------
def train_a2s(kit: Kit, stage: int, *more: str) -> dict[str, float]:
    """Train and evaluate a stage of A2S; seconds of its parts."""
    plan = kit.plan
    clock = Clock(kit.device)
    flags = f"--data {kit.out}/train --eval {kit.out}/test --out {kit.out}/a2s --overwrite"
    flags += f" --stage {stage} --size {plan.size} --backbone {plan.backbone}"
    flags += f" --device {kit.device}"
    if plan.epochs:
        flags += f" --epochs {plan.epochs}"
    with ExitStack() as stack:
        for owner, name, part in (
            (bank.Bank, "__init__", "decode"),
            (bank.MapBank, "__init__", "decode"),
            (a2s, "train_activation", "training"),
            (a2s, "make_labels", "labels"),
            (a2s, "train_detector", "training"),
            (a2s, "evaluate", "evaluation"),
            (run.Run, "save", "checkpoints"),
            (harness, "mirror", "pictures"),
            (harness.Watch, "__call__", "pictures"),
        ):
            stack.enter_context(clock.timed(owner, name, part))
        a2s.main([*flags.split(), "--backbone-weights", plan.weights, *more])
    return dict(clock.seconds)


def a2s_stage(kit: Kit, stage: int) -> dict:
    """A stage: decoding, training, labels, evaluation, checkpoints, pictures."""
    spent = train_a2s(kit, stage)
    plan = kit.plan
    whole = a2s.PAPER[f"stage{stage}"].epochs
    epochs = plan.epochs or whole
    steps = epochs * max(1, plan.photos // 8)
    images = epochs * plan.photos
    what = f"A2S stage {stage}, {plan.photos} photos"
    rate = f"{images / spent['training']:.0f} photos/s, "
    trained = f"{spent['training']:.1f} s for {epochs} epochs, {whole} take "
    trained += f"{spent['training'] * whole / epochs:.0f} s"
    rows = [
        row(kit, f"{what}: decoding", after=f"{spent['decode']:.1f} s"),
        row(kit, f"{what}: training, {steps} steps", after=rate + trained),
    ]
    if stage == 1:
        labels = f"{spent['labels']:.1f} s, {plan.photos / spent['labels']:.0f} photos/s"
        rows.append(row(kit, f"{what}: labels (CRF, median filter)", after=labels))
    maps = plan.tests * (2 if stage == 1 else 1)
    evaluated = f"{spent['evaluation']:.1f} s, {maps / spent['evaluation']:.0f} maps/s"
    rows.append(row(kit, f"{what}: evaluation, {maps} maps", after=evaluated))
    for part in ("checkpoints", "pictures"):
        per_epoch = f"{spent[part] / epochs:.2f} s per epoch"
        rows.append(row(kit, f"{what}: {part}", after=per_epoch))
    return {"rows": rows, "spent": spent, "epochs": epochs, "whole": whole, "maps": maps}


def a2s_total(kit: Kit) -> dict:
    """The paper's run, put together from what was measured."""
    trained = evaluated = maps = rest = 0.0
    for stage in (1, 2):
        found = kit.done[f"A2S, stage {stage}"]
        spent = found["spent"]
        factor = found["whole"] / found["epochs"]
        trained += spent["training"] * factor
        rest += spent["decode"] + (spent["checkpoints"] + spent["pictures"]) * factor
        evaluated += spent["evaluation"]
        maps += found["maps"]
        if stage == 1:
            trained += spent["labels"]
    evaluation = evaluated * MAPS / maps
    total = trained + rest + evaluation
    after = f"{total:.0f} s: trainings and labels {trained:.0f}, evaluation {evaluation:.0f}, "
    after += f"decoding, checkpoints and pictures {rest:.0f}"
    return {"rows": [row(kit, f"A2S as in the paper, {MAPS:,} maps scored", after=after)]}


# ---- CRF and scores ------------------------------------------------------------------------------
csr = crf.csr


def wide(ends: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse matrix with row ends and columns of 64 bits."""
    return torch.sparse_csr_tensor(
        ends.long(), columns.long(), values, shape, check_invariants=False
    )


def coordinates(ends: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A sparse matrix that stores the row of each entry."""
    return wide(ends, columns, values, shape).to_sparse_coo()


FORMATS = {"CSR, 32 bits, as used": csr, "CSR, 64 bits": wide, "COO": coordinates}


def dense_crf(kit: Kit) -> dict:
    """Photos per second in batches, and with other formats of the sparse matrices."""
    rows = []
    wanted = None
    bandwidth = kit.done["machine"]["bandwidth"]
    for batch in kit.plan.batches:
        images, masks = loaded(kit, batch, kit.plan.size)
        unary = crf.hard_unary(masks > 0.5)
        refine = partial(crf.dense_crf, images, unary, 50.0, 5.0, max_bytes=32e9)
        functions = crf.space_functions(kit.plan.size, kit.plan.size, 50.0)[0].shape[1]
        # A product with A reads 4 grid colours and 4 shares of a pixel twice, and its functions of
        # the place about five times. There are 11 products, one of them for the row sums.
        floor = 11 * unary.numel() * (64 + 20 * functions) / bandwidth
        usual = None
        for name, form in FORMATS.items():
            what = f"CRF, {kit.plan.size} px, batch {batch}, {name}"
            with mock.patch.object(crf, "csr", form):
                try:
                    found = refine()[:1].cpu()
                    spent = seconds(refine, kit)
                except RuntimeError as error:
                    rows.append(row(kit, what, after=f"fails: {runtime.first_line(error)[:60]}"))
                    continue
            usual = usual or spent
            wanted = found if wanted is None else wanted
            error = (found - wanted).abs().max().item()
            cells = [f"{batch / usual:.1f} /s", f"{batch / spent:.1f} /s", f"{usual / spent:.2f}"]
            cells += [milliseconds(floor), f"{floor / spent:.0%}"]
            rows.append(row(kit, f"{what}, differs by {error:.0e}", *cells))
    on_cpu = crf.dense_crf(images[:1].cpu(), unary[:1].cpu(), 50.0, 5.0)
    error = (on_cpu - wanted).abs().max().item()
    rows.append(row(kit, "CRF, largest difference to the CPU", "", f"{error:.1e}"))
    return {"rows": rows}


def scores(kit: Kit) -> dict:
    """All scores but wF, on the CPU and on the device, and their difference."""
    _, masks = loaded(kit, max(kit.plan.batches), 320)
    prediction = (masks * 200 + 20).byte()[:, 0]
    mask = masks[:, 0] > 0.5

    def score(prediction: Tensor, mask: Tensor) -> Metrics:
        metrics = Metrics(wf=False)
        metrics.add(prediction, mask)
        return metrics

    host = prediction.cpu(), mask.cpu()
    before = seconds(lambda: score(*host), kit)
    after = seconds(lambda: score(prediction, mask), kit)
    wanted = score(*host).scores()
    found = score(prediction, mask).scores()
    names = [name for name in wanted if wanted[name] is not None]  # all but wF
    error = max(abs(found[name] - wanted[name]) for name in names)
    count = len(mask)
    what = f"scores but wF of {count} maps, on the CPU and on the device, differ by {error:.0e}"
    cells = [f"{count / before:.0f} /s", f"{count / after:.0f} /s", f"{before / after:.2f}"]
    return {"rows": [row(kit, what, *cells)]}


# ---- Training steps ------------------------------------------------------------------------------
@dataclass
class Step:
    """A training step: output = forward(), under autocast; loss = loss(output); after(output).

    random: what forward and loss draw from, if anything besides torch's own generator.
    """

    name: str
    net: nn.Module
    optimiser: torch.optim.Optimizer
    forward: Callable
    loss: Callable
    after: Callable | None = None
    random: torch.Generator | None = None

    def __call__(self, device: torch.device, amp: str = "auto") -> Tensor:
        """Do it once; the loss."""
        with autocast(device, amp):
            output = self.forward()
        loss = self.loss(output)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        if self.after:
            self.after(output)
        return loss.detach()


def placed(net: nn.Module, kit: Kit, channels_last: bool = True) -> nn.Module:
    """The network on the device, in training mode, as `Settings.place` orders its memory."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return net.to(kit.device, memory_format=memory).train()


def encoder(kit: Kit, stored: bool = True) -> nn.Module:
    return backbone(kit.plan.backbone, kit.plan.weights, stored_stats=stored)


def steps_of_a2s(kit: Kit) -> Iterator[Step]:
    """Both stages, 8 photos."""
    images, masks = loaded(kit, 8, kit.plan.size)
    image = images.float() / 255
    random = generator(kit.device, 0)

    def adb(thetas: list[Tensor]) -> Tensor:
        loss = 0
        for weight, theta in zip((1, 0.1, 0.3, 0.5), thetas):
            keep = a2s.keep_mask(theta, 0.5, World(), random)
            loss = loss + weight * a2s.adb_loss(theta, 0.1, keep)
        return loss

    net = placed(a2s.ActivationNet(encoder(kit)), kit)
    optimiser = a2s.make_optimiser(net, 1.0)
    yield Step("A2S stage 1", net, optimiser, lambda: net(image), adb, random=random)

    detector = placed(a2s.Detector(encoder(kit)), kit)
    optimiser = a2s.make_optimiser(detector, 0.1)
    pixels = (masks * 255).byte().cpu()
    labels = bank.MapBank(pixels.__getitem__, len(pixels), kit.plan.size, kit.device, kit.out)
    index = torch.arange(len(pixels))
    flip = index % 2 == 0

    def rectify(y: Tensor) -> None:
        p = torch.sigmoid(y.detach().float())
        labels.write(index, flip, 0.4 * masks + 0.6 * p)

    loss = partial(a2s.detector_loss, g=masks)
    yield Step("A2S stage 2, OLR", detector, optimiser, lambda: detector(image), loss, rectify)


def steps_of_class(kit: Kit) -> Iterator[Step]:
    """The paper's batch."""
    images, masks = loaded(kit, max(kit.plan.batches), kit.plan.large)
    image = images.float() / 255
    net = placed(class_net.CLASSNet(encoder(kit, stored=False)), kit)
    optimiser = torch.optim.SGD(net.parameters(), 0.01, 0.9, nesterov=True, weight_decay=5e-4)

    def loss(logits: list[Tensor]) -> Tensor:
        return class_net.supervise(logits, masks, list(class_net.LOSSES))[0]

    yield Step(f"CLASS, batch {len(image)}", net, optimiser, lambda: net(image), loss)


def steps_of_unified(kit: Kit) -> Iterator[Step]:
    """Stage 1, and stage 2 with frozen encoders, with trained ones, and with SPR; 8 pairs."""
    images, masks = loaded(kit, 8, kit.plan.size)
    image = images.float() / 255
    pair = torch.cat([image, image.flip(0)], 1)  # [8, 6, S, S]
    has = torch.ones(len(pair), dtype=torch.bool, device=kit.device)
    random = generator("cpu", 0)

    def scales() -> list[Tensor]:
        return [pair, usod.second_scale(pair, random)]

    def cue_loss(output: tuple) -> Tensor:
        thetas, pairs = output
        guides = [usod.guide(scaled, has) for scaled in pairs]
        return usod.cue_loss(thetas, guides, 0.1, 1.0, 0.05)

    def forward(net: nn.Module) -> tuple:
        pairs = scales()
        return net(*pairs), pairs

    net = placed(usod.CueExtractor(encoder(kit)), kit)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, 0.1, 0.9, weight_decay=5e-4)
    yield Step("Unified stage 1", net, optimiser, partial(forward, net), cue_loss, random=random)

    detector = placed(usod.Detector(encoder(kit), encoder(kit), kit.plan.width), kit)
    optimiser = torch.optim.SGD(detector.parameters(), 0.005, 0.9)

    def loss(output: tuple) -> Tensor:
        return usod.detector_loss(output[0], masks, "iou", [0.2, 0, 0])

    def rectify(output: tuple) -> None:
        s = torch.sigmoid(output[0][0][0].detach().float())
        usod.rectify(image, s, masks, [0.2, 0.6, 0.2])

    same = (detector, optimiser, partial(forward, detector), loss)
    detector.encoders.requires_grad_(False)
    yield Step("Unified stage 2, frozen encoders", *same, random=random)
    detector.encoders.requires_grad_(True)
    yield Step("Unified stage 2", *same, random=random)
    yield Step("Unified stage 2, SPR", *same, rectify, random=random)


def make_captioner(kit: Kit) -> sdg_sod.Captioner:
    """The captioner with random weights, which writes captions as long as they can be."""
    return sdg_sod.Captioner(encoder(kit), numbers(kit.plan.words), kit.plan.hidden)


def steps_of_sdg(kit: Kit) -> Iterator[Step]:
    """Stages sod, guide with maps that were made before, and caption; 16 photos."""
    images, masks = loaded(kit, 16, kit.plan.large)
    image = images.float() / 255
    maps = torch.rand(len(image), 1, 7, 7, device=kit.device)
    size = sdg_sod.MIT[kit.plan.encoder]

    def branch() -> sdg_sod.SDGSOD:
        mit = sdg_sod.MiT(kit.plan.encoder)
        return sdg_sod.SDGSOD(mit, sdg_sod.MLPDecoder(size.channels, size.width))

    loss = partial(sdg_sod.structure_loss, g=masks)
    net = placed(branch(), kit, channels_last=False)
    yield Step("SDG-SOD sod", net, sdg_sod.make_optimiser(net), lambda: net(image), loss)

    guidance = sdg_sod.Guidance(size.channels, [1, 2, 3, 4], "minmax")
    start = branch()
    guided = sdg_sod.SDGSOD(start.encoder, start.decoder, guidance, make_captioner(kit))
    guided = placed(guided, kit, channels_last=False)
    optimiser = sdg_sod.make_optimiser(guided)
    yield Step("SDG-SOD guide", guided, optimiser, lambda: guided(image, maps), loss)

    captioner = placed(make_captioner(kit), kit, channels_last=False)
    small, _ = loaded(kit, 16, sdg_sod.GRID)
    small = small.float() / 255
    tokens = torch.randint(3, kit.plan.words, (len(small), 12), device=kit.device)
    yield Step(
        "SDG-SOD caption, 12 words",
        captioner,
        sdg_sod.make_optimiser(captioner),
        lambda: captioner(small, tokens),
        partial(sdg_sod.caption_loss, tokens=tokens),
    )


def time_steps(kit: Kit, steps: Callable) -> dict:
    """Each step in fp32 and in half precision: its time, both losses, its memory, its floor."""
    rows = []
    for step in steps(kit):
        step.optimiser.param_groups[0]["lr"] = 1e-4
        losses = []
        for amp in ("off", "auto"):
            torch.manual_seed(0)  # dropout
            if step.random:
                step.random.manual_seed(0)
            with torch.no_grad(), autocast(kit.device, amp):
                output = step.forward()
            losses.append(step.loss(output).item())
        before = seconds(lambda: step(kit.device, "off"), kit)
        if kit.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        after = seconds(lambda: step(kit.device), kit)
        with FlopCounterMode(display=False) as counter:
            step(kit.device)
        floor = counter.get_total_flops() / kit.done["machine"]["flops"]
        gigabytes = 0.0
        if kit.device.type == "cuda":
            gigabytes = torch.cuda.max_memory_allocated() / 1e9
        what = f"{step.name}, a step in fp32 and half precision: losses {losses[0]:.5f} and "
        what += f"{losses[1]:.5f}, peak memory {gigabytes:.1f} GB"
        cells = [milliseconds(before), milliseconds(after), f"{before / after:.2f}"]
        rows.append(row(kit, what, *cells, milliseconds(floor), f"{floor / after:.0%}"))
    return {"rows": rows}


# ---- Prediction, SPR, captions -------------------------------------------------------------------
def class_prediction(kit: Kit) -> dict:
    """Photos per second, one at a time and in the best of several batches."""
    net = placed(class_net.CLASSNet(encoder(kit, stored=False)), kit).eval()
    rates = {}
    floors = {}
    for batch in kit.plan.class_batches:
        images, _ = loaded(kit, batch, kit.plan.large)
        image = images.float() / 255
        predict = partial(class_net.saliency_logit, net, image, "auto")
        rates[batch] = batch / seconds(predict, kit)
        with FlopCounterMode(display=False) as counter:
            predict()
        floors[batch] = counter.get_total_flops() / kit.done["machine"]["flops"]
    best = max(rates, key=rates.get)
    one, *_ = rates
    share = f"{floors[best] * rates[best] / best:.0%}"
    what = f"CLASS, prediction, {kit.plan.large} px, batch {one} and the best batch, {best}"
    cells = [f"{rates[one]:.1f} /s", f"{rates[best]:.1f} /s", f"{rates[best] / rates[one]:.2f}"]
    return {"rows": [row(kit, what, *cells, milliseconds(floors[best]), share)]}


def stacked_refiner(image: Tensor, s: Tensor) -> Tensor:
    """`usod.pixel_refiner` with one stack of all neighbours: few large kernels, more memory."""
    near = torch.stack(usod.around(image))  # [32, B, 3, H, W]
    colour = ((near - image) / (near.std(0) + 1e-8) / 0.3).square().mean(2, keepdim=True)
    far = torch.tensor(usod.NEIGHBOURS).float().norm(dim=1)
    place = torch.softmax(-(far / (far.std() + 1e-8) / 0.3).square(), 0).to(s.device)
    weights = torch.softmax(-colour, 0) + 0.01 * place.view(-1, 1, 1, 1, 1)
    for _ in range(usod.PAR_ITERATIONS):
        s = (torch.stack(usod.around(s)) * weights).sum(0)
    return s


def refiners(kit: Kit) -> dict:
    """PAR of 8 photos: as it is, and with stacked neighbours."""
    images, masks = loaded(kit, 8, kit.plan.size)
    image = images.float() / 255
    before = seconds(lambda: usod.pixel_refiner(image, masks), kit)
    after = seconds(lambda: stacked_refiner(image, masks), kit)
    difference = usod.pixel_refiner(image, masks) - stacked_refiner(image, masks)
    error = difference.abs().max().item()
    what = f"Unified SPR, the pixel refiner as it is and stacked, differ by {error:.0e}"
    cells = [milliseconds(before), milliseconds(after), f"{before / after:.2f}"]
    return {"rows": [row(kit, what, *cells)]}


def captions(kit: Kit) -> dict:
    """Beam search, 5 captions of 30 words at once, in batches."""
    captioner = placed(make_captioner(kit), kit, channels_last=False).eval()
    rows = []
    for batch in kit.plan.batches:
        images, _ = loaded(kit, batch, sdg_sod.GRID)
        image = images.float() / 255
        spent = seconds(lambda: sdg_sod.describe(captioner, image, "auto"), kit)
        what = f"SDG-SOD, captions of 30 words and their maps, batch {batch}"
        rows.append(row(kit, what, after=f"{batch / spent:.1f} /s"))
    return {"rows": rows}


# ---- Compilation and tests -----------------------------------------------------------------------
def compilation(kit: Kit) -> dict:
    """A step of A2S stage 2 and a prediction of CLASS, as they are and with --compile."""
    rows = []
    *_, step = steps_of_a2s(kit)
    net = placed(class_net.CLASSNet(encoder(kit, stored=False)), kit)
    images, _ = loaded(kit, 8, kit.plan.large)
    predict = partial(class_net.saliency_logit, net, images.float() / 255, "auto")
    for what, module, function in (
        ("A2S stage 2, a step", step.net, lambda: step(kit.device)),
        ("CLASS, prediction, batch 8", net, predict),
    ):
        before = seconds(function, kit)
        module.compile(backend=kit.plan.compiler)
        start = time.perf_counter()
        function()
        wait(kit.device)
        first = time.perf_counter() - start
        after = seconds(function, kit)
        what += f" without and with --compile, which takes {first:.0f} s once"
        cells = [milliseconds(before), milliseconds(after), f"{before / after:.2f}"]
        rows.append(row(kit, what, *cells))
    return {"rows": rows}


def cuda_tests(kit: Kit) -> dict:
    """The tests that need a GPU; on a CPU they are skipped."""
    files = ["tests/test_crf.py", "tests/test_metrics.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().split("\n")[-1]
    return {"rows": [row(kit, "tests that need CUDA", "", last)]}


# ---- Main ----------------------------------------------------------------------------------------
PHASES = {
    "machine": machine,
    "A2S, stage 1": partial(a2s_stage, stage=1),
    "A2S, stage 2": partial(a2s_stage, stage=2),
    "A2S, total": a2s_total,
    "CRF": dense_crf,
    "scores": scores,
    "CLASS, prediction": class_prediction,
    "SPR": refiners,
    "captions": captions,
    "steps of A2S": partial(time_steps, steps=steps_of_a2s),
    "steps of CLASS": partial(time_steps, steps=steps_of_class),
    "steps of Unified USOD": partial(time_steps, steps=steps_of_unified),
    "steps of SDG-SOD": partial(time_steps, steps=steps_of_sdg),
    "compilation": compilation,
    "tests": cuda_tests,
}


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backbone-weights", metavar="W", help="none is a random start [none]")
    parser.add_argument("--tiny", action="store_true", help="small numbers, to try the program")
    parser.add_argument("--whole", action="store_true", help="A2S at the paper's length")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the phases that are not finished, then print all rows."""
    args = options(argv)
    plan = argparse.Namespace(**(TINY if args.tiny else PAPER))
    plan.weights = args.backbone_weights or plan.weights
    if args.whole:
        plan.epochs = None
    device, reason = runtime.pick_device(args.device)
    name = f"CPU, {torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"{name} ({reason}), torch {torch.__version__}, {plan.backbone}, {plan.size} px")

    file = args.out / "phases.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    kit = Kit(device, name, plan, args.out, done)
    draw_photos(args.out / "train", plan.photos)
    draw_photos(args.out / "test", plan.tests)
    for phase, function in PHASES.items():
        if phase in done:
            print(f"{phase}: finished before, in {done[phase]['seconds']:.1f} s")
            continue
        torch.manual_seed(0)
        start = time.perf_counter()
        found = function(kit)
        done[phase] = found | {"seconds": time.perf_counter() - start}
        runtime.save_json(file, done)
        print(f"{phase}: {done[phase]['seconds']:.1f} s", flush=True)

    print(f"\n| {COLUMNS} |\n|{'---|' * 7}")
    for phase in PHASES:
        for cells in done[phase]["rows"]:
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

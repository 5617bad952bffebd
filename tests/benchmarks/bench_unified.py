"""Unified USOD: time of a step and of SPR against a straightforward version, in turns.

    python tests/benchmarks/bench_unified.py [--size 128] [--batch 8] [--backbone tiny] [--rounds 5]

Each round runs both versions in turn, so that a busy machine slows both; the table shows the median
time of ours, of the straightforward version, and the median of the ratios. Straightforward means

    stage 1   gradients for the frozen encoder, too, which nobody uses (a rate of 0)
    stage 2   the same in epoch 1, when the encoders rest
    SPR       image by image, all neighbours stacked, torch.std over them, every label written to a
              PNG file and read again

Both versions compute the same numbers; the script checks it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import unified_usod as usod  # noqa: E402
from common.bank import MapBank  # noqa: E402
from common.runtime import autocast, pick_device, save_png  # noqa: E402


class Straight(usod.CueExtractor):
    """Stage 1 with gradients for the encoder."""

    def activation(self, image):
        _, e2, e3, e4, e5 = self.encoder(image)
        f = [self.se3(e3), self.se4(e4), self.se5(e5)]
        m = self.se0(torch.cat([usod.resize(x, e2) for x in f], 1)).float().sum(1, keepdim=True)
        return m - m.mean((2, 3), keepdim=True)


def slow_refiner(image, s):
    """PAR of one image, all neighbours stacked in memory, with torch.std."""
    near = torch.stack(usod.around(image), 2)  # [B, 3, 32, H, W]
    colour = (near - image[:, :, None]).abs() / (near.std(2, keepdim=True) + 1e-8) / 0.3
    place = torch.tensor(
        [
            d * (2**0.5 if i and j else 1)
            for d in (1, 2, 4, 8)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if i or j
        ],
        device=image.device,
    )
    place = torch.softmax(-(place / (place.std() + 1e-8) / 0.3).square(), 0)
    weight = torch.softmax(-colour.square().mean(1), 1) + 0.01 * place[:, None, None]
    for _ in range(6):
        s = (torch.stack(usod.around(s), 2) * weight[:, None]).sum(2)
    return s


def slow_spr(images, maps, files):
    """Image by image, from file to file."""
    for image, s, file in zip(images, maps, files):
        prior = slow_refiner(image[None], s[None])[0] / 1.01**6
        g = torch.from_numpy(np.array(Image.open(file), np.float32) / 255).to(s.device)
        g = 0.2 * prior + 0.6 * s + 0.2 * g
        save_png(file, (g[0] * 255 + 0.5).byte().cpu())


def timed(function, device):
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name, ours, straight, rounds, device):
    """Run both in turns and print one row of the table."""
    ours(), straight()
    times = [(timed(ours, device), timed(straight, device)) for _ in range(rounds)]
    a, b = (statistics.median(column) for column in zip(*times))
    ratio = statistics.median(y / x for x, y in times)
    print(f"{name:28} {1000 * a:10.1f} ms {1000 * b:12.1f} ms {ratio:8.2f} x")


def main():
    """Build both versions and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    args = usod.build_parser().parse_args(
        [
            "--backbone",
            given.backbone,
            "--size",
            str(given.size),
            "--backbone-weights",
            "none",
            "--width",
            str(given.width),
        ]
    )
    usod.fill_defaults(args)
    args.device, _ = pick_device(given.device)
    device = args.device
    torch.manual_seed(0)
    pair = torch.rand(given.batch, 6, given.size, given.size, device=device)
    big = torch.nn.functional.interpolate(pair, scale_factor=1.25, mode="bilinear")
    has = torch.ones(given.batch, dtype=torch.bool, device=device)
    labels = (torch.rand(given.batch, 1, given.size, given.size, device=device) > 0.5).float()
    guides = [usod.guide(x, has) for x in (pair, big)]
    print(
        f"{device}, {torch.get_num_threads()} thread(s), {given.backbone}, batch {given.batch}, "
        f"{given.size} px\n{'':28} {'ours':>13} {'straight':>15} {'ratio':>10}"
    )

    def cue_step(net):
        def step():
            net.zero_grad()
            with autocast(device, "auto"):
                thetas = net(pair, big)
            usod.cue_loss(thetas, guides, 0.1, 1.0, 0.05).backward()

        return step

    net = usod.make_net(1, args, "none").train()
    straight = Straight(net.encoder).to(device).train()
    straight.load_state_dict(net.state_dict())
    net.encoder.requires_grad_(True)  # both have the same; ours runs it without gradients anyway
    steps = [cue_step(net), cue_step(straight)]
    for step in steps:
        step()
    grads = [one.se0.conv.weight.grad for one in (net, straight)]
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-6)
    compare("stage 1, a step", *steps, given.rounds, device)

    detector = usod.make_net(2, args, "none").train()

    def detector_step(trained):
        def step():
            detector.zero_grad()
            detector.encoders.requires_grad_(trained)
            with autocast(device, "auto"):
                out = detector(pair, big)
            usod.detector_loss(out, labels, "iou", [0.2, 0, 0]).backward()

        return step

    compare(
        "stage 2, a step of epoch 1",
        detector_step(False),
        detector_step(True),
        given.rounds,
        device,
    )

    index, flip = torch.arange(given.batch), torch.zeros(given.batch, dtype=torch.bool)
    bank = MapBank(lambda i: (labels[i] * 255).byte().cpu(), given.batch, given.size, device)
    s = torch.rand_like(labels)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.png") for i in range(given.batch)]
        for file, label in zip(files, labels):
            save_png(file, (label[0] * 255).byte().cpu())

        def spr():
            g = bank.read(index, flip)
            bank.write(index, flip, usod.rectify(pair[:, :3], s, g, [0.2, 0.6, 0.2]))

        def straight_spr():
            slow_spr(pair[:, :3], s, files)

        spr(), straight_spr()
        stored = torch.stack([torch.from_numpy(np.array(Image.open(f))) for f in files])
        assert (bank.pixels[:, 0].cpu().int() - stored.int()).abs().max() <= 1
        compare(f"SPR, {given.batch} labels", spr, straight_spr, given.rounds, device)


if __name__ == "__main__":
    main()

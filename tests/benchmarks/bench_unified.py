"""Unified USOD: time of a step and of SPR against a straightforward version, in turns.

    python tests/benchmarks/bench_unified.py [--size 128] [--batch 8] [--backbone tiny] [--rounds 5]

Each round runs both versions in turn, so that a busy machine slows both; the table shows the median
time of ours, of the straightforward version, and the median of the ratios. Straightforward means

    stage 1   gradients for the frozen encoder, too, which nobody uses (a rate of 0)
    stage 2   the same in epoch 1, while the encoders are frozen
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
        """As in unified_usod.py, without torch.no_grad()."""
        _, e2, e3, e4, e5 = self.encoder(image)
        levels = [self.se3(e3), self.se4(e4), self.se5(e5)]
        f = self.se0(torch.cat([usod.resize(x, e2) for x in levels], 1))
        m = f.float().sum(1, keepdim=True)
        return m - m.mean((2, 3), keepdim=True)


def slow_refiner(image, s):
    """PAR of one image, all neighbours stacked in memory, with torch.std."""
    near = torch.stack(usod.around(image), 2)  # [B, 3, 32, H, W]
    colour = (near - image[:, :, None]).abs() / (near.std(2, keepdim=True) + 1e-8) / 0.3
    place = torch.tensor(usod.NEIGHBOURS, device=image.device).float().norm(dim=1)  # [32]
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


def cue_steps(args, pair, big, guides):
    """A training step of stage 1, ours and with gradients for the encoder."""
    device = pair.device

    def step_of(net):
        def step():
            net.zero_grad()
            with autocast(device, "auto"):
                thetas = net(pair, big)
            usod.cue_loss(thetas, guides, 0.1, 1.0, 0.05).backward()

        return step

    net = usod.make_net(1, args, "none").to(device, memory_format=torch.channels_last).train()
    straight = Straight(net.encoder).to(device).train()
    straight.load_state_dict(net.state_dict())
    net.encoder.requires_grad_(True)  # both have the same; ours runs it without gradients anyway
    steps = [step_of(net), step_of(straight)]
    for step in steps:
        step()
    grads = [one.se0.conv.weight.grad for one in (net, straight)]
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-6)
    return steps


def detector_steps(args, pair, big, labels):
    """A training step of stage 2, with encoders that are frozen and that are not."""
    device = pair.device
    detector = usod.make_net(2, args, "none")
    detector = detector.to(device, memory_format=torch.channels_last).train()

    def step_of(trained):
        def step():
            detector.zero_grad()
            detector.encoders.requires_grad_(trained)
            with autocast(device, "auto"):
                logits = detector(pair, big)
            usod.detector_loss(logits, labels, "iou", [0.2, 0, 0]).backward()

        return step

    return [step_of(False), step_of(True)]


def spr_steps(image, labels, folder):
    """SPR of a batch, ours and from file to file."""
    count, size = len(labels), labels.shape[-1]
    index = torch.arange(count)
    flip = torch.zeros(count, dtype=torch.bool)
    bank = MapBank(lambda i: (labels[i] * 255).byte().cpu(), count, size, labels.device)
    s = torch.rand_like(labels)
    files = [Path(folder, f"{i}.png") for i in range(count)]
    for file, label in zip(files, labels):
        save_png(file, (label[0] * 255).byte().cpu())

    def ours():
        g = bank.read(index, flip)
        bank.write(index, flip, usod.rectify(image, s, g, [0.2, 0.6, 0.2]))

    def straight():
        slow_spr(image, s, files)

    ours()
    straight()
    stored = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
    assert (bank.pixels[:, 0].cpu().int() - stored.int()).abs().max() <= 1
    return [ours, straight]


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
    flags = (
        f"--backbone {given.backbone} --size {given.size} --backbone-weights none "
        f"--width {given.width}"
    )
    args = usod.complete(usod.build_parser().parse_args(flags.split()))
    device, _ = pick_device(given.device)

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
    compare("stage 1, a step", *cue_steps(args, pair, big, guides), given.rounds, device)
    steps = detector_steps(args, pair, big, labels)
    compare("stage 2, a step of epoch 1", *steps, given.rounds, device)
    with tempfile.TemporaryDirectory() as folder:
        steps = spr_steps(pair[:, :3], labels, folder)
        compare(f"SPR, {given.batch} labels", *steps, given.rounds, device)


if __name__ == "__main__":
    main()

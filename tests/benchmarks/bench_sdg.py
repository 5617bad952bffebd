"""SDG-SOD: what guidance costs in a training step, and what the width of the decoder costs.

    python tests/benchmarks/bench_sdg.py [--encoder mit_b1] [--size 352] [--batch 4] [--rounds 9]

One step is forward, loss and backward on random pictures. Each round runs every variant once, in
turn, so that a busy machine slows all of them; the table shows the median over the rounds of the
ratio to the unguided step of the same round. The captioner has random weights, so its captions are
as long as they can be: the ratio of "live" is an upper bound.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import sdg_sod  # noqa: E402
from common.backbones import backbone  # noqa: E402
from data.captions import numbers  # noqa: E402


def network(options, width, captioner=None):
    encoder = sdg_sod.MiT(options.encoder)
    guidance = sdg_sod.Guidance(encoder.channels, [1, 2, 3, 4], "minmax") if captioner else None
    decoder = sdg_sod.MLPDecoder(encoder.channels, width)
    return sdg_sod.SDGSOD(encoder, decoder, guidance, captioner).to(options.device).train()


def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", choices=sdg_sod.MIT, default="mit_b1")
    parser.add_argument("--size", type=int, default=352)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    torch.manual_seed(0)
    device, side = options.device, options.size
    image = torch.rand(options.batch, 3, side, side, device=device)
    mask = (torch.rand(options.batch, 1, side, side, device=device) > 0.5).float()
    maps = torch.rand(options.batch, 1, 7, 7, device=device)
    captioner = sdg_sod.Captioner(backbone("resnet50", "none"), numbers(10_000), 1024)
    guided = network(options, 256, captioner)

    def step(net, m=None):
        def run():
            sdg_sod.structure_loss(net(image, m), mask).backward()
            net.zero_grad()

        return run

    variants = {
        "no guidance, width 256": step(network(options, 256)),
        "guidance, precomputed": step(guided, maps),
        "guidance, live captioner": step(guided),
        "no guidance, width 768": step(network(options, 768)),
    }
    times = {name: [] for name in variants}
    for turn in range(options.rounds + 1):  # the first one only warms up
        for name, run in variants.items():
            times[name] += [seconds(run, device)] if turn else []
    base = times["no guidance, width 256"]
    print(
        f"{options.encoder}, {side} px, batch {options.batch}, {device}, "
        f"{torch.get_num_threads()} thread(s), median of {options.rounds} rounds"
    )
    for name, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each, base))
        print(f"{name:26}{1000 * statistics.median(each):9.0f} ms{ratio:8.3f}")


if __name__ == "__main__":
    main()

"""CLASS: training and inference against the same network written naively, in one interleaved run.

    python tests/benchmarks/bench_class.py [--backbone resnet50] [--size 352] [--device cpu]

Naive: attention as an explicit product, float32 (on CUDA without TF32), contiguous memory. Ours:
as class_net.py runs it on the device (SDPA, channels last, bf16 on CUDA; --amp bf16 asks for it on
a CPU too). Training is forward, loss and backward. Each round runs both in turn; the table shows
the median rates and the median of the ratios (above 1: ours is faster), and at its end the batch
with the fastest prediction.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from class_net import LOSSES, CLASSNet, PositionAttention, supervise  # noqa: E402
from common.backbones import BACKBONES, backbone  # noqa: E402
from common.runtime import autocast, pick_device  # noqa: E402


class NaivePositionAttention(PositionAttention):
    """The same parameters and numbers, with the attention matrix written out."""

    def forward(self, high, low):
        f_h, f_l, value = (x.flatten(2) for x in (self.query(high), self.key(low), self.value(low)))
        s = torch.softmax(f_h.transpose(1, 2) @ f_l, -1)  # [B, N_h, N_l]
        found = (s @ value.transpose(1, 2)).transpose(1, 2)
        return self.alpha * found.reshape(high.shape) + high


def build(args, naive: bool) -> CLASSNet:
    torch.manual_seed(0)
    net = CLASSNet(backbone(args.backbone, "none"))
    if naive:
        for module in net.position.values():
            module.__class__ = NaivePositionAttention
    for name, p in net.named_parameters():
        if name.endswith(("alpha", "beta")):
            torch.nn.init.constant_(p, 0.5)  # at 0 attention would not matter
    layout = torch.contiguous_format if naive else torch.channels_last
    return net.to(args.device, memory_format=layout)


def step(net, image, g, args, naive: bool, training: bool) -> None:
    """One step of training, or one prediction."""
    net.train(training)
    if not naive:
        image = image.contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training), autocast(args.device, "off" if naive else args.amp):
        logits = net(image)
    if training:
        net.zero_grad()
        supervise(logits, g, list(LOSSES))[0].backward()
    if args.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(*arguments) -> float:
    start = time.perf_counter()
    step(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--size", type=int, default=352)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 8],
        help="tried for prediction; the last one is the batch of training",
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    args.device, reason = pick_device(args.device)
    nets = [build(args, naive) for naive in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    image = torch.rand(2, 3, args.size, args.size, device=args.device)
    with torch.no_grad():
        error = (nets[0].eval()(image)[0] - nets[1].eval()(image)[0]).abs().max().item()
    print(
        f"{args.device} ({reason}), {torch.get_num_threads()} thread(s), {args.backbone}, "
        f"{args.size} px, amp {args.amp}; outputs differ by {error:.1e} in float32"
    )
    print(f"{'images/s':24}{'ours':>9}{'naive':>9}{'ratio':>8}")
    rates = {}
    jobs = [(size, False) for size in args.batches] + [(args.batches[-1], True)]
    for size, training in jobs:
        image = torch.rand(size, 3, args.size, args.size, device=args.device)
        g = F.interpolate(torch.rand(size, 1, 8, 8, device=args.device), image.shape[2:]).round()
        times = []
        for turn in range(args.rounds + 1):  # the first one only warms up
            row = [seconds(nets[k], image, g, args, bool(k), training) for k in (0, 1)]
            times += [row] if turn else []
        ours, naive = (size / statistics.median(t[k] for t in times) for k in (0, 1))
        ratio = statistics.median(t[1] / t[0] for t in times)
        rates |= {} if training else {size: ours}
        print(
            f"{'training' if training else 'prediction'}, batch {size:<8} {ours:9.2f}{naive:9.2f}"
            f"{ratio:8.2f}",
            flush=True,
        )
    print(f"best batch of prediction: {max(rates, key=rates.get)}")


if __name__ == "__main__":
    main()

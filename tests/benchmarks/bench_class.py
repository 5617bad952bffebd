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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from class_net import LOSSES, CLASSNet, PositionAttention, supervise  # noqa: E402
from common.backbones import BACKBONES, backbone  # noqa: E402
from common.runtime import autocast, pick_device  # noqa: E402


class NaivePositionAttention(PositionAttention):
    """The same parameters and numbers, with the attention matrix written out."""

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        f_h = self.query(high).flatten(2)  # [B, C, N_h]
        f_l = self.key(low).flatten(2)  # [B, C, N_l]
        value = self.value(low).flatten(2)  # [B, 64, N_l]
        s = torch.softmax(f_h.transpose(1, 2) @ f_l, -1)  # [B, N_h, N_l]
        found = (s @ value.transpose(1, 2)).transpose(1, 2)  # [B, 64, N_h]
        return self.alpha * found.reshape(high.shape) + high


class Side:
    """One of the two networks that are compared: ours, or the naive one."""

    def __init__(self, name: str, device: torch.device, amp: str, naive: bool):
        torch.manual_seed(0)
        net = CLASSNet(backbone(name, "none"))
        if naive:
            for module in net.position.values():
                module.__class__ = NaivePositionAttention
        for key, parameter in net.named_parameters():
            if key.endswith(("alpha", "beta")):
                torch.nn.init.constant_(parameter, 0.5)  # at 0 attention would not matter
        layout = torch.contiguous_format if naive else torch.channels_last
        self.net = net.to(device, memory_format=layout)
        self.device = device
        self.amp = "off" if naive else amp

    def seconds(self, image: Tensor, g: Tensor, training: bool) -> float:
        """The time of one step of training, or of one prediction."""
        start = time.perf_counter()
        self.net.train(training)
        with torch.set_grad_enabled(training), autocast(self.device, self.amp):
            logits = self.net(image)
        if training:
            self.net.zero_grad()
            loss, _ = supervise(logits, g, list(LOSSES))
            loss.backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


@torch.no_grad()
def difference(ours: Side, naive: Side, size: int) -> float:
    """The largest difference between the maps of the two, in float32."""
    image = torch.rand(2, 3, size, size, device=ours.device)
    logits = [side.net.eval()(image)[0] for side in (ours, naive)]
    return (logits[0] - logits[1]).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, default="resnet50")
    add("--size", type=int, default=352)
    add("--device", default="auto")
    add("--amp", choices=("auto", "bf16", "off"), default="auto")
    add(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 8],
        help="tried for prediction; the last one is the batch of training",
    )
    add("--rounds", type=int, default=5)
    args = parser.parse_args()

    device, reason = pick_device(args.device)
    ours = Side(args.backbone, device, args.amp, naive=False)
    naive = Side(args.backbone, device, args.amp, naive=True)
    naive.net.load_state_dict(ours.net.state_dict())
    print(
        f"{device} ({reason}), {torch.get_num_threads()} thread(s), {args.backbone}, {args.size} "
        f"px, amp {args.amp}; outputs differ by {difference(ours, naive, args.size):.1e} in float32"
    )

    print(f"{'images/s':24}{'ours':>9}{'naive':>9}{'ratio':>8}")
    rates = {}
    jobs = [(batch, False) for batch in args.batches] + [(args.batches[-1], True)]
    for batch, training in jobs:
        image = torch.rand(batch, 3, args.size, args.size, device=device)
        g = F.interpolate(torch.rand(batch, 1, 8, 8, device=device), image.shape[2:]).round()
        times = []
        for turn in range(args.rounds + 1):
            row = [side.seconds(image, g, training) for side in (ours, naive)]
            if turn > 0:  # the first one only warms up
                times.append(row)

        our_rate = batch / statistics.median(row[0] for row in times)
        naive_rate = batch / statistics.median(row[1] for row in times)
        ratio = statistics.median(row[1] / row[0] for row in times)
        if not training:
            rates[batch] = our_rate
        job = f"{'training' if training else 'prediction'}, batch {batch}"
        print(f"{job:24}{our_rate:9.2f}{naive_rate:9.2f}{ratio:8.2f}", flush=True)
    print(f"best batch of prediction: {max(rates, key=rates.get)}")


if __name__ == "__main__":
    main()

"""CLASS: cross-level attention and supervision for salient object detection, learned from masks.

Tang, Li: "CLASS: Cross-Level Attention and Supervision for Salient Objects Detection", ACCV 2020.

Deep features know what the object is, shallow ones where it ends; each asks the other for help.
Position attention: every deep cell looks at all shallow cells and takes what fits, so that regions
that only look salient are told apart. Channel attention: every shallow channel is mixed with the
deep channels that it agrees with, so that an object of many colours stays whole. A decoder
fuses both at three levels. The masks supervise pixels (cross entropy), regions (mean and spread in
a sliding window) and the object (F-measure) at four depths.

    image -> encoder -> E_5 -> bridge -> F_h; its 1x1, two convolutions -> D_5       -> loss / 8
                        E_4 -> bridge -> F_4 -> CLA with F_h -> FFM with D_5 -> D_4  -> loss / 4
                        E_3 -> bridge -> F_3 -> CLA with F_h -> FFM with D_4 -> D_3  -> loss / 2
                        E_2 -> bridge -> F_2 -> CLA with F_h -> FFM with D_3 -> D_2  -> loss, map

Usage
    python class_net.py                                     # built-in shapes, no download, minutes
    python class_net.py --data DUTS-TR                      # the paper's experiment
    python class_net.py --data photos/ --eval others/       # folders with images/ and masks/
    python class_net.py --weights runs/class_net-DUTS-TR/last.pt --predict photo.jpg --cutout
    torchrun --nproc_per_node=4 class_net.py --data DUTS-TR # several GPUs or machines

Results. Paper (ImageNet ResNet-50, 10,553 DUTS-TR photos, 100 epochs, RTX 2080 Ti), F_adp / S / MAE
on ECSSD .933 / .928 / .033, on DUTS-TE .856 / .894 / .034. Ours at that size: not run. At small
scale: README.

Departures. The paper is the default. Its training code was never released; where the paper is
silent the authors' network, losses and loader are followed: E_5 is added to its own mean before
the bridge, two convolutions after every fusion module and for D_5, one channel for the fusion
module's weight map, and its residual; a Gaussian window of 11 x 11 pixels, sigma 1.5, zeros beyond
the border, for regions; beta² = 0.3 in Eq. 12. --released follows the authors' code also where it
contradicts the paper:
 D1 queries and keys keep all 64 channels; released: 8.
 D2 position attention puts what a cell found at that cell (Eq. 2); released: the matrix of cells
    times channels is read as channels times cells, which strews it over places and channels.
 D3 channel attention prefers channels that agree (Eq. 4); released: those that agree least.
 D4 the bridge has one 3x3 convolution per level and one F_h; released: two, and an F_h per level.
 D5 both 3x3 convolutions of the fusion module have BatchNorm and ReLU; released: the first only.
 D6 the region loss is the mean of squared differences of mean and standard deviation (Eqs. 8, 9);
    released: a norm over all windows, of mean and variance, plus a blurred absolute error. It
    grows with the picture and is hundreds to thousands of times larger: it may want a lower rate.
 D7 pictures are flipped and rescaled; released: cropped too.
 D8 pixels are normalised as ImageNet's weights want; released: by statistics of the photos.
Ours in both cases:
 D9 the network takes any aspect; the released channel attention fails on pictures that are not
    square. The command line warps every picture to a square, as the authors do.
 D10 what neither states is F3Net's recipe, whose numbers the paper shares: nesterov, the rate set
    once per epoch; but the stem is trained too. Of Eq. 15's outputs D_2 weighs 1, D_5 1/8. Crops
    and scales are taken from the copy at --size.
 D11 VGG-16 was never released: its taps are the poolings (--vgg-taps conv: the layers before).
 D12 without FFM (Table 2) its three inputs are added.
 D13 at prediction logits, not maps, are resized to the photo.
 D14 with several processes BatchNorm sees the samples of its own process, and the statistics are
    averaged after each epoch: results depend a little on the number of processes.

Shapes: B batch, H W input size, h w feature size, N = h w. Images are in [0, 1].
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import harness, runtime
from common.backbones import backbone
from common.bank import Bank, batches, crop, draw_crops, epoch_order
from common.datasets import open_set
from common.runtime import UserError, autocast, generator, progress

PAPER = {"epochs": 100, "lr": 0.05, "batch_size": 32, "size": 352, "backbone": "resnet50"}
SHAPES = {"epochs": 7, "lr": 0.05, "batch_size": 8, "size": 160, "backbone": "tiny"}
PAPER_SETS = ["ECSSD", "DUTS-TE", "DUT-OMRON", "PASCAL-S", "HKU-IS"]  # Table 1
SCALES = (7, 8, 9, 10, 11)  # elevenths of --size, to multiples of 8: 224, 256, 288, 320, 352
WIDTH = 64  # channels of every feature behind the bridge
LOSSES = ("pixel", "region", "object")


# ---- Config --------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """All flags. A default of None is the paper's value, or the small preset's on shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="The docstring of this file explains the method.",
    )
    method = parser.add_argument_group("method")
    method.add_argument("--released", action="store_true", help="the authors' code (D1 to D8)")
    method.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="terms of Eq. 14 [all]"
    )
    method.add_argument(
        "--region", choices=("paper", "released"), help="form of Eq. 9, see D6 [paper]"
    )
    method.add_argument(
        "--outputs",
        type=int,
        choices=(1, 4),
        default=4,
        help="supervised outputs, K of Eq. 15; 1 is D_2 alone [4]",
    )
    method.add_argument(
        "--attention",
        nargs="*",
        choices=("position", "channel"),
        default=["position", "channel"],
        help="parts of CLA; without a name no CLA [both]",
    )
    method.add_argument("--fusion", choices=("ffm", "sum"), default="ffm", help="see D12 [ffm]")
    method.add_argument(
        "--augment",
        nargs="*",
        choices=("flip", "scale", "crop"),
        help="[flip scale; with --released: flip scale crop]",
    )
    method.add_argument(
        "--bn",
        choices=("batch", "stored"),
        default="batch",
        help="statistics of the encoder's BatchNorm in training; stored suits "
        "weights whose BatchNorm is folded [batch]",
    )
    method.add_argument(
        "--vgg-taps", choices=("pool", "conv"), default="pool", help="see D11 [pool]"
    )
    harness.add_flags(parser)
    parser.set_defaults(pixels=None)
    return parser


def fill_defaults(args: argparse.Namespace) -> None:
    """Replace None by the paper's value, or by the small preset's on shapes, which is printed."""
    small = harness.use_preset(args, PAPER, SHAPES)
    if args.size < 64:
        raise UserError(f"--size {args.size} leaves nothing of the deepest map; at least 64")
    usual = "shapes" if args.backbone == "tiny" else "imagenet"
    args.backbone_weights = args.backbone_weights or usual
    args.region = args.region or ("released" if args.released else "paper")
    if args.augment is None:
        args.augment = ["flip", "scale"] + ["crop"] * args.released  # D7
    args.pixels = args.pixels or ("f3net" if args.released else "imagenet")  # D8
    if args.vgg_taps == "conv" and args.backbone != "vgg16":
        raise UserError(f"--vgg-taps conv is for vgg16; {args.backbone} has other taps")
    if args.eval is None and args.data == "DUTS-TR":
        args.eval = harness.present(PAPER_SETS, args.data_root)
    elif args.eval is None:
        args.eval = ["shapes-test"] if small else []
    harness.show_preset(args, SHAPES)


# ---- Model ---------------------------------------------------------------------------------------
def resize(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear: [B, C, h, w] -> [B, C, *size]."""
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def conv(inputs: int, size: int, bias: bool = False) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU: [B, inputs, h, w] -> [B, 64, h, w]."""
    return nn.Sequential(
        nn.Conv2d(inputs, WIDTH, size, padding=size // 2, bias=bias),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
    )


class PositionAttention(nn.Module):
    """CLA-P: every deep cell takes from all shallow cells what fits (Eqs. 1 to 3)."""

    def __init__(self, released: bool = False):
        super().__init__()
        self.released, inner = released, 8 if released else WIDTH  # D1
        self.query, self.key = nn.Conv2d(WIDTH, inner, 1), nn.Conv2d(WIDTH, inner, 1)
        self.value = nn.Conv2d(WIDTH, WIDTH, 1)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """F_h [B, 64, h_h, w_h], F_l [B, 64, h_l, w_l] -> F_h_out like F_h."""
        query, key, value = (
            part.flatten(2).mT[:, None]
            for part in (self.query(high), self.key(low), self.value(low))
        )  # [B, 1, N, channels]
        # S = softmax(f_h f_l') without the usual 1 / sqrt(channels); S has N_h x N_l entries
        found = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # [B, 1, N_h, 64]
        found = found if self.released else found.mT  # D2
        return (high + self.alpha * found.reshape(high.shape)).to(high.dtype)  # Eq. 3


class ChannelAttention(nn.Module):
    """CLA-C: every shallow channel takes from the deep channels it agrees with (Eqs. 4 to 6)."""

    def __init__(self, released: bool = False):
        super().__init__()
        self.sign = -1 if released else 1  # D3
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """F_l [B, 64, h, w], F_h [B, 64, any, any] -> F_l_out like F_l."""
        f_h = resize(high, low.shape[2:]).flatten(2)  # [B, 64, N]
        f_l = low.flatten(2)  # [B, 64, N]
        with torch.autocast(low.device.type, enabled=False):  # a sum of N products needs fp32
            energy = self.sign * f_l.float() @ f_h.float().mT  # [B, 64, 64]
            found = torch.softmax(energy, -1) @ f_h.float()  # Z f_H, Eqs. 4 and 5
        return (low + self.beta * found.view(low.shape)).to(low.dtype)  # Eq. 6


class FeatureFusion(nn.Module):
    """FFM: three features become one, weighed by a map (Sec. 3.3)."""

    def __init__(self, released: bool = False):
        super().__init__()
        self.reduce = conv(3 * WIDTH, 1, bias=True)
        self.conv1 = conv(WIDTH, 3)
        self.conv2 = (
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) if released else conv(WIDTH, 3)
        )  # D5
        self.gate = nn.Conv2d(WIDTH, 1, 1, bias=False)

    def forward(self, above: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Three [B, 64, h, w] -> [B, 64, h, w]."""
        mixed = self.reduce(torch.cat([above, low, high], 1))
        x = self.conv2(self.conv1(mixed))
        return torch.sigmoid(self.gate(x)) * x + mixed


class Sum(nn.Module):
    """The baseline instead of FFM (D12)."""

    def forward(self, above: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return above + low + high


class CLASSNet(nn.Module):
    """The network of Fig. 2. Modules are named by level, "2" (fine) to "5" (coarse)."""

    def __init__(
        self,
        encoder: nn.Module,
        attention: tuple[str, ...] = ("position", "channel"),
        fusion: str = "ffm",
        outputs: int = 4,
        released: bool = False,
    ):
        super().__init__()
        self.encoder, self.attention, self.released = encoder, attention, released

        def per_level(make, levels="234") -> nn.ModuleDict:
            return nn.ModuleDict({level: make() for level in levels})

        def convs(count: int) -> nn.Sequential:
            return nn.Sequential(*[conv(WIDTH, 3) for _ in range(count)])

        depth = 2 if released else 1  # D4
        self.squeeze = nn.ModuleDict(
            {
                level: conv(channels, 1, bias=True)
                for level, channels in zip("2345", encoder.channels[1:])
            }
        )
        self.bridge = per_level(lambda: convs(depth))
        self.bridge_high = per_level(lambda: convs(depth), "234" if released else "5")
        if "position" in attention:
            self.position = per_level(lambda: PositionAttention(released))
        if "channel" in attention:
            self.channel = per_level(lambda: ChannelAttention(released))
        self.fusion = per_level(lambda: FeatureFusion(released) if fusion == "ffm" else Sum())
        self.refine = per_level(lambda: convs(2), "2345")
        self.heads = per_level(lambda: nn.Conv2d(WIDTH, 1, 3, padding=1), "2345"[:outputs])

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] -> logits [B, 1, H, W] of D_2 (the map), D_3, D_4, D_5."""
        maps = list(self.encoder(image))[1:]  # E_2 ... E_5
        maps[3] = maps[3] + maps[3].mean((2, 3), keepdim=True)  # not in the paper
        f = {level: self.squeeze[level](x) for level, x in zip("2345", maps)}
        high = {level: bridge(f["5"]) for level, bridge in self.bridge_high.items()}
        d = {"5": self.refine["5"](f["5"])}
        for level, above in ("4", "5"), ("3", "4"), ("2", "3"):
            f_l, f_h = self.bridge[level](f[level]), high[level if self.released else "5"]  # D4
            low = self.channel[level](f_l, f_h) if "channel" in self.attention else f_l
            deep = self.position[level](f_h, f_l) if "position" in self.attention else f_h
            size = f_l.shape[2:]
            fused = self.fusion[level](resize(d[above], size), low, resize(deep, size))
            d[level] = self.refine[level](fused)  # [B, 64, h_l, w_l]
        return [resize(head(d[level]), image.shape[2:]) for level, head in self.heads.items()]


# ---- Losses --------------------------------------------------------------------------------------
# Each takes a logit and a mask in [0, 1], both [B, 1, H, W], and gives a scalar in fp32.
def pixel_loss(logit: Tensor, g: Tensor) -> Tensor:
    """Eq. 7: binary cross entropy, mean over pixels."""
    return F.binary_cross_entropy_with_logits(logit, g)


def blur(x: Tensor) -> Tensor:
    """Mean in a Gaussian window of 11 x 11, sigma 1.5, zeros beyond the border: [B, 1, H, W]."""
    weight = torch.exp(-((torch.arange(11, device=x.device) - 5.0) ** 2) / (2 * 1.5**2))
    weight = weight / weight.sum()
    return F.conv2d(
        F.conv2d(x, weight.view(1, 1, 11, 1), padding=(5, 0)),
        weight.view(1, 1, 1, 11),
        padding=(0, 5),
    )


def region_loss(logit: Tensor, g: Tensor) -> Tensor:
    """Eqs. 8 and 9: squared differences of the windows' means and standard deviations."""
    means, spreads = [], []
    for x in (torch.sigmoid(logit), g):
        means.append(blur(x))
        variance = blur(x * x) - means[-1] ** 2
        spreads.append((variance.clamp(min=0) + 1e-8).sqrt())  # the root of 0 has no gradient
    return ((means[0] - means[1]) ** 2 + (spreads[0] - spreads[1]) ** 2).mean()


def released_region_loss(logit: Tensor, g: Tensor) -> Tensor:
    """The authors' form of the same (D6)."""
    s = torch.sigmoid(logit)
    mean_s, mean_g = blur(s), blur(g)
    spread_s, spread_g = blur(s * s) - mean_s**2, blur(g * g) - mean_g**2
    distance = F.pairwise_distance(mean_s.flatten(1), mean_g.flatten(1)) + F.pairwise_distance(
        spread_s.flatten(1), spread_g.flatten(1)
    )  # [B]
    return distance.mean() / 2 + F.avg_pool2d((s - g).abs(), 11, stride=1, padding=5).mean()


def object_loss(logit: Tensor, g: Tensor) -> Tensor:
    """Eqs. 10 to 13: 1 - F-measure with probabilities for counts, per image, beta² = 0.3."""
    s = torch.sigmoid(logit)
    hit = (s * g).sum((2, 3))  # TP [B, 1]
    precision = hit / (s.sum((2, 3)) + 1e-7)
    recall = hit / (g.sum((2, 3)) + 1e-7)
    return (1 - 1.3 * precision * recall / (0.3 * precision + recall + 1e-7)).mean()


def supervise(
    logits: list[Tensor], g: Tensor, losses: list[str], region: str = "paper"
) -> tuple[Tensor, Tensor]:
    """Eqs. 14 and 15: (the loss, its terms for D_2 in the order of `losses`, without gradient)."""
    functions = {
        "pixel": pixel_loss,
        "object": object_loss,
        "region": released_region_loss if region == "released" else region_loss,
    }
    terms = torch.stack(
        [torch.stack([functions[name](logit.float(), g) for name in losses]) for logit in logits]
    )  # [K, terms]
    weights = 0.5 ** torch.arange(len(logits), device=g.device)  # 1, 1/2, 1/4, 1/8
    return weights @ terms.sum(1), terms[0].detach()


# ---- Training ------------------------------------------------------------------------------------
def make_net(args: argparse.Namespace, weights: str) -> CLASSNet:
    """The network, on the device; `weights` as for `backbone`."""
    encoder = backbone(
        args.backbone,
        weights,
        args.pixels,
        args.bn == "stored",
        borders=args.borders,
        before_pooling=args.vgg_taps == "conv",
    )  # D11
    net = CLASSNet(encoder, tuple(args.attention), args.fusion, args.outputs, args.released)
    net = net.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        net.compile()
    return net


def rate(epoch: int, epochs: int, highest: float) -> float:
    """Learning rate of an epoch (from 1): a straight line up, and down again from the middle."""
    return highest * (1 - abs(2 * epoch / (epochs + 1) - 1))


def train(args: argparse.Namespace) -> CLASSNet:
    """Train from the backbone's weights or, with --resume, from last.pt."""
    world, folder = args.world, args.out
    torch.manual_seed(args.seed)
    net = make_net(args, args.backbone_weights)
    others = [p for name, p in net.named_parameters() if not name.startswith("encoder.")]
    optimiser = torch.optim.SGD(
        [{"params": others, "scale": 1.0}, {"params": net.encoder.parameters(), "scale": 0.1}],
        lr=args.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
    )
    bank = Bank(
        open_set(args.data, args.data_root), args.size, args.device, folder, parts=("image", "mask")
    )
    if not bank.has["mask"].all():
        missing = bank.names[int((~bank.has["mask"]).nonzero()[0])]
        raise UserError(
            f"{args.data}: {missing} has no mask, and CLASS learns from masks; put it "
            "into a folder masks/ beside the images"
        )
    flags = harness.plain_flags(args, bank.names)
    done = harness.resume(folder, "class_net", 1, flags, net, optimiser)
    harness.save_args(flags, args, folder)
    log = runtime.Log(folder, args.epochs, done, quiet=not world.main)
    watch, parallel = harness.Watch(args), world.parallel(net)
    for epoch in range(done + 1, args.epochs + 1):
        lr = rate(epoch, args.epochs, args.lr)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["scale"]
        net.train()
        losses, images = train_epoch(parallel, optimiser, bank, epoch, args)
        runtime.require_finite(losses["loss"], epoch)
        world.average_statistics(net)  # D14
        seen = watch(partial(forward, net, args=args), folder / "vis" / f"epoch_{epoch:03d}.png")
        log.epoch(epoch, images, **losses, lr=lr, **seen)
        if world.main:
            harness.save(folder, "class_net", 1, epoch, flags, net, optimiser)
        world.barrier()
    return net


def train_epoch(
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    bank: Bank,
    epoch: int,
    args: argparse.Namespace,
) -> tuple[dict[str, float], int]:
    """One pass over the bank: (mean loss and its terms for D_2, number of images)."""
    world, steps = args.world, 0
    total = torch.zeros(1 + len(args.losses), device=args.device)
    order, batch = epoch_order(len(bank), args.batch_size, args.seed, epoch, world)
    draw = generator("cpu", args.seed, "view", epoch)
    mine = slice(world.rank * batch // world.size, (world.rank + 1) * batch // world.size)
    for index, flip in progress(
        batches(order, batch, args.seed, epoch, world), f"epoch {epoch}", len(order) // batch
    ):
        # every process draws for the whole batch, so that their number changes nothing
        scale = SCALES[torch.randint(len(SCALES), (), generator=draw)]
        box = draw_crops(batch, 0.125 * ("crop" in args.augment), draw)[mine]
        side = round(args.size * scale / 88) * 8 if "scale" in args.augment else args.size
        flip = flip & ("flip" in args.augment)
        both = torch.cat([bank.images(index, flip), bank.masks(index, flip)], 1)
        image, g = crop(both, box, side).split((3, 1), 1)
        with autocast(args.device, args.amp):
            logits = net(image.contiguous(memory_format=torch.channels_last))
        loss, terms = supervise(logits, g, args.losses, args.region)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total, steps = total + torch.cat([loss.detach()[None], terms]), steps + 1
        if args.dry_run and steps == 2:
            break
    means = sum(torch.stack(world.gather(total.cpu() / steps))) / world.size
    return dict(zip(("loss", *args.losses), means.tolist())), steps * batch


# ---- Evaluation and prediction -------------------------------------------------------------------
@torch.no_grad()
def forward(net: CLASSNet, image: Tensor, args: argparse.Namespace) -> Tensor:
    """Saliency logit, D_2's, [B, 1, H, W], in eval mode."""
    net.eval()
    with autocast(args.device, args.amp):
        return net(image.contiguous(memory_format=torch.channels_last))[0].float()


def evaluate(net: CLASSNet, args: argparse.Namespace) -> None:
    """Score every --eval set."""
    results = harness.evaluate(partial(forward, net, args=args), args, args.out)
    harness.save_results(results, args, args.out)


def load(path: Path, args: argparse.Namespace) -> CLASSNet:
    """The network of a checkpoint: ours, or the authors'."""
    saved = runtime.torch_load(path)
    if "method" not in saved and "supervision1.weight" in saved:
        args.released, args.backbone, state = True, "resnet50", from_released(saved)
        args.data, args.out = "DUTS-TR", args.out or Path("runs", "class_net-released")
    else:
        saved = harness.restore(
            path,
            "class_net",
            args,
            (
                "backbone",
                "pixels",
                "borders",
                "released",
                "attention",
                "fusion",
                "outputs",
                "vgg_taps",
                "bn",
                "data",
            ),
            ("size",),
        )
        state, args.out = saved["model"], args.out or path.parent
    fill_defaults(args)
    harness.prepare(args, "class_net")
    net = make_net(args, "none")
    runtime.load_state(net, state, path)
    return net


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under our names, less level 1's squeeze, which they never use."""
    names = {"res_": "encoder.", "supervision1.": "heads.2."}
    for number, level in enumerate("432"):
        names |= {
            f"extra_conv{4 * number + part + 1}.": f"{bridge}.{level}.{part % 2}."
            for part, bridge in enumerate(["bridge_high"] * 2 + ["bridge"] * 2)
        }
        names |= {f"decoder{level}_conv{part + 1}.": f"refine.{level}.{part}." for part in (0, 1)}
    for level in "2345":
        names |= {
            f"{theirs}{level}.": f"{ours}.{level}."
            for theirs, ours in (
                ("squeeze", "squeeze"),
                ("PAM", "position"),
                ("CAM", "channel"),
                ("fusion", "fusion"),
                ("supervision", "heads"),
            )
        }
    names |= {"extra_conv17.": "refine.5.0.", "extra_conv18.": "refine.5.1."}
    parts = {
        "conv_high.": "query.",
        "conv_low.": "key.",
        "value_conv.": "value.",
        "reducedim.": "reduce.",
        ".conv3.": ".gate.",
    }
    renamed = {}
    for key, value in state.items():
        ours = next(
            (to + key.removeprefix(start) for start, to in names.items() if key.startswith(start)),
            key,
        )
        for theirs, part in {} if key.startswith("res_") else parts.items():
            ours = ours.replace(theirs, part)
        scalar = {"position": "alpha", "channel": "beta"}.get(ours.split(".")[0], "gamma")
        renamed[ours.replace("gamma", scalar)] = value
    return {key: value for key, value in renamed.items() if not key.startswith("squeeze1.")}


# ---- Main ----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    """Train and evaluate; or evaluate or predict with a checkpoint."""
    args = build_parser().parse_args(argv)
    if args.weights or args.predict:
        args.weights = args.weights or harness.run_folder(args, "class_net") / "last.pt"
        net = load(args.weights, args)
        if args.predict:
            harness.predict(partial(forward, net, args=args), args)
        else:
            evaluate(net, args)
        return
    fill_defaults(args)
    harness.prepare(args, "class_net")
    net = train(args)
    evaluate(net, args)
    harness.gallery(["pred/{}"], args)


if __name__ == "__main__":
    runtime.cli(main)

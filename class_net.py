"""CLASS: cross-level attention and supervision for salient object detection, learned from masks.

Tang, Li: "CLASS: Cross-Level Attention and Supervision for Salient Objects Detection", ACCV 2020.

Deep features know what the object is, shallow features know where it ends. Cross-level attention
(CLA) combines the two. In position attention every cell of the deep map attends to all cells of a
shallow map, so that a region that only resembles the object can be told from it. In channel
attention every shallow channel is mixed with the deep channels that resemble it, so that an object
of several colours stays whole. A decoder fuses both results at three levels. The masks supervise
pixels (cross-entropy), regions (mean and standard deviation in a sliding window) and the whole
object (F-measure), at four depths.

    image -> encoder -> E_5 -> bridge -> F_h; its 1x1, two convolutions -> D_5       -> loss / 8
                        E_4 -> bridge -> F_4 -> CLA with F_h -> FFM with D_5 -> D_4  -> loss / 4
                        E_3 -> bridge -> F_3 -> CLA with F_h -> FFM with D_4 -> D_3  -> loss / 2
                        E_2 -> bridge -> F_2 -> CLA with F_h -> FFM with D_3 -> D_2  -> loss, map

Usage
    python class_net.py                                     # built-in shapes, no download, minutes
    python class_net.py --data DUTS-TR                      # the paper's experiment
    python class_net.py --data photos/ --eval others/       # folders with images/ and masks/
    python class_net.py --weights runs/class_net-DUTS-TR/last.pt --predict photo.jpg --cutout
    python class_net.py --explain photo.jpg                 # the method at work, step by step
    torchrun --nproc_per_node=4 class_net.py --data DUTS-TR # several GPUs or machines

Results. The paper (ImageNet ResNet-50, 10,553 DUTS-TR photos, 100 epochs, RTX 2080 Ti) reports
F_adp / S / MAE of .933 / .928 / .033 on ECSSD and .856 / .894 / .034 on DUTS-TE. Ours at that size:
not run. At small scale: docs/class_net.md.

Departures. The paper is the default; its training code was never released. Where it is silent, the
authors' network, losses and loader are followed: the mean of each channel is added to E_5, two
convolutions follow every fusion module (FFM), the windows of the region loss are Gaussian.
--released follows the authors also where they contradict the paper. docs/class_net.md explains
every departure; D1 to D14 mark their places here.

Shapes: B batch, H W input size, h w feature size, N = h w. Images are in [0, 1].
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import flags, harness, runtime
from common.backbones import backbone
from common.bank import Bank, crop, draw_crops
from common.explain import one_photo, outputs_of, panels, stretched
from common.flags import Schedule, Settings
from common.published import class_state
from common.run import Run, claim
from common.runtime import UserError, autocast, generator

METHOD = "class_net"
PAPER = {
    "stage1": Schedule(epochs=100, lr=0.05),
    "batch_size": 32,
    "size": 352,
    "backbone": "resnet50",
}
SHAPES = {
    "stage1": Schedule(epochs=7, lr=0.05),
    "batch_size": 8,
    "size": 160,
    "backbone": "tiny",
}
SMALL = {  # your own photos and masks, in a quarter of an hour for 500 on a CPU
    "stage1": Schedule(epochs=12, lr=0.03),
    "batch_size": 8,
    "size": 160,
    "backbone": "mobilenet_v2",
}
PRESETS = {"paper": PAPER, "shapes": SHAPES, "small": SMALL}
PAPER_SETS = ["ECSSD", "DUTS-TE", "DUT-OMRON", "PASCAL-S", "HKU-IS"]  # Table 1


# ---- Config --------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """All flags. A default of None is the value of the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python class_net.py --data photos/                  learn photos/images, photos/masks\n"
        "  python class_net.py --data photos/ --predict new/   map other photos with that network\n"
        "The docstring of this file explains the method, docs/class_net.md D1 to D14.",
    )
    flags.add_flags(parser, PRESETS)
    parser.set_defaults(pixels=None)  # ImageNet's, or with --released those of the photos (D8)
    method = parser.add_argument_group("method")
    add = method.add_argument
    add("--released", action="store_true", help="the authors' code (D1 to D8)")
    add(
        "--losses",
        nargs="+",
        choices=("pixel", "region", "object"),
        default=["pixel", "region", "object"],
        help="terms of Eq. 14 [all]",
    )
    add(
        "--region",
        choices=("paper", "released"),
        help="form of Eq. 9, see D6 [paper; with --released: released]",
    )
    add(
        "--outputs",
        type=int,
        choices=(1, 4),
        default=4,
        help="supervised outputs, K of Eq. 15; 1 is D_2 alone [4]",
    )
    add(
        "--attention",
        nargs="*",
        choices=("position", "channel"),
        default=["position", "channel"],
        help="parts of CLA; without a name no CLA [both]",
    )
    add(
        "--fusion",
        choices=("ffm", "sum"),
        default="ffm",
        help="how the decoder joins its inputs, see D12 [ffm]",
    )
    add(
        "--augment",
        nargs="*",
        choices=("flip", "scale", "crop"),
        help="random changes of the photos, see D7 [flip scale; with --released: flip scale crop]",
    )
    add(
        "--bn",
        choices=("batch", "stored"),
        default="batch",
        help="statistics of the encoder's BatchNorm in training; stored suits weights whose "
        "BatchNorm is folded [batch]",
    )
    add("--vgg-taps", choices=("pool", "conv"), default="pool", help="see D11 [pool]")
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with a value for each, that of the preset where none was given."""
    args = flags.completed(args, PRESETS)
    if args.size < 64:
        raise UserError(f"--size {args.size} leaves nothing of the deepest map; at least 64")
    if args.vgg_taps == "conv" and args.backbone != "vgg16":
        raise UserError(f"--vgg-taps conv is for vgg16; {args.backbone} has other taps")

    augment = args.augment
    if augment is None:  # only the released code crops (D7)
        augment = ["flip", "scale", "crop"] if args.released else ["flip", "scale"]
    usual_weights = "shapes" if args.backbone == "tiny" else "imagenet"
    usual_sets = []  # the sets to score on without --eval
    if flags.is_shapes(args.data):
        usual_sets = ["shapes-test"]
    elif args.data == "DUTS-TR":
        usual_sets = PAPER_SETS
    return flags.replaced(
        args,
        augment=augment,
        backbone_weights=args.backbone_weights or usual_weights,
        region=args.region or ("released" if args.released else "paper"),  # form of Eq. 9 (D6)
        pixels=args.pixels or ("f3net" if args.released else "imagenet"),  # mean and std (D8)
        eval=flags.evaluation_sets(args, usual_sets),
    )


# Flags that describe a trained network, and flags that are those of its training unless given.
FIXED = ["backbone", "pixels", "borders", "released", "attention", "fusion", "outputs", "vgg_taps"]
FIXED += ["bn"]
FREE = ["size"]


# ---- Model ---------------------------------------------------------------------------------------
WIDTH = 64  # channels of every feature behind the encoder
LEVELS = ("2", "3", "4", "5")  # from fine to coarse; level 1 is not used


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of `like`."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def conv(channels: int, size: int, bias: bool = False) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU: [B, channels, h, w] -> [B, 64, h, w]."""
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, size, padding=size // 2, bias=bias),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
    )


def convs(count: int) -> nn.Sequential:
    """`count` times 3x3 convolution, BatchNorm, ReLU: [B, 64, h, w] -> [B, 64, h, w]."""
    return nn.Sequential(*[conv(WIDTH, 3) for _ in range(count)])


def rows(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, 1, N, C]: a row per cell, for an attention with one head."""
    return x.flatten(2).transpose(-1, -2)[:, None]


class PositionAttention(nn.Module):
    """CLA-P: every deep cell attends to all shallow cells (Eqs. 1 to 3)."""

    def __init__(self, released: bool = False):
        super().__init__()
        self.released = released
        inner = 8 if released else WIDTH  # channels of queries and keys (D1)
        self.query = nn.Conv2d(WIDTH, inner, 1)
        self.key = nn.Conv2d(WIDTH, inner, 1)
        self.value = nn.Conv2d(WIDTH, WIDTH, 1)
        self.alpha = nn.Parameter(torch.zeros(1))

    def similarity(self, high: Tensor, low: Tensor) -> Tensor:
        """S of Eq. 1, [B, N_h, N_l], which `forward` never holds: how a deep cell attends."""
        query = rows(self.query(high)).float()
        key = rows(self.key(low)).float()
        return torch.softmax(query @ key.transpose(-1, -2), -1)[:, 0]

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        """F_h [B, 64, h_h, w_h], F_l [B, 64, h_l, w_l] -> F_h_out, of the shape of F_h."""
        query = rows(self.query(high))  # [B, 1, N_h, C]
        key = rows(self.key(low))  # [B, 1, N_l, C]
        value = rows(self.value(low))  # [B, 1, N_l, 64]

        # Eqs. 1 and 2: S = softmax(query key'), found = S value. The scale is 1, for the paper does
        # not divide by the root of the channels.
        found = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # [B, 1, N_h, 64]

        # The paper turns the rows back into channels. The released code leaves this step out and
        # reads the rows as if they were channels (D2).
        if not self.released:
            found = found.transpose(-1, -2)  # [B, 1, 64, N_h]
        found = found.reshape(high.shape)
        return (high + self.alpha * found).to(high.dtype)  # Eq. 3


class ChannelAttention(nn.Module):
    """CLA-C: every shallow channel attends to the deep channels (Eqs. 4 to 6)."""

    def __init__(self, released: bool = False):
        super().__init__()
        self.sign = -1 if released else 1  # released: prefer what agrees least (D3)
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """F_l [B, 64, h, w], F_h [B, 64, any, any] -> F_l_out, of the shape of F_l."""
        f_h = resize(high, low).flatten(2).float()  # [B, 64, N]
        f_l = low.flatten(2).float()  # [B, 64, N]

        # The sums of N products need fp32.
        with torch.autocast(low.device.type, enabled=False):
            found = self.agreement(f_l, f_h) @ f_h  # Eq. 5 [B, 64, N]
        return (low + self.beta * found.view(low.shape)).to(low.dtype)  # Eq. 6

    def agreement(self, f_l: Tensor, f_h: Tensor) -> Tensor:
        """z of Eq. 4, [B, 64, 64]: how much of each deep channel every shallow channel takes."""
        energy = self.sign * f_l @ f_h.transpose(-1, -2)
        return torch.softmax(energy, -1)


class FeatureFusion(nn.Module):
    """FFM: three features become one, weighted by a map (Sec. 3.3)."""

    def __init__(self, released: bool = False):
        super().__init__()
        self.reduce = conv(3 * WIDTH, 1, bias=True)
        self.conv1 = conv(WIDTH, 3)
        if released:  # the authors leave out its BatchNorm and ReLU (D5)
            self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        else:
            self.conv2 = conv(WIDTH, 3)
        self.gate = nn.Conv2d(WIDTH, 1, 1, bias=False)

    def forward(self, above: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Three [B, 64, h, w] -> [B, 64, h, w]."""
        mixed = self.reduce(torch.cat([above, low, high], 1))
        x = self.conv2(self.conv1(mixed))
        weight = torch.sigmoid(self.gate(x))  # [B, 1, h, w]
        return weight * x + mixed


class Sum(nn.Module):
    """The baseline without FFM, of which the paper says only that it lacks FFM (D12)."""

    def forward(self, above: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Three [B, 64, h, w] -> [B, 64, h, w]."""
        return above + low + high


class CLASSNet(nn.Module):
    """The network of Fig. 2. Its parts are named by level, "2" (fine) to "5" (coarse)."""

    def __init__(
        self,
        encoder: nn.Module,
        attention: tuple[str, ...] = ("position", "channel"),
        fusion: str = "ffm",
        outputs: int = 4,
        released: bool = False,
    ):
        super().__init__()
        self.encoder = encoder
        self.attention = attention
        self.released = released
        fused = ("2", "3", "4")  # levels with attention and fusion

        # Bridge: the encoder's maps with 64 channels each, F_2, F_3, F_4, and F_h from E_5. The
        # authors have two convolutions per level and an F_h for each (D4).
        depth = 2 if released else 1
        self.squeeze = nn.ModuleDict()
        for level, channels in zip(LEVELS, encoder.channels[1:]):
            self.squeeze[level] = conv(channels, 1, bias=True)
        self.bridge = nn.ModuleDict({level: convs(depth) for level in fused})
        self.bridge_high = nn.ModuleDict(
            {level: convs(depth) for level in (fused if released else ("5",))}
        )

        # Cross-level attention
        if "position" in attention:
            self.position = nn.ModuleDict({level: PositionAttention(released) for level in fused})
        if "channel" in attention:
            self.channel = nn.ModuleDict({level: ChannelAttention(released) for level in fused})

        # Decoder. With fewer outputs the coarse ones are left out.
        self.fusion = nn.ModuleDict()
        for level in fused:
            self.fusion[level] = FeatureFusion(released) if fusion == "ffm" else Sum()
        self.refine = nn.ModuleDict({level: convs(2) for level in LEVELS})
        self.heads = nn.ModuleDict()
        for level in LEVELS[:outputs]:
            self.heads[level] = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] -> logits [B, 1, H, W] of D_2 (the map), D_3, D_4, D_5.

        H and W may differ, unlike in the authors' code (D9).
        """
        # The encoder's maps. As in the authors' code, E_5 gets the mean of each channel added.
        _, e2, e3, e4, e5 = self.encoder(image)
        e5 = e5 + e5.mean((2, 3), keepdim=True)

        # Bridge: 64 channels per level, and F_h (released: one for each level, D4).
        f = {}
        for level, e in zip(LEVELS, (e2, e3, e4, e5)):
            f[level] = self.squeeze[level](e)  # [B, 64, h_l, w_l]
        high = {level: bridge(f["5"]) for level, bridge in self.bridge_high.items()}

        # From coarse to fine: attention between F_l and F_h, then fusion with the level above.
        d = {"5": self.refine["5"](f["5"])}
        for level, above in (("4", "5"), ("3", "4"), ("2", "3")):
            f_l = self.bridge[level](f[level])
            f_h = high[level] if self.released else high["5"]
            low = f_l
            if "channel" in self.attention:
                low = self.channel[level](f_l, f_h)
            deep = f_h
            if "position" in self.attention:
                deep = self.position[level](f_h, f_l)
            fused = self.fusion[level](resize(d[above], f_l), low, resize(deep, f_l))
            d[level] = self.refine[level](fused)  # [B, 64, h_l, w_l]

        # Heads: "2" first, so that the first logit is the saliency map.
        return [resize(head(d[level]), image) for level, head in self.heads.items()]


# ---- Losses --------------------------------------------------------------------------------------
# Each takes a logit and a mask in [0, 1], both [B, 1, H, W], and returns a scalar in fp32.
def pixel_loss(logit: Tensor, g: Tensor) -> Tensor:
    """Eq. 7: binary cross-entropy, mean over pixels."""
    return F.binary_cross_entropy_with_logits(logit, g)


def blur(x: Tensor) -> Tensor:
    """Mean in a Gaussian window of 11 x 11, sigma 1.5, zeros beyond the border: [B, 1, H, W]."""
    window = torch.exp(-((torch.arange(11, device=x.device) - 5.0) ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    x = F.conv2d(x, window.view(1, 1, 11, 1), padding=(5, 0))
    return F.conv2d(x, window.view(1, 1, 1, 11), padding=(0, 5))


def window_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance in the window around every pixel: two [B, 1, H, W]."""
    mean = blur(x)
    variance = blur(x * x) - mean**2
    return mean, variance


def deviation(variance: Tensor) -> Tensor:
    """Standard deviation. At 0 the root would have no gradient, so it stays a little above."""
    return (variance.clamp(min=0) + 1e-8).sqrt()


def region_loss(logit: Tensor, g: Tensor) -> Tensor:
    """Eqs. 8 and 9: squared differences of the windows' means and standard deviations."""
    mean_s, variance_s = window_statistics(torch.sigmoid(logit))
    mean_g, variance_g = window_statistics(g)
    difference = deviation(variance_s) - deviation(variance_g)
    return ((mean_s - mean_g) ** 2 + difference**2).mean()


def released_region_loss(logit: Tensor, g: Tensor) -> Tensor:
    """The authors' form of the region loss (D6)."""
    s = torch.sigmoid(logit)
    mean_s, variance_s = window_statistics(s)
    mean_g, variance_g = window_statistics(g)

    # The norm runs over all windows of an image, so it grows with the image.
    of_means = F.pairwise_distance(mean_s.flatten(1), mean_g.flatten(1))  # [B]
    of_variances = F.pairwise_distance(variance_s.flatten(1), variance_g.flatten(1))  # [B]
    error = F.avg_pool2d((s - g).abs(), 11, stride=1, padding=5)
    return (of_means + of_variances).mean() / 2 + error.mean()


def object_loss(logit: Tensor, g: Tensor) -> Tensor:
    """Eqs. 10 to 13: 1 - F-measure with probabilities for counts, per image, beta² = 0.3."""
    s = torch.sigmoid(logit)
    hit = (s * g).sum((2, 3))  # TP [B, 1]
    precision = hit / (s.sum((2, 3)) + 1e-7)  # Eq. 10
    recall = hit / (g.sum((2, 3)) + 1e-7)  # Eq. 11
    f_measure = 1.3 * precision * recall / (0.3 * precision + recall + 1e-7)  # Eq. 12
    return (1 - f_measure).mean()  # Eq. 13


LOSSES = {"pixel": pixel_loss, "region": region_loss, "object": object_loss}


def supervise(
    logits: list[Tensor], g: Tensor, losses: list[str], region: str = "paper"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eqs. 14 and 15: the loss, and its terms for D_2 by name.

    logits: of D_2, or of D_2 to D_5. losses: names from `LOSSES`. region: paper or released (D6).
    """
    functions = dict(LOSSES)
    if region == "released":
        functions["region"] = released_region_loss

    outputs = []  # the terms of each output
    totals = []
    for logit in logits:
        terms = {name: functions[name](logit.float(), g) for name in losses}
        outputs.append(terms)
        totals.append(sum(terms.values()))  # Eq. 14

    # D_2 has weight 1, each deeper output half of the one before: 1, 1/2, 1/4, 1/8.
    weights = 0.5 ** torch.arange(len(logits), device=g.device)
    loss = weights @ torch.stack(totals)  # Eq. 15
    return loss, outputs[0]


# ---- Training ------------------------------------------------------------------------------------
SCALES = (7, 8, 9, 10, 11)  # elevenths of --size: 224, 256, 288, 320, 352


def make_net(args: argparse.Namespace, weights: str) -> CLASSNet:
    """The network that the flags describe, on the CPU; `weights` as for `backbone`."""
    encoder = backbone(
        args.backbone,
        weights,
        args.pixels,
        stored_stats=args.bn == "stored",
        borders=args.borders,
        before_pooling=args.vgg_taps == "conv",  # the authors' VGG-16 is unknown (D11)
    )
    return CLASSNet(encoder, tuple(args.attention), args.fusion, args.outputs, args.released)


def rate(epoch: int, schedule: Schedule) -> float:
    """Learning rate of an epoch (from 1): linear from near 0 to schedule.lr and back to near 0.

    That it changes once per epoch is F3Net's habit; paper and code do not say (D10).
    """
    place = 2 * epoch / (schedule.epochs + 1) - 1  # from -1 to 1
    return schedule.lr * (1 - abs(place))


def make_optimiser(net: CLASSNet) -> torch.optim.Optimizer:
    """SGD in two groups of parameters, the encoder's last; `set_rate` gives them their rates."""
    others = [p for name, p in net.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": others}, {"params": net.encoder.parameters()}]
    fused = others[0].is_cuda  # one kernel for all parameters
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give the encoder a tenth of the learning rate, all others the whole."""
    others, encoder = optimiser.param_groups
    others["lr"] = lr
    encoder["lr"] = 0.1 * lr


def scaled(size: int, elevenths: int) -> int:
    """The side of a picture of `size` rescaled to that many elevenths, a multiple of 8."""
    return round(size * elevenths / 88) * 8


def augment(
    image: Tensor, g: Tensor, kinds: list[str], batch: int, mine: slice, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rescale and crop images [b, 3, S, S] and masks [b, 1, S, S]: [b, 3, s, s] and [b, 1, s, s].

    kinds: which of scale and crop are done; all numbers are drawn in any case. Every process draws
    for the whole `batch` and keeps its own part, `mine`, so that the number of processes changes
    nothing.
    """
    # What is drawn: one size for the whole batch, one box for each picture.
    elevenths = SCALES[torch.randint(len(SCALES), (), generator=random)]
    share = 0.125 if "crop" in kinds else 0.0  # at most this share of a side is cut off
    box = draw_crops(batch, share, random)[mine]  # [b, 4]

    # Photo and mask go through the same crop, as four channels of one picture.
    side = image.shape[-1]
    if "scale" in kinds:
        side = scaled(side, elevenths)
    both = crop(torch.cat([image, g], 1), box, side)  # [b, 4, s, s]
    return both[:, :3], both[:, 3:]


def train(
    net: CLASSNet,
    settings: Settings,
    schedule: Schedule,
    losses: list[str],
    region: str,
    augmentations: list[str],
) -> None:
    """Train from the backbone's weights or, with --resume, from last.pt.

    losses, region: see `supervise`. augmentations: any of flip, scale, crop.
    """
    # What cannot be trained on is refused before anything is trained.
    photos = settings.training_set()
    least = scaled(settings.size, SCALES[0]) if "scale" in augmentations else settings.size
    require_batch(net, settings, len(photos), least)
    bank = Bank(photos, settings.size, settings.device, settings.out, parts=("image", "mask"))
    require_masks(bank, settings.data)

    # The run resumes, logs and writes last.pt; a picture shows the progress after each epoch. Of
    # several processes each has BatchNorm's statistics of its own photos (D14).
    optimiser = make_optimiser(net)
    run = Run(settings, 1, bank, net, optimiser, schedule)
    logit = partial(saliency_logit, net, amp=settings.amp)
    watch = harness.Watch(settings, photos)

    for epoch in run.epochs():
        lr = rate(epoch, schedule)
        set_rate(optimiser, lr)
        random = generator("cpu", settings.seed, "view", epoch)
        for index, flip in run.batches():
            # Photos and masks, flipped, rescaled and cropped together.
            if "flip" not in augmentations:
                flip = torch.zeros_like(flip)
            image = bank.images(index, flip)  # [B, 3, S, S]
            g = bank.masks(index, flip)  # [B, 1, S, S]
            image, g = augment(image, g, augmentations, run.batch, run.mine, random)

            # Forward, in half precision where the device has it; the loss of all four outputs.
            with autocast(settings.device, settings.amp):
                logits = run.net(image)  # of D_2, D_3, D_4, D_5 [B, 1, s, s]
            loss, terms = supervise(logits, g, losses, region)  # Eqs. 14 and 15

            # Backward and step. The scaler does nothing unless the half precision is fp16.
            optimiser.zero_grad()
            run.scaler.scale(loss).backward()
            run.scaler.step(optimiser)
            run.scaler.update()
            run.add(loss=loss, **terms)

        run.end_epoch(lr=lr, **watch(logit, run.picture))


@torch.no_grad()
def require_batch(net: CLASSNet, settings: Settings, photos: int, side: int) -> None:
    """Raise `UserError` if BatchNorm would have only one value per channel to normalise.

    photos: their number. side: of the smallest pictures that training sees.
    """
    net.eval()
    deepest = net.encoder(torch.zeros(1, 3, side, side, device=settings.device))[-1]
    batch = min(settings.batch_size, photos) // settings.world.size
    if batch * deepest.shape[2] * deepest.shape[3] == 1:
        raise UserError(
            f"BatchNorm cannot normalise one photo of {side} x {side} pixels, of which the deepest "
            "map keeps a single cell: give a larger --size, or at least two photos to a process "
            "and batch (--batch-size)"
        )


def require_masks(bank: Bank, data: str) -> None:
    """Raise `UserError` that names the first photo without a mask, if there is one."""
    for name, has_mask in zip(bank.names, bank.has["mask"]):
        if not has_mask:
            raise UserError(
                f"{data}: {name} has no mask, and CLASS learns from masks; put it into a folder "
                "masks/ beside the images"
            )


# ---- Evaluation and prediction -------------------------------------------------------------------
@torch.no_grad()
def saliency_logit(net: CLASSNet, image: Tensor, amp: str) -> Tensor:
    """The saliency logit, that of D_2, in eval mode. -> [B, 1, H, W]

    It is resized to the photo as a logit, before the sigmoid (D13).
    """
    net.eval()
    with autocast(image.device, amp):
        d2 = net(image)[0]
    return d2.float()


@torch.no_grad()
def explain(net: CLASSNet, photo: Tensor, image: Tensor) -> list[tuple[str, Tensor]]:
    """The method at work on one photo, as titled pictures.

    For every level: where the deep cell under the most salient place attends (CLA-P), and which
    channels agree (CLA-C). Then the outputs from coarse to fine.
    """
    net.eval()
    names = ["bridge_high.5", "bridge.4", "bridge.3", "bridge.2"]
    if net.released:
        names[0] = "bridge_high.4"
    seen = outputs_of(net, names, image)
    high = seen[names[0]]  # F_h [1, 64, S/32, S/32]
    maps = [torch.sigmoid(logit) for logit in net(image)]  # D_2, ...

    # The deep cell that is looked at: the one where the map is highest.
    coarse = F.adaptive_avg_pool2d(maps[0], high.shape[2:]).flatten()  # [N_h]
    cell = coarse.argmax()
    chosen = F.one_hot(cell, len(coarse)).view(1, *high.shape[2:])
    pictures = [("photo", photo), ("a deep cell", chosen.float())]

    for name in names[1:]:
        level = name[-1]
        low = seen[name]  # F_l [1, 64, h, w]
        if "position" in net.attention:
            s = net.position[level].similarity(high, low)[:, cell]  # [1, N_l]
            s = s.view(1, 1, *low.shape[2:])
            pictures.append((f"where it attends, level {level}, Eq. 1", stretched(s)))
        if "channel" in net.attention:
            deep = resize(high, low).flatten(2)
            z = net.channel[level].agreement(low.flatten(2), deep)  # [1, 64, 64]
            pictures.append((f"channels, level {level}, Eq. 4", z))
    for depth, found in reversed(list(enumerate(maps, start=2))):
        pictures.append((f"D_{depth}", found[0]))
    return pictures


def evaluate(net: CLASSNet, settings: Settings) -> None:
    """Score every --eval set; see `harness.save_results`."""
    logit = partial(saliency_logit, net, amp=settings.amp)
    results = harness.evaluate(logit, settings, settings.out)
    harness.save_results(results, settings, settings.out)


def open_checkpoint(path: Path, args: argparse.Namespace) -> tuple[argparse.Namespace, CLASSNet]:
    """The flags that fit a checkpoint, ours or the authors', and its network."""
    saved = runtime.torch_load(path)
    if "method" not in saved and "supervision1.weight" in saved:
        state = class_state(saved)
        out = args.out or Path("runs", "class_net-released")
        args = flags.replaced(args, released=True, backbone="resnet50", data="DUTS-TR", out=out)
    else:
        runtime.check_checkpoint(saved, path, METHOD)
        state = saved["model"]
        args = flags.saved_flags(build_parser(), args, saved, path, [*FIXED, "data"], FREE)
        args = flags.replaced(args, out=flags.out_of(args, path, METHOD))
    args = complete(args)
    net = make_net(args, "none")
    runtime.load_state(net, state, path)
    return args, net


def load(weights: str | Path = "photos", device: str = "auto") -> harness.Predictor:
    """A trained network as a function of Pillow photos; weights: "photos" or a checkpoint.

    sod = load("photos"); saliency = sod(Image.open("photo.jpg"))
    """
    args = build_parser().parse_args(["--weights", str(weights), "--device", device])
    path = flags.checkpoint_of(args, METHOD, "last.pt")
    args, net = open_checkpoint(path, flags.replaced(args, eval=[]))
    settings = flags.settle(args, METHOD, quiet=True)
    net = settings.place(net)
    return harness.Predictor(partial(saliency_logit, net, amp=settings.amp), net, settings)


# ---- Main ----------------------------------------------------------------------------------------
def use(args: argparse.Namespace) -> None:
    """Evaluate or predict with a checkpoint: that of --weights, or of the run folder."""
    path = flags.checkpoint_of(args, METHOD, "last.pt")
    args, net = open_checkpoint(path, flags.replaced(args, weights=path))
    settings = flags.settle(args, METHOD)
    net = settings.place(net, channels_last=True)
    evaluate(net, settings)
    if args.predict:
        logit = partial(saliency_logit, net, amp=settings.amp)
        harness.predict(logit, settings, args.overlay, args.skip_existing)
    if args.explain:
        photo, image, path = one_photo(args.explain, settings)
        panels(path, explain(net, photo, image), columns=4)


def main(argv: list[str] | None = None) -> None:
    """Train and evaluate; or evaluate or predict with a checkpoint."""
    args = build_parser().parse_args(argv)
    if args.weights or args.predict or args.explain:
        use(args)
        return

    # Training may start from a network of an earlier run.
    init = None
    if args.init:
        like, init = open_checkpoint(
            flags.named_checkpoint(args.init, METHOD), flags.replaced(args, eval=[])
        )
        args = flags.taken_from(like, args, [*FIXED, *FREE])

    args = complete(args)
    flags.show_preset(args, PRESETS)
    settings = flags.settle(args, METHOD)
    claim(settings, {".": args.stage1})
    torch.manual_seed(args.seed)
    net = settings.place(init or make_net(args, args.backbone_weights))
    train(net, settings, args.stage1, args.losses, args.region, args.augment)
    evaluate(net, settings)
    harness.gallery(["pred/{}"], settings)


if __name__ == "__main__":
    runtime.cli(main)

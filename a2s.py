"""A2S: Activation to Saliency, unsupervised salient object detection without a single human mask.

Zhou, Chen, Yang, Lai, Xie: "Activation to Saliency: Forming High-Quality Labels for Unsupervised
Salient Object Detection", IEEE TCSVT 33(2), 2023 (arXiv 2112.03650).

A network pretrained without labels (MoCo v2) already fires on the main object of a photo. Stage 1
freezes that encoder and trains four small blocks that sum its activations into one map, pushing
every pixel away from the mean of its own image (adaptive decision boundary). The smaller side is
taken for the object; a dense CRF and a median filter turn the map into a pseudo label. Stage 2
trains a light detector on the labels and corrects them with its own predictions (online label
rectifying).

    image -> encoder -> E3 E4 E5 -> SE blocks -> F3 F4 F5 -> SE block -> F -> theta -> CRF, median
             frozen                 trained to push theta of F, F3, F4, F5 away from 0          |
    image -> encoder -> E1 ... E5 -> laterals -> two residual attention modules -> Y <- loss -> G
             fine-tuned                                                          G := 0.4 G + 0.6 Y

Usage
    python a2s.py                                       # built-in shapes, no download, minutes
    python a2s.py --data MSRA-B                         # the paper's experiment, both stages
    python a2s.py --stage 1 --data photos/              # pseudo labels for a folder of your photos
    python a2s.py --stage 2 --data photos/              # ... and a detector trained on them
    python a2s.py --weights runs/a2s-MSRA-B/stage2/last.pt --predict photo.jpg --cutout
    torchrun --nproc_per_node=4 a2s.py --data MSRA-B    # several GPUs or machines

Results. Paper (MoCo v2 ResNet-50, 3,000 MSRA-B photos, about 1 h on a GTX 1080 Ti), ave-F (by its
text F_mean, by its authors' code F_adp) / MAE on ECSSD: stage 1 .840 / .072, stage 2 .880 / .060.
Ours at that size: not run. At small scale: README.

Departures. The paper is the default. Where it is silent the released code is followed: loss weights
1 .1 .3 .5, nesterov, weight decay 5e-4, a tenth of the rate for stage 2's encoder, MoCo v2 of 800
epochs, labels binarised at 0.5, and the head between H5 and the local RAM, which Table VII's
parameter count proves. --released follows the authors' code also where it contradicts the paper:
 D1 stage 1's learning rate falls at epochs 10 and 16; released: 12 and 16.
 D2 the CRF starts from labels cut at theta = 0, of certainty 0.7; released: cut in the middle of
    the map's range. Eq. 6 to the letter (--unary soft) starts from sigmoid(theta), which lies so
    close to 0 and 1 that the CRF can hardly move it (README).
 D3 training labels are made at --size pixels, in batches; released: at each photo's own size.
 D4 E5 enters its SE block as it is; released (ResNets): times the classifier's weights summed over
    the classes, a random vector with MoCo's weights.
 D5 a tie in Eq. 5 counts as +1; released: as 0, a blank map.
 D6 stage 2 draws flips anew in every epoch; released: once and for all.
 D7 the encoder's BatchNorm keeps the statistics of its weights, in stage 1 because the paper
    freezes it, in stage 2 alike (both together measured better, stage 2 alone was not measured:
    README); released: statistics of the batch.
Ours in both cases:
 D8 Eq. 4's L2 distance is squared, as released: the L2 norm of a scalar would be its L1 norm.
 D9 the label bank holds 8 bits per pixel.
 D10 DB1's mean over the training set is a running mean (rate 0.01).
 D11 HMA differs from OLR in the CRF alone; lambda and its start are OLR's.
 D12 of several processes each normalises with its own share of the batch under --bn batch; the
    statistics are averaged after each epoch.
Not implemented: MINet, the rival detector of Table VII.

Shapes: B batch, H W input size, h w feature size. Images are in [0, 1].
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import harness, runtime
from common.backbones import backbone
from common.bank import Bank, MapBank, batches, epoch_order
from common.crf import dense_crf, hard_unary, median_filter
from common.datasets import load_mask, open_set
from common.runtime import UserError, autocast, generator, progress, save_png

PAPER = {
    "epochs": (20, 25),
    "lr": (1.0, 0.005),
    "batch_size": 8,
    "size": 320,
    "backbone": "resnet50",
    "sxy": 50.0,
    "srgb": 5.0,
}
SHAPES = {
    "epochs": (3, 3),
    "lr": (1.0, 0.01),
    "batch_size": 8,
    "size": 160,
    "backbone": "tiny",
    "sxy": 100.0,
    "srgb": 20.0,
}
DECAY = ((10, 16), (15, 20))  # epochs from which on a stage's rate is divided by 10 (Sec. IV-A)
PAPER_SETS = ["ECSSD", "MSRA-B-test", "DUT-OMRON", "PASCAL-S", "DUTS-TE", "HKU-IS"]  # Table II


# ---- Config --------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """All flags. A default of None is the paper's value, or the small preset's on shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="The docstring of this file explains the method.",
    )
    method = parser.add_argument_group("method")
    method.add_argument("--stage", choices=("1", "2"), help="one stage only [1, then 2]")
    method.add_argument("--released", action="store_true", help="the authors' code (D1 to D7)")
    method.add_argument(
        "--bn",
        choices=("stored", "batch"),
        help="statistics of the encoder's BatchNorm in training, see D7 [stored]",
    )
    method.add_argument("--alpha", type=float, default=0.1, help="weight of L1 in Eq. 4 [0.1]")
    method.add_argument(
        "--aux",
        type=float,
        nargs=3,
        default=[0.1, 0.3, 0.5],
        metavar="W",
        help="loss weights of F3 F4 F5; 0 0 0 is variant A1 [0.1 0.3 0.5]",
    )
    method.add_argument(
        "--drop",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="pixels dropped from stage 1's loss; 0 is variant A2 [0.5]",
    )
    method.add_argument("--train-encoder", action="store_true", help="in stage 1 too: variant A0")
    method.add_argument(
        "--boundary",
        choices=("DB1", "DB2", "DB3", "DB4", "DB5"),
        default="DB5",
        help="decision boundary, Sec. IV-E [DB5]",
    )
    method.add_argument(
        "--threshold", choices=THRESHOLDS, default="mean", help="of M, in DB5 [mean]"
    )
    method.add_argument(
        "--unary",
        choices=("hard", "soft"),
        help="the CRF starts from labels or from probabilities, see D2 [hard]; not with --released",
    )
    method.add_argument("--sxy", type=float, help="CRF's reach in a photo of 320 pixels [50]")
    method.add_argument("--srgb", type=float, help="CRF's tolerance of grey levels [5]")
    method.add_argument(
        "--detector",
        choices=("ram", "conv"),
        default="ram",
        help="conv: a convolution instead of RAM, Table VII's dagger [ram]",
    )
    method.add_argument(
        "--rectify",
        choices=("olr", "hma", "off"),
        default="olr",
        help="how stage 2 corrects its labels, Table VIII [olr]",
    )
    method.add_argument("--lam", type=float, default=0.4, help="lambda of Eq. 14 [0.4]")
    harness.add_flags(parser)
    return parser


def fill_defaults(args: argparse.Namespace) -> None:
    """Replace None by the paper's value, or by the small preset's on shapes, which is printed."""
    if not 0 <= args.drop < 1:
        raise UserError(f"--drop {args.drop} is not a share of pixels from 0 to less than 1")
    small = harness.use_preset(args, PAPER, SHAPES)
    # one number on the command line serves both stages
    args.epochs, args.lr = (v if isinstance(v, tuple) else (v, v) for v in (args.epochs, args.lr))
    args.unary = args.unary or "hard"  # D2
    args.bn = args.bn or ("batch" if args.released else "stored")  # D7
    if args.eval is None and args.data == "MSRA-B":
        args.eval = harness.present(PAPER_SETS, args.data_root)
    elif args.eval is None:
        args.eval = ["shapes-test"] if small else []
    harness.show_preset(args, SHAPES)


# ---- Model: stage 1 ------------------------------------------------------------------------------
class SEBlock(nn.Module):
    """The paper's SE block as its authors coded it: convolution, GroupNorm, ReLU, channel gate."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, e: Tensor) -> Tensor:
        f = F.relu(self.norm(self.conv(e)))  # [B, 64, h, w]
        return f * torch.sigmoid(self.gate(f.mean((2, 3), keepdim=True)))


class DecisionBoundary(nn.Module):
    """Decision value theta of every pixel (Eq. 3, and its rivals of Sec. IV-E).

    With f a pixel's feature, f_ its mean over the image, f^ its mean over the training set:
    DB1 1'(f - f^)   DB2 f_'f   DB3 f_'(f - f_)   DB4 w'(f - f_), w learned   DB5 1'(f - f_)
    DB5 is the paper's: the activation map M = 1'f less its mean. `threshold` puts M's median or
    Otsu's threshold in the place of the mean (Table I).
    """

    def __init__(self, kind: str = "DB5", threshold: str = "mean", channels: int = 64):
        super().__init__()
        self.kind, self.threshold = kind, THRESHOLDS[threshold]
        if kind == "DB1":
            self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))
        if kind == "DB4":
            self.w = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, f: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 1, h, w]"""
        f = f.float()
        mean = f.mean((2, 3), keepdim=True)  # f_ [B, C, 1, 1]
        if self.kind == "DB1":
            if self.training:
                self.running_mean.lerp_(mean.detach().mean(0, keepdim=True), 0.01)
            return (f - self.running_mean).sum(1, keepdim=True)
        if self.kind == "DB2":
            return (mean * f).sum(1, keepdim=True)
        if self.kind == "DB3":
            return (mean * (f - mean)).sum(1, keepdim=True)
        if self.kind == "DB4":
            return self.w(f - mean)
        m = f.sum(1, keepdim=True)  # M [B, 1, h, w]
        return m - self.threshold(m)  # Eq. 3


class ActivationNet(nn.Module):
    """Stage 1: a frozen encoder and four SE blocks that aggregate one activation map."""

    def __init__(
        self,
        encoder: nn.Module,
        boundary: str = "DB5",
        threshold: str = "mean",
        train_encoder: bool = False,
        released: bool = False,
    ):
        super().__init__()
        self.encoder, self.train_encoder, self.released = encoder, train_encoder, released
        self.encoder.requires_grad_(train_encoder)
        self.se3, self.se4, self.se5 = map(SEBlock, encoder.channels[2:])
        self.se0 = SEBlock(3 * 64)
        self.boundaries = nn.ModuleList(DecisionBoundary(boundary, threshold) for _ in range(4))

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Eq. 1: [B, 3, H, W] -> F [B, 64, H/2, W/2] and F3, F4, F5 [B, 64, H/8 ... H/32, ...]."""
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            e1, _, e3, e4, e5 = self.encoder(image)
        if self.released and hasattr(self.encoder, "fc"):
            e5 = e5 * self.encoder.fc.weight.sum(0).view(1, -1, 1, 1)  # D4
        f3, f4, f5 = self.se3(e3), self.se4(e4), self.se5(e5)
        return self.se0(torch.cat([resize(f, e1) for f in (f3, f4, f5)], 1)), f3, f4, f5

    def forward(self, image: Tensor) -> list[Tensor]:
        """theta of F with its sign [B, 1, H, W], and theta of F3, F4, F5 at their own sizes."""
        theta, *aux = (b(f) for b, f in zip(self.boundaries, self.features(image)))
        return [resize(foreground_sign(theta, self.released) * theta, image), *aux]


def foreground_sign(theta: Tensor, released: bool = False) -> Tensor:
    """Eq. 5: +1 where at most half of the pixels are positive, else -1. -> [B, 1, 1, 1]"""
    if released:
        return torch.sign(0.5 - (theta > 0).float().mean((2, 3), keepdim=True))  # D5
    return torch.where((theta >= 0).float().mean((2, 3), keepdim=True) <= 0.5, 1.0, -1.0)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of `like`."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def otsu(m: Tensor) -> Tensor:
    """Otsu's threshold: the least value on the upper side of the split of greatest V (Eq. 2)."""
    x = m.detach().flatten(1).sort(1).values  # [B, N]
    if x.shape[1] == 1:
        return m.detach()
    n, k = x.shape[1], torch.arange(1, x.shape[1], device=x.device)  # k pixels lie below
    below = x.cumsum(1)[:, :-1]
    v = k * (n - k) * (below / k - (x.sum(1, keepdim=True) - below) / (n - k)) ** 2
    return x.gather(1, v.argmax(1, keepdim=True) + 1)[..., None, None]


THRESHOLDS = {
    "mean": lambda m: m.mean((2, 3), keepdim=True),  # [B, 1, h, w] -> [B, 1, 1, 1]
    "median": lambda m: m.flatten(1).median(1).values[:, None, None, None],
    "otsu": otsu,
}


def between_variance(m: Tensor, threshold: Tensor) -> Tensor:
    """Eq. 2, V = p1 p2 (mu1 - mu2)^2, as cov(M, side)^2 / (p1 p2). [B, 1, h, w] -> [B, 1]"""
    side = (m >= threshold).float()
    p = side.mean((2, 3))
    return ((m * side).mean((2, 3)) - p * m.mean((2, 3))) ** 2 / (p * (1 - p)).clamp(min=1e-12)


# ---- Model: stage 2 ------------------------------------------------------------------------------
def conv(before: int, after: int) -> nn.Sequential:
    """Convolution, GroupNorm with two channels per group, ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(after // 2, after), nn.ReLU()
    )


class RAM(nn.Module):
    """Residual attention module (Fig. 6). Without attention it is the dagger row of Table VII."""

    def __init__(self, attention: bool = True):
        super().__init__()
        self.basis = conv(64, 64)
        levels = 2 if attention else 0
        self.attention = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(levels))
        self.fuse = nn.Conv2d(3 * 64, 64, 3, padding=1)

    def forward(self, h1: Tensor, h2: Tensor, h5: Tensor) -> Tensor:
        """Two levels to strengthen, and the basis; all leave with the size of h1. [B, 64, h, w]"""
        h5 = resize(self.basis(h5), h1)
        levels = [h1, resize(h2, h1)]
        if self.attention:  # Eq. 9
            levels = [h * torch.sigmoid(a(h - h5)) for h, a in zip(levels, self.attention)]
        return self.fuse(torch.cat([*levels, h5], 1))  # Eq. 10


class Detector(nn.Module):
    """Stage 2: an encoder, five laterals of 64 channels (Eq. 8), a local and a regional RAM."""

    def __init__(self, encoder: nn.Module, attention: bool = True):
        super().__init__()
        self.encoder = encoder
        self.laterals = nn.ModuleList(conv(channels, 64) for channels in encoder.channels)
        twice = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.head = nn.Sequential(*conv(64, 128), twice, *conv(128, 64), twice)
        self.local, self.region = RAM(attention), RAM(attention)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> saliency logit Y [B, 1, H, W]."""
        h1, h2, h3, h4, h5 = (lateral(e) for lateral, e in zip(self.laterals, self.encoder(image)))
        r_r = self.region(h3, h4, h5)  # [B, 64, H/8, W/8]
        r_l = self.local(h1, h2, self.head(h5))  # [B, 64, H/2, W/2]
        y = (r_l.float() * resize(r_r, r_l).float()).sum(1, keepdim=True)  # Eq. 11
        return resize(y, image)


# ---- Losses --------------------------------------------------------------------------------------
def adb_loss(theta: Tensor, alpha: float, keep: Tensor | None = None) -> Tensor:
    """Eq. 4: L = -mean(D^2 + alpha D) (D8), D = |sigmoid(theta) - 0.5|; keep: weights of mean 1."""
    d = (torch.sigmoid(theta.float()) - 0.5).abs()
    v = d.square() + alpha * d
    return -(v if keep is None else v * keep).mean()


def ssim_loss(p: Tensor, g: Tensor) -> Tensor:
    """1 - mean SSIM: Gaussian window 11x11 of sigma 1.5, zero padding, C1 = 0.01^2, C2 = 0.03^2."""
    window = torch.exp(-(torch.arange(11.0, device=p.device) - 5).square() / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 1, 11)
    moments = torch.cat([p, g, p * p, g * g, p * g])  # [5B, 1, H, W]
    blurred = F.conv2d(F.conv2d(moments, window, padding=(0, 5)), window.mT, padding=(5, 0))
    mu_p, mu_g, pp, gg, pg = blurred.chunk(5)
    structure = (2 * (pg - mu_p * mu_g) + 9e-4) / (pp - mu_p**2 + gg - mu_g**2 + 9e-4)
    return 1 - ((2 * mu_p * mu_g + 1e-4) / (mu_p**2 + mu_g**2 + 1e-4) * structure).mean()


def iou_loss(p: Tensor, g: Tensor) -> Tensor:
    """1 - sum(p g) / sum(p + g - p g), mean over the images."""
    both = (p * g).sum((1, 2, 3))
    return (1 - both / ((p + g - p * g).sum((1, 2, 3)) + 1e-7)).mean()


def detector_loss(y: Tensor, g: Tensor) -> Tensor:
    """Eq. 12: BCE + SSIM + IoU of the logit y and the label g, binarised at 0.5. [B, 1, H, W]"""
    y, g = y.float(), (g > 0.5).float()
    p = torch.sigmoid(y)
    return F.binary_cross_entropy_with_logits(y, g) + ssim_loss(p, g) + iou_loss(p, g)


# ---- Training ------------------------------------------------------------------------------------
def make_net(stage: int, args: argparse.Namespace, weights: str | None) -> nn.Module:
    """The network of a stage, on the device; `weights` as for `backbone`."""
    encoder = backbone(
        args.backbone, weights, args.pixels, args.bn == "stored", args.released, args.borders
    )
    net = (
        Detector(encoder, args.detector == "ram")
        if stage == 2
        else ActivationNet(
            encoder, args.boundary, args.threshold, args.train_encoder, args.released
        )
    )
    if hasattr(encoder, "fc"):
        encoder.fc.requires_grad_(False)  # D4 reads it, nothing trains it
    net = net.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        net.compile()
    return net


def rate(stage: int, epoch: int, args: argparse.Namespace) -> float:
    """Learning rate of an epoch (from 1). Fewer or more epochs squeeze or stretch the schedule."""
    decay = (12, 16) if args.released and stage == 1 else DECAY[stage - 1]  # D1
    stretch = args.epochs[stage - 1] / PAPER["epochs"][stage - 1]
    return args.lr[stage - 1] * 0.1 ** sum(epoch >= at * stretch for at in decay)


def train(stage: int, args: argparse.Namespace) -> nn.Module:
    """Train one stage, starting from its backbone's weights or, with --resume, from last.pt."""
    world, folder, epochs = args.world, args.out / f"stage{stage}", args.epochs[stage - 1]
    dataset = open_set(args.data, args.data_root, masks=False)
    labels = read_labels(dataset.names, args, folder) if stage == 2 else None
    torch.manual_seed(args.seed)
    net = make_net(stage, args, args.backbone_weights)
    encoder = [p for p in net.encoder.parameters() if p.requires_grad]
    others = [p for name, p in net.named_parameters() if not name.startswith("encoder.")]
    optimiser = torch.optim.SGD(
        [
            {"params": others, "scale": 1.0},
            {"params": encoder, "scale": 0.1 if stage == 2 else 1.0},
        ],
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
    )
    bank = Bank(dataset, args.size, args.device, folder)
    flags = harness.plain_flags(args, bank.names)
    flags |= {"epochs": epochs, "lr": args.lr[stage - 1]}
    done = harness.resume(folder, "a2s", stage, flags, net, optimiser, labels)
    harness.save_args(flags, args, folder)
    if stage == 1 and done == 0 and world.main:
        study_thresholds(net, bank, args)
    log, watch = runtime.Log(folder, epochs, done, quiet=not world.main), harness.Watch(args)
    parallel = world.parallel(net)
    for epoch in range(done + 1, epochs + 1):
        for group in optimiser.param_groups:
            group["lr"] = rate(stage, epoch, args) * group["scale"]
        net.train()
        loss, images = train_epoch(stage, parallel, optimiser, bank, labels, epoch, args)
        runtime.require_finite(loss, epoch)
        world.average_statistics(net)
        logit, picture = partial(forward, net, args=args), folder / "vis" / f"epoch_{epoch:03d}.png"
        seen = {"mirror": harness.mirror(logit, bank)} if stage == 1 else {}
        seen |= watch(logit, picture)
        log.epoch(epoch, images, loss=loss, lr=rate(stage, epoch, args), **seen)
        if world.main:
            harness.save(folder, "a2s", stage, epoch, flags, net, optimiser, labels)
        world.barrier()
    return net


def train_epoch(
    stage: int,
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    bank: Bank,
    labels: MapBank | None,
    epoch: int,
    args: argparse.Namespace,
) -> tuple[float, int]:
    """One pass over the bank: (mean loss, number of images)."""
    world, total, steps = args.world, torch.zeros((), device=args.device), 0
    order, batch = epoch_order(len(bank), args.batch_size, args.seed, epoch, world)
    flips = "once" if args.released and stage == 2 else "anew"  # D6
    rectifying = stage == 2 and args.rectify != "off" and epoch > 2  # lambda is 1 before
    pixels = generator(args.device, args.seed, "drop", epoch)
    for index, flip in progress(
        batches(order, batch, args.seed, epoch, world, flips),
        f"stage {stage} epoch {epoch}",
        len(order) // batch,
    ):
        image = bank.images(index, flip)
        with autocast(args.device, args.amp):
            out = net(image)
        if stage == 1:
            kept = (keep_mask(theta, args.drop, world, pixels) for theta in out)
            loss = sum(
                weight * adb_loss(theta, args.alpha, keep)
                for weight, theta, keep in zip((1, *args.aux), out, kept)
            )
        else:
            g = labels.read(index, flip)
            loss = detector_loss(out, g)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if rectifying:
            y = torch.sigmoid(out.detach().float())
            if args.rectify == "hma":  # D11
                y = dense_crf(image * 255, y, sxy=80 * args.size / 320)
            labels.write(index, flip, args.lam * g + (1 - args.lam) * y)  # Eq. 14
        total, steps = total + loss.detach(), steps + 1
        if args.dry_run and steps == 2:
            break
    if rectifying:
        labels.share(order[: steps * batch], batch, world)
    return sum(world.gather(float(total) / steps)) / world.size, steps * batch


def keep_mask(theta: Tensor, drop: float, world: runtime.World, pixels: torch.Generator) -> Tensor:
    """Zero for dropped pixels, else a constant such that the mean over all processes is 1."""
    shape = (len(theta) * world.size, *theta.shape[1:])
    keep = (torch.rand(shape, device=theta.device, generator=pixels) >= drop).float()
    return (keep / keep.mean())[world.rank * len(theta) :][: len(theta)]


@torch.no_grad()
def study_thresholds(net: ActivationNet, bank: Bank, args: argparse.Namespace) -> None:
    """Table I: print V (Eq. 2) of each threshold on M stretched to [0, 1], before training."""
    v = dict.fromkeys(THRESHOLDS, 0.0)
    count = min(2 * args.batch_size if args.dry_run else len(bank), len(bank))
    for index in torch.arange(len(bank))[:count].split(args.batch_size):
        m = net.eval().features(bank.images(index))[0].float().sum(1, keepdim=True)
        m = m - m.amin((2, 3), keepdim=True)
        m = m / m.amax((2, 3), keepdim=True).clamp(min=1e-12)
        for name, threshold in THRESHOLDS.items():
            v[name] += between_variance(m, threshold(m)).sum().item() / count
    print("V of M before training (Table I): " + ", ".join(f"{k} {x:.4f}" for k, x in v.items()))


# ---- Pseudo labels -------------------------------------------------------------------------------
def refine(image: Tensor, theta: Tensor, args: argparse.Namespace) -> Tensor:
    """Eq. 6: G = median filter(CRF(sigmoid(theta))), theta signed. -> [B, 1, H, W] of 0 and 1"""
    prob = torch.sigmoid(theta.float())
    side = 1 if args.released else image.shape[-1] / 320  # sxy is for photos of about 320 pixels
    if args.released or args.unary == "hard":  # D2
        low, high = prob.amin((2, 3), keepdim=True), prob.amax((2, 3), keepdim=True)
        prob = hard_unary(prob > ((low + high) / 2 if args.released else 0.5))
    prob = dense_crf(image * 255, prob, args.sxy * side, args.srgb)
    return median_filter((prob > 0.5).float(), 7)


@torch.no_grad()
def make_labels(net: nn.Module, args: argparse.Namespace) -> None:
    """Write <out>/pseudo/<stem>.png (0 or 255, the photo's size) for every training photo."""
    dataset = open_set(args.data, args.data_root, masks=False)
    for samples, images in harness.batches_of(dataset, args, "pseudo labels"):
        if args.released:  # D3
            photos = [s["image"][None].to(args.device).float() / 255 for s in samples]
            labels = [refine(photo, forward(net, photo, args), args)[0, 0] for photo in photos]
        else:
            labels = map(harness.at_size, label_logit(net, images, args), samples)
        for sample, label in zip(samples, labels):
            pixels = (label > 0.5).byte().cpu() * 255
            save_png(args.out / "pseudo" / f"{sample['name']}.png", pixels)
    args.world.barrier()


def label_logit(net: nn.Module, image: Tensor, args: argparse.Namespace) -> Tensor:
    """Pseudo labels as logits, so that they are resized and scored like any prediction."""
    return torch.logit(refine(image, forward(net, image, args), args), 1e-6)


def read_labels(names: list[str], args: argparse.Namespace, folder: Path) -> MapBank:
    """The label bank of stage 2, from stage 1's files."""
    paths = [args.out / "pseudo" / f"{name}.png" for name in names]
    if args.dry_run:  # stage 1 made only a few
        paths = [p if p.exists() else next(args.out.glob("pseudo/**/*.png"), p) for p in paths]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} pseudo labels are missing ({missing[0]}); "
            f"make them: python a2s.py --stage 1 --data {args.data} --out {args.out}"
        )
    return MapBank(lambda i: load_mask(paths[i]), len(paths), args.size, args.device, folder)


# ---- Evaluation and prediction -------------------------------------------------------------------
@torch.no_grad()
def forward(net: nn.Module, image: Tensor, args: argparse.Namespace) -> Tensor:
    """Saliency logit [B, 1, H, W] of either stage's network, in eval mode."""
    net.eval()
    with autocast(args.device, args.amp):
        out = net(image)
    return (out[0] if isinstance(out, list) else out).float()


def evaluate(stage: int, net: nn.Module, args: argparse.Namespace) -> harness.Results:
    """Scores of every --eval set: of the detector, or of stage 1's activation and pseudo label."""
    folder, logit = args.out / f"stage{stage}", partial(forward, net, args=args)
    if stage == 2:
        return harness.evaluate(logit, args, folder)
    once = argparse.Namespace(**{**vars(args), "crf": False})  # labels have been through the CRF
    return harness.evaluate(logit, args, folder, "-activation") | harness.evaluate(
        partial(label_logit, net, args=args), once, folder, "-label"
    )


def load(path: Path, args: argparse.Namespace) -> tuple[int, nn.Module]:
    """Network and stage of a checkpoint: ours, or the authors' (--stage tells which, else 2)."""
    saved = runtime.torch_load(path)
    if "method" not in saved and any(key.startswith("decoder.") for key in saved):
        stage, args.released, state = int(args.stage or 2), True, from_released(saved)
        args.data, args.out = "MSRA-B", args.out or Path("runs", "a2s-released")
    else:
        names = (
            "backbone",
            "pixels",
            "borders",
            "released",
            "boundary",
            "threshold",
            "detector",
            "data",
        )
        saved = harness.restore(path, "a2s", args, names, ("size", "sxy", "srgb", "unary"))
        stage, state = saved["stage"], saved["model"]
        args.out = args.out or harness.run_of(path, ("stage1", "stage2"))
    fill_defaults(args)
    harness.prepare(args, "a2s")
    net = make_net(stage, args, "none")
    runtime.load_state(net, state, path)
    return stage, net


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under our names, less GroupNorms that they built but never called."""
    names = {
        "decoder.": "",
        "ad2.": "se3.",
        "ad3.": "se4.",
        "ad4.": "se5.",
        "fusion.": "se0.",
        "ad0.0": "conv",
        "ad0.1": "norm",
        ".se.conv": ".gate",
        "adapter": "laterals.",
        "gconv": "basis",
        "res_conv1": "attention.0",
        "res_conv2": "attention.1",
        "gb_conv": "head",
    }
    renamed = {}
    for key, value in state.items():
        for theirs, ours in {} if key.startswith("encoder.") else names.items():
            key = key.replace(theirs, ours)
        renamed[key] = value
    return {key: value for key, value in renamed.items() if ".se.gn." not in key}


# ---- Main ----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    """Train the stages asked for, in order; or evaluate or predict with a checkpoint."""
    args = build_parser().parse_args(argv)
    if args.weights or args.predict:
        run = harness.run_folder(args, "a2s")
        args.weights = args.weights or run / f"stage{args.stage or 2}" / "last.pt"
        stage, net = load(args.weights, args)
        if args.predict:
            harness.predict(lambda image: forward(net, image, args), args)
        else:
            harness.save_results(evaluate(stage, net, args), args, args.out / f"stage{stage}")
        return
    fill_defaults(args)
    harness.prepare(args, "a2s")
    results = {}
    for stage in (1, 2) if args.stage is None else (int(args.stage),):
        net = train(stage, args)
        if stage == 1:
            make_labels(net, args)
        results |= evaluate(stage, net, args)
        harness.save_results(results, args, args.out / f"stage{stage}")
    harness.gallery(["stage1/pred/{}-activation", "stage1/pred/{}-label", "stage2/pred/{}"], args)


if __name__ == "__main__":
    runtime.cli(main)

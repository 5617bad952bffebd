"""A2S: Activation to Saliency, unsupervised salient object detection without a single human mask.

Zhou, Chen, Yang, Lai, Xie: "Activation to Saliency: Forming High-Quality Labels for Unsupervised
Salient Object Detection", IEEE TCSVT 33(2), 2023 (arXiv 2112.03650).

A network that was pretrained without labels (MoCo v2) already responds to the main object of a
photo. Stage 1 freezes that encoder and trains four small blocks that sum its activations into one
map. Their loss pushes every pixel away from the mean of its own image, the adaptive decision
boundary (ADB), whichever side it is on. The smaller side is taken for the object. A dense CRF and a
median filter turn the map into a pseudo label. Stage 2 trains a light detector on these labels and
corrects them with its own predictions (online label rectifying, OLR).

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
    python a2s.py --explain photo.jpg                   # the method at work, step by step
    torchrun --nproc_per_node=4 a2s.py --data MSRA-B    # several GPUs or machines

Results. The paper (MoCo v2 ResNet-50, 3,000 MSRA-B photos, about 1 h on a GTX 1080 Ti) reports
ave-F / MAE on ECSSD: stage 1 .840 / .072, stage 2 .880 / .060. Its text defines ave-F as the mean
over 256 thresholds (F_mean), its authors' code takes one adaptive threshold per map (F_adp). Ours
at that size: not run. At small scale: docs/a2s.md.

Departures. The paper is the default. Where it is silent, the released code is followed: loss
weights, Nesterov momentum, a tenth of the rate for the encoder in stage 2, a convolution of H5 in
each residual attention module (RAM). --released follows that code also where it contradicts the
paper. docs/a2s.md explains every departure; D1 to D12 mark their places here.

Shapes: B batch, H W input size, h w feature size. Images are in [0, 1].
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import flags, harness, runtime
from common.backbones import backbone
from common.bank import Bank, MapBank
from common.crf import dense_crf, hard_unary, median_filter
from common.datasets import load_mask
from common.explain import one_photo, outputs_of, panels, stretched
from common.flags import Schedule, Settings
from common.published import a2s_state
from common.run import Run, claim
from common.runtime import UserError, World, autocast, generator, save_png, say

METHOD = "a2s"
PAPER = {  # sxy and srgb: reach and tolerance of the CRF in Eq. 6
    "stage1": Schedule(epochs=20, lr=1.0),
    "stage2": Schedule(epochs=25, lr=0.005),
    "batch_size": 8,
    "size": 320,
    "backbone": "resnet50",
    "sxy": 50.0,
    "srgb": 5.0,
    "rectify": "olr",
}
SHAPES = {  # built-in pictures, in minutes
    "stage1": Schedule(epochs=3, lr=1.0),
    "stage2": Schedule(epochs=3, lr=0.01),
    "batch_size": 8,
    "size": 160,
    "backbone": "tiny",
    "sxy": 100.0,
    "srgb": 20.0,
    "rectify": "olr",
}
SMALL = {  # your own photos, in half an hour for 500 on a CPU
    "stage1": Schedule(epochs=3, lr=1.0),
    "stage2": Schedule(epochs=9, lr=0.005),
    "batch_size": 8,
    "size": 160,
    "backbone": "mobilenet_v2",
    "sxy": 50.0,
    "srgb": 5.0,
    "rectify": "off",  # OLR needs a detector that is better than its labels
}
PRESETS = {"paper": PAPER, "shapes": SHAPES, "small": SMALL}
PAPER_SETS = ["ECSSD", "MSRA-B-test", "DUT-OMRON", "PASCAL-S", "DUTS-TE", "HKU-IS"]  # Table II


# ---- Config --------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """All flags. A default of None is the value of the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python a2s.py --data photos/                  label and learn a folder of photos\n"
        "  python a2s.py --data photos/ --predict new/   map other photos with that detector\n"
        "The docstring of this file explains the method, docs/a2s.md D1 to D12.",
    )
    flags.add_flags(parser, PRESETS)
    method = parser.add_argument_group("method")
    add = method.add_argument
    add("--stage", choices=("1", "2"), help="one stage only [1, then 2]")
    add("--released", action="store_true", help="the authors' code (D1 to D7)")
    add("--bn", choices=("stored", "batch"), help="statistics of BatchNorm, see D7 [stored]")
    add("--alpha", type=float, default=0.1, help="weight of the L1 distance in Eq. 4 [0.1]")
    add(
        "--aux",
        type=float,
        nargs=3,
        default=[0.1, 0.3, 0.5],
        metavar="W",
        help="loss weights of F3 F4 F5; 0 0 0: A1 of Table IV [0.1 0.3 0.5]",
    )
    add("--drop", type=float, default=0.5, help="share of pixels the loss leaves out; 0: A2 [0.5]")
    add("--train-encoder", action="store_true", help="in stage 1 too: variant A0")
    add(
        "--boundary",
        choices=("DB1", "DB2", "DB3", "DB4", "DB5"),
        default="DB5",
        help="decision boundary, Sec. IV-E [DB5]",
    )
    add(
        "--threshold",
        choices=("mean", "median", "otsu"),
        default="mean",
        help="threshold of M in DB5, Table I [mean]",
    )
    add("--unary", choices=("hard", "soft"), help="start of the CRF without --released, D2 [hard]")
    add("--sxy", type=float, help="CRF: reach in a photo of 320 pixels [50; shapes 100]")
    add("--srgb", type=float, help="CRF: tolerance in grey levels [5; shapes 20]")
    add("--detector", choices=("ram", "conv"), default="ram", help="conv: Table VII, dagger [ram]")
    add(
        "--rectify",
        choices=("olr", "hma", "off"),
        help="how stage 2 corrects its labels, Table VIII [olr, small: off]",
    )
    add("--lam", type=float, default=0.4, help="lambda of Eq. 14 [0.4]")
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with a value for each, that of the preset where none was given."""
    if not 0 <= args.drop < 1:
        raise UserError(f"--drop {args.drop} is not a share of pixels from 0 to less than 1")
    usual = []  # the sets to score on without --eval
    if flags.is_shapes(args.data):
        usual = ["shapes-test"]
    elif args.data == "MSRA-B":
        usual = PAPER_SETS

    args = flags.completed(args, PRESETS)
    if args.size < 16:
        raise UserError(f"--size {args.size} leaves nothing of the deepest map; at least 16")
    return flags.replaced(
        args,
        unary=args.unary or "hard",  # else the CRF changes nothing (D2)
        bn=args.bn or ("batch" if args.released else "stored"),  # as the encoder was trained (D7)
        eval=flags.evaluation_sets(args, usual),
    )


# Flags that describe a trained network, and flags that are those of its training unless given.
FIXED = ["backbone", "pixels", "borders", "released", "boundary", "threshold", "detector"]
FREE = ["size", "sxy", "srgb", "unary"]


# ---- Model: stage 1 ------------------------------------------------------------------------------
class SEBlock(nn.Module):
    """The paper's SE block as its authors coded it: convolution, GroupNorm, ReLU, channel gate."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, e: Tensor) -> Tensor:
        """[B, channels, h, w] -> [B, 64, h, w]"""
        f = F.relu(self.norm(self.conv(e)))  # [B, 64, h, w]
        gate = torch.sigmoid(self.gate(f.mean((2, 3), keepdim=True)))  # [B, 64, 1, 1]
        return (f * gate).to(e.dtype)  # GroupNorm gives fp32 even in half precision


def mean_threshold(m: Tensor) -> Tensor:
    """[B, 1, h, w] -> [B, 1, 1, 1]"""
    return m.mean((2, 3), keepdim=True)


def median_threshold(m: Tensor) -> Tensor:
    """[B, 1, h, w] -> [B, 1, 1, 1]"""
    return m.flatten(1).median(1).values[:, None, None, None]


def otsu_threshold(m: Tensor) -> Tensor:
    """The least value on the upper side of the split of greatest V (Eq. 2). -> [B, 1, 1, 1]"""
    x = m.detach().flatten(1).sort(1).values  # [B, N], ascending
    n = x.shape[1]
    if n == 1:
        return m.detach()

    # A split puts the k smallest pixels below. V is proportional to k (n - k) (mu1 - mu2)^2, and
    # the running sum gives both means for all k at once.
    k = torch.arange(1, n, device=x.device)
    sum_below = x.cumsum(1)[:, :-1]  # [B, N - 1]
    sum_above = x.sum(1, keepdim=True) - sum_below
    v = k * (n - k) * (sum_below / k - sum_above / (n - k)) ** 2

    # argmax counts from 0: its split has argmax + 1 pixels below, so this is the first one above.
    first_above = v.argmax(1, keepdim=True) + 1
    return x.gather(1, first_above)[..., None, None]


THRESHOLDS = {"mean": mean_threshold, "median": median_threshold, "otsu": otsu_threshold}


class DecisionBoundary(nn.Module):
    """Decision value theta of every pixel (Eq. 3, and its rivals of Sec. IV-E).

    f is a pixel's feature, f_bar its mean over the image, f_hat its mean over the training set,
    x'y a sum over the channels, 1 a vector of ones:
    DB1 1'(f - f_hat)   DB2 f_bar'f   DB3 f_bar'(f - f_bar)   DB4 w'(f - f_bar), w learned
    DB5 1'(f - f_bar), the paper's: the activation map M = 1'f minus its mean. `threshold` replaces
    the mean of M by its median or by Otsu's threshold (Table I).
    """

    def __init__(self, kind: str = "DB5", threshold: str = "mean", channels: int = 64):
        super().__init__()
        self.kind = kind
        self.threshold = THRESHOLDS[threshold]
        if kind == "DB1":
            self.register_buffer("running_mean", torch.zeros(1, channels, 1, 1))  # f_hat
        if kind == "DB4":
            self.w = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, f: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 1, h, w]"""
        f = f.float()  # sums over channels and pixels need fp32
        f_bar = f.mean((2, 3), keepdim=True)  # [B, C, 1, 1]

        # The rivals of Sec. IV-E. In DB1 the mean over the training set is a running one (D10).
        if self.kind == "DB1":
            if self.training:
                self.running_mean.lerp_(f_bar.detach().mean(0, keepdim=True), 0.01)
            return (f - self.running_mean).sum(1, keepdim=True)
        if self.kind == "DB2":
            return (f_bar * f).sum(1, keepdim=True)
        if self.kind == "DB3":
            return (f_bar * (f - f_bar)).sum(1, keepdim=True)
        if self.kind == "DB4":
            return self.w(f - f_bar)

        # DB5, the adaptive decision boundary of the paper.
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
        self.encoder = encoder.requires_grad_(train_encoder)
        self.train_encoder = train_encoder
        self.released = released
        if hasattr(encoder, "fc"):  # --released keeps the classifier to read it (D4)
            encoder.fc.requires_grad_(False)

        # One SE block per level, one to join them; each of F, F3, F4, F5 has a boundary.
        _, _, c3, c4, c5 = encoder.channels
        self.se3 = SEBlock(c3)
        self.se4 = SEBlock(c4)
        self.se5 = SEBlock(c5)
        self.se0 = SEBlock(3 * 64)
        self.boundaries = nn.ModuleList(DecisionBoundary(boundary, threshold) for _ in range(4))

    def features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eq. 1: [B, 3, H, W] -> F [B, 64, H/2, W/2] and F3, F4, F5 [B, 64, H/8 ... H/32, ...]."""
        # A frozen encoder needs no gradients. E1 gives nothing but the size of F.
        learns = self.train_encoder and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns):
            e1, _, e3, e4, e5 = self.encoder(image)

        # The released code weights the channels of E5 by the classifier (D4).
        if self.released and hasattr(self.encoder, "fc"):
            e5 = e5 * self.encoder.fc.weight.sum(0).view(1, -1, 1, 1)

        f3 = self.se3(e3)  # [B, 64, H/8, W/8]
        f4 = self.se4(e4)  # [B, 64, H/16, W/16]
        f5 = self.se5(e5)  # [B, 64, H/32, W/32]
        f = self.se0(torch.cat([resize(f3, e1), resize(f4, e1), resize(f5, e1)], 1))
        return f, f3, f4, f5

    def forward(self, image: Tensor) -> list[Tensor]:
        """theta of F with its sign [B, 1, H, W], and theta of F3, F4, F5 at their own sizes."""
        f, f3, f4, f5 = self.features(image)
        boundary, boundary3, boundary4, boundary5 = self.boundaries
        theta = boundary(f)  # [B, 1, H/2, W/2]

        # Labels are made of F, so its foreground must be positive. The loss ignores the sign.
        theta = foreground_sign(theta, self.released) * theta
        return [resize(theta, image), boundary3(f3), boundary4(f4), boundary5(f5)]


def foreground_sign(theta: Tensor, released: bool = False) -> Tensor:
    """Eq. 5: +1 where at most half of the pixels are positive, else -1. -> [B, 1, 1, 1]"""
    if released:
        share = (theta > 0).float().mean((2, 3), keepdim=True)
        return torch.sign(0.5 - share)  # 0 for a tie, which blanks the map (D5)
    share = (theta >= 0).float().mean((2, 3), keepdim=True)
    return torch.where(share <= 0.5, 1.0, -1.0)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of `like`."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def between_variance(m: Tensor, threshold: Tensor) -> Tensor:
    """Eq. 2: V = p1 p2 (mu1 - mu2)^2 of the two sides of a threshold. [B, 1, h, w] -> [B, 1]

    Let s be 1 for pixels above the threshold, else 0. Then cov(M, s) = mean(M s) - mean(M) mean(s)
    = p1 p2 (mu1 - mu2), hence V = cov(M, s)^2 / (p1 p2).
    """
    side = (m >= threshold).float()
    p = side.mean((2, 3))
    covariance = (m * side).mean((2, 3)) - p * m.mean((2, 3))
    return covariance**2 / (p * (1 - p)).clamp(min=1e-12)


# ---- Model: stage 2 ------------------------------------------------------------------------------
def conv(before: int, after: int) -> nn.Sequential:
    """Convolution, GroupNorm with two channels per group, ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.GroupNorm(after // 2, after),
        nn.ReLU(),
    )


class RAM(nn.Module):
    """Residual attention module (Fig. 6). Without attention it is the dagger row of Table VII.

    As in the authors' code, the basis H5 passes a convolution first.
    """

    def __init__(self, attention: bool = True):
        super().__init__()
        self.basis = conv(64, 64)
        levels = 2 if attention else 0
        self.attention = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(levels))
        self.fuse = nn.Conv2d(3 * 64, 64, 3, padding=1)

    def forward(self, h1: Tensor, h2: Tensor, h5: Tensor) -> Tensor:
        """Two levels to strengthen, and the basis; all leave with the size of h1. [B, 64, h, w]"""
        basis = resize(self.basis(h5), h1)
        levels = [h1, resize(h2, h1)]

        # Eq. 9: what a level adds to the basis tells where the level is strengthened.
        for i, attend in enumerate(self.attention):
            weight = torch.sigmoid(attend(levels[i] - basis))
            levels[i] = levels[i] * weight
        return self.fuse(torch.cat([*levels, basis], 1))  # Eq. 10


class Detector(nn.Module):
    """Stage 2: an encoder, five laterals of 64 channels (Eq. 8), a local and a regional RAM."""

    def __init__(self, encoder: nn.Module, attention: bool = True):
        super().__init__()
        self.encoder = encoder
        if hasattr(encoder, "fc"):  # --released keeps the classifier, without a use here
            encoder.fc.requires_grad_(False)
        self.laterals = nn.ModuleList(conv(channels, 64) for channels in encoder.channels)

        # H5 reaches the local RAM through two convolutions, at four times its size.
        twice = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.head = nn.Sequential(*conv(64, 128), twice, *conv(128, 64), twice)
        self.local = RAM(attention)
        self.region = RAM(attention)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> saliency logit Y [B, 1, H, W]."""
        # Five maps E1 ... E5, from H/2 to H/32, become H1 ... H5 of 64 channels.
        maps = self.encoder(image)
        h1, h2, h3, h4, h5 = (lateral(e) for lateral, e in zip(self.laterals, maps))  # Eq. 8

        # The coarse levels strengthen the basis H5 regionally, the fine ones locally.
        r_r = self.region(h3, h4, h5)  # [B, 64, H/8, W/8]
        r_l = self.local(h1, h2, self.head(h5))  # [B, 64, H/2, W/2]

        # The sum of their 64 products needs fp32.
        product = r_l.float() * resize(r_r, r_l).float()
        y = product.sum(1, keepdim=True)  # Eq. 11 [B, 1, H/2, W/2]
        return resize(y, image)


# ---- Losses --------------------------------------------------------------------------------------
def adb_loss(theta: Tensor, alpha: float, keep: Tensor | None = None) -> Tensor:
    """Eq. 4: L = -mean(D^2 + alpha D), D = |sigmoid(theta) - 0.5|.

    The L2 distance is squared, since the L2 norm of a scalar is its L1 norm (D8).
    theta: [B, 1, h, w]. keep: weights of the pixels, of mean 1; None: 1 for each.
    """
    d = (torch.sigmoid(theta.float()) - 0.5).abs()
    v = d.square() + alpha * d
    if keep is not None:
        v = v * keep
    return -v.mean()


def ssim_loss(p: Tensor, g: Tensor) -> Tensor:
    """1 - mean SSIM of two maps in [0, 1], [B, 1, H, W].

    A Gaussian window of 11 x 11 pixels with sigma 1.5, zeros beyond the border, C1 = 0.01^2 and
    C2 = 0.03^2, as in the released code.
    """
    # Means in a Gaussian window are two one-dimensional convolutions, here of five maps at once.
    window = torch.exp(-(torch.arange(11.0, device=p.device) - 5).square() / (2 * 1.5**2))
    window = (window / window.sum()).view(1, 1, 1, 11)
    maps = torch.cat([p, g, p * p, g * g, p * g])  # [5B, 1, H, W]
    means = F.conv2d(maps, window, padding=(0, 5))
    means = F.conv2d(means, window.transpose(2, 3), padding=(5, 0))
    mu_p, mu_g, pp, gg, pg = means.chunk(5)

    # SSIM is a term of the variances and the covariance times a term of the means.
    c1 = 1e-4
    c2 = 9e-4
    structure = (2 * (pg - mu_p * mu_g) + c2) / (pp - mu_p**2 + gg - mu_g**2 + c2)
    luminance = (2 * mu_p * mu_g + c1) / (mu_p**2 + mu_g**2 + c1)
    return 1 - (luminance * structure).mean()


def iou_loss(p: Tensor, g: Tensor) -> Tensor:
    """1 - sum(p g) / sum(p + g - p g), mean over the images. [B, 1, H, W] in [0, 1]"""
    both = (p * g).sum((1, 2, 3))
    either = (p + g - p * g).sum((1, 2, 3))
    return (1 - both / (either + 1e-7)).mean()


def detector_loss(y: Tensor, g: Tensor) -> Tensor:
    """Eq. 12: BCE + SSIM + IoU of the logit y and the label g, binarised at 0.5. [B, 1, H, W]"""
    y = y.float()
    g = (g > 0.5).float()
    p = torch.sigmoid(y)
    bce = F.binary_cross_entropy_with_logits(y, g)
    return bce + ssim_loss(p, g) + iou_loss(p, g)


# ---- Training ------------------------------------------------------------------------------------
def make_net(stage: int, args: argparse.Namespace, weights: str | None) -> nn.Module:
    """The network of a stage as the flags describe it, on the CPU; `weights` as for `backbone`."""
    # With statistics of the batch every process has those of its own share (D12).
    stored = args.bn == "stored"
    encoder = backbone(
        args.backbone, weights, args.pixels, stored, keep_fc=args.released, borders=args.borders
    )
    if stage == 1:
        return ActivationNet(
            encoder, args.boundary, args.threshold, args.train_encoder, args.released
        )
    return Detector(encoder, attention=args.detector == "ram")


def rate(epoch: int, schedule: Schedule, decay: tuple[int, int], paper_epochs: int) -> float:
    """Learning rate of an epoch (from 1), divided by 10 at each epoch of `decay`.

    decay: in the paper's run of `paper_epochs`; other runs keep its fractions.
    """
    drops = [milestone for milestone in decay if schedule.reached(epoch, milestone, paper_epochs)]
    return schedule.lr * 0.1 ** len(drops)


def make_optimiser(net: nn.Module, encoder_share: float) -> torch.optim.Optimizer:
    """SGD; an encoder that is trained learns at `encoder_share` of the learning rate."""
    encoder = [p for p in net.encoder.parameters() if p.requires_grad]
    others = [p for name, p in net.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": others, "share": 1.0}, {"params": encoder, "share": encoder_share}]
    fused = others[0].is_cuda  # one kernel for all parameters
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused)


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of parameters its share of the learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["share"]


def train_activation(
    net: ActivationNet,
    settings: Settings,
    schedule: Schedule,
    alpha: float,
    aux: list[float],
    drop: float,
) -> None:
    """Stage 1: push every pixel away from the decision boundary, whichever side it is on.

    alpha: Eq. 4. aux: loss weights of F3, F4, F5. drop: share of pixels left out of the loss.
    """
    # The photos, without their masks; and the run, which resumes, logs and writes last.pt.
    photos = settings.training_set(masks=False)
    bank = Bank(photos, settings.size, settings.device, settings.out / "stage1")
    optimiser = make_optimiser(net, encoder_share=1.0)
    run = Run(settings, 1, bank, net, optimiser, schedule, folder="stage1")
    decay = (12, 16) if net.released else (10, 16)  # the code's (D1), Sec. IV-A

    # What shows the progress: Table I before the first epoch, a picture after each.
    logit = partial(activation_logit, net, amp=settings.amp)
    watch = harness.Watch(settings, photos)
    if run.done == 0 and settings.world.main:
        study_thresholds(net, bank, settings)

    for epoch in run.epochs():
        lr = rate(epoch, schedule, decay, PAPER["stage1"].epochs)
        set_rate(optimiser, lr)
        random = generator(settings.device, settings.seed, "drop", epoch)  # the same when resumed
        for index, flip in run.batches():
            # Forward, in half precision where the device has it: theta of F, F3, F4, F5.
            image = bank.images(index, flip)  # [B, 3, S, S]
            with autocast(settings.device, settings.amp):
                thetas = run.net(image)  # [B, 1, S, S], then S/8, S/16, S/32 wide

            # Every map is pushed away from its boundary at a random half of its pixels.
            loss = 0
            for weight, theta in zip((1, *aux), thetas):
                keep = keep_mask(theta, drop, settings.world, random)
                loss = loss + weight * adb_loss(theta, alpha, keep)  # Eq. 4

            # Backward and step. The scaler does nothing unless the half precision is fp16.
            optimiser.zero_grad()
            run.scaler.scale(loss).backward()
            run.scaler.step(optimiser)
            run.scaler.update()
            run.add(loss=loss)

        # Do the maps follow the photo, or the place in the picture? A mirrored photo tells.
        mirror = harness.mirror(logit, bank)
        run.end_epoch(lr=lr, mirror=mirror, **watch(logit, run.picture))


def train_detector(
    net: Detector,
    settings: Settings,
    schedule: Schedule,
    rectify: str,
    lam: float,
    released: bool,
) -> None:
    """Stage 2: learn the pseudo labels, and correct them with the detector's own predictions.

    rectify: olr, hma or off. lam: lambda of Eq. 14.
    """
    # The photos, their labels from stage 1, and the run, which resumes, logs and writes last.pt.
    photos = settings.training_set(masks=False)
    labels = read_labels(photos.names, settings)
    bank = Bank(photos, settings.size, settings.device, settings.out / "stage2")
    optimiser = make_optimiser(net, encoder_share=0.1)
    run = Run(settings, 2, bank, net, optimiser, schedule, labels, "stage2")

    # What shows the progress: a picture after each epoch.
    logit = partial(detector_logit, net, amp=settings.amp)
    watch = harness.Watch(settings, photos)

    for epoch in run.epochs():
        lr = rate(epoch, schedule, (15, 20), PAPER["stage2"].epochs)  # Sec. IV-A
        set_rate(optimiser, lr)

        # Labels are corrected from the third of the paper's 25 epochs on; before, lambda is 1.
        rectifying = rectify != "off" and schedule.reached(epoch, 3, PAPER["stage2"].epochs)

        # The released code draws a photo's flip once for the whole run (D6).
        for index, flip in run.batches(flips="once" if released else "anew"):
            # Forward, in half precision where the device has it.
            image = bank.images(index, flip)  # [B, 3, S, S]
            with autocast(settings.device, settings.amp):
                y = run.net(image)  # logit [B, 1, S, S]

            # The labels as they have been corrected so far.
            g = labels.read(index, flip)  # [B, 1, S, S]
            loss = detector_loss(y, g)  # Eq. 12

            # Backward and step. The scaler does nothing unless the half precision is fp16.
            optimiser.zero_grad()
            run.scaler.scale(loss).backward()
            run.scaler.step(optimiser)
            run.scaler.update()
            run.add(loss=loss)

            # The prediction before this step is mixed into the label; HMA refines it first (D11).
            if rectifying:
                p = torch.sigmoid(y.detach().float())
                if rectify == "hma":  # 80: the CRF's usual reach, in photos of 320 pixels
                    p = dense_crf(image * 255, p, sxy=80 * settings.size / 320)
                labels.write(index, flip, lam * g + (1 - lam) * p)  # Eq. 14

        # Every process has corrected its own share of the labels; now all of them get all.
        if rectifying:
            labels.share(run.order, run.batch, settings.world)
        run.end_epoch(lr=lr, **watch(logit, run.picture))


def keep_mask(theta: Tensor, drop: float, world: World, random: torch.Generator) -> Tensor:
    """Weights of the pixels: 0 for dropped ones, else a constant such that their mean is 1.

    theta: [B, 1, h, w], as is the result. drop: the probability of being dropped.
    """
    # Every process draws for the whole batch and keeps its own part, so that the number of
    # processes changes nothing.
    shape = (len(theta) * world.size, *theta.shape[1:])
    keep = torch.rand(shape, device=theta.device, generator=random) >= drop
    mine = slice(world.rank * len(theta), (world.rank + 1) * len(theta))

    # Where chance would drop every pixel of a small map, all are kept.
    keep = (keep | ~keep.any()).float()
    return (keep / keep.mean())[mine]


@torch.no_grad()
def study_thresholds(net: ActivationNet, bank: Bank, settings: Settings) -> None:
    """Table I: print V (Eq. 2) of each threshold on M stretched to [0, 1], before training."""
    net.eval()
    v = dict.fromkeys(THRESHOLDS, 0.0)
    for index in torch.arange(len(bank)).split(settings.batch_size):
        # M of every photo, stretched to [0, 1] so that photos count equally.
        f = net.features(bank.images(index))[0]
        m = f.float().sum(1, keepdim=True)  # M [B, 1, H/2, W/2]
        m = m - m.amin((2, 3), keepdim=True)
        m = m / m.amax((2, 3), keepdim=True).clamp(min=1e-12)
        for name, threshold in THRESHOLDS.items():
            v[name] += between_variance(m, threshold(m)).sum().item() / len(bank)
    shown = ", ".join(f"{name} {value:.4f}" for name, value in v.items())
    say(f"V of M before training (Table I): {shown}")


# ---- Pseudo labels -------------------------------------------------------------------------------
ToLabel = Callable[..., Tensor]  # `refine` with its options filled in


def refine(
    image: Tensor,
    theta: Tensor,
    sxy: float,
    srgb: float,
    unary: str = "hard",
    released: bool = False,
    iterations: int = 10,
) -> Tensor:
    """Eq. 6: G = median filter(CRF(sigmoid(theta))), theta with its sign.

    image [B, 3, H, W] in [0, 1], theta [B, 1, H, W] -> [B, 1, H, W] of 0 and 1. sxy: the CRF's
    reach in a photo of 320 pixels; srgb: its tolerance in grey levels. unary, released: D2.
    """
    # What the CRF starts from: probabilities, or a label that is right with probability 0.7 (D2).
    prob = torch.sigmoid(theta.float())
    if released:
        middle = (prob.amin((2, 3), keepdim=True) + prob.amax((2, 3), keepdim=True)) / 2
        prob = hard_unary(prob > middle)
    elif unary == "hard":
        prob = hard_unary(prob > 0.5)

    # The reach grows with the picture; in the released code it does not.
    if not released:
        sxy = sxy * image.shape[-1] / 320
    prob = dense_crf(image * 255, prob, sxy, srgb, iterations=iterations)
    return median_filter((prob > 0.5).float(), 7)


@torch.no_grad()
def make_labels(
    net: ActivationNet, settings: Settings, to_label: ToLabel, own_size: bool = False
) -> None:
    """Write <out>/pseudo/<stem>.png (0 or 255, the photo's size) for every training photo.

    own_size: make each label at its photo's own size instead of --size pixels (D3).
    """
    photos = settings.training_set(masks=False)
    for samples, images in harness.batches_of(photos, settings, "pseudo labels"):
        # Labels [H, W] of the photo's size: 0 or 1, or in between where a label was enlarged.
        labels = []
        if own_size:
            for sample in samples:
                photo = sample["image"][None].to(settings.device).float() / 255
                theta = activation_logit(net, photo, settings.amp)
                labels.append(to_label(photo, theta)[0, 0])
        else:
            logits = label_logit(net, images, settings.amp, to_label)  # [B, 1, S, S]
            for logit, sample in zip(logits, samples):
                labels.append(harness.at_size(logit, sample))

        for sample, label in zip(samples, labels):
            pixels = (label > 0.5).byte().cpu() * 255
            save_png(settings.out / "pseudo" / f"{sample['name']}.png", pixels)
    settings.world.barrier()


def read_labels(names: list[str], settings: Settings) -> MapBank:
    """The label bank of stage 2, with 8 bits per pixel (D9), from the files of stage 1.

    Raises `UserError` if one is missing.
    """
    folder = settings.out / "pseudo"
    paths = [folder / f"{name}.png" for name in names]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} pseudo labels are missing ({missing[0]}); make them: "
            f"python a2s.py --stage 1 --data {settings.data} --out {settings.out}"
        )
    stage2 = settings.out / "stage2"
    return MapBank(
        lambda i: load_mask(paths[i]), len(paths), settings.size, settings.device, stage2
    )


# ---- Evaluation and prediction -------------------------------------------------------------------
@torch.no_grad()
def activation_logit(net: ActivationNet, image: Tensor, amp: str) -> Tensor:
    """Stage 1's saliency logit, the signed theta of F, in eval mode. -> [B, 1, H, W]"""
    net.eval()
    with autocast(image.device, amp):
        theta = net(image)[0]
    return theta.float()


@torch.no_grad()
def label_logit(net: ActivationNet, image: Tensor, amp: str, to_label: ToLabel) -> Tensor:
    """Pseudo labels as logits, so that they are resized and scored like any prediction."""
    label = to_label(image, activation_logit(net, image, amp))
    return torch.logit(label, 1e-6)


@torch.no_grad()
def detector_logit(net: Detector, image: Tensor, amp: str) -> Tensor:
    """Stage 2's saliency logit, in eval mode. -> [B, 1, H, W]"""
    net.eval()
    with autocast(image.device, amp):
        y = net(image)
    return y.float()


@torch.no_grad()
def explain_activation(net: ActivationNet, photo: Tensor, image: Tensor, to_label: ToLabel):
    """Stage 1 at work on one photo, as titled pictures: Figs. 1, 4 and 5 of the paper."""
    # The activation map, and what lies above its mean, its median and Otsu's threshold.
    net.eval()
    m = net.features(image)[0].float().sum(1, keepdim=True)  # M [1, 1, S/2, S/2]
    pictures = [("photo", photo), ("M, the sum of F", stretched(m))]
    for name, threshold in THRESHOLDS.items():
        pictures.append((f"M cut by its {name}, Table I", (m >= threshold(m))[0]))

    # The decision value with its sign, and the label after more and more steps of the CRF.
    theta = net(image)[0].float()  # [1, 1, S, S]
    pictures.append(("sigmoid(theta), Eqs. 3, 5", torch.sigmoid(theta)[0]))
    for iterations in (1, 3, 10):
        title = f"G, CRF iterations: {iterations}, Eq. 6"
        pictures.append((title, to_label(image, theta, iterations=iterations)[0]))
    return pictures


@torch.no_grad()
def explain_detector(net: Detector, photo: Tensor, image: Tensor):
    """Stage 2 at work on one photo, as titled pictures: Fig. 11 of the paper."""
    names = [*(f"laterals.{i}" for i in range(5)), "region", "local"]
    seen = outputs_of(net, names, image)
    pictures = [("photo", photo)]
    for i in range(5):
        pictures.append((f"H{i + 1}, Eq. 8", stretched(seen[f"laterals.{i}"])))
    pictures.append(("R_r, regional, Eq. 10", stretched(seen["region"])))
    pictures.append(("R_l, local, Eq. 10", stretched(seen["local"])))

    # Their product summed over the channels is the logit.
    y = net(image).float()
    pictures.append(("R_l R_r, summed, Eq. 11", stretched(y)))
    pictures.append(("Y, the saliency map", torch.sigmoid(y)[0]))
    return pictures


def evaluate(stage: int, net: nn.Module, settings: Settings, to_label: ToLabel) -> harness.Results:
    """Scores of every --eval set: of stage 1's activation and pseudo label, or of the detector."""
    folder = settings.out / f"stage{stage}"
    if stage == 2:
        return harness.evaluate(partial(detector_logit, net, amp=settings.amp), settings, folder)
    activation = partial(activation_logit, net, amp=settings.amp)
    label = partial(label_logit, net, amp=settings.amp, to_label=to_label)
    results = harness.evaluate(activation, settings, folder, "-activation")
    # A label has been through the CRF already.
    return results | harness.evaluate(label, settings, folder, "-label", crf=False)


def open_checkpoint(
    path: Path, args: argparse.Namespace
) -> tuple[argparse.Namespace, int, nn.Module]:
    """The flags that fit a checkpoint, its stage and its network.

    A checkpoint of the authors does not tell its stage: --stage does, else it is 2.
    """
    saved = runtime.torch_load(path)
    if "method" not in saved and any(key.startswith("decoder.") for key in saved):
        stage = int(args.stage or 2)
        state = a2s_state(saved)
        out = args.out or Path("runs", "a2s-released")
        args = flags.replaced(args, released=True, data="MSRA-B", out=out)
    else:
        runtime.check_checkpoint(saved, path, METHOD)
        stage = saved["stage"]
        state = saved["model"]
        args = flags.saved_flags(build_parser(), args, saved, path, [*FIXED, "data"], FREE)
        out = flags.out_of(args, path, METHOD, ("stage1", "stage2"))
        args = flags.replaced(args, out=out)
    args = complete(args)
    net = make_net(stage, args, "none")
    runtime.load_state(net, state, path)
    return args, stage, net


def load(weights: str | Path = "photos", device: str = "auto") -> harness.Predictor:
    """A trained network as a function of Pillow photos; weights: "photos" or a checkpoint.

    sod = load("photos"); saliency = sod(Image.open("photo.jpg"))
    """
    args = build_parser().parse_args(["--weights", str(weights), "--device", device])
    path = flags.checkpoint_of(args, METHOD, "stage2/last.pt")
    args, stage, net = open_checkpoint(path, flags.replaced(args, eval=[]))
    settings = flags.settle(args, METHOD, quiet=True)
    logit = activation_logit if stage == 1 else detector_logit
    net = settings.place(net)
    return harness.Predictor(partial(logit, net, amp=settings.amp), net, settings)


# ---- Main ----------------------------------------------------------------------------------------
def use(args: argparse.Namespace) -> None:
    """Evaluate or predict with a checkpoint: that of --weights, or of the run folder."""
    path = flags.checkpoint_of(args, METHOD, f"stage{args.stage or 2}/last.pt")
    args, stage, net = open_checkpoint(path, flags.replaced(args, weights=path))
    settings = flags.settle(args, METHOD)
    net = settings.place(net)
    results = evaluate(stage, net, settings, label_maker(args))
    harness.save_results(results, settings, settings.out / f"stage{stage}")
    if args.predict:
        logit = activation_logit if stage == 1 else detector_logit
        forward = partial(logit, net, amp=settings.amp)
        harness.predict(forward, settings, args.overlay, args.skip_existing)
    if args.explain:
        photo, image, path = one_photo(args.explain, settings)
        if stage == 1:
            pictures = explain_activation(net, photo, image, label_maker(args))
        else:
            pictures = explain_detector(net, photo, image)
        panels(path, pictures)


def label_maker(args: argparse.Namespace) -> ToLabel:
    """`refine` with the options that the flags give."""
    return partial(refine, sxy=args.sxy, srgb=args.srgb, unary=args.unary, released=args.released)


def main(argv: list[str] | None = None) -> None:
    """Train the stages asked for, in order; or evaluate or predict with a checkpoint."""
    args = build_parser().parse_args(argv)
    if args.weights or args.predict or args.explain:
        use(args)
        return

    # A stage may start from a network of an earlier run.
    init_stage = init = None
    if args.init:
        like, init_stage, init = open_checkpoint(
            flags.named_checkpoint(args.init, METHOD), flags.replaced(args, eval=[])
        )
        args = flags.taken_from(like, args, [*FIXED, *FREE])

    args = complete(args)
    flags.show_preset(args, PRESETS)
    settings = flags.settle(args, METHOD)
    stages = [int(args.stage)] if args.stage else [1, 2]
    schedules = {1: args.stage1, 2: args.stage2}
    if init and init_stage not in stages:
        raise UserError(f"--init {args.init} is of stage {init_stage}, which is not trained here")
    claim(settings, {f"stage{stage}": schedules[stage] for stage in stages})

    results = {}
    to_label = label_maker(args)
    for stage in stages:
        torch.manual_seed(args.seed)
        net = init if stage == init_stage else make_net(stage, args, args.backbone_weights)
        net = settings.place(net, channels_last=settings.trains_channels_last)
        if stage == 1:
            train_activation(net, settings, args.stage1, args.alpha, args.aux, args.drop)
            net = net.to(memory_format=torch.channels_last)  # what follows has no gradients
            make_labels(net, settings, to_label, own_size=args.released)
        else:
            train_detector(net, settings, args.stage2, args.rectify, args.lam, args.released)
        results |= evaluate(stage, net, settings, to_label)
        harness.save_results(results, settings, settings.out / f"stage{stage}")
    harness.gallery(
        ["stage1/pred/{}-activation", "stage1/pred/{}-label", "stage2/pred/{}"], settings
    )


if __name__ == "__main__":
    runtime.cli(main)

"""Unified USOD: salient objects in photos, RGB-D, RGB-T, video and aerial images without a mask.

Yuan, Liu, Gao, Dai, Qin: "Unified Unsupervised Salient Object Detection via Knowledge Transfer",
IJCAI 2024 (arXiv 2404.14759).

Stage 1 takes the activation map of A2S from a frozen network that was pretrained without labels and
pushes its pixels to 0 or 1, easy pixels first, the hard ones later (progressive curriculum); near
boundaries alike pixels of photo and modality shall have alike saliency, and a photo at another
scale the same map. Otsu's threshold, a dense CRF and a median filter make pseudo labels of it.
Stage 2 trains a two-stream detector on the labels of all tasks together, and mends the labels while
it learns: with its own prediction and with that prediction snapped to edges. --transfer carries
stage 1 to video or remote sensing: only an adapter beside its deepest block is trained.

    photo -> encoder -> E3 E4 E5 -> T (E5: T + Ta) -> F -> theta -> Otsu, CRF, median -> G
             frozen               L_pcl-sd + 0.05 L_btm + L_sc
    photo    -> encoder -> levels -> chain 1 --+
                            global map --------+--> S <- L_iou + L_ms -> G
    modality -> encoder -> levels -> chain 2 --+         G := 0.2 PAR(photo, S) + 0.6 S + 0.2 G

Usage
    python unified_usod.py                                     # built-in shapes, no download
    python unified_usod.py --transfer video                    # ... carried to moving shapes
    python unified_usod.py --transfer rsi                      # ... and to shapes from above
    python unified_usod.py --data DUTS-TR+RGBD-TR+VT5000-TR    # the paper's joint training
    python unified_usod.py --data photos/         # photos/images, and photos/depth if there is one
    python unified_usod.py --data photos/ --predict photos/    # with the network just trained
    torchrun --nproc_per_node=4 unified_usod.py --data DUTS-TR+RGBD-TR+VT5000-TR

Results. Paper (MoCo v2 ResNet-50, RTX 3090), F / MAE: ECSSD .923 / .038, NJUD .876 / .049, VT5000
.843 / .038; carried over, DAVIS .793 / .030. Ours: not run; at small scale: README.

Departures. The paper is the default. Where it is silent the released code is followed: first level
after a pooling, corner rule for the sign, Otsu's threshold, MoCo v2 of 200 epochs; in stage 2 half
weight for the second scale and 0.2 for the photo chain's head, no weight decay, encoders at rest in
epoch 1 and at a tenth of the rate then, SPR from epoch 2 on.
--released follows the authors' code also where it contradicts the paper:
 D1 the curriculum's epoch Ec starts at 0 and grows with every step; released: by ones from 1.
 D2 the distilling loss is linear; released: its power falls from 2 to nearly 1 (--power).
 D3 the curriculum holds in transfer too (Fig. 2); released: not there.
 D4 stage 2's learning rate is constant; released: it falls linearly to a fifth, as in stage 1.
 D5 SPR weighs 0.2 0.6 0.2, PAR is scaled so that its weights add up to 1; released: 0.1 0.7 0.2,
    and PAR's map and the new label are divided by their maxima. (Theirs also stretches a label to
    [0, 1] before it is cut, not done here, and runs SPR only with --olr.)
 D6 both scales take the sign of the first; released: each its own, and they may contradict.
 D7 BatchNorm of what is pretrained or frozen keeps its statistics, as in a2s.py, which fit pixels
    in ImageNet's units: so does the modality. Released: statistics of the batch, modality as it is.
Ours in both cases:
 D8 PAR is AFA's, which the paper cites (as released); Eqs. 5 and 7 leave out its square, its
    dilations, and its iterations.
 D9 L_sc is a mean square, as released; the paper writes a norm.
 D10 a batch without a boundary has L_btm 0 (released: not a number); labels have 8 bits.
 D11 of several processes each has its own boundaries in L_btm and its own BatchNorm statistics,
    which are averaged after each epoch.
 D12 the adapter begins almost silent and replicates its borders; released: random, zeros.
Not implemented: the released code's adapter in the detector, whose training crashes there; as in
its README, transfer trains a new detector on the target's labels (Fig. 2).

Shapes: B batch, H W input size, h w feature size. Images and modalities are in [0, 1].
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import harness, runtime
from common.backbones import PIXELS, backbone
from common.bank import Bank, MapBank, batches, epoch_order
from common.crf import dense_crf, hard_unary, median_filter
from common.datasets import load_mask, open_set
from common.runtime import UserError, autocast, generator, progress, save_png

METHOD = "unified_usod"
PAPER = {
    "epochs": (20, 10),
    "lr": (0.1, 0.005),
    "batch_size": 8,
    "size": 320,
    "width": 1.0,
    "backbone": "resnet50",
    "sxy": 50.0,
    "srgb": 5.0,
}
SHAPES = {
    "epochs": (1, 3),
    "lr": (0.1, 0.02),
    "batch_size": 8,
    "size": 128,
    "width": 0.125,
    "backbone": "tiny",
    "sxy": 100.0,
    "srgb": 20.0,
}
FIXED = ("backbone", "pixels", "borders", "sign", "width", "released", "data")  # a checkpoint's
FREE = ("size", "sxy", "srgb", "backbone_weights", "threshold", "bn")  # ... unless given
SIDES = (0.6, 0.8, 1.2, 1.4)  # of the second scale: 192, 256, 384, 448 for 320
TARGETS = {"video": ("VSOD-TR", "shapes-video"), "rsi": ("RSSD-TR", "shapes-top")}
PAPER_SETS = {
    "DUTS-TR": "DUT-OMRON DUTS-TE ECSSD HKU-IS PASCAL-S",
    "VT5000-TR": "VT5000-TE VT1000 VT821",
    "RGBD-TR": "RGBD135 NJUD NLPR SIP",
    "VSOD-TR": "DAVSOD DAVIS SegV2 FBMS",
    "RSSD-TR": "ORSSD EORSSD",
}  # what Tables 1 to 5 evaluate, by training set


# ---- Config --------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """All flags. A default of None is the paper's value, or the small preset's on shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="The docstring of this file explains the method.",
    )
    add = parser.add_argument_group("method").add_argument
    add("--stage", choices=("1", "2"), help="one stage only [1, then 2]")
    add(
        "--transfer",
        metavar="TASK",
        help="carry the run folder's networks to video, rsi, or any "
        "set, and compare with zero-shot",
    )
    add("--released", action="store_true", help="the authors' code (D1 to D7)")
    add("--bn", choices=("stored", "batch"), help="BatchNorm's statistics, see D7 [stored]")
    add("--sign", choices=SIGNS, default="corners", help="what is background? [corners]")
    add("--pcl", choices=("on", "off"), help="hard pixels come later, see D3 [on]")
    add("--power", choices=("linear", "annealed"), help="of L_pcl-sd, see D2 [linear]")
    add("--gamma", type=float, default=0.05, help="weight of L_btm [0.05]")
    add(
        "--multi-scale",
        choices=("on", "off"),
        default="on",
        help="a second scale, with L_sc in stage 1 and L_ms in stage 2 [on]",
    )
    add(
        "--threshold",
        choices=("otsu", "fixed"),
        help="of the map before the CRF; fixed: 0.5 [otsu]",
    )
    add("--sxy", type=float, help="CRF's reach in a photo of 320 pixels [50]")
    add("--srgb", type=float, help="CRF's tolerance of grey levels [5]")
    add("--width", type=float, help="share of the detector's channels [1]")
    add("--loss", choices=LABEL_LOSSES, default="iou", help="of stage 2, Table 8 [iou]")
    add(
        "--aux",
        type=float,
        nargs=3,
        default=[0.2, 0, 0],
        metavar="W",
        help="loss weights of the heads of photo chain, modality chain, global map [.2 0 0]",
    )
    add(
        "--labels",
        type=Path,
        metavar="DIR",
        help="for stage 2, the pseudo labels of another run [<out>/pseudo]",
    )
    add(
        "--spr",
        type=float,
        nargs=3,
        metavar="W",
        help="weights of prior, posterior, previous "
        "label, Table 7; 0 0 1 rectifies nothing [.2 .6 .2]",
    )
    harness.add_flags(parser)
    parser.set_defaults(data="shapes+shapes-depth+shapes-thermal", pairs=True)
    return parser


def fill_defaults(args: argparse.Namespace) -> None:
    """Replace None by the paper's value, or by the small preset's on shapes, which is printed."""
    small = harness.use_preset(args, PAPER, SHAPES)
    # one number on the command line serves both stages
    args.epochs, args.lr = (v if isinstance(v, tuple) else (v, v) for v in (args.epochs, args.lr))
    args.threshold = args.threshold or "otsu"
    args.bn = args.bn or ("batch" if args.released else "stored")  # D7
    args.pcl = args.pcl or ("off" if args.released and args.transfer else "on")  # D3
    args.power = args.power or ("annealed" if args.released else "linear")  # D2
    args.spr = args.spr or ([0.1, 0.7, 0.2] if args.released else [0.2, 0.6, 0.2])  # D5
    if min(args.spr) < 0 or abs(sum(args.spr) - 1) > 1e-6:
        raise UserError(f"--spr {' '.join(map(str, args.spr))}: three weights that add up to 1")
    if args.backbone == "resnet50" and args.backbone_weights is None:
        args.backbone_weights = "moco200"
    parts = [part.split("@")[0] for part in args.data.split("+")]
    if args.eval is None and small:
        args.eval = [f"{part.removesuffix('-test')}-test" for part in parts]
    elif args.eval is None:
        sets = [name for part in parts for name in PAPER_SETS.get(part, "").split()]
        args.eval = harness.present(sets, args.data_root)
    harness.show_preset(args, SHAPES)


# ---- Model: stage 1 ------------------------------------------------------------------------------
class SEBlock(nn.Module):
    """A2S's block: convolution, GroupNorm, ReLU, and a gate on every channel."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, e: Tensor) -> Tensor:
        f = F.relu(self.norm(self.conv(e)))  # [B, 64, h, w]
        return f * torch.sigmoid(self.gate(f.mean((2, 3), keepdim=True)))


class CueExtractor(nn.Module):
    """Stage 1, the SCE: a frozen encoder and four blocks that aggregate one activation map.

    adapter: a second block beside T on the deepest level, F^ = T(F) + Ta(F), for transfer.
    """

    def __init__(
        self,
        encoder: nn.Module,
        sign: str = "corners",
        adapter: bool = False,
        released: bool = False,
    ):
        super().__init__()
        self.encoder, self.sign, self.released = encoder, SIGNS[sign], released
        self.encoder.requires_grad_(False)
        self.se3, self.se4, self.se5 = map(SEBlock, encoder.channels[2:])
        self.se0 = SEBlock(3 * 64)
        self.adapter = SEBlock(encoder.channels[4]) if adapter else None

    def activation(self, image: Tensor) -> Tensor:
        """theta, A2S's decision value of every pixel: [B, 3, H, W] -> [B, 1, H/4, W/4]"""
        with torch.no_grad():
            _, e2, e3, e4, e5 = self.encoder(image)
        f5 = self.se5(e5) if self.adapter is None else self.se5(e5) + self.adapter(e5)
        f = self.se0(torch.cat([resize(f, e2) for f in (self.se3(e3), self.se4(e4), f5)], 1))
        m = f.float().sum(1, keepdim=True)  # [B, 1, H/4, W/4]
        return m - m.mean((2, 3), keepdim=True)

    def forward(self, *images: Tensor) -> list[Tensor]:
        """The same photos at one or more sizes [B, 3 or 6, H, W] -> theta, each [B, 1, H, W].

        Positive is salient. The first size decides on it for all of them (D6).
        """
        thetas = [self.activation(image[:, :3]) for image in images]
        signs = (
            [self.sign(theta) for theta in thetas]
            if self.released
            else [self.sign(thetas[0])] * len(thetas)
        )
        return [resize(sign * theta, image) for sign, theta, image in zip(signs, thetas, images)]


def corner_sign(theta: Tensor) -> Tensor:
    """-1 where two or more of the four corners are positive, else +1. -> [B, 1, 1, 1]"""
    corners = theta[:, :, :: theta.shape[2] - 1, :: theta.shape[3] - 1]  # [B, 1, 2, 2]
    return torch.where((corners > 0).sum((2, 3), keepdim=True) >= 2, -1.0, 1.0)


def area_sign(theta: Tensor) -> Tensor:
    """A2S's rule: -1 where more than half of the pixels are positive, else +1. -> [B, 1, 1, 1]"""
    return torch.where((theta >= 0).float().mean((2, 3), keepdim=True) > 0.5, -1.0, 1.0)


SIGNS = {"corners": corner_sign, "area": area_sign}


def resize(x: Tensor, like: Tensor, corners: bool = True) -> Tensor:
    """Bilinear, to the height and width of `like`; corners: align the corner pixels' centres."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=corners)


# ---- Model: stage 2 ------------------------------------------------------------------------------
def conv(before: int, after: int, size: int = 3) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, after, size, padding=size // 2), nn.BatchNorm2d(after), nn.ReLU()
    )


class ChannelGate(nn.Module):
    """Weight the channels by a network on their means and their maxima."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1), nn.ReLU(), nn.Conv2d(channels // 2, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        mean, peak = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * torch.sigmoid(self.mlp(mean) + self.mlp(peak))


class GlobalInfo(nn.Module):
    """The deepest maps of both streams, pooled to 13, 9, 5 and 1 cells a side and joined again."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.gate, self.reduce = ChannelGate(before), conv(before, after // 2)
        self.pools = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveMaxPool2d(cells),
                nn.Conv2d(after // 2, after // 4, 1, bias=False),
                nn.ReLU(),
            )
            for cells in (13, 9, 5, 1)
        )
        self.fuse = conv(after // 2 * 3, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, h, w]"""
        x = self.reduce(self.gate(x))
        return self.fuse(torch.cat([*(resize(pool(x), x) for pool in self.pools), x], 1))


class Fusion(nn.Module):
    """One level of a decoding chain: what came before, the level's own map, and the global map."""

    def __init__(self, before: int, level: int, context: int, inner: int):
        super().__init__()
        self.gate_before, self.before = ChannelGate(2 * before), conv(2 * before, inner)
        self.gate_level, self.level = ChannelGate(level), conv(level, inner)
        self.context = conv(context, inner)
        self.out = conv(inner, level)

    def forward(self, own: Tensor, other: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Two chains' maps of the level below, [B, before, h/2, w/2] -> [B, level, h, w]"""
        before = resize(self.gate_before(torch.cat([own, other], 1)), level)
        return self.out(
            self.before(before)
            + self.level(self.gate_level(level))
            + self.context(resize(context, level))
        )


class Detector(nn.Module):
    """Stage 2, the SD: MIDD, two encoders and two chains that decode photo and modality together.

    width: share of MIDD's channels.
    """

    def __init__(self, rgb: nn.Module, modality: nn.Module, width: float = 1.0):
        super().__init__()
        c2, c3, c4, c5 = (4 * max(1, round(width * c / 4)) for c in (128, 256, 512, 512))
        widths, inner = (rgb.channels[0], c2, c3, c4, c5), c2  # level 1 stays as it is
        self.encoders = nn.ModuleList([rgb, modality])
        self.laterals = nn.ModuleList(
            nn.ModuleList(map(partial(conv, size=1), encoder.channels[1:], widths[1:]))
            for encoder in self.encoders
        )
        self.global_info = GlobalInfo(2 * c5, c5)
        below = (c2, c3, c4, c5)
        self.chains = nn.ModuleList(
            nn.ModuleList(Fusion(*pair, c5, inner) for pair in zip(below, widths))
            for _ in self.encoders
        )
        self.gate = ChannelGate(2 * widths[0])
        self.heads = nn.ModuleList(
            nn.Conv2d(c, 1, 1) for c in (2 * widths[0], widths[0], widths[0], c5)
        )
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("encoders."):
                nn.init.normal_(module.weight, std=0.01)  # not in the paper; released code

    def taps(self, stream: int, image: Tensor) -> list[Tensor]:
        """Five levels of one stream [B, 3, H, W]: at H/4 (after a pooling), H/4, H/8 ... H/32."""
        first, *rest = self.encoders[stream](image)
        return [
            F.max_pool2d(first, 3, 2, 1),
            *(lateral(e) for lateral, e in zip(self.laterals[stream], rest)),
        ]

    def decode(self, pair: Tensor) -> list[Tensor]:
        """Photo and modality [B, 6, H, W] -> logits of the output and of both chains
        [B, 1, H/4, W/4], and of the global map [B, 1, H/32, W/32]."""
        levels = [self.taps(stream, image) for stream, image in enumerate(pair.split(3, 1))]
        context = self.global_info(torch.cat([levels[0][4], levels[1][4]], 1))
        before = [(context, levels[1][4]), (context, levels[0][4])]  # (own, the other's)
        for level in (3, 2, 1, 0):
            maps = [
                chain[level](own, other, taps[level], context)
                for chain, (own, other), taps in zip(self.chains, before, levels)
            ]
            before = [maps, maps[::-1]]
        inputs = (self.gate(torch.cat(maps, 1)), *maps, context)
        return [head(x).float() for head, x in zip(self.heads, inputs)]

    def forward(self, *pairs: Tensor) -> list[list[Tensor]]:
        """The four logits of `decode`, of the same photos at one or more sizes, at these sizes."""
        return [[resize(y, pair, corners=False) for y in self.decode(pair)] for pair in pairs]


# ---- Losses --------------------------------------------------------------------------------------
def distilling_loss(theta: Tensor, hard: float = 0.0, power: float = 1.0) -> Tensor:
    """L_pcl-sd = mean(M (0.5^k - |S - 0.5|^k)), S = sigmoid(theta), M = 0 where |S - 0.5| < hard.

    theta [B, 1, H, W]. With k = power = 1 it is the paper's 0.5 - mean|M S - 0.5|.
    """
    d = (torch.sigmoid(theta.float()) - 0.5).abs()
    return ((d.detach() >= hard) * (0.5**power - d**power)).mean()


def btm_loss(theta: Tensor, guide: Tensor) -> Tensor:
    """Boundary-aware texture matching: near the map's boundary, like pixels get like saliency.

    theta [B, 1, H, W]; guide [B, C, H, W], photo and modalities, a missing modality being constant.
    At a quarter of the size, mean over the boundary (5 x 5 dilation less erosion) of
    sum_j exp(-200 |g_i - g_j|^2) |S_i - S_j|, j in the 11 x 11 window; 0 without a boundary.
    """

    def window(x: Tensor) -> Tensor:  # -> [B, 121, h w]
        return F.unfold(x, 11, padding=5)

    s, guide = torch.sigmoid(theta.float()), guide.float()
    s, guide = (
        F.interpolate(x, scale_factor=0.25, mode="bilinear", align_corners=True) for x in (s, guide)
    )
    with torch.no_grad():
        side = (s > 0.5).float()
        edge = F.max_pool2d(side, 5, 1, 2) + F.max_pool2d(-side, 5, 1, 2)
        distance = sum((window(g) - g.flatten(2)).square() for g in guide.split(1, 1))
        weight = torch.exp(-200 * distance) * edge.flatten(2)  # [B, 121, h w]
    return (weight * (window(s) - s.flatten(2)).abs()).sum() / edge.sum().clamp(min=1)


def cue_loss(
    thetas: list[Tensor], guides: list[Tensor], hard: float, power: float, gamma: float
) -> Tensor:
    """L_sce = L_pcl-sd + gamma L_btm of every scale + L_sc, the mean square of the difference
    between a photo's map and the map of the scaled photo (D9)."""
    loss = sum(
        distilling_loss(theta, hard, power) + gamma * btm_loss(theta, guide)
        for theta, guide in zip(thetas, guides)
    )
    s, *scaled = (torch.sigmoid(theta.float()) for theta in thetas)
    return loss + sum(F.mse_loss(s, resize(other, s)) for other in scaled)


def iou_loss(y: Tensor, g: Tensor) -> Tensor:
    """1 - sum(p g) / sum(p + g - p g) of the logit y and the label g, mean over the images."""
    p = torch.sigmoid(y.float())
    both = (p * g).sum((1, 2, 3))
    return (1 - both / ((p + g - p * g).sum((1, 2, 3)) + 1e-7)).mean()


LABEL_LOSSES = {
    "iou": iou_loss,
    "bce": F.binary_cross_entropy_with_logits,
    "iou+bce": lambda y, g: iou_loss(y, g) + F.binary_cross_entropy_with_logits(y, g),
}


def detector_loss(logits: list[list[Tensor]], g: Tensor, kind: str, aux: list[float]) -> Tensor:
    """The label loss of all four heads, that of the second scale by half, and L_ms: the output of
    the second scale shall equal that of the first, which stays. logits: of `Detector`; g of 0, 1.
    """
    loss = 0
    for share, heads in zip((1, 0.5), logits):
        target = F.interpolate(g, heads[0].shape[2:])  # nearest
        loss += share * sum(
            weight * LABEL_LOSSES[kind](y, target) for weight, y in zip((1, *aux), heads)
        )
    for heads in logits[1:]:
        first = torch.sigmoid(resize(logits[0][0].detach(), heads[0], corners=False))
        loss += F.mse_loss(torch.sigmoid(heads[0]), first)
    return loss


# ---- Training ------------------------------------------------------------------------------------
def make_net(
    stage: int, args: argparse.Namespace, weights: str | None, adapter: bool = False
) -> nn.Module:
    """The network of a stage, on the device; `weights` as for `backbone`."""

    def encoder(pixels: str) -> nn.Module:
        return backbone(args.backbone, weights, pixels, args.bn == "stored", borders=args.borders)

    net = (
        CueExtractor(encoder(args.pixels), args.sign, adapter, args.released)
        if stage == 1
        else Detector(
            encoder(args.pixels), encoder("unit" if args.bn == "batch" else args.pixels), args.width
        )
    )  # D7
    if adapter and not args.released:
        net.adapter.conv.padding_mode = "replicate"  # D12
    net = net.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        net.compile()
    return net


def adapt(net: CueExtractor, args: argparse.Namespace) -> None:
    """Give `net` the base's weights and freeze all of it but its adapter, which starts anew."""
    new = {key: value for key, value in net.state_dict().items() if key.startswith("adapter.")}
    path = args.base / "stage1" / "last.pt"
    runtime.load_state(net, runtime.load_checkpoint(path, METHOD, 1)["model"] | new, path)
    net.requires_grad_(False)
    net.adapter.requires_grad_(True)
    if not args.released:
        nn.init.constant_(net.adapter.gate.bias, -4)  # D12: a gate of 0.02, so F^ begins as T(F)


def train(stage: int, args: argparse.Namespace) -> nn.Module:
    """Train one stage, from its backbone's weights, from the base, or, with --resume, last.pt."""
    world, folder, epochs = args.world, args.out / f"stage{stage}", args.epochs[stage - 1]
    dataset = open_set(args.data, args.data_root, masks=False)
    labels = read_labels(dataset.names, args, folder) if stage == 2 else None
    torch.manual_seed(args.seed)
    adapting = stage == 1 and args.transfer is not None
    net = make_net(stage, args, "none" if adapting else args.backbone_weights, adapting)
    if adapting:
        adapt(net, args)
    parts = {
        inside: [
            p
            for name, p in net.named_parameters()
            if p.requires_grad and name.startswith("encoders.") == inside
        ]
        for inside in (False, True)
    }
    optimiser = torch.optim.SGD(
        [{"params": parts[False], "scale": 1.0}, {"params": parts[True], "scale": 0.1}],
        momentum=0.9,
        weight_decay=5e-4 if stage == 1 else 0,
    )
    bank = Bank(dataset, args.size, args.device, folder, parts=("image", "modality"))
    flags = harness.plain_flags(args, bank.names)
    flags |= {"epochs": epochs, "lr": args.lr[stage - 1]}
    done = harness.resume(folder, METHOD, stage, flags, net, optimiser, labels)
    harness.save_args(flags, args, folder)
    log, watch = runtime.Log(folder, epochs, done, quiet=not world.main), harness.Watch(args)
    for epoch in range(done + 1, epochs + 1):
        if stage == 2:
            net.encoders.requires_grad_(epoch > 1)  # not in the paper; released code
        net.train()  # but an encoder with stored statistics keeps them (D7)
        loss, images = train_epoch(stage, world.parallel(net), optimiser, bank, labels, epoch, args)
        runtime.require_finite(loss, epoch)
        world.average_statistics(net)  # D11
        logit, picture = partial(forward, net, args=args), folder / "vis" / f"epoch_{epoch:03d}.png"
        seen = {"mirror": harness.mirror(logit, bank)} if stage == 1 else {}
        seen |= watch(logit, picture)
        log.epoch(epoch, images, loss=loss, lr=optimiser.param_groups[0]["lr"], **seen)
        if world.main:
            harness.save(folder, METHOD, stage, epoch, flags, net, optimiser, labels)
        world.barrier()
    if stage == 2 and world.main:  # Tables 6 to 8 score them: python -m common.metrics
        for name, label in zip(dataset.names, labels.pixels):
            save_png(args.out / "rectified" / f"{name}.png", label[0].cpu())
    return net


def curriculum(time: float, args: argparse.Namespace) -> tuple[float, float]:
    """Stage 1's p, below which |S - 0.5| is hard, and power after `time` epochs, a fraction."""
    ec, et = int(time) + 1 if args.released else time, args.epochs[0]  # D1
    hard = max(0.0, 0.2 - 0.6 * ec / et) if args.pcl == "on" else 0.0
    return hard, 2 ** (1 - (ec - args.released) / et) if args.power == "annealed" else 1.0


def rate(stage: int, time: float, args: argparse.Namespace) -> float:
    """Learning rate after `time` epochs, a fraction."""
    falling = stage == 1 or args.released  # D4
    return args.lr[stage - 1] * (1 - 0.8 * falling * time / args.epochs[stage - 1])


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
    rectifying = stage == 2 and epoch > 1 and args.spr != [0, 0, 1]
    draw = generator("cpu", args.seed, "side", epoch)
    for index, flip in progress(
        batches(order, batch, args.seed, epoch, world),
        f"stage {stage} epoch {epoch}",
        len(order) // batch,
    ):
        time = epoch - 1 + steps * batch / len(order)
        for group in optimiser.param_groups:
            group["lr"] = rate(stage, time, args) * group["scale"]
        pair, has = read_pair(bank, index, flip)  # [B, 6, S, S], [B]
        scales = [pair]
        if args.multi_scale == "on":
            share = SIDES[torch.randint(len(SIDES), (), generator=draw)]
            side = max(64, round(share * args.size / 32) * 32)
            scales += [F.interpolate(pair, (side, side), mode="bilinear", align_corners=True)]
        with autocast(args.device, args.amp):
            out = net(*scales)
        if stage == 1:
            loss = cue_loss(
                out, [guide(pair, has) for pair in scales], *curriculum(time, args), args.gamma
            )
        else:
            g = labels.read(index, flip)
            loss = detector_loss(out, (g > 0.5).float(), args.loss, args.aux)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if rectifying:
            s = torch.sigmoid(out[0][0].detach().float())
            labels.write(index, flip, rectify(pair[:, :3], s, g, args.spr, args.released))
        total, steps = total + loss.detach(), steps + 1
        if args.dry_run and steps == 2:
            break
    if rectifying:
        labels.share(order[: steps * batch], batch, world)
    return sum(world.gather(float(total) / steps)) / world.size, steps * batch


def read_pair(bank: Bank, index: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Photo and modality [B, 6, S, S], and which photos have a modality [B]. A photo without one
    stands in for it."""
    image, modality = bank.images(index, flip), bank.read("modality", index, flip)
    has = bank.has["modality"][index].to(image.device, non_blocking=True)
    return torch.cat([image, torch.where(has.view(-1, 1, 1, 1), modality, image)], 1), has


def guide(pair: Tensor, has: Tensor) -> Tensor:
    """What L_btm compares: the photo in ImageNet's units, and the modality, 0 where there is none.
    [B, 6, H, W] -> [B, 6, H, W]"""
    photo = [
        (x - mean) / spread for x, mean, spread in zip(pair[:, :3].split(1, 1), *PIXELS["imagenet"])
    ]
    return torch.cat([*photo, pair[:, 3:] * has.view(-1, 1, 1, 1)], 1)


# ---- Pseudo labels -------------------------------------------------------------------------------
def otsu(prob: Tensor) -> Tensor:
    """Otsu's threshold on a map in 8 bits: what lies above it. [B, 1, H, W] -> bool, the same"""
    grey = (prob * 255).round().long()  # [B, 1, H, W]
    hits = torch.zeros(len(prob), 256, device=prob.device)
    hits.scatter_add_(1, grey.flatten(1), torch.ones_like(prob).flatten(1))
    below, mass = hits.cumsum(1), (hits * torch.arange(256.0, device=prob.device)).cumsum(1)
    count, all_mass = below[:, -1:], mass[:, -1:]
    between = (mass * count - below * all_mass).square() / (below * (count - below)).clamp(min=1)
    return grey > between.argmax(1).view(-1, 1, 1, 1)


def refine(image: Tensor, theta: Tensor, args: argparse.Namespace) -> Tensor:
    """Pseudo labels of maps: Otsu's threshold, CRF, median filter. -> [B, 1, H, W] of 0 and 1"""
    prob = torch.sigmoid(theta.float())
    side = image.shape[-1] / 320  # sxy is for photos of about 320 pixels
    prob = hard_unary(otsu(prob) if args.threshold == "otsu" else prob > 0.5)
    prob = dense_crf(image * 255, prob, args.sxy * side, args.srgb)
    return median_filter((prob > 0.5).float(), 7)


def label_logit(net: nn.Module, pair: Tensor, args: argparse.Namespace) -> Tensor:
    """Pseudo labels as logits, so that they are resized and scored like any prediction."""
    return torch.logit(refine(pair[:, :3], forward(net, pair, args), args), 1e-6)


@torch.no_grad()
def make_labels(net: nn.Module, args: argparse.Namespace) -> None:
    """Write <out>/pseudo/<name>.png (0 or 255, the photo's size) for every training photo."""
    dataset = open_set(args.data, args.data_root, masks=False)
    for samples, pairs in harness.batches_of(dataset, args, "pseudo labels"):
        for sample, logit in zip(samples, label_logit(net, pairs, args)):
            pixels = (harness.at_size(logit, sample) > 0.5).byte().cpu() * 255
            save_png(args.out / "pseudo" / f"{sample['name']}.png", pixels)
    args.world.barrier()


def read_labels(names: list[str], args: argparse.Namespace, folder: Path) -> MapBank:
    """The label bank of stage 2, from stage 1's files."""
    home = args.labels or args.out / "pseudo"
    paths = [home / f"{name}.png" for name in names]
    if args.dry_run:  # stage 1 made only a few
        paths = [p if p.exists() else next(home.glob("**/*.png"), p) for p in paths]
    missing = [path for path in paths if not path.exists()]
    if missing:
        where = (
            f"--transfer {args.transfer} --out {args.base}"
            if args.transfer
            else f"--data {args.data} --out {args.out}"
        )
        raise UserError(
            f"{len(missing)} of {len(paths)} pseudo labels are missing ({missing[0]}); "
            f"make them: python unified_usod.py --stage 1 {where}, or name --labels"
        )
    return MapBank(lambda i: load_mask(paths[i]), len(paths), args.size, args.device, folder)


NEIGHBOURS = [
    (i * d, j * d)
    for d in (1, 2, 4, 8)  # 32 pairs (down, right)
    for i in (-1, 0, 1)
    for j in (-1, 0, 1)
    if i or j
]


def around(x: Tensor) -> list[Tensor]:
    """The neighbours of all pixels, borders repeated: [B, C, h, w] -> 32 views of that size."""
    (h, w), x = x.shape[2:], F.pad(x, (8,) * 4, mode="replicate")
    return [x[..., 8 + i : 8 + i + h, 8 + j : 8 + j + w] for i, j in NEIGHBOURS]


def pixel_refiner(image: Tensor, s: Tensor, iterations: int = 6) -> Tensor:
    """R_pri: PAR, the real-time pixel refiner of AFA (Ru et al., CVPR 2022), which the paper cites.

    image [B, 3, H, W], s [B, 1, H, W] in [0, 1] -> [B, 1, H, W]. Each iteration replaces a pixel by
    the weighted sum of its 32 neighbours; PAR's weights add up to 1.01, so that maps grow.
    """
    near = around(image)  # 32 small sums are faster than one over a stack of all
    mean = sum(near) / 32  # [B, 3, H, W]
    spread = (sum((x - mean).square() for x in near) / 31).sqrt() + 1e-8
    colour = [((x - image) / spread / 0.3).square().mean(1) for x in near]
    far = torch.tensor(NEIGHBOURS).float().norm(dim=1)  # [32] on the CPU
    place = torch.softmax(-(far / (far.std() + 1e-8) / 0.3).square(), 0).tolist()
    weights = torch.softmax(-torch.stack(colour, 1), 1).split(1, 1)  # 32 of [B, 1, H, W]
    weights = [weight + 0.01 * here for weight, here in zip(weights, place)]
    for _ in range(iterations):
        s = sum(x * weight for x, weight in zip(around(s), weights))  # [B, 1, H, W]
    return s


def rectify(
    image: Tensor, s: Tensor, g: Tensor, weights: list[float], released: bool = False
) -> Tensor:
    """SPR: G = l1 R_pri + l2 R_post + l3 G_pre, R_pri = PAR(image, s), R_post = s. [B, 1, H, W]"""
    prior = pixel_refiner(image, s)
    prior = prior / (prior.amax((2, 3), keepdim=True) if released else 1.01**6)  # D5
    g = weights[0] * prior + weights[1] * s + weights[2] * g
    return g / g.amax((2, 3), keepdim=True) if released else g


# ---- Evaluation and prediction -------------------------------------------------------------------
@torch.no_grad()
def forward(net: nn.Module, image: Tensor, args: argparse.Namespace) -> Tensor:
    """Saliency logit [B, 1, H, W] of either stage's network, in eval mode. image: [B, 6, H, W]"""
    net.eval()
    with autocast(args.device, args.amp):
        out = net(image)[0]
    return (out[0] if isinstance(out, list) else out).float()


def evaluate(
    stage: int, net: nn.Module, args: argparse.Namespace, suffix: str = ""
) -> harness.Results:
    """Scores of every --eval set: of the detector, or of stage 1's cue and pseudo label."""
    folder, logit = args.out / f"stage{stage}", partial(forward, net, args=args)
    if stage == 2:
        return harness.evaluate(logit, args, folder, suffix)
    once = argparse.Namespace(**{**vars(args), "crf": False})  # labels have been through the CRF
    return harness.evaluate(logit, args, folder, f"-cue{suffix}") | harness.evaluate(
        partial(label_logit, net, args=args), once, folder, f"-label{suffix}"
    )


def open_base(args: argparse.Namespace) -> None:
    """Transfer: take over what the base's checkpoint decides on, turn to the target's data."""
    args.base = harness.run_folder(args, METHOD)
    paths = [args.base / f"stage{stage}" / "last.pt" for stage in (1, 2)]
    for path in paths:
        if not path.exists():
            raise UserError(
                f"{path} is missing, the network to transfer; train it: python "
                f"unified_usod.py --data {args.data} --out {args.base}"
            )
    harness.restore(paths[0], METHOD, args, FIXED, FREE)
    harness.restore(paths[1], METHOD, args, ("width",), ())  # stage 1 has no use for it
    small = harness.is_shapes(args.data)
    args.data = TARGETS.get(args.transfer, (args.transfer,) * 2)[small]
    args.out = args.base / f"to-{Path(args.transfer).name}"


def zero_shot(args: argparse.Namespace) -> harness.Results:
    """Scores of the base's networks on the target's evaluation sets."""
    results = {}
    for stage in (1, 2):
        net, path = make_net(stage, args, "none"), args.base / f"stage{stage}" / "last.pt"
        runtime.load_state(net, runtime.load_checkpoint(path, METHOD, stage)["model"], path)
        results |= evaluate(stage, net, args, "-zero-shot")
    harness.save_results(results, args, args.out / "zero-shot")
    return results


def load(path: Path, args: argparse.Namespace) -> tuple[int, nn.Module]:
    """Network and stage of a checkpoint: ours, or the authors'."""
    saved = runtime.torch_load(path)
    if "method" not in saved and any(key.startswith("decoder.") for key in saved):
        stage, state = 1 + any(key.startswith("t_net.") for key in saved), from_released(saved)
        args.released, args.backbone, args.data = True, "resnet50", "+".join(list(PAPER_SETS)[:3])
        args.out = args.out or Path("runs", f"{METHOD}-released")
    else:
        saved = harness.restore(path, METHOD, args, FIXED, FREE)
        stage, state = saved["stage"], saved["model"]
        args.out = args.out or harness.run_of(path, ("stage1", "stage2"))
    fill_defaults(args)
    harness.prepare(args, METHOD)
    net = make_net(stage, args, "none", any(key.startswith("adapter.") for key in state))
    runtime.load_state(net, state, path)
    return stage, net


def from_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under our names, less what they built but never called: the gates'
    GroupNorms and the encoders' classifiers."""
    names = {
        "decoder.": "",
        "ad2.": "se3.",
        "ad3.": "se4.",
        "ad4.": "se5.",
        "fusion.": "se0.",
        "ad0.0": "conv",
        "ad0.1": "norm",
        ".se.conv": ".gate",
        "trans_rgb.": "laterals.0.",
        "trans_t.": "laterals.1.",
        "refine.ca.fus.": "gate.mlp.",
        "refine.score": "heads.0",
        "score_1": "heads.1",
        "score_2": "heads.2",
        "score_global": "heads.3",
        "ca1.fus.": "gate_before.mlp.",
        "ca2.fus.": "gate_level.mlp.",
        ".ca.fus.": ".gate.mlp.",
        ".fus.": ".fuse.",
        ".de_chan.": ".reduce.",
        ".conv1.": ".before.",
        ".conv_curfeat.": ".level.",
        ".conv_globalinfo.": ".context.",
        ".conv_out.": ".out.",
    } | {f".b{i}.": f".pools.{i}." for i in range(4)}
    names |= {
        f"gfb{level + 1}_{chain + 1}.": f"chains.{chain}.{level}."
        for level in range(4)
        for chain in range(2)
    }
    two, renamed = any(key.startswith("t_net.") for key in state), {}
    for key, value in state.items():
        if key.startswith(("encoder.fc.", "t_net.fc.")) or ".se.gn." in key:
            continue
        if key.startswith(("encoder.", "t_net.")):
            key = key.replace("encoder.", "encoders.0.") if two else key
            key = key.replace("t_net.", "encoders.1.")
        else:
            for theirs, ours in names.items():
                key = key.replace(theirs, ours)
        renamed[key] = value
    return renamed


# ---- Main ----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    """Train the stages asked for, in order; or evaluate or predict with a checkpoint."""
    args = build_parser().parse_args(argv)
    if args.weights and args.transfer:
        raise UserError("--transfer starts from a run: give its folder, --out, and no --weights")
    if args.weights or args.predict:
        run = harness.run_folder(args, METHOD)
        if args.transfer:
            run = args.out = run / f"to-{Path(args.transfer).name}"
        args.weights = args.weights or run / f"stage{args.stage or 2}" / "last.pt"
        stage, net = load(args.weights, args)
        if args.predict:
            harness.predict(lambda pairs: forward(net, pairs, args), args)
        else:
            harness.save_results(evaluate(stage, net, args), args, args.out / f"stage{stage}")
        return
    if args.transfer:
        open_base(args)
    fill_defaults(args)
    harness.prepare(args, METHOD)
    results = {}
    if args.transfer:
        open_set(args.data, args.data_root, masks=False)  # missing? Say so before hours of scoring
        results = zero_shot(args)
    for stage in (1, 2) if args.stage is None else (int(args.stage),):
        net = train(stage, args)
        if stage == 1:
            make_labels(net, args)
        results |= evaluate(stage, net, args)
        harness.save_results(results, args, args.out / f"stage{stage}")
    harness.gallery(["stage1/pred/{}-cue", "stage1/pred/{}-label", "stage2/pred/{}"], args)


if __name__ == "__main__":
    runtime.cli(main)

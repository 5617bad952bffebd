"""Unified USOD: salient objects in photos, RGB-D, RGB-T, video and aerial images without a mask.

Yuan, Liu, Gao, Dai, Qin: "Unified Unsupervised Salient Object Detection via Knowledge Transfer",
IJCAI 2024 (arXiv 2404.14759).

Stage 1 takes the activation map of A2S from a frozen network that was pretrained without labels and
pushes its pixels towards 0 or 1, the clear ones first and the undecided ones later (progressive
curriculum). Near the map's boundary, pixels of similar colour, depth or heat are pulled to similar
saliency, and a photo at another scale is pulled to the same map. Otsu's threshold, a dense CRF and
a median filter turn the maps into pseudo labels. Stage 2 trains a two-stream detector on the labels
of all tasks together. While it learns, it corrects the labels with its own prediction and with that
prediction aligned to the photo's edges (self-rectify pseudo-label refinement, SPR). --transfer
carries stage 1 to video or remote sensing: only an adapter beside its deepest block is trained.

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
    python unified_usod.py --data photos/ --explain photo.jpg  # the method at work, step by step
    torchrun --nproc_per_node=4 unified_usod.py --data DUTS-TR+RGBD-TR+VT5000-TR

Results. The paper (MoCo v2 ResNet-50, RTX 3090) reports F / MAE on ECSSD .923 / .038, NJUD .876 /
.049, VT5000 .843 / .038, and, carried over, DAVIS .793 / .030. Ours at that size: not run. At small
scale: docs/unified_usod.md.

Departures. The paper is the default. Where it is silent, the released code is followed, but for the
sign, BatchNorm and L_ms of D6, D7 and D13. --released follows that code in these, too, and where it
contradicts the paper. docs/unified_usod.md explains every departure; D1 to D14 mark their places
here.

Shapes: B batch, H W input size, h w feature size. Images and modalities are in [0, 1].
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import flags, harness, runtime
from common.backbones import PIXELS, Pyramid, backbone
from common.bank import Bank, MapBank
from common.crf import dense_crf, hard_unary, median_filter
from common.datasets import load_mask
from common.explain import one_photo, panels, stretched
from common.flags import Schedule, Settings
from common.published import unified_state
from common.run import Run, claim
from common.runtime import UserError, autocast, generator, save_png

METHOD = "unified_usod"
PAPER = {
    "stage1": Schedule(epochs=20, lr=0.1),
    "stage2": Schedule(epochs=10, lr=0.005),
    "batch_size": 8,
    "size": 320,
    "width": 1.0,
    "backbone": "resnet50",
    "sxy": 50.0,
    "srgb": 5.0,
    "spr": None,  # see `complete`
}
SHAPES = {
    "stage1": Schedule(epochs=1, lr=0.1),
    "stage2": Schedule(epochs=3, lr=0.02),
    "batch_size": 8,
    "size": 128,
    "width": 0.125,
    "backbone": "tiny",
    "sxy": 100.0,
    "srgb": 20.0,
    "spr": None,
}
SMALL = {  # your own photos; labels stay as they are, since SPR needs long epochs
    "stage1": Schedule(epochs=3, lr=0.1),
    "stage2": Schedule(epochs=9, lr=0.005),
    "batch_size": 8,
    "size": 160,
    "width": 0.25,
    "backbone": "mobilenet_v2",
    "sxy": 50.0,
    "srgb": 5.0,
    "spr": [0, 0, 1],
}
PRESETS = {"paper": PAPER, "shapes": SHAPES, "small": SMALL}
PAPER_SETS = {  # what Tables 1 to 5 evaluate, by training set
    "DUTS-TR": ["DUT-OMRON", "DUTS-TE", "ECSSD", "HKU-IS", "PASCAL-S"],
    "VT5000-TR": ["VT5000-TE", "VT1000", "VT821"],
    "RGBD-TR": ["RGBD135", "NJUD", "NLPR", "SIP"],
    "VSOD-TR": ["DAVSOD", "DAVIS", "SegV2", "FBMS"],
    "RSSD-TR": ["ORSSD", "EORSSD"],
    "ORSSD-TR": ["ORSSD"],
    "EORSSD-TR": ["EORSSD"],
}
TARGETS = {  # what --transfer trains on
    "video": {"paper": "VSOD-TR", "released": "VSOD-TR", "shapes": "shapes-video"},
    # The released code takes a larger set, RSSD-TR, than the paper (D14).
    "rsi": {"paper": "ORSSD-TR+EORSSD-TR", "released": "RSSD-TR", "shapes": "shapes-top"},
}


# ---- Config --------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """All flags. A default of None is the value of the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python unified_usod.py --data photos/                  learn a folder of photos\n"
        "  python unified_usod.py --data photos/ --predict new/   map others with that detector\n"
        "The docstring of this file explains the method, docs/unified_usod.md D1 to D14.",
    )
    flags.add_flags(parser, PRESETS)
    parser.set_defaults(data="shapes+shapes-depth+shapes-thermal", pairs=True)
    method = parser.add_argument_group("method")
    add = method.add_argument
    add("--stage", choices=("1", "2"), help="one stage only [1, then 2]")
    text = "carry the run folder's networks to video, rsi, or any set; compare with zero-shot"
    add("--transfer", metavar="TASK", help=text)
    add("--released", action="store_true", help="the authors' code (D1 to D7, D13, D14)")
    add("--bn", choices=("stored", "batch"), help="statistics of BatchNorm, see D7 [stored]")
    add("--sign", choices=("corners", "area"), default="corners", help="of theta [corners]")
    add("--pcl", choices=("on", "off"), help="undecided pixels come later, see D3 [on]")
    add("--power", choices=("linear", "annealed"), help="of L_pcl-sd, see D2 [linear]")
    add("--gamma", type=float, default=0.05, help="weight of L_btm [0.05]")
    add("--multi-scale", choices=("on", "off"), default="on", help="use L_sc and L_ms [on]")
    add("--threshold", choices=("otsu", "fixed"), help="before the CRF; fixed: 0.5 [otsu]")
    add("--sxy", type=float, help="CRF: reach in a photo of 320 pixels [50; shapes 100]")
    add("--srgb", type=float, help="CRF: tolerance in grey levels [5; shapes 20]")
    add(
        "--width", type=float, help="share of the detector's channels [1; shapes 0.125; small 0.25]"
    )
    losses = ("iou", "bce", "iou+bce")
    add("--loss", choices=losses, default="iou", help="of stage 2's labels, Table 8 [iou]")
    three = {"type": float, "nargs": 3, "metavar": "W"}
    text = "loss weights of the heads of photo chain, modality chain, global map [0.2 0 0]"
    add("--aux", **three, default=[0.2, 0, 0], help=text)
    text = "SPR's weights of prior, posterior, previous label, Table 7; 0 0 1 corrects nothing "
    usual = "[0.2 0.6 0.2; with --released: 0.1 0.7 0.2; small: 0 0 1]"
    add("--spr", **three, help=text + usual)
    text = "for stage 2, the pseudo labels of another run [<out>/pseudo]"
    add("--labels", type=Path, metavar="DIR", help=text)
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with a value for each, that of the preset where none was given."""
    args = flags.completed(args, PRESETS)
    released = args.released
    spr = args.spr or ([0.1, 0.7, 0.2] if released else [0.2, 0.6, 0.2])  # code or paper (D5)
    if min(spr) < 0 or abs(sum(spr) - 1) > 1e-6:
        raise UserError(f"--spr {' '.join(map(str, spr))}: the three weights have to add up to 1")
    if args.size < 32:
        raise UserError(f"--size {args.size} leaves nothing of the deepest map; at least 32")

    # The sets that the paper scores on, for each part of a joint training set.
    usual = []
    for part in args.data.split("+"):
        name = part.split("@")[0]
        if flags.is_shapes(args.data):
            usual.append(f"{name.removesuffix('-test')}-test")
        else:
            usual += PAPER_SETS.get(name, [])

    weights = args.backbone_weights
    if args.backbone == "resnet50" and weights is None:
        weights = "moco200"

    # The released code takes BatchNorm's statistics from the batch (D7), has no curriculum in
    # transfer (D3), and an exponent of L_pcl-sd that falls from 2 (D2).
    return flags.replaced(
        args,
        spr=spr,
        backbone_weights=weights,
        threshold=args.threshold or "otsu",
        bn=args.bn or ("batch" if released else "stored"),
        pcl=args.pcl or ("off" if released and args.transfer else "on"),
        power=args.power or ("annealed" if released else "linear"),
        eval=flags.evaluation_sets(args, usual),
    )


# Flags that describe a trained network, and flags that are those of its training unless given.
FIXED = ["backbone", "pixels", "borders", "sign", "width", "released"]
FREE = ["size", "sxy", "srgb", "backbone_weights", "threshold", "bn"]


def retargeted(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of a transfer: those of the run in the run folder, and the target's data.

    Raises `UserError` if that run has not finished both stages.
    """
    base = flags.run_folder(args, METHOD)
    parser = build_parser()
    kept = {
        1: ([*FIXED, "data"], FREE),
        2: (["width"], []),
    }  # stage 1 has no use for the detector's width
    for stage, (fixed, free) in kept.items():
        path = base / f"stage{stage}" / "last.pt"
        if not path.exists():
            raise UserError(
                f"{path} is missing, the network to transfer; train it: python unified_usod.py "
                f"--data {args.data} --out {base}"
            )
        saved = runtime.load_checkpoint(path, METHOD, stage)
        args = flags.saved_flags(parser, args, saved, path, fixed, free)

    data = args.transfer
    if data in TARGETS:
        kind = "released" if args.released else "paper"
        data = TARGETS[data]["shapes" if flags.is_shapes(args.data) else kind]
    return flags.replaced(args, base=base, data=data, out=target_folder(base, args.transfer))


def target_folder(base: Path, task: str) -> Path:
    """Where a transfer writes: below the run folder that it starts from."""
    return base / f"to-{Path(task).name}"


# ---- Model: stage 1 ------------------------------------------------------------------------------
class SEBlock(nn.Module):
    """The block of A2S: convolution, GroupNorm, ReLU, channel gate."""

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


def corner_sign(theta: Tensor) -> Tensor:
    """-1 where two or more of the four corners are positive, else +1. -> [B, 1, 1, 1]"""
    h, w = theta.shape[2:]
    corners = theta[:, :, :: h - 1, :: w - 1]  # first and last row and column [B, 1, 2, 2]
    positive = (corners > 0).sum((2, 3), keepdim=True)
    return torch.where(positive >= 2, -1.0, 1.0)


def area_sign(theta: Tensor) -> Tensor:
    """A2S's rule: -1 where more than half of the pixels are positive, else +1. -> [B, 1, 1, 1]"""
    share = (theta >= 0).float().mean((2, 3), keepdim=True)
    return torch.where(share > 0.5, -1.0, 1.0)


SIGNS = {"corners": corner_sign, "area": area_sign}


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
        self.encoder = encoder.requires_grad_(False)
        self.sign = SIGNS[sign]
        self.released = released
        _, _, c3, c4, c5 = encoder.channels
        self.se3 = SEBlock(c3)
        self.se4 = SEBlock(c4)
        self.se5 = SEBlock(c5)  # T
        self.se0 = SEBlock(3 * 64)
        self.adapter = SEBlock(c5) if adapter else None  # Ta
        if adapter and not released:
            self.adapter.conv.padding_mode = "replicate"  # in the released code zeros (D12)

    def activation(self, image: Tensor) -> Tensor:
        """theta, A2S's decision value of every pixel: [B, 3, H, W] -> [B, 1, H/4, W/4]"""
        with torch.no_grad():
            _, e2, e3, e4, e5 = self.encoder(image)
        f3 = self.se3(e3)  # [B, 64, H/8, W/8]
        f4 = self.se4(e4)  # [B, 64, H/16, W/16]
        f5 = self.se5(e5)  # [B, 64, H/32, W/32]
        if self.adapter is not None:
            f5 = f5 + self.adapter(e5)  # Eq. 9

        # One map, less its mean: A2S's adaptive decision boundary. The sum of 64 needs fp32.
        f = self.se0(torch.cat([resize(f3, e2), resize(f4, e2), resize(f5, e2)], 1))
        m = f.float().sum(1, keepdim=True)  # [B, 1, H/4, W/4]
        return m - m.mean((2, 3), keepdim=True)

    def forward(self, *images: Tensor) -> list[Tensor]:
        """The same photos at one or more sizes [B, 3 or 6, H, W] -> theta of each [B, 1, H, W].

        Positive is salient. Of 6 channels the first three are the photo.
        """
        thetas = [self.activation(image[:, :3]) for image in images]

        # The first size decides which side is the object. In the released code each size decides
        # for itself, and the two can disagree (D6).
        sign = self.sign(thetas[0])
        signed = []
        for theta, image in zip(thetas, images):
            if self.released:
                sign = self.sign(theta)
            signed.append(resize(sign * theta, image))
        return signed


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
        """[B, channels, h, w] -> the same"""
        mean = x.mean((2, 3), keepdim=True)  # [B, channels, 1, 1]
        peak = x.amax((2, 3), keepdim=True)
        gate = torch.sigmoid(self.mlp(mean) + self.mlp(peak))
        return x * gate


class GlobalInfo(nn.Module):
    """The deepest maps of both streams, pooled to 13, 9, 5 and 1 cells a side and joined again."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.gate = ChannelGate(before)
        self.reduce = conv(before, after // 2)
        self.pools = nn.ModuleList()
        for cells in (13, 9, 5, 1):
            pool = nn.AdaptiveMaxPool2d(cells)
            mix = nn.Conv2d(after // 2, after // 4, 1, bias=False)
            self.pools.append(nn.Sequential(pool, mix, nn.ReLU()))
        self.fuse = conv(after // 2 + 4 * (after // 4), after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, h, w]"""
        x = self.reduce(self.gate(x))
        pooled = [resize(pool(x), x) for pool in self.pools]
        return self.fuse(torch.cat([*pooled, x], 1))


class Fusion(nn.Module):
    """One level of a decoding chain: what came before, the level's own map, and the global map."""

    def __init__(self, before: int, level: int, context: int, inner: int):
        super().__init__()
        self.gate_before = ChannelGate(2 * before)
        self.before = conv(2 * before, inner)
        self.gate_level = ChannelGate(level)
        self.level = conv(level, inner)
        self.context = conv(context, inner)
        self.out = conv(inner, level)

    def forward(self, own: Tensor, other: Tensor, level: Tensor, context: Tensor) -> Tensor:
        """Two chains' maps of the level below, [B, before, h/2, w/2] -> [B, level, h, w]"""
        before = resize(self.gate_before(torch.cat([own, other], 1)), level)
        before = self.before(before)  # [B, inner, h, w], like the next two
        here = self.level(self.gate_level(level))
        everywhere = self.context(resize(context, level))
        return self.out(before + here + everywhere)


class Detector(nn.Module):
    r"""Stage 2, the SD: two encoders, and two chains that decode photo and modality together.

    The network is MIDD (Tu et al., "Multi-interactive Dual-decoder", IEEE TIP 2021).
    P1 ... P5 and M1 ... M5 are the levels of photo and modality, C is the global map of P5 and M5.
    A `Fusion` makes each of a4 ... a1 and b4 ... b1: of the two maps on its left, of the level
    above or below it, and of C.

        photo        P5         P4        P3        P2        P1
                                 |         |         |         |
        chain 1      C, M5 ---> a4 -----> a3 -----> a2 -----> a1 --> head 1
                                   \ /       \ /       \ /       \
                                    X         X         X         +--> head 0: S
                                   / \       / \       / \       /
        chain 2      C, P5 ---> b4 -----> b3 -----> b2 -----> b1 --> head 2
                                 |         |         |         |
        modality     M5         M4        M3        M2        M1           C --> head 3

    width: share of MIDD's channels.
    """

    def __init__(self, rgb: Pyramid, modality: Pyramid, width: float = 1.0):
        super().__init__()
        c1 = rgb.channels[0]  # level 1 keeps its channels
        c2, c3, c4, c5 = [4 * max(1, round(width * c / 4)) for c in (128, 256, 512, 512)]

        def laterals(encoder: Pyramid) -> nn.ModuleList:
            channels = zip(encoder.channels[1:], (c2, c3, c4, c5))
            return nn.ModuleList(conv(before, after, 1) for before, after in channels)

        def chain() -> nn.ModuleList:
            channels = ((c2, c1), (c3, c2), (c4, c3), (c5, c4))  # of the level below, of the level
            return nn.ModuleList(Fusion(below, level, c5, c2) for below, level in channels)

        # Two streams, the map that they share, two chains, and a head for each of four outputs.
        self.encoders = nn.ModuleList([rgb, modality])
        self.laterals = nn.ModuleList([laterals(rgb), laterals(modality)])
        self.global_info = GlobalInfo(2 * c5, c5)
        self.chains = nn.ModuleList([chain(), chain()])
        self.gate = ChannelGate(2 * c1)
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in (2 * c1, c1, c1, c5))

        # The start of what is not pretrained; the paper is silent, this is the released code's.
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("encoders."):
                nn.init.normal_(module.weight, std=0.01)

    def levels(self, stream: int, image: Tensor) -> list[Tensor]:
        """Five levels of one stream [B, 3, H, W]: at H/4 (after a pooling), H/4, H/8 ... H/32."""
        first, *rest = self.encoders[stream](image)
        levels = [F.max_pool2d(first, 3, 2, 1)]
        for lateral, e in zip(self.laterals[stream], rest):
            levels.append(lateral(e))
        return levels

    def decode(self, pair: Tensor) -> list[Tensor]:
        """Photo and modality [B, 6, H, W] -> logits of the output and of both chains
        [B, 1, H/4, W/4], and of the global map [B, 1, H/32, W/32]."""
        photo, modality = pair.split(3, 1)
        p = self.levels(0, photo)
        m = self.levels(1, modality)
        context = self.global_info(torch.cat([p[4], m[4]], 1))  # C

        # From coarse to fine; index 3 is level 4.
        chain_a, chain_b = self.chains
        a = chain_a[3](context, m[4], p[3], context)
        b = chain_b[3](context, p[4], m[3], context)
        for i in (2, 1, 0):
            finer_a = chain_a[i](a, b, p[i], context)
            finer_b = chain_b[i](b, a, m[i], context)
            a, b = finer_a, finer_b

        # Heads 0 to 3: both chains together (the output S), chain 1, chain 2, the global map.
        both = self.gate(torch.cat([a, b], 1))
        return [head(x).float() for head, x in zip(self.heads, (both, a, b, context))]

    def forward(self, *pairs: Tensor) -> list[list[Tensor]]:
        """The four logits of `decode`, of the same photos at one or more sizes, at these sizes."""
        return [[resize(y, pair, corners=False) for y in self.decode(pair)] for pair in pairs]


# ---- Losses --------------------------------------------------------------------------------------
def distilling_loss(theta: Tensor, p: float = 0.0, k: float = 1.0) -> Tensor:
    """L_pcl-sd = mean(M (0.5^k - |S - 0.5|^k)), S = sigmoid(theta), M = 0 where |S - 0.5| < p.

    theta [B, 1, H, W]. With k = 1 it is Eq. 4, 0.5 - mean|M S - 0.5|; the released code's k falls
    from 2 (D2).
    """
    d = (torch.sigmoid(theta.float()) - 0.5).abs()
    easy = d.detach() >= p  # M of Eq. 2
    return (easy * (0.5**k - d**k)).mean()


def quarter(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H/4, W/4]"""
    return F.interpolate(x, scale_factor=0.25, mode="bilinear", align_corners=True)


def boundary(s: Tensor) -> Tensor:
    """Where s > 0.5 begins and ends, the 5 x 5 dilation less the erosion: 0 and 1 [B, 1, h, w]."""
    # A maximum over a window dilates, and the negative maximum of the negative map erodes.
    salient = (s > 0.5).float()
    dilated = F.max_pool2d(salient, 5, 1, 2)
    eroded = -F.max_pool2d(-salient, 5, 1, 2)
    return dilated - eroded


def btm_loss(theta: Tensor, guide: Tensor) -> Tensor:
    """Eq. 11, boundary-aware texture matching: near the map's boundary, pixels of similar texture
    get similar saliency.

    theta [B, 1, H, W]; guide [B, C, H, W]: photo and modality, concatenated; a missing modality is
    all zeros. At a quarter of the size, mean over the `boundary` of
    sum_j exp(-200 |g_i - g_j|^2) |S_i - S_j|, j in the 11 x 11 window; without a boundary it is 0,
    in the released code not a number (D10). Each process takes the mean over its own (D11).
    """

    def window(x: Tensor) -> Tensor:  # [B, 1, h, w] -> [B, 121, h w]
        return F.unfold(x, 11, padding=5)

    s = quarter(torch.sigmoid(theta.float()))
    guide = quarter(guide.float())
    with torch.no_grad():
        edge = boundary(s)  # [B, 1, h, w]
        distance = sum((window(g) - g.flatten(2)).square() for g in guide.split(1, 1))
        weight = torch.exp(-200 * distance) * edge.flatten(2)  # [B, 121, h w]
    difference = (window(s) - s.flatten(2)).abs()
    return (weight * difference).sum() / edge.sum().clamp(min=1)


def cue_loss(
    thetas: list[Tensor], guides: list[Tensor], p: float, k: float, gamma: float
) -> Tensor:
    """Eq. 13: L_sce = L_pcl-sd + gamma L_btm, of every scale, + L_sc.

    L_sc (Eq. 12) is the mean square of the difference between a photo's map and that of the scaled
    photo, for which the paper writes a norm (D9). thetas, guides: of one or two scales, see
    `distilling_loss` and `btm_loss`.
    """
    loss = 0
    for theta, guide in zip(thetas, guides):
        loss = loss + (distilling_loss(theta, p, k) + gamma * btm_loss(theta, guide))

    # L_sc compares at the first size.
    s, *scaled = [torch.sigmoid(theta.float()) for theta in thetas]
    for other in scaled:
        loss = loss + F.mse_loss(s, resize(other, s))
    return loss


def iou_loss(y: Tensor, g: Tensor) -> Tensor:
    """Eq. 14: 1 - sum(p g) / sum(p + g - p g) of the logit y and the label g, mean over images."""
    p = torch.sigmoid(y.float())
    both = (p * g).sum((1, 2, 3))
    either = (p + g - p * g).sum((1, 2, 3))
    return (1 - both / (either + 1e-7)).mean()


def label_loss(y: Tensor, g: Tensor, kind: str) -> Tensor:
    """The loss of a logit and a label, rows of Table 8: "iou", "bce", or "iou+bce", their sum."""
    loss = 0
    if "iou" in kind:
        loss = loss + iou_loss(y, g)
    if "bce" in kind:
        loss = loss + F.binary_cross_entropy_with_logits(y, g)
    return loss


def detector_loss(
    logits: list[list[Tensor]], g: Tensor, kind: str, aux: list[float], released: bool = False
) -> Tensor:
    """Eq. 15: the label loss of all four heads, that of the second scale by half, and L_ms.

    L_ms pulls the second scale's output towards the first's; no gradient flows into the first.
    logits: of `Detector`, at one or two scales. g: [B, 1, H, W] of 0 and 1. kind: see `label_loss`.
    aux: weights of the heads of photo chain, modality chain, global map.
    released: L_ms aligns the centres of the corner pixels, unlike all other resizing (D13).
    """
    # The label loss of every head, at the size of its scale.
    loss = 0
    for share, heads in zip((1, 0.5), logits):
        target = F.interpolate(g, heads[0].shape[2:])  # nearest
        of_scale = 0
        for weight, y in zip((1, *aux), heads):
            of_scale = of_scale + weight * label_loss(y, target, kind)
        loss = loss + share * of_scale

    # L_ms compares the outputs S of both scales, at the size of the second.
    for heads in logits[1:]:
        first = resize(logits[0][0].detach(), heads[0], corners=released)
        loss = loss + F.mse_loss(torch.sigmoid(heads[0]), torch.sigmoid(first))
    return loss


# ---- Training ------------------------------------------------------------------------------------
PARTS = ("image", "modality")  # what the bank holds of every photo


def make_net(
    stage: int, args: argparse.Namespace, weights: str | None, adapter: bool = False
) -> nn.Module:
    """The network of a stage as the flags describe it, on the CPU; `weights` as for `backbone`."""

    def encoder(pixels: str) -> Pyramid:
        return backbone(args.backbone, weights, pixels, args.bn == "stored", borders=args.borders)

    if stage == 1:
        return CueExtractor(encoder(args.pixels), args.sign, adapter, args.released)
    # The modality is normalised like a photo: BatchNorm's stored statistics fit no others (D7).
    modality_pixels = "unit" if args.released else args.pixels
    return Detector(encoder(args.pixels), encoder(modality_pixels), args.width)


def adapt(net: CueExtractor, path: Path) -> None:
    """Give `net` the weights of the checkpoint `path`, and freeze all but the new adapter."""
    # The checkpoint lacks the adapter, which keeps its random start.
    new = {key: value for key, value in net.state_dict().items() if key.startswith("adapter.")}
    trained = runtime.load_checkpoint(path, METHOD, 1)["model"]
    runtime.load_state(net, trained | new, path)
    net.requires_grad_(False)
    net.adapter.requires_grad_(True)

    # The gate starts at sigmoid(-4) = 0.02, so that F^ starts as T(F), not at random (D12).
    if not net.released:
        nn.init.constant_(net.adapter.gate.bias, -4)


def check_sizes(photos: int, stages: list[int], bn: str, settings: Settings) -> None:
    """Raise `UserError` where BatchNorm would meet a single value per channel in training.

    photos: how many are trained on. The deepest map has a 32nd of the photo's side.
    """
    batch = min(settings.batch_size, photos) // settings.world.size
    cells = math.ceil(settings.size / 32) ** 2
    if batch * cells == 1 and (2 in stages or bn == "batch"):
        raise UserError(
            f"one picture of {settings.size} x {settings.size} pixels at a time is too little for "
            "BatchNorm: give a larger --batch-size, more photos, or a larger --size"
        )


def make_optimiser(net: nn.Module, decay: float) -> torch.optim.Optimizer:
    """SGD of what requires a gradient; the encoders of stage 2 learn at a tenth of the rate."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    others = [p for name, p in trained if not name.startswith("encoders.")]
    encoders = [p for name, p in trained if name.startswith("encoders.")]
    groups = [{"params": others, "share": 1.0}, {"params": encoders, "share": 0.1}]
    fused = others[0].is_cuda  # one kernel for all parameters
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=decay, fused=fused)


def falling_rate(time: float, schedule: Schedule) -> float:
    """Learning rate after `time` epochs, a fraction: it falls linearly to a fifth."""
    return schedule.lr * (1 - 0.8 * time / schedule.epochs)


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of parameters its share of the learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["share"]


def curriculum(
    time: float, epochs: int, pcl: bool, annealed: bool, released: bool
) -> tuple[float, float]:
    """p, below which |S - 0.5| is undecided (Eq. 3), and the exponent k, after `time` epochs.

    pcl: False leaves no pixel out. annealed: k falls from 2 to nearly 1 (D2), else it is 1.
    """
    # Ec is a fraction. In the released code both count whole epochs, Ec from 1 (D1), k's from 0.
    ec = int(time) + 1 if released else time
    past = int(time) if released else time

    # p falls from 0.2 to 0 within the first third of the epochs.
    p = max(0.0, 0.2 - 0.6 * ec / epochs) if pcl else 0.0
    k = 2 ** (1 - past / epochs) if annealed else 1.0
    return p, k


SIDES = (0.6, 0.8, 1.2, 1.4)  # of the second scale: 192, 256, 384, 448 for 320


def second_scale(pair: Tensor, random: torch.Generator) -> Tensor:
    """The pair at another side, a multiple of 32 and at least 64. [B, 6, S, S] -> [B, 6, s, s]"""
    share = SIDES[torch.randint(len(SIDES), (), generator=random)]
    side = max(64, round(share * pair.shape[3] / 32) * 32)
    return F.interpolate(pair, (side, side), mode="bilinear", align_corners=True)


def train_cues(
    net: CueExtractor,
    settings: Settings,
    schedule: Schedule,
    pcl: bool,
    annealed: bool,
    gamma: float,
    two_scales: bool,
) -> None:
    """Stage 1: push every pixel of the map to 0 or 1, the clear ones first.

    Trains what requires a gradient: all blocks, or in transfer the adapter alone.
    pcl, annealed: see `curriculum`. gamma: weight of L_btm.
    """
    # Photos and modalities, without masks; and the run, which resumes, logs and writes last.pt.
    photos = settings.training_set(masks=False)
    bank = Bank(photos, settings.size, settings.device, settings.out / "stage1", parts=PARTS)
    optimiser = make_optimiser(net, decay=5e-4)
    run = Run(settings, 1, bank, net, optimiser, schedule, folder="stage1")
    logit = partial(saliency_logit, net, amp=settings.amp)
    watch = harness.Watch(settings, photos)

    for epoch in run.epochs():
        random = generator("cpu", settings.seed, "side", epoch)
        for index, flip in run.batches():
            lr = falling_rate(run.time, schedule)
            set_rate(optimiser, lr)
            p, k = curriculum(run.time, schedule.epochs, pcl, annealed, net.released)

            # The photos at one or two sizes, and what L_btm compares.
            pair, has = read_pair(bank, index, flip)  # [B, 6, S, S], [B]
            pairs = [pair, second_scale(pair, random)] if two_scales else [pair]
            guides = [guide(scaled, has) for scaled in pairs]

            # Forward, in half precision where the device has it.
            with autocast(settings.device, settings.amp):
                thetas = run.net(*pairs)  # [B, 1, S, S] and [B, 1, s, s]
            loss = cue_loss(thetas, guides, p, k, gamma)  # Eq. 13

            # Backward and step. The scaler does nothing unless the half precision is fp16.
            optimiser.zero_grad()
            run.scaler.scale(loss).backward()
            run.scaler.step(optimiser)
            run.scaler.update()
            run.add(loss=loss)

        # Do the maps follow the photo, or the place in the picture? A mirrored photo tells.
        mirror = harness.mirror(logit, bank)
        run.end_epoch(lr=lr, mirror=mirror, **watch(logit, run.picture))


class DetectorPlan(NamedTuple):
    """How stage 2 learns. kind, aux: see `detector_loss`; spr: see `rectify`."""

    schedule: Schedule
    pseudo: Path  # the folder of the labels
    kind: str
    aux: list[float]
    two_scales: bool
    spr: list[float]
    released: bool


def train_detector(net: Detector, settings: Settings, plan: DetectorPlan) -> None:
    """Stage 2: learn the pseudo labels, and correct them with the detector's own predictions.

    The labels as they are in the end are written to <out>/rectified, which Tables 6 to 8 score.
    """
    # The photos, their labels from stage 1, and the run, which resumes, logs and writes last.pt.
    photos = settings.training_set(masks=False)
    labels = read_labels(photos.names, plan.pseudo, settings)
    bank = Bank(photos, settings.size, settings.device, settings.out / "stage2", parts=PARTS)
    optimiser = make_optimiser(net, decay=0)
    encoders_learn = False
    net.encoders.requires_grad_(False)
    run = Run(settings, 2, bank, net, optimiser, plan.schedule, labels, "stage2")
    logit = partial(saliency_logit, net, amp=settings.amp)
    watch = harness.Watch(settings, photos)

    for epoch in run.epochs():
        # Not in the paper; released code: in the first of 10 epochs the encoders are frozen, and
        # the labels stay as they are.
        warmed_up = plan.schedule.reached(epoch, 2, PAPER["stage2"].epochs)
        if warmed_up and not encoders_learn:
            encoders_learn = True
            net.encoders.requires_grad_(True)
            run.net = settings.world.parallel(net)  # anew: it averages their gradients, too
        rectifying = warmed_up and plan.spr != [0, 0, 1]  # else the label stays the previous one
        random = generator("cpu", settings.seed, "side", epoch)
        for index, flip in run.batches():
            # The paper's rate is constant; in the released code it falls, as in stage 1 (D4).
            lr = falling_rate(run.time, plan.schedule) if plan.released else plan.schedule.lr
            set_rate(optimiser, lr)

            # The photos at one or two sizes, and their labels as they have been corrected so far.
            pair, _ = read_pair(bank, index, flip)  # [B, 6, S, S]
            pairs = [pair, second_scale(pair, random)] if plan.two_scales else [pair]
            g = labels.read(index, flip)  # [B, 1, S, S]

            # Forward, in half precision where the device has it.
            with autocast(settings.device, settings.amp):
                logits = run.net(*pairs)  # four heads of each size
            target = (g > 0.5).float()
            loss = detector_loss(logits, target, plan.kind, plan.aux, plan.released)  # Eq. 15

            # Backward and step. The scaler does nothing unless the half precision is fp16.
            optimiser.zero_grad()
            run.scaler.scale(loss).backward()
            run.scaler.step(optimiser)
            run.scaler.update()
            run.add(loss=loss)

            # The prediction before this step, of head 0 at the first size, corrects the label.
            if rectifying:
                s = torch.sigmoid(logits[0][0].detach().float())
                g = rectify(pair[:, :3], s, g, plan.spr, plan.released)  # Eq. 8
                labels.write(index, flip, g)

        # Every process has corrected its own share of the labels; now all of them get all.
        if rectifying:
            labels.share(run.order, run.batch, settings.world)
        run.end_epoch(lr=lr, **watch(logit, run.picture))

    if settings.world.main:
        write_labels(photos.names, labels, settings.out / "rectified")


def write_labels(names: list[str], labels: MapBank, folder: Path) -> None:
    """Write the labels as stage 2 has left them, at --size pixels in 8 bits."""
    for name, label in zip(names, labels.pixels):
        save_png(folder / f"{name}.png", label[0].cpu())


def read_pair(bank: Bank, index: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Photo and modality [B, 6, S, S], and which photos have a modality [B].

    The photo itself takes the place of a missing modality.
    """
    image = bank.images(index, flip)
    modality = bank.read("modality", index, flip)
    has = bank.has["modality"][index].to(image.device, non_blocking=True)
    modality = torch.where(has.view(-1, 1, 1, 1), modality, image)
    return torch.cat([image, modality], 1), has


def guide(pair: Tensor, has: Tensor) -> Tensor:
    """What L_btm compares: the photo in ImageNet's units, and the modality, 0 where there is none.

    [B, 6, H, W], [B] -> [B, 6, H, W]
    """
    photo = pair[:, :3].split(1, 1)
    photo = [(x - mean) / std for x, mean, std in zip(photo, *PIXELS["imagenet"])]
    modality = pair[:, 3:] * has.view(-1, 1, 1, 1)
    return torch.cat([*photo, modality], 1)


# ---- Pseudo labels -------------------------------------------------------------------------------
ToLabel = Callable[[Tensor, Tensor], tuple]  # `refine` with its options filled in


def otsu(prob: Tensor) -> Tensor:
    """Otsu's threshold on a map in 8 bits: what lies above it. [B, 1, H, W] -> bool, the same"""
    grey = (prob * 255).round().long()  # [B, 1, H, W]
    histogram = torch.zeros(len(prob), 256, device=prob.device)
    histogram.scatter_add_(1, grey.flatten(1), torch.ones_like(prob).flatten(1))

    # For each level t at once: the number and the sum of the pixels of t or less.
    levels = torch.arange(256.0, device=prob.device)
    below = histogram.cumsum(1)  # [B, 256]
    mass = (histogram * levels).cumsum(1)
    count = below[:, -1:]
    all_mass = mass[:, -1:]

    # The variance between the two sides, but for a factor that all thresholds share.
    gap = (mass * count - below * all_mass).square()
    between = gap / (below * (count - below)).clamp(min=1)
    return grey > between.argmax(1).view(-1, 1, 1, 1)


def refine(
    image: Tensor, theta: Tensor, sxy: float, srgb: float, threshold: str
) -> tuple[Tensor, Tensor, Tensor]:
    """From maps to pseudo labels: what the threshold, the CRF and the median filter give.

    image [B, 3, H, W] in [0, 1], theta [B, 1, H, W] -> three times [B, 1, H, W], the last of 0 and
    1. sxy: the CRF's reach in a photo of 320 pixels; srgb: its tolerance in grey levels.
    threshold: otsu, or fixed.
    """
    prob = torch.sigmoid(theta.float())
    salient = otsu(prob) if threshold == "otsu" else prob > 0.5
    side = image.shape[-1] / 320
    prob = dense_crf(image * 255, hard_unary(salient), sxy * side, srgb)
    return salient, prob, median_filter((prob > 0.5).float(), 7)


@torch.no_grad()
def make_labels(net: CueExtractor, settings: Settings, to_label: ToLabel) -> None:
    """Write <out>/pseudo/<name>.png (0 or 255, the photo's size) for every training photo."""
    photos = settings.training_set(masks=False)
    for samples, pairs in harness.batches_of(photos, settings, "pseudo labels"):
        for sample, logit in zip(samples, label_logit(net, pairs, settings.amp, to_label)):
            label = harness.at_size(logit, sample)
            pixels = (label > 0.5).byte().cpu() * 255
            save_png(settings.out / "pseudo" / f"{sample['name']}.png", pixels)
    settings.world.barrier()


def label_folder(args: argparse.Namespace, settings: Settings) -> Path:
    """Where stage 2 finds its pseudo labels: --labels, or those of this run's stage 1."""
    return args.labels or settings.out / "pseudo"


def label_files(names: list[str], folder: Path) -> list[Path]:
    """The files of the pseudo labels; raises `UserError` if one is missing."""
    paths = [folder / f"{name}.png" for name in names]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(paths)} pseudo labels are missing ({missing[0]}): the same "
            "command with --stage 1 makes them, or name the folder of another run's with --labels"
        )
    return paths


def read_labels(names: list[str], folder: Path, settings: Settings) -> MapBank:
    """The label bank of stage 2, with 8 bits per pixel (D10), from the files of stage 1."""
    files = label_files(names, folder)
    size, device, out = settings.size, settings.device, settings.out / "stage2"
    return MapBank(lambda i: load_mask(files[i]), len(files), size, device, out)


NEIGHBOURS = [  # 32 pairs (down, right): eight directions at four distances
    (i * d, j * d) for d in (1, 2, 4, 8) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)
]


def around(x: Tensor) -> list[Tensor]:
    """The neighbours of all pixels, borders repeated: [B, C, h, w] -> 32 views of that size."""
    h, w = x.shape[2:]
    x = F.pad(x, (8, 8, 8, 8), mode="replicate")
    return [x[..., 8 + i : 8 + i + h, 8 + j : 8 + j + w] for i, j in NEIGHBOURS]


PAR_ITERATIONS = 6
PAR_SUM = 1.01  # of PAR's weights


def pixel_refiner(image: Tensor, s: Tensor, iterations: int = PAR_ITERATIONS) -> Tensor:
    """R_pri, Eqs. 5 to 7: PAR, the real-time pixel refiner of AFA (Ru et al., CVPR 2022), with the
    square, the dilations and the iterations that these equations leave out (D8).

    image [B, 3, H, W], s [B, 1, H, W] in [0, 1] -> [B, 1, H, W]. Each iteration replaces a pixel by
    the weighted sum of its 32 neighbours. The weights add up to `PAR_SUM`, so that maps grow.
    """
    # The colour's distance to each neighbour, in units of the spread among them. 32 small sums are
    # faster than one over a stack of all. 0.3 and 0.01 are AFA's.
    near = around(image)
    mean = sum(near) / 32  # [B, 3, H, W]
    spread = (sum((x - mean).square() for x in near) / 31).sqrt() + 1e-8
    colour = [((x - image) / spread / 0.3).square().mean(1) for x in near]

    # The place's distance, in the same manner: the same 32 numbers for every pixel.
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
    """SPR, Eq. 8: G = l1 R_pri + l2 R_post + l3 G_pre, R_pri = PAR(image, s), R_post = s.

    image [B, 3, H, W], s and g [B, 1, H, W] in [0, 1] -> [B, 1, H, W]. weights: l1, l2, l3.
    """
    # PAR makes maps grow; released: its map and the label are divided by their maxima (D5).
    prior = pixel_refiner(image, s)
    if released:
        prior = prior / prior.amax((2, 3), keepdim=True)
    else:
        prior = prior / PAR_SUM**PAR_ITERATIONS
    g = weights[0] * prior + weights[1] * s + weights[2] * g
    if released:
        g = g / g.amax((2, 3), keepdim=True)
    return g


# ---- Evaluation and prediction -------------------------------------------------------------------
@torch.no_grad()
def saliency_logit(net: nn.Module, image: Tensor, amp: str) -> Tensor:
    """Saliency logit in eval mode: theta with its sign, or the detector's output. -> [B, 1, H, W]

    image: [B, 3, H, W], or with its modality, which the detector needs, [B, 6, H, W].
    """
    net.eval()
    with autocast(image.device, amp):
        y = net(image)[0]
    if isinstance(y, list):  # the detector's four heads, of which the first is the output
        y = y[0]
    return y.float()


@torch.no_grad()
def label_logit(net: CueExtractor, pair: Tensor, amp: str, to_label: ToLabel) -> Tensor:
    """Pseudo labels as logits, so that they are resized and scored like any prediction."""
    *_, label = to_label(pair[:, :3], saliency_logit(net, pair, amp))
    return torch.logit(label, 1e-6)


@torch.no_grad()
def explain_cue(net: CueExtractor, photo: Tensor, pair: Tensor, to_label: ToLabel):
    """Stage 1 at work on one photo, as titled pictures: what its losses see, and its label."""
    # The map at two scales, the second one drawn as in training.
    net.eval()
    other = second_scale(pair, generator("cpu", 0, "side"))
    theta, scaled = [theta.float() for theta in net(pair, other)]
    s = torch.sigmoid(theta)  # [1, 1, S, S]
    pictures = [("photo", photo), ("theta, its sign decided", stretched(theta))]
    pictures.append(("S = sigmoid(theta)", s[0]))

    # What the curriculum leaves out at its start, and half way, after a sixth of the epochs.
    for time in (0, 1 / 6):
        p, _ = curriculum(time, 1, pcl=True, annealed=False, released=False)
        pictures.append((f"left out: |S - 0.5| < {p:.1f}, Eqs. 2, 3", ((s - 0.5).abs() < p)[0]))
    title = f"S of {other.shape[2]} x {other.shape[3]} pixels, Eq. 12"
    pictures.append((title, torch.sigmoid(scaled)[0]))
    pictures.append(("boundary of S, Eq. 11", boundary(quarter(s))[0]))

    salient, prob, label = to_label(pair[:, :3], theta)
    pictures += [("threshold", salient[0]), ("CRF", prob[0]), ("median filter: label G", label[0])]
    return pictures


@torch.no_grad()
def explain_detector(
    net: Detector, photo: Tensor, pair: Tensor, file: Path, spr: list[float], released: bool
):
    """Stage 2 at work on one photo, as titled pictures: Fig. 4 and Eq. 8.

    file: the label of stage 1; if it is not there, the prediction, cut at 0.5, takes its place.
    """
    s = saliency_logit(net, pair, "off").sigmoid()  # [1, 1, S, S]
    g = (s > 0.5).float()
    before = "no label of stage 1: S > 0.5"
    if file.exists():
        labels = MapBank(lambda _: load_mask(file), 1, pair.shape[3], pair.device)
        g = labels.read(torch.tensor([0]), torch.tensor([False]))  # [1, 1, S, S]
        before = "label of stage 1, G_pre"
    prior = rectify(pair[:, :3], s, g, [1, 0, 0], released)
    after = rectify(pair[:, :3], s, g, spr, released)
    pictures = [("photo", photo), (before, g[0]), ("posterior R_post = S", s[0])]
    pictures.append(("prior R_pri = PAR(photo, S), Eqs. 5-7", prior[0]))
    pictures.append(("G = {:g} R_pri + {:g} R_post + {:g} G_pre".format(*spr), after[0]))
    return pictures


def evaluate(
    stage: int, net: nn.Module, settings: Settings, to_label: ToLabel, row: str = ""
) -> harness.Results:
    """Scores of every --eval set: of stage 1's cue and pseudo label, or of the detector.

    row: is added to the titles of the rows.
    """
    folder = settings.out / f"stage{stage}"
    saliency = partial(saliency_logit, net, amp=settings.amp)
    if stage == 2:
        return harness.evaluate(saliency, settings, folder, row)
    label = partial(label_logit, net, amp=settings.amp, to_label=to_label)
    results = harness.evaluate(saliency, settings, folder, f"-cue{row}")
    # A label has been through the CRF already.
    return results | harness.evaluate(label, settings, folder, f"-label{row}", crf=False)


def open_checkpoint(
    path: Path, args: argparse.Namespace
) -> tuple[argparse.Namespace, int, nn.Module]:
    """The flags that fit a checkpoint, ours or the authors', its stage and its network."""
    saved = runtime.torch_load(path)
    if "method" not in saved and any(key.startswith("decoder.") for key in saved):
        stage = 2 if any(key.startswith("t_net.") for key in saved) else 1
        state = unified_state(saved)
        args = flags.replaced(
            args,
            released=True,
            backbone="resnet50",
            data="DUTS-TR+RGBD-TR+VT5000-TR",
            out=args.out or Path("runs", f"{METHOD}-released"),
        )
    else:
        runtime.check_checkpoint(saved, path, METHOD)
        stage = saved["stage"]
        state = saved["model"]
        args = flags.saved_flags(build_parser(), args, saved, path, [*FIXED, "data"], FREE)
        out = flags.out_of(args, path, METHOD, ("stage1", "stage2"))
        args = flags.replaced(args, out=out)
    args = complete(args)
    adapter = any(key.startswith("adapter.") for key in state)
    net = make_net(stage, args, "none", adapter)
    runtime.load_state(net, state, path)
    return args, stage, net


def load(weights: str | Path = "photos", device: str = "auto") -> harness.Predictor:
    """A trained network as a function of Pillow photos; weights: "photos" or a checkpoint.

    sod = load("run/stage2/last.pt"); saliency = sod(Image.open("photo.jpg"))
    """
    args = build_parser().parse_args(["--weights", str(weights), "--device", device])
    path = flags.checkpoint_of(args, METHOD, "stage2/last.pt")
    args, _, net = open_checkpoint(path, flags.replaced(args, eval=[]))
    settings = flags.settle(args, METHOD, quiet=True)
    net = settings.place(net)
    return harness.Predictor(partial(saliency_logit, net, amp=settings.amp), net, settings)


# ---- Main ----------------------------------------------------------------------------------------
def use(args: argparse.Namespace) -> None:
    """Evaluate, predict or explain with a checkpoint: of --weights, or of the run folder."""
    if args.transfer:
        folder = target_folder(flags.run_folder(args, METHOD), args.transfer)
        args = flags.replaced(args, out=folder)
    path = flags.checkpoint_of(args, METHOD, f"stage{args.stage or 2}/last.pt")
    args, stage, net = open_checkpoint(path, flags.replaced(args, weights=path))
    settings = flags.settle(args, METHOD)
    net = settings.place(net)
    results = evaluate(stage, net, settings, label_maker(args))
    harness.save_results(results, settings, settings.out / f"stage{stage}")
    if args.predict:
        forward = partial(saliency_logit, net, amp=settings.amp)
        harness.predict(forward, settings, args.overlay, args.skip_existing)
    if args.explain:
        photo, pair, path = one_photo(args.explain, settings)
        if stage == 1:
            pictures = explain_cue(net, photo, pair, label_maker(args))
        else:
            file = label_folder(args, settings) / path.name
            pictures = explain_detector(net, photo, pair, file, args.spr, args.released)
        panels(path, pictures)


def label_maker(args: argparse.Namespace) -> ToLabel:
    """`refine` with the options that the flags give."""
    return partial(refine, sxy=args.sxy, srgb=args.srgb, threshold=args.threshold)


def detector_plan(args: argparse.Namespace, settings: Settings) -> DetectorPlan:
    """What the flags say of stage 2."""
    return DetectorPlan(
        args.stage2,
        label_folder(args, settings),
        kind=args.loss,
        aux=args.aux,
        two_scales=args.multi_scale == "on",
        spr=args.spr,
        released=args.released,
    )


def zero_shot(args: argparse.Namespace, settings: Settings, to_label: ToLabel) -> harness.Results:
    """Scores on the target of the networks that a transfer starts from, to compare it with."""
    results = {}
    for stage in (1, 2):
        _, _, net = open_checkpoint(args.base / f"stage{stage}" / "last.pt", args)
        results |= evaluate(stage, settings.place(net), settings, to_label, "-zero-shot")
    harness.save_results(results, settings, settings.out / "zero-shot")
    return results


def main(argv: list[str] | None = None) -> None:
    """Train the stages asked for, in order; or use a checkpoint."""
    args = build_parser().parse_args(argv)
    if args.transfer and (args.weights or args.init):
        raise UserError(
            "--transfer starts from a run: give its folder, --out, and neither --weights nor --init"
        )
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

    if args.transfer:
        args = retargeted(args)
    args = complete(args)
    flags.show_preset(args, PRESETS)
    settings = flags.settle(args, METHOD)
    stages = [int(args.stage)] if args.stage else [1, 2]
    schedules = {1: args.stage1, 2: args.stage2}
    if init and init_stage not in stages:
        raise UserError(f"--init {args.init} is of stage {init_stage}, which is not trained here")

    # What would otherwise be refused only after hours.
    photos = settings.training_set(masks=False)
    check_sizes(len(photos), stages, args.bn, settings)
    if args.labels or 1 not in stages:
        label_files(photos.names, label_folder(args, settings))
    claim(settings, {f"stage{stage}": schedules[stage] for stage in stages})

    to_label = label_maker(args)
    results = zero_shot(args, settings, to_label) if args.transfer else {}

    for stage in stages:
        torch.manual_seed(args.seed)
        if stage == init_stage:
            net = init
        elif stage == 1 and args.transfer:
            net = make_net(1, args, "none", adapter=True)
            adapt(net, args.base / "stage1" / "last.pt")
        else:
            net = make_net(stage, args, args.backbone_weights)
        net = settings.place(net)
        if stage == 1:
            train_cues(
                net,
                settings,
                args.stage1,
                pcl=args.pcl == "on",
                annealed=args.power == "annealed",
                gamma=args.gamma,
                two_scales=args.multi_scale == "on",
            )
            make_labels(net, settings, to_label)
        else:
            train_detector(net, settings, detector_plan(args, settings))
        results |= evaluate(stage, net, settings, to_label)
        harness.save_results(results, settings, settings.out / f"stage{stage}")
    harness.gallery(["stage1/pred/{}-cue", "stage1/pred/{}-label", "stage2/pred/{}"], settings)


if __name__ == "__main__":
    runtime.cli(main)

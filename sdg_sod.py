r"""SDG-SOD: Semantic Distillation Guided Salient Object Detection: captions guide a transformer.

Xu, Liu, Huang, Lu, Li, Guo: "Semantic Distillation Guided Salient Object Detection", 2022
(arXiv 2203.04076). No code was ever released. This is written from the paper and from what it
builds on: SegFormer's encoder and decoder, VirTex's captioner, F3Net's loss.

Whoever describes a photo names what is salient in it, and captions are cheaper than masks. So a
captioner is trained on its own. The cross-attention of its decoder while it writes a word is that
word's map. The sum of a caption's maps, 7 x 7 numbers, multiplies the features of a saliency
transformer at four scales (Eq. 3), which is then fine-tuned. Resizing is linear, so resizing the
summed map is the same as summing resized maps. Training therefore needs 49 numbers per photo,
computed once.

    image -> MiT -> F1 F2 F3 F4 -+-----> x --> xi --> + --> all-MLP decoder -> saliency logit
                                 +-------|------------+
    image -> CNN -> 7 x 7 grid -> text decoder -> M1 ... MT -> normalise(resize(M1 + ... + MT))
                                        |
                             "a man with an umbrella"

Usage
    python sdg_sod.py                                   # built-in shapes, no download, minutes
    python sdg_sod.py --data DUTS-TR --captions COCO-captions --encoder-weights FILE
    python sdg_sod.py --stage sod --data COCO-SOD --epochs 30 --encoder-weights FILE --out coco
    python sdg_sod.py --data DUTS-TR --init coco/sod/last.pt --out runs/sdg_sod-plus \
        --captioner runs/sdg_sod-DUTS-TR/caption/last.pt                           # ... SDG-SOD+
    python sdg_sod.py --stage guide --data DUTS-TR --captioner bicaptioning_R_50_L1_H2048.pth
    python sdg_sod.py --weights runs/sdg_sod-DUTS-TR/guide/last.pt --predict photo.jpg --words
    python sdg_sod.py --out runs/sdg_sod-shapes --explain photo.jpg   # the method, step by step
    torchrun --nproc_per_node=4 sdg_sod.py --data DUTS-TR --encoder-weights FILE

Stages, in order: sod trains the saliency branch (PVT-SOD), caption the captioner, control
fine-tunes PVT-SOD for as many epochs as guide, which fine-tunes it with guidance and has to be
compared with control. Of the --eval sets those with captions judge stage caption, those with masks
the others; masks also tell how much the captioner's maps know (data/ladder.py).

Results. Paper, DUTS-TE, S / mean F / mean E / MAE: PVT-SOD .898 / .865 / .933 / .030, SDG-SOD
.905 / .878 / .943 / .027; pre-trained on COCO .903 / .873 / .938 / .028 and .911 / .889 / .946 /
.026. Ours at that size: not run. At small scale: docs/sdg_sod.md.

Departures. Where the paper is silent, what it builds on is followed: SegFormer, VirTex and F3Net.
--released takes F3Net's loss and VirTex's beam search from their code where it differs from their
papers. docs/sdg_sod.md explains every departure and choice; D1 to D12 mark their places here.

The tool for annotating COCO (Appendix A) is data/relabel.py.

Shapes: B batch, H W input size, h w feature size, C channels, T words. Images are in [0, 1].
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from common import flags, harness, runtime
from common.backbones import PIXELS, backbone
from common.bank import Bank, crop, draw_crops
from common.datasets import open_set
from common.explain import one_photo, panels, stretched
from common.flags import Schedule, Settings
from common.published import MIT_HEADS, mit_state, named_tensors, read_state, virtex_state
from common.rivals import ContextDecoder
from common.run import Run, claim
from common.runtime import UserError, autocast, generator, progress, save_png, say
from data import captions
from data.captions import END, LENGTH, PAD, START, tokenise
from data.ladder import Ladder, centre_map, mask_map, mean_mask, others, spread

METHOD = "sdg_sod"
STAGES = ("sod", "caption", "control", "guide")
PAPER = {
    "stage_sod": Schedule(epochs=80, lr=5e-5),
    "stage_caption": Schedule(epochs=20, lr=5e-4),
    "stage_control": Schedule(epochs=40, lr=5e-5),
    "stage_guide": Schedule(epochs=40, lr=5e-5),
    "batch_size": 16,
    "size": 352,
    "encoder": "mit_b3",
    "backbone": "resnet50",
    "hidden": 1024,
    "taps": 1,
    "freeze": False,
    "beam": 5,
    "attn_row": "predict",
    "captions": "COCO-captions",
}
SHAPES = {
    "stage_sod": Schedule(epochs=20, lr=1e-3),
    "stage_caption": Schedule(epochs=40, lr=1e-3),
    "stage_control": Schedule(epochs=6, lr=3e-4),
    "stage_guide": Schedule(epochs=6, lr=3e-4),
    "batch_size": 16,
    "size": 160,
    "encoder": "mit_tiny",
    "backbone": "tiny",
    "hidden": 256,
    "taps": 4,
    "freeze": True,
    "beam": 5,
    "attn_row": "predict",
    "captions": None,  # those of --data
}
SMALL = {  # your own photos with masks and captions; --encoder-weights gives mit_b0's
    "stage_sod": Schedule(epochs=20, lr=2e-4),
    "stage_caption": Schedule(epochs=10, lr=5e-4),
    "stage_control": Schedule(epochs=6, lr=1e-4),
    "stage_guide": Schedule(epochs=6, lr=1e-4),
    "batch_size": 8,
    "size": 160,
    "encoder": "mit_b0",
    "backbone": "mobilenet_v2",
    "hidden": 256,
    "taps": 1,
    "freeze": True,
    "beam": 5,
    "attn_row": "predict",
    "captions": None,  # those of --data
}
PRESETS = {"paper": PAPER, "shapes": SHAPES, "small": SMALL}
TABLE_1 = ["DUTS-TE", "ECSSD", "DUT-OMRON", "HKU-IS", "PASCAL-S"]
PAPER_SETS = [*TABLE_1, "COCO-captions-val"]  # the last one for the captioner
GRID = 224  # the captioner's input, whose deepest map has 7 x 7 cells
RIVALS = ("psp", "aspp", "apc", "ann")  # decoders of Table 4
MAPS = ("own", "other", "mean", "centre", "mask")
TEST_MAPS = ("own", "other", "mean", "mask")


class MiTSize(NamedTuple):
    """Channels, layers and heads of the four levels; the width of the decoder."""

    channels: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    width: int


MIT = {
    "mit_tiny": MiTSize((24, 48, 96, 128), (1, 1, 2, 1), (1, 2, 4, 4), 64),
    "mit_b0": MiTSize((32, 64, 160, 256), (2, 2, 2, 2), (1, 2, 5, 8), 256),
    "mit_b1": MiTSize((64, 128, 320, 512), (2, 2, 2, 2), (1, 2, 5, 8), 256),
    "mit_b2": MiTSize((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), 768),
    "mit_b3": MiTSize((64, 128, 320, 512), (3, 4, 18, 3), (1, 2, 5, 8), 768),
}


# ---- Config --------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """All flags. A default of None is the value of the preset."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python sdg_sod.py --out runs/mine             train all stages on built-in shapes\n"
        "  python sdg_sod.py --out runs/mine --predict photo.jpg --words\n"
        "The docstring of this file explains the method, docs/sdg_sod.md D1 to D12.",
    )
    flags.add_flags(parser, PRESETS)
    add = parser.add_argument_group("method").add_argument
    add("--stage", choices=STAGES, help="one stage only [all of them]")
    add("--released", action="store_true", help="the code of F3Net and VirTex")
    add_saliency_flags(parser.add_argument_group("saliency branch").add_argument)
    add_guidance_flags(parser.add_argument_group("guidance").add_argument)
    add_captioner_flags(parser.add_argument_group("captioner").add_argument)
    return parser


def add_saliency_flags(add: Callable) -> None:
    """The saliency branch: its network, its start and its loss."""
    usual = flags.defaults("encoder", PRESETS)
    add("--encoder", choices=MIT, help=f"of the saliency branch, Table 2 {usual}")
    add("--encoder-weights", metavar="FILE", help="MiT's weights, or none")
    decoders = ("mlp", "literal", *RIVALS)
    add("--decoder", choices=decoders, default="mlp", help="Table 4 and D2 [mlp]")
    add("--width", type=flags.positive, help="channels of the decoder [see D2]")
    add("--bce", choices=("weighted", "coded"), help="see D3 [weighted]")
    text = "most that training cuts from either axis [0.125]"
    add("--crop", type=float, default=0.125, metavar="SHARE", help=text)


def add_guidance_flags(add: Callable) -> None:
    """How maps of words guide the saliency branch."""
    add("--sod", metavar="FILE", help="for control, guide [<out>/sod/last.pt]")
    text = "for guide, ours or VirTex's bicaptioning [<out>/caption/last.pt]"
    add("--captioner", metavar="FILE", help=text)
    text = "guided scales, from 1, the finest, Table 3 [all that the decoder uses]"
    add("--scales", type=int, nargs="+", choices=(1, 2, 3, 4), help=text)
    norms = ("minmax", "max", "mean", "l1")
    add("--attn-norm", choices=norms, default="minmax", help="normalise in Eq. 3, D8 [minmax]")
    add("--attn-row", choices=("predict", "read"), help="see D7 [predict]")
    text = (
        "train guide with the photo's own map or, to see if it matters, with another photo's, the "
        "mean of all, a Gaussian in the centre, or the mask [own]"
    )
    add("--maps", choices=MAPS, default="own", help=text)
    text = (
        "score guide with these; mean: that of training [own; with --maps mean, centre or mask "
        "what training used]"
    )
    add("--test-maps", choices=TEST_MAPS, help=text)
    add("--live", action="store_true", help="describe every photo in every step, see D10")


def add_captioner_flags(add: Callable) -> None:
    """The captioner: its photos, its network and its words."""
    add("--captions", metavar="SET", help="captioned photos [paper COCO-captions, shapes --data]")
    usual = flags.defaults("taps", PRESETS)
    text = f"how many of the CNN's deepest maps make the grid, see D6 {usual}"
    add("--taps", type=flags.positive, help=text)
    add("--plain-grid", action="store_true", help="do not standardise it, see D6")
    text = "the captioner's CNN keeps its weights [paper no, shapes yes]"
    add("--freeze", action=argparse.BooleanOptionalAction, help=text)
    usual = flags.defaults("hidden", PRESETS)
    add("--hidden", type=flags.positive, help=f"width of the text decoder {usual}")
    add("--layers", type=flags.positive, default=1, help="of the text decoder [1]")
    add("--beam", type=flags.positive, help="captions tried at once; 1 is greedy [5]")
    text = "VirTex's (SentencePiece's .vocab), without which words are numbers"
    add("--vocabulary", metavar="FILE", help=text)
    text = "--predict also draws the map of each word of the caption, Fig. 9"
    add("--words", action="store_true", help=text)


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with a value for each, that of the preset where none was given."""
    args = flags.completed(args, PRESETS)
    wide = args.decoder in RIVALS and args.preset == "paper"
    used = [3, 4] if args.decoder == "ann" else [1, 2, 3, 4]  # scales that the decoder sees
    args = flags.replaced(
        args,
        captions=args.captions or args.data,
        width=args.width or (512 if wide else MIT[args.encoder].width),  # SegFormer's, mmseg's (D2)
        bce=args.bce or ("coded" if args.released else "weighted"),  # as F3Net's code or paper (D3)
        scales=args.scales or used,
        test_maps=args.test_maps or usual_test_maps(args.maps),
        eval=flags.evaluation_sets(args, usual_sets(args.data)),
    )
    if not set(args.scales) <= set(used):
        raise UserError(
            "--decoder ann sees scales 3 and 4 alone: give --scales one or both of them, or leave "
            "it out"
        )
    if args.live and (args.maps != "own" or args.test_maps == "mean"):
        raise UserError(
            "--live makes the map of a photo itself in every step: leave out --maps and "
            "--test-maps mean"
        )
    if args.size < 32:
        raise UserError(f"--size {args.size} leaves nothing of the deepest map; at least 32")
    if not 0 <= args.crop < 1:
        raise UserError(f"--crop {args.crop} is not a share from 0 to less than 1")
    return args


def usual_test_maps(maps: str) -> str:
    """--test-maps if it is not given: what training used, but never another photo's map."""
    if maps in ("mean", "centre"):
        return "mean"  # of the maps of training, which were all the same
    return "mask" if maps == "mask" else "own"


def usual_sets(data: str) -> list[str]:
    """The sets to score on if --eval is not given."""
    if data == "DUTS-TR":
        return PAPER_SETS
    if not flags.is_shapes(data):
        return []
    parts = [part.split("@")[0].removesuffix("-test") for part in data.split("+")]
    return ["+".join(f"{part}-test" for part in parts)]


# ---- Model: the saliency branch, PVT-SOD ---------------------------------------------------------
class Attention(nn.Module):
    """Efficient self-attention: keys and values from a grid with R = side^2 times fewer cells."""

    def __init__(self, channels: int, heads: int, side: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if side > 1:  # Eq. 1's reshape and linear layer are a convolution whose stride is its size
            self.sr = nn.Conv2d(channels, channels, side, side)
            self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h, w, C]"""
        b, h, w, c = x.shape
        q = self.q(x).view(b, h * w, self.heads, -1).transpose(1, 2)  # [B, heads, hw, d]
        if hasattr(self, "sr"):
            x = self.sr(x.permute(0, 3, 1, 2))  # [B, C, h / side, w / side]
            x = self.norm(x.permute(0, 2, 3, 1))  # Eq. 1
        kv = self.kv(x).view(b, -1, 2, self.heads, c // self.heads)  # [B, hw / R, 2, heads, d]
        k, v = kv.permute(2, 0, 3, 1, 4)  # [B, heads, hw / R, d] each
        x = F.scaled_dot_product_attention(q, k, v)  # Eq. 2
        return self.proj(x.transpose(1, 2).reshape(b, h, w, c))


class MixFFN(nn.Module):
    """Linear, depthwise convolution (which tells a token its place), GELU, linear."""

    def __init__(self, channels: int):
        super().__init__()
        inner = 4 * channels
        self.fc1 = nn.Linear(channels, inner)
        self.fc2 = nn.Linear(inner, channels)
        self.dwconv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h, w, C]"""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2))  # [B, 4 C, h, w]
        return self.fc2(F.gelu(x).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Attention and MixFFN on normalised inputs; each is dropped for some images in training."""

    def __init__(self, channels: int, heads: int, side: int, drop: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, 1e-6)
        self.norm2 = nn.LayerNorm(channels, 1e-6)
        self.attn = Attention(channels, heads, side)
        self.mlp = MixFFN(channels)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h, w, C]"""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def drop_path(self, x: Tensor) -> Tensor:
        """Zero for a share `drop` of the images, the others enlarged so that the mean stays."""
        if not self.training or self.drop == 0:
            return x
        keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop
        return x * keep / (1 - self.drop)


class Level(nn.Module):
    """Overlapping patches of the map before, blocks, LayerNorm."""

    def __init__(self, before: int, channels: int, heads: int, side: int, drops: list[float]):
        super().__init__()
        size, stride = (7, 4) if before == 3 else (3, 2)
        self.proj = nn.Conv2d(before, channels, size, stride, size // 2)
        self.norm_in = nn.LayerNorm(channels)
        self.norm_out = nn.LayerNorm(channels, 1e-6)
        self.blocks = nn.ModuleList(Block(channels, heads, side, drop) for drop in drops)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C', h', w'] -> [B, C, h, w]"""
        x = self.norm_in(self.proj(x).permute(0, 2, 3, 1))  # [B, h, w, C]
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x).permute(0, 3, 1, 2)


class MiT(nn.Module):
    """SegFormer's Mix Transformer: four maps at strides 4, 8, 16, 32.

    The paper's "PVT" is taken for it, since the patches of its text overlap (D1).
    """

    def __init__(self, name: str):
        super().__init__()
        size = MIT[name]
        self.channels = size.channels
        before = (3, *size.channels)
        sides = (8, 4, 2, 1)
        drops = torch.linspace(0, 0.1, sum(size.layers)).split(size.layers)
        self.stages = nn.ModuleList(
            Level(before[i], size.channels[i], size.heads[i], sides[i], drops[i].tolist())
            for i in range(4)
        )
        for name, value in zip(("mean", "std"), PIXELS["imagenet"]):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        self.apply(initialise)

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] -> F1 ... F4, [B, C_i, H / 2^(i+1), W / 2^(i+1)]."""
        x = (image - self.mean) / self.std
        features = []
        for level in self.stages:
            x = level(x)
            features.append(x)
        return features


def initialise(module: nn.Module) -> None:
    """SegFormer's random start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * module.kernel_size[0] ** 2 / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(module.bias)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of `like`."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class MLPDecoder(nn.Module):
    """All-MLP decoder: a linear layer per scale, resized to 1/4, concatenated, fused.

    The layer that fuses is SegFormer's; the paper's text has none (literal, D2).
    """

    def __init__(self, channels: tuple[int, ...], width: int, literal: bool = False):
        super().__init__()
        self.linear = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        if literal:
            self.fuse = nn.Identity()
            self.predict = nn.Conv2d(4 * width, 1, 1)
        else:
            fuse = Conv2dNormActivation(4 * width, width, 1)
            self.fuse = nn.Sequential(fuse, nn.Dropout2d(0.1))
            self.predict = nn.Conv2d(width, 1, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """F1 ... F4 -> logit [B, 1, H/4, W/4]"""
        levels = [resize(linear(f), features[0]) for linear, f in zip(self.linear, features)]
        levels.reverse()  # coarse to fine, as in SegFormer
        return self.predict(self.fuse(torch.cat(levels, 1)))


class Guidance(nn.Module):
    """Eq. 3 at some scales: F + xi(F * normalise(sum of the resized maps)).

    scales: from 1, the finest. kind of normalise, on which the paper is silent (D8): minmax, max,
    mean (divided by T), l1 (mean of 1).
    """

    def __init__(self, channels: tuple[int, ...], scales: list[int], kind: str):
        super().__init__()
        self.kind = kind
        self.xi = nn.ModuleDict()
        for scale in sorted(set(scales)):
            xi = nn.Conv2d(channels[scale - 1], channels[scale - 1], 1)
            nn.init.zeros_(xi.weight)  # at first guidance changes nothing (D9)
            nn.init.zeros_(xi.bias)
            self.xi[str(scale)] = xi

    def forward(self, features: list[Tensor], m: Tensor) -> list[Tensor]:
        """F1 ... F4 and the sum of a caption's maps [B, 1, h, w] -> guided F1 ... F4."""
        guided = list(features)
        for scale, xi in self.xi.items():
            f = features[int(scale) - 1]
            guided[int(scale) - 1] = f + xi(f * self.normalise(resize(m, f)))  # Eq. 3
        return guided

    def normalise(self, m: Tensor) -> Tensor:
        """[B, 1, h, w], not negative, to the same; a map of zeros, with minmax a flat one, to 0."""
        mean = m.mean((2, 3), keepdim=True)
        top = m.amax((2, 3), keepdim=True)
        low = 0
        if self.kind == "minmax":
            low = m.amin((2, 3), keepdim=True)
            scale = top - low
        elif self.kind == "max":
            scale = top
        elif self.kind == "l1":
            scale = mean
        else:
            # A word's map sums to 1 over 49 cells, so 49 times the mean of the sum is T, the number
            # of words. After resizing or a crop that holds nearly.
            scale = 49 * mean
        return (m - low) / scale.clamp(min=1e-6)


class SDGSOD(nn.Module):
    """The saliency network; with a captioner also its guidance, without one PVT-SOD."""

    def __init__(
        self,
        encoder: MiT,
        decoder: nn.Module,
        guidance: Guidance | None = None,
        captioner: "Captioner | None" = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.guidance = guidance
        self.captioner = captioner
        if captioner is not None:
            captioner.requires_grad_(False)
            self.register_buffer("mean_map", torch.zeros(1, 1, 7, 7))  # of training

    def train(self, mode: bool = True) -> "SDGSOD":
        """As in torch, but the captioner is frozen."""
        super().train(mode)
        if self.captioner is not None:
            self.captioner.eval()
        return self

    def forward(self, image: Tensor, m: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], summed maps [B, 1, h, w] (None: describe the images) ->
        saliency logit [B, 1, H, W]."""
        features = self.encoder(image)
        if self.guidance is not None:
            if m is None:
                m = self.captioner.guidance(image)
            features = self.guidance(features, m)
        return resize(self.decoder(features).float(), image)


# ---- Model: the captioner, the semantically distilled guidance branch ----------------------------
class DecoderLayer(nn.TransformerDecoderLayer):
    """torch's post-norm decoder layer with GELU; it also returns each word's cross-attention."""

    def __init__(self, hidden: int):
        super().__init__(hidden, hidden // 64, 4 * hidden, batch_first=True)

    def forward(
        self, x: Tensor, grid: Tensor, future: Tensor, padded: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Words [B, T, H], grid [B, 49, H], masks [T, T], [B, T] -> [B, T, H], [B, T, 49]."""
        # Self-attention among the words read so far, each step with dropout, sum and LayerNorm.
        own, _ = self.self_attn(
            x, x, x, attn_mask=future, key_padding_mask=padded, need_weights=False
        )
        x = self.norm1(x + self.dropout1(own))

        # Cross-attention of every word to the 49 cells, returned as the mean over heads.
        seen, attention = self.multihead_attn(x, grid, grid)
        x = self.norm2(x + self.dropout2(seen))

        # Two linear layers for each word.
        out = self.linear2(self.dropout(F.gelu(self.linear1(x))))
        return self.norm3(x + self.dropout3(out)), attention


class Captioner(nn.Module):
    """VirTex: a CNN, and a transformer that writes captions forward and backward.

    lexicon: the V words, by token. taps: how many of the CNN's deepest maps make the grid, which is
    standardised, lest attention miss the objects, unless `plain`, as in VirTex (D6). row: see
    `attend`. The two directions share all but their layers, and the output shares its weights with
    the embedding.
    """

    def __init__(
        self,
        encoder: nn.Module,
        lexicon: list[str],
        hidden: int,
        layers: int = 1,
        taps: int = 1,
        plain: bool = False,
        row: str = "predict",
        beam: int = 5,
        released: bool = False,
    ):
        super().__init__()
        self.lexicon = lexicon
        self.taps = taps
        self.row = row
        self.beam = beam
        self.released = released

        # The CNN's grid, from its deepest `taps` maps.
        channels = sum(encoder.channels[-taps:])
        self.encoder = encoder
        self.projection = nn.Linear(channels, hidden)
        self.standardise = nn.Identity() if plain else nn.BatchNorm2d(channels, affine=False)

        # The words that go in, the layers of both directions, and the bias of the words that come
        # out, whose weights are those of the embedding.
        self.words = nn.Embedding(len(lexicon), hidden, padding_idx=PAD)
        self.positions = nn.Embedding(LENGTH, hidden)
        self.norm = nn.LayerNorm(hidden, 1e-8)
        self.dropout = nn.Dropout(0.1)
        self.forwards = nn.ModuleList(DecoderLayer(hidden) for _ in range(layers))
        self.backwards = nn.ModuleList(DecoderLayer(hidden) for _ in range(layers))
        self.bias = nn.Parameter(torch.zeros(len(lexicon)))
        self.initialise()

    def initialise(self) -> None:
        """Matrices outside the CNN get a standard deviation of 0.64 / sqrt(fan in), which is
        VirTex's 0.02 at a fan-in of 1,024."""
        for name, p in self.named_parameters():
            if p.dim() > 1 and not name.startswith("encoder."):
                nn.init.normal_(p, std=0.64 / math.sqrt(p.shape[1]))
        nn.init.zeros_(self.words.weight[PAD].data)

    def features(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] -> the CNN's maps, the deepest one last, [B, C, 7, 7]"""
        if image.shape[2:] != (GRID, GRID):
            image = F.interpolate(
                image, (GRID, GRID), mode="bilinear", antialias=True, align_corners=False
            )
        return self.encoder(image)

    def encode(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> the grid G [B, 49, H]"""
        maps = self.features(image)[-self.taps :]
        grid = torch.cat([F.adaptive_avg_pool2d(m, maps[-1].shape[2:]) for m in maps], 1)
        return self.projection(self.standardise(grid).flatten(2).mT)

    def read(self, grid: Tensor, tokens: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] -> logits [B, T, V] of the next one, and cross-attention [B, T, 49]."""
        # Words and their places, normalised, 0 at the padding.
        t = tokens.shape[1]
        padded = tokens == PAD
        x = self.words(tokens) + self.positions.weight[:t]
        x = self.dropout(self.norm(x)) * ~padded[..., None]  # [B, T, H]

        # No word attends to a later one: True is forbidden.
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        for layer in self.backwards if backward else self.forwards:
            x, attention = layer(x, grid, future, padded)
        return F.linear(x, self.words.weight, self.bias), attention

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: logits [B, T, V] of the caption and of its mirror image."""
        grid = self.encode(image)
        forward, _ = self.read(grid, tokens)
        backward, _ = self.read(grid, reverse(tokens), backward=True)
        return forward, backward

    @torch.no_grad()
    def write(self, grid: Tensor) -> Tensor:
        """Beam search: grid [B, 49, H] -> tokens [B, T], from the start token on.

        Of each image the b likeliest beginnings of a caption are kept. As in VirTex each of them
        has two successors, no word comes twice in a row, and length is not rewarded.
        """
        n = len(grid)
        b = self.beam
        grid = grid.repeat_interleave(b, 0)  # [B b, 49, H]
        tokens = torch.full((n * b, 1), START, device=grid.device)
        score = torch.full((n, b), -math.inf, device=grid.device)
        score[:, 0] = 0  # all beams are equal yet: only the first one counts
        for t in range(LENGTH):
            shown = tokens[:, 1:] if self.released and t else tokens
            logit, _ = self.read(grid, shown)
            p = logit[:, -1].float().log_softmax(1)  # of the next word [B b, V]

            # Forbid repeats: a word must not follow itself.
            if t:
                p = p.scatter(1, tokens[:, -1:], -math.inf)

            # Keep ended captions as they are: an end follows an end, with certainty.
            ended = tokens[:, -1] == END
            p = p.masked_fill(ended[:, None], -math.inf)
            p[:, END] = p[:, END].masked_fill(ended, 0)

            # Choose the best b of an image's b x k continued captions. `best` numbers them, so
            # best // k is the beam that is continued.
            k = min(2 if t else b, b, p.shape[1])
            p, word = p.topk(k)  # [B b, k]
            score, best = (score.view(-1, 1) + p).view(n, -1).topk(b)  # [B, b]
            beam = best // k + b * torch.arange(n, device=grid.device)[:, None]
            word = word.view(n, -1).gather(1, best)
            tokens = torch.cat([tokens[beam.flatten()], word.view(-1, 1)], 1)

            if (word[:, 0] == END).all():  # the others can only become less likely
                break
        return tokens[::b]  # the best of each image

    @torch.no_grad()
    def attend(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> caption [B, T], and the map of every word [B, T, 7, 7].

        Maps of anything but words are 0. The paper leaves open which row of the attention is a
        word's map (D7):

            token read     [START]    a      red    star
            row              0        1       2      3
            token predicted  a       red     star  [END]

        "red" has row 1, the step that predicts it, or row 2, the step that reads it.
        """
        grid = self.encode(image)
        tokens = self.write(grid)
        _, attention = self.read(grid, tokens[:, :LENGTH])
        attention = attention.float()  # [B, at most 30, 49]
        word = tokens[:, 1:]
        if self.row == "read":
            rows = attention[:, 1:]
        else:
            rows = attention[:, : word.shape[1]]

        # The last word of a caption of full length is never read, so it has no row there.
        maps = attention.new_zeros(*word.shape, attention.shape[2])
        maps[:, : rows.shape[1]] = rows
        maps *= (word > END)[..., None]
        side = math.isqrt(maps.shape[2])
        return word, maps.unflatten(2, (side, side))

    def guidance(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> the sum of the words' maps [B, 1, 7, 7]"""
        _, maps = self.attend(image)
        return maps.sum(1, keepdim=True)


def reverse(tokens: Tensor) -> Tensor:
    """Captions [B, T] read backwards; the padding stays at the end."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    index = (tokens != PAD).sum(1, keepdim=True) - 1 - place
    return tokens.gather(1, index.clamp(min=0)) * (index >= 0)


# ---- Losses --------------------------------------------------------------------------------------
def structure_loss(logit: Tensor, g: Tensor, bce: str = "weighted") -> Tensor:
    """F3Net's weighted BCE + weighted IoU of the logit and the mask g, [B, 1, H, W].

    bce: "weighted", as in F3Net's paper, or "coded": the plain mean, as a misspelt argument makes
    it in F3Net's code (D3).
    """
    logit = logit.float()
    g = g.float()

    # Pixels near edges count more: w = 1 + 5 |mean of g over 31 x 31 - g|, zeros beyond the border.
    near = F.avg_pool2d(g, (31, 1), 1, (15, 0))
    near = F.avg_pool2d(near, (1, 31), 1, (0, 15))
    w = 1 + 5 * (near - g).abs()

    # Cross-entropy, weighted per image.
    p = torch.sigmoid(logit)
    cross = F.binary_cross_entropy_with_logits(logit, g, reduction="none")
    if bce == "coded":
        wbce = cross.mean()
    else:
        wbce = (w * cross).sum((1, 2, 3)) / w.sum((1, 2, 3))  # [B]

    # IoU of weighted areas; the 1 is F3Net's and keeps empty masks finite.
    both = (w * p * g).sum((1, 2, 3))
    total = (w * (p + g)).sum((1, 2, 3))
    wiou = (both + 1) / (total - both + 1)
    return (wbce + 1 - wiou).mean()


def caption_loss(logits: tuple[Tensor, Tensor], tokens: Tensor) -> Tensor:
    """Cross-entropy of the next word, forward + backward.

    logits: [B, T, V] of the tokens [B, T] and of the reversed ones.
    """

    def one_way(logit: Tensor, tokens: Tensor) -> Tensor:
        predicted = logit[:, :-1].float().flatten(0, 1)  # [B (T - 1), V]
        return F.cross_entropy(predicted, tokens[:, 1:].flatten(), ignore_index=PAD)

    forward, backward = logits
    return one_way(forward, tokens) + one_way(backward, reverse(tokens))


# ---- Training ------------------------------------------------------------------------------------
def make_net(args: argparse.Namespace) -> SDGSOD:
    """An untrained PVT-SOD on the CPU."""
    encoder = MiT(args.encoder)
    if args.decoder in RIVALS:
        decoder = ContextDecoder(args.decoder, encoder.channels, args.width)
    else:
        decoder = MLPDecoder(encoder.channels, args.width, args.decoder == "literal")
    return SDGSOD(encoder, decoder)


def make_guided(net: SDGSOD, captioner: Captioner, args: argparse.Namespace) -> SDGSOD:
    """The network of stage guide: a PVT-SOD and a captioner, joined by untrained guidance."""
    channels = net.encoder.channels
    guidance = Guidance(channels, args.scales, args.attn_norm)
    return SDGSOD(net.encoder, net.decoder, guidance, captioner)


def make_optimiser(net: nn.Module) -> torch.optim.Optimizer:
    """SegFormer's AdamW, since the paper names none (D4); of what is learnt matrices decay, norms
    and biases do not."""
    learnt = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in learnt if p.dim() > 1]
    others = [p for p in learnt if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=learnt[0].is_cuda)  # one kernel for all parameters


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: up over 1,500 steps (at most a tenth of all), then down to 0."""
    rising = min(1500, max(steps // 10, 1))
    return min(1.0, (step + 1) / rising) * (1 - step / steps)


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of parameters the learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def epoch_random(stage: str, epoch: int, settings: Settings) -> torch.Generator:
    """The random numbers of this process in an epoch; each draws for its own share (D11).

    Dropout draws from torch's own generator, which is seeded here too, so that an epoch of a
    resumed run is the same.
    """
    random = generator("cpu", settings.seed, stage, epoch, settings.world.rank)
    torch.manual_seed(random.initial_seed())
    return random


def train_saliency(
    stage: str,
    net: SDGSOD,
    settings: Settings,
    schedule: Schedule,
    bce: str,
    cut: float,
    maps: str,
    live: bool,
) -> None:
    """Stages sod, control and guide: learn masks, in stage guide with the map of each photo.

    bce: see `structure_loss`. cut: at most this share of a side is cropped. maps: a kind of `MAPS`.
    live: the captioner describes every photo anew, as it was cropped; else the map that it has made
    of the whole photo is mirrored and cropped along (D10).
    """
    # The photos and masks, and the run, which resumes, logs and writes last.pt.
    photos = settings.training_set()
    folder = settings.out / stage
    bank = Bank(photos, settings.size, settings.device, folder, parts=("image", "mask"))
    if not bank.has["mask"].all():
        raise UserError(f"--data {settings.data}: not every picture has a mask")
    optimiser = make_optimiser(net)
    run = Run(settings, stage, bank, net, optimiser, schedule, folder=stage, extra=plan_of(net))
    saliency = partial(saliency_logit, net, amp=settings.amp)
    watch = harness.Watch(judging("mask", settings), photos)

    # With --resume, `Run` has restored the captioner, so the maps are made after it.
    guided = stage == "guide" and not live
    if guided:
        guidance = make_maps(maps, net.captioner, bank, settings)  # [N, 1, 7, 7]
        net.mean_map.copy_(guidance.mean(0, keepdim=True))
        if maps in ("mean", "centre"):
            saliency = partial(saliency, m=net.mean_map)

    for epoch in run.epochs():
        random = epoch_random(stage, epoch, settings)
        for index, flip in run.batches():
            lr = schedule.lr * rate(run.step, schedule.epochs * run.steps)
            set_rate(optimiser, lr)

            # Photos, masks and maps, flipped and cropped together; [B, 1, S/4, S/4] for maps.
            box = draw_crops(len(index), cut, random)
            image = crop(bank.images(index, flip), box)  # [B, 3, S, S]
            mask = crop(bank.masks(index, flip), box)  # [B, 1, S, S]
            m = None
            if guided:
                m = cropped_maps(guidance, index, flip, box, settings.size // 4)

            # Forward, in half precision where the device has it.
            with autocast(settings.device, settings.amp):
                logit = run.net(image, m)  # [B, 1, S, S]
            loss = structure_loss(logit, mask, bce)

            # Backward and step. The scaler does nothing unless the half precision is fp16.
            optimiser.zero_grad()
            run.scaler.scale(loss).backward()
            run.scaler.step(optimiser)
            run.scaler.update()
            run.add(loss=loss)

        run.end_epoch(lr=lr, **watch(saliency, run.picture))


def train_captioner(
    net: Captioner, settings: Settings, schedule: Schedule, bank: Bank, texts: list[list[str]]
) -> None:
    """Stage caption: learn to predict the next word of captions, forward and backward.

    bank: the photos at 224 x 224. texts: all captions of each of them.
    """
    # All captions as numbers, the words that replace each other in a mirrored photo, and the run.
    tokens, counts = tokenise(texts, net.lexicon)  # [N, most captions, 30], [N]
    mirror = captions.mirrored(net.lexicon)  # [V]
    optimiser = make_optimiser(net)
    extra = plan_of(net)
    run = Run(settings, "caption", bank, net, optimiser, schedule, folder="caption", extra=extra)

    for epoch in run.epochs():
        random = epoch_random("caption", epoch, settings)
        for index, flip in run.batches():
            lr = schedule.lr * rate(run.step, schedule.epochs * run.steps)
            set_rate(optimiser, lr)

            # One of each photo's captions; if the photo is mirrored, left and right change places.
            which = torch.rand(len(index), generator=random) * counts[index]
            said = tokens[index, which.long()]  # [B, 30]
            said = torch.where(flip[:, None], mirror[said], said)
            longest = int((said != PAD).sum(1).max())
            said = said[:, :longest].to(settings.device, non_blocking=True)  # [B, T]

            # Forward, in half precision where the device has it; the caption and its mirror image.
            with autocast(settings.device, settings.amp):
                logits = run.net(bank.images(index, flip), said)  # 2 x [B, T, V]
            loss = caption_loss(logits, said)

            # Backward and step. The scaler does nothing unless the half precision is fp16.
            optimiser.zero_grad()
            run.scaler.scale(loss).backward()
            run.scaler.step(optimiser)
            run.scaler.update()
            run.add(loss=loss)

        run.end_epoch(lr=lr)


def captioned_bank(spec: str, settings: Settings) -> tuple[Bank, list[list[str]]]:
    """The photos of a set at 224 x 224, and all captions of each of them."""
    photos = captions.Collector(settings.training_set(masks=False, spec=spec))
    bank = Bank(photos, GRID, settings.device, settings.out / "caption")
    if not all(photos.captions):
        raise UserError(f"--captions {spec}: not every picture has a caption")
    return bank, photos.captions


# ---- Maps that guide -----------------------------------------------------------------------------
@torch.no_grad()
def own_maps(captioner: Captioner, bank: Bank, settings: Settings) -> Tensor:
    """The guidance of every photo, 49 numbers each. [N, 1, 7, 7] on the device"""
    captioner.eval()
    world = settings.world
    mine = world.share(torch.arange(len(bank)))
    parts = []
    for index in progress(mine.split(settings.batch_size), "guidance"):
        with autocast(settings.device, settings.amp):
            parts.append(captioner.guidance(bank.images(index)).cpu())

    # Each process has described its share.
    maps = torch.zeros(len(bank), *parts[0].shape[1:])
    for rank, part in enumerate(world.gather(torch.cat(parts))):
        maps[rank :: world.size][: len(part)] = part
    return maps.to(settings.device)


def make_maps(kind: str, captioner: Captioner, bank: Bank, settings: Settings) -> Tensor:
    """The map that guides each photo, of a kind of `MAPS`. [N, 1, 7, 7] on the device"""
    count = len(bank)
    if kind == "centre":
        return centre_map().to(settings.device).expand(count, -1, -1, -1)
    if kind == "mask":
        chunks = torch.arange(count).split(settings.batch_size)
        return torch.cat([mask_map(bank.masks(index)) for index in chunks])
    maps = own_maps(captioner, bank, settings)
    if kind == "mean":
        return maps.mean(0, keepdim=True).expand(count, -1, -1, -1)
    if kind == "other":
        if count < 2:
            raise UserError("the map of another photo needs at least two photos in a set")
        random = generator("cpu", settings.seed, "other maps")
        return maps[others(count, random).to(maps.device)]
    return maps


def cropped_maps(maps: Tensor, index: Tensor, flip: Tensor, box: Tensor, side: int) -> Tensor:
    """The maps of photos that were mirrored and cropped, [B, 1, side, side].

    index, flip, box: [B], [B], [B, 4], on the CPU. A crop of 7 x 7 cells to 7 x 7 would lose what
    lies between their centres, so `side` is that of F1, the largest map that is guided.
    """
    m = maps[index.to(maps.device, non_blocking=True)]  # [B, 1, 7, 7]
    flip = flip.to(maps.device, non_blocking=True).view(-1, 1, 1, 1)
    return crop(torch.where(flip, m.flip(3), m), box, side)


# ---- Where a stage starts ------------------------------------------------------------------------
# Flags that describe a captioner; its checkpoints hold them with its words, apart from the others.
PLAN = ("hidden", "layers", "taps", "plain_grid", "backbone", "pixels", "borders")


def plan_of(net: SDGSOD | Captioner) -> dict:
    """What the checkpoint of a network has to tell about its captioner, if it has one."""
    captioner = net.captioner if isinstance(net, SDGSOD) else net
    return {"captioner_plan": captioner.plan} if captioner else {}


def make_captioner(lexicon: list[str], args: argparse.Namespace, weights: str | None) -> Captioner:
    """A captioner on the CPU, untrained except for its CNN; `weights` as for `backbone`.

    lexicon: its words, which --vocabulary replaces.
    """
    if args.vocabulary:
        lexicon = captions.read_vocabulary(args.vocabulary, len(lexicon))
    kept = weights != "none"  # statistics of BatchNorm, if weights came with them (D5)
    encoder = backbone(args.backbone, weights, args.pixels, kept, borders=args.borders)
    shape = (lexicon, args.hidden, args.layers, args.taps, args.plain_grid)
    captioner = Captioner(encoder, *shape, args.attn_row, args.beam, args.released)
    captioner.plan = {"lexicon": lexicon} | {name: getattr(args, name) for name in PLAN}
    return captioner


def make_new_captioner(lexicon: list[str], args: argparse.Namespace) -> Captioner:
    """The captioner that stage caption starts from, on the CPU."""
    if args.hidden % 64:
        raise UserError(f"--hidden {args.hidden} is not a multiple of 64, the width of a head")
    usual = "imagenet" if args.backbone == "resnet50" else None
    captioner = make_captioner(lexicon, args, args.backbone_weights or usual)
    captioner.encoder.requires_grad_(not args.freeze)
    return captioner


def load_captioner(
    path: str | Path, args: argparse.Namespace, saved: dict | None = None
) -> Captioner:
    """The captioner of a checkpoint (`saved` if it has been read), ours or VirTex's."""
    saved = saved or runtime.torch_load(path)
    if "method" in saved:
        runtime.check_checkpoint(saved, path, METHOD, "caption")
        state = saved["model"]
        lexicon, args = saved_plan(saved, path, args)
    else:
        state = virtex_state(named_tensors(saved.get("model", saved), path))
        lexicon, args = virtex_plan(state, path, args)
    captioner = make_captioner(lexicon, args, "none")
    runtime.load_state(captioner, state, path)
    return captioner


def saved_plan(
    saved: dict, path: str | Path, args: argparse.Namespace
) -> tuple[list[str], argparse.Namespace]:
    """The words of the captioner in a checkpoint of stage caption or guide, and the flags with
    those that describe it; raises `UserError` if they are not there."""
    plan = saved["args"].get("captioner_plan")
    lexicon = plan.get("lexicon") if isinstance(plan, dict) else None
    if not isinstance(lexicon, list) or not all(isinstance(word, str) for word in lexicon):
        raise UserError(
            f"{path} was made by another version: it lacks the plan of its captioner; train again"
        )
    args = flags.saved_flags(build_parser(), args, {"args": plan}, path, PLAN, free=[])
    if args.hidden % 64:
        raise UserError(f"{path} is a damaged checkpoint: --hidden cannot be {args.hidden}")
    return lexicon, args


def virtex_plan(
    state: dict[str, Tensor], path: str | Path, args: argparse.Namespace
) -> tuple[list[str], argparse.Namespace]:
    """The same of VirTex's captioner, told by its weights; raises `UserError`."""
    words = state.get("words.weight")
    if words is None or words.ndim != 2 or words.shape[1] % 64:
        raise UserError(f"{path} holds neither a captioner of sdg_sod.py nor one of VirTex")
    layers = {key.split(".")[1] for key in state if key.startswith("forwards.")}
    changes = {"hidden": words.shape[1], "layers": len(layers), "taps": 1, "plain_grid": True}
    cnn = {"backbone": "resnet50", "pixels": "imagenet", "borders": "zeros"}
    return captions.numbers(len(words)), flags.replaced(args, **changes, **cnn)


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Say in a `UserError` which flag's file is at fault."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--{flag}: {error}") from None


def load_encoder(encoder: MiT, name: str, weights: str | None) -> None:
    """Fill an encoder from --encoder-weights; raises `UserError` unless every key has its place."""
    if weights is None and name != "mit_tiny":
        raise UserError(
            f"--encoder-weights: give a file with the weights of {name} (from smp-hub or nvidia on "
            "huggingface.co, or OpenMMLab), or none"
        )
    if weights not in (None, "none"):
        with naming("encoder-weights"):
            runtime.load_state(encoder, mit_state(read_state(weights)), weights, MIT_HEADS)


def load_sod(flag: str, path: str | Path, args: argparse.Namespace) -> SDGSOD:
    """The PVT-SOD in a checkpoint of stage sod, which the flag (--sod, --init) names."""
    with naming(flag):
        saved = runtime.load_checkpoint(path, METHOD, "sod")
        other = []
        for name in ("encoder", "decoder", "width"):
            value = saved["args"].get(name)
            if value != getattr(args, name):
                other.append(f"--{name} {value}")
        if other:
            raise UserError(f"{path} was trained with {', '.join(other)}: give the same flags")
        net = make_net(args)
        runtime.load_state(net, saved["model"], path)
    return net


def find(given: str | None, stage: str, settings: Settings) -> Path:
    """The file that a flag names, else last.pt of an earlier stage of this run."""
    path = Path(given or settings.out / stage / "last.pt")
    if not given and not path.exists():
        raise UserError(
            f"there is no {path}; make it: python sdg_sod.py --stage {stage} "
            f"--data {settings.data} --out {settings.out}"
        )
    return path


def make_start(stage: str, args: argparse.Namespace, settings: Settings) -> SDGSOD:
    """The network of stage sod, control or guide, with the weights that the stage starts from."""
    if stage == "sod" and args.init:  # PVT-SOD alone, as Table 1 says, not all (D12)
        return load_sod("init", args.init, args)
    if stage == "sod":
        net = make_net(args)
        load_encoder(net.encoder, args.encoder, args.encoder_weights)
        return net
    path = find(args.sod, "sod", settings)
    if stage == "control":
        return load_sod("sod", path, args)
    with naming("captioner"):
        captioner = load_captioner(find(args.captioner, "caption", settings), args)
    return make_guided(load_sod("sod", path, args), captioner, args)


def check_start(stages: Sequence[str], args: argparse.Namespace, settings: Settings) -> None:
    """Raise `UserError` now for what a stage would refuse, perhaps after hours of training."""
    if set(stages) - {"caption"}:
        dataset = open_set(args.data, args.data_root)
        if dataset[0]["mask"] is None:
            raise UserError(f"--data {args.data}: not every picture has a mask")
        check_batch(min(args.batch_size, len(dataset)), args.decoder, args.size, settings)
    if "caption" in stages:
        if open_set(args.captions, args.data_root, masks=False)[0]["caption"] is None:
            raise UserError(f"--captions {args.captions}: not every picture has a caption")
        if args.vocabulary:
            raise UserError(
                "--vocabulary is for VirTex's captioner (--captioner FILE): ours knows its words"
            )
        make_new_captioner(captions.numbers(3), args)

    # Files that the first stage does not read itself.
    if args.sod and {"control", "guide"} & set(stages[1:]):
        load_sod("sod", args.sod, args)
    if args.captioner and "guide" in stages[1:]:
        with naming("captioner"):
            load_captioner(args.captioner, args)


def check_batch(batch: int, decoder: str, size: int, settings: Settings) -> None:
    """Raise `UserError` if BatchNorm would see one value per channel in a process.

    psp, aspp and apc normalise means over whole photos, ann its deepest map, which has one cell at
    32 pixels.
    """
    single = decoder in ("psp", "aspp", "apc") or decoder == "ann" and size == 32
    if single and batch < 2 * settings.world.size:
        raise UserError(
            f"--decoder {decoder} normalises over a batch what it sees of whole photos: it needs "
            "at least two in each process's share of --batch-size"
        )


# ---- Evaluation and prediction -------------------------------------------------------------------
def judging(part: str, settings: Settings) -> Settings:
    """The settings with those --eval sets alone that have a "caption" or a "mask"."""
    sets = []
    for spec in settings.eval:
        if open_set(spec, settings.data_root)[0][part] is not None:
            sets.append(spec)
    return dataclasses.replace(settings, eval=sets)


@torch.no_grad()
def saliency_logit(net: SDGSOD, image: Tensor, amp: str, m: Tensor | None = None) -> Tensor:
    """Saliency logit [B, 1, H, W], in eval mode; m: see `SDGSOD.forward`."""
    net.eval()
    with autocast(image.device, amp):
        return net(image, m)


@torch.no_grad()
def describe(
    captioner: Captioner, image: Tensor, amp: str
) -> tuple[list[tuple[list[str], Tensor]], Tensor]:
    """Images [B, 3, S, S] -> of each the words and their maps [words, 7, 7]; the sums of the maps
    [B, 1, 7, 7]."""
    captioner.eval()
    with autocast(image.device, amp):
        tokens, maps = captioner.attend(image)
    described = []
    for token, each in zip(tokens, maps):
        described.append(captions.spoken(token, each, captioner.lexicon))
    return described, maps.sum(1, keepdim=True)


def prediction(net: SDGSOD, maps: str, amp: str) -> harness.Forward:
    """The saliency logit of photos without anything else: guided by "own" maps or by the "mean"."""
    constant = net.mean_map if maps == "mean" and net.captioner is not None else None
    return partial(saliency_logit, net, amp=amp, m=constant)


def evaluate(stage: str, net: SDGSOD, settings: Settings, maps: str = "own") -> harness.Results:
    """Saliency scores of the --eval sets with masks; of stage guide with maps of `TEST_MAPS`."""
    judged = judging("mask", settings)
    folder = settings.out / stage
    row = row_of(stage, maps)
    if stage != "guide" or maps in ("own", "mean"):
        return harness.evaluate(prediction(net, maps, settings.amp), judged, folder, row)

    # Maps of other photos, or of masks, are made before; the photos come in the same order.
    results = {}
    for spec in judged.eval:
        dataset = open_set(spec, settings.data_root)
        bank = Bank(dataset, settings.size, settings.device, folder, parts=("image", "mask"))
        mine = iter(settings.world.share(make_maps(maps, net.captioner, bank, settings)))

        def with_maps(image: Tensor) -> Tensor:
            m = torch.stack([next(mine) for _ in image])
            return saliency_logit(net, image, settings.amp, m)

        one = dataclasses.replace(judged, eval=[spec])
        results |= harness.evaluate(with_maps, one, folder, row)
    return results


def row_of(stage: str, maps: str) -> str:
    """What follows a set's title in tables and folders: "-guide", "-guide-mean"."""
    return f"-{stage}" if stage != "guide" or maps == "own" else f"-{stage}-{maps}"


@torch.no_grad()
def study(captioner: Captioner, settings: Settings) -> None:
    """Describe the photos of the --eval sets with captions: scores, and pictures of eight photos.

    Writes <out>/caption/captions-<set>.json and <out>/caption/vis/<stem>.png.
    """
    folder = settings.out / "caption"
    for spec in judging("caption", settings).eval:
        dataset = open_set(spec, settings.data_root)
        scores = captions.Scores(dataset)
        for samples, images in harness.batches_of(dataset, settings, f"describe {dataset.title}"):
            described, _ = describe(captioner, images, settings.amp)
            for sample, image, (said, maps) in zip(samples, images, described):
                scores.add(sample, said, maps)
                if len(scores.texts) <= 8:
                    picture = captions.draw_words([image], said, maps)
                    save_png(folder / "vis" / f"{sample['name']}.png", picture)

            # How well is the next word of a true caption predicted? Pieces of words cannot tell.
            if captions.whole(captioner.lexicon) and all(sample["caption"] for sample in samples):
                texts = [sample["caption"][:1] for sample in samples]
                tokens, _ = tokenise(texts, captioner.lexicon)
                first = tokens[:, 0]  # [B, 30]
                logit, _ = captioner.read(captioner.encode(images), first.to(settings.device))
                scores.add_next(logit.argmax(2).cpu(), first)

        scores.merge(settings.world)
        if settings.world.main:
            scores.report(folder)


@torch.no_grad()
def study_maps(captioner: Captioner, settings: Settings) -> None:
    """Compare the captioner's maps, and others, with the masks of the --eval sets.

    At most 500 photos of each set. Writes <out>/caption/maps-<set>.json.
    """
    judged = judging("mask", settings).eval
    usual = mean_mask(settings.data, settings.data_root) if judged else None
    for spec in judged:
        dataset = open_set(spec, settings.data_root)
        found = Ladder()
        for samples, images in harness.batches_of(spread(dataset), settings, "maps"):
            _, sums = describe(captioner, images, settings.amp)
            found.add(samples, sums, captioner.features(images)[-1])
        found.merge(settings.world)
        if settings.world.main:
            found.report(dataset.title, usual, settings.seed, settings.out / "caption")


@torch.no_grad()
def explain_words(captioner: Captioner, image: Tensor) -> list[tuple[str, Tensor]]:
    """The map of each word that the captioner writes of a photo, as titled pictures (Fig. 9)."""
    ((said, maps),), _ = describe(captioner, image, "off")  # maps [words, 7, 7]
    pictures = []
    for j, (word, m) in enumerate(zip(said, maps), start=1):
        pictures.append((f"M{j}: {word}", stretched(m[None, None])))
    return pictures


@torch.no_grad()
def explain_saliency(
    net: SDGSOD, photo: Tensor, image: Tensor, kind: str
) -> list[tuple[str, Tensor]]:
    """The saliency network at work on one photo, as titled pictures: its features and its map,
    with guidance both with and without it. kind: of the map that guides, "own" or "mean"."""
    # Without guidance.
    net.eval()
    features = net.encoder(image)
    shown = [(f"F{i}, mean of channels", stretched(f)) for i, f in enumerate(features, start=1)]
    s = torch.sigmoid(resize(net.decoder(features).float(), image))
    if net.guidance is None:
        return [("photo", photo), *shown, ("S, the saliency map", s[0])]

    # With guidance: the features of each guided scale, and the maps of the words that guide.
    m = net.mean_map if kind == "mean" else net.captioner.guidance(image)  # [1, 1, 7, 7]
    for i, f in enumerate(net.guidance(features, m), start=1):
        title = f"F{i} guided, Eq. 3" if str(i) in net.guidance.xi else f"F{i}, not guided"
        shown.append((title, stretched(f)))
    if kind == "own":
        shown += explain_words(net.captioner, image)
    name = "mean map of training" if kind == "mean" else "normalise(M1 + ... + MT), Eq. 3"
    return [
        ("photo", photo),
        (name, stretched(net.guidance.normalise(m))),
        ("S without guidance", s[0]),
        ("S with guidance", torch.sigmoid(net(image, m))[0]),
        *shown,
    ]


def predict_words(net: nn.Module, settings: Settings, kind: str) -> None:
    """Write <out>/predict/<name>_words.png: photo, saliency unless of stage caption, words.

    kind: of the map that guides, "own" or "mean". Raises `UserError` in the end if photos could not
    be read and the network is a captioner; of others `harness.predict`, which follows, does.
    """
    folder = settings.out / "predict"
    photos = harness.open_photos(settings.predict, settings.data_root, skip=folder)
    harness.check_names([*photos.names, *(f"{name}_words" for name in photos.names)])
    captioner = net if isinstance(net, Captioner) else net.captioner
    lines = []
    broken = []
    for samples, images in harness.batches_of(photos, settings, "words", broken):
        described, m = describe(captioner, images, settings.amp)
        shown = [images]
        if net is not captioner:
            m = net.mean_map if kind == "mean" else m
            shown.append(torch.sigmoid(saliency_logit(net, images, settings.amp, m)))
        for i, (said, maps) in enumerate(described):
            name = samples[i]["name"]
            lines.append(f"{name}: {' '.join(said)}")
            pictures = [batch[i] for batch in shown]
            save_png(folder / f"{name}_words.png", captions.draw_words(pictures, said, maps))

    for part in settings.world.gather(lines):
        for line in part:
            say(line)
    broken = [reason for part in settings.world.gather(broken) for reason in part]
    if broken and net is captioner:
        raise UserError(f"{len(broken)} photo(s) could not be read: " + "; ".join(broken))


def open_checkpoint(
    path: Path, args: argparse.Namespace
) -> tuple[argparse.Namespace, str, nn.Module]:
    """The flags that fit a checkpoint, of ours or of VirTex's; its stage and its network."""
    saved = runtime.torch_load(path)
    if "method" not in saved:
        stage = "caption"
        out = args.out or Path("runs", "sdg_sod-released")
        args = flags.replaced(args, data="DUTS-TR", size=args.size or GRID, out=out)
    else:
        runtime.check_checkpoint(saved, path, METHOD)
        stage = saved["stage"]
        fixed = ["data", "released"]
        if stage != "caption":
            fixed += "encoder decoder width scales attn_norm attn_row maps live".split()
        free = ["size", "beam", "attn_row"]
        args = flags.saved_flags(build_parser(), args, saved, path, fixed, free)
        args = flags.replaced(args, out=flags.out_of(args, path, METHOD, STAGES))
    args = complete(args)

    if stage == "caption":
        return args, stage, load_captioner(path, args, saved)
    net = make_net(args)
    if stage == "guide":
        lexicon, described = saved_plan(saved, path, args)
        net = make_guided(net, make_captioner(lexicon, described, "none"), args)
    runtime.load_state(net, saved["model"], path)
    return args, stage, net


def load(weights: str | Path = "photos", device: str = "auto") -> harness.Predictor:
    """A trained network as a function of Pillow photos; weights: "photos" or a checkpoint.

    sod = load("run/guide/last.pt"); saliency = sod(Image.open("photo.jpg"))
    """
    args = build_parser().parse_args(["--weights", str(weights), "--device", device])
    path = flags.checkpoint_of(args, METHOD, "guide/last.pt")
    args, stage, net = open_checkpoint(path, flags.replaced(args, eval=[]))
    if stage == "caption":
        raise UserError(f"{path} is of stage caption, which makes no saliency maps")
    settings = flags.settle(args, METHOD, captions=True, quiet=True)
    net = settings.place(net, channels_last=False)
    return harness.Predictor(prediction(net, args.test_maps, settings.amp), net, settings)


# ---- Main ----------------------------------------------------------------------------------------
def use(args: argparse.Namespace) -> None:
    """Evaluate, predict or explain with a checkpoint: of --weights, or of the run folder."""
    path = flags.checkpoint_of(args, METHOD, f"{args.stage or 'guide'}/last.pt")
    args, stage, net = open_checkpoint(path, flags.replaced(args, weights=path))
    if args.words and stage in ("sod", "control"):
        raise UserError(
            f"--words: {path} is of stage {stage}, which knows no words; give a checkpoint of "
            "stage caption or guide"
        )
    if (args.predict or args.explain) and stage == "guide" and args.test_maps in ("other", "mask"):
        raise UserError(
            f"a photo alone has no map of the kind {args.test_maps}; give --test-maps own or mean"
        )
    settings = flags.settle(args, METHOD, captions=True)
    net = settings.place(net, channels_last=False)
    check_judges(stage, settings)
    if stage == "caption":
        study(net, settings)
        study_maps(net, settings)
    else:
        results = evaluate(stage, net, settings, args.test_maps)
        harness.save_results(results, settings, settings.out / stage)
    if args.predict and (stage == "caption" or args.words):
        predict_words(net, settings, args.test_maps)
    if args.predict and stage != "caption":
        forward = prediction(net, args.test_maps, settings.amp)
        harness.predict(forward, settings, args.overlay, args.skip_existing)
    if args.explain:
        photo, image, path = one_photo(args.explain, settings)
        if stage == "caption":
            pictures = [("photo", photo), *explain_words(net, image)]
        else:
            pictures = explain_saliency(net, photo, image, args.test_maps)
        panels(path, pictures, columns=4 if stage in ("caption", "guide") else 3)


def check_judges(stage: str, settings: Settings) -> None:
    """Raise `UserError` if there are --eval sets, but none of them can judge a stage."""
    parts = ["caption", "mask"] if stage == "caption" else ["mask"]
    if settings.eval and not any(judging(part, settings).eval for part in parts):
        raise UserError(
            f"--eval {' '.join(settings.eval)}: stage {stage} is judged by {'s or '.join(parts)}s, "
            "which these sets lack"
        )


def stages_to_train(args: argparse.Namespace) -> list[str]:
    """--stage; else all stages but those whose result was given."""
    given = {"sod": args.sod, "caption": args.captioner}
    return [args.stage] if args.stage else [stage for stage in STAGES if not given.get(stage)]


def main(argv: list[str] | None = None) -> None:
    """Train the stages asked for, in order; or use a checkpoint."""
    args = build_parser().parse_args(argv)
    if args.weights or args.predict or args.explain:
        use(args)
        return

    # Stage sod may start from a network of an earlier run, whose flags it then has.
    if args.init:
        with naming("init"):
            path = flags.named_checkpoint(args.init, METHOD)
            saved = runtime.load_checkpoint(path, METHOD, "sod")
        network = ["encoder", "decoder", "width"]
        args = flags.saved_flags(build_parser(), args, saved, path, network, free=[])

    args = complete(args)
    flags.show_preset(args, PRESETS)
    settings = flags.settle(args, METHOD, captions=True)
    stages = stages_to_train(args)
    if args.init and "sod" not in stages:
        raise UserError(f"--init {args.init} is of stage sod, which is not trained here")
    schedules = {stage: getattr(args, f"stage_{stage}") for stage in stages}
    check_start(stages, args, settings)
    claim(settings, schedules)

    results = {}
    for stage in stages:
        torch.manual_seed(args.seed)
        if stage == "caption":
            bank, texts = captioned_bank(args.captions, settings)
            net = make_new_captioner(captions.vocabulary(texts), args)
            net = settings.place(net, channels_last=False)
            train_captioner(net, settings, schedules[stage], bank, texts)
            study(net, settings)
            study_maps(net, settings)
        else:
            net = settings.place(make_start(stage, args, settings), channels_last=False)
            train_saliency(
                stage,
                net,
                settings,
                schedules[stage],
                bce=args.bce,
                cut=args.crop,
                maps=args.maps,
                live=args.live,
            )
            results |= evaluate(stage, net, settings, args.test_maps)
            harness.save_results(results, settings, settings.out / stage)
    shown = [stage for stage in ("sod", "control", "guide") if (settings.out / stage).exists()]
    columns = [f"{stage}/pred/{{}}{row_of(stage, args.test_maps)}" for stage in shown]
    harness.gallery(columns, judging("mask", settings))


if __name__ == "__main__":
    runtime.cli(main)

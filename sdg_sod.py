r"""SDG-SOD: Semantic Distillation Guided Salient Object Detection: captions guide a transformer.

Xu, Liu, Huang, Lu, Li, Guo: "Semantic Distillation Guided Salient Object Detection", 2022 (arXiv).
No code was ever released. This is written from the paper and from what it builds on: SegFormer's
encoder and decoder, VirTex's captioner, F3Net's loss.

Whoever describes a photo names what is salient in it, and captions are cheaper than masks. So a
captioner is trained on its own. Where its decoder looks while it writes a word is that word's map;
the sum of a caption's maps, 7 x 7 numbers, multiplies the features of a saliency transformer at
four scales (Eq. 3), which is then fine-tuned. Resizing is linear: instead of the sum of resized
maps the resized sum is used, so 49 numbers per photo, computed once, are all that training needs.

    image -> MiT -> F1 F2 F3 F4 -+-----> x --> xi --> + --> all-MLP decoder -> saliency logit
                                 +-------|------------+
    image -> CNN -> 7 x 7 grid -> text decoder -> M1 ... MT -> normalise(resize(M1 + ... + MT))
                                        |
                             "a man with an umbrella"

Usage
    python sdg_sod.py                                   # built-in shapes, no download, minutes
    python sdg_sod.py --data DUTS-TR --captions COCO-captions --encoder-weights mit_b3.pth
    python sdg_sod.py --stage sod --data COCO-SOD --epochs 30 --encoder-weights FILE --out coco
    python sdg_sod.py --data DUTS-TR --pretrained coco/sod/last.pt --out runs/sdg_sod-plus \
        --captioner runs/sdg_sod-DUTS-TR/caption/last.pt                           # ... SDG-SOD+
    python sdg_sod.py --stage guide --data DUTS-TR --captioner bicaptioning_R_50_L1_H2048.pth
    python sdg_sod.py --weights runs/sdg_sod-DUTS-TR/guide/last.pt --predict photo.jpg --words
    torchrun --nproc_per_node=4 sdg_sod.py --data DUTS-TR --encoder-weights mit_b3.pth

Stages, in order: sod (PVT-SOD, the saliency branch), caption (the guidance branch), control (only
on shapes unless asked for: PVT-SOD fine-tuned as long as guide), guide (both, fine-tuned). Of the
--eval sets those with captions judge stage caption, those with masks the others.

Results. Paper, DUTS-TE, S / mean F / mean E / MAE: PVT-SOD .898 / .865 / .933 / .030, SDG-SOD
.905 / .878 / .943 / .027; pre-trained on COCO .903 / .873 / .938 / .028 and .911 / .889 / .946 /
.026. Ours at that size: not run. At small scale: README.

Departures, and choices where the paper is silent:
 D1 "PVT" is SegFormer's MiT, whose weights (segmentation) are a file of yours: PVT has a position
    code and patches that do not overlap; PVTv2 would fit the text as well. Layers 2 2 2 2 are taken
    for mit_b1's.
 D2 the decoder is SegFormer's, fused by a layer with BatchNorm, width 256 (b0, b1) or 768;
    --decoder literal is the text's single layer. Table 4's rivals (common/rivals.py) have
    mmsegmentation's width, 512.
 D3 F3Net's loss as its paper has it, both terms weighted; --bce coded: as its code has it, where a
    misspelt argument cancels the weights of the cross-entropy.
 D4 SegFormer's AdamW: weight decay 0.01 but on norms and (here) biases, warm-up, linear decay; one
    rate for all, where SegFormer's head has ten times that of its encoder; batches of 16; 40 more
    epochs for guide, where the paper names 80 in all. Flips, and F3Net's crops of up to an eighth
    of each axis.
 D5 the captioner starts from ImageNet's weights (VirTex: at random), whose BatchNorm statistics
    it keeps, and learns with AdamW at one rate and flips (left and right change places in the
    words) for 20 epochs of batches of 16; VirTex with SGD, Lookahead, crops, colours, the CNN's
    rate 200 times the text's, 500,000 steps of 256. Ours is untested at that size.
 D6 the features of the CNN are standardised; without it (--plain-grid, VirTex) our captioners had
    learnt to speak long before they learnt to look. On shapes the grid also holds shallower maps,
    since the tiny CNN's deepest one has forgotten colours. Words are whole words, the most frequent
    ones, 10,000 with three special ones; VirTex's are pieces.
 D7 a word's map is the attention of the step that predicts it (--attn-row read: that reads it) in
    the forward direction's last layer, mean of the heads, without the start and the end; the
    start token is read before them, also with --released.
 D8 normalise stretches each resized sum to [0, 1]; others: --attn-norm.
 D9 xi starts at 0, so that guidance starts as the network that it was given.
 D10 the captioner sees the saliency network's photo, --size pixels, resized again to 224. A
    mirrored or cropped photo takes its map along; --live describes it anew.
 D11 with several processes each draws for its own share of a batch and normalises by it;
    BatchNorm's statistics are averaged after each epoch. Results depend a little on their number.
 D12 COCO-SOD pre-trains PVT-SOD, as Table 1 says, not the whole of SDG-SOD (section 4.3).
--released follows the code of F3Net in D3, and of VirTex's beam search, which forgets to feed the
start token after its first step.
The tool for annotating COCO (Appendix A) is data/relabel.py.

Shapes: B batch, H W input size, h w feature size, C channels, T words. Images are in [0, 1].
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from common import harness, runtime
from common.backbones import PIXELS, backbone
from common.bank import Bank, batches, crop, draw_crops, epoch_order
from common.datasets import open_set
from common.published import MIT_HEADS, mit_state, read_state, virtex_state
from common.rivals import ContextDecoder, resize
from common.runtime import UserError, autocast, generator, progress, save_png
from data import captions
from data.captions import END, LENGTH, PAD, START, tokenise

STAGES = ("sod", "caption", "control", "guide")
PAPER = {
    "epochs": (80, 20, 40, 40),
    "lr": (5e-5, 5e-4, 5e-5, 5e-5),
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
    "epochs": (20, 40, 6, 6),
    "lr": (1e-3, 1e-3, 3e-4, 3e-4),
    "batch_size": 16,
    "size": 160,
    "encoder": "mit_tiny",
    "backbone": "tiny",
    "hidden": 256,
    "taps": 4,
    "freeze": True,
    "beam": 5,
    "attn_row": "predict",
    "captions": None,
}
PAPER_SETS = [
    "DUTS-TE",
    "ECSSD",
    "DUT-OMRON",
    "HKU-IS",
    "PASCAL-S",  # Table 1
    "COCO-captions-val",
]  # for the captioner
MIT = {  # channels, layers and heads of the four levels, width of the decoder
    "mit_tiny": ((24, 48, 96, 128), (1, 1, 2, 1), (1, 2, 4, 4), 64),
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2), (1, 2, 5, 8), 256),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2), (1, 2, 5, 8), 256),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3), (1, 2, 5, 8), 768),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3), (1, 2, 5, 8), 768),
}
GRID = 224  # the captioner's input, whose deepest map has 7 x 7 cells
CAPTIONER = ("backbone", "pixels", "borders", "taps", "plain_grid", "hidden", "layers", "lexicon")


# ---- Config --------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    """All flags. A default of None is the paper's value, or the small preset's on shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="The docstring of this file explains the method.",
    )
    method = parser.add_argument_group("method")
    method.add_argument("--stage", choices=STAGES, help="one stage only [sod, caption, guide]")
    method.add_argument("--released", action="store_true", help="the code of F3Net and VirTex")
    method.add_argument("--encoder", choices=MIT, help="of the saliency branch, Table 2 [mit_b3]")
    method.add_argument("--encoder-weights", metavar="FILE", help="MiT's weights, or none")
    method.add_argument("--pretrained", metavar="FILE", help="checkpoint to start stage sod from")
    method.add_argument(
        "--decoder",
        choices=("mlp", "literal", "psp", "aspp", "apc", "ann"),
        default="mlp",
        help="Table 4 and D2 [mlp]",
    )
    method.add_argument("--width", type=harness.positive, help="channels of the decoder, see D2")
    method.add_argument("--bce", choices=("weighted", "coded"), help="see D3 [weighted]")
    method.add_argument(
        "--crop",
        type=float,
        default=0.125,
        metavar="SHARE",
        help="most that training cuts from either axis [0.125]",
    )
    method.add_argument("--sod", metavar="FILE", help="for control, guide [<out>/sod/last.pt]")
    method.add_argument(
        "--captioner",
        metavar="FILE",
        help="for guide, ours or VirTex's bicaptioning [<out>/caption/last.pt]",
    )
    method.add_argument(
        "--scales",
        type=int,
        nargs="+",
        choices=(1, 2, 3, 4),
        help="guided scales, from 1, the finest, Table 3 [all the decoder sees]",
    )
    method.add_argument(
        "--attn-norm",
        choices=("minmax", "max", "mean", "l1"),
        default="minmax",
        help="normalise in Eq. 3, see D8 [minmax]",
    )
    method.add_argument("--attn-row", choices=("predict", "read"), help="see D7 [predict]")
    method.add_argument("--xi-init", choices=("zero", "normal"), default="zero", help="see D9")
    method.add_argument(
        "--maps",
        choices=("own", "other"),
        default="own",
        help="other: train with another photo's map, to see if it matters [own]",
    )
    method.add_argument("--live", action="store_true", help="keep the captioner live, see D10")
    method.add_argument("--captions", metavar="SET", help="captioned photos [COCO-captions]")
    method.add_argument(
        "--taps",
        type=harness.positive,
        help="how many of the CNN's deepest maps make the grid, see D6 [1]",
    )
    method.add_argument("--plain-grid", action="store_true", help="do not standardise it, see D6")
    method.add_argument(
        "--freeze",
        action=argparse.BooleanOptionalAction,
        help="the captioner's CNN keeps its weights [no]",
    )
    method.add_argument("--hidden", type=harness.positive, help="width of the text decoder [1024]")
    method.add_argument("--layers", type=harness.positive, default=1, help="of text decoder [1]")
    method.add_argument(
        "--beam", type=harness.positive, help="captions tried at once; 1 is greedy [5]"
    )
    method.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="VirTex's (SentencePiece's .vocab), without which words are numbers",
    )
    method.add_argument(
        "--words",
        action="store_true",
        help="--predict also draws where each word of the caption looks, Fig. 9",
    )
    harness.add_flags(parser)
    return parser


def fill_defaults(args: argparse.Namespace) -> None:
    """Replace None by the paper's value, or by the small preset's on shapes, which is printed."""
    small = harness.use_preset(args, PAPER, SHAPES)
    # one number on the command line serves all stages
    args.epochs, args.lr = (v if isinstance(v, tuple) else (v,) * 4 for v in (args.epochs, args.lr))
    args.captions = args.captions or args.data
    rival = args.decoder not in ("mlp", "literal") and not small
    args.width = args.width or (512 if rival else MIT[args.encoder][3])
    args.bce = args.bce or ("coded" if args.released else "weighted")  # D3
    seen = [3, 4] if args.decoder == "ann" else [1, 2, 3, 4]
    args.scales = args.scales or seen
    if not set(args.scales) <= set(seen):
        raise UserError(
            "--decoder ann sees scales 3 and 4 alone: give --scales one or both of "
            "them, or leave it out"
        )
    if args.maps == "other" and args.live:
        raise UserError("--maps other needs maps made beforehand: leave out --live")
    if args.size < 32:
        raise UserError(f"--size {args.size} leaves nothing of the deepest map; at least 32")
    if args.hidden % 64:
        raise UserError(f"--hidden {args.hidden} is not a multiple of 64, the width of a head")
    if not 0 <= args.crop < 1:
        raise UserError(f"--crop {args.crop} is not a share from 0 to less than 1")
    if args.eval is None and args.data == "DUTS-TR":
        args.eval = harness.present(PAPER_SETS, args.data_root)
    elif args.eval is None:
        parts = [part.split("@")[0].removesuffix("-test") for part in args.data.split("+")]
        args.eval = ["+".join(f"{part}-test" for part in parts)] if small else []
    harness.show_preset(args, SHAPES)


# ---- Model: the PVT-SOD branch -------------------------------------------------------------------
class Attention(nn.Module):
    """Efficient self-attention: keys and values from a grid with R times fewer cells."""

    def __init__(self, channels: int, heads: int, side: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        if side > 1:  # Eq. 1's reshape and linear layer are a convolution whose stride is its size
            self.sr, self.norm = nn.Conv2d(channels, channels, side, side), nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h, w, C]"""
        b, h, w, c = x.shape
        q = self.q(x).view(b, h * w, self.heads, -1).transpose(1, 2)  # [B, heads, hw, d]
        if hasattr(self, "sr"):
            x = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # Eq. 1, R = side^2
        k, v = self.kv(x).view(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)  # Eq. 2
        return self.proj(x.transpose(1, 2).reshape(b, h, w, c))


class MixFFN(nn.Module):
    """Linear, depthwise convolution (which tells a token its place), GELU, linear."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.dwconv = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h, w, C]"""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2))
        return self.fc2(F.gelu(x).permute(0, 2, 3, 1))


class Block(nn.Module):
    """Attention and MixFFN on normalised inputs, each dropped for some images in training."""

    def __init__(self, channels: int, heads: int, side: int, drop: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, 1e-6), nn.LayerNorm(channels, 1e-6)
        self.attn, self.mlp = Attention(channels, heads, side), MixFFN(channels)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h, w, C]"""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def drop_path(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        return x * (torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop) / (1 - self.drop)


class Level(nn.Module):
    """Overlapping patches of the map before, blocks, LayerNorm."""

    def __init__(self, before: int, channels: int, heads: int, side: int, drops: list[float]):
        super().__init__()
        size, stride = (7, 4) if before == 3 else (3, 2)
        self.proj = nn.Conv2d(before, channels, size, stride, size // 2)
        self.norm_in, self.norm_out = nn.LayerNorm(channels), nn.LayerNorm(channels, 1e-6)
        self.blocks = nn.ModuleList(Block(channels, heads, side, drop) for drop in drops)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C', h', w'] -> [B, C, h, w]"""
        x = self.norm_in(self.proj(x).permute(0, 2, 3, 1))
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x).permute(0, 3, 1, 2)


class MiT(nn.Module):
    """SegFormer's Mix Transformer (D1): four maps at strides 4, 8, 16, 32."""

    def __init__(self, name: str):
        super().__init__()
        self.channels, layers, heads, _ = MIT[name]
        drops, before = torch.linspace(0, 0.1, sum(layers)).split(layers), (3, *self.channels)
        self.stages = nn.ModuleList(
            Level(before[i], self.channels[i], heads[i], (8, 4, 2, 1)[i], drops[i].tolist())
            for i in range(4)
        )
        for name, value in zip(("mean", "std"), PIXELS["imagenet"]):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        self.apply(initialise)

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] -> F1 ... F4, [B, C_i, H / 2^(i+1), W / 2^(i+1)]."""
        x, features = (image - self.mean) / self.std, []
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
        fan = module.out_channels * module.kernel_size[0] ** 2 / module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
        nn.init.zeros_(module.bias)


class Guidance(nn.Module):
    """Eq. 3 at some scales: F + xi(F * normalise(sum of the resized maps)).

    scales: from 1, the finest. kind: minmax, max, mean (divided by T), l1 (mean of 1), see D8.
    """

    def __init__(self, channels: tuple[int, ...], scales: list[int], kind: str, zero: bool = True):
        super().__init__()
        self.kind = kind
        self.xi = nn.ModuleDict(
            {str(i): nn.Conv2d(channels[i - 1], channels[i - 1], 1) for i in sorted(set(scales))}
        )
        for xi in self.xi.values():
            nn.init.zeros_(xi.weight) if zero else nn.init.trunc_normal_(xi.weight, std=0.02)
            nn.init.zeros_(xi.bias)

    def forward(self, features: list[Tensor], m: Tensor) -> list[Tensor]:
        """F1 ... F4 and the sum of a caption's maps [B, 1, 7, 7] -> guided F1 ... F4."""
        guided = list(features)
        for i, xi in self.xi.items():
            f = features[int(i) - 1]
            guided[int(i) - 1] = f + xi(f * self.normalise(resize(m, f)))
        return guided

    def normalise(self, m: Tensor) -> Tensor:
        """[B, 1, h, w], not negative, to the same; a map of zeros, with minmax a flat one, to 0."""
        mean, top = m.mean((2, 3), keepdim=True), m.amax((2, 3), keepdim=True)
        low = m.amin((2, 3), keepdim=True) if self.kind == "minmax" else 0
        # a word's map sums to 1 over 49 cells: 49 times the mean of the sum is T
        # (after resizing or a crop nearly T)
        scale = {"minmax": top - low, "max": top, "l1": mean, "mean": 49 * mean}[self.kind]
        return (m - low) / scale.clamp(min=1e-6)


class MLPDecoder(nn.Module):
    """All-MLP decoder: a linear layer per scale, resized to 1/4, concatenated, fused (D2)."""

    def __init__(self, channels: tuple[int, ...], width: int, literal: bool = False):
        super().__init__()
        self.linear = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = (
            nn.Identity()
            if literal
            else nn.Sequential(Conv2dNormActivation(4 * width, width, 1), nn.Dropout2d(0.1))
        )
        self.predict = nn.Conv2d(4 * width if literal else width, 1, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """F1 ... F4 -> logit [B, 1, H/4, W/4]"""
        levels = [resize(linear(f), features[0]) for linear, f in zip(self.linear, features)]
        return self.predict(self.fuse(torch.cat(levels[::-1], 1)))  # coarse to fine


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
        self.encoder, self.decoder = encoder, decoder
        self.guidance, self.captioner = guidance, captioner
        if captioner is not None:
            captioner.requires_grad_(False)

    def train(self, mode: bool = True) -> "SDGSOD":
        """As in torch, but the captioner is frozen."""
        super().train(mode)
        if self.captioner is not None:
            self.captioner.eval()
        return self

    def forward(self, image: Tensor, m: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], summed maps [B, 1, 7, 7] (None: describe the images) ->
        saliency logit [B, 1, H, W]."""
        features = self.encoder(image)
        if self.guidance is not None:
            m = self.captioner.guidance(image) if m is None else m
            features = self.guidance(features, m)
        return resize(self.decoder(features).float(), image)


# ---- Model: the semantically distilled guidance branch -------------------------------------------
class DecoderLayer(nn.TransformerDecoderLayer):
    """torch's layer with the norms last and GELU, which also returns where its words look."""

    def __init__(self, hidden: int):
        super().__init__(hidden, hidden // 64, 4 * hidden, batch_first=True)

    def forward(
        self, x: Tensor, grid: Tensor, future: Tensor, padded: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Words [B, T, H], grid [B, 49, H], masks [T, T], [B, T] -> [B, T, H], [B, T, 49]."""
        a = self.self_attn(x, x, x, attn_mask=future, key_padding_mask=padded, need_weights=False)[
            0
        ]
        x = self.norm1(x + self.dropout1(a))
        a, attention = self.multihead_attn(x, grid, grid)  # mean of the heads
        x = self.norm2(x + self.dropout2(a))
        a = self.linear2(self.dropout(F.gelu(self.linear1(x))))
        return self.norm3(x + self.dropout3(a)), attention


class Captioner(nn.Module):
    """VirTex: a CNN, and a transformer that writes captions forward and backward.

    vocabulary: number of words V; taps, plain: D6; row: D7. The two directions share all but their
    layers, and the output shares its weights with the embedding.
    """

    def __init__(
        self,
        encoder: nn.Module,
        vocabulary: int,
        hidden: int,
        layers: int = 1,
        taps: int = 1,
        plain: bool = False,
        row: str = "predict",
        beam: int = 5,
        released: bool = False,
    ):
        super().__init__()
        self.taps, self.row, self.beam, self.released = taps, row, beam, released
        channels = sum(encoder.channels[-taps:])
        self.encoder, self.projection = encoder, nn.Linear(channels, hidden)
        self.standardise = nn.Identity() if plain else nn.BatchNorm2d(channels, affine=False)
        self.words = nn.Embedding(vocabulary, hidden, padding_idx=PAD)
        self.positions = nn.Embedding(LENGTH, hidden)
        self.norm, self.dropout = nn.LayerNorm(hidden, 1e-8), nn.Dropout(0.1)
        self.forwards, self.backwards = (
            nn.ModuleList(DecoderLayer(hidden) for _ in range(layers)) for _ in range(2)
        )
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for name, p in self.named_parameters():
            if p.dim() > 1 and not name.startswith("encoder."):
                # VirTex: 0.02, as here of what takes in 1,024 numbers (narrower where more come in)
                nn.init.normal_(p, std=0.64 / math.sqrt(p.shape[1]))
        nn.init.zeros_(self.words.weight[PAD].data)

    def see(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> the grid G [B, 49, H]"""
        if image.shape[2:] != (GRID, GRID):
            image = F.interpolate(
                image, (GRID, GRID), mode="bilinear", antialias=True, align_corners=False
            )
        maps = self.encoder(image)[-self.taps :]
        grid = torch.cat([F.adaptive_avg_pool2d(m, maps[-1].shape[2:]) for m in maps], 1)
        return self.projection(self.standardise(grid).flatten(2).mT)

    def read(self, grid: Tensor, tokens: Tensor, backward: bool = False) -> tuple[Tensor, Tensor]:
        """Tokens [B, T] -> logits [B, T, V] of the next one, and cross-attention [B, T, 49]."""
        t, padded = tokens.shape[1], tokens == PAD
        x = self.words(tokens) + self.positions.weight[:t]
        x = self.dropout(self.norm(x)) * ~padded[..., None]
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        for layer in self.backwards if backward else self.forwards:
            x, attention = layer(x, grid, future, padded)
        return F.linear(x, self.words.weight, self.bias), attention

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: logits [B, T, V] of the caption and of its mirror image."""
        grid = self.see(image)
        return self.read(grid, tokens)[0], self.read(grid, reverse(tokens), backward=True)[0]

    @torch.no_grad()
    def write(self, grid: Tensor) -> Tensor:
        """Beam search: grid [B, 49, H] -> tokens [B, T], from the start token on.

        As in VirTex: two successors per beam, no word twice in a row, no reward for length.
        """
        n, b = len(grid), self.beam
        grid = grid.repeat_interleave(b, 0)  # [B b, 49, H]
        tokens = torch.full((n * b, 1), START, device=grid.device)
        score = torch.full((n, b), -math.inf, device=grid.device)
        score[:, 0] = 0  # all beams are equal yet
        for t in range(LENGTH):
            shown = tokens[:, 1:] if self.released and t else tokens
            p = self.read(grid, shown)[0][:, -1].float().log_softmax(1)  # [B b, V]
            p = p.scatter(1, tokens[:, -1:], -math.inf) if t else p
            ended = tokens[:, -1] == END
            p = p.masked_fill(ended[:, None], -math.inf)
            p[:, END] = p[:, END].masked_fill(ended, 0)
            p, word = p.topk(min(2 if t else b, b, p.shape[1]))  # [B b, k]
            score, best = (score.view(-1, 1) + p).view(n, -1).topk(b)  # [B, b]
            beam = best // p.shape[1] + b * torch.arange(n, device=grid.device)[:, None]
            word = word.view(n, -1).gather(1, best)
            tokens = torch.cat([tokens[beam.flatten()], word.view(-1, 1)], 1)
            if (word[:, 0] == END).all():  # the others can only become less likely
                break
        return tokens[::b]  # the best of each image

    @torch.no_grad()
    def look(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> caption [B, T], and the map of every word [B, T, 7, 7].

        Maps of anything but words are 0.
        """
        grid = self.see(image)
        tokens = self.write(grid)
        attention = self.read(grid, tokens[:, :LENGTH])[1].float()  # [B, <= 30, 49]
        word = tokens[:, 1:]
        rows = attention[:, 1:] if self.row == "read" else attention[:, : word.shape[1]]  # D7
        maps = attention.new_zeros(*word.shape, attention.shape[2])  # the last may have no row
        maps[:, : rows.shape[1]] = rows
        maps *= (word > END)[..., None]
        side = math.isqrt(maps.shape[2])
        return word, maps.unflatten(2, (side, side))

    def guidance(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> the sum of the words' maps [B, 1, 7, 7]"""
        return self.look(image)[1].sum(1, keepdim=True)


def reverse(tokens: Tensor) -> Tensor:
    """Captions [B, T] read backwards; the padding stays at the end."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    index = (tokens != PAD).sum(1, keepdim=True) - 1 - place
    return tokens.gather(1, index.clamp(min=0)) * (index >= 0)


# ---- Losses --------------------------------------------------------------------------------------
def structure_loss(logit: Tensor, g: Tensor, bce: str = "weighted") -> Tensor:
    """F3Net's weighted BCE + weighted IoU of the logit and the mask g, [B, 1, H, W] (D3).

    Weights: 1 + 5 |mean of g over 31 x 31 - g|, zeros beyond the border: pixels near edges count
    more. bce "coded": the plain mean of the cross-entropy.
    """
    logit, g = logit.float(), g.float()
    near = F.avg_pool2d(F.avg_pool2d(g, (31, 1), 1, (15, 0)), (1, 31), 1, (0, 15))
    w, p = 1 + 5 * (near - g).abs(), torch.sigmoid(logit)
    cross = F.binary_cross_entropy_with_logits(logit, g, reduction="none")
    wbce = cross.mean() if bce == "coded" else (w * cross).sum((1, 2, 3)) / w.sum((1, 2, 3))
    both, either = (w * p * g).sum((1, 2, 3)), (w * (p + g)).sum((1, 2, 3))
    return (wbce + 1 - (both + 1) / (either - both + 1)).mean()


def caption_loss(logits: tuple[Tensor, Tensor], tokens: Tensor) -> Tensor:
    """Cross-entropy of the next word, forward + backward: logits of both, [B, T, V]."""
    return sum(
        F.cross_entropy(logit[:, :-1].float().flatten(0, 1), t[:, 1:].flatten(), ignore_index=PAD)
        for logit, t in zip(logits, (tokens, reverse(tokens)))
    )


# ---- Training ------------------------------------------------------------------------------------
Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def make_backbone(args: argparse.Namespace, weights: str | None = None) -> nn.Module:
    """The captioner's CNN, filled from --backbone-weights unless `weights` are given."""
    usual = "imagenet" if args.backbone == "resnet50" else None
    weights = weights or args.backbone_weights or usual
    return backbone(args.backbone, weights, args.pixels, weights != "none", borders=args.borders)


def make_captioner(args: argparse.Namespace, weights: str | None = None) -> Captioner:
    """An untrained captioner on the CPU, its CNN filled as `make_backbone` says."""
    encoder = make_backbone(args, weights)
    return Captioner(
        encoder,
        len(args.lexicon),
        args.hidden,
        args.layers,
        args.taps,
        args.plain_grid,
        args.attn_row,
        args.beam,
        args.released,
    )


def load_captioner(
    path: str | Path, args: argparse.Namespace, saved: dict | None = None
) -> Captioner:
    """The captioner of a checkpoint (`saved` if it has been read), ours or VirTex's; sets the flags
    that describe it. --vocabulary replaces its words."""
    saved = saved or runtime.torch_load(path)
    if "method" in saved:
        of = f"{saved['method']} stage {saved.get('stage')}"
        if of != "sdg_sod stage caption":
            raise UserError(f"{path} is a checkpoint of {of}, not of sdg_sod stage caption")
        state = saved["model"]
        for name in CAPTIONER:
            setattr(args, name, saved["args"][name])
    else:
        state = saved.get("model", saved)
        state = virtex_state(state) if isinstance(state, dict) else {}
        if getattr(state.get("words.weight"), "ndim", 0) != 2:
            raise UserError(f"{path} holds neither a captioner of sdg_sod.py nor one of VirTex")
        count, args.hidden = state["words.weight"].shape
        args.layers = len({key.split(".")[1] for key in state if key.startswith("forwards.")})
        args.backbone, args.pixels, args.borders = "resnet50", "imagenet", "zeros"
        args.taps, args.plain_grid = 1, True
        args.lexicon = captions.numbers(count)
    if args.vocabulary:
        args.lexicon = captions.read_vocabulary(args.vocabulary, len(args.lexicon))
    captioner = make_captioner(args, "none")
    runtime.load_state(captioner, state, path)
    return captioner


def caption_task(args: argparse.Namespace, folder: Path) -> tuple[Captioner, Bank, Loss]:
    """Network, photos and loss of stage caption."""
    heard = captions.Overheard(open_set(args.captions, args.data_root, masks=False))
    bank = Bank(heard, GRID, args.device, folder)
    if not all(heard.captions):
        raise UserError(f"--captions {args.captions}: not every picture has a caption")
    args.lexicon = captions.vocabulary(heard.captions)
    tokens, counts = tokenise(heard.captions, args.lexicon)
    mirror = captions.mirrored(args.lexicon)
    net = make_captioner(args).to(args.device)
    net.encoder.requires_grad_(not args.freeze)

    def loss(net: nn.Module, index: Tensor, flip: Tensor, random: torch.Generator) -> Tensor:
        which = torch.rand(len(index), generator=random) * counts[index]
        said = tokens[index, which.long()]  # [B, 30]
        said = torch.where(flip[:, None], mirror[said], said)
        said = said[:, : int((said != PAD).sum(1).max())]  # the longest one's length
        said = said.to(args.device, non_blocking=True)
        with autocast(args.device, args.amp):
            logits = net(bank.images(index, flip), said)
        return caption_loss(logits, said)

    return net, bank, loss


def make_net(stage: str, args: argparse.Namespace, captioner: Captioner | None = None) -> SDGSOD:
    """An untrained saliency network on the CPU; that of stage guide needs a captioner."""
    encoder, guidance = MiT(args.encoder), None
    if args.decoder in ("mlp", "literal"):
        decoder = MLPDecoder(encoder.channels, args.width, args.decoder == "literal")
    else:
        decoder = ContextDecoder(args.decoder, encoder.channels, args.width)
    if stage == "guide":
        guidance = Guidance(encoder.channels, args.scales, args.attn_norm, args.xi_init == "zero")
    return SDGSOD(encoder, decoder, guidance, captioner)


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Say in a `UserError` which flag's file is at fault."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--{flag}: {error}") from None


def load_encoder(encoder: MiT, args: argparse.Namespace) -> None:
    """Fill the encoder from --encoder-weights; raises `UserError` unless every key has its place"""
    weights = args.encoder_weights or ("none" if args.encoder == "mit_tiny" else None)
    if weights is None:
        raise UserError(
            f"--encoder-weights: give a file with the weights of {args.encoder} (from "
            "smp-hub or nvidia on huggingface.co, or OpenMMLab), or none"
        )
    if weights != "none":
        with naming("encoder-weights"):
            runtime.load_state(encoder, mit_state(read_state(weights)), weights, MIT_HEADS)


def find(flag: str, stage: str, args: argparse.Namespace) -> Path:
    """The file that --sod, --pretrained or --captioner names, else last.pt of that stage's run."""
    given = getattr(args, flag)
    path = Path(given or args.out / stage / "last.pt")
    if not given and not path.exists():
        raise UserError(
            f"there is no {path}; make it: python sdg_sod.py --stage {stage} "
            f"--data {args.data} --out {args.out}"
        )
    return path


def load_sod(flag: str, args: argparse.Namespace) -> dict[str, Tensor]:
    """State dict of the PVT-SOD that --sod or --pretrained names; raises `UserError`."""
    path = find(flag, "sod", args)
    with naming(flag):
        saved = runtime.load_checkpoint(path, "sdg_sod", "sod")
        other = [
            f"--{name} {saved['args'][name]}"
            for name in ("encoder", "decoder", "width")
            if saved["args"][name] != getattr(args, name)
        ]
        if other:
            raise UserError(f"{path} was trained with {', '.join(other)}: give the same flags")
    return saved["model"]


def start_net(stage: str, args: argparse.Namespace) -> SDGSOD:
    """The network of stage sod, control or guide, with the weights that the stage starts from."""
    if stage == "sod" and not args.pretrained:
        net = make_net(stage, args)
        load_encoder(net.encoder, args)
        return net
    flag, captioner = "pretrained" if stage == "sod" else "sod", None
    state = load_sod(flag, args)
    if stage == "guide":
        with naming("captioner"):
            captioner = load_captioner(find("captioner", "caption", args), args)
    net = make_net(stage, args, captioner)
    new = {k: v for k, v in net.state_dict().items() if k.startswith(("guidance.", "captioner."))}
    runtime.load_state(net, {**new, **state}, f"the file of --{flag}")
    return net


def check_files(stages: Sequence[str], args: argparse.Namespace) -> None:
    """Raise `UserError` now for a file or a set that a later stage would refuse after hours."""
    if "caption" in stages:
        if open_set(args.captions, args.data_root, masks=False)[0]["caption"] is None:
            raise UserError(f"--captions {args.captions}: not every picture has a caption")
        if args.vocabulary:
            raise UserError(
                "--vocabulary is for VirTex's captioner (--captioner FILE): ours knows its words"
            )
        make_backbone(args)
    if {"control", "guide"} & set(stages[1:]):
        open_set(args.data, args.data_root)
        if args.sod:
            load_sod("sod", args)
        if args.captioner:
            with naming("captioner"):  # a copy: its flags shall not become those of other stages
                load_captioner(args.captioner, argparse.Namespace(**vars(args)))


def sod_task(stage: str, args: argparse.Namespace, folder: Path) -> tuple[SDGSOD, Bank, Loss]:
    """Network, number of images and loss of the stages sod, control and guide."""
    dataset = open_set(args.data, args.data_root)
    if (
        args.decoder in ("psp", "aspp", "apc")
        and min(args.batch_size, len(dataset)) < 2 * args.world.size
    ):
        raise UserError(
            f"--decoder {args.decoder} normalises over a batch what it sees of whole "
            "photos: it needs at least two in each process's share of --batch-size"
        )
    sdg = start_net(stage, args).to(args.device)
    bank = Bank(dataset, args.size, args.device, folder, parts=("image", "mask"))
    if not bank.has["mask"].all():
        raise UserError(f"--data {args.data}: not every picture has a mask")

    @cache
    def guidance() -> Tensor:
        """[N, 1, 7, 7], made on first use: --resume restores the captioner before."""
        maps = map_bank(sdg.captioner, bank, args)
        return maps.roll(1, 0) if args.maps == "other" else maps

    def loss(net: nn.Module, index: Tensor, flip: Tensor, random: torch.Generator) -> Tensor:
        box, m = draw_crops(len(index), args.crop, random), None
        image, mask = (crop(x, box) for x in (bank.images(index, flip), bank.masks(index, flip)))
        if stage == "guide" and not args.live:
            m = guidance()[index.to(args.device, non_blocking=True)]  # [B, 1, 7, 7]
            mirrored = flip.to(args.device, non_blocking=True).view(-1, 1, 1, 1)
            m = crop(torch.where(mirrored, m.flip(3), m), box)
        with autocast(args.device, args.amp):
            logit = net(image, m)
        return structure_loss(logit, mask, args.bce)

    return sdg, bank, loss


@torch.no_grad()
def map_bank(captioner: Captioner, bank: Bank, args: argparse.Namespace) -> Tensor:
    """The guidance of every image, 49 numbers each. [N, 1, 7, 7] on the device"""
    captioner.eval()
    mine, parts = args.world.share(torch.arange(len(bank))), []
    for index in progress(mine.split(args.batch_size), "guidance"):
        with autocast(args.device, args.amp):
            parts.append(captioner.guidance(bank.images(index)).cpu())
        if args.dry_run and len(parts) == 2:
            break
    maps = torch.zeros(len(bank), *parts[0].shape[1:])
    for rank, part in enumerate(args.world.gather(torch.cat(parts))):
        maps[rank :: args.world.size][: len(part)] = part
    return maps.to(args.device)


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate: up over 1,500 steps (at most a tenth of all), then down to 0."""
    return min(1.0, (step + 1) / min(1500, max(steps // 10, 1))) * (1 - step / steps)


def train(stage: str, args: argparse.Namespace) -> nn.Module:
    """Train one stage from its start or, with --resume, from last.pt."""
    world, folder, at = args.world, args.out / stage, STAGES.index(stage)
    epochs, args.lexicon = args.epochs[at], None  # the stages caption and guide set the lexicon
    torch.manual_seed(args.seed)
    net, bank, loss = (
        caption_task(args, folder) if stage == "caption" else sod_task(stage, args, folder)
    )
    if args.compile:
        net.compile()
    learnt = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [  # matrices decay, norms and biases do not
            {"params": [p for p in learnt if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in learnt if p.dim() < 2], "weight_decay": 0.0},
        ]
    )
    flags = harness.plain_flags(args, bank.names) | {"epochs": epochs, "lr": args.lr[at]}
    short = {name: value for name, value in flags.items() if name != "lexicon"}  # 10,000 words
    check_lexicon(stage, args)
    done = harness.resume(folder, "sdg_sod", stage, short, net, optimiser)
    harness.save_args(short, args, folder)
    log = runtime.Log(folder, epochs, done, quiet=not world.main)
    parallel = world.parallel(net)
    watch = None if stage == "caption" else harness.Watch(judging(stage, args))
    for epoch in range(done + 1, epochs + 1):
        net.train()
        mean, images = train_epoch(stage, parallel, loss, optimiser, len(bank), epoch, args)
        runtime.require_finite(mean, epoch)
        world.average_statistics(net)  # D11
        picture = folder / "vis" / f"epoch_{epoch:03d}.png"
        seen = watch(partial(forward, net, args=args), picture) if watch else {}
        log.epoch(epoch, images, loss=mean, lr=optimiser.param_groups[0]["lr"], **seen)
        if world.main:
            harness.save(folder, "sdg_sod", stage, epoch, flags, net, optimiser)
        world.barrier()
    return net


def check_lexicon(stage: str, args: argparse.Namespace) -> None:
    """Raise `UserError` if --resume would go on with a captioner of another vocabulary."""
    path = args.out / stage / "last.pt"
    if args.lexicon and args.resume and path.exists():
        was = runtime.load_checkpoint(path, "sdg_sod", stage)["args"]["lexicon"]
        if was != args.lexicon:
            source = "captions" if stage == "caption" else "captioner"
            raise UserError(
                f"{path}: the captioner's vocabulary is another; give --resume the "
                f"same --{source}, or another --out for a new run"
            )


def train_epoch(
    stage: str,
    net: nn.Module,
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    count: int,
    epoch: int,
    args: argparse.Namespace,
) -> tuple[float, int]:
    """One pass over `count` images: (mean loss, number of images)."""
    world, total, done = args.world, torch.zeros((), device=args.device), 0
    order, batch = epoch_order(count, args.batch_size, args.seed, epoch, world)
    steps, at = len(order) // batch, STAGES.index(stage)
    random = generator("cpu", args.seed, stage, epoch, world.rank)
    torch.manual_seed(random.initial_seed())  # dropout of a resumed epoch shall be the same
    for index, flip in progress(
        batches(order, batch, args.seed, epoch, world), f"{stage} epoch {epoch}", steps
    ):
        for group in optimiser.param_groups:
            group["lr"] = args.lr[at] * rate((epoch - 1) * steps + done, args.epochs[at] * steps)
        value = loss(net, index, flip, random)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        total, done = total + value.detach(), done + 1
        if args.dry_run and done == 2:
            break
    return sum(world.gather(float(total) / done)) / world.size, done * batch


# ---- Evaluation and prediction -------------------------------------------------------------------
def judging(stage: str, args: argparse.Namespace) -> argparse.Namespace:
    """The flags with those --eval sets alone that judge a stage: with captions, or with masks."""
    part = "caption" if stage == "caption" else "mask"
    sets = [spec for spec in args.eval if open_set(spec, args.data_root)[0][part] is not None]
    return argparse.Namespace(**{**vars(args), "eval": sets})


@torch.no_grad()
def forward(
    net: SDGSOD, image: Tensor, args: argparse.Namespace, m: Tensor | None = None
) -> Tensor:
    """Saliency logit [B, 1, H, W], in eval mode; m: see `SDGSOD.forward`."""
    net.eval()
    with autocast(args.device, args.amp):
        return net(image, m)


@torch.no_grad()
def describe(
    captioner: Captioner, image: Tensor, args: argparse.Namespace
) -> tuple[list[tuple[list[str], Tensor]], Tensor]:
    """Images [B, 3, S, S] -> of each the words and their maps [words, 7, 7]; the sums of the maps
    [B, 1, 7, 7]."""
    captioner.eval()
    with autocast(args.device, args.amp):
        tokens, maps = captioner.look(image)
    said = [captions.spoken(*one, args.lexicon) for one in zip(tokens, maps)]
    return said, maps.sum(1, keepdim=True)


@torch.no_grad()
def study(captioner: Captioner, args: argparse.Namespace, folder: Path) -> None:
    """Describe the photos of every --eval set, print and save the scores, draw eight photos."""
    for spec in args.eval:
        dataset = open_set(spec, args.data_root)
        scores = captions.Scores(dataset)
        for samples, images in harness.batches_of(dataset, args, f"describe {dataset.title}"):
            found, _ = describe(captioner, images, args)
            for sample, image, (said, maps) in zip(samples, images, found):
                scores.add(sample, said, maps)
                if len(scores.texts) <= 8:
                    save_png(
                        folder / "vis" / f"{sample['name']}.png",
                        captions.draw_words([image], said, maps),
                    )
            if captions.whole(args.lexicon) and all(sample["caption"] for sample in samples):
                first = tokenise([s["caption"][:1] for s in samples], args.lexicon)[0][:, 0]
                logit = captioner.read(captioner.see(images), first.to(args.device))[0]
                scores.add_next(logit.argmax(2).cpu(), first)
        scores.merge(args.world)
        if args.world.main:
            scores.report(folder)


def evaluate(stage: str, net: nn.Module, args: argparse.Namespace) -> harness.Results:
    """Saliency scores of the --eval sets with masks; of stage caption `study` prints others."""
    args = judging(stage, args)
    if stage == "caption":
        study(net, args, args.out / stage)
        return {}
    return harness.evaluate(partial(forward, net, args=args), args, args.out / stage, f"-{stage}")


def predict_words(net: nn.Module, args: argparse.Namespace) -> None:
    """Write <out>/predict/<stem>_words.png: photo, saliency unless of stage caption, words."""
    photos = (
        harness.Photo(args.predict)
        if args.predict.is_file()
        else open_set(args.predict, args.data_root, masks=False)
    )
    captioner = net if isinstance(net, Captioner) else net.captioner
    for samples, images in harness.batches_of(photos, args, "words"):
        found, m = describe(captioner, images, args)
        logits = [] if net is captioner else forward(net, images, args, m)
        for i, (said, maps) in enumerate(found):
            print(f"{samples[i]['name']}: {' '.join(said)}")
            pictures = [images[i], *(torch.sigmoid(logit) for logit in logits[i : i + 1])]
            save_png(
                args.out / "predict" / f"{samples[i]['name']}_words.png",
                captions.draw_words(pictures, said, maps),
            )


def load(path: Path, args: argparse.Namespace) -> tuple[str, nn.Module]:
    """Stage and network of one of our checkpoints, or of VirTex's."""
    saved = runtime.torch_load(path)
    ours = "method" in saved
    args.out = args.out or (
        harness.run_of(path, STAGES) if ours else Path("runs", "sdg_sod-released")
    )
    if not ours or saved.get("stage") == "caption":
        was = (
            saved["args"]
            if ours
            else {**PAPER, "data": "DUTS-TR", "size": GRID, "released": args.released}
        )
        args.data, args.released = was["data"], was["released"]
        for name in ("size", "beam", "attn_row"):
            setattr(args, name, getattr(args, name) or was[name])
        stage, net = "caption", load_captioner(path, args, saved)
    else:
        names = (
            *CAPTIONER,
            "encoder",
            "decoder",
            "width",
            "scales",
            "attn_norm",
            "attn_row",
            "released",
            "data",
        )
        saved = harness.restore(path, "sdg_sod", args, names, ("size", "beam"))
        stage, captioner = saved["stage"], None
        if stage == "guide":
            if args.vocabulary:
                args.lexicon = captions.read_vocabulary(args.vocabulary, len(args.lexicon))
            captioner = make_captioner(args, "none")
        net = make_net(stage, args, captioner)
        runtime.load_state(net, saved["model"], path)
    fill_defaults(args)
    harness.prepare(args, "sdg_sod", captions=True)
    return stage, net.to(args.device)


# ---- Main ----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    """Train the stages asked for, in order; or evaluate or predict with a checkpoint."""
    args = build_parser().parse_args(argv)
    args.lexicon = None
    if args.weights or args.predict:
        run = harness.run_folder(args, "sdg_sod")
        args.weights = args.weights or run / (args.stage or "guide") / "last.pt"
        stage, net = load(args.weights, args)
        if args.words and stage in ("sod", "control"):
            raise UserError(
                f"--words: {args.weights} is of stage {stage}, which knows no words; "
                "give a checkpoint of stage caption or guide"
            )
        if not args.predict:
            if args.eval and not judging(stage, args).eval:
                part = "captions" if stage == "caption" else "masks"
                raise UserError(
                    f"--eval {' '.join(args.eval)}: stage {stage} is judged by {part}, "
                    "which these sets lack"
                )
            harness.save_results(evaluate(stage, net, args), args, args.out / stage)
        elif stage != "caption":
            harness.predict(partial(forward, net, args=args), args)
        if args.predict and (stage == "caption" or args.words):
            predict_words(net, args)
        return
    fill_defaults(args)
    harness.prepare(args, "sdg_sod", captions=True)
    small, results = harness.is_shapes(args.data), {}
    stages = (args.stage,) if args.stage else STAGES if small else ("sod", "caption", "guide")
    if not args.stage:  # what was given need not be trained
        given = {"sod": args.sod, "caption": args.captioner}
        stages = [stage for stage in stages if not given.get(stage)]
    check_files(stages, args)
    for stage in stages:
        results |= evaluate(stage, train(stage, args), args)
        if stage != "caption":
            harness.save_results(results, args, args.out / stage)
    harness.gallery(
        [
            f"{stage}/pred/{{}}-{stage}"
            for stage in ("sod", "control", "guide")
            if (args.out / stage).exists()
        ],
        judging("sod", args),
    )


if __name__ == "__main__":
    runtime.cli(main)

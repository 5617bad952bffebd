"""Decoders of other methods that SDG-SOD's is compared with (its Table 4), after mmsegmentation.

    decoder = ContextDecoder("aspp", (64, 128, 320, 512), width=512)
    logit = decoder([f1, f2, f3, f4])    # maps at strides 4, 8, 16, 32

    psp   PSPNet, Zhao et al., CVPR 2017: means over 1, 2, 3 and 6 regions per axis
    aspp  DeepLabv3, Chen et al., 2017: dilated convolutions, and the mean of the whole map
    apc   APCNet, He et al., CVPR 2019: regions weighed anew for each pixel
    ann   ANNet, Zhu et al., ICCV 2019: attention between the two deepest maps, then within

The paper gives no settings. psp, aspp and apc see all scales, resized to 1/8 and concatenated: no
map at 1/32 alone could be as exact as its table says. They normalise means over whole maps over the
batch, so training needs at least two images per process.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation


def conv(before: int, after: int, size: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return Conv2dNormActivation(before, after, size, dilation=dilation)


def pooled(before: int, after: int, n: int) -> nn.Sequential:
    """Means over n x n regions of the map, then `conv`."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(before, after))


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of `like`."""
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class Affinity(nn.Module):
    """APCNet's context: each pixel weighs n x n regions, by a sigmoid of itself and the mean."""

    def __init__(self, before: int, after: int, n: int):
        super().__init__()
        self.n = n
        self.reduce = conv(before, after)
        self.region = conv(before, after)
        self.weigh = nn.Sequential(conv(after, after), nn.Conv2d(after, n * n, 1), nn.Sigmoid())
        self.back = conv(after, after)
        self.fuse = conv(after, after)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, h, w]"""
        regions = self.region(F.adaptive_avg_pool2d(x, self.n)).flatten(2)  # [B, C, nn]
        x = self.reduce(x)
        weights = self.weigh(x + x.mean((2, 3), keepdim=True)).flatten(2)  # [B, nn, hw]
        return self.fuse(x + self.back((regions @ weights).view_as(x)))


class NonLocal(nn.Module):
    """ANNet's attention, from each pixel of `x` to means over 1 + 9 + 36 + 64 regions of `low`."""

    def __init__(self, before: int, low: int, after: int):
        super().__init__()
        self.q = conv(before, 256)
        self.kv = nn.ModuleList([conv(low, 256), nn.Conv2d(low, 256, 1)])
        self.fuse = conv(256 + before, after)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        """[B, before, h, w], [B, low, h', w'] -> [B, after, h, w]"""
        k, v = (means_over_regions(project, low) for project in self.kv)  # [B, 110, 256]
        q = self.q(x).flatten(2).mT  # [B, hw, 256]
        context = F.scaled_dot_product_attention(q, k, v).mT  # [B, 256, hw]
        return self.fuse(torch.cat([context.unflatten(2, x.shape[2:]), x], 1))


def means_over_regions(project: nn.Module, x: Tensor) -> Tensor:
    """Means of the projected map over n x n regions, n = 1, 3, 6 and 8: [B, 110, C]"""
    means = [F.adaptive_avg_pool2d(project(x), n).flatten(2) for n in (1, 3, 6, 8)]
    return torch.cat(means, 2).mT


class ContextDecoder(nn.Module):
    """Any of the four: kind psp, aspp, apc or ann; channels of F1 ... F4."""

    def __init__(self, kind: str, channels: tuple[int, ...], width: int):
        super().__init__()
        self.kind = kind
        before = sum(channels)
        if kind == "ann":
            inner = channels[3]
            contexts = [NonLocal(inner, channels[2], inner), NonLocal(width, width, width)]
        elif kind == "apc":
            inner = before + 4 * width
            contexts = [Affinity(before, width, n) for n in (1, 2, 3, 6)]
        elif kind == "aspp":  # the mean of the whole map, and dilated convolutions
            inner = 5 * width
            contexts = [pooled(before, width, 1), conv(before, width)]
            contexts += [conv(before, width, 3, dilation) for dilation in (12, 24, 36)]
        else:
            inner = before + 4 * width
            contexts = [pooled(before, width, n) for n in (1, 2, 3, 6)]
        self.contexts = nn.ModuleList(contexts)
        self.bottleneck = conv(inner, width, 3)
        self.predict = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, 1, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """F1 ... F4 -> logit [B, 1, H/8, W/8], of ann [B, 1, H/32, W/32]"""
        if self.kind == "ann":
            across, within = self.contexts
            x = self.bottleneck(across(features[3], features[2]))
            return self.predict(within(x, x))

        x = torch.cat([resize(f, features[1]) for f in features], 1)
        seen = [resize(context(x), x) for context in self.contexts]
        if self.kind != "aspp":
            seen.append(x)
        return self.predict(self.bottleneck(torch.cat(seen, 1)))

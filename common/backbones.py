"""Encoders: one call gives five feature maps at strides 2, 4, 8, 16, 32.

    encoder = backbone("resnet50", "moco800")
    f1, f2, f3, f4, f5 = encoder(image)        # image [B, 3, H, W] in [0, 1]
    encoder.channels                           # (64, 256, 512, 1024, 2048)

    name          taps                                         channels              weights
    resnet50      relu(bn(conv1)), layer1 ... layer4           64 256 512 1024 2048  moco800 moco200
                                                                                     imagenet
    resnet18      the same                                     64 64 128 256 512     imagenet
    vgg16         the five max-poolings                        64 128 256 512 512    imagenet
    mobilenet_v2  blocks 1, 3, 6, 13 and the last convolution  16 24 32 96 1280      imagenet
    tiny          five levels, defined here                    32 48 96 160 256      shapes

The image is normalised inside, since the weights decide how: `pixels` is "imagenet" (mean and
standard deviation of ImageNet), "f3net" (those that F3Net and its heirs use), "symmetric"
([-1, 1]), or "unit" ([0, 1] as it is).

BatchNorm: `stored_stats=True` keeps the statistics that came with the weights, also while training;
False is torch's usual behaviour (batch statistics in training mode, running averages updated).

Weights are downloaded once to torch's hub folder, and checked against their published digest in
every run; any local file is accepted instead. Every key is accounted for: a missing or surplus one
is an error.
"""

import hashlib
import http.client
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from common.runtime import UserError, load_state, torch_load

PIXELS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "f3net": ((124.55 / 255, 118.90 / 255, 102.94 / 255), (56.77 / 255, 55.97 / 255, 57.50 / 255)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}

_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/"
_TORCH = "https://download.pytorch.org/models/"
WEIGHTS = {  # (backbone, name): (address, first digits of the file's published digest)
    ("resnet50", "moco800"): (
        _MOCO + "moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        "md5:a04e12f8",
    ),
    ("resnet50", "moco200"): (
        _MOCO + "moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar",
        "md5:59fd9945",
    ),
    ("resnet50", "imagenet"): (_TORCH + "resnet50-0676ba61.pth", "sha256:0676ba61"),
    ("resnet18", "imagenet"): (_TORCH + "resnet18-f37072fd.pth", "sha256:f37072fd"),
    ("vgg16", "imagenet"): (_TORCH + "vgg16-397923af.pth", "sha256:397923af"),
    ("mobilenet_v2", "imagenet"): (_TORCH + "mobilenet_v2-b0353104.pth", "sha256:b0353104"),
}
TINY_WEIGHTS = Path(__file__).parent.parent / "data" / "tiny_encoder.pt"
DEFAULT_WEIGHTS = {"resnet50": "moco800", "tiny": "shapes"}  # the others: imagenet
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # numbers of weights


# ---- The five encoders ---------------------------------------------------------------------------
class Pyramid(nn.Module):
    """Base of the encoders: pixel normalisation and the BatchNorm policy."""

    channels: tuple[int, ...]
    stored_stats = False

    def set_pixels(self, pixels: str) -> None:
        """Choose the normalisation, a key of `PIXELS`."""
        for name, value in zip(("mean", "std"), PIXELS[pixels]):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to the numbers that the weights were trained on."""
        return (image - self.mean) / self.std

    def train(self, mode: bool = True):
        """As in torch, but BatchNorm stays in eval mode if `stored_stats` is set."""
        super().train(mode)
        if self.stored_stats:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


class ResNet(Pyramid, torchvision.models.ResNet):
    """torchvision's ResNet; the first tap lies before the max-pooling."""

    def __init__(self, block, layers: list[int], keep_fc: bool = False):
        torchvision.models.ResNet.__init__(self, block, layers)
        self.channels = (64, *(width * block.expansion for width in (64, 128, 256, 512)))
        if not keep_fc:
            del self.fc

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] to five maps at strides 2, 4, 8, 16, 32."""
        x = self.relu(self.bn1(self.conv1(self.normalise(image))))
        taps = [x]
        x = self.maxpool(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            taps.append(x)
        return taps


class VGG16(Pyramid):
    """torchvision's VGG-16 features, tapped after each max-pooling, or before it."""

    channels = (64, 128, 256, 512, 512)
    before_pooling = False

    def __init__(self):
        super().__init__()
        self.features = torchvision.models.vgg16().features

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] to five maps at strides 2, 4, 8, 16, 32, or 1, 2, 4, 8, 16."""
        x = self.normalise(image)
        taps = []
        for layer in self.features:
            before = x
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                taps.append(before if self.before_pooling else x)
        return taps


class MobileNetV2(Pyramid):
    """torchvision's MobileNetV2, tapped before each growth of the stride and at the end."""

    channels = (16, 24, 32, 96, 1280)

    def __init__(self):
        super().__init__()
        self.features = torchvision.models.mobilenet_v2().features

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] to five maps at strides 2, 4, 8, 16, 32."""
        x = self.normalise(image)
        taps = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in (1, 3, 6, 13, 18):
                taps.append(x)
        return taps


def convolution(before: int, after: int, stride: int) -> list[nn.Module]:
    """3 x 3 convolution that replicates the border, BatchNorm, ReLU."""
    conv = nn.Conv2d(before, after, 3, stride, 1, bias=False, padding_mode="replicate")
    return [conv, nn.BatchNorm2d(after), nn.ReLU()]


class Tiny(Pyramid):
    """A small encoder that trains in minutes on a CPU: per level a strided and a plain convolution
    (only the strided one in the last level), each with BatchNorm and ReLU. 0.9 M parameters.

    Borders are replicated: zeros tell the deep maps a pixel's place in the picture, and on small
    pictures an unsupervised stage 1 would rather learn places than objects.
    """

    channels = (32, 48, 96, 160, 256)

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList()
        before = 3
        for width in self.channels:
            level = convolution(before, width, stride=2)
            if width < 256:
                level += convolution(width, width, stride=1)
            self.levels.append(nn.Sequential(*level))
            before = width

    def forward(self, image: Tensor) -> list[Tensor]:
        """[B, 3, H, W] in [0, 1] to five maps at strides 2, 4, 8, 16, 32."""
        x = self.normalise(image)
        taps = []
        for level in self.levels:
            x = level(x)
            taps.append(x)
        return taps


BACKBONES = {
    "resnet50": lambda keep_fc: ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], keep_fc),
    "resnet18": lambda keep_fc: ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], keep_fc),
    "vgg16": lambda keep_fc: VGG16(),
    "mobilenet_v2": lambda keep_fc: MobileNetV2(),
    "tiny": lambda keep_fc: Tiny(),
}


def backbone(
    name: str,
    weights: str | None = None,
    pixels: str = "imagenet",
    stored_stats: bool = False,
    keep_fc: bool = False,
    borders: str = "zeros",
    before_pooling: bool = False,
) -> Pyramid:
    """Build an encoder and load its weights.

    name: a key of `BACKBONES`. weights: a name of the table above, a local file, "none" for a
    random start, or None for the backbone's default. pixels, stored_stats: see the top of this
    file. keep_fc: keep a ResNet's classifier (the released A2S uses it; MoCo's file has none, so
    there it stays random). borders: "replicate" makes the convolutions see the picture go on beyond
    its border, not zeros. before_pooling: tap VGG-16 before each pooling, at half the stride.
    Raises `UserError` for unknown names, missing files, and wrong keys.
    """
    keep_fc = keep_fc and name.startswith("resnet")
    encoder = BACKBONES[name](keep_fc)
    encoder.set_pixels(pixels)
    encoder.stored_stats = stored_stats
    if name == "vgg16":
        encoder.before_pooling = before_pooling
    if borders != "zeros":
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.padding_mode = borders

    weights = weights or DEFAULT_WEIGHTS.get(name, "imagenet")
    if weights != "none":
        load_weights(encoder, find_weights(name, weights), keep_fc)
    return encoder


# ---- Weight files --------------------------------------------------------------------------------
def load_weights(encoder: Pyramid, path: Path, keep_fc: bool) -> None:
    """Fill an encoder from a weight file; see `backbone`."""
    state = read_weights(path)
    if keep_fc and "fc.weight" not in state:
        for key, value in encoder.fc.state_dict().items():
            state[f"fc.{key}"] = value

    # The keys of a classifier are not needed. MoCo's projection head is called fc.0 and fc.2.
    surplus = ("fc.0.", "fc.2.") if keep_fc else ("fc.", "classifier.")
    load_state(encoder, state, path, surplus)


def find_weights(name: str, weights: str) -> Path:
    """The local file of `weights` (a name or a path) for backbone `name`, downloaded if need be."""
    if (name, weights) == ("tiny", "shapes"):
        return TINY_WEIGHTS
    if (name, weights) not in WEIGHTS:
        if Path(weights).is_file():
            return Path(weights)
        known = [of for of_backbone, of in (*WEIGHTS, ("tiny", "shapes")) if of_backbone == name]
        raise UserError(
            f"--backbone-weights {weights}: no such file, and {name} knows only "
            f"{', '.join([*known, 'none'])}"
        )

    url, digest = WEIGHTS[name, weights]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"cannot download the weights of {name} ({error}); save {url} as {path}, give a "
                "local file with --backbone-weights, or try --backbone tiny, which needs none"
            ) from None
    check_digest(path, digest)
    return path


def check_digest(path: Path, digest: str) -> None:
    """Compare a file with its published digest, "md5:..." or "sha256:..." (leading digits suffice).

    torch.hub could do so after a download, but knows no md5, and would not see a file that was
    fetched by hand or damaged later. Raises `UserError` on a difference.
    """
    kind, expected = digest.split(":")
    found = hashlib.new(kind, path.read_bytes()).hexdigest()
    if not found.startswith(expected):
        raise UserError(
            f"{path} is damaged or is another file ({kind} {found[:8]}, expected {expected}); "
            "delete it and fetch it again"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a weight file: plain, below "state_dict", with "module." or MoCo's prefix."""
    state = torch_load(path)
    state = state.get("state_dict", state)
    query = "module.encoder_q."  # MoCo may store encoder_k and a queue too: only the query counts
    if isinstance(state, dict) and any(str(key).startswith(query) for key in state):
        state = {key: value for key, value in state.items() if str(key).startswith(query)}
    state = named_tensors(state, path)
    return {key.removeprefix(query).removeprefix("module."): value for key, value in state.items()}


def named_tensors(state: object, path: str | Path) -> dict[str, Tensor]:
    """`state`, if it is a dict of weights by their names; else a `UserError` that accuses `path`.

    Weights are floating-point numbers; only BatchNorm counts its batches in whole numbers.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} holds no state dict, which is a dict of tensors by their names")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds a {type(value).__name__} called {key} among its tensors; save the "
                "weights alone: torch.save(network.state_dict(), FILE)"
            )
        counter = key.endswith("num_batches_tracked") and value.dtype == torch.int64
        dense = value.layout == torch.strided and not value.is_meta
        if not dense or not (counter or value.dtype in FLOATS):
            kind = f"{value.device} {value.layout} {value.dtype}".replace("torch.", "")
            raise UserError(
                f"{path}: {key} is a tensor of another kind ({kind}) than weights, which are dense "
                "floating-point numbers; convert it, or fetch other weights"
            )
    return state

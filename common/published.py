"""How published checkpoints of other projects name their tensors, and how ours are named.

    mit_state(read_state("segformer_b3.safetensors"))    Mix Transformers: SegFormer, smp-hub,
                                                         Hugging Face, mmsegmentation
    virtex_state(torch.load("model.pth")["model"])       VirTex's captioners

Keys that no rule knows stay as they are, so that a strict load names them.
"""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from common.backbones import read_weights
from common.runtime import UserError

MIT = (  # SegFormer and smp-hub count stages from 1, Hugging Face and mmsegmentation from 0
    (r"^(backbone|segformer\.encoder|encoder)\.", ""),
    (r"^(patch_embed|block|norm)(\d)\.", lambda m: f"{m[1]}.{int(m[2]) - 1}."),
    (r"^(?:patch_embed(?:dings)?\.(\d)\.proj|layers\.(\d)\.0\.projection)\.", r"stages.\1\2.proj."),
    (
        r"^(?:patch_embed(?:dings)?\.(\d)\.(?:layer_)?norm|layers\.(\d)\.0\.norm)\.",
        r"stages.\1\2.norm_in.",
    ),
    (r"^(?:block\.(\d)|layers\.(\d)\.1)\.(?=\d)", r"stages.\1\2.blocks."),
    (r"^(?:(?:layer_)?norm\.(\d)|layers\.(\d)\.2)\.(?!\d)", r"stages.\1\2.norm_out."),
    (r"\.layer_norm_([12])\.", r".norm\1."),
    (r"\.attention\.output\.dense", ".attn.proj"),
    (r"\.attention\.self\.layer_norm", ".attn.norm"),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attn\.query", ".attn.q"),
    (r"\.attn\.attn\.", ".attn."),
    (r"\.out_proj", ".proj"),
    (r"\.mlp\.dense([12])", r".mlp.fc\1"),
    (r"\.dwconv\.dwconv", ".dwconv"),
    (r"\.ffn\.layers\.0", ".mlp.fc1"),
    (r"\.ffn\.layers\.1", ".mlp.dwconv"),
    (r"\.ffn\.layers\.4", ".mlp.fc2"),
)
MIT_HEADS = ("head.", "decode_head.", "decoder.", "segmentation_head.", "classifier.")
VIRTEX = {
    "visual.cnn.": "encoder.",
    "textual.visual_projection.": "projection.",
    "textual.embedding.words.": "words.",
    "textual.embedding.positions.": "positions.",
    "textual.embedding.layer_norm.": "norm.",
    "textual.transformer.layers.": "forwards.",
    "textual.output.bias": "bias",
    "backward_textual.transformer.layers.": "backwards.",
}


def mit_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Mix Transformer's state dict in any of the four namings under ours; heads keep theirs."""
    renamed = {}
    for key, value in state.items():
        for theirs, ours in MIT:
            key = re.sub(theirs, ours, key)
        renamed[key] = value.flatten(1) if ".mlp.fc" in key and value.dim() == 4 else value
    for key in list(renamed):
        if ".attn.key." in key:  # Hugging Face
            pair = renamed.pop(key), renamed.pop(key.replace("key", "value"))
            renamed[key.replace("key", "kv")] = torch.cat(pair)
        elif ".attn.in_proj_" in key:  # mmsegmentation
            q, k, v = renamed.pop(key).chunk(3)
            renamed[key.replace("in_proj_", "q.")] = q
            renamed[key.replace("in_proj_", "kv.")] = torch.cat([k, v])
    return renamed


def virtex_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """VirTex's state dict under our names; what its two directions share is kept once."""
    renamed = {}
    for key, value in state.items():
        theirs = next((name for name in VIRTEX if key.startswith(name)), "")
        if theirs or key != "textual.output.weight" and not key.startswith("backward_textual."):
            renamed[VIRTEX.get(theirs, "") + key.removeprefix(theirs)] = value
    return renamed


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of one that torch wrote; raises `UserError`."""
    if Path(path).suffix != ".safetensors":
        return read_weights(Path(path))
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    try:  # the length of the header, the header in JSON, the numbers
        raw = bytearray(Path(path).read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        return {
            key: torch.frombuffer(
                raw,
                dtype=kinds[entry["dtype"]],
                count=math.prod(entry["shape"]),
                offset=start + entry["data_offsets"][0],
            ).view(entry["shape"])
            for key, entry in json.loads(raw[8:start]).items()
            if key != "__metadata__"
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} is not a readable .safetensors file ({error!r}); fetch it again"
        ) from None


# ---- A2S -----------------------------------------------------------------------------------------
A2S = (  # (theirs, ours), applied in this order to every key outside the encoder
    ("decoder.", ""),
    ("ad2.", "se3."),
    ("ad3.", "se4."),
    ("ad4.", "se5."),
    ("fusion.", "se0."),
    ("ad0.0", "conv"),
    ("ad0.1", "norm"),
    (".se.conv", ".gate"),
    ("adapter", "laterals."),
    ("gconv", "basis"),
    ("res_conv1", "attention.0"),
    ("res_conv2", "attention.1"),
    ("gb_conv", "head"),
)


def a2s_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A2S's state dict of either stage, less the GroupNorms that its authors never call."""
    renamed = {}
    for key, value in state.items():
        if not key.startswith("encoder."):
            for theirs, ours in A2S:
                key = key.replace(theirs, ours)
        if ".se.gn." not in key:
            renamed[key] = value
    return renamed

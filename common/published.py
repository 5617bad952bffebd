"""Checkpoints that other projects publish: how they name their tensors, and how we name them.

    state = read_state("segformer_b3.safetensors")     of torch.save, or of safetensors
    mit_state(state)                                   Mix Transformers: SegFormer, smp-hub,
                                                       Hugging Face, mmsegmentation
    virtex_state(named_tensors(saved["model"], path))  VirTex's captioners
    a2s_state(state)                                   what the authors of A2S, of CLASS-Net and
    class_state(state)                                 of Unified USOD released
    unified_state(state)

Each table lists pairs (their name, our name); the function below it applies them. A key that no
pair fits keeps its name, so that a strict load tells it.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from common.backbones import named_tensors, read_weights
from common.runtime import UserError, first_line

# ---- Files ---------------------------------------------------------------------------------------
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of one that torch wrote; raises `UserError`."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_weights(path)
    try:
        return named_tensors(split_safetensors(bytearray(path.read_bytes())), path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a readable .safetensors file ({first_line(error)}); fetch it again"
        ) from None


def split_safetensors(raw: bytearray) -> dict[str, Tensor]:
    """The tensors in the bytes of a .safetensors file, which share its memory.

    The file is the length of its header (8 bytes), the header in JSON, and the numbers of all
    tensors without a gap. The header gives of each tensor the type of its numbers, its shape, and
    where it begins and ends. Raises errors of many kinds if it is damaged.
    """
    start = 8 + int.from_bytes(raw[:8], "little")
    if start > len(raw):
        raise ValueError("it is cut off")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)

    # In the order of the numbers each tensor begins where the one before it ends.
    state = {}
    place = 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        shape = entry["shape"]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{key} has numbers of the unknown type {entry['dtype']}")
        dtype = DTYPES[entry["dtype"]]
        size = math.prod(shape) * dtype.itemsize
        if begin != place or end != begin + size or start + end > len(raw):
            raise ValueError(f"the place of {key} does not fit its shape or its neighbours")
        flat = torch.frombuffer(raw, dtype=dtype, count=math.prod(shape), offset=start + begin)
        state[key] = flat.view(shape)
        place = end

    if start + place != len(raw):
        raise ValueError("it is longer than its tensors")
    return state


def replaced(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    """`key` with every `theirs` replaced by `ours`, one pair after the other."""
    for theirs, ours in pairs:
        key = key.replace(theirs, ours)
    return key


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
            key = replaced(key, A2S)
        if ".se.gn." not in key:
            renamed[key] = value
    return renamed


# ---- CLASS-Net -----------------------------------------------------------------------------------
CLASS = (  # (theirs, ours) of the beginning of a key; the first that fits is used
    ("res_", "encoder."),
    ("squeeze", "squeeze."),
    ("PAM", "position."),
    ("CAM", "channel."),
    ("fusion", "fusion."),
    ("supervision1.", "heads.2."),
    ("supervision", "heads."),
    ("extra_conv1.", "bridge_high.4.0."),
    ("extra_conv2.", "bridge_high.4.1."),
    ("extra_conv3.", "bridge.4.0."),
    ("extra_conv4.", "bridge.4.1."),
    ("extra_conv5.", "bridge_high.3.0."),
    ("extra_conv6.", "bridge_high.3.1."),
    ("extra_conv7.", "bridge.3.0."),
    ("extra_conv8.", "bridge.3.1."),
    ("extra_conv9.", "bridge_high.2.0."),
    ("extra_conv10.", "bridge_high.2.1."),
    ("extra_conv11.", "bridge.2.0."),
    ("extra_conv12.", "bridge.2.1."),
    ("extra_conv17.", "refine.5.0."),
    ("extra_conv18.", "refine.5.1."),
    ("decoder4_conv1.", "refine.4.0."),
    ("decoder4_conv2.", "refine.4.1."),
    ("decoder3_conv1.", "refine.3.0."),
    ("decoder3_conv2.", "refine.3.1."),
    ("decoder2_conv1.", "refine.2.0."),
    ("decoder2_conv2.", "refine.2.1."),
)
CLASS_PARTS = (  # (theirs, ours), applied to every key outside the encoder
    ("conv_high.", "query."),
    ("conv_low.", "key."),
    ("value_conv.", "value."),
    ("reducedim.", "reduce."),
    (".conv3.", ".gate."),
)
CLASS_SCALARS = {"position": "alpha", "channel": "beta"}  # theirs are all called gamma


def class_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLASS-Net's state dict under our names, less level 1's squeeze, which is never used."""
    renamed = {}
    for key, value in state.items():
        for theirs, ours in CLASS:
            if key.startswith(theirs):
                key = ours + key.removeprefix(theirs)
                break

        module = key.split(".")[0]
        if module != "encoder":
            key = replaced(key, CLASS_PARTS)
        if module in CLASS_SCALARS:
            key = key.replace("gamma", CLASS_SCALARS[module])
        if not key.startswith("squeeze.1."):
            renamed[key] = value
    return renamed


# ---- Unified USOD --------------------------------------------------------------------------------
UNIFIED = (  # (theirs, ours), applied in this order to every key outside the encoders
    ("decoder.", ""),
    ("ad2.", "se3."),
    ("ad3.", "se4."),
    ("ad4.", "se5."),
    ("fusion.", "se0."),
    ("ad0.0", "conv"),
    ("ad0.1", "norm"),
    (".se.conv", ".gate"),
    ("trans_rgb.", "laterals.0."),
    ("trans_t.", "laterals.1."),
    ("refine.ca.fus.", "gate.mlp."),
    ("refine.score", "heads.0"),
    ("score_1", "heads.1"),
    ("score_2", "heads.2"),
    ("score_global", "heads.3"),
    ("ca1.fus.", "gate_before.mlp."),
    ("ca2.fus.", "gate_level.mlp."),
    (".ca.fus.", ".gate.mlp."),
    (".fus.", ".fuse."),
    (".de_chan.", ".reduce."),
    (".conv1.", ".before."),
    (".conv_curfeat.", ".level."),
    (".conv_globalinfo.", ".context."),
    (".conv_out.", ".out."),
    (".b0.", ".pools.0."),
    (".b1.", ".pools.1."),
    (".b2.", ".pools.2."),
    (".b3.", ".pools.3."),
    ("gfb1_1.", "chains.0.0."),
    ("gfb2_1.", "chains.0.1."),
    ("gfb3_1.", "chains.0.2."),
    ("gfb4_1.", "chains.0.3."),
    ("gfb1_2.", "chains.1.0."),
    ("gfb2_2.", "chains.1.1."),
    ("gfb3_2.", "chains.1.2."),
    ("gfb4_2.", "chains.1.3."),
)


def unified_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unified USOD's state dict of either stage under our names.

    What its authors built and never call is left out: the gates' GroupNorms and the encoders'
    classifiers. Stage 2 has a second encoder, `t_net`; stage 1's single one keeps its name.
    """
    two = any(key.startswith("t_net.") for key in state)
    renamed = {}
    for key, value in state.items():
        if key.startswith(("encoder.fc.", "t_net.fc.")) or ".se.gn." in key:
            continue
        if key.startswith("t_net."):
            key = "encoders.1." + key.removeprefix("t_net.")
        elif key.startswith("encoder.") and two:
            key = "encoders.0." + key.removeprefix("encoder.")
        elif not key.startswith("encoder."):
            key = replaced(key, UNIFIED)
        renamed[key] = value
    return renamed


# ---- Mix Transformers ----------------------------------------------------------------------------
MIT = (  # (theirs, ours), regular expressions applied in this order to every key
    # SegFormer and smp-hub count stages from 1, Hugging Face and mmsegmentation from 0
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


def mit_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Mix Transformer's state dict in any of the four namings under ours; heads keep theirs.

    Keys and values share a matrix `kv` here. Hugging Face has one for each, and mmsegmentation one
    for queries, keys and values; where they do not fit together they keep their names.
    """
    renamed = {}
    for key, value in state.items():
        for theirs, ours in MIT:
            key = re.sub(theirs, ours, key)
        if ".mlp.fc" in key and value.dim() == 4:  # a 1 x 1 convolution instead of a linear layer
            value = value.flatten(1)
        renamed[key] = value

    for key, value in list(renamed.items()):
        if ".attn.key." in key:  # Hugging Face
            twin = key.replace(".attn.key.", ".attn.value.")
            if twin in renamed and value.dim() and value.shape == renamed[twin].shape:
                pair = renamed.pop(key), renamed.pop(twin)
                renamed[key.replace(".attn.key.", ".attn.kv.")] = torch.cat(pair)
        elif ".attn.in_proj_" in key and value.dim() and len(value) % 3 == 0:  # mmsegmentation
            q, k, v = renamed.pop(key).tensor_split(3)
            renamed[key.replace("in_proj_", "q.")] = q
            renamed[key.replace("in_proj_", "kv.")] = torch.cat([k, v])
    return renamed


# ---- VirTex --------------------------------------------------------------------------------------
VIRTEX = {  # theirs: ours, of the beginning of a key
    "visual.cnn.": "encoder.",
    "textual.visual_projection.": "projection.",
    "textual.embedding.words.": "words.",
    "textual.embedding.positions.": "positions.",
    "textual.embedding.layer_norm.": "norm.",
    "textual.transformer.layers.": "forwards.",
    "textual.output.bias": "bias",
    "backward_textual.transformer.layers.": "backwards.",
}


def virtex_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """VirTex's state dict under our names.

    Its two directions share all but their transformers: the forward one's tensors are kept. The
    output layer's weights are those of the embedding.
    """
    renamed = {}
    for key, value in state.items():
        theirs = next((name for name in VIRTEX if key.startswith(name)), None)
        if theirs is not None:
            renamed[VIRTEX[theirs] + key.removeprefix(theirs)] = value
        elif key != "textual.output.weight" and not key.startswith("backward_textual."):
            renamed[key] = value
    return renamed

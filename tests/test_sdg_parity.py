"""sdg_sod.py computes what SegFormer's, VirTex's and F3Net's released code computes."""

import json

import numpy as np
import pytest
import recipe
import torch

import sdg_sod
from common import published
from common.runtime import UserError, load_state

HEAD = {
    "linear_c4.proj": "linear.3",
    "linear_c3.proj": "linear.2",
    "linear_c2.proj": "linear.1",
    "linear_c1.proj": "linear.0",
    "linear_fuse.conv": "fuse.0.0",
    "linear_fuse.bn": "fuse.0.1",
    "linear_pred": "predict",
}


def official(name: str) -> dict[str, torch.Tensor]:
    """The state dict that the released network was filled with, under the authors' names."""
    description = recipe.reference(name)[0]
    state = {}
    for key, shape in description["keys"]:
        source = description.get("tied", {}).get(key, key)
        state[key] = recipe.weights(source, shape)
        if ".embedding.words." in source or ".embedding.positions." in source:
            u = recipe.unit(source, state[key].numel())
            state[key] = torch.from_numpy(0.05 * (2 * u - 1)).float().view(shape)
    return state


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- SegFormer -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["b0", "b1", "b3"])
@torch.no_grad()
def test_features_and_logits_equal_segformer_s(size):
    name = f"segformer_mit_{size}"
    state = official(name)
    encoder, decoder = sdg_sod.MiT(f"mit_{size}"), None
    load_state(encoder, published.mit_state(state), name, published.MIT_HEADS)
    decoder = sdg_sod.MLPDecoder(encoder.channels, 256)
    head = {}
    for key, value in state.items():
        theirs, _, leaf = key.removeprefix("decode_head.").rpartition(".")
        if theirs in HEAD:
            shape = dict(decoder.named_parameters()).get(f"{HEAD[theirs]}.{leaf}", value).shape
            head[f"{HEAD[theirs]}.{leaf}"] = value.view(shape)  # their linear layers: no 1 x 1
    load_state(decoder, head, name)
    features = encoder.eval()(recipe.photos("rgb", 96, 128))
    for output, value in zip(("c1", "c2", "c3", "c4"), features):
        assert recipe.error(name, output, value) < 2e-5
    assert recipe.error(name, "logits", decoder.eval()(features)) < 2e-5


@pytest.mark.parametrize(
    "name, number",
    [("mit_b0", 3_319_392), ("mit_b1", 13_151_424), ("mit_b2", 24_196_288), ("mit_b3", 44_072_128)],
)
def test_encoders_have_the_published_number_of_parameters(name, number):
    assert count(sdg_sod.MiT(name)) == number


def test_decoders_have_the_published_number_of_parameters():
    assert count(sdg_sod.MLPDecoder((64, 128, 320, 512), 256)) == 526_210 - 129  # their conv_seg
    assert round(count(sdg_sod.MLPDecoder((64, 128, 320, 512), 768)) / 1e6, 2) == 3.15


def test_121_keys_at_every_stage_for_352_pixels():
    net, seen = sdg_sod.MiT("mit_b0"), []
    for stage in net.stages:
        for block in stage.blocks:
            block.attn.kv.register_forward_hook(lambda m, i, out: seen.append(out.shape[1:3]))
    with torch.no_grad():
        net.eval()(torch.rand(1, 3, 352, 352))
    assert seen == [(11, 11)] * 8


def test_eps_of_every_norm_as_in_segformer():
    """Too small a difference to see in the outputs."""
    eps = {
        name: m.eps
        for name, m in sdg_sod.MiT("mit_b0").named_modules()
        if isinstance(m, torch.nn.LayerNorm)
    }
    assert all(
        value == (1e-5 if name.endswith(("norm_in", "attn.norm")) else 1e-6)
        for name, value in eps.items()
    )


# ---- The four namings of MiT's weights -----------------------------------------------------------
def hugging_face(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = key.split(".")
    i, rest = parts[1], ".".join(parts[2:])
    if rest.startswith(("proj", "norm")):
        rest = (
            rest.replace("proj", f"patch_embeddings.{i}.proj")
            .replace("norm_in", f"patch_embeddings.{i}.layer_norm")
            .replace("norm_out", f"layer_norm.{i}")
        )
        return {f"segformer.encoder.{rest}": value}
    rest = rest.replace("blocks.", f"segformer.encoder.block.{i}.")
    for ours, theirs in (
        ("attn.proj", "attention.output.dense"),
        ("attn.norm", "attention.self.layer_norm"),
        ("attn.sr", "attention.self.sr"),
        ("attn.q.", "attention.self.query."),
        (".norm1", ".layer_norm_1"),
        (".norm2", ".layer_norm_2"),
        ("mlp.fc", "mlp.dense"),
        ("mlp.dwconv", "mlp.dwconv.dwconv"),
    ):
        rest = rest.replace(ours, theirs)
    if "attn.kv." in rest:
        k, v = value.chunk(2)
        return {
            rest.replace("attn.kv", "attention.self.key"): k,
            rest.replace("attn.kv", "attention.self.value"): v,
        }
    return {rest: value}


def mmseg(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = key.split(".")
    i, rest = parts[1], ".".join(parts[2:])
    for ours, theirs in (("blocks.", "1."), ("norm_in", "0.norm"), ("norm_out", "2")):
        rest = rest.replace(ours, theirs)
    rest = "0.projection" + rest[4:] if rest.startswith("proj") else rest
    for ours, theirs in (
        ("attn.proj", "attn.attn.out_proj"),
        ("mlp.fc1", "ffn.layers.0"),
        ("mlp.dwconv", "ffn.layers.1"),
        ("mlp.fc2", "ffn.layers.4"),
    ):
        rest = rest.replace(ours, theirs)
    value = value[..., None, None] if "ffn" in rest and value.dim() == 2 else value
    return {f"backbone.layers.{i}.{rest}": value}


def renamed(scheme: str, state: dict) -> dict[str, torch.Tensor]:
    """The state dict of our MiT as the given publisher names it."""
    if scheme in ("hugging_face", "mmseg"):
        found = {}
        for key, value in state.items():
            found |= {"hugging_face": hugging_face, "mmseg": mmseg}[scheme](key, value)
        for key in [key for key in found if scheme == "mmseg" and ".attn.q." in key]:
            pair = found.pop(key), found.pop(key.replace(".q.", ".kv."))
            found[key.replace("attn.q.", "attn.attn.in_proj_")] = torch.cat(pair)
        return found | {"decode_head.classifier.weight": torch.zeros(1)}
    description = recipe.reference("segformer_mit_b0")[0]
    keys = [key for key, _ in description["keys"] if key.startswith("backbone.")]
    ours = published.mit_state({key: torch.tensor(float(i)) for i, key in enumerate(keys)})
    prefix = {"segformer": "", "smp": "encoder."}[scheme]
    return {
        prefix + keys[int(number)].removeprefix("backbone."): state[key]
        for key, number in ours.items()
    } | {"head.weight": torch.zeros(1)}


def write_safetensors(path, state):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for key, value in state.items():
        raw = value.contiguous().numpy().tobytes()
        header[key] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize("scheme", ["segformer", "smp", "hugging_face", "mmseg"])
def test_published_weights_load_from_every_naming(scheme, tmp_path):
    torch.manual_seed(0)
    source, net = sdg_sod.MiT("mit_b0"), sdg_sod.MiT("mit_b0")
    for p in source.parameters():
        torch.nn.init.normal_(p)
    state = renamed(scheme, source.state_dict())
    assert not set(state) & set(source.state_dict())
    path = tmp_path / ("weights.safetensors" if scheme == "smp" else "weights.pth")
    write_safetensors(path, state) if scheme == "smp" else torch.save({"state_dict": state}, path)
    sdg_sod.load_encoder(net, "mit_b0", str(path))
    for key, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key
    lost = next(key for key in state if ".sr.weight" in key)
    torch.save({key: value for key, value in state.items() if key != lost}, tmp_path / "lost.pth")
    with pytest.raises(UserError, match=r"1 missing \(stages\.\d\.blocks\.\d\.attn\.sr\."):
        sdg_sod.load_encoder(net, "mit_b0", str(tmp_path / "lost.pth"))


def test_without_a_file_the_encoder_asks_for_one():
    with pytest.raises(UserError, match="--encoder-weights: give a file"):
        sdg_sod.load_encoder(sdg_sod.MiT("mit_b0"), "mit_b0", None)


# ---- VirTex --------------------------------------------------------------------------------------
NAME = "virtex_bicap_r50_l1_h1024"


@pytest.fixture(scope="module")
def virtex(tmp_path_factory):
    """Our captioner with the recipe's weights, from a file of VirTex's form; and its grid."""
    path = tmp_path_factory.mktemp("virtex") / "model.pth"
    torch.save({"model": official(NAME), "iteration": 500000}, path)
    words = "--released --beam 5 --attn-row predict --vocabulary".split()
    args = sdg_sod.build_parser().parse_args([*words, f"{path}.vocab"])
    lines = "\n".join(f"\u2581piece{i}\t{-i}" for i in range(10_000))
    (path.parent / "model.pth.vocab").write_text(lines, encoding="utf-8")
    net = sdg_sod.load_captioner(path, args).eval()
    assert (net.plan["hidden"], net.plan["layers"], net.lexicon[7]) == (1024, 1, "\u2581piece7")
    path.unlink()
    with torch.no_grad():
        return net, net.encode(recipe.photos("rgb224", 224, 224))


def tokens() -> torch.Tensor:
    return torch.from_numpy(recipe.reference(NAME)[1]["tokens"])


@torch.no_grad()
def test_grid_logits_and_attention_equal_virtex_s(virtex):
    net, grid = virtex
    visual = net.encoder(recipe.photos("rgb224", 224, 224))[-1]
    assert recipe.error(NAME, "visual", visual) < 2e-5
    assert recipe.error(NAME, "projection", grid) < 2e-5
    logits, attention = net.read(grid, tokens())
    assert recipe.error(NAME, "logits", logits[..., ::37]) < 2e-5
    assert recipe.error(NAME, "attention", attention) < 2e-5
    assert attention.sum(2).allclose(torch.ones(2, 12))
    assert np.array_equal(logits.argmax(2).flatten(), recipe.reference(NAME)[1]["argmax"])
    backward, _ = net.read(grid, sdg_sod.reverse(tokens()), backward=True)
    assert recipe.error(NAME, "logits_backward", backward[..., ::37]) < 2e-5


@torch.no_grad()
def test_losses_of_both_directions_equal_virtex_s(virtex):
    net, grid = virtex
    scalars, said = recipe.reference(NAME)[0]["scalars"], tokens()
    logits = net(recipe.photos("rgb224", 224, 224), said)
    assert sdg_sod.caption_loss(logits, said).item() == pytest.approx(scalars["loss"], rel=1e-5)


def test_beam_search_equals_virtex_s_with_its_lost_start_token(virtex):
    net, grid = virtex
    theirs = recipe.reference(NAME)[1]["beam"].reshape(2, 30)
    assert np.array_equal(net.write(grid)[:, 1:31], theirs)
    net.released = False
    assert not np.array_equal(net.write(grid)[:, 1:31], theirs)
    net.released = True


def test_norms_of_the_captioner_as_in_virtex(virtex):
    eps = {
        name: m.eps for name, m in virtex[0].named_modules() if isinstance(m, torch.nn.LayerNorm)
    }
    assert all(value == (1e-8 if name == "norm" else 1e-5) for name, value in eps.items())


# ---- F3Net ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(2, 1, 48, 64), (2, 1, 96, 96)])
@pytest.mark.parametrize("edge", ["hard", "soft"])
@pytest.mark.parametrize("theirs, ours", [("coded", "coded"), ("fixed", "weighted")])
def test_structure_loss_and_gradient_equal_f3net_s(shape, edge, theirs, ours):
    name = f"{theirs}_{edge}_{shape[2]}x{shape[3]}"
    logit, g = recipe.logits("f3", shape).requires_grad_(), recipe.disk(shape)
    loss = sdg_sod.structure_loss(logit, (g > 0.5).float() if edge == "hard" else g, ours)
    loss.backward()
    value = recipe.reference("loss_f3net")[0]["scalars"][name]
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert recipe.error("loss_f3net", f"grad_{name}", logit.grad) < 1e-4


def test_both_forms_agree_where_there_is_no_edge():
    value = recipe.reference("loss_f3net")[0]["scalars"]["coded_empty"]
    for form in ("coded", "weighted"):
        loss = sdg_sod.structure_loss(
            recipe.logits("f3", (2, 1, 48, 64)), torch.zeros(2, 1, 48, 64), form
        )
        assert loss.item() == pytest.approx(value, rel=1e-5)

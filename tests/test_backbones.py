"""Encoders: taps, normalisation, BatchNorm policy, and weight files of every kind."""

import hashlib
import urllib.error
from pathlib import Path

import pytest
import recipe
import torch
from torch import nn

from common import backbones, published
from common.backbones import BACKBONES, backbone, read_weights
from common.runtime import UserError, load_state


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_five_taps_at_strides_2_to_32_for_any_size(name):
    encoder = backbone(name, "none").eval()
    taps = encoder(torch.rand(1, 3, 96, 64))
    assert [t.shape[1] for t in taps] == list(encoder.channels)
    assert [tuple(t.shape[2:]) for t in taps] == [(96 // s, 64 // s) for s in (2, 4, 8, 16, 32)]
    assert len(encoder(torch.rand(1, 3, 71, 45))) == 5


def test_pixels_are_normalised_as_the_weights_want():
    image = torch.full((1, 3, 1, 1), 0.5)
    want = {"unit": 0.5, "symmetric": 0.0, "imagenet": (0.5 - 0.485) / 0.229}
    for pixels, red in want.items():
        encoder = backbone("tiny", "none", pixels)
        assert encoder.normalise(image)[0, 0].item() == pytest.approx(red, abs=1e-6)
    assert "mean" not in encoder.state_dict()


def test_stored_statistics_do_not_move_and_batch_statistics_do():
    for stored in (True, False):
        encoder = backbone("tiny", "none", stored_stats=stored).train()
        norm = encoder.levels[0][1]
        encoder(torch.rand(2, 3, 32, 32))
        assert (norm.running_mean.abs().sum().item() == 0) == stored
        assert encoder.training and norm.training != stored


@torch.no_grad()
def test_replicated_borders_hide_the_border_of_a_flat_picture():
    """A flat picture has one value per channel everywhere, unless zeros give the border away."""
    for name in ("resnet18", "mobilenet_v2"):
        for borders in ("zeros", "replicate"):
            torch.manual_seed(0)
            encoder = backbone(name, "none", borders=borders).eval()
            deep = encoder(torch.full((1, 3, 96, 96), 0.7))[2]
            spread = (deep.amax((2, 3)) - deep.amin((2, 3))).max() / deep.abs().max()
            assert (spread < 1e-4) == (borders == "replicate")


def save(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


def test_moco_checkpoints_give_their_query_encoder(tmp_path):
    source = backbone("resnet18", "none").state_dict()
    query = {f"module.encoder_q.{k}": v for k, v in source.items()}
    key = {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in source.items()}
    head = {f"module.encoder_q.fc.{i}.weight": torch.zeros(1) for i in (0, 2)}
    state = {**key, **query, **head, "module.queue": torch.zeros(1)}
    path = save(tmp_path, {"epoch": 800, "state_dict": state})
    assert torch.equal(backbone("resnet18", path).conv1.weight, source["conv1.weight"])


def test_files_with_and_without_prefix_or_classifier_load(tmp_path):
    source = backbone("resnet18", "none", keep_fc=True).state_dict()
    for state in (source, {f"module.{k}": v for k, v in source.items()}, {"state_dict": source}):
        encoder = backbone("resnet18", save(tmp_path, state))
        assert torch.equal(encoder.layer4[1].bn2.weight, source["layer4.1.bn2.weight"])
        assert not hasattr(encoder, "fc")
    assert torch.equal(
        backbone("resnet18", save(tmp_path, source), keep_fc=True).fc.weight, source["fc.weight"]
    )


def test_moco_s_head_does_not_replace_a_kept_classifier(tmp_path):
    """The released A2S keeps a random classifier with MoCo's file (D4 of a2s.py)."""
    source = backbone("resnet18", "none").state_dict()
    source |= {f"fc.{i}.{p}": torch.zeros(1) for i in (0, 2) for p in ("weight", "bias")}
    source = {f"module.encoder_q.{key}": value for key, value in source.items()}
    encoder = backbone("resnet18", save(tmp_path, {"state_dict": source}), keep_fc=True)
    assert encoder.fc.weight.std() > 0


def test_the_weights_of_another_network_are_refused_with_their_keys(tmp_path):
    path = save(tmp_path, backbone("resnet50", "none").state_dict())
    with pytest.raises(UserError, match="holds the weights of another network.*layer1.0"):
        backbone("resnet18", path)
    with pytest.raises(UserError, match=r"missing \(features.0.weight"):
        backbone("vgg16", path)


def test_unknown_and_unreadable_weights_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no such file, and resnet50 knows only moco800, moco200"):
        backbone("resnet50", "moco900")
    with pytest.raises(UserError, match="tiny knows only shapes, none"):
        backbone("tiny", "imagenet")
    (tmp_path / "w.pth").write_text("not weights")
    with pytest.raises(UserError, match="w.pth is no file that torch.save wrote"):
        backbone("resnet18", str(tmp_path / "w.pth"))


def test_without_network_the_sentence_says_what_to_fetch_and_where(tmp_path, monkeypatch):
    def offline(url, path):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        UserError,
        match=f"cannot download.*moco_v2_800ep_pretrain.pth.tar as {tmp_path}.*--backbone-weights",
    ):
        backbone("resnet50")


def test_a_file_of_another_digest_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"weights")
    sha = "9a129038"  # printf weights | sha256sum
    md5 = "63f4f1e9"  # printf weights | md5sum
    backbones.check_digest(path, f"sha256:{sha}")
    backbones.check_digest(path, f"md5:{md5}")
    for kind, found in (("sha256", sha), ("md5", md5)):
        with pytest.raises(UserError, match=f"{kind} {found}, expected 00000000.*delete it"):
            backbones.check_digest(path, f"{kind}:00000000")
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth"]


def test_parameter_counts_are_torchvision_s_without_classifier():
    def count(name):
        return sum(p.numel() for p in backbone(name, "none").parameters())

    assert count("resnet50") == 25_557_032 - 2_049_000
    assert count("vgg16") == 138_357_544 - 123_642_856
    assert count("mobilenet_v2") == 3_504_872 - 1_281_000
    assert count("tiny") < 1_000_000


# ---- What a state dict may hold ------------------------------------------------------------------
@pytest.mark.parametrize(
    "state, reason",
    [
        ({"a": {"b": torch.zeros(1)}}, "holds a dict called a among its tensors"),
        ({"a": torch.zeros(1), "epoch": 3}, "holds a int called epoch"),
        ({"state_dict": [1, 2]}, "holds no state dict"),
        ({"state_dict": {1: torch.zeros(1)}}, "holds no state dict"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "a is a tensor of another kind.*int64"),
        ({"a": torch.zeros(2).to_sparse()}, "sparse_coo float32"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.empty(2, device="meta")}, "meta strided float32"),
        ({"num_batches_tracked": torch.zeros(2)}, None),
        ({"bn.num_batches_tracked": torch.tensor(3), "a": torch.zeros(1).half()}, None),
    ],
)
def test_a_state_dict_holds_floating_point_tensors_by_name(state, reason, tmp_path):
    path = Path(save(tmp_path, state))
    if reason is None:
        assert list(read_weights(path)) == list(state)
        return
    with pytest.raises(UserError, match=f"{path}.*{reason}"):
        read_weights(path)


# ---- Names in the checkpoints of others ----------------------------------------------------------
RELEASES = [
    # function, keys of a released network, tensors that are used, digest of all pairs, samples
    (
        published.a2s_state,
        "a2s_v1_stage2",
        368,
        "55687df9a8d7b495",
        """
        encoder.layer2.0.conv1.weight   encoder.layer2.0.conv1.weight
        decoder.adapter2.0.weight       laterals.2.0.weight
        decoder.region.res_conv1.weight region.attention.0.weight
        decoder.local.gconv.1.weight    local.basis.1.weight
        """,
    ),
    (
        published.class_state,
        "class_r50",
        543,
        "b96c8e46f7a5a25f",
        """
        res_layer1.0.conv3.weight       encoder.layer1.0.conv3.weight
        extra_conv6.1.bias              bridge_high.3.1.1.bias
        extra_conv11.0.weight           bridge.2.0.0.weight
        extra_conv18.0.weight           refine.5.1.0.weight
        supervision1.weight             heads.2.weight
        supervision3.bias               heads.3.bias
        PAM3.gamma                      position.3.alpha
        PAM3.conv_low.bias              position.3.key.bias
        CAM4.gamma                      channel.4.beta
        fusion2.conv3.weight            fusion.2.gate.weight
        decoder4_conv2.1.running_var    refine.4.1.1.running_var
        """,
    ),
    (
        published.unified_state,
        "a2s_v3_midd",
        378,
        "e8c539b7cdf75dff",
        """
        trans_t.2.0.weight                 laterals.1.2.0.weight
        decoder.global_info.b3.1.weight    global_info.pools.3.1.weight
        decoder.global_info.ca.fus.2.bias  global_info.gate.mlp.2.bias
        decoder.global_info.fus.1.bias     global_info.fuse.1.bias
        decoder.gfb3_2.ca1.fus.0.bias      chains.1.2.gate_before.mlp.0.bias
        decoder.gfb1_1.conv_curfeat.0.bias chains.0.0.level.0.bias
        decoder.refine.ca.fus.0.weight     gate.mlp.0.weight
        decoder.refine.score.bias          heads.0.bias
        decoder.score_global.weight        heads.3.weight
        """,
    ),
    (
        published.unified_state,
        "a2s_v3_sce",
        30,
        "71c48b1e2f23dac5",
        """
        adapter.ad0.0.weight        adapter.conv.weight
        decoder.ad3.se.conv.weight  se4.gate.weight
        decoder.fusion.ad0.0.weight se0.conv.weight
        """,
    ),
]


NAMES = "function, reference, count, digest, samples"


@pytest.mark.parametrize(NAMES, RELEASES, ids=[row[1] for row in RELEASES])
def test_every_tensor_of_a_release_has_a_name_of_ours(function, reference, count, digest, samples):
    """The digest is that of the pairs by which the released networks were found to be equal."""
    theirs = [key for key, _ in recipe.reference(reference)[0]["keys"]]
    renamed = function({key: torch.tensor(number) for number, key in enumerate(theirs)})
    names = {theirs[number]: ours for ours, number in renamed.items()}
    samples = dict(line.split() for line in samples.strip().split("\n"))
    assert {key: names[key] for key in samples} == samples
    assert len(names) == count
    pairs = "\n".join(f"{key} {names[key]}" for key in sorted(names))
    assert hashlib.sha256(pairs.encode()).hexdigest()[:16] == digest


def test_a_second_encoder_changes_the_name_of_the_first():
    pair = {"encoder.conv1.weight": torch.zeros(1), "t_net.conv1.weight": torch.ones(1)}
    assert list(published.unified_state(pair)) == [
        "encoders.0.conv1.weight",
        "encoders.1.conv1.weight",
    ]
    left_out = ("encoder.fc.bias", "t_net.fc.bias", "decoder.ad2.se.gn.weight", "squeeze1.0.bias")
    state = {key: torch.zeros(1) for key in left_out}
    assert list(published.unified_state(state)) == ["squeeze1.0.bias"]
    assert published.class_state({"squeeze1.0.bias": torch.zeros(1)}) == {}


@pytest.mark.parametrize("lost", ["query", "key", "value"])
def test_a_key_without_its_twin_is_named(lost):
    """Keys and values are two matrices of Hugging Face's and one, kv, of ours."""
    whole = {}
    for name in ("query", "key", "value"):
        whole[f"encoder.block.1.0.attention.self.{name}.weight"] = torch.ones(2, 2)
    attention = nn.ModuleDict({"q": nn.Linear(2, 2, False), "kv": nn.Linear(2, 4, False)})
    prefix = "stages.1.blocks.0.attn."

    def load(state):
        ours = published.mit_state(state)
        load_state(attention, {key.removeprefix(prefix): ours[key] for key in ours}, "w.pth")

    load(whole)
    assert (attention.kv.weight == 1).all()
    del whole[f"encoder.block.1.0.attention.self.{lost}.weight"]
    missing = "q" if lost == "query" else "kv"
    with pytest.raises(UserError, match=rf"w.pth .*1 missing \({missing}.weight\)"):
        load(whole)


def test_matrices_that_do_not_fit_together_keep_their_names():
    odd = {"backbone.layers.0.1.0.attn.attn.in_proj_bias": torch.zeros(4)}
    assert list(published.mit_state(odd)) == ["stages.0.blocks.0.attn.in_proj_bias"]
    place = "encoder.block.0.0.attention.self"
    odd = {f"{place}.key.bias": torch.zeros(2), f"{place}.value.bias": torch.zeros(3)}
    assert [key.rpartition("attn.")[2] for key in published.mit_state(odd)] == [
        "key.bias",
        "value.bias",
    ]

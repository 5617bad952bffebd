"""Encoders: taps, normalisation, BatchNorm policy, and weight files of every kind."""

import urllib.error

import pytest
import torch

from common import backbones
from common.backbones import BACKBONES, backbone
from common.runtime import UserError


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
    with pytest.raises(UserError, match="w.pth is not a readable file of tensors"):
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


def test_a_damaged_download_is_refused_and_a_digest_is_recorded(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    path.write_bytes(b"weights")
    full = backbones.sha256(path)
    with pytest.raises(UserError, match="is damaged or is another file"):
        backbones.check_digest(path, "sha256:00000000")
    with pytest.raises(UserError, match="md5"):
        backbones.check_digest(path, "md5:00000000")
    backbones.check_digest(path, "sha256:" + full[:8])
    assert (tmp_path / "w.pth.sha256").read_text() == full
    (tmp_path / "w.pth.sha256").write_text("0" * 64)  # recorded earlier: other
    with pytest.raises(UserError, match="w.pth.sha256"):
        backbones.check_digest(path, "sha256:" + full[:8])


def test_parameter_counts_are_torchvision_s_without_classifier():
    def count(name):
        return sum(p.numel() for p in backbone(name, "none").parameters())

    assert count("resnet50") == 25_557_032 - 2_049_000
    assert count("vgg16") == 138_357_544 - 123_642_856
    assert count("mobilenet_v2") == 3_504_872 - 1_281_000
    assert count("tiny") < 1_000_000

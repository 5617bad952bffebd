"""a2s.py --released computes what the authors' released code computes."""

import pytest
import recipe
import torch
import torch.nn.functional as F

import a2s
from common.backbones import backbone
from common.published import a2s_state
from common.runtime import load_state


def filled(name: str, net: torch.nn.Module, encoder_fc: bool = True) -> torch.nn.Module:
    """`net` with the recipe's weights, by way of the authors' key names and our converter."""
    description, _ = recipe.reference(name)
    state = {key: recipe.weights(key, shape) for key, shape in description["keys"]}
    if not encoder_fc:  # one row of ones: the column sum is exactly 1, so D4 changes nothing
        state["encoder.fc.weight"] = torch.zeros_like(state["encoder.fc.weight"])
        state["encoder.fc.weight"][0] = 1
    load_state(net, a2s_state(state), name)  # strict: every key is accounted for
    return net.eval()


@pytest.fixture(scope="module")
def photos():
    return recipe.photos("rgb", 96, 128)


@pytest.mark.parametrize("prefix", ["", "nofc_"])
@torch.no_grad()
def test_stage_1_maps_equal_the_released_network(photos, prefix):
    net = a2s.ActivationNet(backbone("resnet50", "none", keep_fc=True), released=True)
    maps = filled("a2s_v1_stage1", net, encoder_fc=not prefix)(photos)
    for output, value in zip(("final", "aux3", "aux4", "aux5"), maps):
        assert recipe.error("a2s_v1_stage1", prefix + output, value) < 2e-5


@torch.no_grad()
def test_the_paper_s_stage_1_equals_the_released_one_without_d4(photos):
    """Without the classifier's column sum (D4) the default network is the same function."""
    description, _ = recipe.reference("a2s_v1_stage1")
    state = {
        key: recipe.weights(key, shape)
        for key, shape in description["keys"]
        if not key.startswith("encoder.fc.")
    }
    net = a2s.ActivationNet(backbone("resnet50", "none"))
    load_state(net, a2s_state(state), "recipe")
    assert recipe.error("a2s_v1_stage1", "nofc_final", net.eval()(photos)[0]) < 2e-5


@torch.no_grad()
def test_stage_2_logits_equal_the_released_network(photos):
    net = filled("a2s_v1_stage2", a2s.Detector(backbone("resnet50", "none", keep_fc=True)))
    assert recipe.error("a2s_v1_stage2", "final", net(photos)) < 2e-5


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_equal_table_7():
    stage1 = a2s.ActivationNet(backbone("resnet50", "none"))
    assert count(stage1) - count(stage1.encoder) == 2_192_384
    with_fc = backbone("resnet50", "none", keep_fc=True)
    assert count(a2s.Detector(with_fc)) == 28_397_864  # the paper's 28.40 M
    assert count(a2s.Detector(with_fc, attention=False)) == 28_250_152  # the paper's 28.25 M


SHAPES = [(2, 1, 96, 128), (2, 1, 12, 16), (2, 1, 6, 8), (2, 1, 3, 4)]


@pytest.mark.parametrize("drop", ["drop", "nodrop"])
def test_adb_loss_and_gradient_equal_the_released_loss(drop):
    """Their value is 1 - ours per map: the constant 1 has no gradient."""
    scalars, total = recipe.reference("loss_a2s_v1")[0]["scalars"], 0
    for i, (shape, weight) in enumerate(zip(SHAPES, (1, 0.1, 0.3, 0.5))):
        theta = recipe.logits(f"adb{i}", shape).requires_grad_()
        keep = torch.from_numpy(recipe.unit(f"mask:adb{i}", theta.numel()) > 0.5)
        keep = keep.view(shape).float()
        loss = a2s.adb_loss(theta, 0.1, keep / keep.mean() if drop == "drop" else None)
        loss.backward()
        assert 1 + loss.item() == pytest.approx(scalars[f"adb_map{i}_{drop}"], rel=1e-6)
        assert recipe.error("loss_a2s_v1", f"grad_adb_map{i}_{drop}", theta.grad) < 1e-4
        total += weight * (1 + loss.item())
    assert total == pytest.approx(scalars[f"adb_total_{drop}"], rel=1e-6)


def test_detector_losses_and_gradients_equal_the_released_ones():
    scalars = recipe.reference("loss_a2s_v1")[0]["scalars"]
    g = (recipe.disk((2, 1, 48, 64)) > 0.5).float()
    terms = {
        "bce": F.binary_cross_entropy_with_logits,
        "ssim": lambda y, g: a2s.ssim_loss(torch.sigmoid(y), g),
        "iou": lambda y, g: a2s.iou_loss(torch.sigmoid(y), g),
    }
    for name, term in terms.items():
        y = recipe.logits("s2", (2, 1, 48, 64)).requires_grad_()
        loss = term(y, g)
        loss.backward()
        assert loss.item() == pytest.approx(scalars[f"stage2_{name}"], rel=1e-5)
        assert recipe.error("loss_a2s_v1", f"grad_stage2_{name}", y.grad) < 1e-3
    total = a2s.detector_loss(recipe.logits("s2", (2, 1, 48, 64)), recipe.disk((2, 1, 48, 64)))
    assert total.item() == pytest.approx(scalars["stage2_total"], rel=1e-5)


def test_area_sign_equals_the_released_one():
    for share, sign in recipe.reference("loss_a2s_v1")[0]["area_sign"]:
        theta = torch.where(torch.arange(64) < 64 * share, 1.0, -1.0).view(1, 1, 8, 8)
        assert a2s.foreground_sign(theta, released=True).item() == sign

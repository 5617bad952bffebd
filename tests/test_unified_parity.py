"""unified_usod.py computes what the authors' released code computes."""

import pytest
import recipe
import torch

import unified_usod as usod
from common.backbones import backbone
from common.published import unified_state
from common.runtime import load_state


def filled(name: str, net: torch.nn.Module, adapter: bool = False) -> torch.nn.Module:
    """`net` with the recipe's weights, by way of the authors' key names and our converter."""
    keys = [k for k in recipe.reference("a2s_v1_stage1")[0]["keys"] if k[0].startswith("encoder.")]
    if name == "a2s_v3_midd":
        keys += [[key.replace("encoder.", "t_net."), shape] for key, shape in keys]
    description, _ = recipe.reference(name)
    keys += [k for k in description["keys"] if adapter or not k[0].startswith("adapter.")]
    he = tuple(description.get("he", ()))
    state = {key: recipe.weights(key, shape, he) for key, shape in keys}
    load_state(net, unified_state(state), name)  # strict: every key is accounted for
    return net.eval()


@pytest.mark.parametrize("adapter", [False, True])
@torch.no_grad()
def test_cue_extractor_equals_the_released_network(adapter):
    net = usod.CueExtractor(backbone("resnet50", "none"), adapter=adapter, released=True)
    net = filled("a2s_v3_sce", net, adapter)
    photos = recipe.photos("rgb", 96, 128)
    name = "a2s_v3_sce_adapter" if adapter else "a2s_v3_sce"
    assert recipe.error(name, "theta_presign", net.activation(photos)) < 2e-5
    assert recipe.error(name, "final", net(photos)[0]) < 2e-5


@torch.no_grad()
def test_detector_logits_equal_the_released_network():
    """The output, both chains (1: photo, 2: modality) and the global map."""
    net = usod.Detector(backbone("resnet50", "none"), backbone("resnet50", "none", "unit"))
    net = filled("a2s_v3_midd", net)
    pair = torch.cat([recipe.photos("rgb", 96, 128), recipe.photos("modal", 96, 128).flip(0)], 1)
    assert recipe.error("a2s_v3_midd", "final", net(pair)[0][0]) < 2e-5
    for head, y in list(enumerate(net.decode(pair)))[1:]:
        assert recipe.error("a2s_v3_midd", f"sal{head}", y) < 2e-5


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_equal_the_released_ones():
    encoder = backbone("resnet50", "none")
    net = usod.CueExtractor(encoder, adapter=True)
    unused = 2 * 64  # a GroupNorm that the authors build into every block and never call
    assert count(net.adapter) + unused == 1_184_128
    assert count(net) - count(encoder) - count(net.adapter) + 4 * unused == 2_192_896
    net = usod.Detector(encoder, encoder)
    assert count(net) - count(net.encoders) - count(net.laterals) == 25_155_972
    assert count(net.laterals) == 2 * 1_740_928


# ---- Losses --------------------------------------------------------------------------------------
@pytest.mark.parametrize("epoch", [1, 6, 7, 20])
def test_distilling_loss_and_gradient_equal_the_released_ones(epoch):
    description = recipe.reference("loss_a2s_v3")[0]
    # The middle of the epoch.
    hard, k = usod.curriculum(epoch - 0.5, 20, pcl=True, annealed=True, released=True)
    for name, p in (("csd", 0.0), ("pcl", hard)):
        theta = recipe.logits("csd", (2, 1, 48, 64)).requires_grad_()
        loss = usod.distilling_loss(theta, p, k)
        loss.backward()
        assert loss.item() == pytest.approx(description["scalars"][f"{name}_e{epoch}"], rel=1e-5)
        assert recipe.error("loss_a2s_v3", f"grad_{name}_e{epoch}", theta.grad) < 1e-4
    masked = (torch.sigmoid(theta) - 0.5).abs() < hard
    assert masked.float().mean().item() == description["pcl_masked_fraction"][str(epoch)]


@pytest.mark.parametrize("case, modalities", [("c", 0), ("o", 1), ("cdt", 2)])
def test_btm_loss_and_gradient_equal_the_released_ones(case, modalities):
    photo, others = recipe.waves("btm", (2, 3, 96, 128)), recipe.waves("btm_extra", (2, 6, 96, 128))
    has = torch.full((2,), modalities > 0)
    guide = usod.guide(torch.cat([photo, others[:, :3]], 1), has)
    if modalities == 2:
        guide = torch.cat([guide, others[:, 3:]], 1)
    theta = recipe.logits("btm", (2, 1, 96, 128)).requires_grad_()
    loss = usod.btm_loss(theta, guide)
    loss.backward()
    value = recipe.reference("loss_a2s_v3")[0]["scalars"][f"btm_{case}"]
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert recipe.error("loss_a2s_v3", f"grad_btm_{case}", theta.grad) < 1e-4


def test_stage_1_loss_equals_the_released_one():
    """Both scales, epoch 3 of 20: the sum of their three terms."""
    thetas = [recipe.logits("btm", (2, 1, 96, 128)), recipe.logits("csd2", (2, 1, 64, 96))]
    photos = [recipe.waves("btm", (2, 3, 96, 128)), recipe.waves("btm2", (2, 3, 64, 96))]
    guides = [usod.guide(photo.repeat(1, 2, 1, 1), torch.tensor([False])) for photo in photos]
    loss = usod.cue_loss(thetas, guides, 0.2 - 0.6 * 3 / 20, 2 ** (1 - 2 / 20), 0.05)
    scalars = recipe.reference("loss_a2s_v3")[0]["scalars"]
    want = scalars["total_csd"] + scalars["total_btm"] + scalars["total_mse"]
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_gradient_of_the_detector_s_loss_equals_the_released_one():
    """With respect to the output's logit at a quarter of the size, before it is enlarged."""
    g = (recipe.disk((2, 1, 96, 128)) > 0.5).float()
    y = recipe.logits("midd0", (2, 1, 24, 32)).requires_grad_()
    big = usod.resize(y, g, corners=False)
    fixed = big.detach()
    usod.detector_loss([[big, fixed, fixed, fixed]], g, "iou", [0.2, 0, 0]).backward()
    assert recipe.error("loss_a2s_v3", "grad_midd_iou", y.grad) < 1e-4


def test_corner_sign_equals_the_released_one():
    for positive, sign in recipe.reference("loss_a2s_v3")[0]["corner_sign"]["rows"]:
        theta = -torch.ones(1, 1, 6, 8)
        for row, column in [(0, 0), (0, -1), (-1, 0), (-1, -1)][:positive]:
            theta[0, 0, row, column] = 1
        assert usod.corner_sign(theta).item() == sign


# ---- Refiner -------------------------------------------------------------------------------------
@pytest.mark.parametrize("output, iterations", [("mask_iter1", 1), ("mask_out", 6)])
def test_pixel_refiner_equals_the_released_one(output, iterations):
    """PAR does not see the scale of the colours: theirs are normalised, ours are not."""
    s = torch.sigmoid(recipe.logits("par_mask", (2, 1, 48, 64)))
    refined = usod.pixel_refiner(recipe.photos("par", 48, 64), s, iterations)
    assert recipe.error("a2s_v3_par", output, refined) < 2e-5

"""class_net.py: its network is the released one when asked to be, its losses are the equations."""

import math

import pytest
import recipe
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import class_net
from common import harness
from common.backbones import backbone
from common.bank import crop
from common.runtime import UserError, load_state, save_checkpoint


def net(name: str = "tiny", **options) -> class_net.CLASSNet:
    return class_net.CLASSNet(backbone(name, "none"), **options).eval()


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- Parity with the released network ------------------------------------------------------------
@torch.no_grad()
def test_all_four_outputs_equal_the_released_network_s():
    description, _ = recipe.reference("class_r50")
    he = tuple(description["he_prefixes"])
    state = {key: recipe.weights(key, shape, he) for key, shape in description["keys"]}
    ours = class_net.CLASSNet(backbone("resnet50", "none", "f3net"), released=True).eval()
    renamed = class_net.from_released(state)
    load_state(ours, renamed, "recipe")  # strict: every key is accounted for
    assert len(state) - len(renamed) == 7  # level 1's squeeze, never used
    for name, logit in zip(("D2", "up_D3", "up_D4", "up_D5"), ours(recipe.photos("rgb", 128, 128))):
        assert recipe.error("class_r50", name, logit) < 2e-5


def test_size_and_cost_of_the_released_network():
    ours = net("resnet50", released=True)
    assert count(ours) == 24_771_514
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(torch.zeros(1, 3, 352, 352))
    assert counter.get_total_flops() / 2e9 == pytest.approx(12.96, abs=0.005)  # 2 per product


@pytest.mark.parametrize("size", ["48x64", "96x96"])
def test_losses_and_gradients_equal_the_released_ones(size):
    shape = (2, 1, *map(int, size.split("x")))
    scalars, g = recipe.reference("loss_class")[0]["scalars"], recipe.disk(shape)
    for name, loss in (("fm", class_net.object_loss), ("region", class_net.released_region_loss)):
        y = recipe.logits("class", shape).requires_grad_()
        value = loss(y, g)
        value.backward()
        assert value.item() == pytest.approx(scalars[f"{name}_{size}"], rel=1e-5)
        assert recipe.error("loss_class", f"grad_{name}_{size}", y.grad) < 1e-3


# ---- Attention -----------------------------------------------------------------------------------
@pytest.mark.parametrize("released", [False, True])
def test_position_attention_equals_the_explicit_product(released):
    torch.manual_seed(0)
    attention = class_net.PositionAttention(released)
    torch.nn.init.constant_(attention.alpha, 0.7)
    high, low = torch.randn(2, 64, 3, 4), torch.randn(2, 64, 12, 16)
    f_h, f_l, value = (
        part.flatten(2)
        for part in (attention.query(high), attention.key(low), attention.value(low))
    )
    s = torch.softmax(torch.einsum("bci,bcj->bij", f_h, f_l), 2)  # Eq. 1, sum over j
    found = torch.einsum("bij,bcj->bic", s, value)  # Eq. 2
    found = found.reshape(2, 64, 3, 4) if released else found.mT.reshape(2, 64, 3, 4)
    assert torch.allclose(attention(high, low), 0.7 * found + high, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_channel_attention_equals_the_explicit_sum_and_its_rows_sum_to_one(sign):
    torch.manual_seed(0)
    attention = class_net.ChannelAttention(released=sign < 0)
    torch.nn.init.constant_(attention.beta, 0.3)
    low, high = torch.rand(1, 64, 6, 8) / 5, torch.rand(1, 64, 3, 4) / 5
    f_h = F.interpolate(high, (6, 8), mode="bilinear", align_corners=False)
    out = attention(low, high)
    for i in (0, 31, 63):
        energy = sign * (low[0, i] * f_h[0]).sum((1, 2))  # [64]
        z = energy.exp() / energy.exp().sum()
        want = 0.3 * (z[:, None, None] * f_h[0]).sum(0) + low[0, i]
        assert torch.allclose(out[0, i], want, atol=1e-5)


def test_rows_of_both_attentions_sum_to_one():
    """Where all that can be found is the same, that is what is found."""
    torch.manual_seed(0)
    position, channel = class_net.PositionAttention(), class_net.ChannelAttention()
    for weight, value in (
        (position.value.weight, 0),
        (position.value.bias, 1),
        (position.alpha, 1),
        (channel.beta, 1),
    ):
        torch.nn.init.constant_(weight, value)
    high, low = torch.randn(2, 64, 3, 4), torch.randn(2, 64, 12, 16)
    assert torch.allclose(position(high, low) - high, torch.ones(()), atol=1e-5)
    alike = torch.rand(2, 1, 12, 16).expand(2, 64, 12, 16)
    assert torch.allclose(channel(low, alike) - low, alike, atol=1e-5)


def test_energies_beyond_half_precision_stay_finite():
    attention = class_net.ChannelAttention()
    torch.nn.init.ones_(attention.beta)
    low = torch.full((1, 64, 88, 88), 4.0)
    with torch.autocast("cpu", torch.float16):
        assert torch.isfinite(attention(low, low[..., :11, :11])).all()  # energy 123,904


@torch.no_grad()
def test_attention_starts_as_the_identity_and_then_matters():
    torch.manual_seed(0)
    ours, without = net(), net(attention=())
    load_state(
        without,
        {
            key: value
            for key, value in ours.state_dict().items()
            if not key.startswith(("position", "channel"))
        },
        "ours",
    )
    image = torch.rand(1, 3, 64, 64)
    before = ours(image)[0]
    assert torch.equal(before, without(image)[0])
    for part in (ours.position, ours.channel):
        for module in part.values():
            torch.nn.init.constant_(getattr(module, "alpha", getattr(module, "beta", None)), 1.0)
    assert (ours(image)[0] - before).abs().max() > 1e-3


# ---- Network -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny", "resnet18", "mobilenet_v2", "vgg16", "resnet50"])
@torch.no_grad()
def test_any_backbone_any_aspect(name):
    logits = net(name)(torch.rand(1, 3, 64, 96))
    assert [tuple(y.shape) for y in logits] == [(1, 1, 64, 96)] * 4


@torch.no_grad()
def test_odd_sizes_and_vgg_s_other_taps():
    assert net()(torch.rand(1, 3, 61, 75))[0].shape == (1, 1, 61, 75)
    ours = class_net.CLASSNet(backbone("vgg16", "none", before_pooling=True)).eval()
    sizes = [tuple(x.shape[1:]) for x in ours.encoder(torch.rand(1, 3, 64, 64))]
    assert sizes == [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)]
    assert ours(torch.rand(1, 3, 64, 64))[0].shape == (1, 1, 64, 64)


def test_table_2_s_rows_are_different_networks():
    sizes = {
        row: count(net(**options))
        for row, options in {
            "4": {"attention": (), "fusion": "sum"},
            "5": {"attention": ()},
            "6": {"fusion": "sum"},
            "7": {"attention": ("channel",)},
            "8": {"attention": ("position",)},
            "10": {},
            "3": {"attention": (), "fusion": "sum", "outputs": 1},
        }.items()
    }
    position, fusion, head = 3 * (3 * (64 * 64 + 64) + 1), 3 * (12352 + 128 + 2 * 36992 + 64), 577
    base = sizes["4"]
    assert sizes["5"] == base + fusion and sizes["6"] == base + position + 3
    assert sizes["7"] == base + fusion + 3 and sizes["8"] == base + fusion + position
    assert sizes["10"] == base + fusion + position + 3 and sizes["3"] == base - 3 * head


# ---- Losses --------------------------------------------------------------------------------------
def test_object_loss_by_hand():
    """TP = .8 + .6 = 1.4, P = 1.4 / 2, R = 1.4 / 2, so F = .7."""
    s = torch.tensor([0.8, 0.6, 0.4, 0.2]).view(1, 1, 2, 2)
    g = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    assert class_net.object_loss(torch.logit(s), g).item() == pytest.approx(0.3, abs=1e-6)
    g = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)  # P = .4, R = .8
    want = 1 - 1.3 * 0.4 * 0.8 / (0.3 * 0.4 + 0.8)
    assert class_net.object_loss(torch.logit(s), g).item() == pytest.approx(want, abs=1e-6)
    assert class_net.object_loss(torch.logit(s), torch.zeros_like(s)).item() == pytest.approx(1)


def test_pixel_loss_by_hand():
    s, g = torch.tensor([0.8, 0.4]).view(1, 1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    want = -(math.log(0.8) + math.log(0.6)) / 2
    assert class_net.pixel_loss(torch.logit(s), g).item() == pytest.approx(want)


def test_blur_is_a_gaussian_of_11_pixels_and_sigma_1_5():
    x = torch.zeros(1, 1, 21, 21)
    x[..., 10, 10] = 1
    y = class_net.blur(x)[0, 0]
    assert y.sum().item() == pytest.approx(1) and y[10, 16] == 0 and y[10, 15] > 0
    assert (y[10, 12] / y[10, 10]).item() == pytest.approx(math.exp(-4 / 4.5))
    assert (y[13, 12] / y[10, 10]).item() == pytest.approx(math.exp(-13 / 4.5), rel=1e-5)


def test_region_loss_by_hand():
    """A constant .75 against a constant .25."""
    y = torch.full((1, 1, 40, 40), math.log(3))
    g = torch.full_like(y, 0.25)
    # near the border the spreads differ too, for beyond it are zeros: explicit sums over windows
    weight = torch.exp(-((torch.arange(11) - 5.0) ** 2) / 4.5)
    weight = (weight / weight.sum())[:, None] * (weight / weight.sum())
    want = 0.0
    for top in range(40):
        for left in range(40):
            parts = []
            for value in (0.75, 0.25):
                window = F.pad(torch.full((40, 40), value), (5, 5, 5, 5))[
                    top : top + 11, left : left + 11
                ]
                mean = (weight * window).sum()
                parts.append((mean, ((weight * window**2).sum() - mean**2 + 1e-8) ** 0.5))
            want += ((parts[0][0] - parts[1][0]) ** 2 + (parts[0][1] - parts[1][1]) ** 2) / 1600
    assert class_net.region_loss(y, g).item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_region_loss_of_a_perfect_flat_map_is_0_with_a_finite_gradient(value):
    y = torch.logit(torch.full((1, 1, 24, 24), value), 1e-6).requires_grad_()
    loss = class_net.region_loss(y, torch.sigmoid(y.detach()))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(y.grad).all()


def test_the_two_region_losses_differ_as_the_released_one_grows_with_the_picture():
    paper, released = [], []
    for side in (96, 192):
        g = recipe.disk((1, 1, side, side))
        y = torch.zeros_like(g)  # .5 everywhere
        paper.append(class_net.region_loss(y, g).item())
        released.append(class_net.released_region_loss(y, g).item())
    assert 0.2 < paper[0] < 0.3 and paper[1] == pytest.approx(paper[0], rel=0.1)
    assert released[1] == pytest.approx(2 * released[0], rel=0.1) and released[0] > 20


def test_supervision_adds_terms_and_halves_deeper_outputs():
    g, y = recipe.disk((1, 1, 32, 32)), recipe.logits("x", (1, 1, 32, 32))
    terms = [class_net.pixel_loss(y, g), class_net.region_loss(y, g), class_net.object_loss(y, g)]
    total, first = class_net.supervise([y], g, list(class_net.LOSSES))
    assert torch.allclose(total, sum(terms)) and torch.allclose(first, torch.stack(terms))
    total, _ = class_net.supervise([y, y, y, y], g, list(class_net.LOSSES))
    assert total.item() == pytest.approx(1.875 * sum(terms).item(), rel=1e-5)


def test_each_loss_term_changes_the_gradient():
    g, gradients = recipe.disk((1, 1, 32, 32)), []
    for losses in (["pixel"], ["pixel", "region"], ["pixel", "object"], list(class_net.LOSSES)):
        y = recipe.logits("x", (1, 1, 32, 32)).requires_grad_()
        class_net.supervise([y], g, losses)[0].backward()
        gradients.append(y.grad)
    for a in range(4):
        for b in range(a):
            assert (gradients[a] - gradients[b]).norm() > 0.05 * gradients[0].norm()


# ---- Training ------------------------------------------------------------------------------------
def test_the_rate_rises_and_falls_in_a_straight_line():
    """Epochs 0, 49, 50, 99 of 100, counted from 0."""
    rates = [class_net.rate(epoch + 1, 100, 0.05) for epoch in (0, 49, 50, 99)]
    assert rates == pytest.approx([0.00099, 0.0495, 0.0495, 0.00099], rel=1e-2)
    assert rates[0] == pytest.approx(0.05 * 2 / 101) and rates[1] == pytest.approx(0.05 * 100 / 101)


def test_crop_without_cut_is_plain_rescaling():
    x = torch.rand(2, 4, 40, 40)
    whole = torch.tensor([[0.0, 0, 1, 1]]).expand(2, 4)
    assert torch.allclose(crop(x, whole, 40), x, atol=1e-5)
    want = F.interpolate(x, (24, 24), mode="bilinear", align_corners=False)
    assert torch.allclose(crop(x, whole, 24), want, atol=1e-4)


def test_crop_cuts_where_it_is_told_to():
    """A quarter of the height and none of the width, all of it at the top: rows 10 to 39."""
    x = torch.arange(40.0).view(1, 1, 40, 1).expand(1, 1, 40, 40)
    for top, first in ((0.25, 10), (0, 0)):
        rows = crop(x, torch.tensor([[0, top, 1, top + 0.75]]), 30)[0, 0]
        assert torch.allclose(
            rows, torch.arange(first, first + 30.0)[:, None].expand(30, 30), atol=1e-4
        )


# ---- Flags ---------------------------------------------------------------------------------------
def flags(*given: str):
    args = class_net.build_parser().parse_args(["--data", "photos", *given])
    class_net.fill_defaults(args)
    return args


def test_released_is_the_authors_loss_loader_and_pixels_unless_told_otherwise():
    usual, released = flags(), flags("--released")
    assert (usual.region, usual.augment, usual.pixels) == ("paper", ["flip", "scale"], "imagenet")
    assert (released.region, released.pixels) == ("released", "f3net")
    assert released.augment == ["flip", "scale", "crop"]
    mixed = flags("--released", "--region", "paper", "--augment", "flip", "--pixels", "unit")
    assert (mixed.region, mixed.augment, mixed.pixels) == ("paper", ["flip"], "unit")
    assert (usual.lr, usual.batch_size, usual.epochs, usual.size) == (0.05, 32, 100, 352)


@pytest.mark.parametrize(
    "backbone, weights", [("resnet50", "imagenet"), ("resnet18", "imagenet"), ("tiny", "shapes")]
)
def test_weights_follow_the_backbone_on_photos_and_on_shapes(backbone, weights):
    for data in ("photos", "shapes"):
        assert flags("--data", data, "--backbone", backbone).backbone_weights == weights
    assert flags("--backbone", backbone, "--backbone-weights", "none").backbone_weights == "none"


def test_impossible_flags_are_refused():
    with pytest.raises(UserError, match="--vgg-taps conv is for vgg16; resnet50"):
        flags("--vgg-taps", "conv")
    with pytest.raises(UserError, match="at least 64"):
        flags("--size", "32")


def test_a_checkpoint_brings_its_flags_along(tmp_path):
    """Also those without which the keys would fit as well."""
    made = flags(
        "--backbone",
        "vgg16",
        "--backbone-weights",
        "none",
        "--vgg-taps",
        "conv",
        "--pixels",
        "unit",
        "--fusion",
        "sum",
        "--attention",
        "channel",
        "--size",
        "64",
    )
    made.device = torch.device("cpu")
    state = class_net.make_net(made, "none").state_dict()
    save_checkpoint(
        tmp_path / "last.pt",
        method="class_net",
        stage=1,
        epoch=1,
        model=state,
        args=harness.plain_flags(made, []),
        optimiser={},
        labels=None,
    )
    args = class_net.build_parser().parse_args(["--device", "cpu"])
    ours = class_net.load(tmp_path / "last.pt", args)
    assert ours.encoder.before_pooling and args.size == 64 and ours.encoder.std.flatten()[0] == 1
    assert ours.attention == ("channel",)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())

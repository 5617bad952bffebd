"""class_net.py: its network is the released one when asked to be, its losses are the equations."""

import math
from collections import namedtuple

import pytest
import recipe
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import class_net
from common.backbones import backbone
from common.bank import crop
from common.flags import Schedule, plain_flags
from common.published import class_state
from common.runtime import UserError, World, generator, load_state


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
    renamed = class_state(state)
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
    found = found.reshape(2, 64, 3, 4) if released else found.transpose(1, 2).reshape(2, 64, 3, 4)
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
    ours = net()
    without = net(attention=())
    state = ours.state_dict()
    shared = {key: state[key] for key in without.state_dict()}
    assert all(key.startswith(("position", "channel")) for key in state.keys() - shared.keys())
    load_state(without, shared, "ours")
    image = torch.rand(1, 3, 64, 64)
    before = ours(image)[0]
    assert torch.equal(before, without(image)[0])
    for module in ours.position.values():
        torch.nn.init.ones_(module.alpha)
    between = ours(image)[0]
    for module in ours.channel.values():
        torch.nn.init.ones_(module.beta)
    assert (between - before).abs().max() > 1e-4
    assert (ours(image)[0] - between).abs().max() > 1e-4


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
    base = count(net(attention=(), fusion="sum"))  # row 4
    position = 3 * (3 * (64 * 64 + 64) + 1)
    channel = 3
    fusion = 3 * (12352 + 128 + 2 * 36992 + 64)
    head = 577
    assert count(net(attention=(), fusion="sum", outputs=1)) == base - 3 * head  # row 3
    assert count(net(attention=())) == base + fusion  # row 5
    assert count(net(fusion="sum")) == base + position + channel  # row 6
    assert count(net(attention=("channel",))) == base + fusion + channel  # row 7
    assert count(net(attention=("position",))) == base + fusion + position  # row 8
    assert count(net()) == base + fusion + position + channel  # row 10


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
    g = recipe.disk((1, 1, 32, 32))
    logits = [recipe.logits(name, (1, 1, 32, 32)) for name in ("x", "y", "z", "t")]
    losses = ["pixel", "region", "object"]
    terms = [[class_net.LOSSES[name](y, g) for name in losses] for y in logits]
    total, first = class_net.supervise(logits[:1], g, losses)
    assert total.item() == pytest.approx(sum(terms[0]).item(), rel=1e-6)
    assert list(first) == losses and list(first.values()) == terms[0]
    total, first = class_net.supervise(logits, g, losses)
    sums = [sum(row).item() for row in terms]
    want = sums[0] + sums[1] / 2 + sums[2] / 4 + sums[3] / 8
    assert total.item() == pytest.approx(want, rel=1e-6) and list(first.values()) == terms[0]
    _, first = class_net.supervise(logits[:1], g, ["region"], region="released")
    assert first["region"] == class_net.released_region_loss(logits[0], g)


def test_each_loss_term_changes_the_gradient():
    g = recipe.disk((1, 1, 32, 32))
    gradients = []
    for losses in ("pixel", "pixel region", "pixel object", "pixel region object"):
        y = recipe.logits("x", (1, 1, 32, 32)).requires_grad_()
        class_net.supervise([y], g, losses.split())[0].backward()
        gradients.append(y.grad)
    for a in range(4):
        for b in range(a):
            assert (gradients[a] - gradients[b]).norm() > 0.05 * gradients[0].norm()


# ---- Training ------------------------------------------------------------------------------------
def test_the_rate_rises_and_falls_in_a_straight_line():
    """Epochs 0, 49, 50, 99 of 100, counted from 0."""
    schedule = Schedule(epochs=100, lr=0.05)
    rates = [class_net.rate(epoch + 1, schedule) for epoch in (0, 49, 50, 99)]
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


def random(seed: int = 0) -> torch.Generator:
    return generator("cpu", seed)


def test_augmenting_with_nothing_changes_nothing():
    image = torch.rand(2, 3, 64, 64)
    g = torch.rand(2, 1, 64, 64)
    same_image, same_g = class_net.augment(image, g, ["flip"], 2, slice(0, 2), random())
    assert torch.allclose(image, same_image, atol=1e-5) and torch.allclose(g, same_g, atol=1e-5)


def test_scales_are_the_five_of_the_paper():
    """352 pixels are the largest; all five occur, for image and mask together."""
    sides = set()
    random_numbers = random()
    for _ in range(40):
        image, g = class_net.augment(
            torch.rand(1, 3, 352, 352), torch.rand(1, 1, 352, 352), ["scale"], 1, slice(0, 1),
            random_numbers,
        )  # fmt: skip
        assert image.shape[2:] == g.shape[2:]
        sides.add(image.shape[-1])
    assert sides == {224, 256, 288, 320, 352}


def test_image_and_mask_are_cropped_alike_and_every_process_gets_its_part():
    ramp = torch.arange(64.0).expand(4, 1, 64, 64)
    kinds = ["scale", "crop"]
    image, g = class_net.augment(ramp.expand(4, 3, 64, 64), ramp, kinds, 4, slice(0, 4), random())
    assert torch.equal(image[:, :1], g)
    shares = g[:, 0, 0, -1] - g[:, 0, 0, 0]
    assert (shares < 64).all() and (shares > 64 * 0.875 - 4).all() and len(shares.unique()) == 4
    for rank in (0, 1):
        mine = slice(2 * rank, 2 * rank + 2)
        _, part = class_net.augment(
            ramp[mine].expand(2, 3, 64, 64), ramp[mine], kinds, 4, mine, random()
        )
        assert torch.equal(part, g[mine])


def test_batchnorm_needs_two_values():
    """VGG-16 pools 40 pixels to one cell; its layers before the poolings keep two by two.

    More processes than photos are told elsewhere.
    """
    settings = namedtuple("Settings", "device batch_size world")
    cpu = torch.device("cpu")
    vgg = class_net.CLASSNet(backbone("vgg16", "none"))
    for batch, photos, size, side, enough in (
        (1, 9, 1, 40, False), (1, 9, 1, 64, True), (2, 9, 1, 40, True), (2, 1, 1, 40, False),
        (2, 9, 2, 40, False), (4, 9, 2, 40, True), (2, 1, 2, 40, True),
    ):  # fmt: skip
        here = settings(cpu, batch, World(0, size))
        if enough:
            class_net.require_batch(vgg, here, photos, side)
        else:
            with pytest.raises(UserError, match="40 x 40 pixels"):
                class_net.require_batch(vgg, here, photos, side)
    vgg.encoder.before_pooling = True
    class_net.require_batch(vgg, settings(cpu, 1, World()), 9, 40)


# ---- Flags ---------------------------------------------------------------------------------------
def flags(given: str = ""):
    """The flags for a folder of photos, completed."""
    args = class_net.build_parser().parse_args(["--data", "photos", *given.split()])
    return class_net.complete(args)


def test_released_is_the_authors_loss_loader_and_pixels_unless_told_otherwise():
    usual = flags()
    assert (usual.region, usual.augment, usual.pixels) == ("paper", ["flip", "scale"], "imagenet")
    assert (usual.batch_size, usual.size, usual.stage1) == (32, 352, Schedule(100, 0.05))
    released = flags("--released")
    assert (released.region, released.pixels) == ("released", "f3net")
    assert released.augment == ["flip", "scale", "crop"]
    mixed = flags("--released --region paper --augment flip --pixels unit")
    assert (mixed.region, mixed.augment, mixed.pixels) == ("paper", ["flip"], "unit")


@pytest.mark.parametrize(
    "backbone, weights", [("resnet50", "imagenet"), ("resnet18", "imagenet"), ("tiny", "shapes")]
)
def test_weights_follow_the_backbone_on_photos_and_on_shapes(backbone, weights):
    for data in ("photos", "shapes"):
        assert flags(f"--data {data} --backbone {backbone}").backbone_weights == weights
    assert flags(f"--backbone {backbone} --backbone-weights none").backbone_weights == "none"


def test_completing_leaves_the_flags_as_they_were():
    args = class_net.build_parser().parse_args(["--released"])
    before = dict(vars(args))
    class_net.complete(args)
    assert vars(args) == before and args.augment is None


def test_impossible_flags_are_refused():
    with pytest.raises(UserError, match="--vgg-taps conv is for vgg16; resnet50"):
        flags("--vgg-taps conv")
    with pytest.raises(UserError, match="at least 64"):
        flags("--size 32")


def test_a_checkpoint_brings_its_flags_along(tmp_path):
    """Also those without which the keys would fit as well."""
    made = flags(
        "--backbone vgg16 --backbone-weights none --vgg-taps conv --pixels unit --fusion sum "
        "--attention channel --size 64"
    )
    state = class_net.make_net(made, "none").state_dict()
    saved = {"method": "class_net", "stage": 1, "epoch": 1, "model": state}
    saved["args"] = plain_flags(made, torch.device("cpu"))
    torch.save(saved, tmp_path / "last.pt")

    given = class_net.build_parser().parse_args("--eval shapes-test".split())
    args, ours = class_net.open_checkpoint(tmp_path / "last.pt", given)
    assert args.size == 64 and args.out == tmp_path and args.eval == ["shapes-test"]
    assert ours.encoder.before_pooling and ours.encoder.std.flatten()[0] == 1
    assert ours.attention == ("channel",)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())

"""unified_usod.py by hand: losses, schedules, signs, refiner, labels, transfer."""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

import unified_usod as usod
from common.backbones import backbone
from common.bank import Bank, MapBank
from common.runtime import UserError, World, generator, load_state
from data.shapes import Shapes

CPU = torch.device("cpu")
LOGIT_08 = math.log(4)  # sigmoid is 0.8


def column(*values: float) -> torch.Tensor:
    """A map [1, 1, 1, N]."""
    return torch.tensor(values).view(1, 1, 1, -1)


def flags(*given: str) -> Namespace:
    """Filled in for shapes of 64 pixels, on one CPU process."""
    args = usod.build_parser().parse_args(["--size", "64", *given])
    usod.fill_defaults(args)
    args.device, args.world = CPU, World()
    return args


# ---- Stage 1 -------------------------------------------------------------------------------------
def test_distilling_loss_by_hand():
    theta = column(LOGIT_08, -LOGIT_08, 0.0, 100.0)  # |S - .5| = .3 .3 0 .5
    loss = usod.distilling_loss
    assert loss(theta).item() == pytest.approx(0.5 - (0.3 + 0.3 + 0 + 0.5) / 4)
    assert loss(theta, power=2).item() == pytest.approx(0.25 - (0.09 * 2 + 0.25) / 4)
    # M S = 0 for the hard pixel, so that |M S - 0.5| = 0.5: the paper's form of the mask
    assert loss(theta, hard=0.1).item() == pytest.approx(0.5 - (0.3 + 0.3 + 0.5 + 0.5) / 4)


def test_hard_pixels_have_no_gradient_and_easy_ones_are_pushed_apart():
    theta = column(0.1, -2.0, 3.0).requires_grad_()
    usod.distilling_loss(theta, hard=0.2).backward()
    grad = theta.grad.flatten()
    assert grad[0] == 0 and grad[1] > 0 and grad[2] < 0
    theta.grad = None
    usod.distilling_loss(theta).backward()
    assert theta.grad.flatten()[0] < 0


def test_curriculum_of_the_paper_and_of_the_released_code():
    args = flags("--epochs", "20")
    assert [usod.curriculum(t, args)[0] for t in (0, 2.5, 5)] == pytest.approx([0.2, 0.125, 0.05])
    assert usod.curriculum(20 / 3 + 0.01, args) == (0, 1)
    assert usod.curriculum(0, flags("--pcl", "off"))[0] == 0
    args = flags("--epochs", "20", "--released")
    times = [0, 0.9, 1, 4, 5.99, 6]  # epochs 1 1 2 5 6 7
    hard = [usod.curriculum(t, args)[0] for t in times]
    assert hard == pytest.approx([0.17, 0.17, 0.14, 0.05, 0.02, 0])
    power = [usod.curriculum(t, args)[1] for t in (0, 0.9, 10, 19.9)]
    assert power == pytest.approx([2, 2, 2**0.5, 2**0.05])
    assert usod.curriculum(10, flags("--epochs", "20", "--power", "annealed")) == (
        0,
        pytest.approx(2**0.5),
    )


def test_released_transfer_has_no_curriculum():
    assert flags("--transfer", "video").pcl == "on"
    assert flags("--transfer", "video", "--released").pcl == "off"
    assert flags("--released").pcl == "on"


def brute_btm(s, guide):
    """The definition, pixel by pixel, on maps of the quarter size: [h, w], [C, h, w]."""
    h, w = s.shape
    side, total, edges = s > 0.5, 0.0, 0
    for y in range(h):
        for x in range(w):
            near = side[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            if near.all() or not near.any():
                continue
            edges += 1
            for i in range(y - 5, y + 6):
                for j in range(x - 5, x + 6):
                    inside = 0 <= i < h and 0 <= j < w
                    other, colour = (s[i, j], guide[:, i, j]) if inside else (0, 0)  # zero padding
                    weight = torch.exp(-200 * (guide[:, y, x] - colour).square().sum())
                    total += float(weight * (s[y, x] - other).abs())
    return total / edges


def test_btm_loss_against_its_definition():
    seeded = torch.Generator().manual_seed(0)
    theta = F.interpolate(torch.randn(1, 1, 2, 3, generator=seeded), (32, 48), mode="bilinear")
    guide = 0.1 * torch.rand(1, 4, 32, 48, generator=seeded)
    small = [
        F.interpolate(x, (8, 12), mode="bilinear", align_corners=True)[0]
        for x in (torch.sigmoid(theta), guide)
    ]
    want = brute_btm(small[0][0], small[1])
    assert usod.btm_loss(theta, guide).item() == pytest.approx(want, rel=1e-5) and want > 0


def test_btm_loss_likes_a_boundary_where_photo_or_modality_has_one():
    theta = torch.full((1, 1, 64, 64), -4.0)
    theta[..., 32:] = 4
    edge = (theta > 0).float().expand(-1, 3, -1, -1)
    flat, photo, has = torch.full_like(edge, 0.5), edge, torch.tensor([True])
    none = usod.btm_loss(theta, usod.guide(torch.cat([flat, flat], 1), has))
    of_photo = usod.btm_loss(theta, usod.guide(torch.cat([photo, flat], 1), has))
    of_modality = usod.btm_loss(theta, usod.guide(torch.cat([flat, edge], 1), has))
    assert of_photo < 0.05 * none and of_modality < 0.05 * none
    # a photo that stands in for a missing modality must not count twice
    lone = usod.guide(torch.cat([flat, edge], 1), torch.tensor([False]))
    assert (lone[:, 3:] == 0).all() and usod.btm_loss(theta, lone) == pytest.approx(none.item())


def test_btm_loss_without_a_boundary_is_zero_and_has_a_gradient():
    theta = torch.full((1, 1, 32, 32), 3.0, requires_grad=True)
    loss = usod.btm_loss(theta, torch.zeros(1, 6, 32, 32))
    loss.backward()
    assert loss.item() == 0 and (theta.grad == 0).all()


def test_consistency_compares_maps_of_two_scales():
    one, two = torch.full((1, 1, 32, 32), LOGIT_08), torch.full((1, 1, 64, 64), -LOGIT_08)
    guides = [torch.zeros(1, 6, 32, 32), torch.zeros(1, 6, 64, 64)]
    alone = usod.cue_loss([one], guides[:1], 0, 1, 0.05)
    assert alone.item() == pytest.approx(0.5 - 0.3)
    both = usod.cue_loss([one, two], guides, 0, 1, 0.05)
    assert both.item() == pytest.approx(2 * 0.2 + 0.6**2)


def test_signs_by_hand():
    corners = -torch.ones(2, 1, 5, 7)
    corners[:, :, 0, 0] = corners[1, :, -1, -1] = 1
    assert usod.corner_sign(corners).flatten().tolist() == [1, -1]
    theta = torch.cat([column(1, 1, 1, -1), column(1, -1, -1, -1), column(1, 1, -1, -1)])
    assert usod.area_sign(theta).flatten().tolist() == [-1, 1, 1]


def test_both_scales_share_the_sign_of_the_first(monkeypatch):
    net = usod.CueExtractor(backbone("tiny", "none"))
    one, two = -torch.ones(1, 1, 8, 8), torch.ones(1, 1, 16, 16)  # signs + and -
    maps = {32: one, 64: two}
    monkeypatch.setattr(net, "activation", lambda image: maps[image.shape[2]])
    photos = [torch.zeros(1, 6, 32, 32), torch.zeros(1, 6, 64, 64)]
    assert [m.mean().item() for m in net(*photos)] == [-1, 1]
    net.released = True  # D6
    assert [m.mean().item() for m in net(*photos)] == [-1, -1]


def test_theta_has_mean_zero_and_sees_the_photo_alone():
    net = usod.CueExtractor(backbone("tiny")).eval()
    pair = torch.rand(2, 6, 70, 52)
    theta = net.activation(pair[:, :3])
    assert theta.mean((1, 2, 3)).abs().max() < 1e-3 and net(pair)[0].shape == (2, 1, 70, 52)
    assert torch.equal(net(pair)[0], net(pair[:, :3])[0])


def test_otsu_against_brute_force():
    prob = torch.rand(3, 1, 9, 7, generator=torch.Generator().manual_seed(0)) ** 2
    for p, found in zip(prob, usod.otsu(prob)):
        x = (p.flatten() * 255).round().double()

        def variance(t):
            low, high = x[x <= t], x[x > t]
            return len(low) * len(high) * (low.mean() - high.mean()) ** 2

        best = max(x.unique()[:-1], key=variance)
        assert torch.equal(found.flatten(), x > best)
    assert usod.otsu(torch.full((1, 1, 4, 4), 0.3)).float().std() == 0  # one colour, one side


# ---- Stage 2 -------------------------------------------------------------------------------------
def test_iou_loss_by_hand():
    y, g = column(0.0, 100.0, -100.0), column(1.0, 1.0, 0.0)
    assert usod.iou_loss(y, g).item() == pytest.approx(1 - 1.5 / 2)


def test_detector_loss_weighs_heads_and_scales():
    g = torch.zeros(1, 1, 4, 4)
    g[..., :2] = 1
    seeded = torch.Generator().manual_seed(1)
    first = [torch.randn(1, 1, 4, 4, generator=seeded) for _ in range(4)]
    second = [torch.randn(1, 1, 8, 8, generator=seeded) for _ in range(4)]
    big = g.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for kind, loss in usod.LABEL_LOSSES.items():
        one = [loss(y, g).item() for y in first]
        two = [loss(y, big).item() for y in second]
        want = one[0] + 0.2 * one[1] + 0.1 * one[3] + 0.5 * (two[0] + 0.2 * two[1] + 0.1 * two[3])
        steady = F.interpolate(first[0], (8, 8), mode="bilinear", align_corners=False)
        want += (torch.sigmoid(second[0]) - torch.sigmoid(steady)).square().mean().item()
        got = usod.detector_loss([first, second], g, kind, [0.2, 0, 0.1])
        assert got.item() == pytest.approx(want, rel=1e-5)


def test_consistency_teaches_the_second_scale_alone():
    y = [torch.zeros(1, 1, 4, 4, requires_grad=True) for _ in range(2)]
    zero = torch.zeros(1, 1, 4, 4)
    with_second = usod.detector_loss(
        [[y[0]] + [zero] * 3, [y[1]] + [zero] * 3], zero, "iou", [0, 0, 0]
    )
    grads = torch.autograd.grad(with_second, y[0])[0]
    alone = torch.autograd.grad(
        usod.detector_loss([[y[0]] + [zero] * 3], zero, "iou", [0, 0, 0]), y[0]
    )[0]
    assert torch.equal(grads, alone)


def test_detector_sees_both_streams_and_any_size():
    torch.manual_seed(0)
    net = usod.Detector(backbone("tiny"), backbone("tiny", pixels="unit"), width=0.1).eval()
    for module in net.modules():  # from std 0.01 on all maps are nearly 0
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    pair = torch.rand(1, 6, 70, 52)
    y, chain1, chain2, deep = net(pair)[0]
    assert y.shape == chain1.shape == chain2.shape == deep.shape == (1, 1, 70, 52)
    swapped = net(pair.roll(3, 1))[0][0]
    dark = torch.cat([pair[:, :3], torch.zeros(1, 3, 70, 52)], 1)
    assert not torch.allclose(y, swapped) and not torch.allclose(y, net(dark)[0][0])
    assert all(torch.equal(a, b[0]) for a, b in zip((y,), net(pair, pair[..., :64, :])))


@pytest.mark.parametrize("released, pixels", [(False, "imagenet"), (True, "unit")])
def test_the_modality_s_encoder_is_as_awake_as_the_photo_s(released, pixels):
    """Stored BatchNorm statistics fit ImageNet's units alone (D7): on pixels in [0, 1] the deepest
    map would vary by a few per cent of what it should."""
    args = usod.build_parser().parse_args(["--released"] * released)
    usod.fill_defaults(args)
    args.device = torch.device("cpu")
    net = usod.make_net(2, args, None).train()
    data = Shapes("test", modality="depth", seed=1)
    samples = [data[i] for i in range(8)]
    photo, depth = (
        torch.stack([TF.resize(s[part], [128, 128]) for s in samples]).float() / 255
        for part in ("image", "modality")
    )
    with torch.no_grad():
        deep = [
            encoder(x)[4].std((0, 2, 3)).mean() for encoder, x in zip(net.encoders, (photo, depth))
        ]
    assert 0.3 < deep[1] / deep[0] < 3
    mean = net.encoders[1].mean.flatten().tolist()
    assert mean == pytest.approx([0, 0, 0] if pixels == "unit" else [0.485, 0.456, 0.406])


def test_learning_rates():
    def rates(stage, *given):
        args = flags("--epochs", "10", "--lr", "1", *given)
        return [usod.rate(stage, time, args) for time in (0, 5, 10)]

    assert rates(1) == pytest.approx([1, 0.6, 0.2]) and rates(2) == [1, 1, 1]
    assert rates(2, "--released") == pytest.approx([1, 0.6, 0.2])  # D4


# ---- SPR -----------------------------------------------------------------------------------------
def test_refiner_s_weights_sum_to_1_01_and_the_prior_s_to_one():
    image, s = torch.rand(2, 3, 24, 20), torch.full((2, 1, 24, 20), 0.5)
    assert (usod.pixel_refiner(image, s, 1) / 0.5).sub(1.01).abs().max() < 1e-5
    assert (usod.pixel_refiner(image, s) / 0.5).sub(1.01**6).abs().max() < 1e-5
    assert usod.rectify(image, s, 0 * s, [1, 0, 0]).sub(0.5).abs().max() < 1e-5


def test_refiner_against_its_definition():
    """One iteration at one pixel: 32 neighbours, squared differences over their deviation."""
    seeded = torch.Generator().manual_seed(2)
    image, s = (
        torch.rand(1, 3, 40, 40, generator=seeded),
        torch.rand(1, 1, 40, 40, generator=seeded),
    )
    y, x = 20, 17
    places = [
        (d * i, d * j)
        for d in (1, 2, 4, 8)
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        if (i, j) != (0, 0)
    ]
    near = torch.stack([image[0, :, y + i, x + j] for i, j in places], 1)  # [3, 32]
    colour = ((near - image[0, :, y, x, None]) / near.std(1, keepdim=True) / 0.3).square().mean(0)
    reach = torch.tensor([math.hypot(*place) for place in places])
    weight = torch.softmax(-colour, 0) + 0.01 * torch.softmax(
        -((reach / reach.std() / 0.3) ** 2), 0
    )
    want = sum(w * s[0, 0, y + i, x + j] for w, (i, j) in zip(weight, places))
    got = usod.pixel_refiner(image, s, iterations=1)[0, 0, y, x]
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_refiner_moves_a_shifted_map_to_the_photo_s_edge():
    image = torch.full((1, 3, 40, 40), 0.2)
    image[..., 20:] = 0.8
    image += 0.02 * torch.rand(image.shape, generator=torch.Generator().manual_seed(3))
    object_ = (image.mean(1, keepdim=True) > 0.5).float()
    for shift in (-4, 4):
        s = 0.1 + 0.8 * object_.roll(shift, 3)
        s[..., :4], s[..., -4:] = 0.1, 0.9  # roll wraps around
        refined = usod.rectify(image, s, s, [1, 0, 0])
        assert (refined - object_).abs().mean() < 0.9 * (s - object_).abs().mean()
        wrong = (s > 0.5).float() != object_
        assert wrong.any() and ((refined > 0.5).float() != object_).sum() < wrong.sum() / 2


def test_rectified_label_by_hand():
    image, s, g = torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16)
    prior = usod.pixel_refiner(image, s) / 1.01**6
    got = usod.rectify(image, s, g, [0.2, 0.6, 0.2])
    assert torch.allclose(got, 0.2 * prior + 0.6 * s + 0.2 * g) and 0 <= got.min() <= got.max() <= 1
    assert torch.equal(usod.rectify(image, s, g, [0, 0, 1]), g)
    prior = usod.pixel_refiner(image, s)
    want = 0.1 * prior / prior.max() + 0.7 * s + 0.2 * g
    got = usod.rectify(image, s, g, [0.1, 0.7, 0.2], released=True)
    assert torch.allclose(got, want / want.max()) and got.max() == 1


class Scenes:
    """Random photos, every second one with a modality."""

    title, names = "scenes", [f"{i}" for i in range(8)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        pixels = torch.randint(
            256, (6, 64, 64), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
        )
        return {"image": pixels[:3], "modality": pixels[3:] if i % 2 else None}


@pytest.fixture
def bank():
    return Bank(Scenes(), 64, CPU, parts=("image", "modality"))


def test_pairs_hold_the_modality_or_the_photo_again(bank):
    index, flip = torch.tensor([2, 3]), torch.tensor([False, True])
    pair, has = usod.read_pair(bank, index, flip)
    assert has.tolist() == [False, True] and torch.equal(pair[0, :3], pair[0, 3:])
    photo = Scenes()[3]
    assert torch.equal(pair[1, :3] * 255, photo["image"].flip(2).float())
    assert torch.equal(pair[1, 3:] * 255, photo["modality"].flip(2).float())


def test_label_bank_after_an_epoch_equals_the_formula_flips_included(bank):
    """G = l1 PAR(I, S) + l2 S + l3 G for every photo, whichever way round it was seen."""
    args = flags("--batch-size", "4", "--multi-scale", "off")

    class Fixed(torch.nn.Module):
        """A detector whose map is the photo's red channel."""

        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(()))

        def forward(self, pair):
            y = torch.logit(0.05 + 0.9 * pair[:, :1]) + 0 * self.bias
            return [[y, y, y, y]]

    start = torch.rand(8, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    labels = MapBank(lambda i: (start[i] * 255).byte(), 8, 64, CPU)
    before = labels.pixels.clone()
    net = Fixed()
    optimiser = torch.optim.SGD([{"params": [net.bias], "scale": 1.0}], lr=0.0)
    usod.train_epoch(2, net, optimiser, bank, labels, 1, args)
    assert torch.equal(labels.pixels, before)  # SPR begins in epoch 2
    usod.train_epoch(2, net, optimiser, bank, labels, 2, args)
    photos = bank.images(torch.arange(8))  # none is flipped here
    s = 0.05 + 0.9 * photos[:, :1]
    want = 0.2 * usod.pixel_refiner(photos, s) / 1.01**6 + 0.6 * s + 0.2 * before / 255
    assert (labels.pixels / 255 - want).abs().max() < 0.51 / 255 + 1e-5
    flips = torch.rand(8, generator=generator("cpu", 0, "flip", 2)) < 0.5
    assert flips.any() and not flips.all()  # both ways were seen


# ---- Transfer and checkpoints --------------------------------------------------------------------
def test_an_adapter_adds_to_the_deepest_level_alone():
    torch.manual_seed(0)
    net = usod.CueExtractor(backbone("tiny"), adapter=True).eval()
    image = torch.rand(1, 3, 64, 64)
    with_adapter = net.activation(image)
    torch.nn.init.zeros_(net.adapter.norm.weight)  # relu(0 + 0) = 0
    torch.nn.init.zeros_(net.adapter.norm.bias)
    silenced, net.adapter = net.activation(image), None
    assert torch.equal(silenced, net.activation(image))
    assert not torch.allclose(silenced, with_adapter)


def test_released_keys_are_all_accounted_for():
    net = usod.CueExtractor(backbone("tiny", "none"))
    state = net.state_dict() | usod.from_released({"decoder.new.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="1 unexpected .new.weight"):
        load_state(net, state, "file")
    kept = usod.from_released(
        {
            "encoder.fc.weight": torch.zeros(1),
            "t_net.fc.bias": torch.zeros(1),
            "decoder.ad2.se.gn.weight": torch.zeros(1),
            "t_net.layer1.0.conv1.weight": torch.zeros(1),
        }
    )
    assert list(kept) == ["encoders.1.layer1.0.conv1.weight"]

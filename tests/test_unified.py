"""unified_usod.py by hand: losses, schedules, signs, refiner, labels, transfer."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import last, write_photo
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import unified_usod as usod
from common import flags
from common.backbones import backbone
from common.bank import Bank
from common.curves import read_log
from common.datasets import open_set
from common.flags import Schedule, Settings
from common.published import unified_state
from common.runtime import UserError, generator, load_state, save_png
from data.shapes import Shapes

CPU = torch.device("cpu")
LOGIT_08 = math.log(4)  # sigmoid is 0.8


def column(*values: float) -> torch.Tensor:
    """A map [1, 1, 1, N]."""
    return torch.tensor(values).view(1, 1, 1, -1)


def complete(text: str = ""):
    """The completed flags of a command line."""
    return usod.complete(usod.build_parser().parse_args(text.split()))


def settings_of(data: str, out) -> Settings:
    """What a run on `data` in batches of four 64 x 64 pictures, on one CPU process, is given."""
    args = complete(f"--size 64 --batch-size 4 --backbone tiny --device cpu --data {data}")
    return flags.settle(flags.replaced(args, out=out), usod.METHOD)


# ---- Stage 1 -------------------------------------------------------------------------------------
def test_distilling_loss_by_hand():
    theta = column(LOGIT_08, -LOGIT_08, 0.0, 100.0)  # |S - .5| = .3 .3 0 .5
    loss = usod.distilling_loss
    assert loss(theta).item() == pytest.approx(0.5 - (0.3 + 0.3 + 0 + 0.5) / 4)
    assert loss(theta, k=2).item() == pytest.approx(0.25 - (0.09 * 2 + 0.25) / 4)
    # M S = 0 for the hard pixel, so that |M S - 0.5| = 0.5: the paper's form of the mask
    assert loss(theta, p=0.1).item() == pytest.approx(0.5 - (0.3 + 0.3 + 0.5 + 0.5) / 4)


def test_hard_pixels_have_no_gradient_and_easy_ones_are_pushed_apart():
    theta = column(0.1, -2.0, 3.0).requires_grad_()
    usod.distilling_loss(theta, p=0.2).backward()
    grad = theta.grad.flatten()
    assert grad[0] == 0 and grad[1] > 0 and grad[2] < 0
    theta.grad = None
    usod.distilling_loss(theta).backward()
    assert theta.grad.flatten()[0] < 0


def test_curriculum_of_the_paper_and_of_the_released_code():
    def curriculum(time, pcl=True, annealed=False, released=False):
        return usod.curriculum(time, 20, pcl, annealed, released)

    assert [curriculum(t)[0] for t in (0, 2.5, 5)] == pytest.approx([0.2, 0.125, 0.05])
    assert curriculum(20 / 3 + 0.01) == (0, 1)
    assert curriculum(0, pcl=False)[0] == 0
    times = [0, 0.9, 1, 4, 5.99, 6]  # epochs 1 1 2 5 6 7
    p = [curriculum(t, released=True)[0] for t in times]
    assert p == pytest.approx([0.17, 0.17, 0.14, 0.05, 0.02, 0])
    k = [curriculum(t, annealed=True, released=True)[1] for t in (0, 0.9, 10, 19.9)]
    assert k == pytest.approx([2, 2, 2**0.5, 2**0.05])
    assert curriculum(10, annealed=True) == (0, pytest.approx(2**0.5))


def test_flags_that_the_released_code_decides():
    found = {}
    for given in ("", "--released", "--transfer video", "--transfer video --released"):
        args = complete(given)
        found[given] = (args.pcl, args.power, args.bn, args.spr)
    assert found[""] == ("on", "linear", "stored", [0.2, 0.6, 0.2])
    assert found["--released"] == ("on", "annealed", "batch", [0.1, 0.7, 0.2])
    assert found["--transfer video"] == found[""]  # D3
    assert found["--transfer video --released"] == ("off", "annealed", "batch", [0.1, 0.7, 0.2])


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
    small = []
    for x in (torch.sigmoid(theta), guide):
        small.append(F.interpolate(x, (8, 12), mode="bilinear", align_corners=True)[0])
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
    bce = F.binary_cross_entropy_with_logits
    losses = {
        "iou": usod.iou_loss,
        "bce": bce,
        "iou+bce": lambda y, g: usod.iou_loss(y, g) + bce(y, g),
    }
    for kind, loss in losses.items():
        one = [loss(y, g).item() for y in first]
        two = [loss(y, big).item() for y in second]
        want = one[0] + 0.2 * one[1] + 0.1 * one[3] + 0.5 * (two[0] + 0.2 * two[1] + 0.1 * two[3])
        steady = F.interpolate(first[0], (8, 8), mode="bilinear", align_corners=False)
        want += (torch.sigmoid(second[0]) - torch.sigmoid(steady)).square().mean().item()
        got = usod.detector_loss([first, second], g, kind, [0.2, 0, 0.1])
        assert got.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "released, steady", [(False, [0, 0.8, 2, 3.2, 4]), (True, [0, 1, 2, 3, 4])]
)
def test_the_second_scale_is_compared_with_a_map_whose_corners_are_aligned_or_not(released, steady):
    """Three columns 0 2 4 become five. Among the old columns the centres of the new ones lie at
    -0.2 0.4 1 1.6 2.2, cut to 0 ... 2, or, if the outer centres are aligned, at 0 0.5 1 1.5 2."""
    first = torch.tensor([0.0, 2, 4]).expand(1, 1, 3, 3)
    second = torch.zeros(1, 1, 5, 5)
    zeros = [[torch.zeros_like(y)] * 3 for y in (first, second)]
    logits = [[first, *zeros[0]], [second, *zeros[1]]]
    g = torch.ones(1, 1, 3, 3)
    labels = usod.iou_loss(first, g) + 0.5 * usod.iou_loss(second, torch.ones(1, 1, 5, 5))
    ms = usod.detector_loss(logits, g, "iou", [0, 0, 0], released) - labels
    want = (torch.sigmoid(torch.tensor(steady).float()) - 0.5).square().mean()
    assert ms.item() == pytest.approx(want.item(), rel=1e-4)


def test_no_gradient_flows_from_the_second_scale_into_the_first():
    y = [torch.full((1, 1, 4, 4), value, requires_grad=True) for value in (1.0, -2.0)]
    zero = torch.zeros(1, 1, 4, 4)
    scales = [[one, zero, zero, zero] for one in y]
    both = usod.detector_loss(scales, zero, "iou", [0, 0, 0])
    alone = usod.detector_loss(scales[:1], zero, "iou", [0, 0, 0])
    assert torch.equal(*(torch.autograd.grad(loss, y[0])[0] for loss in (both, alone)))


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


@pytest.mark.parametrize(
    "given, pixels", [("", "imagenet"), ("--bn batch", "imagenet"), ("--released", "unit")]
)
def test_the_modality_s_encoder_is_as_awake_as_the_photo_s(given, pixels):
    """Stored BatchNorm statistics fit ImageNet's units alone (D7): on pixels in [0, 1] the deepest
    map would vary by a few per cent of what it should."""
    net = usod.make_net(2, complete(given), None).train()
    data = Shapes("test", modality="depth", seed=1)
    samples = [data[i] for i in range(8)]
    deep = []
    for encoder, part in zip(net.encoders, ("image", "modality")):
        x = torch.stack([TF.resize(sample[part], [128, 128]) for sample in samples]).float() / 255
        with torch.no_grad():
            deep.append(encoder(x)[4].std((0, 2, 3)).mean())
    assert 0.3 < deep[1] / deep[0] < 3
    mean = net.encoders[1].mean.flatten().tolist()
    assert mean == pytest.approx([0, 0, 0] if pixels == "unit" else [0.485, 0.456, 0.406])


def test_learning_rate_of_stage_1_falls_to_a_fifth():
    rates = [usod.falling_rate(time, Schedule(10, 2.0)) for time in (0, 5, 10)]
    assert rates == pytest.approx([2, 1.2, 0.4])
    groups = [{"params": [torch.zeros(1)], "share": share} for share in (1.0, 0.1)]
    optimiser = torch.optim.SGD(groups, lr=0.5)
    usod.set_rate(optimiser, 2.0)
    assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([2, 0.2])


# ---- SPR -----------------------------------------------------------------------------------------
def test_refiner_s_weights_sum_to_1_01_and_the_prior_s_to_one():
    image, s = torch.rand(2, 3, 24, 20), torch.full((2, 1, 24, 20), 0.5)
    assert (usod.pixel_refiner(image, s, 1) / 0.5).sub(1.01).abs().max() < 1e-5
    assert (usod.pixel_refiner(image, s) / 0.5).sub(1.01**6).abs().max() < 1e-5
    assert usod.rectify(image, s, 0 * s, [1, 0, 0]).sub(0.5).abs().max() < 1e-5


def test_refiner_against_its_definition():
    """One iteration at one pixel: 32 neighbours, squared differences over their deviation."""
    seeded = torch.Generator().manual_seed(2)
    image = torch.rand(1, 3, 40, 40, generator=seeded)
    s = torch.rand(1, 1, 40, 40, generator=seeded)
    y, x = 20, 17
    ring = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    places = [(d * i, d * j) for d in (1, 2, 4, 8) for i, j in ring]
    near = torch.stack([image[0, :, y + i, x + j] for i, j in places], 1)  # [3, 32]
    colour = ((near - image[0, :, y, x, None]) / near.std(1, keepdim=True) / 0.3).square().mean(0)
    reach = torch.tensor([math.hypot(*place) for place in places])
    place = torch.softmax(-((reach / reach.std() / 0.3) ** 2), 0)
    weight = torch.softmax(-colour, 0) + 0.01 * place
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


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """A joint set: four photos of noise without a modality, four others with depth."""
    folder = tmp_path_factory.mktemp("joint")
    for i in range(4):
        write_photo(folder / "bare" / f"{i}.png", 64, 64, seed=i)
        write_photo(folder / "deep" / "images" / f"{i}.png", 64, 64, seed=10 + i)
        write_photo(folder / "deep" / "depth" / f"{i}.png", 64, 64, seed=20 + i)
    return f"{folder}/bare+{folder}/deep"


def test_pairs_hold_the_modality_or_the_photo_again(joint):
    photos = open_set(joint, masks=False)
    bank = Bank(photos, 64, CPU, parts=("image", "modality"))
    index = torch.tensor([2, 5])
    flip = torch.tensor([False, True])
    pair, has = usod.read_pair(bank, index, flip)
    assert has.tolist() == [False, True] and torch.equal(pair[0, :3], pair[0, 3:])
    photo = photos[5]
    assert torch.equal(pair[1, :3] * 255, photo["image"].flip(2).float())
    assert torch.equal(pair[1, 3:] * 255, photo["modality"].flip(2).float())


class RedChannel(torch.nn.Module):
    """A detector whose map is the photo's red channel; its one weight has no gradient."""

    def __init__(self):
        super().__init__()
        self.encoders = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pair):
        y = torch.logit(0.05 + 0.9 * pair[:, :1]) + 0 * self.bias
        return [[y, y, y, y]]


@pytest.fixture
def corrected(joint, tmp_path):
    """Random pseudo labels [8, 64, 64] of `joint`, and a function that trains `RedChannel` on them
    for some epochs and returns the run folder."""
    start = (torch.rand(8, 64, 64, generator=torch.Generator().manual_seed(4)) > 0.5).byte() * 255
    for name, label in zip(open_set(joint, masks=False).names, start):
        save_png(tmp_path / "pseudo" / f"{name}.png", label)

    def train(epochs, released=False):
        out = tmp_path / f"{epochs}{released}"
        settings = settings_of(joint, out)
        plan = usod.DetectorPlan(
            Schedule(epochs, 0.5),
            pseudo=tmp_path / "pseudo",
            kind="iou",
            aux=[0, 0, 0],
            two_scales=False,
            spr=[0.2, 0.6, 0.2],
            released=released,
        )
        usod.train_detector(RedChannel(), settings, plan)
        return out

    return start, train


def test_labels_after_an_epoch_equal_the_formula_flips_included(joint, corrected):
    """G = l1 PAR(I, S) + l2 S + l3 G for every photo, whichever way round it was seen, from the
    second epoch on."""
    start, train = corrected
    photos = open_set(joint, masks=False)
    files = [train(1) / "rectified" / f"{name}.png" for name in photos.names]
    assert all(np.array_equal(Image.open(f), label) for f, label in zip(files, start))
    found = last(train(2), 2)["labels"] / 255  # [8, 1, 64, 64]
    image = torch.stack([photos[i]["image"] for i in range(8)]) / 255  # none is flipped here
    s = 0.05 + 0.9 * image[:, :1]
    want = 0.2 * usod.pixel_refiner(image, s) / 1.01**6 + 0.6 * s + 0.2 * start[:, None] / 255
    assert (found - want).abs().max() < 0.51 / 255 + 1e-5
    flips = torch.rand(8, generator=generator("cpu", 0, "flip", 2)) < 0.5
    assert flips.any() and not flips.all()  # both ways were seen


def test_learning_rate_of_stage_2_is_constant_unless_released(corrected):
    """Two steps per epoch: the last ones lie at 0.5 and 1.5 of 2 epochs (D4)."""
    _, train = corrected
    rates = {}
    for released in (False, True):
        log = read_log(train(2, released) / "stage2" / "log.jsonl")
        rates[released] = [line["lr"] for line in log]
    assert rates[False] == [0.5, 0.5]
    assert rates[True] == pytest.approx([0.5 * (1 - 0.8 / 4), 0.5 * (1 - 0.8 * 3 / 4)])


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
    state = net.state_dict() | unified_state({"decoder.new.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="1 unexpected .new.weight"):
        load_state(net, state, "file")
    kept = unified_state(
        {
            "encoder.fc.weight": torch.zeros(1),
            "t_net.fc.bias": torch.zeros(1),
            "decoder.ad2.se.gn.weight": torch.zeros(1),
            "t_net.layer1.0.conv1.weight": torch.zeros(1),
        }
    )
    assert list(kept) == ["encoders.1.layer1.0.conv1.weight"]

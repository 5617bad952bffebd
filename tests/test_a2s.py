"""a2s.py by hand: losses, boundaries, thresholds, schedules against numbers worked out on paper."""

import math

import pytest
import torch

import a2s
from common.backbones import backbone
from common.flags import Schedule
from common.runtime import World, generator


def column(*values: float) -> torch.Tensor:
    """A map [1, 1, 1, N]."""
    return torch.tensor(values).view(1, 1, 1, -1)


LOGIT_08 = math.log(4)  # sigmoid is 0.8, so D = 0.3


# ---- Losses --------------------------------------------------------------------------------------
def test_adb_loss_by_hand():
    theta = column(LOGIT_08, -LOGIT_08, 0.0, 100.0)  # D = 0.3 0.3 0 0.5
    assert a2s.adb_loss(theta, 0.1).item() == pytest.approx(-(0.09 * 2 + 0.25 + 0.1 * 1.1) / 4)
    assert a2s.adb_loss(theta, 0.0).item() == pytest.approx(-(0.09 * 2 + 0.25) / 4)
    keep = column(2.0, 0.0, 2.0, 0.0)  # two of four kept
    assert a2s.adb_loss(theta, 0.1, keep).item() == pytest.approx(-(0.09 + 0.03) / 2)


def test_adb_loss_does_not_know_the_sign_and_pushes_away_from_zero():
    theta = torch.randn(2, 1, 5, 7, requires_grad=True)
    loss = a2s.adb_loss(theta, 0.1)
    assert a2s.adb_loss(-theta, 0.1).item() == pytest.approx(loss.item())
    loss.backward()
    assert (theta.grad.sign() == -theta.detach().sign()).all()  # descent enlarges |theta|


def test_alpha_keeps_the_gradient_of_hard_pixels_alive():
    """At the boundary D^2 has no gradient; alpha |D| has alpha / 4 (Sec. III-A)."""
    for alpha in (0.0, 0.1):
        theta = torch.full((1, 1, 1, 1), 1e-4, requires_grad=True)
        a2s.adb_loss(theta, alpha).backward()
        assert theta.grad.item() == pytest.approx(-alpha / 4, abs=2e-5)


def test_iou_loss_by_hand():
    p, g = column(0.5, 1.0, 0.0), column(1.0, 1.0, 0.0)
    assert a2s.iou_loss(p, g).item() == pytest.approx(1 - 1.5 / 2)  # 1.5 shared of 2 united


def test_ssim_loss_of_flat_maps_by_hand():
    """Far from the zero-padded border only the luminance term differs from 1."""
    p, g = torch.full((1, 1, 200, 200), 0.2), torch.full((1, 1, 200, 200), 0.6)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)  # 0.6001
    assert 1 - a2s.ssim_loss(p, g).item() == pytest.approx(luminance, abs=0.03)
    assert a2s.ssim_loss(g, g).item() == pytest.approx(0, abs=1e-6)


def test_detector_loss_is_the_sum_of_its_terms_and_binarises_the_label():
    y, g = torch.randn(2, 1, 20, 20), torch.rand(2, 1, 20, 20)
    hard, p = (g > 0.5).float(), torch.sigmoid(y)
    bce = -(hard * p.log() + (1 - hard) * (1 - p).log()).mean()
    want = bce + a2s.ssim_loss(p, hard) + a2s.iou_loss(p, hard)
    assert a2s.detector_loss(y, g).item() == pytest.approx(want.item(), rel=1e-5)
    assert a2s.detector_loss(y, hard).item() == pytest.approx(want.item(), rel=1e-5)


# ---- Sign, thresholds, boundaries ----------------------------------------------------------------
def test_sign_takes_the_smaller_side_for_the_object():
    theta = torch.cat([column(1, 1, 1, -1), column(1, -1, -1, -1), column(1, 1, -1, -1)])
    assert a2s.foreground_sign(theta).flatten().tolist() == [-1, 1, 1]  # a tie is +1 (Eq. 5)
    assert a2s.foreground_sign(theta, released=True).flatten().tolist() == [-1, 1, 0]  # D5
    assert a2s.foreground_sign(column(0, 0, 0, -1)).item() == -1  # theta = 0 belongs to S1


def test_otsu_against_brute_force():
    m = torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(0)) ** 2
    for image, found in zip(m, a2s.otsu_threshold(m)):
        x = image.flatten().double()

        def v(t):
            low, high = x[x < t], x[x >= t]
            return len(low) * len(high) * (low.mean() - high.mean()) ** 2

        best = max(x.sort().values[1:], key=v)
        assert found.item() == pytest.approx(best.item())


def test_between_variance_by_hand():
    v = a2s.between_variance(column(0.0, 0.0, 2.0, 4.0, 3.0), column(1.0))  # means 0 and 3
    assert v.item() == pytest.approx(0.4 * 0.6 * 3**2)


def test_otsu_has_the_greatest_between_variance():
    """Table I's order: nothing can beat Otsu, which maximises V."""
    m = torch.randn(4, 1, 9, 9, generator=torch.Generator().manual_seed(1)).exp()
    v = {name: a2s.between_variance(m, t(m)) for name, t in a2s.THRESHOLDS.items()}
    assert (v["otsu"] >= v["mean"] - 1e-6).all() and (v["otsu"] >= v["median"] - 1e-6).all()
    assert not torch.allclose(v["otsu"], v["median"])


def test_decision_boundaries_by_hand():
    """Two channels, two pixels: f = (1, 2), (3, 6); f_ = (2, 4)."""
    f = torch.tensor([[1.0, 3.0], [2.0, 6.0]]).view(1, 2, 1, 2)

    def theta(kind, **kw):
        boundary = a2s.DecisionBoundary(kind, channels=2, **kw).eval()
        if kind == "DB4":
            boundary.w.weight.data = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1)
        if kind == "DB1":
            boundary.running_mean += torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        return boundary(f).flatten().tolist()

    assert theta("DB1") == [2, 8]  # sum of f, less 1
    assert theta("DB2") == [2 * 1 + 4 * 2, 2 * 3 + 4 * 6]
    assert theta("DB3") == [2 * -1 + 4 * -2, 2 * 1 + 4 * 2]
    assert theta("DB4") == [2 * -1 - -2, 2 * 1 - 2]
    assert theta("DB5") == [-3, 3]  # M = 3, 9 less 6
    assert theta("DB5", threshold="median") == [0, 6]
    assert theta("DB5", threshold="otsu") == [-6, 0]


def test_db1_learns_the_mean_of_the_training_set():
    boundary = a2s.DecisionBoundary("DB1", channels=2).train()
    for _ in range(600):
        boundary(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(4, 2, 3, 3))
    assert boundary.running_mean.flatten().tolist() == pytest.approx([1, 3], abs=0.01)


def test_theta_has_zero_mean_and_the_smaller_side_positive():
    net = a2s.ActivationNet(backbone("tiny", "none")).eval()
    maps = net(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(1, 64, 96), (1, 8, 12), (1, 4, 6), (1, 2, 3)]
    for aux in maps[1:]:
        assert aux.mean((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-4)
    net.boundaries[0].register_forward_hook(lambda *a: setattr(net, "theta", a[-1]))
    signed = net(torch.rand(2, 3, 64, 96))[0]
    assert net.theta.mean((1, 2, 3)).tolist() == pytest.approx([0, 0], abs=1e-4)
    assert ((signed > 0).float().mean((1, 2, 3)) < 0.55).all()


def test_the_encoder_of_stage_1_is_frozen_unless_a0():
    image = torch.rand(2, 3, 64, 64)
    for train_encoder in (False, True):
        net = a2s.ActivationNet(backbone("tiny", "none"), train_encoder=train_encoder)
        sum(a2s.adb_loss(theta, 0.1) for theta in net(image)).backward()
        assert any(p.grad is not None for p in net.encoder.parameters()) == train_encoder
        assert all(p.grad is not None for p in net.se3.parameters())


@pytest.mark.parametrize("size", [(33, 47), (64, 32), (100, 100)])
def test_networks_take_any_size(size):
    image = torch.rand(1, 3, *size)
    assert a2s.Detector(backbone("tiny", "none"))(image).shape == (1, 1, *size)
    assert a2s.ActivationNet(backbone("tiny", "none"))(image)[0].shape == (1, 1, *size)


# ---- Pixel drop, schedule, labels ----------------------------------------------------------------
def test_keep_mask_has_mean_one_and_is_shared_between_processes():
    theta = torch.zeros(4, 1, 50, 50)
    whole = a2s.keep_mask(theta, 0.5, World(), generator("cpu", 0))
    assert whole.mean().item() == pytest.approx(1) and 0.48 < (whole == 0).float().mean() < 0.52
    halves = [a2s.keep_mask(theta[:2], 0.5, World(r, 2), generator("cpu", 0)) for r in (0, 1)]
    assert torch.equal(torch.cat(halves), whole)
    assert (a2s.keep_mask(theta, 0.0, World(), generator("cpu", 0)) == 1).all()


def test_keep_mask_keeps_all_where_chance_drops_all():
    """One photo at 32 pixels has one pixel in F5: half of the draws would leave 0 / 0."""
    random = generator("cpu", 0)
    theta = torch.zeros(1, 1, 1, 1)
    assert all(a2s.keep_mask(theta, 0.5, World(), random).item() == 1 for _ in range(50))
    theta = torch.zeros(1, 1, 2, 2)
    for _ in range(500):
        assert a2s.keep_mask(theta, 0.9, World(), random).mean().item() == pytest.approx(1)


def test_rate_of_paper_and_released_code():
    stage1, stage2 = a2s.PAPER["stage1"], a2s.PAPER["stage2"]
    rates = [a2s.rate(e, stage1, (10, 16), 20) for e in (1, 9, 10, 15, 16, 20)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    rates = [a2s.rate(e, stage2, (15, 20), 25) for e in (1, 14, 15, 19, 20, 25)]
    assert rates == pytest.approx([5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])
    rates = [a2s.rate(e, stage1, (12, 16), 20) for e in (11, 12, 15, 16)]  # D1
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01])


def test_other_lengths_keep_the_fractions_of_the_paper_s_run():
    """Stage 2 of 25 epochs: 14 at the full rate, 5 at a tenth, 6 at a hundredth; OLR after 2."""

    def rates(epochs: int) -> list[float]:
        schedule = Schedule(epochs, 1.0)
        return [a2s.rate(e, schedule, (15, 20), 25) for e in range(1, epochs + 1)]

    assert rates(1) == [1]
    assert rates(3) == pytest.approx([1, 1, 0.1])
    assert rates(6) == pytest.approx([1, 1, 1, 1, 0.1, 0.01])
    assert rates(50) == pytest.approx([1] * 28 + [0.1] * 10 + [0.01] * 12)
    starts = {}
    for epochs in (3, 6, 13, 25, 50):
        schedule = Schedule(epochs, 1.0)
        olr = [e for e in range(1, epochs + 1) if schedule.reached(e, 3, 25)]
        starts[epochs] = olr[0]
    assert starts == {3: 2, 6: 2, 13: 3, 25: 3, 50: 5}


def test_pseudo_label_is_binary_crisp_and_follows_the_image():
    """A blurred square on a two-coloured picture snaps to the colour edge."""
    image = torch.full((1, 3, 64, 64), 0.2)
    image[..., 20:44, 20:44] = 0.8
    yy, xx = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    theta = 3 - ((yy - 29).abs().maximum((xx - 29).abs()))[None, None] / 4  # off by three pixels
    truth = image[:, :1] > 0.5
    for unary in ("soft", "hard"):
        label = a2s.refine(image, theta, sxy=50, srgb=5, unary=unary)
        assert set(label.unique().tolist()) == {0.0, 1.0}
        assert (label > 0.5).logical_xor(truth).float().mean() < 0.01  # corners, by the median
        assert (theta > 0).logical_xor(truth).float().mean() > 0.04


def test_released_post_processing_cuts_in_the_middle_of_the_range():
    """D2: the map stretched to [0, 1] is cut at 0.5, so an all-positive map still has two sides."""
    image = torch.full((1, 3, 32, 32), 0.2)
    image[..., 8:24, 8:24] = 0.8
    theta = torch.where(image[:, :1] > 0.5, 4.0, 1.0)
    assert a2s.refine(image, theta, sxy=50, srgb=5, unary="hard").mean() == 1
    assert 0.2 < a2s.refine(image, theta, sxy=50, srgb=5, released=True).mean() < 0.3

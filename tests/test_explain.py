"""--explain: what it takes from a network, and the pictures of the networks that are shipped."""

import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image
from torch import nn

import a2s
import class_net
from common.explain import outputs_of, panels, stretched


def test_outputs_of_parts_of_a_network_are_what_they_gave():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
    image = torch.rand(1, 3, 4, 4)
    seen = outputs_of(net, ["0", "1"], image)
    first = net[0](image)
    assert list(seen) == ["0", "1"]
    torch.testing.assert_close(seen["0"], first)
    torch.testing.assert_close(seen["1"], first.relu())
    assert not net[0]._forward_hooks  # a later training is not watched


def test_stretched_is_the_mean_over_channels_from_0_to_1():
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 8.0]]]])  # means 2 and 5
    assert stretched(x).tolist() == [[[0.0, 1.0]]]
    assert stretched(torch.ones(1, 2, 1, 2)).tolist() == [[[0.0, 0.0]]]  # nothing to stretch


def test_similarity_and_agreement_are_those_that_the_attention_uses():
    position, channel = class_net.PositionAttention(), class_net.ChannelAttention()
    nn.init.ones_(position.alpha)
    nn.init.ones_(channel.beta)
    high, low = torch.randn(1, 64, 2, 3), torch.randn(1, 64, 4, 6)
    with torch.no_grad():
        value = class_net.rows(position.value(low))[:, 0]  # [1, N_l, 64]
        found = (position.similarity(high, low) @ value).transpose(-1, -2).view(high.shape)
        torch.testing.assert_close(position(high, low), high + found)

        f_h = class_net.resize(high, low).flatten(2)
        found = (channel.agreement(low.flatten(2), f_h) @ f_h).view(low.shape)
        torch.testing.assert_close(channel(low, high), low + found)


@pytest.mark.parametrize(
    "script, size",
    [
        (class_net, (4 * 260, 3 * 194)),  # 12 panels of 256 x 170, with a title and a margin
        (a2s, (5 * 260, 2 * 194)),  # 10 panels
    ],
)
def test_a_shipped_network_is_explained(script, size, tmp_path):
    photo = "data/photos/cat.jpg"  # 451 x 300
    script.main(["--explain", photo, "--out", str(tmp_path), "--device", "cpu"])
    picture = Image.open(tmp_path / "explain" / "cat.png").convert("L")
    assert picture.size == size

    # The last panel is the map, white inside the cat and black beside it.
    width, height = size
    left, top = width - 260, height - 174
    assert picture.getpixel((left + 113, top + 85)) > 200
    assert picture.getpixel((left + 250, top + 10)) < 50


def test_a_photo_that_is_not_there_is_named(tmp_path):
    sentence = refused(class_net.main, "--explain", tmp_path / "no.jpg", "--out", tmp_path)
    assert "no.jpg" in sentence
    (tmp_path / "x.jpg").write_bytes(b"no picture")
    assert "x.jpg" in refused(class_net.main, "--explain", tmp_path / "x.jpg", "--out", tmp_path)


def test_a_folder_of_several_photos_is_refused(tmp_path):
    sentence = refused(class_net.main, "--explain", "data/photos", "--out", tmp_path)
    assert sentence == "--explain draws one photo, and data/photos holds 4"


def test_ablations_of_class_leave_out_their_panels():
    flags = "--data shapes --attention channel --outputs 1 --backbone tiny --size 64"
    args = class_net.complete(class_net.build_parser().parse_args(flags.split()))
    net = class_net.make_net(args, "none").eval()
    image = torch.rand(1, 3, 64, 64)
    titles = [title for title, _ in class_net.explain(net, image[0], image)]
    channels = [f"channels, level {level}, Eq. 4" for level in "432"]
    assert titles == ["photo", "a deep cell", *channels, "D_2"]


# ---- Pictures with titles -----------------------------------------------------------------------
def test_panels_show_every_picture_under_its_title(tmp_path):
    """Three columns of 256 pixels and a gap of 4; each panel is 128 high below 20 for the title."""
    board = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # [2, 2]
    pictures = [
        ("the photo", torch.full((3, 300, 600), 200, dtype=torch.uint8)),
        ("cells", board),
        ("the same, with a title that is far too long to be written in one line", board[None]),
        ("inside", board > 0),
    ]
    panels(tmp_path / "explain" / "a.png", pictures, columns=3)
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "explain" / "a.png")))
    assert sheet.shape == (2 * (20 + 128 + 4), 3 * (256 + 4), 3)

    # Every title is dark on white and leaves a margin; the two places without a picture are white.
    rows, columns = sheet.split(20 + 128 + 4), range(0, 3 * 260, 260)
    for row, left, dark in zip([*rows[:1] * 3, rows[1]], [*columns, 0], [200, 0, 0, 0]):
        cell = row[:, left : left + 260]
        assert cell[:20].min() < 100 and (cell[:20, -6:] == 255).all()
        assert cell[20:148, :256].min() == dark
    assert (rows[1][:, 260:] == 255).all()

    # Cells keep their edges.
    cell = rows[0][20:148, 260:516, 0]
    assert (cell[:64, :128] == 255).all() and (cell[64:, 128:] == 255).all()
    assert (cell[64:, :128] == 0).all() and (cell[:64, 128:] == 0).all()


@pytest.mark.parametrize("size, height", [((1, 3000), 1), ((3000, 1), 1024)])
def test_panels_of_a_very_long_photo_have_bounds(tmp_path, size, height):
    panels(tmp_path / "a.png", [("photo", torch.ones(3, *size))])
    assert Image.open(tmp_path / "a.png").size == (256 + 4, 20 + height + 4)

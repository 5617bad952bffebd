"""Reading one file: what pictures, masks and maps decode to, and what bad files say."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import load_image, load_map, load_mask, load_modality, read
from common.runtime import UserError

ROW = np.array([[0, 100, 200, 255]], np.uint8)  # [1, 4]
DISK = np.zeros((40, 60), bool)
DISK[10:30, 20:45] = True  # 500 of 2,400 pixels
RING = np.zeros((40, 60), bool)
RING[8:32, 18:47] = True
RING &= ~DISK  # 196 pixels around it


def error(call, *args) -> str:
    """The one-line message of the `UserError` that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mask(tmp_path, picture, name: str = "m.png", **options) -> torch.Tensor:
    """What `load_mask` makes of a picture, or of an array, that was saved as `name`."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(tmp_path / name, **options)
    return load_mask(tmp_path / name)


def foreground(tmp_path, picture, name: str = "m.png", **options) -> np.ndarray:
    """The same as bool [H, W]."""
    return mask(tmp_path, picture, name, **options)[0].numpy() > 0


def refusal(tmp_path, picture, name: str = "m.png", **options) -> str:
    """The sentence that refuses a mask: it names the file and says what to do."""
    text = error(mask, tmp_path, picture, name) if not options else ""
    assert str(tmp_path / name) in text and "save it as black" in text
    return text


def palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    """A picture of indices with the first colours of its palette."""
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([level for colour in colours for level in colour])
    return image


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(width: int, height: int, colour_type: int, *chunks: bytes) -> bytes:
    """A PNG of 8 bits out of raw chunks."""
    head = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", head), *chunks, chunk(b"IEND", b"")])


def exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """EXIF with raw tags (number, type, count, value), as odd as one likes."""
    table = struct.pack("<H", len(tags))
    data = b""
    for number, kind, count, value in tags:
        place = value.ljust(4, b"\0")
        if len(value) > 4:
            place = struct.pack("<I", 14 + 12 * len(tags) + len(data))
            data += value
        table += struct.pack("<HHI", number, kind, count) + place
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + table + bytes(4) + data


# ---- Pictures ------------------------------------------------------------------------------------
def test_pictures_of_every_mode_decode_to_their_colours(tmp_path):
    red = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)  # [1, 2, 3]
    rgb = Image.fromarray(red)
    alpha = rgb.convert("RGBA")
    alpha.putalpha(7)
    for name, image in {
        "rgb.png": rgb,
        "rgba.png": alpha,
        "bitmap.BMP": rgb,
        "palette.png": rgb.quantize(2),
        "page.tif": rgb,
        "page.TIFF": alpha,
        "frame.gif": rgb,
    }.items():
        image.save(tmp_path / name)
        assert load_image(tmp_path / name).permute(1, 2, 0).tolist() == red.tolist(), name
    rgb.save(tmp_path / "exact.webp", lossless=True)
    assert load_image(tmp_path / "exact.webp").permute(1, 2, 0).tolist() == red.tolist()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")  # no cyan: red
    red = load_image(tmp_path / "cmyk.jpg")[:, 4, 4].tolist()
    assert red[0] > 240 and max(red[1:]) < 15
    Image.fromarray(ROW).save(tmp_path / "grey.png")
    got = load_image(tmp_path / "grey.png")
    assert got.dtype == torch.uint8 and got.is_contiguous() and got.tolist() == [ROW.tolist()] * 3


def test_the_first_frame_or_page_is_read(tmp_path):
    first, second = Image.new("L", (5, 4), 200), Image.new("L", (5, 4), 20)
    for name in ("a.gif", "a.tif", "a.webp", "a.png"):
        options = {"lossless": True} if name == "a.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **options)
        assert load_image(tmp_path / name).unique().tolist() == [200], name


def test_lab_pictures_are_read(tmp_path):
    Image.new("LAB", (3, 2), (255, 128, 128)).save(tmp_path / "lab.tif")
    assert load_image(tmp_path / "lab.tif").min() > 240
    assert load_map(tmp_path / "lab.tif").getextrema()[0] > 240


def test_sixteen_bits_of_a_photo_are_scaled_not_clipped(tmp_path):
    Image.fromarray(ROW.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png")[1].tolist() == ROW.tolist()
    Image.fromarray(np.array([[0.0, 0.4, 1.0]], np.float32)).save(tmp_path / "float.tif")
    assert load_image(tmp_path / "float.tif")[1].tolist() == [[0, 102, 255]]


def test_a_sensors_numbers_are_stretched(tmp_path):
    depth = np.linspace(500, 4000, 2400).reshape(40, 60).astype(np.uint16)  # millimetres
    depth[0, 0] = 0  # not measured
    Image.fromarray(depth).save(tmp_path / "d.png")
    for load in (load_image, load_modality):
        got = load(tmp_path / "d.png")
        assert got[:, 0, 0].tolist() == [0, 0, 0] and got[0, 0, 1] == 1 and got[0, -1, -1] == 255
        assert len(got.unique()) > 250
        assert got[0, 20, 0] == round(1 + 254 * (int(depth[20, 0]) - 501) / 3499)
    far = np.array([[0, 20000, 30000, 40000]], np.uint16)  # as a photo: all between 78 and 156
    Image.fromarray(far).save(tmp_path / "far.png")
    assert load_modality(tmp_path / "far.png")[0].tolist() == [[0, 1, 128, 255]]
    assert load_image(tmp_path / "far.png")[0].tolist() == [[0, 78, 117, 156]]
    metres = np.array([[0, np.nan, 0.5, 4.5]], np.float32)
    Image.fromarray(metres).save(tmp_path / "metres.tif")
    assert load_modality(tmp_path / "metres.tif")[0].tolist() == [[0, 0, 1, 255]]
    for constant in (np.full((2, 2), 700, np.uint16), np.zeros((2, 2), np.uint16)):
        Image.fromarray(constant).save(tmp_path / "flat.png")
        assert len(load_modality(tmp_path / "flat.png").unique()) == 1
    Image.fromarray(ROW // 10).save(tmp_path / "eight.png")  # 8 bits stay as they are
    assert load_modality(tmp_path / "eight.png")[0].tolist() == (ROW // 10).tolist()


# ---- Orientation ---------------------------------------------------------------------------------
def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(np.array([[0, 255]], np.uint8).repeat(8, 0).repeat(8, 1))  # left dark
    tags = Image.Exif()
    tags[0x0112] = 6  # to be turned clockwise by 90 degrees: the left edge becomes the top
    image.save(tmp_path / "turned.jpg", exif=tags)
    got = load_image(tmp_path / "turned.jpg")
    assert got.shape == (3, 16, 8)
    assert got[:, :7].max() < 40 and got[:, 9:].min() > 215


@pytest.mark.parametrize(
    "name, mode",
    [
        ("a.png", "L"),
        ("a.png", "I;16"),
        ("a.tif", "L"),
        ("a.tif", "RGB"),
        ("a.tif", "I;16"),
        ("a.webp", "RGB"),
    ],
)
def test_every_orientation_is_that_of_the_specification(tmp_path, name, mode):
    """Tag 6 says: row 0 of the file is the right side, column 0 the top of what is seen."""
    grey = np.arange(15, dtype=np.uint8).reshape(3, 5) * 17
    seen = {
        1: grey,
        2: grey[:, ::-1],
        3: grey[::-1, ::-1],
        4: grey[::-1],
        5: grey.T,
        6: np.rot90(grey, -1),
        7: np.rot90(grey, 2).T,
        8: np.rot90(grey),
        99: grey,
    }
    if mode == "I;16":
        file = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        file = Image.fromarray(grey).convert(mode)
    for orientation, right in seen.items():
        tags = Image.Exif()
        tags[0x0112] = orientation
        options = {"lossless": True} if name == "a.webp" else {}
        file.save(tmp_path / name, exif=tags, **options)
        assert np.array_equal(load_image(tmp_path / name)[0], right), orientation


@pytest.mark.parametrize(
    "odd",
    [
        (0x11A, 10, 1, struct.pack("<ii", -1, 0)),  # resolution -1/0
        (0x11A, 2, 5, b"72/1\0"),  # resolution as text
        (0x9286, 7, 9, b"UNICODE\0\xff"),  # a comment
        (0x8769, 4, 1, struct.pack("<I", 9999)),  # an IFD beyond the end
        (0x0131, 3, 1, b"\1\0"),  # the software's name as a number
    ],
)
def test_odd_tags_beside_the_orientation_do_not_matter(tmp_path, odd):
    turn = (0x112, 3, 1, struct.pack("<H", 6))
    photo = Image.fromarray(np.zeros((30, 50, 3), np.uint8))
    photo.save(tmp_path / "p.jpg", exif=exif(*sorted([turn, odd])))
    assert load_image(tmp_path / "p.jpg").shape == (3, 50, 30)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "tags",
    [
        b"Exif\0\0II*\0\x08\0\0\0\x05\0abc",
        b"Exif\0\0garbage",
        b"Exif\0\0",
        exif((0x112, 2, 2, b"6\0")),
        exif((0x112, 7, 4, b"\xff\xff\xff\xff")),
    ],
)
def test_broken_exif_leaves_the_photo_as_it_is(tmp_path, tags):
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path / "p.jpg", exif=tags)
    assert load_image(tmp_path / "p.jpg").shape == (3, 30, 50)


# ---- Masks that are decided ----------------------------------------------------------------------
def masks_of():
    """(file name, picture, expected foreground) of the kinds of masks that public sets hold."""
    objects = palette(np.array([[0, 1, 2, 1]]), (0, 0, 0), (128, 0, 0), (0, 128, 0))
    ramp = palette(ROW, *((level, level, level) for level in range(256)))
    grey = Image.fromarray(np.array([[0, 128, 129, 255]], np.uint8))
    deep = np.array([[0, 33024, 33025, 65535]], np.uint16)
    return [
        ("grey.png", grey, [0, 0, 1, 1]),
        ("rgb.png", grey.convert("RGB"), [0, 0, 1, 1]),
        ("bit.png", grey.point(lambda v: 255 * (v > 128)).convert("1"), [0, 0, 1, 1]),
        ("ones.png", Image.fromarray(np.array([[0, 1, 0, 1]], np.uint8)), [0, 1, 0, 1]),
        ("none.png", Image.fromarray(np.zeros((1, 4), np.uint8)), [0, 0, 0, 0]),
        ("objects.png", objects, [0, 1, 1, 1]),
        ("ramp.png", ramp, [0, 0, 1, 1]),
        ("deep.png", Image.fromarray(deep), [0, 0, 1, 1]),
        ("deep255.png", Image.fromarray(np.array([[0, 255, 0, 255]], np.uint16)), [0, 1, 0, 1]),
        ("deep1.png", Image.fromarray(np.array([[0, 1, 0, 1]], np.uint16)), [0, 1, 0, 1]),
    ]


def test_masks_of_every_kind_are_binary(tmp_path):
    for name, image, foreground in masks_of():
        image.save(tmp_path / name)
        got = load_mask(tmp_path / name)
        assert got.dtype == torch.uint8 and got.shape == (1, 1, 4)
        assert got.flatten().tolist() == [255 * f for f in foreground], name
        if name in ("grey.png", "rgb.png", "bit.png", "ramp.png", "deep.png"):
            grey = np.array(load_map(tmp_path / name))
            assert np.array_equal(got[0].numpy() > 0, grey > 128), name


@pytest.mark.parametrize("low, high", [(0, 1), (0, 2), (0, 38), (0, 100), (1, 2), (76, 149)])
def test_of_two_levels_the_lighter_is_foreground(tmp_path, low, high):
    for kind in (np.uint8, np.uint16, np.int32, np.float32):
        grey = np.where(DISK, high, low).astype(kind)
        assert np.array_equal(foreground(tmp_path, grey, "m.tif"), DISK), kind
    deep = np.where(DISK, 1000 * high, low).astype(np.uint16)  # more than 8 bits
    assert np.array_equal(foreground(tmp_path, deep), DISK)


def test_empty_and_full_masks_are_legal(tmp_path):
    for value, full in ((0, False), (1, True), (200, True), (255, True)):
        assert (foreground(tmp_path, np.full((4, 5), value, np.uint8)) == full).all(), value
    assert foreground(tmp_path, np.full((4, 5), 65535, np.uint16)).all()
    assert foreground(tmp_path, np.where(DISK, 254, 255).astype(np.uint8)).all()  # noise on white
    assert not foreground(tmp_path, Image.new("1", (5, 4), 0)).any()
    assert foreground(tmp_path, palette(DISK | True, (0, 0, 0), (128, 0, 0))).all()
    assert not foreground(tmp_path, palette(DISK & False, (0, 0, 0), (128, 0, 0))).any()


def test_shades_are_cut_at_half(tmp_path):
    """Edges of grey, noise of JPEG, and PASCAL-S, whose levels are twelfths of 255."""
    edge = np.array(Image.fromarray(DISK.astype(np.uint8) * 255).resize((90, 60)))
    assert len(np.unique(edge)) > 8
    assert np.array_equal(foreground(tmp_path, edge), edge > 128)
    for quality in (10, 50, 95):
        Image.fromarray(edge).convert("RGB").save(tmp_path / "m.jpg", quality=quality)
        noisy = np.array(Image.open(tmp_path / "m.jpg").convert("L"))
        assert np.array_equal(load_mask(tmp_path / "m.jpg")[0] > 0, noisy > 128), quality
    steps = np.array([[0, 42, 64, 85, 106, 127, 128, 149, 191, 255]], np.uint8)
    assert np.array_equal(foreground(tmp_path, steps), steps > 128)
    assert not foreground(tmp_path, steps[:, :4]).any()  # chosen by few: nothing is salient
    few = DISK * np.uint8(255)
    few[0, :3] = 1  # three stray pixels are no label
    assert np.array_equal(foreground(tmp_path, few), DISK)


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (128, 0, 0), (0, 64, 0)])
def test_paint_on_black_is_foreground(tmp_path, colour):
    painted = np.zeros((40, 60, 3), np.uint8)
    painted[DISK] = colour
    assert np.array_equal(foreground(tmp_path, painted), DISK)
    painted[RING] = (0, 0, 192)  # a second object
    assert np.array_equal(foreground(tmp_path, painted), DISK | RING)
    opaque = np.dstack([painted, np.full((40, 60), 255, np.uint8)])
    assert np.array_equal(foreground(tmp_path, opaque), DISK | RING)


def test_a_palette_is_read_by_its_colours_in_any_order(tmp_path):
    black, white, maroon, olive = (0, 0, 0), (255, 255, 255), (128, 0, 0), (128, 128, 0)
    for colours in ([black, maroon, olive], [black, white, white], [black, maroon, white]):
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
            labels = np.where(DISK, 1, np.where(RING, 2, 0))
            entries = [colours[order.index(i)] for i in range(3)]
            image = palette(np.array(order)[labels], *entries)
            assert np.array_equal(foreground(tmp_path, image), DISK | RING), (colours, order)
    dark = palette(DISK, (68, 1, 84), (253, 231, 37))  # no black, but index 0 is the darkest
    assert np.array_equal(foreground(tmp_path, dark), DISK)
    grey = palette(DISK, (255, 255, 255), (0, 0, 0))  # what is seen counts: white is foreground
    assert np.array_equal(foreground(tmp_path, grey), ~DISK)
    assert np.array_equal(foreground(tmp_path, palette(DISK, black, black)), DISK)  # no colours
    assert np.array_equal(foreground(tmp_path, palette(DISK, black, maroon), "m.gif"), DISK)

    # The darkest of PASCAL VOC's colours are those of the labels 64, 128 and 256.
    labels = np.where(DISK, 1, np.where(RING, 2, 0))
    for last in ((32, 0, 0), (0, 32, 0), (0, 0, 32)):
        assert np.array_equal(
            foreground(tmp_path, palette(labels, black, maroon, last)), DISK | RING
        )


def test_an_index_beyond_the_palette_is_a_level(tmp_path):
    rows = b"".join(b"\0" + bytes(255 * pixel for pixel in row) for row in DISK.tolist())
    chunks = chunk(b"PLTE", bytes([0, 0, 0, 128, 0, 0])), chunk(b"IDAT", zlib.compress(rows))
    (tmp_path / "m.png").write_bytes(png(60, 40, 3, *chunks))
    assert np.array_equal(load_mask(tmp_path / "m.png")[0] > 0, DISK)


def test_alpha_that_differs_is_the_mask(tmp_path):
    alpha = DISK.astype(np.uint8) * 255
    photo = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    for level in (0, 90, 255):
        flat = np.full((40, 60), level, np.uint8)
        assert np.array_equal(foreground(tmp_path, np.dstack([flat] * 3 + [alpha])), DISK)
        grey = Image.merge("LA", [Image.fromarray(flat), Image.fromarray(alpha)])
        assert np.array_equal(foreground(tmp_path, grey), DISK), level
    assert np.array_equal(foreground(tmp_path, np.dstack([photo, alpha])), DISK)  # a cut-out
    half = np.dstack([photo, alpha // 2])  # a translucent overlay
    assert np.array_equal(foreground(tmp_path, half), DISK)
    assert np.array_equal(foreground(tmp_path, np.dstack([alpha] * 4)), DISK)  # twice the same
    ghost = palette(DISK, (0, 0, 0), (0, 0, 0))
    assert np.array_equal(foreground(tmp_path, ghost, transparency=b"\0\xff"), DISK)


def test_alpha_that_is_the_same_everywhere_is_not_the_mask(tmp_path):
    white = DISK.astype(np.uint8) * 255
    for level in (0, 128, 255):
        flat = np.full((40, 60), level, np.uint8)
        assert np.array_equal(foreground(tmp_path, np.dstack([white] * 3 + [flat])), DISK), level
    assert not foreground(tmp_path, Image.new("RGBA", (5, 4), (255, 255, 255, 0))).any()


# ---- Masks that cannot be decided ----------------------------------------------------------------
@pytest.mark.parametrize(
    "levels, shown",
    [
        ([0, 1, 255], "(0, 1, 255)"),  # a void border
        ([0, 15, 255], "(0, 15, 255)"),
        ([0, 1, 2], "(0, 1, 2)"),  # numbers of labels
        ([0, 38, 75], "(0, 38, 75)"),  # the same, painted and made grey
        ([0, 100, 200], "(0, 100, 200)"),
        ([0, 2, 254], "(0, 2, 254)"),
    ],
)
def test_labels_are_refused(tmp_path, levels, shown):
    grey = np.choose(DISK + 2 * RING, levels)
    for kind in (np.uint8, np.uint16):
        assert shown in refusal(tmp_path, grey.astype(kind))
    assert shown in refusal(tmp_path, Image.fromarray(grey.astype(np.uint8)).convert("RGB"))


def test_other_masks_that_are_refused(tmp_path):
    labels = DISK + 2 * RING
    assert "38" in refusal(tmp_path, np.full((4, 5), 38, np.uint8))
    deep = np.choose(labels, [0, 1000, 2000]).astype(np.uint16)
    assert "(0, 1000, 2000)" in refusal(tmp_path, deep)
    deep = np.choose(labels, [0, 1, 65535]).astype(np.uint16)  # 0 and 1 are the same in 8 bits
    assert "(0, 1, 65535)" in refusal(tmp_path, deep)
    dim = Image.fromarray(DISK.astype(np.uint8) * 100)
    dim.save(tmp_path / "m.jpg", quality=75)  # whose noise reaches 131
    assert "levels that may be numbers of labels (0, 1, " in error(load_mask, tmp_path / "m.jpg")
    dim = dim.resize((90, 60), Image.BICUBIC)
    assert "levels that may be numbers of labels (0, " in refusal(tmp_path, dim)
    assert "nan" in refusal(tmp_path, np.where(DISK, np.nan, 0).astype(np.float32), "m.tif")

    voc = palette(np.choose(labels, [0, 3, 255]), *[(0, 0, 0)] * 3, (128, 128, 0))
    voc.putpalette(voc.getpalette()[:12] + [0] * 753 + [224, 224, 192])
    assert "void" in refusal(tmp_path, voc)
    assert "void" in refusal(tmp_path, voc.convert("RGB"))
    alone = np.where(DISK[..., None], np.array([224, 224, 192], np.uint8), np.uint8(0))
    assert "void" in refusal(tmp_path, alone)

    # Two labels of a palette that has no colour for the second: neither is dropped.
    padded = palette(labels, (0, 0, 0), (128, 0, 0), (0, 0, 0))
    assert "(0, 1, 2)" in refusal(tmp_path, padded)

    white = palette(DISK, (255, 255, 255), (128, 0, 0))  # paint on white
    assert "without a black background" in refusal(tmp_path, white)
    assert "without a black background" in refusal(tmp_path, white.convert("RGB"))
    photo = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    assert "more than 64 colours" in refusal(tmp_path, photo)

    half = np.where(np.arange(60) < 30, 255, 0).astype(np.uint8) * np.ones((40, 1), np.uint8)
    both = np.dstack([half] * 3 + [DISK.astype(np.uint8) * 255])
    assert "alpha" in refusal(tmp_path, both)


# ---- Maps ----------------------------------------------------------------------------------------
def test_a_map_is_grey_and_a_cutout_is_read_by_its_alpha(tmp_path):
    ramp = np.arange(20, dtype=np.uint8).reshape(4, 5) * 13
    photo = np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8)
    for name, picture in {
        "grey": ramp,
        "rgb": np.dstack([ramp] * 3),
        "opaque": np.dstack([ramp] * 3 + [np.full_like(ramp, 255)]),
        "cutout": np.dstack([photo, ramp]),
        "deep": ramp.astype(np.uint16) * 257,
    }.items():
        Image.fromarray(picture).save(tmp_path / "m.png")
        got = load_map(tmp_path / "m.png")
        assert got.mode == "L" and np.array_equal(np.asarray(got), ramp), name


def test_pictures_in_colours_and_odd_numbers_are_no_map(tmp_path):
    """Neither the brightness of an object nor that of a heat map's colours is saliency."""
    on_black = np.where(DISK[..., None], np.array([200, 30, 10], np.uint8), np.uint8(0))
    for name, picture in {
        "object on black": Image.fromarray(on_black),
        "opaque": Image.fromarray(on_black).convert("RGBA"),
        "heat map": palette(
            np.arange(4).reshape(2, 2), *((85 * i, 0, 255 - 85 * i) for i in range(4))
        ),
    }.items():
        picture.save(tmp_path / "m.png")
        assert "in colours" in error(load_map, tmp_path / "m.png"), name
    for odd in (np.nan, np.inf, -3):  # a network's logits are no map, either
        Image.fromarray(np.where(DISK, 0.5, odd).astype(np.float32)).save(tmp_path / "m.tif")
        assert "negative values or such that are no numbers" in error(load_map, tmp_path / "m.tif")
    grey = Image.fromarray(DISK.astype(np.uint8) * 255).convert("RGB")
    grey.save(tmp_path / "m.jpg", quality=5)  # noise of JPEG is no colour
    assert load_map(tmp_path / "m.jpg").mode == "L"


# ---- Files that cannot be read -------------------------------------------------------------------
def test_unreadable_files_are_named(tmp_path):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(photo)
    files = {"short.jpg": photo.read_bytes()[:900], "empty.png": b"", "text.jpg": b"not a photo"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        for load in (load_image, load_mask, load_map, load_modality):
            assert str(tmp_path / name) in error(load, tmp_path / name)
    assert "damaged" in error(read, tmp_path / "short.jpg")
    assert "not a picture" in error(read, tmp_path / "text.jpg")


def test_what_is_not_the_files_fault_is_not_blamed_on_it(tmp_path, monkeypatch):
    for path in (tmp_path / "gone.jpg", tmp_path, tmp_path / ("a" * 300)):
        text = error(read, path)
        assert str(path) in text and "fetch it again" not in text and "damaged" not in text
    assert "No such file" in error(read, tmp_path / "gone.jpg")

    def full(*args):
        raise MemoryError

    Image.new("L", (4, 4)).save(tmp_path / "m.png")
    monkeypatch.setattr(Image.Image, "load", full)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(MemoryError):
        load_mask(tmp_path / "m.png")


def test_a_decompression_bomb_says_so(tmp_path):
    rows = chunk(b"IDAT", zlib.compress(b"\0"))
    (tmp_path / "bomb.png").write_bytes(png(20_000, 20_000, 0, rows))
    text = error(load_image, tmp_path / "bomb.png")
    assert "more than 178 million pixels" in text and "MAX_IMAGE_PIXELS" in text


@pytest.mark.filterwarnings("ignore")
def test_no_damage_makes_another_error(tmp_path):
    """Files of every format with bytes changed, cut off or put in: a picture or a sentence."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
    sources = []
    for suffix in ("jpg", "png", "bmp", "webp", "tif", "gif"):
        for picture in (photo, photo.convert("L"), photo.quantize(8)):
            memory = io.BytesIO()
            if suffix == "jpg":
                picture = picture.convert("L" if picture.mode == "L" else "RGB")
            picture.save(memory, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
            sources.append((suffix, memory.getvalue()))
    read_well = 0
    for turn in range(252):
        suffix, content = sources[turn % len(sources)]
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(0, len(damaged))] = rng.integers(0, 256)
        if turn % 3 == 1:
            del damaged[rng.integers(0, len(damaged)) :]
        if turn % 3 == 2:
            at = rng.integers(0, len(damaged))
            damaged[at:at] = rng.bytes(8)
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(damaged)
        for load in (load_image, load_mask, load_map, load_modality):
            try:
                load(path)
                read_well += 1
            except UserError as problem:
                assert str(path) in str(problem)
    assert 100 < read_well < 900

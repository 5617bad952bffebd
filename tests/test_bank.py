"""The bank: samples stay aligned with their labels through flips, processes and interruptions."""

import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.bank import Bank, MapBank, available_memory, batches, epoch_order, resize
from common.datasets import open_set
from common.images import load_image
from common.runtime import UserError, World

CPU = torch.device("cpu")


class Ramps(torch.utils.data.Dataset):
    """Six 4x4 photos whose pixel (y, x) of photo i is 40 i + x."""

    names, title = list("abcdef"), "ramps"

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return {"image": (40 * i + torch.arange(4)).byte().expand(3, 4, 4)}


def maps(i):
    """Label i: column x holds 10 i + x."""
    return (10 * i + torch.arange(4)).byte().expand(1, 4, 4)


def test_images_are_in_0_1_and_flipped_where_asked():
    bank = Bank(Ramps(), 4, CPU)
    image = bank.images(torch.tensor([2, 1]), torch.tensor([False, True]))
    assert image.shape == (2, 3, 4, 4)
    assert (image[0, 0, 0] * 255).round().tolist() == [80, 81, 82, 83]
    assert (image[1, 0, 0] * 255).round().tolist() == [43, 42, 41, 40]


def test_empty_and_full_masks_are_counted_aloud(capsys):
    class Masked(Ramps):
        def __getitem__(self, i):
            mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
            mask[:, :, : [0, 1, 2, 4, 0, 3][i]] = 255  # two are empty, one is full
            return super().__getitem__(i) | {"mask": mask}

    Bank(Masked(), 4, CPU, parts=("image", "mask"))
    said = capsys.readouterr().err
    assert "ramps has 2 empty mask(s)" in said and "ramps has 1 full mask(s)" in said


def test_a_map_read_flipped_and_written_flipped_stays_where_it_was():
    bank = MapBank(maps, 6, 4, CPU)
    before = bank.pixels.clone()
    index, flip = torch.tensor([3, 5, 0]), torch.tensor([True, False, True])
    bank.write(index, flip, bank.read(index, flip))
    assert torch.equal(bank.pixels, before)


def test_a_bank_knows_whether_maps_were_written():
    bank = MapBank(maps, 6, 4, CPU)
    index = torch.tensor([3])
    flip = torch.tensor([True])
    maps_read = bank.read(index, flip)
    bank.share(index, 1, World())
    assert not bank.changed
    bank.write(index, flip, maps_read)
    assert bank.changed


def test_rectifying_equals_eq_14_by_hand_with_flips():
    """G := 0.4 G + 0.6 Y, where Y belongs to the flipped photo."""
    bank = MapBank(maps, 6, 4, CPU)
    index, flip = torch.tensor([2]), torch.tensor([True])
    y = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 4, 4)  # left of the mirrored photo
    bank.write(index, flip, 0.4 * bank.read(index, flip) + 0.6 * y)
    want = [0.4 * 20, 0.4 * 21, 0.4 * 22, 0.4 * 23 + 0.6 * 255]  # so right of the photo
    assert bank.pixels[2, 0, 0].tolist() == [round(v) for v in want]
    assert torch.equal(bank.pixels[1], maps(1))  # others untouched


class Scenes(Ramps):
    """Ramps with masks; every second one has a modality."""

    def __getitem__(self, i):
        image = super().__getitem__(i)["image"]
        return {"image": image, "mask": maps(i), "modality": image // 2 if i % 2 else None}


class Album(Scenes):
    """Counts its photos that are read alone, and tells how large they have to be."""

    def photo(self, i, at_least):
        self.asked = at_least
        return self[i]["image"] + 1


def test_photos_alone_need_not_be_decoded_wholly():
    album = Album()
    photos = Bank(album, 4, CPU).pixels["image"]
    assert album.asked == 8
    whole = Bank(album, 4, CPU, parts=("image", "mask")).pixels["image"]
    assert torch.equal(photos, whole + 1)


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:1300, :2000]
    pixels = np.stack([x % 256, y % 256, (x + y) // 14], 2).astype(np.uint8)
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 6  # a camera that was held upright
    (tmp_path / "photos").mkdir()
    picture.save(tmp_path / "photos/a.jpg", quality=95, exif=exif)
    picture.save(tmp_path / "a.png")
    whole = load_image(tmp_path / "photos/a.jpg")
    small = load_image(tmp_path / "photos/a.jpg", at_least=320)
    assert whole.shape == (3, 2000, 1300) and small.shape == (3, 500, 325)
    difference = resize(whole, 160).float() - resize(small, 160).float()
    assert difference.abs().mean() < 0.5
    for spec in (f"{tmp_path}/photos", f"{tmp_path}/photos+shapes-test"):
        assert torch.equal(open_set(spec, masks=False).photo(0, at_least=320), small)
    for file, at_least in (("photos/a.jpg", 651), ("a.png", 320)):
        part = load_image(tmp_path / file, at_least=at_least)
        assert torch.equal(part, load_image(tmp_path / file))


# ---- Memory --------------------------------------------------------------------------------------
def test_too_large_a_bank_is_a_file_with_the_same_numbers_that_nobody_has_to_delete(tmp_path):
    bank = Bank(Ramps(), 4, CPU)
    mapped = Bank(Ramps(), 4, CPU, tmp_path / "run", budget=100)
    assert list((tmp_path / "run").iterdir()) == []
    index = torch.arange(6)
    flip = index % 2 == 0
    assert torch.equal(bank.images(index, flip), mapped.images(index, flip))
    first = MapBank(maps, 6, 4, CPU, tmp_path, budget=10)
    second = MapBank(maps, 6, 4, CPU, tmp_path, budget=10)
    first.write(index, flip, torch.ones(6, 1, 4, 4))
    assert first.pixels.min() == 255
    assert torch.equal(second.pixels, MapBank(maps, 6, 4, CPU).pixels)  # another file


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which files are mapped")
def test_a_streamed_bank_lies_on_the_disk_with_all_its_parts(tmp_path):
    def mapped_files():
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    # images of 288 bytes and masks of 96, of which each alone would fit
    bank = Bank(Scenes(), 4, CPU, tmp_path, budget=300, parts=("image", "mask"))
    assert mapped_files() == 2
    del bank
    assert mapped_files() == 0


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.bank.os.posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=f"neither into memory nor into {tmp_path} .No space left"):
        Bank(Ramps(), 4, CPU, tmp_path, budget=100)


def system(root: Path, **files: str) -> Path:
    """A tree with MemAvailable of 8 GB and the given files ("__" stands for "/")."""
    files["proc__meminfo"] = "MemTotal: 16 kB\nMemFree: 10 kB\nMemAvailable:  8000000 kB\n"
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GROUP_1 = "sys__fs__cgroup__memory__slurm__job__memory."
GROUP_2 = "sys__fs__cgroup__memory."
LIMITS = {
    "no limit": ({}, 8_192_000_000),
    "2, none": ({GROUP_2 + "max": "max\n", GROUP_2 + "current": "5000\n"}, 8_192_000_000),
    "2": (
        {
            GROUP_2 + "max": "6000000000\n",
            GROUP_2 + "current": "5000000000\n",
            GROUP_2 + "stat": "anon 1\ninactive_file 4000000000\nactive_file 7\n",
        },
        5_000_000_000,
    ),
    "1, in a group": (
        {
            "proc__self__cgroup": "9:name=systemd:/\n4:memory:/slurm/job/step_0\n0::/\n",
            GROUP_1 + "limit_in_bytes": "3000\n",
            GROUP_1 + "usage_in_bytes": "2000\n",
            GROUP_1 + "stat": "inactive_file 1\ntotal_inactive_file 500\n",
        },
        1500,
    ),
    "used up": ({GROUP_2 + "max": "10", GROUP_2 + "current": "11"}, 0),
}


@pytest.mark.parametrize("name", LIMITS)
def test_available_memory_is_what_the_system_or_the_container_leaves(name, tmp_path):
    files, available = LIMITS[name]
    assert available_memory(system(tmp_path, **files)) == available


def test_without_proc_8_gib_are_assumed(tmp_path):
    assert available_memory(tmp_path) == 8 << 30


# ---- Order and flips -----------------------------------------------------------------------------
def test_an_epoch_visits_each_sample_once_and_drops_the_last_incomplete_batch():
    order, batch = epoch_order(11, 4, seed=0, epoch=1)
    assert batch == 4 and len(order) == 8 and len(set(order.tolist())) == 8
    order, batch = epoch_order(3, 8, seed=0, epoch=1)
    assert batch == 3 and sorted(order.tolist()) == [0, 1, 2]


def draw(seed, epoch, flips="anew", world=World()):
    order, batch = epoch_order(40, 8, seed, epoch)
    return list(batches(order, batch, seed, epoch, world, flips))


def test_order_and_flips_depend_on_seed_and_epoch_alone():
    def same(a, b):
        return all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))

    assert same(draw(0, 3), draw(0, 3))
    assert not same(draw(0, 3), draw(0, 4)) and not same(draw(0, 3), draw(1, 3))


def test_processes_share_a_batch_without_overlap_and_in_order():
    for whole, first, second in zip(
        draw(0, 1), draw(0, 1, world=World(0, 2)), draw(0, 1, world=World(1, 2))
    ):
        for part in (0, 1):
            assert torch.equal(torch.cat([first[part], second[part]]), whole[part])


def test_flips_anew_change_between_epochs_and_flips_once_do_not():
    def flips(epoch, mode):
        return {
            int(i): bool(f) for index, flip in draw(0, epoch, mode) for i, f in zip(index, flip)
        }

    assert flips(1, "once") == flips(2, "once")
    assert flips(1, "anew") != flips(2, "anew")
    drawn = [f for epoch in range(25) for f in flips(epoch, "anew").values()]
    assert 0.45 < sum(drawn) / len(drawn) < 0.55


@pytest.mark.parametrize("rank", [0, 1])
def test_sharing_keeps_own_maps_and_takes_the_others(rank, monkeypatch):
    """Batches of 4 over two processes: positions 0, 1 belong to rank 0 and 2, 3 to rank 1."""
    bank, other = (MapBank(maps, 6, 4, CPU) for _ in range(2))
    order = torch.tensor([5, 4, 3, 2])
    for owner, owned in ((0, [5, 4]), (1, [3, 2])):
        changed = bank if owner == rank else other
        changed.write(
            torch.tensor(owned),
            torch.zeros(2, dtype=torch.bool),
            torch.full((2, 1, 4, 4), 0.2 + 0.2 * owner),
        )
    wires = SimpleNamespace(calls=[])

    def all_reduce(mine):
        theirs = other.pixels.clone()
        owner = torch.tensor([0, 0, 1, 1, 0, 0])
        theirs[owner != 1 - rank] = 0
        mine += theirs
        wires.calls.append(1)

    monkeypatch.setattr("common.bank.dist.all_reduce", all_reduce)
    bank.changed = False
    bank.share(order, 4, World(rank, 2))
    assert bank.changed
    assert wires.calls and bank.pixels[:, 0, 0, 0].tolist() == [0, 10, 102, 102, 51, 51]


def test_masks_and_modalities_follow_their_image_through_the_flip():
    bank = Bank(Scenes(), 4, CPU, parts=("image", "mask", "modality"))
    index, flip = torch.tensor([3, 2]), torch.tensor([True, False])
    assert (bank.masks(index, flip)[:, 0, 0] * 255).round().tolist() == [
        [33, 32, 31, 30],
        [20, 21, 22, 23],
    ]
    modality = (bank.read("modality", index, flip)[:, 0, 0] * 255).round().tolist()
    assert modality == [[61, 61, 60, 60], [0, 0, 0, 0]]
    assert bank.has["modality"].tolist() == [False, True] * 3 and bank.has["mask"].all()

"""Damaged files of every format that the project reads: each is read, or refused in one sentence.

Several hundred files are damaged at random, always the same ones: bits flipped, cut off, zeros
written over, copied to another place; or, in JSON and checkpoints, a value replaced by one of
another type. A reader may give what it still understands, or raise `UserError`; any other exception
fails. Where it can be told from the file that something is missing, it must not be accepted.
"""

import contextlib
import copy
import dataclasses
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import curves, datasets, images, published, run, runtime
from common.backbones import read_weights
from common.bank import MapBank
from common.runtime import UserError
from data.captions import read_captions, read_vocabulary
from data.panoptic import Panoptic, encode_ids
from data.relabel import Choices, read_known


# ---- Damage --------------------------------------------------------------------------------------
def flip(raw: bytearray, dice: random.Random) -> bytearray:
    """One, four or forty bits are turned."""
    for _ in range(dice.choice([1, 4, 40])):
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
    return raw


def cut(raw: bytearray, dice: random.Random) -> bytearray:
    """The end is missing, at least a quarter of the file, or all of it."""
    return raw[: dice.choice([0, dice.randrange(len(raw) * 3 // 4)])]


def zero(raw: bytearray, dice: random.Random) -> bytearray:
    """A part is overwritten with zeros, as by a full disk."""
    start = dice.randrange(len(raw))
    part = raw[start : start + dice.choice([4, 64, 512])]
    raw[start : start + len(part)] = bytes(len(part))
    return raw


def splice(raw: bytearray, dice: random.Random) -> bytearray:
    """A part occurs again in another place."""
    start = dice.randrange(len(raw))
    at = dice.randrange(len(raw))
    raw[at:at] = raw[start : start + dice.choice([1, 16, 256])]
    return raw


def drop(raw: bytearray, dice: random.Random) -> bytearray:
    """A part is missing."""
    start = dice.randrange(len(raw))
    del raw[start : start + dice.choice([1, 16, 256])]
    return raw


DAMAGE = (flip, cut, zero, splice, drop)
OTHERS = (
    None, True, -1, 0, 3, 0.5, float("nan"), float("inf"), 1 << 70, "", "x", "../x", "\0", "\udcff",
    [], [[]], ["x"], {}, {"x": {}},
)  # fmt: skip


def places(tree) -> list[tuple]:
    """All (container, key) in nested dicts and lists."""
    if isinstance(tree, dict):
        inside = list(tree.items())
    elif isinstance(tree, list):
        inside = list(enumerate(tree))
    else:
        return []
    found = [(tree, key) for key, _ in inside]
    for _, value in inside:
        found += places(value)
    return found


def replace(tree, dice: random.Random):
    """A copy of `tree` in which one value is missing or is another one."""
    tree = copy.deepcopy(tree)
    container, key = dice.choice(places(tree))
    if dice.random() < 0.2:
        del container[key]
    else:
        container[key] = dice.choice(OTHERS)
    return tree


# ---- Formats -------------------------------------------------------------------------------------
@dataclasses.dataclass
class Format:
    """make(folder): write whole files and return the one to damage. read(path): as a script does.

    lossless: whether every cut can be seen. load, save: of the tree of values inside, if any.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    lossless: bool = True
    load: Callable[[bytes], object] | None = None
    save: Callable[[object], bytes] | None = None


def picture(mode: str, suffix: str, **options) -> Callable[[Path], Path]:
    """Makes a picture of 40 x 30 with a bright square."""

    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 90, (30, 40), np.uint8)
        pixels[5:20, 10:30] += 160
        image = Image.fromarray(pixels)
        if mode == "P":
            image = Image.fromarray((pixels > 128).astype(np.uint8), "L")
            image.putpalette([0, 0, 0, 255, 0, 0, *[0] * 762])
        elif mode == "I;16":
            image = Image.fromarray(pixels.astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        image.save(folder / f"a{suffix}", **options)
        return folder / f"a{suffix}"

    return make


def mask(folder: Path) -> Path:
    """A black and white PNG."""
    pixels = np.zeros((30, 40), np.uint8)
    pixels[5:20, 10:30] = 255
    Image.fromarray(pixels).save(folder / "a.png")
    return folder / "a.png"


def written(name: str, text: str) -> Callable[[Path], Path]:
    """Makes a text file."""

    def make(folder: Path) -> Path:
        (folder / name).write_text(text, "utf-8")
        return folder / name

    return make


def stems(folder: Path) -> Path:
    """Ten photos, and a list of five of them."""
    for number in range(10):
        Image.new("L", (8, 8)).save(folder / f"scene_{number}.png")
    return written("list.txt", "# five\n" + "".join(f"scene_{i}.png\n" for i in range(5)))(folder)


CAPTIONS = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [{"image_id": 1, "caption": "A cat."}, {"image_id": 2, "caption": "Two dogs."}],
}
TOKENS = "a.jpg#0\tA cat .\na.jpg#1\tThe cat .\nb.jpg#0\tTwo dogs .\n"
TABLE = 'image,caption\na.jpg,A cat.\nb.jpg,"Two dogs, running."\n'
WORDS = "".join(f"\u2581word{i}\t{-i}\n" for i in range(50))
LINES = [{"epoch": i, "loss": 1 / i, "images_per_s": 9.0, "memory_gb": 0.0} for i in range(1, 9)]
LOG = "".join(json.dumps(line) + "\n" for line in LINES)


def log_tree(raw: bytes) -> list:
    """The lines of a log.jsonl."""
    return [json.loads(line) for line in raw.decode().split("\n") if line]


def log_text(lines: list) -> bytes:
    """A log.jsonl."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def network() -> nn.Sequential:
    """A small network, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))


def pickled(content: dict) -> bytes:
    """What torch.save writes."""
    memory = io.BytesIO()
    torch.save(content, memory)
    return memory.getvalue()


def unpickled(raw: bytes) -> dict:
    """What torch.save has written."""
    return torch.load(io.BytesIO(raw), weights_only=True)


def weights(folder: Path) -> Path:
    """A weight file of another project."""
    state = {f"module.{key}": value for key, value in network().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "w.pth")
    return folder / "w.pth"


def read_foreign(path: Path) -> None:
    """As a script reads a backbone's weights."""
    runtime.load_state(network(), read_weights(path), path)


def safetensors(folder: Path) -> Path:
    """A .safetensors file with all that `network` needs."""
    header = {"__metadata__": {"format": "pt"}}
    body = b""
    for key, value in network().state_dict().items():
        raw = value.numpy().tobytes()
        header[key] = {
            "dtype": "I64" if value.dtype == torch.int64 else "F32",
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    path = folder / "w.safetensors"
    path.write_bytes(joined([header, body]))
    return path


def parted(raw: bytes) -> list:
    """[header, numbers] of a .safetensors file."""
    start = 8 + int.from_bytes(raw[:8], "little")
    return [json.loads(raw[8:start]), raw[start:]]


def joined(parts: list) -> bytes:
    """A .safetensors file of [header, numbers]; of nothing else if a damage took one of them."""
    body = parts.pop() if parts and isinstance(parts[-1], bytes) else b""
    text = json.dumps(parts[0] if parts else None).encode()
    return len(text).to_bytes(8, "little") + text + body


def read_safetensors(path: Path) -> None:
    """As a script reads an encoder's weights."""
    state = published.mit_state(published.read_state(path))
    runtime.load_state(network(), state, path, published.MIT_HEADS)


class Photos:
    """Stands for a bank of four photos."""

    names = list("abcd")
    file_sizes = [1, 2, 3, 4]

    def __len__(self):
        return 4


def stage(folder: Path, resume: bool) -> run.Run:
    """A training stage in `folder`."""
    values = {field.name: None for field in dataclasses.fields(run.Settings)}
    values |= {"method": "a2s", "out": folder, "resume": resume, "world": runtime.World()}
    values |= {"flags": {"size": 8, "lr": 0.1, "drop": [0.3, 0.4]}, "device": torch.device("cpu")}
    net = network()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    labels = MapBank(lambda i: torch.zeros(1, 8, 8, dtype=torch.uint8), 4, 8, torch.device("cpu"))
    schedule = run.Schedule(5, 0.1)
    return run.Run(run.Settings(**values), 1, Photos(), net, optimiser, schedule, labels)


def checkpoint(folder: Path) -> Path:
    """last.pt after an epoch, and its labels beside it."""
    training = stage(folder, resume=False)
    training.epoch = 1
    training.raw(torch.rand(1, 3, 8, 8)).sum().backward()
    training.optimiser.step()
    training.labels.changed = True
    training.save()
    return folder / "last.pt"


def go_on(path: Path) -> None:
    """Resume from a last.pt, and train a step."""
    training = stage(path.parent, resume=True)
    next(training.epochs())
    training.raw(torch.rand(2, 3, 8, 8)).sum().backward()
    training.optimiser.step()


def labels(folder: Path) -> Path:
    """The labels beside a last.pt."""
    checkpoint(folder)
    return next(folder.glob("labels_*.pt"))


IDS = np.array([[5, 5, 0, 0], [5, 70000, 70000, 0], [70, 70, 70000, 0]])
SEGMENTS = [
    {"id": 70000, "category_id": 17, "iscrowd": 1, "area": 3, "bbox": [1, 1, 2, 2]},
    {"id": 5, "category_id": 187, "iscrowd": 0, "area": 3, "bbox": [0, 0, 2, 2]},
    {"id": 70, "category_id": 17, "iscrowd": 0, "area": 2, "bbox": [0, 2, 2, 1]},
]
PANOPTIC = {
    "categories": [
        {"id": 17, "name": "cat", "isthing": 1},
        {"id": 187, "name": "sky", "isthing": 0},
    ],
    "images": [{"id": 9, "file_name": "9.jpg", "height": 3, "width": 4}],
    "annotations": [{"image_id": 9, "file_name": "9.png", "segments_info": SEGMENTS}],
}


def panoptic(damaged: str) -> Callable[[Path], Path]:
    """Makes COCO's layout of one photo; `damaged` is the file to damage."""

    def make(folder: Path) -> Path:
        for below in ("val", "annotations/panoptic_val"):
            (folder / below).mkdir(parents=True)
        (folder / "annotations/panoptic_val.json").write_text(json.dumps(PANOPTIC))
        Image.new("RGB", (4, 3)).save(folder / "val/9.jpg")
        Image.fromarray(encode_ids(IDS)).save(folder / "annotations/panoptic_val/9.png")
        return folder / damaged

    return make


def read_panoptic(path: Path) -> None:
    """Every scene and a mask of all its segments."""
    while not (path / "val").is_dir():
        path = path.parent
    scenes = Panoptic(path, "val")
    for number in range(len(scenes)):
        ids = [segment.id for segment in scenes[number]["segments"]]
        assert set(np.unique(scenes.mask(number, ids))) <= {0, 255}


def choice(folder: Path) -> Path:
    """Which segments of the photo were chosen by hand."""
    panoptic("")(folder)
    path = folder / "sod/choices/val/9.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"chosen": [5, 70], "skipped": False, "by": "hand"}))
    return path


def salient(folder: Path) -> Path:
    """The salient segments that are known."""
    panoptic("")(folder)
    return written("annotations/salient_val.json", json.dumps({"9": [5, 70]}))(folder)


def in_json(value) -> bytes:
    """JSON text."""
    return json.dumps(value).encode()


FORMATS = {
    "photo.png": Format(picture("RGB", ".png"), images.load_image),
    "photo.jpg": Format(picture("RGB", ".jpg"), images.load_image),
    "photo.tif": Format(picture("RGB", ".tif"), images.load_image),
    "packed.tif": Format(picture("RGB", ".tif", compression="tiff_lzw"), images.load_image),
    "photo.bmp": Format(picture("RGB", ".bmp"), images.load_image),
    "photo.webp": Format(picture("RGB", ".webp"), images.load_image),
    "photo.gif": Format(picture("RGB", ".gif"), images.load_image),
    "16 bits.png": Format(picture("I;16", ".png"), images.load_image),
    "depth.png": Format(picture("I;16", ".png"), images.load_modality),
    "cut-out.png": Format(picture("RGBA", ".png"), images.load_map),
    "mask.png": Format(mask, images.load_mask),
    "palette.png": Format(picture("P", ".png"), images.load_mask),
    "mask.jpg": Format(picture("L", ".jpg"), images.load_mask),
    "map.png": Format(picture("LA", ".png"), images.load_map),
    "list.txt": Format(
        stems, lambda path: datasets.open_set(f"{path.parent}@{path}", masks=False), False
    ),
    "captions.json": Format(
        written("captions_a.json", json.dumps(CAPTIONS)),
        lambda path: read_captions(path.parent),
        load=json.loads,
        save=in_json,
    ),
    "a.token.txt": Format(
        written("a.token.txt", TOKENS), lambda path: read_captions(path.parent), False
    ),
    "captions.txt": Format(
        written("captions.txt", TABLE), lambda path: read_captions(path.parent), False
    ),
    "words.vocab": Format(
        written("words.vocab", WORDS), lambda path: read_vocabulary(path, 50), False
    ),
    "log.jsonl": Format(
        written("log.jsonl", LOG),
        lambda path: curves.series_of(curves.read_log(path)),
        False,
        log_tree,
        log_text,
    ),
    "last.pt": Format(checkpoint, go_on, load=unpickled, save=pickled),
    "labels.pt": Format(labels, go_on, load=unpickled, save=pickled),
    "weights.pth": Format(weights, read_foreign, load=unpickled, save=pickled),
    "weights.safetensors": Format(safetensors, read_safetensors, load=parted, save=joined),
    "panoptic.json": Format(
        panoptic("annotations/panoptic_val.json"), read_panoptic, load=json.loads, save=in_json
    ),
    "choice.json": Format(
        choice,
        lambda path: Choices(Panoptic(path.parents[3], "val")),
        load=json.loads,
        save=in_json,
    ),
    "salient.json": Format(
        salient,
        lambda path: read_known(Panoptic(path.parents[1], "val")),
        load=json.loads,
        save=in_json,
    ),
    "panoptic.png": Format(panoptic("annotations/panoptic_val/9.png"), read_panoptic),
    "panoptic.jpg": Format(panoptic("val/9.jpg"), read_panoptic),
}
TREES = [name for name, kind in FORMATS.items() if kind.load]


# ---- The tests -----------------------------------------------------------------------------------
def outcome(kind: Format, path: Path, raw: bytes) -> str:
    """What reading `raw` in the place of `path` does: "read", "refused", or what is wrong."""
    path.write_bytes(raw)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            kind.read(path)
    except UserError as error:
        if str(path.parent) not in str(error) or "\n" in str(error):
            return f"does not name the file in one line: {error}"
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def read_damaged(name: str, folder: Path, count: int) -> list[str]:
    """What is wrong with the reading of `count` files with damaged bytes."""
    kind = FORMATS[name]
    path = kind.make(folder)
    whole = path.read_bytes()
    wrong = []
    for number in range(count):
        dice = random.Random(f"{name} {number}")
        damage = DAMAGE[number % len(DAMAGE)]
        found = outcome(kind, path, bytes(damage(bytearray(whole), dice)))
        if damage is cut and kind.lossless and found == "read":
            found = "was accepted"
        if found not in ("read", "refused"):
            wrong.append(f"{name}, {damage.__name__} {number}: {found}")
    return wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_bytes_are_read_or_refused_in_a_sentence(name, tmp_path):
    assert read_damaged(name, tmp_path, 25) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TREES)
def test_values_of_another_type_are_read_or_refused_in_a_sentence(name, tmp_path):
    kind = FORMATS[name]
    path = kind.make(tmp_path)
    tree = kind.load(path.read_bytes())
    wrong = []
    for number in range(60):
        changed = replace(tree, random.Random(f"{name} {number}"))
        found = outcome(kind, path, kind.save(changed))
        if found not in ("read", "refused"):
            wrong.append(f"{name}, value {number}: {found}")
    assert wrong == []


@pytest.mark.parametrize("name", FORMATS)
def test_whole_files_are_read(name, tmp_path):
    kind = FORMATS[name]
    path = kind.make(tmp_path)
    assert outcome(kind, path, path.read_bytes()) == "read"
    if kind.load:
        assert outcome(kind, path, kind.save(kind.load(path.read_bytes()))) == "read"


def test_the_test_sees_other_exceptions_and_files_that_are_wrongly_accepted(tmp_path, monkeypatch):
    kind = Format(FORMATS["photo.png"].make, lambda path: path.read_text("utf-8"))
    monkeypatch.setitem(FORMATS, "text", kind)
    assert any("UnicodeDecodeError" in line for line in read_damaged("text", tmp_path, 25))
    kind.read = lambda path: None
    assert any("was accepted" in line for line in read_damaged("text", tmp_path, 25))


# ---- Headers that lie ----------------------------------------------------------------------------
def entry(begin: int, end: int, shape=(2,), dtype: str = "F32") -> dict:
    """What the header of a .safetensors file tells of a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


LIES = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "the same place": ({"a": entry(0, 8), "b": entry(0, 8)}, 8),
    "a gap": ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
    "a gap at the start": ({"a": entry(4, 12)}, 12),
    "too small for the shape": ({"a": entry(0, 4)}, 4),
    "too large for the shape": ({"a": entry(0, 12)}, 12),
    "beyond the end": ({"a": entry(0, 8)}, 4),
    "before the end": ({"a": entry(0, 8)}, 12),
    "negative": ({"a": entry(-8, 0)}, 8),
    "backwards": ({"a": entry(8, 0)}, 8),
    "shape negative": ({"a": entry(0, 8, (-1, -2))}, 8),
    "shape enormous": ({"a": entry(0, 8, (1 << 62, 4))}, 8),
    "shape no numbers": ({"a": entry(0, 8, ("2",))}, 8),
    "shape of fractions": ({"a": entry(0, 8, (2.0,))}, 8),
    "unknown numbers": ({"a": entry(0, 2, dtype="F8_E4M3")}, 2),
    "integers": ({"a": entry(0, 16, dtype="I64")}, 16),
    "nested": ({"a": {"b": entry(0, 8)}}, 8),
    "a list": ([entry(0, 8)], 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, 8),
}


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie_are_refused(name, tmp_path):
    header, size = LIES[name]
    path = tmp_path / "w.safetensors"
    path.write_bytes(joined([header, bytes(size)]))
    with pytest.raises(UserError, match=str(path)) as error:
        published.read_state(path)
    assert ("unknown type F8_E4M3" in str(error.value)) == (name == "unknown numbers")


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 64) - 1])
def test_a_wrong_length_of_the_header_is_refused(length, tmp_path):
    path = tmp_path / "w.safetensors"
    raw = joined([{"a": entry(0, 8)}, bytes(8)])
    path.write_bytes(length.to_bytes(8, "little") + raw[8:])
    reason = "it is cut off" if length > 1 << 16 else "Expecting"
    with pytest.raises(UserError, match=rf"{path} is not a readable .safetensors file \({reason}"):
        published.read_state(path)


def test_an_honest_header_in_any_order_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    numbers = np.array([1, 2, 3], np.float32).tobytes() + np.array([7], np.int64).tobytes()
    header = {"num_batches_tracked": entry(12, 20, (), "I64"), "b": entry(4, 12, (1, 2))}
    header["a"] = entry(0, 4, (1,))
    path.write_bytes(joined([header, numbers]))
    state = published.read_state(path)
    assert {key: value.tolist() for key, value in state.items()} == {
        "a": [1.0],
        "b": [[2.0, 3.0]],
        "num_batches_tracked": 7,
    }

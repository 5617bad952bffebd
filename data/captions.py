"""Captions as data: files, words, vocabulary, tokens, scores, pictures of each word's attention.

    captions = read_captions(folder)           # {stem: captions of this photo}
    words = vocabulary(captions)               # the most frequent, 10,000 with three special ones
    tokens, counts = tokenise(captions, words)  # [N, most captions, 30] and captions per photo [N]
    tokens = mirrored(words)[tokens]           # the captions of the mirrored photos
    said, maps = spoken(tokens, maps, words)   # the words that a captioner wrote, a map of each

Tokens are numbers of words: PAD after the end, START, the words, END. A word that is not in the
vocabulary is left out; a caption with more than 28 words is cut and has no end.
"""

import csv
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from common.runtime import UserError, World, save_json, say

PAD, START, END = 0, 1, 2
LENGTH = 30

# What the readers below raise where a file of captions has another form than they expect.
FORM_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
FORM_ERRORS += (csv.Error, IsADirectoryError)


# ---- Files of captions ---------------------------------------------------------------------------
def read_captions(folder: Path) -> dict[str, list[str]]:
    """All captions by stem and by path, from the usual files in `folder` or one level below.

    captions_*.json (COCO), Flickr8k.token.txt (name.jpg#0, tab, text), captions.txt (csv with the
    columns image,caption). Names are in Unicode's composed form (NFC).
    Raises `UserError` for a file that cannot be read or has another form.
    """
    readers = {"captions*.json": coco_rows, "*.token.txt": flickr_rows, "captions.txt": csv_rows}
    captions = defaultdict(list)
    for pattern, read_rows in readers.items():
        for path in sorted((*folder.glob(pattern), *folder.glob(f"*/{pattern}"))):
            try:
                for name, caption in read_rows(path):
                    photo = Path(unicodedata.normalize("NFC", name))
                    for key in {photo.stem, photo.with_suffix("").as_posix()}:
                        captions[key].append(caption.strip())
            except FORM_ERRORS as error:
                what = f"{type(error).__name__}: {error}"  # not repr, which may hold the whole file
                raise UserError(
                    f"{path} does not hold captions in a known form ({what[:200]}); fetch it again "
                    "or rename it"
                ) from None
            except OSError as error:
                raise UserError(f"cannot read the captions {path} ({error.strerror})") from None
    return captions


def coco_rows(path: Path) -> Iterable[tuple[str, str]]:
    """(name of a photo, caption) of every annotation in a JSON of COCO."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    files = {image["id"]: image["file_name"] for image in content["images"]}
    if len(files) < len(content["images"]):
        raise ValueError("two images have one id")
    return [(files[note["image_id"]], note["caption"]) for note in content["annotations"]]


def flickr_rows(path: Path) -> Iterable[tuple[str, str]]:
    """(name of a photo, caption) of every line 'name.jpg#0<tab>caption'."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [re.split(r"#\d+\t", line, maxsplit=1) for line in lines if line]


def csv_rows(path: Path) -> Iterable[tuple[str, str]]:
    """(name of a photo, caption) of every row; a caption may hold commas that are not quoted."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    return [(row["image"], ",".join([row["caption"], *row.get(None, [])])) for row in rows]


# ---- Words and tokens ----------------------------------------------------------------------------
def split(caption: str) -> list[str]:
    """'A man, sitting.' -> ['a', 'man', 'sitting']"""
    return re.findall(r"[\w'-]*\w", caption.lower())


def vocabulary(captions: Sequence[Sequence[str]], size: int = 10_000) -> list[str]:
    """The most frequent words of the captions of all photos, `size` with the special tokens."""
    counts = Counter(word for texts in captions for text in texts for word in split(text))
    most = sorted(counts, key=lambda word: (-counts[word], word))
    return ["[PAD]", "[START]", "[END]", *most[: size - 3]]


def numbers(count: int) -> list[str]:
    """A stand-in vocabulary if VirTex's word list is not given: word i is printed as "i"."""
    return [str(i) for i in range(count)]


def read_vocabulary(path: str | Path, count: int) -> list[str]:
    """The first column of a file of `count` lines (SentencePiece's .vocab); raises `UserError`."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the vocabulary {path} ({error})") from None
    # A word may hold any other character at which splitlines() would cut.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if len(lines) != count:
        raise UserError(
            f"{path} has {len(lines)} lines, but the captioner knows {count} words; "
            "give the vocabulary that it was trained with"
        )
    return [line.split("\t")[0] for line in lines]


def whole(words: list[str]) -> bool:
    """Whether these are whole words, made by `vocabulary`, not SentencePiece's pieces."""
    return words[START] == "[START]"


def tokenise(captions: Sequence[Sequence[str]], words: list[str]) -> tuple[Tensor, Tensor]:
    """Captions of N photos -> tokens [N, most captions, 30], number of captions [N]."""
    number = {word: i for i, word in enumerate(words)}
    tokens = torch.zeros(len(captions), max(map(len, captions)), LENGTH, dtype=torch.long)
    for i, texts in enumerate(captions):
        for k, text in enumerate(texts):
            known = [number[word] for word in split(text) if word in number]
            row = [START, *known, END][:LENGTH]
            tokens[i, k, : len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(texts) for texts in captions])


def spoken(tokens: Tensor, maps: Tensor, words: list[str]) -> tuple[list[str], Tensor]:
    """Tokens [T] and their maps [T, h, w] -> the words among them, and the map of each.

    In SentencePiece's vocabulary "▁" begins a word: its pieces are joined, and their maps added.
    """
    pieces = any(word.startswith("▁") for word in words)
    said = []
    found = []
    for token, m in zip(tokens.tolist(), maps):
        if token <= END:
            continue
        word = words[token]
        if pieces and said and not word.startswith("▁"):
            said[-1] += word
            found[-1] = found[-1] + m
        else:
            said.append(word.removeprefix("▁"))
            found.append(m)
    return said, torch.stack(found) if found else maps[:0]


def mirrored(words: list[str]) -> Tensor:
    """What each token is in the caption of the mirrored photo: left is right. [V]"""
    number = {word: i for i, word in enumerate(words)}
    swap = {"left": "right", "right": "left"}
    return torch.tensor([number.get(swap.get(word, word), i) for i, word in enumerate(words)])


class Collector(Dataset):
    """A data set that keeps the captions of all samples that are read from it, in `captions`."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.names = dataset.names
        self.title = dataset.title
        self.captions = [[] for _ in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        sample = self.dataset[index]
        self.captions[index] = sample["caption"] or []
        return sample


# ---- Scores --------------------------------------------------------------------------------------
class Scores:
    """The captions written for a data set, by name in `texts`; `means` explains its numbers."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.sums = Counter()
        self.texts = {}

    def add(self, sample: dict, said: list[str], maps: Tensor) -> None:
        """The words written for a sample, and the map of each [words, h, w]."""
        self.texts[sample["name"]] = said
        if sample["caption"]:
            known = {word for text in sample["caption"] for word in split(text)}
            self.sums.update(words=len(said), said=sum(word in known for word in said))
        if hasattr(self.dataset, "objects"):
            objects = self.dataset.objects(self.dataset.names.index(sample["name"]))
            for j, word in enumerate(said):
                before = said[max(j - 1, 0)]
                self.add_word(word, before, maps[j], objects)

    def add_word(self, word: str, before: str, m: Tensor, objects: list[dict]) -> None:
        """Compare a word, the one before it and the map with the objects of a built-in scene."""
        kinds = [kind for kind in self.dataset.classes if word in (kind, kind + "s", kind + "es")]
        if not kinds:
            return
        self.sums.update(named=1)
        same = [o["mask"] for o in objects if o["class"] == kinds[0] and o["colour"] == before]
        if same:
            mask = torch.from_numpy(sum(same) > 0).to(m)
            heat = F.interpolate(m[None, None], mask.shape, mode="bilinear", align_corners=False)
            heat = heat[0, 0]
            inside = (heat * mask).sum() / heat.sum().clamp(min=1e-9)
            self.sums.update(true=1, area=mask.mean().item(), inside=inside.item())

    def add_next(self, predicted: Tensor, tokens: Tensor) -> None:
        """What was predicted to follow each of the tokens of captions, both [B, T]."""
        right = (predicted[:, :-1] == tokens[:, 1:])[tokens[:, 1:] != PAD]
        self.sums.update(next=int(right.sum()), tokens=len(right))

    def merge(self, world: World) -> None:
        """Add up the sums and captions of all processes."""
        self.sums = sum(world.gather(self.sums), Counter())
        texts = {}
        for part in world.gather(self.texts):
            texts |= part
        self.texts = texts

    def means(self) -> dict[str, float]:
        """Those of the following that the data set allows.

        next    share of the words of photos' captions that were predicted from those before
        said    share of the written words that are in one of the photo's captions
        true    share of the class names, written for built-in scenes, for which an object of this
                class has the colour named before
        inside  attention of the true names within the masks of these objects
        area    the masks' share of the picture, which is what `inside` would be by chance
        """
        parts = {"next": "tokens", "said": "words", "true": "named"}
        parts |= {"inside": "true", "area": "true"}
        return {
            part: self.sums[part] / self.sums[of] for part, of in parts.items() if self.sums[of]
        }

    def report(self, folder: Path) -> None:
        """Print the means and five captions; write <folder>/captions-<set>.json."""
        means = self.means()
        shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        say(f"captions of {self.dataset.title}: {shown}")
        for name in list(self.texts)[:5]:
            say(f"    {name}: {' '.join(self.texts[name])}")
        content = {"scores": means, "captions": self.texts}
        save_json(folder / f"captions-{self.dataset.title}.json", content)


# ---- Pictures ------------------------------------------------------------------------------------
def draw_words(pictures: list[Tensor], said: list[str], maps: Tensor, side: int = 160) -> Tensor:
    """Pictures [C, S, S] in [0, 1] in a row, then the first again for each word, lit by its map.

    maps: [words, h, w]. Returns uint8 [side + 16, side * cells, 3].
    """
    cells = [TF.resize(p.cpu(), [side, side]).expand(3, -1, -1) for p in pictures]
    for m in maps.cpu().float():
        m = m / m.max().clamp(min=1e-9)
        heat = F.interpolate(m[None, None], (side, side), mode="bilinear", align_corners=False)[0]
        cells.append(cells[0] * (0.2 + 0.8 * heat))
    strip = F.pad(torch.cat(cells, 2), (0, 0, 0, 16), value=1)
    picture = Image.fromarray((strip * 255 + 0.5).byte().permute(1, 2, 0).numpy())

    # Below each bright picture stands its word.
    for j, word in enumerate(said, len(pictures)):
        ImageDraw.Draw(picture).text((side * j + 4, side + 2), word, fill=(0, 0, 0))
    return TF.pil_to_tensor(picture).permute(1, 2, 0)

"""Data sets: registered public sets, any folder, joint sets, lists of stems, and the checker.

    open_set("ECSSD")                          a registered set, looked for below data/
    open_set("photos/holiday", masks=False)    any folder of pictures
    open_set("NJUD+VT821")                     a joint set; its names are "NJUD/…" and "VT821/…"
    open_set("ECSSD@mine.txt")                 only the stems in a text file, one per line
    open_set("shapes")                         the built-in synthetic set (common/shapes.py)
    python -m common.datasets [--data-root DIR] [--deep] [SET ...]    what is there, is it whole?

Every set is a `torch.utils.data.Dataset` with `names` and `title`; a sample is a plain dict:

    image     uint8 [3, H, W]             mask      uint8 [1, H, W], 0 or 255, or None
    modality  uint8 [3, H, W] or None     caption   list of all captions (str) or None
    name      stem, or "folder/stem"      size      (H, W)

Pairing. The innermost folder with a name from `ROLES` tells what a file is; if no folder is named
for photos, the files without a role are the photos. A file's name is the rest of its path,
without the suffix; files of one name belong together, in whatever order they lie. Where stem.jpg
and stem.png lie side by side and there are no other masks (MSRA-B), the png is the mask. So the
original archives, their common re-packs and your own folders open by the same rules.
"""
import argparse
import csv
import difflib
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from common.runtime import UserError, cli, parallel_map, progress

SPLITS = Path(__file__).parent.parent / "data" / "splits"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
MODALITIES = ("depth", "thermal", "flow")
ROLES = {word: role for role, words in {  # spelt as plain() spells
    "image": "image images img imgs rgb jpegimages",
    "mask": "mask masks gt gts label labels groundtruth groundtruthmask segmentation segmentations "
            "annotation annotations pixelwisegtnewpng gtobjectlevel",
    "depth": "depth depths", "thermal": "t thermal", "flow": "flow optical opticalflow",
}.items() for word in words.split()}


# ---- Registry --------------------------------------------------------------------------------
class Origin(NamedTuple):
    """Where sets come from. Their layouts are in data/README.md."""
    source: str
    cite: str
    terms: str = "none stated; cite the paper"


@dataclass(frozen=True)
class Entry:
    """One registered set.

    places: candidates below the data root, tried in turn: FOLDER; FOLDER/PART, what lies below a
            sub-folder whose name starts with PART; FOLDER@SPLIT, names from data/splits/ORIGIN.txt;
            or registered names joined with '+'.
    counts: accepted numbers of images; empty where no reliable number is known.
    needs:  what every image must come with.
    """
    origin: str
    places: str
    counts: tuple[int, ...] = ()
    needs: str = "mask"
    sparse: bool = False  # only some frames are annotated: leave out the others
    step: int = 1         # keep every step-th frame of DAVSOD's clips, whose names hold "select"


RIGHTS = "all rights reserved by the authors; cite the paper"
DALIAN = "http://saliencydetection.net/"
FAN, LI = "https://github.com/DengPingFan/", "https://chenglongli.cn/Datasets-and-benchmark-code/"
ORIGINS = {
    "MSRA-B": Origin("https://mmcheng.net/msra10k/", "Jiang et al. (DRFI), CVPR 2013"),
    "ECSSD": Origin("https://www.cse.cuhk.edu.hk/leojia/projects/hsaliency/dataset.html",
                    "Yan et al., CVPR 2013"),
    "PASCAL-S": Origin("http://cbs.ic.gatech.edu/salobj/", "Li et al., CVPR 2014"),
    "HKU-IS": Origin("https://i.cs.hku.hk/~gbli/deep_saliency.html", "Li and Yu, CVPR 2015"),
    "DUTS": Origin(DALIAN + "duts/", "Wang et al., CVPR 2017", RIGHTS),
    "DUT-OMRON": Origin(DALIAN + "dut-omron/", "Yang et al., CVPR 2013", RIGHTS),
    "NJUD": Origin(FAN + "D3NetBenchmark", "Ju et al., ICIP 2014"),
    "NLPR": Origin(FAN + "D3NetBenchmark", "Peng et al., ECCV 2014"),
    "DUT-RGBD": Origin(FAN + "D3NetBenchmark", "Piao et al., ICCV 2019"),
    "RGBD135": Origin(FAN + "D3NetBenchmark", "Cheng et al., ICIMCS 2014"),
    "SIP": Origin(FAN + "D3NetBenchmark", "Fan et al., TNNLS 2020"),
    "VT5000": Origin(LI, "Tu et al., arXiv 2007.03262"),
    "VT1000": Origin(LI, "Tu et al., TMM 2020"),
    "VT821": Origin(LI, "Wang et al., arXiv 1701.02829"),
    "DAVIS": Origin("https://davischallenge.org/davis2016/code.html",
                    "Perazzi et al., CVPR 2016", "BSD licence"),
    "DAVSOD": Origin(FAN + "DAVSOD", "Fan et al., CVPR 2019"),
    "SegV2": Origin(FAN + "DAVSOD", "Li et al., ICCV 2013"),
    "FBMS": Origin(FAN + "DAVSOD", "Ochs et al., TPAMI 2014"),
    "ORSSD": Origin("https://github.com/rmcong/ORSSD-dataset", "Li et al., TGRS 2019"),
    "EORSSD": Origin("https://github.com/rmcong/EORSSD-dataset", "Zhang et al., TIP 2021"),
    "ORSI-4199": Origin("https://github.com/wchao1213/ORSI-SOD", "Tu et al., TGRS 2022"),
    "COCO": Origin("http://images.cocodataset.org/zips/train2017.zip",
                   "Lin et al., ECCV 2014; Chen et al., arXiv 1504.00325",
                   "captions CC BY 4.0; the photos keep their Flickr licences"),
    "Flickr8k": Origin("https://github.com/jbrownlee/Datasets/releases", "Hodosh et al., JAIR 2013",
                       "non-commercial research and education"),
}
REGISTRY = {
    "MSRA-B": Entry("MSRA-B", "MSB-TR MSRA-B@train,val", (3000,)),
    "MSRA-B-train": Entry("MSRA-B", "MSRA-B@train", (2500,)),
    "MSRA-B-val": Entry("MSRA-B", "MSRA-B@val", (500,)),
    "MSRA-B-test": Entry("MSRA-B", "MSB-TE MSRA-B@test", (2000,)),
    "ECSSD": Entry("ECSSD", "ECSSD", (1000,)),
    "PASCAL-S": Entry("PASCAL-S", "PASCAL-S/pascal PASCAL-S", (850,)),
    "HKU-IS": Entry("HKU-IS", "HKU-IS", (4447,)),
    "HKU-IS-test": Entry("HKU-IS", "HKU-IS-test HKU-IS-TE", (1447,)),
    "DUTS-TR": Entry("DUTS", "DUTS-TR DUTS/DUTS-TR", (10553,)),
    "DUTS-TE": Entry("DUTS", "DUTS-TE DUTS/DUTS-TE", (5019,)),
    "DUT-OMRON": Entry("DUT-OMRON", "DUT-OMRON DUT-O", (5168,)),
    "RGBD-TR": Entry("NJUD", "RGBD-TR NJUD-TR+NLPR-TR", (2185, 2985), "mask depth"),
    "NJUD-TR": Entry("NJUD", "NJUD-TR NJUD/train NJUD@train", (1485,), "mask depth"),
    "NLPR-TR": Entry("NLPR", "NLPR-TR NLPR/train NLPR@train", (700,), "mask depth"),
    "DUT-RGBD-TR": Entry("DUT-RGBD", "DUT-RGBD-TR DUT-RGBD/train", (800,), "mask depth"),
    "NJUD": Entry("NJUD", "NJUD-TE NJUD/test NJUD@test", (500,), "mask depth"),
    "NLPR": Entry("NLPR", "NLPR-TE NLPR/test NLPR@test", (300,), "mask depth"),
    "RGBD135": Entry("RGBD135", "RGBD135 DES", (135,), "mask depth"),
    "SIP": Entry("SIP", "SIP", (929,), "mask depth"),
    "VT5000-TR": Entry("VT5000", "VT5000-TR VT5000/train", (2500,), "mask thermal"),
    "VT5000-TE": Entry("VT5000", "VT5000-TE VT5000/test", (2500,), "mask thermal"),
    "VT1000": Entry("VT1000", "VT1000", (1000,), "mask thermal"),
    "VT821": Entry("VT821", "VT821", (821,), "mask thermal"),
    "VSOD-TR": Entry("DAVIS", "VSOD-TR DAVIS-TR+DAVSOD-TR", step=5),
    "DAVIS-TR": Entry("DAVIS", "DAVIS-TR DAVIS/480p@train DAVIS@train", (2079,)),
    "DAVSOD-TR": Entry("DAVSOD", "DAVSOD-TR DAVSOD/training"),
    "DAVIS": Entry("DAVIS", "DAVIS-TE DAVIS/480p@val DAVIS@val", (1376,)),
    "DAVSOD": Entry("DAVSOD", "DAVSOD-TE DAVSOD/easy-35 DAVSOD", (5332,)),
    "SegV2": Entry("SegV2", "SegV2 SegTrack-V2", (1025,)),
    "FBMS": Entry("FBMS", "FBMS", sparse=True),
    "RSSD-TR": Entry("ORSSD", "RSSD-TR ORSI-4199-TR+EORSSD-TR+ORSSD-TR", (4000,)),
    "ORSSD-TR": Entry("ORSSD", "ORSSD-TR ORSSD/train ORSSD@train", (600,)),
    "EORSSD-TR": Entry("EORSSD", "EORSSD-TR EORSSD/train", (1400,)),
    "ORSI-4199-TR": Entry("ORSI-4199", "ORSI-4199-TR ORSI-4199/train", (2000,)),
    "ORSSD": Entry("ORSSD", "ORSSD-TE ORSSD/test ORSSD@test", (200,)),
    "EORSSD": Entry("EORSSD", "EORSSD-TE EORSSD/test", (600,)),
    "COCO-captions": Entry("COCO", "COCO/train2017", (118287,), "caption"),
    "COCO-captions-val": Entry("COCO", "COCO/val2017", (5000,), "caption"),
    "Flickr8k": Entry("Flickr8k", "Flickr8k", (8091,), "caption"),
}
SHAPES = {f"shapes{kind}{'-test' * (split == 'test')}": {"split": split, **options}
          for kind, options in (("", {}), ("-depth", {"modality": "depth"}),
                                ("-thermal", {"modality": "thermal"}),
                                ("-video", {"modality": "flow"}), ("-top", {"view": "top"}))
          for split in ("train", "test")}


# ---- Reading one file ------------------------------------------------------------------------
def read(path: str | Path) -> Image.Image:
    """Decode a picture and turn it as its EXIF tag says; raises `UserError`."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except Exception as error:  # broken files make Pillow raise errors of many kinds
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"cannot read {path} ({reason}); fetch it again or remove it") from None


def load_image(path: str | Path) -> torch.Tensor:
    """Any grey, palette, RGB, RGBA or CMYK picture -> uint8 [3, H, W].

    16-bit grey is scaled to 8 bits, alpha is dropped. Raises `UserError` for an unreadable file.
    """
    image = read(path)
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        values = np.asarray(image).astype(np.float32) * (255 / 65535) + 0.5
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def load_mask(path: str | Path) -> torch.Tensor:
    """A mask -> uint8 [1, H, W], 0 background and 255 foreground.

    Foreground is grey >= 128, for JPEG masks are noisy and PASCAL-S has grey levels; >= 1 where the
    largest value is 1; >= 32768 where it exceeds 255; and index > 0 in a coloured palette, which
    numbers the objects. Raises `UserError` for an unreadable file.
    """
    image = read(path)
    coloured = False
    if image.mode == "P":
        used = np.array(image.getpalette("RGB")).reshape(-1, 3)[np.unique(image)]
        coloured = bool((used != used[:, :1]).any())
    values = np.asarray(image if coloured or image.mode[0] == "I" else image.convert("L"))
    threshold = 32768 if values.max() > 255 else 1 if coloured or values.max() == 1 else 128
    return torch.from_numpy((values >= threshold).astype(np.uint8) * 255)[None]


def read_captions(folder: Path) -> dict[str, list[str]]:
    """All captions by stem, from the usual files in `folder` or one level below.

    captions_*.json (COCO), Flickr8k.token.txt (name.jpg#0, tab, text), captions.txt (csv with the
    columns image,caption). Raises `UserError` for a file of another form.
    """
    captions = defaultdict(list)
    for pattern in ("captions*.json", "*.token.txt", "captions.txt"):
        for path in sorted((*folder.glob(pattern), *folder.glob(f"*/{pattern}"))):
            try:
                text = path.read_text(encoding="utf-8-sig")
                if path.suffix == ".json":
                    content = json.loads(text)
                    files = {image["id"]: image["file_name"] for image in content["images"]}
                    rows = [(files[a["image_id"]], a["caption"]) for a in content["annotations"]]
                elif path.name == "captions.txt":
                    rows = [(r["image"], r["caption"]) for r in csv.DictReader(text.splitlines())]
                else:
                    rows = [re.split(r"#\d+\t", line) for line in text.splitlines() if line]
                for name, caption in rows:
                    captions[Path(name).stem].append(caption.strip())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path} does not hold captions in a known form ({error!r}); "
                                "fetch it again or rename it") from None
    return captions


# ---- Finding and pairing files ---------------------------------------------------------------
Row = tuple[list[str], list[str], Path]  # folders above the role's folder, those below it, the file


def plain(text: str) -> str:
    """Lower case without blanks, hyphens and underscores: 'Training Set' -> 'trainingset'."""
    return re.sub(r"[-_ ]", "", text.lower())


def role_of(folder: str) -> str | None:
    """'GT' -> 'mask', 'DUTS-TR-Image' -> 'image', 'train-labels' -> 'mask', 'bear' -> None."""
    last = re.split(r"[-_ ]", folder.lower())[-1]
    return ROLES.get(plain(folder)) or (ROLES.get(last) if len(last) > 1 else None)


def scan(folder: Path, part: str = "") -> dict[str, list[Row]]:
    """All pictures below `folder` by role.

    part: only what lies below a sub-folder whose name starts like this ('480p', 'train').
    """
    found = defaultdict(list)
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if f[0] != "." and f != "__MACOSX"]
        steps = Path(base).relative_to(folder).parts
        chosen = [bool(part) and plain(step).startswith(plain(part)) for step in steps]
        if part and not any(chosen):
            continue
        roles = [role_of(step) for step in steps]
        first = next((i for i, role in enumerate(roles) if role), len(steps))
        rest = [i for i in range(len(steps)) if not roles[i] and not chosen[i]]
        above, below = [steps[i] for i in rest if i < first], [steps[i] for i in rest if i > first]
        found[next(filter(None, reversed(roles)), "other")] += [
            (above, below, Path(base, f)) for f in files
            if f[0] != "." and f.lower().endswith(SUFFIXES)]
    other = found.pop("other", [])
    photos = found.pop("image", []) or other
    if not found["mask"]:  # stem.jpg and stem.png side by side: the png is the mask
        stems = {file.with_suffix("") for *_, file in photos if file.suffix.lower() != ".png"}
        twin = [f.suffix.lower() == ".png" and f.with_suffix("") in stems for *_, f in photos]
        found["mask"] = [row for row, is_mask in zip(photos, twin) if is_mask]
        photos = [row for row, is_mask in zip(photos, twin) if not is_mask]
    return {**found, "image": photos}


def by_name(rows: list[Row]) -> dict[str, Path]:
    """{name: file}; raises `UserError` for two files of one name.

    Folders that all files share above the role's folder are not part of the name.
    """
    shared = len(os.path.commonprefix([above for above, _, _ in rows]))
    named = {}
    for above, below, file in rows:
        name = "/".join((*above[shared:], *below, file.stem))
        if name in named:
            raise UserError(f"{named[name]} and {file} have the same stem; keep one of them")
        named[name] = file
    return named


def some(names: Sequence[str]) -> str:
    """The first three of many names."""
    return ", ".join(names[:3]) + ", …" * (len(names) > 3)


class Folder(Dataset):
    """The pictures below one folder, sorted by name.

    folder, part: see `scan`;  needs: any of "mask", "depth", "thermal", "flow", "caption".
    sparse: leave out pictures without a mask instead of refusing them.
    Raises `UserError`: no pictures, two files of one name, a picture without something it needs;
    when a sample is read: an unreadable file, a mask that does not fit its photo.
    """

    def __init__(self, folder: Path, title: str, needs: Sequence[str] = ("mask",), part: str = "",
                 sparse: bool = False):
        rows = scan(folder, part)
        kinds = [kind for kind in MODALITIES if rows.get(kind)]
        if len(kinds) > 1:
            raise UserError(f"{folder} has both {' and '.join(kinds)}; keep one of them in it")
        needs = dict.fromkeys((*needs, *kinds))  # a folder of depth maps must be whole, too
        files = {role: by_name(rows.get(role, [])) for role in ("image", *needs)}
        captions = read_captions(folder)
        files["caption"] = {name: captions[file.stem] for name, file in files["image"].items()
                            if file.stem in captions}
        self.title, self.modality = title, kinds[0] if kinds else None
        self.names = sorted(files["image"].keys() & files["mask"].keys()
                            if sparse and "mask" in needs else files["image"])
        if not self.names:
            raise UserError(f"no jpg, jpeg, png or bmp files{' with masks' * sparse} in {folder}")
        for need in needs:
            if lost := [name for name in self.names if name not in files[need]]:
                where = f"files of the same stems into {folder / {'mask': 'masks'}.get(need, need)}"
                if need == "caption":
                    where = "captions.txt (csv with the columns image,caption) beside them"
                raise UserError(f"{len(lost)} of {len(self.names)} pictures in {folder} have no "
                                f"{need}: {some(lost)}; put {where}")
        self.files = files

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        path = {role: files.get(name) for role, files in self.files.items()}
        image, mask, modality = load_image(path["image"]), None, None
        height, width = size = tuple(image.shape[1:])
        if path.get("mask"):
            mask = load_mask(path["mask"])
            if mask.shape[1:] != size:
                raise UserError(f"{path['mask']} is {mask.shape[2]} x {mask.shape[1]} pixels, but "
                                f"{path['image']} is {width} x {height}; a mask must fit its photo")
        if self.modality:  # sensors and flow networks often have another resolution
            modality = TF.resize(load_image(path[self.modality]), list(size), antialias=True)
        return {"image": image, "mask": mask, "modality": modality, "caption": path["caption"],
                "name": name, "size": size}


class View(Dataset):
    """Chosen samples of other sets under new names; picks are (set, index, name).

    Raises `UserError` when two samples have the same name.
    """

    def __init__(self, picks: Iterable[tuple[Dataset, int, str]], title: str):
        self.picks, self.title = list(picks), title
        self.names = [name for _, _, name in self.picks]
        name, times = Counter(self.names).most_common(1)[0]
        if times > 1:
            raise UserError(f"{title} holds {name} {times} times; join sets of different names")

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> dict:
        dataset, i, name = self.picks[index]
        return {**dataset[i], "name": name}


def join(parts: Sequence[Dataset], title: str) -> View:
    """One set after the other; the names become '<set>/<name>'."""
    return View([(part, i, f"{part.title}/{name}") for part in parts
                 for i, name in enumerate(part.names)], title)


def restrict(dataset: Dataset, wanted: Iterable[str], source: str | Path, title: str) -> View:
    """The samples whose name, or whose folder (a clip), is in `wanted`.

    Raises `UserError` when something wanted is not in the set, or nothing is wanted.
    """
    wanted = set(wanted)
    hits = [wanted & {name, name.rpartition("/")[0]} for name in dataset.names]
    if lost := sorted(wanted.difference(*hits)):
        raise UserError(f"{len(lost)} of the {len(wanted)} stems in {source} are not in "
                        f"{dataset.title}: {some(lost)}")
    if not wanted:
        raise UserError(f"the list of stems {source} is empty")
    return View([(dataset, i, dataset.names[i]) for i, hit in enumerate(hits) if hit], title)


# ---- Opening by name -------------------------------------------------------------------------
def open_set(spec: str | Path, root: str | Path = "data", masks: bool = True) -> Dataset:
    """Open a data set.

    spec: a registered name, a built-in name (shapes, shapes-depth-test, …), or a folder, here or
          below `root`; any of them as SET@LIST, with a text file of stems (or of clips); or several
          joined with '+'. A name wins over a folder; an existing path wins over '@' and '+'.
    masks: False neither looks for masks nor opens them.
    A registered set with an unexpected number of images opens with a warning on stderr.
    Raises `UserError`: unknown or missing set, unpaired files, a list that does not fit the set.
    """
    root, pieces, parts = Path(root), str(spec).split("+"), []
    while pieces:  # the longest run of pieces that means something, as a path may contain '+'
        runs = ["+".join(pieces[:n]) for n in range(len(pieces), 0, -1)]
        text = next((run for run in runs if meaning(run, root)), pieces[0])
        parts.append(open_one(text, root, masks))
        del pieces[:text.count("+") + 1]
    return parts[0] if len(parts) == 1 else join(parts, "+".join(part.title for part in parts))


def meaning(text: str, root: Path) -> tuple[str, str] | None:
    """(set, list file or '') if `text` is a name, a folder or one of them with @LIST, else None."""
    def known(name: str) -> bool:
        return name in REGISTRY or name in SHAPES or folder_of(name, root) is not None
    if known(text):
        return text, ""
    cuts = [(text[:at.start()], text[at.end():]) for at in re.finditer("@", text)]
    return next((cut for cut in cuts if known(cut[0]) and Path(cut[1]).is_file()), None)


def folder_of(text: str, root: Path) -> Path | None:
    """The folder that `text` means, as a path or below `root`."""
    paths = (Path(text).expanduser(), root / text) if text else ()
    return next((path for path in paths if path.is_dir()), None)


def open_one(text: str, root: Path, masks: bool) -> Dataset:
    """Open a set without '+'; see `open_set`."""
    if meaning(text, root) is None:
        name, _, stems = text.rpartition("@")
        if name and meaning(name, root):
            raise UserError(f"there is no list of stems {stems} to choose from {name} with")
        names = {plain(name): name for name in (*REGISTRY, *SHAPES)}
        near = difflib.get_close_matches(plain(text), names, n=1)
        guess = f"did you mean {names[near[0]]}? " if near else ""
        raise UserError(f"{text!r} is neither a folder nor a known data set; {guess}"
                        "`python -m common.datasets` lists the names")
    name, stems = meaning(text, root)
    if name in REGISTRY:
        dataset = open_registered(name, root, masks)
        if miscount := wrong_count(name, dataset):
            print(f"warning: {name}: {miscount}; scores will not be comparable", file=sys.stderr)
    elif name in SHAPES:
        from common.shapes import Shapes  # only who asks for shapes pays for drawing them
        dataset = Shapes(**SHAPES[name])
    else:
        folder = folder_of(name, root)
        dataset = Folder(folder, folder.resolve().name, ("mask",) if masks else ())
    if stems:
        return restrict(dataset, read_list(stems), stems, f"{dataset.title}@{Path(stems).stem}")
    return dataset


def read_list(path: str | Path) -> list[str]:
    """The lines of a text file; '#' starts a comment line, picture suffixes are dropped."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the list of stems {path} ({reason})") from None
    stems = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [s[:s.rindex(".")] if s.lower().endswith(SUFFIXES) else s for s in stems]


def read_split(name: str, splits: str) -> list[str]:
    """The stems (or clips) of the given splits ('train,val') in data/splits/<name>.txt."""
    stems = []
    for line in read_list(SPLITS / f"{name}.txt"):
        head, words = line.split(": ")
        split, pattern = head.split()
        if split in splits.split(","):
            stems += [pattern.replace("*", word) for word in words.split()]
    return stems


class MissingSet(UserError):
    """A registered set that is not below the data root."""


def open_registered(name: str, root: Path, masks: bool = True) -> Dataset:
    """Open a registered set; raises `MissingSet`, or `UserError` as `Folder` does."""
    entry = REGISTRY[name]
    here = {plain(p.name): p for p in root.iterdir() if p.is_dir()} if root.is_dir() else {}
    for place in entry.places.split():
        if "+" in place:
            dataset = join([open_registered(part, root, masks) for part in place.split("+")], name)
            break
        folder, part, split = re.fullmatch(r"([^/@]+)/?([^@]*)@?(.*)", place).groups()
        folder = here.get(plain(folder))
        if folder and (not part or any(scan(folder, part).values())):
            needs = [need for need in entry.needs.split() if masks or need != "mask"]
            dataset = Folder(folder, name, needs, part, entry.sparse)
            if split:
                stems = read_split(entry.origin, split)
                dataset = restrict(dataset, stems, f"data/splits/{entry.origin}.txt", name)
            break
    else:
        looked = ", ".join(str(root / place.split("@")[0]) for place in entry.places.split())
        raise MissingSet(f"{name} is missing (looked for {looked}); get it from "
                         f"{ORIGINS[entry.origin].source}, unpack it into {root / entry.origin}, "
                         "and see data/README.md")
    return dataset if entry.step == 1 else thin(dataset, entry.step)


def thin(dataset: Dataset, step: int) -> View:
    """Every step-th frame of each clip whose name holds 'select', all frames of the others."""
    clips = defaultdict(list)
    for index, name in enumerate(dataset.names):
        clips[name.rpartition("/")[0]].append((dataset, index, name))
    return View([pick for clip, picks in clips.items()
                 for pick in picks[::step if "select" in clip else 1]], dataset.title)


# ---- The checker: python -m common.datasets --------------------------------------------------
def wrong_count(name: str, dataset: Dataset) -> str:
    """'700 images instead of 1000', or '' if the number is right or none is known."""
    counts = REGISTRY[name].counts if name in REGISTRY else ()
    fine = not counts or len(dataset) in counts
    return "" if fine else f"{len(dataset)} images instead of {' or '.join(map(str, counts))}"


def check(name: str, root: Path, deep: bool = False) -> tuple[str, int, str]:
    """(state, number of images, reason) of a registered set or any other `open_set` spec.

    state: complete, present (opens, but the right number is not known), broken, or missing.
    deep: open every file, on all cores. Raises `UserError` for a spec that cannot be opened.
    """
    if name not in REGISTRY:
        dataset = open_set(name, root)
    else:
        try:
            dataset = open_registered(name, root)
        except UserError as error:
            return "missing" if isinstance(error, MissingSet) else "broken", 0, str(error)

    def problem(index: int) -> str:
        try:
            dataset[index]
        except UserError as error:
            return str(error)
        return ""
    found = parallel_map(problem, range(len(dataset) if deep else 0))
    bad = [text for text in progress(found, f"read {name}", len(dataset)) if text] if deep else []
    reason = f"{len(bad)} bad samples, the first: {bad[0]}" if bad else wrong_count(name, dataset)
    known = name in REGISTRY and REGISTRY[name].counts
    return "broken" if reason else "complete" if known else "present", len(dataset), reason


def main(argv: Sequence[str] | None = None) -> None:
    """List the registered sets; exit status 1 if one that was named is broken or missing."""
    parser = argparse.ArgumentParser(prog="python -m common.datasets", description=main.__doc__)
    parser.add_argument("sets", nargs="*", metavar="SET", help="names or folders (default: all)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--deep", action="store_true", help="open every file")
    args = parser.parse_args(argv)
    states = []
    print(f"{'set':17} {'state':9} {'images':>7} {'expected':>13}  reason")
    for name in args.sets or REGISTRY:
        state, count, reason = check(name, args.data_root, args.deep)
        states.append(state)
        entry = REGISTRY.get(name)
        expected = " or ".join(map(str, entry.counts)) if entry else ""
        if state == "missing" and not args.sets:  # a whole list of sentences would be hard to read
            reason = ORIGINS[entry.origin].source
        print(f"{name:17} {state:9} {count or '-':>7} {expected or '-':>13}  {reason}".rstrip())
        for field, text in ORIGINS[entry.origin]._asdict().items() if args.sets and entry else ():
            print(f"    {field:7} {text}")
    if args.sets and {"broken", "missing"} & set(states):
        sys.exit(1)


if __name__ == "__main__":
    cli(main)

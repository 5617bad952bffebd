"""Data sets: registered public sets, any folder, joint sets, lists of stems, and the checker.

    open_set("ECSSD")                          a registered set (data/registry.py), below data/
    open_set("photos/holiday", masks=False)    any folder of pictures
    open_set("NJUD+VT821")                     a joint set; its names are "NJUD/…" and "VT821/…"
    open_set("ECSSD@mine.txt")                 only the stems in a text file, one per line
    open_set("shapes")                         the built-in synthetic set (data/shapes.py)
    open_photos([Path("a.jpg"), Path("new")])  every picture of files and folders, for --predict
    python -m common.datasets [--data-root DIR] [--deep] [SET ...]    what is there, is it whole?

Every set is a `torch.utils.data.Dataset` with `names`, `title`, `bytes(index)`,
`photo(index, at_least)` and `left_out`, the pictures that were found but are no part of it:
[(file, reason)]. A sample is a plain dict:

    image     uint8 [3, H, W]             mask      uint8 [1, H, W], 0 or 255, or None
    modality  uint8 [3, H, W] or None     caption   list of all captions (str) or None
    name      stem, or "folder/stem"      size      (H, W)

Pairing. The innermost folder with a name from `ROLES` tells what a file is; if no folder is named
for photos, the files without a role are the photos. A file's name is the rest of its path, without
the suffix, in Unicode's composed form; files of one name belong together, in whatever order they
lie. Where stem.jpg and stem.png lie side by side and there are no other masks (MSRA-B), the png is
the mask. Hidden files and run folders of this project are never read.
"""

import argparse
import difflib
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from common.images import is_photo, load_image, load_mask, load_modality
from common.runtime import UserError, cli, parallel_map, progress, say
from data.captions import read_captions
from data.registry import REGISTRY, SHAPES, SOURCES, TERMS, read_split, wrong_count

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
UNREAD = ".heic .heif .hif .avif .jp2 .j2k .jxl .ppm .pgm .pbm .pnm .tga .psd .svg .exr".split()
UNREAD += ".raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf .pef .srw".split()  # of cameras

MODALITIES = ("depth", "thermal", "flow")
WORDS = {  # names of folders by role, spelt as `plain` spells
    "image": "image images img imgs rgb jpegimages",
    "mask": "mask masks gt gts label labels groundtruth groundtruthmask segmentation segmentations "
    "annotation annotations pixelwisegtnewpng gtobjectlevel",
    "depth": "depth depths",
    "thermal": "t thermal",
    "flow": "flow optical opticalflow",
}
ROLES = {word: role for role, words in WORDS.items() for word in words.split()}

Listing = Iterable[tuple[Path, list[str]]]  # folders, and the names of the pictures in each
Row = tuple[Sequence[str], Sequence[str], Path]  # folders above that of the role, below it, file
LeftOut = list[tuple[str, str]]  # (file, reason)


# ---- Finding files -------------------------------------------------------------------------------
def plain(text: str) -> str:
    """Lower case without blanks, hyphens and underscores: 'Training Set' -> 'trainingset'."""
    return re.sub(r"[-_ ]", "", text.lower())


def composed(text: str) -> str:
    """The text in Unicode's composed form: file systems differ in how they store 'é'."""
    return unicodedata.normalize("NFC", text)


def role_of(folder: str) -> str | None:
    """'GT' -> 'mask', 'DUTS-TR-Image' -> 'image', 'train-labels' -> 'mask', 'bear' -> None."""
    role = ROLES.get(plain(folder))
    last = re.split(r"[-_ ]", folder.lower())[-1]
    if role is None and len(last) > 1:
        role = ROLES.get(last)
    return role


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture which is read: not hidden, a known suffix."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def is_run(folder: Path) -> bool:
    """Whether a folder is the run folder of a script here, or a stage's folder in it."""
    return os.path.exists(folder / ".lock") or os.path.exists(folder / "args.json")


def pictures(folder: Path, left_out: LeftOut, above: Sequence[str] = ()) -> Listing:
    """(folder, names of its pictures), for `folder` and all below it that are not hidden.

    A link to one of the folders `above` is not followed, for it would never end. Run folders below
    `folder` are skipped: their labels and maps are no photos. What is skipped is in `left_out`.
    """

    def unreadable(error: OSError) -> None:
        left_out.append((error.filename, f"cannot be read ({error.strerror})"))

    _, folders, files = next(os.walk(folder, onerror=unreadable), ("", [], []))
    for name in sorted(files):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in UNREAD and not name.startswith("."):
            left_out.append((str(folder / name), f"not read ({suffix})"))
    yield folder, sorted(filter(is_picture, files))

    above = (*above, os.path.realpath(folder))
    for name in sorted(folders):
        path = folder / name
        if name.startswith(".") or name == "__MACOSX" or os.path.realpath(path) in above:
            continue
        if is_run(path):
            maps = [file for file in sorted(path.rglob("*")) if is_picture(file.name)]
            left_out += [(str(file), "in a run folder") for file in maps]
            continue
        yield from pictures(path, left_out, above)


def by_role(
    folder: Path, listing: Listing, part: str = "", ignore: Sequence[str] = ()
) -> dict[str, list[Row]]:
    """The pictures below `folder` by role; 'other' for those in no folder with a role.

    part: only what lies below a sub-folder whose name starts like this ('480p', 'train').
    ignore: roles whose folders are read like any other folder.
    """

    def chosen(step: str) -> bool:
        return plain(step).startswith(plain(part))

    found = defaultdict(list)
    for base, names in listing:
        steps = base.relative_to(folder).parts
        if part and not any(map(chosen, steps)):
            continue

        # The last folder with a role decides; the first one divides the names of the others.
        role = "other"
        above = []
        below = []
        for step in steps:
            own = role_of(step)
            if own and own not in ignore:
                role = own
            elif not part or not chosen(step):
                (above if role == "other" else below).append(step)
        found[role] += [(above, below, base / name) for name in names]
    return found


def find_files(folder: Path, part: str, masks: bool) -> tuple[dict[str, list[Row]], LeftOut]:
    """The pictures below `folder` by role, 'image' for the photos, and what is left out.

    masks: whether masks are wanted. If not, folders that are only named like masks hold photos.
    """
    left_out = []
    listing = list(pictures(folder, left_out))
    found = by_role(folder, listing, part)
    if not masks and not found["image"]:
        photos = set(names_of(found["other"]))
        alone = [role for role in (*MODALITIES, "mask") if photos.isdisjoint(names_of(found[role]))]
        if not are_masks(found["mask"]):
            alone.append("mask")
        found = by_role(folder, listing, part, ignore=alone)

    # Without a folder for photos they are what has no role. Else the others are strays.
    named = found["image"] and found["mask"]  # then folders alone tell what is a mask
    if not found["image"]:
        found["image"] = found.pop("other", [])
    left_out += [(str(file), "beside the folder of photos") for *_, file in found["other"]]

    # Without masks the png beside another picture of the same stem is its mask.
    def is_twin(file: Path) -> bool:
        return file.suffix.lower() == ".png" and file.with_suffix("") in stems

    stems = {file.with_suffix("") for *_, file in found["image"] if file.suffix.lower() != ".png"}
    twins = [row for row in found["image"] if is_twin(row[-1])]
    if not found["mask"] and (masks or are_masks(twins)):
        found["mask"] = twins
        found["image"] = [row for row in found["image"] if not is_twin(row[-1])]
    if not masks and not named:
        left_out += [(str(file), "taken for a mask") for *_, file in found["mask"]]
    return found, left_out


def are_masks(rows: list[Row]) -> bool:
    """Whether files that lie where masks may lie are masks: one per name, the first no photo."""
    names = names_of(rows)
    return bool(rows) and len(set(names)) == len(names) and not is_photo(rows[0][-1])


def names_of(rows: list[Row]) -> list[str]:
    """The name of each row. Folders that all share above the role's folder are not part of it."""
    shared = len(os.path.commonprefix([above for above, _, _ in rows]))
    return [composed("/".join((*above[shared:], *below, file.stem))) for above, below, file in rows]


def by_name(rows: list[Row]) -> dict[str, Path]:
    """{name: file}; raises `UserError` for two files of one name."""
    named = {}
    for name, (*_, file) in zip(names_of(rows), rows):
        if name in named:
            raise UserError(f"{named[name]} and {file} have the same stem; keep one of them")
        named[name] = file
    return named


def some(names: Sequence[str]) -> str:
    """The first three of many names."""
    more = ", …" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def first_of(left_out: LeftOut) -> str:
    """A remark on the first file that was left out, as it may be the one that is missed."""
    return f" (left out: {left_out[0][0]}, {left_out[0][1]})" if left_out else ""


# ---- Data sets -----------------------------------------------------------------------------------
class FileSet(Dataset):
    """Pictures and what belongs to them, sorted by name.

    files: {role: {name: file}}, of which the photos, files["image"], say what is in the set;
    files["caption"] holds lists of captions instead.
    Reading raises `UserError` for an unreadable file, or a mask that does not fit its photo.
    """

    def __init__(self, files: dict[str, dict], title: str, left_out: LeftOut):
        self.files = files
        self.names = list(files["image"])
        self.title = title
        self.left_out = left_out

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        own = {role: files.get(name) for role, files in self.files.items()}
        image = load_image(own["image"])
        height, width = size = tuple(image.shape[1:])

        mask = None
        if own.get("mask"):
            mask = load_mask(own["mask"])
            if mask.shape[1:] != size:
                raise UserError(
                    f"{own['mask']} is {mask.shape[2]} x {mask.shape[1]} pixels, but "
                    f"{own['image']} is {width} x {height}; a mask must fit its photo"
                )

        # Sensors and flow networks often have another resolution.
        modality = None
        for kind in MODALITIES:
            if own.get(kind):
                modality = load_modality(own[kind])
                modality = TF.resize(modality, list(size), antialias=True)
        caption = own.get("caption")
        return dict(
            image=image, mask=mask, modality=modality, caption=caption, name=name, size=size
        )

    def bytes(self, index: int) -> int:
        """The size of the photo's file; raises `UserError` if it is gone."""
        path = self.files["image"][self.names[index]]
        try:
            return path.stat().st_size
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror})") from None

    def photo(self, index: int, at_least: int) -> Tensor:
        """The photo alone, uint8 [3, h, w]; a large JPEG may be smaller, see `images.read`."""
        return load_image(self.files["image"][self.names[index]], at_least=at_least)


def open_folder(
    folder: Path, title: str, needs: Sequence[str], part: str = "", sparse: bool = False
) -> FileSet:
    """The pictures below one folder.

    needs: what all must have, any of "mask", "depth", "thermal", "flow", "caption".
    part: see `by_role`;  sparse: leave out pictures without a mask instead of refusing them.
    Raises `UserError`: no pictures, two files of one name, a picture without something it needs.
    """
    rows, left_out = find_files(folder, part, "mask" in needs)
    kinds = [kind for kind in MODALITIES if rows[kind]]
    if len(kinds) > 1:
        raise UserError(f"{folder} has both {' and '.join(kinds)}; keep one of them in it")
    needs = dict.fromkeys((*needs, *kinds))  # a folder of depth maps must be whole, too
    files = {role: by_name(rows[role]) for role in ("image", *needs)}

    # Files that belong to no picture, and pictures of a sparse set without a mask, are left out.
    photos = dict(sorted(files["image"].items()))
    for need in needs:
        surplus = sorted(files[need].keys() - photos.keys())
        left_out += [(str(files[need][name]), f"{need} of no picture") for name in surplus]
    if sparse and "mask" in needs:
        bare = [name for name in photos if name not in files["mask"]]
        left_out += [(str(photos.pop(name)), "without a mask") for name in bare]
    files["image"] = photos

    # A caption is found by the whole name, or by the stem.
    captions = read_captions(folder)
    texts = {name: captions.get(name) or captions.get(name.split("/")[-1]) for name in photos}
    files["caption"] = {name: found for name, found in texts.items() if found}

    if not photos:
        what = "pictures with masks" if sparse else "pictures"
        raise UserError(
            f"no {what} ({', '.join(SUFFIXES)}) in {folder}{first_of(left_out)}; see data/README.md"
        )
    for need in needs:
        lost = [name for name in photos if name not in files[need]]
        if lost:
            raise UserError(
                f"{len(lost)} of {len(photos)} pictures in {folder} have no {need}: "
                f"{some(lost)}{first_of(left_out)}; add what is missing, as data/README.md shows"
            )
    return FileSet(files, title, left_out)


class View(Dataset):
    """Chosen samples of other sets under new names; picks are (set, index, name).

    Raises `UserError` when two samples have the same name.
    """

    def __init__(self, picks: Iterable[tuple[Dataset, int, str]], title: str):
        self.picks = list(picks)
        self.title = title
        self.names = [name for _, _, name in self.picks]
        sets = {id(dataset): dataset for dataset, _, _ in self.picks}
        self.left_out = [item for dataset in sets.values() for item in dataset.left_out]
        name, times = Counter(self.names).most_common(1)[0]
        if times > 1:
            raise UserError(f"{title} holds {name} {times} times; join sets of different names")

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, index: int) -> dict:
        dataset, i, name = self.picks[index]
        return {**dataset[i], "name": name}

    def bytes(self, index: int) -> int:
        """The size of the photo's file."""
        dataset, i, _ = self.picks[index]
        return dataset.bytes(i)

    def photo(self, index: int, at_least: int) -> Tensor:
        """The photo alone, see `FileSet.photo`."""
        dataset, i, _ = self.picks[index]
        return dataset.photo(i, at_least)


def join(parts: Sequence[Dataset], title: str) -> View:
    """One set after the other; the names become '<set>/<name>'."""
    picks = [(part, i, f"{part.title}/{part.names[i]}") for part in parts for i in range(len(part))]
    return View(picks, title)


def restrict(dataset: Dataset, wanted: Iterable[str], source: str | Path, title: str) -> View:
    """The samples whose name, or whose folder (a clip), is in `wanted`.

    Raises `UserError` when something wanted is not in the set, or nothing is wanted.
    """
    wanted = set(wanted)
    hits = [wanted & {name, name.rpartition("/")[0]} for name in dataset.names]
    lost = sorted(wanted.difference(*hits))
    if lost:
        raise UserError(
            f"{len(lost)} of the {len(wanted)} stems in {source} are not in "
            f"{dataset.title}: {some(lost)}"
        )
    if not wanted:
        raise UserError(f"the list of stems {source} is empty")
    return View([(dataset, i, dataset.names[i]) for i, hit in enumerate(hits) if hit], title)


def thin(dataset: Dataset, step: int) -> View:
    """Every step-th frame of each clip whose name holds 'select', all frames of the others."""
    clips = defaultdict(list)
    for index, name in enumerate(dataset.names):
        clips[name.rpartition("/")[0]].append((dataset, index, name))
    picks = []
    for clip, frames in clips.items():
        picks += frames[::step] if "select" in clip else frames
    return View(picks, dataset.title)


def report_left_out(dataset: Dataset) -> None:
    """Say on stderr how many pictures were left out, and why; nothing if none was."""
    if dataset.left_out:
        counts = Counter(reason for _, reason in dataset.left_out)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        say(
            f"{dataset.title}: {len(dataset)} pictures; {len(dataset.left_out)} left out: "
            f"{reasons} (the first: {dataset.left_out[0][0]})",
            error=True,
        )


# ---- Photos to predict ---------------------------------------------------------------------------
def open_photos(
    paths: Path | Sequence[Path], root: str | Path, skip: Path | None = None
) -> Dataset:
    """Every picture of files and folders, whatever the folders' names: what --predict maps.

    One path may also be a registered set, or a folder with photos and depth, thermal or flow
    pictures, which then come with them, see `open_set`.
    skip: the folder that the maps go to; what lies in it is left out.
    A picture is called by its path below the folder that all paths share, without the suffix; those
    that differ in the suffix alone keep it: the map of a.jpg beside a.png is a.jpg.png.
    Raises `UserError` for a path that is not there, and if there is no picture.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    gone = [path for path in paths if not os.path.exists(path)]
    if gone and len(paths) == 1 and not is_picture(gone[0].name):
        return open_set(gone[0], root, masks=False)
    if gone:
        raise UserError(f"there is no file or folder {gone[0]}")

    # Every file once, even if it was given twice.
    left_out = []
    files = {}
    for path in paths:
        found = [path]
        if path.is_dir():
            walked = list(pictures(path, left_out))
            roles = by_role(path, walked)
            if len(paths) == 1 and roles["image"] and any(roles[kind] for kind in MODALITIES):
                return open_set(path, root, masks=False)
            found = [base / name for base, names in walked for name in names]
        for file in found:
            if skip is not None and file.resolve().is_relative_to(skip.resolve()):
                left_out.append((str(file), "in the folder of the maps"))
            else:
                files[os.path.abspath(file)] = file
    if not files:
        where = some([str(path) for path in paths])
        raise UserError(f"no pictures ({', '.join(SUFFIXES)}) in {where}{first_of(left_out)}")

    folders = [path if path.is_dir() else path.parent for path in paths]
    shared = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    names = [composed(Path(os.path.relpath(file, shared)).as_posix()) for file in files]
    times = Counter(os.path.splitext(name)[0].lower() for name in names)
    photos = {}
    for name, file in zip(names, files.values()):
        stem = os.path.splitext(name)[0]
        name = stem if times[stem.lower()] == 1 else name
        if name in photos:  # two Unicode forms of a name, or a.jpg.png beside a.jpg and a.png
            raise UserError(f"{photos[name]} and {file} would both be called {name}; rename one")
        photos[name] = file
    title = paths[0].resolve().name if len(paths) == 1 else "photos"
    return FileSet({"image": photos}, title, left_out)


# ---- Opening by name -----------------------------------------------------------------------------
class MissingSet(UserError):
    """A data set that is not there."""


def open_set(spec: str | Path, root: str | Path = "data", masks: bool = True) -> Dataset:
    """Open a data set.

    spec: a registered name, a built-in name (shapes, shapes-depth-test, …), or a folder, here or
          below `root`; any of them as SET@LIST, with a text file of stems (or of clips); or several
          joined with '+'. A name wins over a folder, and a path that exists over '@' and '+' in it.
    masks: False neither needs nor reads masks (of a folder without names one is opened to see).
    A registered set with an unexpected number of images opens with a warning on stderr.
    Raises `UserError`: unknown or missing set, unpaired files, a list that does not fit the set.
    """
    text = str(spec)
    root = Path(root)
    if text in REGISTRY:
        dataset = open_registered(text, root, masks)
        miscount = wrong_count(text, len(dataset))
        if miscount:
            say(f"warning: {text}: {miscount}; scores will not be comparable", error=True)
        return dataset
    if text in SHAPES:
        from data.shapes import Shapes  # only who asks for shapes pays for drawing them

        return Shapes(**SHAPES[text])
    for folder in (os.path.expanduser(text), root / text):
        if text and os.path.isdir(folder):
            folder = Path(folder)
            return open_folder(folder, folder.resolve().name, ("mask",) if masks else ())
    if "+" in text:
        parts = [open_set(part, root, masks) for part in text.split("+")]
        return join(parts, "+".join(part.title for part in parts))
    if "@" in text:
        name, _, path = text.rpartition("@")
        dataset = open_set(name, root, masks)
        return restrict(dataset, read_list(path), path, f"{dataset.title}@{Path(path).stem}")

    names = {plain(name): name for name in (*REGISTRY, *SHAPES)}
    near = difflib.get_close_matches(plain(text), names, n=1)
    guess = f"did you mean {names[near[0]]}? " if near else ""
    raise MissingSet(
        f"{text!r} is neither a folder nor a known data set; {guess}"
        "`python -m common.datasets` lists the names"
    )


def read_list(path: str | Path) -> list[str]:
    """The lines of a text file; '#' starts a comment line, picture suffixes are dropped."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the list of stems {path} ({error.strerror})") from None
    stems = []
    for line in text.split("\n"):  # a stem may hold other characters at which splitlines() cuts
        stem = composed(line.strip(" \t"))
        if stem and not stem.startswith("#"):
            stems.append(os.path.splitext(stem)[0] if is_picture(stem) else stem)
    return stems


def open_registered(name: str, root: Path, masks: bool = True) -> Dataset:
    """Open a registered set; raises `MissingSet`, or `UserError` as `open_folder` does."""
    entry = REGISTRY[name]
    places = entry.places.split()
    for place in places:
        dataset = open_place(place, name, root, masks)
        if dataset is not None:
            return dataset if entry.step == 1 else thin(dataset, entry.step)
    looked = ", ".join(str(root / place.split("@")[0]) for place in places)
    raise MissingSet(
        f"{name} is missing (looked for {looked}); get it from {SOURCES[entry.origin]}"
        f", unpack it into {root / entry.origin}, and see data/README.md"
    )


def open_place(place: str, name: str, root: Path, masks: bool) -> Dataset | None:
    """Open a registered set from one of its `Entry.places`; None if there is nothing."""
    entry = REGISTRY[name]
    if "+" in place:
        return join([open_registered(part, root, masks) for part in place.split("+")], name)
    place, _, split = place.partition("@")
    place, _, part = place.partition("/")
    folders = {plain(path.name): path for path in root.glob("*") if path.is_dir()}
    folder = folders.get(plain(place))
    if folder is None or part and not any(by_role(folder, pictures(folder, []), part).values()):
        return None
    needs = [need for need in entry.needs.split() if masks or need != "mask"]
    dataset = open_folder(folder, name, needs, part, entry.sparse)
    if split:
        source = f"data/splits/{entry.origin}.txt"
        return restrict(dataset, read_split(entry.origin, split), source, name)
    return dataset


# ---- The checker: python -m common.datasets ------------------------------------------------------
def check(name: str, root: Path, deep: bool = False) -> tuple[str, int, str]:
    """(state, number of images, what is to be said about it) of any set.

    state: complete, present (opens, but the right number is not known), broken, or missing.
    deep: open every file, on all cores, and count empty and full masks. Says what was left out.
    """
    try:
        dataset = open_registered(name, root) if name in REGISTRY else open_set(name, root)
    except UserError as error:
        return "missing" if isinstance(error, MissingSet) else "broken", 0, str(error)
    report_left_out(dataset)
    notes = look_deep(dataset, name) if deep else {}
    fault = notes.pop("bad sample", "") or wrong_count(name, len(dataset))
    if fault:
        return "broken", len(dataset), fault
    known = name in REGISTRY and REGISTRY[name].counts
    return "complete" if known else "present", len(dataset), "; ".join(notes.values())


def look_deep(dataset: Dataset, name: str) -> dict[str, str]:
    """{what is broken or unusual: how many samples are, and the first} of a set."""
    found = {"bad sample": [], "empty mask": [], "full mask": []}

    def look(index: int) -> tuple[str, str]:
        try:
            mask = dataset[index]["mask"]
        except UserError as error:
            return "bad sample", str(error)
        if mask is None or mask.any() and not mask.all():
            return "", ""
        return "full mask" if mask.all() else "empty mask", dataset.names[index]

    looks = parallel_map(look, range(len(dataset)))
    for kind, item in progress(looks, f"read {name}", len(dataset)):
        if kind:
            found[kind].append(item)
    return {
        kind: f"{len(items)} {kind}s, the first: {items[0]}"
        for kind, items in found.items()
        if items
    }


def main(argv: Sequence[str] | None = None) -> None:
    """List the registered sets; exit status 1 if one that was named is broken or missing."""
    parser = argparse.ArgumentParser(prog="python -m common.datasets", description=main.__doc__)
    add = parser.add_argument
    add("sets", nargs="*", metavar="SET", help="names or folders [all]")
    add("--data-root", type=Path, default="data", metavar="DIR", help="where they lie [data]")
    add("--deep", action="store_true", help="open every file, and count empty and full masks")
    args = parser.parse_args(argv)

    failed = False
    say(f"{'set':17} {'state':9} {'images':>7}  reason")
    for name in args.sets or REGISTRY:
        state, count, reason = check(name, args.data_root, args.deep)
        failed |= state in ("broken", "missing")
        entry = REGISTRY.get(name)
        if state == "missing" and not args.sets:  # a whole list of sentences would be hard to read
            reason = SOURCES[entry.origin]
        say(f"{name:17} {state:9} {count or '-':>7}  {reason}".rstrip())
        if args.sets and entry:
            say(f"    source: {SOURCES[entry.origin]}\n    terms:  {TERMS[entry.origin]}")
    if args.sets and failed:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)

"""Data sets: registered public sets, any folder, joint sets, lists of stems, and the checker.

    open_set("ECSSD")                          a registered set (data/registry.py), below data/
    open_set("photos/holiday", masks=False)    any folder of pictures
    open_set("NJUD+VT821")                     a joint set; its names are "NJUD/…" and "VT821/…"
    open_set("ECSSD@mine.txt")                 only the stems in a text file, one per line
    open_set("shapes")                         the built-in synthetic set (data/shapes.py)
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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from common.images import eight_bits, load_grey, load_image, load_map, load_mask, read  # noqa: F401
from common.runtime import UserError, cli, parallel_map, progress
from data.registry import REGISTRY, SHAPES, SOURCES, TERMS, read_split, wrong_count

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
MODALITIES = ("depth", "thermal", "flow")
ROLES = {
    word: role
    for role, words in {  # spelt as plain() spells
        "image": "image images img imgs rgb jpegimages",
        "mask": "mask masks gt gts label labels groundtruth groundtruthmask segmentation "
        "segmentations "
        "annotation annotations pixelwisegtnewpng gtobjectlevel",
        "depth": "depth depths",
        "thermal": "t thermal",
        "flow": "flow optical opticalflow",
    }.items()
    for word in words.split()
}


def read_captions(folder: Path) -> dict[str, list[str]]:
    """All captions by stem and by path, from the usual files in `folder` or one level below.

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
                    photo = Path(name)
                    for key in {photo.stem, photo.with_suffix("").as_posix()}:
                        captions[key].append(caption.strip())
            except (
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                OSError,
                RecursionError,
                csv.Error,
            ) as error:
                raise UserError(
                    f"{path} does not hold captions in a known form ({error!r}); "
                    "fetch it again or rename it"
                ) from None
    return captions


# ---- Finding and pairing files ---------------------------------------------------------------
Row = tuple[Sequence[str], Sequence[str], Path]  # folders above that of the role, below it, file


def plain(text: str) -> str:
    """Lower case without blanks, hyphens and underscores: 'Training Set' -> 'trainingset'."""
    return re.sub(r"[-_ ]", "", text.lower())


def role_of(folder: str) -> str | None:
    """'GT' -> 'mask', 'DUTS-TR-Image' -> 'image', 'train-labels' -> 'mask', 'bear' -> None."""
    last = re.split(r"[-_ ]", folder.lower())[-1]
    return ROLES.get(plain(folder)) or (ROLES.get(last) if len(last) > 1 else None)


def pictures(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its pictures), for `folder` and all below it that are not hidden."""
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if f[0] != "." and f != "__MACOSX")
        yield Path(base), sorted(f for f in files if f[0] != "." and f.lower().endswith(SUFFIXES))


def scan(folder: Path, part: str = "") -> dict[str, list[Row]]:
    """All pictures below `folder` by role.

    part: only what lies below a sub-folder whose name starts like this ('480p', 'train').
    """
    found = defaultdict(list)
    for base, files in pictures(folder):
        steps = base.relative_to(folder).parts
        chosen = [bool(part) and plain(step).startswith(plain(part)) for step in steps]
        if part and not any(chosen):
            continue
        roles = [role_of(step) for step in steps]
        first = next((i for i, role in enumerate(roles) if role), len(steps))
        rest = [i for i in range(len(steps)) if not roles[i] and not chosen[i]]
        above, below = [steps[i] for i in rest if i < first], [steps[i] for i in rest if i > first]
        found[next(filter(None, reversed(roles)), "other")] += [
            (above, below, base / f) for f in files
        ]
    photos = found["image"] = found["image"] or found["other"]
    if not found["mask"]:  # stem.jpg and stem.png side by side: the png is the mask
        stems = {file.with_suffix("") for *_, file in photos if file.suffix.lower() != ".png"}
        for role, is_mask in (("image", False), ("mask", True)):
            found[role] = [
                row
                for row in photos
                if is_mask == (row[2].suffix.lower() == ".png" and row[2].with_suffix("") in stems)
            ]
    return found


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

    def __init__(
        self,
        folder: Path,
        title: str,
        needs: Sequence[str] = ("mask",),
        part: str = "",
        sparse: bool = False,
    ):
        rows = scan(folder, part)
        kinds = [kind for kind in MODALITIES if rows[kind]]
        if len(kinds) > 1:
            raise UserError(f"{folder} has both {' and '.join(kinds)}; keep one of them in it")
        needs = dict.fromkeys((*needs, *kinds))  # a folder of depth maps must be whole, too
        files = {role: by_name(rows[role]) for role in ("image", *needs)}
        captions = read_captions(folder)
        files["caption"] = {
            name: captions.get(name) or captions[file.stem]
            for name, file in files["image"].items()
            if name in captions or file.stem in captions
        }
        names = files["image"].keys()
        if sparse:
            names = names & files.get("mask", names)
        if not names:
            raise UserError(
                f"no jpg, jpeg, png or bmp files{' with masks' * sparse} in {folder}"
                + "; data/README.md says where masks come from" * sparse
            )
        self.names, self.files = sorted(names), files
        self.title, self.modality = title, kinds[0] if kinds else None
        for need in needs:
            if lost := [name for name in self.names if name not in files[need]]:
                raise UserError(
                    f"{len(lost)} of {len(names)} pictures in {folder} have no {need}: "
                    f"{some(lost)}; add what is missing, as data/README.md shows"
                )

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
                raise UserError(
                    f"{path['mask']} is {mask.shape[2]} x {mask.shape[1]} pixels, but "
                    f"{path['image']} is {width} x {height}; a mask must fit its photo"
                )
        if self.modality:  # sensors and flow networks often have another resolution
            modality = TF.resize(load_image(path[self.modality]), list(size), antialias=True)
        return {
            "image": image,
            "mask": mask,
            "modality": modality,
            "caption": path["caption"],
            "name": name,
            "size": size,
        }


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
    return View(
        [(part, i, f"{part.title}/{name}") for part in parts for i, name in enumerate(part.names)],
        title,
    )


def restrict(dataset: Dataset, wanted: Iterable[str], source: str | Path, title: str) -> View:
    """The samples whose name, or whose folder (a clip), is in `wanted`.

    Raises `UserError` when something wanted is not in the set, or nothing is wanted.
    """
    wanted = set(wanted)
    hits = [wanted & {name, name.rpartition("/")[0]} for name in dataset.names]
    if lost := sorted(wanted.difference(*hits)):
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
    return View(
        [
            pick
            for clip, picks in clips.items()
            for pick in picks[:: step if "select" in clip else 1]
        ],
        dataset.title,
    )


# ---- Opening by name -------------------------------------------------------------------------
class MissingSet(UserError):
    """A data set that is not there."""


def open_set(spec: str | Path, root: str | Path = "data", masks: bool = True) -> Dataset:
    """Open a data set.

    spec: a registered name, a built-in name (shapes, shapes-depth-test, …), or a folder, here or
          below `root`; any of them as SET@LIST, with a text file of stems (or of clips); or several
          joined with '+'. A name wins over a folder, and a path that exists over '@' and '+' in it.
    masks: False neither looks for masks nor opens them.
    A registered set with an unexpected number of images opens with a warning on stderr.
    Raises `UserError`: unknown or missing set, unpaired files, a list that does not fit the set.
    """
    text, root = str(spec), Path(root)
    if "+" not in text or find_folder(text, root):
        return open_part(text, root, masks)
    parts = [open_part(part, root, masks) for part in text.split("+")]
    return join(parts, "+".join(part.title for part in parts))


def find_folder(text: str, root: Path) -> Path | None:
    """The folder that `text` means, as a path or below `root`."""
    paths = (Path(text).expanduser(), root / text) if text else ()
    return next((path for path in paths if path.is_dir()), None)


def open_part(text: str, root: Path, masks: bool) -> Dataset:
    """Open a set that is not joint; see `open_set`."""
    if text in REGISTRY:
        dataset = open_registered(text, root, masks)
        if miscount := wrong_count(text, len(dataset)):
            print(f"warning: {text}: {miscount}; scores will not be comparable", file=sys.stderr)
        return dataset
    if text in SHAPES:
        from data.shapes import Shapes  # only who asks for shapes pays for drawing them

        return Shapes(**SHAPES[text])
    if folder := find_folder(text, root):
        return Folder(folder, folder.resolve().name, ("mask",) if masks else ())
    if "@" in text:
        name, _, path = text.rpartition("@")
        dataset = open_part(name, root, masks)
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
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the list of stems {path} ({error.strerror})") from None
    stems = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [s[: s.rindex(".")] if s.lower().endswith(SUFFIXES) else s for s in stems]


def open_registered(name: str, root: Path, masks: bool = True) -> Dataset:
    """Open a registered set; raises `MissingSet`, or `UserError` as `Folder` does."""
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
    if folder is None or part and not any(scan(folder, part).values()):
        return None
    needs = [need for need in entry.needs.split() if masks or need != "mask"]
    dataset = Folder(folder, name, needs, part, entry.sparse)
    if split:
        source = f"data/splits/{entry.origin}.txt"
        return restrict(dataset, read_split(entry.origin, split), source, name)
    return dataset


# ---- The checker: python -m common.datasets --------------------------------------------------
def check(name: str, root: Path, deep: bool = False) -> tuple[str, int, str]:
    """(state, number of images, reason) of any set.

    state: complete, present (opens, but the right number is not known), broken, or missing.
    deep: open every file, on all cores.
    """
    try:
        dataset = open_registered(name, root) if name in REGISTRY else open_set(name, root)
    except UserError as error:
        return "missing" if isinstance(error, MissingSet) else "broken", 0, str(error)

    def problem(index: int) -> str | None:
        try:
            dataset[index]
        except UserError as error:
            return str(error)

    reason = wrong_count(name, len(dataset))
    if deep:
        found = parallel_map(problem, range(len(dataset)))
        bad = [text for text in progress(found, f"read {name}", len(dataset)) if text]
        reason = f"{len(bad)} bad samples, the first: {bad[0]}" if bad else reason
    known = name in REGISTRY and REGISTRY[name].counts
    return "broken" if reason else "complete" if known else "present", len(dataset), reason


def main(argv: Sequence[str] | None = None) -> None:
    """List the registered sets; exit status 1 if one that was named is broken or missing."""
    parser = argparse.ArgumentParser(prog="python -m common.datasets", description=main.__doc__)
    parser.add_argument("sets", nargs="*", metavar="SET", help="names or folders (default: all)")
    parser.add_argument("--data-root", type=Path, default=Path("data"), metavar="DIR")
    parser.add_argument("--deep", action="store_true", help="open every file")
    args = parser.parse_args(argv)
    failed = False
    print(f"{'set':17} {'state':9} {'images':>7} {'expected':>13}  reason")
    for name in args.sets or REGISTRY:
        state, count, reason = check(name, args.data_root, args.deep)
        failed |= state in ("broken", "missing")
        entry = REGISTRY.get(name)
        expected = " or ".join(map(str, entry.counts)) if entry else ""
        if state == "missing" and not args.sets:  # a whole list of sentences would be hard to read
            reason = SOURCES[entry.origin]
        print(f"{name:17} {state:9} {count or '-':>7} {expected or '-':>13}  {reason}".rstrip())
        if args.sets and entry:
            print(f"    source: {SOURCES[entry.origin]}\n    terms:  {TERMS[entry.origin]}")
    if args.sets and failed:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)

"""COCO-SOD: choose the salient objects of COCO among its panoptic segments.

Xu et al., "Semantic Distillation Guided Salient Object Detection", arXiv 2203.04076, section 3 and
appendix A: annotators click panoptic segments, the union of an image's chosen segments is its mask,
and more than 35,000 masks are a network's first training set. The masks were not released; this
makes such masks, by hand in a small page or by a vote of the captions:

    python -m data.relabel                        a page at http://127.0.0.1:8000/ for train2017
    python -m data.relabel --auto                 the caption vote; what was done by hand stays
    python -m data.relabel --split val2017        another split
    python -m data.relabel --only mine.txt        a list of stems, to share the work
    python -m data.panoptic_shapes DIR            a tiny set to try it on: add --data-root DIR
    python sdg_sod.py --stage sod --data COCO-SOD     train on whatever is labelled

    <data root>/COCO/                       as COCO's archives come, see data/panoptic.py
    .../COCO/sod/choices/<split>/<stem>.json        chosen ids, and who chose: hand or vote
    .../COCO/sod/masks/<split>/<stem>.png           their union, 0 or 255
    .../COCO/sod/vote-<split>.jsonl, .png           reasons; random results to judge by eye

The choices are the truth and the masks follow: a mask that is older than its choice, or missing, is
made again at the next start, so files may be edited, copied, or lost in a power cut. One program at
a time works on a split; a second one is refused.

The caption vote replaces annotators; where annotations/salient_<split>.json lists the right
segments, as in the tiny set, it is scored. It is not in the paper, which names annotation guided by
captions as future work (section 5). Masks that captions chose confound the rows SDG-SOD+ and
PVT-SOD+: the network that captions guide is then trained on masks that captions chose as well, so a
gain of guidance may come from either. For those rows the masks have to be made by hand.
Its rules are ours:
 1 a category is mentioned if two captions or more hold a word for it (data/coco_words.txt);
 2 only things, and the stuff that has a line in that file, can be chosen;
 3 no crowds, nothing below 0.5 % of the image, nothing below 20 % of the largest of its category,
   and no dining table that another mentioned object stands on;
 4 with --agree MAPS: the mean of the image's saliency map over a segment exceeds 0.5;
 5 score = captions that mention it x sqrt(share of the image) x (1 - distance / 2), where distance
   is that of the box's centre from the image's centre, across in widths and down in heights of the
   image, so that all borders are equally far, divided by that of a corner; chosen is what reaches a
   third of the best score;
 6 an image is kept if the union covers 1 to 70 % of it and touches three borders at most.
"""

import argparse
import json
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch

from common.datasets import read_captions, read_list
from common.images import load_image, load_map
from common.runtime import (
    UserError,
    cli,
    generator,
    lock,
    parallel_map,
    picture_strip,
    progress,
    remove_parts,
    save_json,
    save_png,
    save_text,
    say,
)
from data.panoptic import Panoptic, Segment, reason

PAGE = Path(__file__).parent / "relabel.html"
WORDS = Path(__file__).parent / "coco_words.txt"
MENTIONS = 2  # rule 1: captions that mention a category
SMALL = 0.005  # rule 3: least share of the image
KIN = 0.2  # rule 3: least share of the largest of a category
AGREEMENT = 0.5  # rule 4: least mean saliency
CUT = 1 / 3  # rule 5: least share of the best score; 1/2 misses every tenth object of the tiny set
UNION = (0.01, 0.7)  # rule 6: least and largest share of the image
BORDERS = 3  # rule 6: most borders that are touched
BODY = 100_000  # bytes that the page may send at once


# ---- Choices on the disk -------------------------------------------------------------------------
class Choices:
    """What was chosen in a split: one JSON and one mask per image, written at once and atomically.

    `made` maps stems to {"chosen": ids, "skipped": bool, "by": "hand" or "vote"}.
    Raises `UserError` for a malformed choice, or one with ids that its image lacks, and if another
    process works on the split.
    """

    def __init__(self, scenes: Panoptic):
        self.scenes = scenes
        self.folder = scenes.root / "sod"
        self.jsons = self.folder / "choices" / scenes.split
        self.masks = self.folder / "masks" / scenes.split
        self.index = {name: i for i, name in enumerate(scenes.names)}

        # Take the split for this process, and remove what a killed one has left.
        lock(self.jsons, "--split or --data-root")
        remove_parts(self.jsons)
        remove_parts(self.masks)
        for part in self.folder.glob(f".vote-{scenes.split}.*.part"):
            remove(part)

        # Read the choices, and draw again the masks that are older than their choice.
        written = {path.stem: path.stat().st_mtime_ns for path in self.jsons.glob("*.json")}
        drawn = {path.stem: path.stat().st_mtime_ns for path in self.masks.glob("*.png")}
        names = sorted(self.index.keys() & written.keys())
        self.made = {name: self.read(name) for name in names}
        for name in names:
            chosen = self.made[name]["chosen"]
            if drawn.get(name, 0) < written[name] and (chosen or name in drawn):
                self.draw(name, self.mask(self.index[name], chosen))

        # Go on at the image that was done by hand last.
        by_hand = [name for name in names if self.made[name]["by"] == "hand"]
        last = max(by_hand, key=written.get, default=None)
        self.start = self.index.get(last, 0)

    def read(self, name: str) -> dict:
        """The choice of an image, from its file."""
        path = self.jsons / f"{name}.json"
        try:
            found = json.loads(path.read_bytes())
            if found["by"] not in ("hand", "vote"):
                raise ValueError("'by' is neither hand nor vote")
            if type(found["skipped"]) is not bool:
                raise ValueError("'skipped' is neither true nor false")
            chosen = self.known(self.index[name], found["chosen"])
            skipped = found["skipped"] and not chosen
            return {"chosen": chosen, "skipped": skipped, "by": found["by"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{path} is not a choice of segments ({reason(error)}); correct or remove it"
            ) from None

    def known(self, i: int, chosen: list[int]) -> list[int]:
        """`chosen`, sorted; raises `ValueError` if it is no list of ids of image `i`."""
        ids = {segment.id for segment in self.scenes.segments(i)}
        if not isinstance(chosen, list) or not all(type(id) is int and id in ids for id in chosen):
            raise ValueError("the chosen ids are not all ids of the image's segments")
        return sorted(set(chosen))

    def save(self, i: int, chosen: list[int], skipped: bool = False, by: str = "hand") -> None:
        """Store a choice. What is chosen is not skipped; neither: as if no choice had been made."""
        name = self.scenes.names[i]
        chosen = self.known(i, chosen)
        if chosen or skipped:
            mask = self.mask(i, chosen)  # first of all: a broken PNG leaves everything as it was
            choice = {"chosen": chosen, "skipped": skipped and not chosen, "by": by}
            save_json(self.jsons / f"{name}.json", choice)
            self.made[name] = choice
            self.draw(name, mask)
            self.start = i
        else:  # the mask is removed first: after a power cut it is drawn again
            self.draw(name, None)
            remove(self.jsons / f"{name}.json")
            self.made.pop(name, None)

    def mask(self, i: int, chosen: list[int]) -> np.ndarray | None:
        """The mask of a choice, uint8 [H, W]; None where nothing is chosen."""
        return self.scenes.mask(i, chosen) if chosen else None

    def draw(self, name: str, mask: np.ndarray | None) -> None:
        """Write a mask, or remove the one that is there."""
        if mask is None:
            remove(self.masks / f"{name}.png")
        else:
            save_png(self.masks / f"{name}.png", mask)

    def get(self, i: int) -> dict:
        """The choice of image `i`; `by` is None where none was made."""
        nothing = {"chosen": [], "skipped": False, "by": None}
        return self.made.get(self.scenes.names[i], nothing)

    def counts(self) -> dict[str, int]:
        """Images labelled by hand, labelled by vote, skipped, and all."""
        kinds = Counter()
        for choice in self.made.values():
            kinds["skipped" if choice["skipped"] else choice["by"]] += 1
        return {kind: kinds[kind] for kind in ("hand", "vote", "skipped")} | {
            "count": len(self.scenes)
        }

    def undone(self, i: int) -> int:
        """The next image after `i`, from the start again, that was not done by hand; else `i`."""
        count = len(self.scenes)
        for j in range(i + 1, i + count):
            if self.get(j % count)["by"] != "hand":
                return j % count
        return i


def remove(path: Path) -> None:
    """Remove a file, if it is there; raises `UserError` where that is not allowed."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path} ({error.strerror})") from None


# ---- Caption vote --------------------------------------------------------------------------------
def plural(phrase: str) -> str:
    """'dog' -> 'dogs', 'park bench' -> 'park benches', 'puppy' -> 'puppies'."""
    if re.search("[^aeiou]y$", phrase):
        return phrase[:-1] + "ies"
    return phrase + ("es" if re.search("(s|x|z|ch|sh)$", phrase) else "s")


def read_words(scenes: Panoptic) -> dict[str, set[str]]:
    """{word or phrase: the categories that it mentions}, for rules 1 and 2.

    A line of the file wins over a plural made by rule, and "-" over both.
    """
    things = {name for name, thing in scenes.categories.values() if thing}
    all_names = {name for name, _ in scenes.categories.values()}
    listed = [(name, name) for name in things]
    nothing = []
    for line in WORDS.read_text("utf-8").split("\n"):
        name, _, words = line.partition(": ")
        phrases = words.split(", ")
        if name == "-":
            nothing += phrases
        elif name in all_names:
            listed += [(phrase, name) for phrase in (name, *phrases)]

    # Later entries of the result win over earlier ones.
    as_listed = {}
    in_plural = {}
    for phrase, name in listed:
        as_listed.setdefault(phrase, set()).add(name)
        in_plural.setdefault(plural(phrase), set()).add(name)
    none = frozenset()
    result = dict.fromkeys(map(plural, nothing), none)
    return result | in_plural | as_listed | dict.fromkeys(nothing, none)


def mentioned(caption: str, words: dict[str, set[str]]) -> set[str]:
    """The categories that a caption mentions; at every place the longest phrase wins."""
    tokens = re.findall("[a-z]+", caption.lower())
    found = set()
    i = 0
    while i < len(tokens):
        for length in (3, 2, 1):
            phrase = " ".join(tokens[i : i + length])
            if phrase in words:
                found |= words[phrase]
                break
        i += length
    return found


def count_votes(captions: list[str], words: dict[str, set[str]]) -> Counter:
    """{category: number of captions that mention it}."""
    return Counter(name for caption in captions for name in mentioned(caption, words))


def score(segment: Segment, votes: int, size: tuple[int, int]) -> float:
    """Rule 5, for an image of size (H, W).

    Distances are shares of each side, not pixels, since salient objects spread with the picture: on
    700 photos of ECSSD the centres of their boxes spread 1.8 times as far across as down (in
    pixels) where the photo is wide (1.4 : 1), and 0.6 times as far where it is tall (1 : 1.4).
    """
    left, top, width, height = segment.box
    across = (left + width / 2) / size[1] - 0.5  # -0.5 to 0.5
    down = (top + height / 2) / size[0] - 0.5
    distance = min(math.hypot(across, down) / math.hypot(0.5, 0.5), 1)  # 1 in a corner
    share = segment.area / (size[0] * size[1])
    return votes * math.sqrt(share) * (1 - distance / 2)


def carries(table: Segment, others: list[Segment]) -> bool:
    """Does the centre of another's box lie in the table's box?"""
    left, top, width, height = table.box
    for x, y, w, h in (other.box for other in others):
        if 0 <= x + w / 2 - left <= width and 0 <= y + h / 2 - top <= height:
            return True
    return False


def judge(
    segments: list[Segment],
    votes: Counter,
    size: tuple[int, int],
    agreement: list[float] | None = None,
) -> list[str]:
    """The verdict on every segment by rules 1 to 5: "chosen", or the first rule that it fails."""
    total = size[0] * size[1]
    verdicts = ["chosen"] * len(segments)

    def left() -> list[Segment]:
        return [s for s, verdict in zip(segments, verdicts) if verdict == "chosen"]

    def strike(verdict: str, fails: Callable[[Segment], bool]) -> None:
        for k, segment in enumerate(segments):
            if verdicts[k] == "chosen" and fails(segment):
                verdicts[k] = verdict

    # Rules 1 and 2: captions mention nothing else (`read_words`).
    strike("not mentioned", lambda s: votes[s.category] < MENTIONS)

    # Rule 3.
    strike("crowd", lambda s: s.crowd)
    strike("small", lambda s: s.area < SMALL * total)
    objects = [s for s in left() if s.category != "dining table"]
    strike("carries others", lambda s: s.category == "dining table" and carries(s, objects))
    largest = Counter()
    for s in left():
        largest[s.category] = max(s.area, largest[s.category])
    strike("small for its kind", lambda s: s.area < KIN * largest[s.category])

    # Rule 4.
    if agreement is not None:
        agrees = dict(zip(segments, agreement))
        strike("map disagrees", lambda s: agrees[s] <= AGREEMENT)

    # Rule 5.
    best = max((score(s, votes[s.category], size) for s in left()), default=0)
    strike("low score", lambda s: score(s, votes[s.category], size) < CUT * best)
    return verdicts


def verdict_on_image(chosen: list[Segment], size: tuple[int, int]) -> str:
    """Rule 6: "kept", or why not."""
    if not chosen:
        return "nothing chosen"
    share = sum(segment.area for segment in chosen) / (size[0] * size[1])
    if share < UNION[0]:
        return "too small"
    if share > UNION[1]:
        return "too large"
    left, top, width, height = np.array([segment.box for segment in chosen]).T
    touched = [
        (left <= 0).any(),
        (top <= 0).any(),
        (left + width >= size[1]).any(),
        (top + height >= size[0]).any(),
    ]
    return "kept" if sum(touched) <= BORDERS else "touches all borders"


def mean_saliency(scenes: Panoptic, i: int, maps: Path) -> list[float]:
    """Rule 4: the mean in [0, 1] of <maps>/<stem>.png over every segment of image `i`."""
    path = maps / f"{scenes.names[i]}.png"
    saliency = np.asarray(load_map(path), np.float64)
    if saliency.shape != scenes.size(i):
        raise UserError(
            f"{path} is {saliency.shape[1]} x {saliency.shape[0]} pixels, but its "
            "photo is not; maps are wanted as --predict writes them"
        )
    labels = scenes.labels(i).astype(np.int64).ravel()
    totals = np.bincount(labels, saliency.ravel())
    counts = np.maximum(np.bincount(labels), 1)
    return (totals / counts / 255)[1:].tolist()  # without void


def vote(
    i: int,
    choices: Choices,
    words: dict[str, set[str]],
    captions: dict[str, list[str]],
    maps: Path | None,
) -> dict:
    """Vote on image `i` unless it was done by hand, and store the choice; its line of the log."""
    scenes = choices.scenes
    name = scenes.names[i]
    if choices.get(i)["by"] == "hand":
        return {"name": name, "verdict": "done by hand", "segments": []}
    if name not in captions:
        return {"name": name, "verdict": "no captions", "segments": []}

    # Judge every segment, then the image.
    segments = scenes.segments(i)
    size = scenes.size(i)
    votes = count_votes(captions[name], words)
    agreement = mean_saliency(scenes, i, maps) if maps else None
    verdicts = judge(segments, votes, size, agreement)
    chosen = [s for s, verdict in zip(segments, verdicts) if verdict == "chosen"]
    image = verdict_on_image(chosen, size)

    # Store the choice; an image that is not kept loses the choice of an earlier vote.
    choices.save(i, [s.id for s in chosen] if image == "kept" else [], by="vote")
    lines = []
    for s, verdict in zip(segments, verdicts):
        line = {"id": s.id, "category": s.category, "votes": votes[s.category]}
        line["score"] = round(score(s, votes[s.category], size), 4)
        line["verdict"] = verdict
        lines.append(line)
    return {"name": name, "verdict": image, "segments": lines}


def run_vote(choices: Choices, maps: Path | None, seed: int) -> None:
    """Vote on every image that was not done by hand; store, log, and count the results."""
    scenes = choices.scenes
    words = read_words(scenes)
    captions = read_captions(scenes.root)
    known = read_known(scenes)
    if not captions.keys() & set(scenes.names):
        raise UserError(
            f"{scenes.root} holds no captions of {scenes.split}; unpack COCO's "
            f"captions_{scenes.split}.json into {scenes.root / 'annotations'}"
        )
    count = len(scenes)
    votes = parallel_map(lambda i: vote(i, choices, words, captions, maps), range(count))
    records = list(progress(votes, "vote", count))

    # Write the log, and print how often each verdict was given.
    log = choices.folder / f"vote-{scenes.split}.jsonl"
    save_text(log, "".join(json.dumps(record) + "\n" for record in records))
    segments = [segment for record in records for segment in record["segments"]]
    for what, items in (("images", records), ("segments", segments)):
        counts = Counter(item["verdict"] for item in items).most_common()
        say(f"{what}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts))
    if known:
        say(compare(choices, known))
    say(f"reasons: {log}")

    # Draw random results, to be judged by eye.
    kept = [i for i, record in enumerate(records) if record["verdict"] == "kept"]
    if kept:
        order = torch.randperm(len(kept), generator=generator("cpu", seed, "contact sheet"))[:24]
        contact_sheet(choices, [kept[k] for k in order], log.with_suffix(".png"))
        say(f"{len(order)} random results: {log.with_suffix('.png')}")


def read_known(scenes: Panoptic) -> dict[str, list[int]]:
    """{stem: ids of the salient segments} from annotations/salient_<split>.json, {} without it.

    Raises `UserError` for a file of another form.
    """
    path = scenes.root / "annotations" / f"salient_{scenes.split}.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        return {name: [int(id) for id in found[name]] for name in scenes.names}
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} does not list the salient ids of every image ({reason(error)}); make it "
            "again, or remove it if the vote is not to be scored"
        ) from None


def compare(choices: Choices, known: dict[str, list[int]]) -> str:
    """Precision and recall of the vote against the known salient segments {stem: ids}."""
    chosen_total = np.zeros(2)  # as segments, as pixels
    right_total = np.zeros(2)
    both_total = np.zeros(2)
    for i, name in enumerate(choices.scenes.names):
        choice = choices.get(i)
        if choice["by"] == "hand":
            continue
        for segment in choices.scenes.segments(i):
            amount = np.array([1, segment.area])
            chosen = segment.id in choice["chosen"]
            right = segment.id in known[name]
            chosen_total += chosen * amount
            right_total += right * amount
            both_total += (chosen and right) * amount
    precision = both_total / np.maximum(chosen_total, 1)
    recall = both_total / np.maximum(right_total, 1)
    return (
        f"against the known salient objects: precision {precision[0]:.3f}, recall {recall[0]:.3f} "
        f"of objects; precision {precision[1]:.3f}, recall {recall[1]:.3f} of pixels"
    )


def contact_sheet(choices: Choices, indices: list[int], path: Path) -> None:
    """Save photos, three in a row, each beside itself with a background in dim blue."""
    cells = []
    blue = torch.tensor([0, 0, 0.5]).view(3, 1, 1)
    for i in indices:
        image = load_image(choices.scenes.photo(i)) / 255  # [3, H, W]
        mask = torch.from_numpy(choices.scenes.mask(i, choices.get(i)["chosen"]))  # [H, W]
        dimmed = 0.3 * image.mean(0, keepdim=True) + blue
        cells += [image, torch.where(mask > 0, image, dimmed)]
    cells += [torch.ones(3, 1, 1)] * (-len(cells) % 6)
    picture_strip(path, [cells[k : k + 6] for k in range(0, len(cells), 6)])


# ---- The page ------------------------------------------------------------------------------------
JSON = "application/json"
HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    (
        "Content-Security-Policy",
        "default-src 'none'; img-src 'self' data:; "
        "connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "frame-ancestors 'none'",
    ),
]


class Refusal(Exception):
    """An answer other than 200: HTTP status and reason."""


class Server(ThreadingHTTPServer):
    """Serves the page and the scenes of one split, on this machine's loopback address only.

    GET  /              the page                GET  /set           progress, where to start
    GET  /scene/<i>     segments and choice     GET  /labels/<i>    uint16 [H, W], little-endian
    GET  /photo/<i>     the photo's file        GET  /undone/<i>    the next image to be done
    POST /scene/<i>     {"chosen": [ids], "skipped": bool} -> progress

    Scenes are asked for by number, so no address names a file. Requests for another host (a
    stranger's name that resolves to 127.0.0.1) or from another origin (a stranger's page) are
    refused, and so is everything malformed or oversized.
    """

    daemon_threads = True

    def __init__(self, choices: Choices, port: int = 8000):
        self.choices = choices
        self.lock = threading.Lock()
        self.captions = read_captions(choices.scenes.root)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on port {port} ({error}); choose another --port"
            ) from None
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]

    def handle_error(self, request, client_address) -> None:
        """A traceback on the terminal, except where the browser just went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection of the `Server`."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds of silence after which a connection is given up

    def do_GET(self) -> None:
        """Answer a request to read."""
        self.answer(self.find)

    def do_POST(self) -> None:
        """Answer a request to store a choice."""
        self.answer(self.store)

    def log_message(self, *args) -> None:
        """Nothing: the terminal is for errors."""

    def answer(self, reply: Callable) -> None:
        """Send what `reply(place, number)` returns, or why it refuses."""
        status = 200
        try:
            self.check_sender()
            match = re.fullmatch(r"/(?:(set)|(scene|labels|photo|undone)/([0-9]{1,9}))?", self.path)
            number = int(match[3] or 0) if match else -1
            if not 0 <= number < len(self.server.choices.scenes):
                raise Refusal(404, "there is nothing here")
            kind, body = reply(match[1] or match[2] or "", number)
        except Refusal as refusal:
            status, text = refusal.args
            kind, body = JSON, {"error": text}
        except (UserError, OSError) as error:  # a broken file: the page shows the sentence
            status = 500
            kind, body = JSON, {"error": str(error)}

        if isinstance(body, dict):
            body = json.dumps(body).encode()
        if status != 200:  # there may be an unread body
            self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        for name, value in HEADERS:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def check_sender(self) -> None:
        """Refuse requests for another host and from another origin."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0] not in self.server.hosts:
            raise Refusal(403, "this server answers to " + " and ".join(self.server.hosts))
        if self.headers.get("Origin") not in (None, f"http://{hosts[0]}"):
            raise Refusal(403, "requests from other pages are refused")

    def find(self, place: str, i: int) -> tuple[str, bytes | dict]:
        """(content type, body) of a GET request."""
        choices = self.server.choices
        scenes = choices.scenes
        if place == "":
            return "text/html; charset=utf-8", PAGE.read_bytes()
        if place == "photo":
            path = scenes.photo(i)
            kind = "image/png" if path.suffix == ".png" else "image/jpeg"
            return kind, path.read_bytes()
        if place == "labels":
            return "application/octet-stream", scenes.labels(i).astype("<u2").tobytes()

        with self.server.lock:
            if place == "set":
                title = {"title": f"COCO {scenes.split}", "start": choices.start}
                return JSON, choices.counts() | title
            if place == "undone":
                return JSON, {"index": choices.undone(i)}
            return JSON, choices.get(i) | {
                "index": i,
                "name": scenes.names[i],
                "size": scenes.size(i),
                "captions": self.server.captions.get(scenes.names[i], []),
                "segments": [segment._asdict() for segment in scenes.segments(i)],
            }

    def store(self, place: str, i: int) -> tuple[str, dict]:
        """Store the choice that a POST request holds."""
        length = self.headers.get("Content-Length", "")
        if place != "scene":
            raise Refusal(405, "only a scene's choice can be stored")
        if self.headers.get_content_type() != JSON:  # what a form on a stranger's page cannot send
            raise Refusal(415, f"a choice is {JSON}")
        if not re.fullmatch("[0-9]{1,9}", length) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "the length of the body is missing")
        if int(length) > BODY:
            raise Refusal(413, f"a choice has {BODY} bytes at most")
        try:
            choice = json.loads(self.rfile.read(int(length)))
            if choice.keys() != {"chosen", "skipped"} or type(choice["skipped"]) is not bool:
                raise ValueError("a choice has the keys chosen and skipped, true or false")
            with self.server.lock:
                self.server.choices.save(i, choice["chosen"], choice["skipped"])
                return JSON, self.server.choices.counts()
        except (ValueError, AttributeError, RecursionError) as error:
            raise Refusal(400, f"not a choice: {error}") from None


# ---- Main ----------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C, or let the captions vote."""
    parser = argparse.ArgumentParser(
        prog="python -m data.relabel", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="its folder COCO holds photos and annotations [data/]",
    )
    parser.add_argument("--split", default="train2017", help="train2017, val2017, … [train2017]")
    parser.add_argument("--only", type=Path, metavar="LIST", help="a text file of stems")
    parser.add_argument("--port", type=int, default=8000, help="of the page; 0 is any [8000]")
    parser.add_argument(
        "--auto",
        action="store_true",
        help="caption vote instead of the page; not for the rows SDG-SOD+, which masks chosen by "
        "captions confound (in the paper such masks are future work)",
    )
    parser.add_argument(
        "--agree", type=Path, metavar="MAPS", help="rule 4: a folder of saliency maps, <stem>.png"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random results to look at [0]")
    args = parser.parse_args(argv)
    only = read_list(args.only) if args.only else None
    choices = Choices(Panoptic(args.data_root / "COCO", args.split, only))
    if args.auto:
        return run_vote(choices, args.agree, args.seed)

    with Server(choices, args.port) as server:
        done = choices.counts()
        say(
            f"{done['count']} images, {done['hand']} labelled by hand, {done['vote']} by vote, "
            f"{done['skipped']} skipped; open http://127.0.0.1:{server.server_port}/\n"
            "every choice is saved at once; Ctrl-C stops"
        )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("stopped; the next start continues here")


if __name__ == "__main__":
    cli(main)

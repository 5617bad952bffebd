"""The sets that `open_set` knows by name: where they lie, how many images, source, terms.

data/README.md tells more about each of them: layout, paper, traps.
"""

import re
from pathlib import Path
from typing import NamedTuple

SPLITS = Path(__file__).parent / "splits"


class Entry(NamedTuple):
    """One registered set.

    origin: its key in SOURCES and TERMS, and its list of splits, data/splits/ORIGIN.txt.
    places: candidates below the data root, tried in turn: FOLDER; FOLDER/PART, what lies below a
            sub-folder whose name starts with PART; FOLDER@SPLIT, the names of some splits;
            or registered names joined with '+'.
    counts: accepted numbers of images; empty where no reliable number is known.
    needs:  what every image must come with.
    sparse: only some frames are annotated, and the others are left out.
    step:   keep every step-th frame of DAVSOD's clips, whose names hold "select".
    """

    origin: str
    places: str
    counts: tuple[int, ...] = ()
    needs: str = "mask"
    sparse: bool = False
    step: int = 1


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
    "COCO-SOD": Entry("COCO", "COCO/train2017", sparse=True),
    "COCO-SOD-val": Entry("COCO", "COCO/val2017", sparse=True),
    "Flickr8k": Entry("Flickr8k", "Flickr8k", (8091,), "caption"),
}

FAN = "https://github.com/DengPingFan/"
LI = "https://chenglongli.cn/Datasets-and-benchmark-code/"
SOURCES = {
    "MSRA-B": "https://mmcheng.net/msra10k/",
    "ECSSD": "https://www.cse.cuhk.edu.hk/leojia/projects/hsaliency/dataset.html",
    "PASCAL-S": "http://cbs.ic.gatech.edu/salobj/",
    "HKU-IS": "https://i.cs.hku.hk/~gbli/deep_saliency.html",
    "DUTS": "http://saliencydetection.net/duts/",
    "DUT-OMRON": "http://saliencydetection.net/dut-omron/",
    **dict.fromkeys(("NJUD", "NLPR", "DUT-RGBD", "RGBD135", "SIP"), FAN + "D3NetBenchmark"),
    **dict.fromkeys(("VT5000", "VT1000", "VT821"), LI),
    "DAVIS": "https://davischallenge.org/davis2016/code.html",
    **dict.fromkeys(("DAVSOD", "SegV2", "FBMS"), FAN + "DAVSOD"),
    "ORSSD": "https://github.com/rmcong/ORSSD-dataset",
    "EORSSD": "https://github.com/rmcong/EORSSD-dataset",
    "ORSI-4199": "https://github.com/wchao1213/ORSI-SOD",
    "COCO": "http://images.cocodataset.org/zips/train2017.zip",
    "Flickr8k": "https://github.com/jbrownlee/Datasets/releases",
}
TERMS = dict.fromkeys(SOURCES, "none stated; cite the paper") | {
    "DUTS": "all rights reserved by the authors; cite the paper",
    "DUT-OMRON": "all rights reserved by the authors; cite the paper",
    "DAVIS": "BSD licence",
    "COCO": "captions CC BY 4.0; the photos keep their Flickr licences",
    "Flickr8k": "non-commercial research and education",
}

# The built-in sets: options of data.shapes.Shapes. Each task has scenes of its own (seed), as the
# public sets have, so that joint training sees more photos and not the same ones again.
SHAPES = {
    "shapes": {},
    "shapes-depth": {"modality": "depth", "seed": 1},
    "shapes-thermal": {"modality": "thermal", "seed": 2},
    "shapes-video": {"modality": "flow", "seed": 3},
    "shapes-top": {"view": "top"},
    "shapes-named": {"named": True},
    "shapes-named-60": {"named": True, "count": 60},
}
SHAPES |= {f"{name}-test": {**options, "split": "test"} for name, options in SHAPES.items()}


def read_split(name: str, splits: str) -> list[str]:
    """The stems (or clips) of the given splits ('train,val') in data/splits/<name>.txt."""
    text = (SPLITS / f"{name}.txt").read_text(encoding="utf-8")
    stems = []
    for split, pattern, words in re.findall(r"^(\w+) (\S+): (.+)", text, re.MULTILINE):
        if split in splits.split(","):
            stems += [pattern.replace("*", word) for word in words.split()]
    return stems


def wrong_count(name: str, images: int) -> str:
    """'700 images instead of 1000', or '' if the number is right or none is known."""
    counts = REGISTRY[name].counts if name in REGISTRY else ()
    if not counts or images in counts:
        return ""
    return f"{images} images instead of {' or '.join(map(str, counts))}"

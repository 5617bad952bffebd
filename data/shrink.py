"""Make a small file of a trained network: the networks in data/networks/ were made by it.

    python -m data.shrink runs/class_net-ECSSD/last.pt data/networks/class_net.pt --data ECSSD

The weights are kept in half precision, which costs less than 0.001 of F. Of the flags those are
kept that hold no path; --data says in a name what the network was trained on. What only training
needs (the optimiser, labels) is left out. The file opens like any checkpoint.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from common import runtime

# Flags that may hold paths of the machine, or that a finished network has no use for.
LEFT_OUT = (
    "out",
    "data_root",
    "backbone_weights",
    "eval",
    "weights",
    "predict",
    "labels",
    "device",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the small file."""
    parser = argparse.ArgumentParser(
        prog="python -m data.shrink",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="last.pt of a finished run")
    parser.add_argument("small", type=Path, help="the file to write")
    parser.add_argument("--data", required=True, help="what it was trained on, as a name")
    args = parser.parse_args(argv)

    saved = runtime.torch_load(args.checkpoint)
    runtime.check_checkpoint(saved, args.checkpoint, saved.get("method"))
    model = {}
    for name, value in saved["model"].items():
        model[name] = value.half() if value.dtype == torch.float32 else value
    flags = {name: value for name, value in saved["args"].items() if "/" not in str(value)}
    runtime.save_checkpoint(
        args.small,
        method=saved["method"],
        stage=saved["stage"],
        epoch=saved["epoch"],
        args=flags | {"data": args.data},
        model=model,
    )
    size = args.small.stat().st_size / 1e6
    runtime.say(f"{args.small}: {size:.1f} MB, {saved['method']} after {saved['epoch']} epochs")


if __name__ == "__main__":
    runtime.cli(main)

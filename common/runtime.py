"""Runtime helpers: errors, device, processes, randomness, atomic files, checkpoints, log, pictures.

Nothing here knows a method. Three rules hold everywhere:

* a problem that a user can solve is a `UserError` with one clear sentence, never a traceback;
* a file is written under a temporary name and renamed, so a reader never meets half a file;
* random numbers come from generators seeded by (seed, purpose, epoch), so a run does not depend on
  how often it was interrupted, on worker threads, or on the number of processes.
"""

import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as TF


# ---- Errors and the command line -------------------------------------------------------------
class UserError(Exception):
    """One clear sentence: which file or flag, what is wrong, what to do."""


def cli(main: Callable) -> None:
    """Run `main()` as a program: a `UserError` becomes one line on stderr and exit status 1."""
    for stream in (sys.stdout, sys.stderr):  # the terminal may lack letters of a file's name
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; a training continues with --resume from its last finished epoch")
    finally:
        if dist.is_initialized():
            time.sleep(0.1)  # torch 2.6 hangs if gloo's thread still waits for the interpreter lock
            dist.destroy_process_group()


def progress(items: Iterable, text: str, total: int | None = None) -> Iterator:
    """Yield `items`; a live line on a terminal, else one line at the end, and only from rank 0."""
    total = len(items) if total is None else total
    start, live = time.time(), sys.stderr.isatty()
    silent = dist.is_initialized() and dist.get_rank() > 0
    for done, item in enumerate(items, 1):
        yield item
        if live and not silent:
            rate = done / (time.time() - start + 1e-9)
            print(f"\r{text} {done}/{total} ({rate:.1f}/s)  ", end="", file=sys.stderr, flush=True)
    if not silent:
        line = f"{text}: {total} in {time.time() - start:.1f} s"
        print("\r" * live + line.ljust(live * (len(text) + 30)), file=sys.stderr)


def parallel_map(function: Callable, items: Iterable, processes: bool = False) -> Iterator:
    """`map` on all cores, results in order.

    Threads do where decoding and resizing take the time, for these release the interpreter lock.
    Many small steps hold it: for them `processes` asks for forked processes, used where forking is
    safe (Linux); `function`, its items and its results must then be picklable.
    """
    linux, items = sys.platform == "linux", list(items)
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    cores = max(1, min(cores, len(items)))
    if processes and linux:
        pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"))
    else:
        pool = ThreadPoolExecutor(cores)
    with pool:
        yield from pool.map(function, items, chunksize=min(8, len(items) // cores + 1))


# ---- Device, precision, randomness -----------------------------------------------------------
def pick_device(name: str = "auto") -> tuple[torch.device, str]:
    """(device, reason). `name`: auto (CUDA, else CPU), cpu, cuda, cuda:1, mps (not tested)."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    torch.backends.cudnn.allow_tf32 = False  # losses are to be fp32, and the rest is bf16 anyway
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu"), f"no CUDA device found, {torch.get_num_threads()} CPU threads"
    try:
        device = torch.device("cuda", local) if name in ("auto", "cuda") else torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); "
            "use fewer processes, or --device cpu"
        ) from None
    return (
        device,
        f"{torch.cuda.get_device_name(device)} found" if name == "auto" else "chosen by --device",
    )


def autocast(device: torch.device, amp: str):
    """bf16 autocast if `amp` is 'bf16', or 'auto' on a GPU that has bf16; else does nothing."""
    on = amp == "bf16" or (
        amp == "auto"
        and device.type == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.autocast(device.type, torch.bfloat16) if on else nullcontext()


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A torch generator whose stream depends on `key` alone, for example (seed, 'drop', epoch)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:6], "little"))


# ---- Processes (torchrun) --------------------------------------------------------------------
@dataclass(frozen=True)
class World:
    """The processes of a torchrun job; one process without torchrun."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """True in the process that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """Every size-th item, starting at this process's rank."""
        return items[self.rank :: self.size]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value) -> list:
        """`value` of every process (any picklable object), in rank order."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def average_statistics(self, net: torch.nn.Module) -> None:
        """Give every process the mean of all processes' running statistics, of modules in training.

        Without it each would evaluate with statistics of its own samples.
        """
        for module in net.modules() if self.size > 1 else ():
            for name in ("running_mean", "running_var"):
                statistic = getattr(module, name, None)
                if module.training and statistic is not None:
                    dist.all_reduce(statistic)
                    statistic /= self.size

    def parallel(self, net: torch.nn.Module) -> torch.nn.Module:
        """The network itself, or wrapped so that its gradients are averaged over the processes."""
        if self.size == 1:
            return net
        net = torch.nn.parallel.DistributedDataParallel(net)
        net.broadcast_buffers = False  # else all get rank 0's BatchNorm statistics before each step
        return net


def join_world(device: torch.device) -> World:
    """Join the torchrun job that the environment describes, if any (nccl on CUDA, else gloo)."""
    if "RANK" not in os.environ:
        return World()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


# ---- Files -----------------------------------------------------------------------------------
def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """`write(temporary path)`, then rename to `path`; parent folders are made."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); "
            "choose another place or free some space"
        ) from None


def save_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8 atomically."""
    write_atomic(path, lambda part: part.write_text(text, "utf-8", "backslashreplace"))


def save_json(path: str | Path, value) -> None:
    """Write JSON atomically."""
    save_text(path, json.dumps(value, indent=2) + "\n")


def save_csv(path: str | Path, rows: Iterable[Sequence]) -> None:
    """Write rows of a table as comma-separated values atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    save_text(path, text.getvalue())


def save_png(path: str | Path, pixels: torch.Tensor | np.ndarray) -> None:
    """Write uint8 [H, W], [H, W, 3] or [H, W, 4] as PNG atomically."""
    pixels = np.asarray(pixels)
    write_atomic(path, lambda part: Image.fromarray(pixels).save(part, "PNG"))


def sha256(path: str | Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if sys.version_info >= (3, 11)
            else hashlib.sha256(file.read()).hexdigest()
        )


def torch_load(path: str | Path) -> dict:
    """`torch.load` of tensors and plain values only, on the CPU; raises `UserError`."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, no dict")
        if not all(isinstance(key, str) for key in found):
            raise TypeError("its keys are no names")
        return found
    except Exception as error:  # zip, pickle, and unicode errors of many kinds
        raise UserError(
            f"{path} is not a readable file of tensors "
            f"({str(error).splitlines()[0][:80]}); fetch or make it again"
        ) from None


def load_state(
    module: torch.nn.Module, state: dict, source: str | Path, surplus: tuple[str, ...] = ()
) -> None:
    """Strict `load_state_dict` that accounts for every key.

    surplus: prefixes of keys that the file may have and `module` does not need (a classifier).
    Raises `UserError` that names missing, unexpected and misshapen keys.
    """
    own = module.state_dict()
    state = {
        key: value
        for key, value in state.items()
        if key in own or not key.startswith(surplus or ("\0",))
    }
    # BatchNorm's batch counters appeared in torch 0.4.1: older files lack them, nothing uses them
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    wrong = {
        "missing": missing,
        "unexpected": [k for k in state if k not in own],
        "of another shape": [k for k in own if k in state and state[k].shape != own[k].shape],
    }
    if any(wrong.values()):
        found = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' * (len(keys) > 3)})"
            for what, keys in wrong.items()
            if keys
        )
        raise UserError(f"{source} holds the weights of another network: keys {found}")
    module.load_state_dict({**own, **state})


def save_checkpoint(path: str | Path, **content) -> None:
    """Write a dict of tensors and plain values that `torch.load(weights_only=True)` reads."""
    write_atomic(path, lambda part: torch.save(content, part))


def load_checkpoint(path: str | Path, method: str, stage: str | None = None) -> dict:
    """Read a checkpoint of `method` (and `stage`); raises `UserError` for anything else."""
    found = torch_load(path)
    of = found.get("method"), found.get("stage")
    if of[0] is None:
        raise UserError(
            f"{path} is not a checkpoint of this project (a backbone's weights go to "
            "--backbone-weights)"
        )
    if of[0] != method or stage not in (None, of[1]):
        raise UserError(
            f"{path} is a checkpoint of {of[0]} stage {of[1]}, "
            f"not of {method}{f' stage {stage}' if stage else ''}"
        )
    return found


# ---- Log and pictures ------------------------------------------------------------------------
def environment() -> dict:
    """Versions, git commit and processor: what a reader needs to repeat a run."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except OSError:
        commit = ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit or "unknown",
    }


def require_finite(loss: float, epoch: int) -> None:
    """Raise `UserError` if an epoch's mean loss is not a number, before a checkpoint is written."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of epoch {epoch} is not a number; the checkpoint of epoch "
            f"{epoch - 1} is kept: start again with a lower --lr"
        )


class Log:
    """One line per epoch on the terminal and one JSON object per epoch in `log.jsonl`."""

    def __init__(self, folder: Path, epochs: int, done: int = 0, quiet: bool = False):
        self.path, self.epochs, self.done, self.quiet = folder / "log.jsonl", epochs, done, quiet
        self.start = self.last = time.time()
        if not quiet:  # a resumed run forgets what came after its checkpoint
            kept = self.path.read_text().splitlines() if done and self.path.exists() else []
            kept = [
                line + "\n"
                for line in kept  # a crash may have cut the last line
                if line.endswith("}") and json.loads(line)["epoch"] <= done
            ]
            save_text(self.path, "".join(kept))

    def epoch(self, epoch: int, images: int, **values: float) -> None:
        """Report epoch number `epoch` (from 1), which saw `images` images, with its `values`."""
        now = time.time()
        rate, left = images / (now - self.last), self.epochs - epoch
        eta = (now - self.start) / max(epoch - self.done, 1) * left
        memory = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0) / 1e9
        self.last = now
        if self.quiet:
            return
        shown = " | ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(
            f"epoch {epoch:2d}/{self.epochs} | {shown} | {rate:.0f} img/s"
            + f" | {memory:.1f} GB" * (memory > 0)
            + f" | eta {eta // 60:.0f}m{eta % 60:02.0f}s",
            flush=True,
        )
        record = {"epoch": epoch, **values, "images_per_s": rate, "memory_gb": memory}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def picture_strip(path: str | Path, rows: list[list[torch.Tensor]], side: int = 160) -> None:
    """Save rows of pictures side by side: each float [C, H, W] in [0, 1] with C = 1 or 3."""
    cells = [
        torch.cat(
            [TF.resize(p.float().cpu().clamp(0, 1).expand(3, -1, -1), [side, side]) for p in row], 2
        )
        for row in rows
    ]
    save_png(path, (torch.cat(cells, 1) * 255 + 0.5).byte().permute(1, 2, 0))

"""Runtime helpers: errors, device, processes, randomness, atomic files, checkpoints, log, pictures.

Nothing here knows a method. Three rules hold everywhere:

* a problem that a user can solve is a `UserError` with one clear sentence, never a traceback;
* a file is written under a temporary name and renamed, so a reader never meets half a file;
* random numbers come from generators seeded by (seed, purpose, epoch), so a run does not depend on
  how often it was interrupted, on worker threads, or on the number of processes.
"""

import argparse
import collections
import csv
import hashlib
import io
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as TF

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# ---- Errors and the command line -----------------------------------------------------------------
class UserError(Exception):
    """One clear sentence: which file or flag, what is wrong, what to do."""


def cli(main: Callable) -> None:
    """Run `main()` as a program: a `UserError` becomes one line on stderr and exit status 1."""
    for stream in (sys.stdout, sys.stderr):  # the terminal's encoding may lack characters of a name
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; a training continues with --resume from its last finished epoch")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(
            f"error: out of memory ({first_line(error)}); use a smaller --batch-size or --size, or "
            "smaller pictures"
        )
    finally:
        if dist.is_initialized():
            time.sleep(0.1)  # torch 2.6 hangs if gloo's thread still waits for the interpreter lock
            dist.destroy_process_group()


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the computer's or the GPU's memory is full."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error)
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type if it has no text."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def say(text: str, error: bool = False, end: str = "\n") -> None:
    """Print a line on stdout, or on stderr if `error`, from rank 0 only.

    A pipe that was closed (`| head -1`) or a log file on a full disk must not stop a training: from
    then on nothing is printed.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Let everything that is still written to a closed pipe or a full disk vanish."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress(items: Iterable, text: str, total: int | None = None) -> Iterator:
    """Yield `items`; a live line on a terminal, else one line at the end, and only from rank 0."""
    total = len(items) if total is None else total
    live = sys.stderr.isatty()
    start = time.time()
    for done, item in enumerate(items, 1):
        yield item
        if live:
            rate = done / (time.time() - start + 1e-9)
            say(f"\r{text} {done}/{total} ({rate:.1f}/s)  ", error=True, end="")

    line = f"{text}: {total} in {time.time() - start:.1f} s"
    if live:  # write over the live line
        line = "\r" + line.ljust(len(text) + 30)
    say(line, error=True)


def parallel_map(function: Callable, items: Iterable, processes: bool = False) -> Iterator:
    """`map` on all cores, results in order; items are taken and worked on a little ahead.

    Threads do where decoding and resizing take the time, for these release the interpreter lock.
    Many small steps hold it: for them `processes` asks for forked processes, used where forking is
    safe (Linux); `function`, its items and its results must then be picklable.
    """
    linux = sys.platform == "linux"
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    if processes and linux:
        pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"))
    else:
        pool = ThreadPoolExecutor(cores)
    waiting = collections.deque()
    with pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            # Results that a slower reader has not taken yet must not pile up: 400 of 3 MB read at
            # 500 per second took 0.8 GB on two cores when all were submitted at once, now 0.1 GB.
            if len(waiting) >= 4 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---- Device, precision, randomness ---------------------------------------------------------------
def pick_device(name: str = "auto") -> tuple[torch.device, str]:
    """(device, reason). `name`: auto (CUDA, else CPU), cpu, cuda, cuda:1, mps (not tested)."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    torch.backends.cudnn.allow_tf32 = False  # losses are to be fp32, and the rest is bf16 anyway
    torch.backends.cudnn.benchmark = True  # sizes are the same in every step, or a handful
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu"), f"no CUDA device found, {torch.get_num_threads()} CPU threads"
    try:
        device = torch.device("cuda", local) if name in ("auto", "cuda") else torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({first_line(error)}); "
            "use fewer processes, or --device cpu"
        ) from None
    if name == "auto":
        return device, f"{torch.cuda.get_device_name(device)} found"
    return device, "chosen by --device"


def be_deterministic() -> None:
    """Choose deterministic kernels where torch has them; it warns where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def precision(device: torch.device, amp: str) -> torch.dtype | None:
    """The type that --amp stands for on this device; None for fp32 throughout.

    auto: bf16 on a GPU that has it, fp16 on an older one, fp32 elsewhere. bf16 on a processor
    without such instructions would be emulated, 13 times slower than fp32: there it is fp32, too.
    """
    if amp == "fp16":
        return torch.float16
    if device.type == "cuda" and amp != "off":
        modern = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if modern else torch.float16
    if amp == "bf16":
        computes_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        if computes_bf16 and computes_bf16():
            return torch.bfloat16
    return None


def autocast(device: torch.device, amp: str):
    """Autocast to the type that `precision` gives, or a context that does nothing."""
    dtype = precision(device, amp)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A torch generator whose stream depends on `key` alone, for example (seed, 'drop', epoch)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:6], "little"))


# ---- Processes (torchrun) ------------------------------------------------------------------------
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


# ---- Files ---------------------------------------------------------------------------------------
def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """`write(temporary path)`, then rename to `path`; parent folders are made.

    A symbolic link stays one: what it points to is written. A device (/dev/stdout) is written to
    directly. Raises `UserError` if the disk is full or the place cannot be written.
    """
    path = Path(path)
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():  # a device or a pipe; a folder is refused
            write(target)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            write(part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); "
            "choose another place or free some space"
        ) from None


_LOCKS = {}  # the open lock files of this process by folder: the system frees them when it ends


def lock(folder: Path, flag: str = "--out") -> None:
    """Take `folder` for this process until it ends; raises `UserError` if another process has it.

    flag: what chose the folder, for the sentence of the error.
    Does nothing where the system has no such locks (Windows).
    """
    key = os.path.realpath(folder)
    if fcntl is None or key in _LOCKS:
        return
    path = Path(folder, ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another {flag}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is writing to {folder}: wait for it, or give another {flag}"
        ) from None
    except OSError:  # a file system without locks
        pass
    _LOCKS[key] = file


def remove_parts(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a run folder."""
    for part in Path(folder).glob("**/.*.part"):
        part.unlink(missing_ok=True)


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
    """Write uint8 [H, W], [H, W, 3] or [H, W, 4] as PNG atomically.

    Level 2 writes photos 3.3 times as fast as Pillow's usual 6, in files that are 3 % larger; maps
    1.6 times as fast, 12 % larger.
    """
    picture = Image.fromarray(np.asarray(pixels))
    write_atomic(path, lambda part: picture.save(part, "PNG", compress_level=2))


# What a numpy number (the best score so far) is made by. numpy 1 calls the module numpy.core. No
# object but numbers is made: dtypes of other kinds are not in the list.
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_SCALARS = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhilfd"),
]


def torch_load(path: str | Path) -> dict:
    """`torch.load` of a dict of tensors and plain values, on the CPU; no other object is made.

    What many training scripts store beside the weights, an argparse.Namespace of settings or a
    number of numpy's, is a plain value, too. Raises `UserError` that names an object which is not
    loaded for safety's sake.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *NUMPY_SCALARS]):
            with warnings.catch_warnings():  # TorchScript has a long one of its own
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); fetch it again") from None
    except Exception as error:  # zip, pickle, and unicode errors of many kinds
        if out_of_memory(error):
            raise
        raise UserError(f"{path} {why_unreadable(path, error)}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path} does not hold a dict of named tensors")
    return found


def why_unreadable(path: str | Path, error: Exception) -> str:
    """What a file is that `torch.load` refused with `error`, and what to do about it."""
    with open(path, "rb") as file:
        start = file.read(100)
    expected = "a state_dict saved with torch.save is expected"
    if not start:
        return "is empty; fetch or make it again"
    if b"NUMPY" in start or b".npy" in start:
        return f"is a file of numpy arrays; {expected}"
    if "TorchScript" in str(error):
        return f"is a TorchScript archive; {expected}: that of torch.jit.load(FILE).state_dict()"
    objects = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if objects:
        return (
            f"holds an object that could run code when it is loaded ({objects[0]}); save its "
            "weights alone: torch.save(checkpoint['state_dict'], FILE)"
        )
    if not start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is no file that torch.save wrote; fetch it again"
    return f"is not a readable file of tensors ({first_line(error)[:80]}); fetch or make it again"


def load_state(
    module: torch.nn.Module, state: dict, source: str | Path, surplus: tuple[str, ...] = ()
) -> None:
    """Strict `load_state_dict` that accounts for every key.

    surplus: prefixes of keys that the file may have and `module` does not need (a classifier).
    Raises `UserError` that names missing, unexpected and misshapen keys, and those without floats.
    """
    own = module.state_dict()
    wanted = {}
    for key, value in state.items():
        if key in own or not key.startswith(surplus):
            wanted[key] = value
    common = [key for key in own if key in wanted]

    # BatchNorm's batch counters appeared in torch 0.4.1: older files lack them, nothing uses them.
    missing = [key for key in own if key not in wanted and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in wanted if key not in own]
    problems = {"missing": missing, "unexpected": unexpected}
    for key in common:
        problem = misfit(own[key], wanted[key])
        if problem:
            problems.setdefault(problem, []).append(key)
    told = []
    for problem, keys in problems.items():
        if keys:
            more = ", …" if len(keys) > 3 else ""
            told.append(f"{len(keys)} {problem} ({', '.join(keys[:3])}{more})")
    if told:
        raise UserError(f"{source} holds the weights of another network: keys {'; '.join(told)}")

    for key in common:
        if wanted[key].is_floating_point() and not wanted[key].isfinite().all():
            raise UserError(f"{source} is damaged: {key} holds values that are not finite numbers")
    module.load_state_dict({**own, **wanted})


def misfit(own: torch.Tensor, given: object) -> str:
    """What keeps `given` from replacing a tensor of a network; '' if nothing does."""
    if not isinstance(given, torch.Tensor) or given.layout is not torch.strided or given.is_meta:
        return "that are no tensors"  # nor are sparse ones, and those without memory
    if given.shape != own.shape:
        return "of another shape"
    if own.is_floating_point() and not given.is_floating_point():
        return "that are no floating-point numbers"
    return ""


def save_checkpoint(path: str | Path, **content) -> None:
    """Write a dict of tensors and plain values that `torch.load(weights_only=True)` reads."""
    memory = io.BytesIO()  # on a full disk torch.save itself would raise an error without a reason
    torch.save(content, memory)
    write_atomic(path, lambda part: part.write_bytes(memory.getbuffer()))


def load_checkpoint(path: str | Path, method: str, stage: int | str | None = None) -> dict:
    """Read a checkpoint of `method` (and `stage`); see `check_checkpoint`."""
    return check_checkpoint(torch_load(path), path, method, stage)


CHECKPOINT = {"method": str, "stage": (int, str), "epoch": int, "args": dict, "model": dict}


def check_checkpoint(
    found: dict, path: str | Path, method: str, stage: int | str | None = None
) -> dict:
    """`found`, if it is a checkpoint of `method` (and `stage`); else a `UserError`.

    Then it has all that `CHECKPOINT` names, of the right types; "args" are plain values.
    """
    if "method" not in found:
        raise UserError(
            f"{path} is not a checkpoint of this project (a backbone's weights go to "
            "--backbone-weights)"
        )
    wrong = [name for name, kind in CHECKPOINT.items() if not isinstance(found.get(name), kind)]
    if not wrong and not is_plain(found["args"]):
        wrong.append("args")
    if not wrong and found["epoch"] < 0:
        wrong.append("epoch")
    if wrong:
        raise UserError(
            f"{path} is a damaged checkpoint ({', '.join(wrong)} missing or of a wrong type); make "
            "it again"
        )
    if found["method"] != method or stage not in (None, found["stage"]):
        wanted = method if stage is None else f"{method} stage {stage}"
        raise UserError(
            f"{path} is a checkpoint of {found['method']} stage {found['stage']}, not of {wanted}"
        )
    return found


def is_plain(value: object) -> bool:
    """Whether a value consists of texts, numbers, lists and dicts alone, as in a file of JSON."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


# ---- A run's surroundings and pictures -----------------------------------------------------------
def environment(device: torch.device) -> dict:
    """What a reader needs to repeat a run: date, versions, git commit, processor or GPU."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip()
    except OSError:
        commit = ""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": machine,
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def picture_strip(
    path: str | Path, rows: list[list[torch.Tensor]], size: Sequence[int] = (160, 160)
) -> None:
    """Save rows of pictures side by side, each resized to `size` (height, width).

    A picture is float [C, H, W] in [0, 1] with C = 1 or 3; all rows have the same number of them.
    """
    strips = []
    for row in rows:
        cells = [p.float().cpu().clamp(0, 1).expand(3, -1, -1) for p in row]
        strips.append(torch.cat([TF.resize(cell, list(size)) for cell in cells], 2))
    save_png(path, (torch.cat(strips, 1) * 255 + 0.5).byte().permute(1, 2, 0))

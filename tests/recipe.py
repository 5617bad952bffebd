"""Numbers that anyone can make again from a name: weights and inputs of the parity tests.

The released networks were filled with `weights(key, shape)` for each of their state-dict keys and
run on `photos(...)`; a sample of what came out lies in tests/reference/. A network of ours that
gives the same numbers is the same function: the authors' checkpoints load and give their maps.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

REFERENCE = Path(__file__).parent / "reference"


def unit(key: str, count: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1) that depend on the key's CRC alone."""
    phase = zlib.crc32(key.encode()) % 1000
    turn = np.arange(1, count + 1, dtype=np.float64) * 12.9898
    wave = np.abs(np.sin(turn + phase) * 43758.5453)
    return wave - np.floor(wave)


def weights(key: str, shape: list[int], he: tuple[str, ...] = ()) -> torch.Tensor:
    """The value of state-dict entry `key`; `he`: prefixes of kernels of variance 2 / fan in."""
    count = math.prod(shape)
    u = unit(key, count)
    v = 2 * u - 1
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if key.endswith("running_var"):
        value = 1 + 0.5 * u
    elif key.endswith("gamma"):  # the scalars of CLASS's attention
        value = np.full(count, 0.5)
    elif key.endswith(("running_mean", "bias")):
        value = 0.1 * v
    elif len(shape) == 1:
        value = 1 + 0.1 * v
    else:
        value = v * math.sqrt((6 if he and key.startswith(he) else 3) / (count / shape[0]))
    return torch.from_numpy(value.reshape(shape)).float()


def grid(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Coordinates b, c, y, x of every element."""
    return np.meshgrid(*[np.arange(n, dtype=np.float64) for n in shape], indexing="ij")


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """White noise in [0, 1)."""
    return unit("input:" + name, math.prod(shape)).reshape(shape)


def waves(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Smooth waves with a little noise, in [0, 1]."""
    b, c, y, x = grid(shape)
    h, w = shape[2:]
    wave = np.sin(2 * np.pi * (1.3 + 0.4 * (c % 3)) * x / w + 0.7 * b + 0.9 * (c // 3))
    wave += np.cos(2 * np.pi * (0.9 + 0.3 * (c % 3)) * y / h - 0.5 * c)
    return torch.from_numpy(0.5 + 0.22 * wave + 0.06 * (noise(name, shape) - 0.5)).float()


def photos(name: str, h: int, w: int) -> torch.Tensor:
    """Two pictures [2, 3, h, w] in [0, 1]: white noise, and smooth waves with a little noise."""
    shape = (1, 3, h, w)
    return torch.cat([torch.from_numpy(noise(name, shape)).float(), waves(name, shape)])


def disk(shape: tuple[int, ...]) -> torch.Tensor:
    """Discs with a linear edge four pixels wide, [B, 1, h, w] in [0, 1]."""
    b, _, y, x = grid(shape)
    h, w = shape[2:]
    distance = np.sqrt((y - (0.42 + 0.1 * b) * h) ** 2 + (x - (0.55 - 0.12 * b) * w) ** 2)
    return torch.from_numpy(np.clip(0.5 + (0.28 * min(h, w) - distance) / 4, 0, 1)).float()


def logits(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Plausible logits for `disk`."""
    b, _, y, x = grid(shape)
    h, w = shape[2:]
    distance = np.sqrt((y - (0.46 + 0.1 * b) * h) ** 2 + (x - (0.51 - 0.12 * b) * w) ** 2)
    values = (0.30 * min(h, w) - distance) / 5 + 1.5 * (2 * noise(name, shape) - 1)
    return torch.from_numpy(values).float()


def reference(name: str) -> tuple[dict, dict]:
    """(description, sampled outputs) of a released network."""
    description = json.loads((REFERENCE / f"{name}.json").read_text())
    return description, dict(np.load(REFERENCE / f"{name}.npz"))


def error(name: str, output: str, value: torch.Tensor) -> float:
    """max |ours - theirs| / max |theirs| over the stored elements of an output."""
    description, arrays = reference(name)
    shape, stride = description["outputs"][output]
    assert list(value.shape) == shape
    ours = value.detach().reshape(-1)[::stride].double().numpy()
    theirs = arrays[output].astype(np.float64)
    return np.abs(ours - theirs).max() / np.abs(theirs).max()

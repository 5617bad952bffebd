"""Weighted F of a saliency map [Margolin, CVPR 2014]: F with errors weighted by their place.

With the error E = |t - G| of a map t in [0, 1] and a mask G:
* On the background an error costs (2 - 2^(-d / 5)) E, d = distance to the foreground: a stray blob
  costs up to twice as much as a soft edge.
* On the foreground it costs min(E, blurred E): an error among correct pixels is cheap. For the
  blur (7x7 Gaussian, sigma 5, 0 outside the image) a background pixel takes the E of its nearest
  foreground pixel; of several, of the leftmost, then of the topmost.

TP = foreground area - foreground cost, FP = background cost, P = TP / (TP + FP), R = TP / area, and
wF = 2 P R / (P + R).

The work is in the distances. A pass over the columns gives each pixel's distance to the foreground
in its column. From these, `near_search` finds the nearest foreground pixel of every pixel within
reach of the blur, and `far_search` the distance of the wrong pixels farther away, usually few.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

EPS = 2.0**-52
FAR = 16_000  # gap of a column without foreground; 2 FAR fits int16
REACH = 4  # columns that `near_search` looks to either side
BEYOND = (REACH + 1) ** 2  # its d^2 for anything farther away
GAUSS = [math.exp(-i * i / (2 * 5 * 5)) for i in range(-3, 4)]


def weighted_f(pred: Tensor, gt: Tensor, low: int, high: int) -> float:
    """Weighted F of one image on the CPU: pred uint8 [H, W], gt bool [H, W].

    low, high: the grey levels of t = 0 and t = 1. 0 for an empty mask. Raises ValueError for images
    of 16,000 pixels or more on a side.
    """
    if max(gt.shape) >= FAR:
        raise ValueError(f"weighted F needs sides below {FAR} pixels, not {tuple(gt.shape)}")
    in_row, in_col = (gt.sum(axis, dtype=torch.int32) for axis in (1, 0))
    n_fg = int(in_row.sum())
    if n_fg == 0:
        return 0.0
    rows, cols = bounds(in_row), bounds(in_col)  # the box around G: [h, w]
    gap = column_gap(gt[:, cols])  # [H, w]
    near = near_search(gap[rows])  # [h, w]

    # Background. Only wrong pixels cost, in most maps a few per cent of all. E in grey levels.
    error = (pred - low) * ~gt
    wrong = indices(error.bool())  # [K]
    d2 = torch.full(gt.shape, BEYOND, dtype=torch.int32)
    d2[rows, cols] = near >> 4
    d2 = d2.take(wrong)
    far = indices(d2 == BEYOND)  # [L], of the K
    pixel = wrong[far].int()
    d2[far] = far_search(gap, pixel // gt.shape[1], pixel % gt.shape[1] - cols.start)
    cost = error.take(wrong) * (2 - torch.exp2(-d2.double().sqrt() / 5))
    fp = cost.sum().item() / (high - low)

    # Foreground. The blur sees 3 pixels around it, which lie in the box and within REACH.
    gt, gap = gt[rows, cols], gap[rows]  # [h, w]
    error = ((high - pred[rows, cols]) * gt).double()  # 0 on the background
    around = indices((near < 16 * BEYOND) & ~gt)  # [M]
    beside = around + (near.take(around) & 15) - REACH  # in the nearest's column
    rise = gap.take(beside).long() * gt.shape[1]  # from there to the nearest
    above, below = beside - rise, beside + rise
    nearest = torch.where((above >= 0) & gt.take(above.clamp(min=0)), above, below)
    spread = error.clone().put_(around, error.take(nearest))
    tp = n_fg - torch.minimum(error, blur(spread)).sum().item() / (high - low)

    recall, precision = tp / n_fg, tp / (tp + fp + EPS)
    return 2 * recall * precision / (recall + precision + EPS)


def indices(where: Tensor) -> Tensor:
    """Where a bool tensor is true: int64 [K], positions in the flattened tensor, ascending."""
    return torch.from_numpy(np.flatnonzero(where.numpy()))  # 3 times as fast as nonzero


def bounds(line: Tensor) -> slice:
    """From the first to the last non-zero entry of `line` [L], and 3 more where there is room."""
    used = line.nonzero()
    return slice(max(int(used[0]) - 3, 0), int(used[-1]) + 4)


def column_gap(gt: Tensor) -> Tensor:
    """Distance to the nearest foreground pixel in the same column: bool [H, w] -> int16 [H, w]."""
    gap = (~gt).to(torch.int16) * FAR
    step = 1
    while step < len(gap):  # after this pass, gaps below 2 step are final
        longer = gap + step
        torch.minimum(gap[step:], longer[:-step], out=gap[step:])
        torch.minimum(gap[:-step], longer[step:], out=gap[:-step])
        step *= 2
    return gap


def near_search(gap: Tensor) -> Tensor:
    """Nearest foreground within REACH columns: int16 [h, w] -> int16 16 d^2 + (offset + REACH).

    offset: its column minus that of the pixel. d^2 is exact below BEYOND. The minimum of such
    numbers is the nearest pixel, as the 9 offsets fit below 16, and the leftmost of equally near.
    """
    width = gap.shape[1]
    gap = gap.clamp(max=REACH + 1)
    squares = pad(16 * gap * gap, (REACH, REACH), value=16 * BEYOND)  # `** 2` is slow for integers
    key = torch.full_like(gap, 16 * BEYOND)
    for i in range(2 * REACH + 1):
        torch.minimum(key, squares[:, i : i + width] + (16 * (i - REACH) ** 2 + i), out=key)
    return key


def far_search(gap: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Exact d^2 of the pixels (y, x): the minimum of gap[y, c]^2 + (c - x)^2 over all columns c.

    gap int16 [H, w], y and x int32 [K] -> int32 [K].
    """
    c = torch.arange(gap.shape[1], dtype=torch.int32)
    curve = torch.addcmul(c * c, gap.int(), gap.int())  # [H, w]
    d2 = x * x
    step = 2**17 // len(c) + 1  # a block fits the cache
    for block in (slice(i, i + step) for i in range(0, len(x), step)):
        costs = curve.index_select(0, y[block])  # [step, w]
        d2[block] += costs.addcmul_(x[block, None], c, value=-2).amin(1)  # curve - 2xc
    return d2


def blur(image: Tensor) -> Tensor:
    """7x7 Gaussian of sigma 5 with zeros outside: float64 [h, w] -> [h, w]."""
    wide = pad(image, (3, 3, 3, 3))
    for axis, size in enumerate(image.shape):
        total = torch.zeros_like(wide.narrow(axis, 0, size))
        for i, weight in enumerate(GAUSS):
            total.add_(wide.narrow(axis, i, size), alpha=weight / sum(GAUSS))
        wide = total
    return wide

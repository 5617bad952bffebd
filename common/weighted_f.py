"""Weighted F of a saliency map [Margolin, CVPR 2014]: F with errors weighted by their place.

With the error E = |t - G| of a map t in [0, 1] and a mask G:

* On the background an error costs (2 - 2^(-d / 5)) E, where d is the distance to the foreground: a
  wrong region far from the object costs up to twice as much as a soft edge.
* On the foreground it costs min(E, blurred E): an error among correct pixels is cheap. For the
  blur (7x7 Gaussian, sigma 5, 0 outside the image) a background pixel takes the E of its nearest
  foreground pixel; if several are equally near, that of the leftmost, then of the topmost.

TP = foreground area - foreground cost, FP = background cost, P = TP / (TP + FP), R = TP / area, and
wF = 2 P R / (P + R).

Most of the time goes into the distances. Three steps keep it short:

* `column_gap` gives every pixel its distance to the foreground within its own column.
* `near_search` compares the gaps of the 9 columns around a pixel. That is enough for the blur and
  for the pixels close to the object.
* `far_search` compares all columns. Only the wrong pixels far from the object need it, and these
  are few in most maps.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

EPS = 2.0**-52
FAR = 16_000  # the gap of a column without foreground; 2 FAR fits int16
REACH = 4  # `near_search` compares this many columns on either side
OFFSET = torch.arange(-REACH, REACH + 1, dtype=torch.int16)  # of these columns
BEYOND = (REACH + 1) ** 2  # stands for every d^2 that `near_search` cannot know
GAUSS = [math.exp(-i * i / (2 * 5 * 5)) for i in range(-3, 4)]


def weighted_f(pred: Tensor, gt: Tensor, low: int, high: int) -> float:
    """Weighted F of one image on the CPU: pred uint8 [H, W], gt bool [H, W].

    low, high: the grey levels of t = 0 and t = 1. Returns 0 for an empty mask. Raises ValueError
    for images of 16,000 pixels or more on a side.
    """
    if max(gt.shape) >= FAR:
        raise ValueError(f"weighted F needs sides below {FAR} pixels, not {tuple(gt.shape)}")
    in_row = gt.sum(1, dtype=torch.int32)  # [H]
    in_col = gt.sum(0, dtype=torch.int32)  # [W]
    area = int(in_row.sum())
    if area == 0:
        return 0.0

    # Distances within the box around the foreground: [h, w] of the image's [H, W].
    rows = bounds(in_row)
    cols = bounds(in_col)
    gap = column_gap(gt[:, cols])  # [H, w]
    near = near_search(gap[rows])  # [h, w]

    fp = background_cost(pred, gt, low, gap, near, rows, cols) / (high - low)
    error = (high - pred[rows, cols]) * gt[rows, cols]  # [h, w], 0 on the background
    tp = area - foreground_cost(error.double(), gt[rows, cols], gap[rows], near) / (high - low)

    recall = tp / area
    precision = tp / (tp + fp + EPS)
    return 2 * recall * precision / (recall + precision + EPS)


def background_cost(
    pred: Tensor, gt: Tensor, low: int, gap: Tensor, near: Tensor, rows: slice, cols: slice
) -> float:
    """The sum of (2 - 2^(-d / 5)) E over the background, E in grey levels.

    pred, gt [H, W]; gap [H, w] from `column_gap`; near [h, w] from `near_search`.
    """
    error = (pred - low) * ~gt
    wrong = indices(error.bool())  # [K]: only wrong pixels cost, a few per cent of most maps

    # d^2 of the wrong pixels: known in the box near the foreground, searched for elsewhere.
    d2 = torch.full(gt.shape, BEYOND, dtype=torch.int32)
    d2[rows, cols] = near.int()
    d2 = d2.take(wrong)  # [K]
    far = indices(d2 == BEYOND)  # [L], positions among the K
    pixel = wrong[far].int()
    y = pixel // gt.shape[1]
    x = pixel - y * gt.shape[1]  # `%` would divide once more, and division is slow
    d2[far] = far_search(gap, y, x - cols.start)

    cost = error.take(wrong) * (2 - torch.exp2(-d2.double().sqrt() / 5))
    return cost.sum().item()


def foreground_cost(error: Tensor, gt: Tensor, gap: Tensor, near: Tensor) -> float:
    """The sum of min(E, blurred E) over the foreground, E in grey levels.

    All are [h, w]: error float64 and 0 on the background, gt, gap from `column_gap`, near from
    `near_search`. The blur needs the 3 pixels around the foreground, which lie within REACH.
    """
    around = indices((near < BEYOND) & ~gt)  # [M]
    nearest = nearest_pixel(gt, gap, around)  # [M]
    spread = error.clone().put_(around, error.take(nearest))
    return torch.minimum(error, blur(spread)).sum().item()


def indices(where: Tensor) -> Tensor:
    """Where a bool tensor is true: int64 [K], positions in the flattened tensor, ascending."""
    return torch.from_numpy(np.flatnonzero(where.numpy()))  # 3 times as fast as nonzero


def bounds(line: Tensor) -> slice:
    """From the first to the last non-zero entry of `line` [L], and 3 more where there is room."""
    used = line.nonzero()
    return slice(max(int(used[0]) - 3, 0), int(used[-1]) + 4)


# ---- Distances -----------------------------------------------------------------------------------
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


def squared_gaps(gap: Tensor) -> Tensor:
    """gap^2, at most BEYOND, of the 9 columns around each pixel: int16 [h, w] -> [h, w, 9]."""
    gap = gap.clamp(max=REACH + 1)
    squares = pad(gap * gap, (REACH, REACH), value=BEYOND)  # `** 2` is slow for integers
    return squares.unfold(1, len(OFFSET), 1)  # a view, not a copy


def near_search(gap: Tensor) -> Tensor:
    """d^2 to the nearest foreground within REACH columns: int16 [h, w] -> int16 [h, w].

    The value is exact below BEYOND, and BEYOND for everything farther away.
    """
    squares = squared_gaps(gap)
    d2 = torch.full_like(gap, BEYOND)
    for i, offset in enumerate(OFFSET.tolist()):
        torch.minimum(d2, squares[..., i] + offset * offset, out=d2)
    return d2


def nearest_pixel(gt: Tensor, gap: Tensor, pixels: Tensor) -> Tensor:
    """The nearest foreground pixel of each of `pixels`, for which `near_search` knows d^2.

    gt, gap [h, w]; pixels int64 [M] -> int64 [M], positions in the flattened box.
    """
    width = gt.shape[1]
    y = pixels // width
    x = pixels - y * width

    # Its column: argmin returns the first minimum, which is the leftmost column.
    d2 = squared_gaps(gap)[y, x] + OFFSET * OFFSET  # [M, 9]
    column = pixels + d2.argmin(1) - REACH

    # Within this column it lies `gap` rows above or below; if it is both, above is the topmost.
    rise = gap.take(column).long() * width
    above = column - rise
    is_above = (above >= 0) & gt.take(above.clamp(min=0))
    return torch.where(is_above, above, column + rise)


def far_search(gap: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Exact d^2 of the pixels (y, x): the minimum of gap[y, c]^2 + (c - x)^2 over all columns c.

    gap int16 [H, w], y and x int32 [K] -> int32 [K].
    """
    # gap^2 + (c - x)^2 = (gap^2 + c^2) - 2xc + x^2, and the first term is the same for all x.
    c = torch.arange(gap.shape[1], dtype=torch.int32)
    first_term = torch.addcmul(c * c, gap.int(), gap.int())  # [H, w]
    d2 = x * x
    step = 2**17 // len(c) + 1  # a block of this many pixels fits the cache
    for start in range(0, len(x), step):
        block = slice(start, start + step)
        costs = first_term.index_select(0, y[block])  # [step, w]
        d2[block] += costs.addcmul_(x[block, None], c, value=-2).amin(1)
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

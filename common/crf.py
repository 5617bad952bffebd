"""Dense CRF: aligns a coarse saliency map with the edges of its photo. Pure PyTorch, CPU or CUDA.

    refined = dense_crf(image, prob)                                    # probability map
    refined = dense_crf(image, hard_unary(prob > 0.5), sxy=50, srgb=5)  # thresholded map
    python -m common.crf photo.jpg map.png -o refined.png
    python -m common.crf photos/ maps/ -o labels/ --hard --median 7

What is computed (Krähenbühl and Koltun, NIPS 2011; mean field with two labels). Pixel i is
foreground with probability q_i. Its unary term is the logit u_i of the given map. The pairwise
terms pull q_i towards the q_j of all pixels of the image, itself included; the closer and the more
similar in colour pixel j is, the more it counts. From q = sigmoid(u), `iterations` times:

    q = sigmoid(u + compat * A (2q - 1) + compat_gauss * S (2q - 1))

    appearance  A_ij ~ exp(-|place_i - place_j|² / 2 sxy² - |colour_i - colour_j|² / 2 srgb²)
    smoothness  S_ij ~ exp(-|place_i - place_j|² / 2 sxy_gauss²)

where ~ says that entry ij is divided by sqrt(sum of row i * sum of row j).

How it is computed. With N pixels these matrices have N² entries (10^10 for 320 x 320), so they are
never formed: their products with a vector v are computed from factors. S is a Gaussian in y times a
Gaussian in x: two small matrices, exact. Below, K is A before its division: a Gaussian of the place
times one of the colour, each with its own short form (^T marks a transpose):

  place   The Gaussian is wide, so the table of its values for all pairs of pixels is smooth, and a
          smooth table is nearly of low rank: it is a sum of few products, G(i, j) =
          sum_r phi_r(i) phi_r(j), with 8 to 32 terms. See `space_functions`.
  colour  The Gaussian is narrow, but a photo uses few colours. Lay a grid over the colour cube and
          keep only the V grid colours that surround the colour of some pixel (V is 500 to 5,000).
          Splat: every pixel adds its value to the 4 grid colours around its own, in shares that add
          up to 1 (W^T, sparse [V, N]). Blur: the grid colours exchange their sums (C, sparse
          [V, V]). Slice: every pixel reads its 4 grid colours with the same shares (W, [N, V]).
          See `colour_grid`.

    K v  =  sum_r phi_r * W C W^T (phi_r * v)       three sparse products, see `appearance`

The mean error against the exact sums in float64 is 0.0005 to 0.0008 on photos, a sixth of that of
pydensecrf or less, in less time on one core (tests/benchmarks/bench_crf.py measures both).
Time and memory grow with height * width / sxy² per pixel: scale sxy with the photo (`photo_sxy`).
"""

import argparse
import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.images import load_image, load_map
from common.metrics import find_images, to_uint8
from common.runtime import UserError, cli, out_of_memory, pick_device, progress, save_png, say

FAINT = 0.045  # functions of the place weaker than this share of the strongest are dropped
REACH = 3.35  # the blur has no entry for grid colours this many standard deviations apart
STRETCH = 1.3  # grid colours lie closer together along grey by this factor, see `colour_grid`


def spacing(srgb: float) -> float:
    """Distance of neighbouring grid colours, in units of srgb (of a grid without STRETCH).

    A finer grid is more accurate; with a small srgb it costs time, as a photo then uses thousands
    of its colours.
    """
    return 0.78 if srgb >= 8 else 1.05


# ---- Factors of the kernels ----------------------------------------------------------------------
def gaussian(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    """Gaussian of all differences of two vectors: [n], [m] -> [n, m]."""
    exponent = -0.5 * ((a[:, None] - b) / sigma) ** 2
    return torch.exp(exponent.clamp(min=-80))  # float32 numbers next to zero are slow on CPUs


@functools.lru_cache(maxsize=16)
def space_functions(height: int, width: int, sigma: float) -> tuple[Tensor, Tensor]:
    """The strongest functions phi_r(y, x) = fy[y, r] fx[x, r] in the Gaussian of the place:

        sum_r phi_r(y, x) phi_r(y', x')  =  exp(-((y - y')² + (x - x')²) / 2 sigma²),  nearly,

    where y', x' is another pixel.

    Returns fy [height, r] and fx [width, r], float32 on the CPU.
    """
    fy, strength_y = axis_functions(height, sigma)
    fx, strength_x = axis_functions(width, sigma)

    # The products of a function of y and a function of x, as many as are strong enough. Whole cache
    # lines, 8 functions each, make the sparse products twice as fast.
    strength = (strength_y[:, None] * strength_x).flatten()
    enough = int((strength > FAINT).sum())
    rounded = 8 * math.ceil(enough / 8)
    best = strength.topk(min(rounded, len(strength))).indices
    return fy[:, best // len(strength_x)].float(), fx[:, best % len(strength_x)].float()


def axis_functions(n: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Functions f [n, m] on an axis of n pixels with f f^T = the Gaussian, and strengths [m].

    Nystrom's method: the Gaussian between any x and x' follows from those to nodes z that lie close
    together, G(x, x') = G(x, z) G(z, z)^-1 G(z, x'). With the Cholesky factor G(z, z) = root root^T
    this is f f^T for f = G(x, z) root^-T. Row x of f holds the coordinates of x in a basis made
    orthonormal over the nodes, one node after the other. The left singular vectors of f give the
    same sum with the fewest functions, and the singular values are their strengths.
    """
    x = torch.arange(n, dtype=torch.float64)
    nodes = math.ceil((n - 1) / (0.7 * sigma)) + 1
    z = torch.linspace(0, n - 1, nodes, dtype=torch.float64)
    root = torch.linalg.cholesky(gaussian(z, z, sigma) + 1e-9 * torch.eye(nodes))
    f = torch.linalg.solve_triangular(root, gaussian(z, x, sigma), upper=False).T  # [n, nodes]
    u, s, _ = torch.linalg.svd(f, full_matrices=False)
    return u * s, (s / s[0]) ** 2


def csr(ends: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sparse matrix stored row by row: row i has the entries from ends[i] to ends[i + 1]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            ends.int(), columns.int(), values, shape, check_invariants=False
        )


def colour_grid(image: Tensor, srgb: float) -> tuple[Tensor, Tensor, Tensor]:
    """The grid colours of a batch and the Gaussian between them; images share no grid colour.

    image [B, 3, H, W] -> vertex int32 [B, H, W, 4], the numbers of the 4 grid colours around a
    pixel's; share [B, H, W, 4]; blur, sparse [V, V].
    """
    batch = len(image)
    device = image.device

    # Colours in units of the grid, whose cells have the volume spacing³ but are shorter along grey.
    unit = STRETCH ** (1 / 3) * spacing(srgb)
    colour = image.permute(0, 2, 3, 1).float()
    colour = (colour + (STRETCH - 1) * colour.mean(-1, keepdim=True)) / (unit * srgb)
    low = colour.floor()  # [B, H, W, 3]

    # The colour lies in the grid's cube from `low` to low + 1. Walk along edges from one to the
    # other, first in the channel with the largest fraction, last in that with the smallest. The 4
    # corners on the way span a tetrahedron around the colour. Interpolation in it is linear: the
    # shares are the differences of 1, the sorted fractions, and 0.
    fraction, channel = (colour - low).sort(-1, descending=True)
    share = -torch.diff(F.pad(F.pad(fraction, (1, 0), value=1.0), (0, 1)))  # [B, H, W, 4]

    # Averaged over colours, the 4 corners scatter around the pixel's colour with covariance
    # (I + J) / 12, where J is all ones: 4/12 along grey and 1/12 across. They lie twice as far away
    # along grey, which is the reason for STRETCH. This widening happens twice, in the splat and in
    # the slice. C is made narrower by both, so that the three together have the wanted width;
    # without this the error is many times larger. wanted: the covariance of the colour Gaussian in
    # units of the grid; narrow: what is left for C.
    wanted = ((torch.eye(3) + (STRETCH - 1) / 3) / unit).matrix_power(2)
    narrow = wanted - (torch.eye(3) + 1) / 6
    radius = math.ceil(REACH * float(narrow.diagonal().max()) ** 0.5)

    # Number all colours of the grid, with a margin for neighbours. The table holds, by this number,
    # which of the V used ones a colour is; -1 if it is not used.
    side = int(255 * STRETCH / (unit * srgb)) + 2 + 2 * radius
    axis = torch.tensor([side * side, side, 1], dtype=torch.int32, device=device)
    first = torch.arange(batch, dtype=torch.int32, device=device).view(-1, 1, 1) * side**3
    corner = ((low.int() + radius) * axis).sum(-1, dtype=torch.int32) + first  # [B, H, W]
    walk = axis.take(channel).cumsum(-1, dtype=torch.int32)  # [B, H, W, 3]
    vertex = corner[..., None] + F.pad(walk, (1, 0))  # [B, H, W, 4]
    table = torch.full((batch * side**3,), -1, dtype=torch.int32, device=device)
    table[vertex.view(-1)] = 0
    used = (table == 0).nonzero()[:, 0]  # [V]
    table[used] = torch.arange(len(used), dtype=torch.int32, device=device)

    # The entries of C: from each grid colour to those within REACH standard deviations.
    offset = torch.cartesian_prod(*[torch.arange(-radius, radius + 1)] * 3)
    distance = (offset.float() @ narrow.inverse() * offset).sum(1)
    near = distance < REACH**2
    # The root compensates for the smaller volume of the narrower Gaussian. A's division would
    # cancel it, but `mean_field` relies on row sums of at least 1.
    value = torch.exp(-0.5 * distance[near]) * (wanted.det() / narrow.det()).sqrt()  # [O]
    steps = (offset[near].to(device) * axis).sum(1)  # [O]; CUDA has no product of integer matrices
    neighbour = table.take(used[:, None] + steps)  # [V, O]
    there = neighbour >= 0
    entry = there.view(-1).nonzero()[:, 0]
    blur = csr(
        F.pad(there.sum(1).cumsum(0), (1, 0)),
        neighbour.view(-1).index_select(0, entry),
        value.to(device).index_select(0, entry % len(value)),
        (len(used), len(used)),
    )
    return table.index_select(0, vertex.view(-1)).view_as(vertex), share, blur


class Pixels:
    """Every stride-th pixel of a batch: phi, W, W^T, and the way between maps and value lists.

    The n pixels are sorted by colour, so that the sparse products access neighbouring memory. phi
    [n, r] comes in blocks of `columns` functions. A single block is kept; several would not fit
    into memory together and are computed anew at each use.
    """

    def __init__(
        self,
        vertex: Tensor,
        share: Tensor,
        colours: int,
        fy: Tensor,
        fx: Tensor,
        stride: int,
        columns: int,
    ):
        every = slice(stride // 2, None, stride)
        vertex = vertex[:, every, every]  # [B, h, w, 4]
        share = share[:, every, every]
        self.colours = colours
        self.shape = (len(vertex), 1, *vertex.shape[1:3])
        self.y = torch.arange(len(fy), device=fy.device)[every]  # [h]
        self.x = torch.arange(len(fx), device=fx.device)[every]  # [w]

        # Sorted by the first of the 4 grid colours.
        self.order = vertex[..., 0].flatten().argsort(stable=True)  # [n]
        self.vertex = vertex.reshape(-1, 4).index_select(0, self.order)  # [n, 4]
        self.share = share.reshape(-1, 4).index_select(0, self.order)  # [n, 4]
        self.row = self.y[self.order // len(self.x) % len(self.y)]  # [n]
        self.column = self.x[self.order % len(self.x)]  # [n]

        # The work memory is allocated once and reused, because allocation takes long.
        self.blocks = list(zip(fy.split(columns, 1), fx.split(columns, 1)))
        self.work = share.new_empty(len(self.order) * columns)
        self.kept = self.make_phi(0) if len(self.blocks) == 1 else None

    def make_phi(self, block: int) -> Tensor:
        """The functions of a block at these pixels, [n, r]."""
        fy, fx = self.blocks[block]
        phi = fy.index_select(0, self.row)
        return phi.mul_(torch.index_select(fx, 0, self.column, out=self.work_like(phi)))

    def phi(self, block: int) -> Tensor:
        """The same, without computation if it was kept."""
        return self.make_phi(block) if self.kept is None else self.kept

    def work_like(self, phi: Tensor) -> Tensor:
        """The work memory as a matrix [n, r], whose content may be overwritten."""
        return self.work[: phi.numel()].view_as(phi)

    @functools.cached_property
    def slice(self) -> Tensor:
        """W, sparse [n, V] with 4 entries per row."""
        ends = torch.arange(0, self.vertex.numel() + 1, 4, device=self.vertex.device)
        return csr(ends, self.vertex.view(-1), self.share.view(-1), (len(self.order), self.colours))

    @functools.cached_property
    def splat(self) -> Tensor:
        """W^T, sparse [V, n]."""
        vertex, entry = self.vertex.view(-1).sort(stable=True)
        numbers = torch.arange(self.colours + 1, dtype=torch.int32, device=vertex.device)
        return csr(
            torch.searchsorted(vertex, numbers),
            entry // 4,
            self.share.view(-1).index_select(0, entry),
            (self.colours, len(self.order)),
        )

    def to_list(self, q: Tensor) -> Tensor:
        """Map [B, 1, h, w] -> values [n]."""
        return q.reshape(-1).index_select(0, self.order)

    def to_map(self, v: Tensor) -> Tensor:
        """Values [n] -> map [B, 1, h, w]."""
        return torch.empty_like(v).scatter_(0, self.order, v).view(self.shape)


def appearance(source: Pixels, blur: Tensor, target: Pixels, v: Tensor) -> Tensor:
    """K v, that is A v before its division: values [n] of `source` -> sums [m] at `target`."""
    total = torch.zeros(len(target.order), device=v.device)
    for block in range(len(source.blocks)):
        # Splat phi_r v, and blur.
        phi = source.phi(block)
        values = torch.mul(phi, v[:, None], out=source.work_like(phi))  # [n, r]
        colours = blur @ (source.splat @ values)  # [V, r]

        # Slice, multiply by phi_r, and add over r.
        phi = target.phi(block)
        sliced = target.work_like(phi)  # [m, r]
        torch.addmm(sliced, target.slice, colours, beta=0, out=sliced)
        total += torch.mv(sliced.mul_(phi), sliced.new_ones(sliced.shape[1]))  # sum(1) is slow
    return total


def smoothness(source: Tensor, target: Tensor, sigma: float) -> Tensor:
    """S along one axis, normalised: positions [n] of the source, [m] of the target -> [m, n].

    It is a narrow band and therefore sparse; entries below a millionth are left out.
    """
    source = source.float()
    target = target.float()
    kernel = gaussian(target, source, sigma)
    source_sum = gaussian(source, source, sigma).sum(1)
    kernel = kernel * kernel.sum(1, keepdim=True).rsqrt() * source_sum.rsqrt()
    there = kernel > 1e-6
    ends = F.pad(there.sum(1).cumsum(0), (1, 0))
    return csr(ends, there.nonzero()[:, 1], kernel[there], kernel.shape)


# ---- Mean field ----------------------------------------------------------------------------------
def mean_field(
    image: Tensor,
    u: Tensor,
    sxy: float,
    srgb: float,
    compat: float,
    sxy_gauss: float,
    compat_gauss: float,
    iterations: int,
    stride: int,
    columns: int,
) -> Tensor:
    """The iterations for images [B, 3, H, W] and logits u [B, 1, H, W] that fit into memory.

    All iterations but the last compute q at every stride-th pixel alone, the "few".
    """
    fy, fx = (f.to(image.device) for f in space_functions(*image.shape[2:], sxy))
    vertex, share, blur = colour_grid(image, srgb)
    few = Pixels(vertex, share, len(blur), fy, fx, stride, columns)
    every = few if stride == 1 else Pixels(vertex, share, len(blur), fy, fx, 1, columns)

    def scale(target: Pixels) -> Tensor:
        """1 / sqrt(row sum of A) [m]."""
        row_sum = appearance(few, blur, target, torch.ones(len(few.order), device=u.device))
        # The exact sum is at least 1, the pixel itself; that of the functions of the place may be
        # less where a rare colour is far from all others of its kind.
        return row_sum.clamp(min=0.1).rsqrt()

    scale_few = scale(few)

    def pairwise(target: Pixels) -> Callable[[Tensor], Tensor]:
        """The function from q of the few pixels [B, 1, h, w] to the target's pairwise terms."""
        scale_target = scale_few if target is few else scale(target)
        along_y = smoothness(few.y, target.y, sxy_gauss)  # [h', h]
        along_x = smoothness(few.x, target.x, sxy_gauss)  # [w', w]

        def terms(q: Tensor) -> Tensor:
            v = 2 * q - 1
            similar = scale_target * appearance(few, blur, target, scale_few * few.to_list(v))
            near = v[:, 0].movedim(0, 2)  # [h, w, B]
            for along in (along_y, along_x):  # -> [w, h', B] -> [h', w', B]
                near = (along @ near.flatten(1)).unflatten(1, near.shape[1:]).transpose(0, 1)
            return compat * target.to_map(similar) + compat_gauss * near.movedim(2, 0)[:, None]

        return terms

    terms_few = pairwise(few)
    terms_every = terms_few if every is few else pairwise(every)
    u_few = u[:, :, few.y][..., few.x]
    q = torch.sigmoid(u_few)
    for _ in range(iterations - 1):
        q = torch.sigmoid(u_few + terms_few(q))
    return torch.sigmoid(u + terms_every(q))


def check(image: Tensor, prob: Tensor, **settings: float) -> None:
    """Raise ValueError, or UserError for a device without sparse products."""
    is_image = image.ndim == 4 and image.shape[1] == 3 and 0 not in image.shape
    if not is_image or prob.shape != (len(image), 1, *image.shape[2:]):
        raise ValueError(
            "dense_crf needs image [B, 3, H, W] and prob [B, 1, H, W] of one size, "
            f"not {list(image.shape)} and {list(prob.shape)}"
        )
    if image.device != prob.device:
        raise ValueError(f"dense_crf got image on {image.device} but prob on {prob.device}")
    if image.device.type not in ("cpu", "cuda"):
        raise UserError(
            "the dense CRF needs sparse matrix products, which PyTorch lacks on "
            f"{image.device.type}: move image and prob to the CPU"
        )
    if image.dtype != torch.uint8:
        low, high = (value.item() for value in image.aminmax())
        if not (low >= 0 and high <= 255):  # also refuses NaN
            raise ValueError("dense_crf needs an image with values from 0 to 255")
        if image.is_floating_point() and 0 < high <= 1:
            warnings.warn(
                "dense_crf takes grey levels from 0 to 255, and here none is above 1: "
                "if the image is in [0, 1], multiply it by 255",
                stacklevel=3,
            )
    if not ((prob > -1e-4) & (prob < 1.0001)).all():  # resizing may overshoot by a rounding error
        raise ValueError("dense_crf needs a prob with values from 0 to 1")
    for name, value in settings.items():
        least = 0.1 if name in ("sxy", "sxy_gauss") else 1
        if not value >= least:
            raise ValueError(f"dense_crf needs {name} of at least {least}, not {value}")


def plan(height: int, width: int, functions: int, srgb: float, max_bytes: float) -> tuple[int, int]:
    """How many images and functions of the place to compute at a time: (images, columns).

    The numbers of bytes per pixel were measured.
    """
    pixels = height * width
    columns = int((max_bytes / pixels - 400) / 12) // 8 * 8
    columns = min(max(columns, 8), functions)
    cells = (400 / srgb + 12) ** 3  # of the table of grid colours, counted in int32
    image_bytes = pixels * (400 + 12 * columns) + 4 * cells
    return max(1, int(min(max_bytes / image_bytes, 2**31 / cells))), columns


@torch.no_grad()
def dense_crf(
    image: Tensor,
    prob: Tensor,
    sxy: float = 80.0,
    srgb: float = 13.0,
    compat: float = 10.0,
    sxy_gauss: float = 3.0,
    compat_gauss: float = 3.0,
    iterations: int = 10,
    stride: int = 1,
    max_bytes: float = 4e9,
) -> Tensor:
    """Refine a batch of probability maps, as the top of this file says.

    image: [B, 3, H, W], 0 to 255, uint8 or float. prob: [B, 1, H, W], 0 to 1, on the same device;
    it is clipped to [1e-5, 1 - 1e-5]. Returns float32 [B, 1, H, W] without gradient.
    sxy, sxy_gauss: pixels. srgb: grey levels. compat, compat_gauss: weights of the two kernels.
    stride: all iterations but the last use every stride-th pixel of every stride-th row. 2 is 1.7
    times as fast and suits the default sxy and srgb at 300 pixels and more; with srgb 5 keep 1.
    max_bytes: the memory to use, about. It determines how many functions of the place are computed
    at a time, and on CUDA how many images are refined together. On the CPU this gains nothing, so
    images are refined one by one, and none can change the last digit of another. It is no limit: a
    single image of more than 4,000 x 3,000 pixels needs more.
    A float image without a value above 1, unless it is black, is refined with a warning.
    Raises ValueError for a wrong shape or range, UserError on a device without sparse products.
    """
    check(
        image, prob, sxy=sxy, srgb=srgb, sxy_gauss=sxy_gauss, iterations=iterations, stride=stride
    )
    height, width = image.shape[2:]
    functions = space_functions(height, width, sxy)[0].shape[1]
    group, columns = plan(height, width, functions, srgb, max_bytes)
    group = 1 if image.device.type == "cpu" else group
    stride = min(stride, height, width)
    u = torch.logit(prob.float().clamp(1e-5, 1 - 1e-5))
    settings = (sxy, srgb, compat, sxy_gauss, compat_gauss, iterations, stride, columns)
    groups = zip(image.split(group), u.split(group))
    with torch.autocast(image.device.type, enabled=False):
        return torch.cat([mean_field(*images, *settings) for images in groups])


def hard_unary(mask: Tensor, gt_prob: float = 0.7) -> Tensor:
    """A mask (bool, or zero and non-zero) -> gt_prob in the foreground, 1 - gt_prob elsewhere.

    mask: any shape; the result has it, float32. At 0.7 the energies -log(prob) are 0.3567 for the
    given label and 1.2040 for the other. Raises ValueError unless 0.5 < gt_prob < 1.
    """
    if not 0.5 < gt_prob < 1:
        raise ValueError(f"hard_unary needs 0.5 < gt_prob < 1, not {gt_prob}")
    return torch.where(mask != 0, gt_prob, 1 - gt_prob).float()


def photo_sxy(height: int, width: int, sxy: float = 80.0) -> float:
    """`sxy`, meant for photos of up to 400 pixels, in proportion for larger ones."""
    return sxy * max(1.0, max(height, width) / 400)


# ---- Median filter -------------------------------------------------------------------------------
def median_filter(x: Tensor, size: int = 7) -> Tensor:
    """Exact median of the size x size window around each pixel; borders are repeated.

    x: [B, 1, H, W], bool or any real dtype. size: odd. Returns the same shape and dtype, the values
    of OpenCV's medianBlur. Raises ValueError for an even size or another shape.
    """
    if x.ndim != 4 or x.shape[1] != 1 or x.numel() == 0 or size < 1 or size % 2 == 0:
        raise ValueError(
            f"median_filter needs x [B, 1, H, W] and an odd size, not {list(x.shape)} and {size}"
        )
    rows, columns = (
        torch.arange(-(size // 2), n + size // 2, device=x.device).clamp(0, n - 1)
        for n in x.shape[2:]
    )
    padded = x[:, :, rows][..., columns]  # [B, 1, H + size - 1, W + size - 1]

    # Of two values the median is the one that more than half of the window has.
    low = x.min()
    high = x.max()
    if ((x == low) | (x == high)).all():
        count = F.avg_pool2d((padded == high).float(), (size, 1), 1, divisor_override=1)
        count = F.avg_pool2d(count, (1, size), 1, divisor_override=1)
        return torch.where(count > size * size / 2, high, low)

    # Of others it is found by sorting every window, a few rows at a time, which are then copied.
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # [B, 1, H, W, size, size], no copy
    few_rows = max(1, 2**24 // (len(x) * x.shape[3] * size * size))
    parts = [part.flatten(-2).median(-1).values for part in windows.split(few_rows, 2)]
    return torch.cat(parts, 2)


# ---- Command line --------------------------------------------------------------------------------
def refine_files(photo: Path, mask: Path, args: argparse.Namespace) -> Tensor:
    """Refine the map in file `mask` at the photo's size: uint8 [H, W] on the CPU.

    Raises UserError for a file that cannot be read, and for a photo that is too large.
    """
    image = load_image(photo)[None]  # [1, 3, H, W]
    height, width = image.shape[2:]
    grey = load_map(mask).resize((width, height), Image.Resampling.BILINEAR)
    prob = torch.from_numpy(np.array(grey, np.float32) / 255)[None, None]  # [1, 1, H, W]

    if args.hard:
        prob = hard_unary(prob > 0.5)
    usual_sxy, usual_srgb = (50, 5) if args.hard else (80, 13)
    sxy = args.sxy or photo_sxy(height, width, usual_sxy)
    srgb = args.srgb or usual_srgb
    try:
        prob = dense_crf(image.to(args.device), prob.to(args.device), sxy, srgb)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"{photo} of {width} x {height} pixels needs more memory than there is; make it smaller"
        ) from None
    pixels = to_uint8((prob > 0.5).float() if args.hard else prob)
    return median_filter(pixels, args.median)[0, 0].cpu()


def pairs(photo: Path, mask: Path, out: Path) -> list[tuple[Path, Path, Path]]:
    """(photo, map, output) of two files, or of two folders by stem.

    Raises UserError, also if an output would overwrite an input.
    """
    for path in (photo, mask):
        if not path.exists():
            raise UserError(f"there is no file or folder {path}")
    folders = photo.is_dir()
    if folders != mask.is_dir():
        raise UserError(f"{photo} and {mask} must be two files or two folders")
    if folders == (out.suffix.lower() == ".png"):
        raise UserError(f"-o {out} must name a folder if {photo} is one, else a .png file")

    found = [(photo, mask, out)]
    if folders:
        photos = find_images(photo)
        masks = find_images(mask)
        lost = [stem for stem in masks if stem not in photos]
        if lost:
            raise UserError(
                f"{masks[lost[0]]} ({len(lost)} such) has no photo of its stem in {photo}; "
                "add the photo or remove the map"
            )
        if len(photos) > len(masks):
            say(f"{photo}: {len(photos) - len(masks)} photos have no map in {mask}", error=True)
        found = [(photos[stem], masks[stem], out / f"{stem}.png") for stem in masks]

    inputs = {os.path.realpath(path) for *both, _ in found for path in both}
    for *_, path in found:
        if os.path.realpath(path) in inputs:
            raise UserError(f"-o {out} would overwrite {path}, an input; choose another place")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Refine one map or a folder of maps."""
    parser = argparse.ArgumentParser(
        prog="python -m common.crf", description="Refine saliency maps with a dense CRF."
    )
    add = parser.add_argument
    add("image", type=Path, help="photo, or folder of photos")
    add("mask", type=Path, help="map, or folder of maps, paired with the photos by stem")
    add("-o", "--out", type=Path, required=True, help="PNG file, or folder")
    add("--hard", action="store_true", help="threshold map and result, trust the map by 0.7")
    add("--median", type=int, default=1, metavar="SIZE", help="median filter at the end [1: none]")
    add("--sxy", type=float, help="pixels [80, with --hard 50; more for photos above 400 pixels]")
    add("--srgb", type=float, help="grey levels [13, with --hard 5]")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto]")
    args = parser.parse_args(argv)
    if args.median < 1 or args.median % 2 == 0:
        raise UserError(f"--median {args.median} must be an odd number")
    for name in ("sxy", "srgb"):
        value = getattr(args, name)
        if value is not None and not value >= 1:
            raise UserError(f"--{name} {value} must be at least 1")
    args.device = pick_device(args.device)[0]

    # A file that cannot be read does not end a folder; a place that cannot be written does.
    found = pairs(args.image, args.mask, args.out)
    broken = []
    for photo, mask, out in progress(found, "refining"):
        try:
            pixels = refine_files(photo, mask, args)
        except UserError as error:
            broken.append(str(error))
            continue
        save_png(out, pixels)
    if len(found) == 1 and broken:
        raise UserError(broken[0])
    for reason in broken:
        say(f"not refined: {reason}", error=True)
    if broken:
        raise UserError(
            f"{len(broken)} of {len(found)} maps are not refined, for the reasons above; the "
            f"others are in {args.out}"
        )


if __name__ == "__main__":
    cli(main)

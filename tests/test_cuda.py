"""The scripts on a pretended GPU: no tensor on a wrong device, no hidden wait inside a step.

Tensors on "cuda" are torch's fake tensors: they have a shape, a type and a device, but no numbers.
Tensors on the CPU are real. So the scripts themselves run as on a GPU, with their flags, files and
pictures, and an operation on tensors of two devices raises an error. Whenever Python needs a number
from the GPU, or a copy makes it wait for the GPU, `PretendedGPU` notes where.
"""

import traceback
from collections.abc import Callable, Iterator
from itertools import cycle, repeat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import small_flags, write_lists, write_photo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import a2s
import class_net
import sdg_sod
import unified_usod
from common import crf, metrics, runtime
from common.run import Run
from tests.benchmarks import gpu as gpu_day

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda", 0)
FOUND = 7  # how many elements a search on the pretended GPU finds
aten = torch.ops.aten
# Numbers from the pretended GPU are all 1: the CRF thinks that it gets an image in [0, 1].
pytestmark = pytest.mark.filterwarnings("ignore:dense_crf takes", "ignore:cov")


# ---- The pretended GPU ---------------------------------------------------------------------------
class PretendedGPU(TorchDispatchMode):
    """Runs what touches "cuda" with fake tensors, and all else for real.

    in_steps, elsewhere: "file function" of each place where Python waits for the GPU, inside of
    training steps and outside. answers: the numbers that a function reads from the GPU, else 1.
    """

    def __init__(self):
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.inside = False
        self.in_steps = set()
        self.elsewhere = set()
        # A caption ends after three words, and no map is NaN.
        self.answers = {"write": cycle((0, 0, 1)), "to_uint8": repeat(0)}

    def __enter__(self):
        self.fakes.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fakes.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fakes = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        target = kwargs.get("device")
        to_gpu = is_cuda(target)
        if not fakes and not to_gpu:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if func in (aten._local_scalar_dense.default, aten.equal.default):
            answer = next(self.answers.get(self.wait(), repeat(1)))
            return float(answer) if fakes[0].is_floating_point() else answer
        if func is aten._to_copy.default and target and to_gpu != is_cuda(args[0].device):
            return self.move(args[0], to_gpu, kwargs)
        if func is aten.copy_.default and is_cuda(args[0].device) != is_cuda(args[1].device):
            return self.move_into(func, *args, **kwargs)
        if func in (aten.nonzero.default, aten.bincount.default, aten.index.Tensor):
            return self.search(func, args)
        if "_fused_sgd_" in str(func):  # torch has no fake of this one, which returns nothing
            assert len({x.device for x in fakes}) == 1
            return None
        return func(*args, **kwargs)

    def wait(self) -> str:
        """Note the place in the project that waits; the name of its function."""
        for frame in reversed(traceback.extract_stack()):
            file = Path(frame.filename)
            of_project = file.is_relative_to(ROOT) and file != Path(__file__)
            installed = "site-packages" in file.parts  # a virtual environment inside the project
            if of_project and not installed and frame.name[0] != "<":  # not a comprehension
                break
        place = f"{file.stem} {frame.name}"
        (self.in_steps if self.inside else self.elsewhere).add(place)
        return frame.name

    def move(self, x: Tensor, to_gpu: bool, kwargs: dict) -> Tensor:
        """A copy on the other device: of a fake tensor to the CPU it holds zeros."""
        if not to_gpu or not kwargs.get("non_blocking"):
            self.wait()
        dtype = kwargs.get("dtype") or x.dtype
        with unset_fake_temporarily():
            if not to_gpu:
                return torch.zeros(x.shape, dtype=dtype)
            layout = kwargs.get("memory_format", torch.preserve_format)
            strides = torch.empty_like(x, memory_format=layout).stride()
        return torch.empty_strided(x.shape, strides, dtype=dtype, device=CUDA)

    def move_into(self, func: Callable, to: Tensor, x: Tensor, non_blocking=False) -> Tensor:
        """`to.copy_(x)` between two devices."""
        if is_cuda(x.device) or not non_blocking:
            self.wait()
        return to if is_cuda(x.device) else func(to, x, non_blocking)

    def search(self, func: Callable, args: tuple) -> Tensor:
        """An operation whose result has a shape that depends on numbers, or an index."""
        x = args[0]
        if func is aten.nonzero.default:
            self.wait()
            return x.new_zeros(FOUND, x.dim(), dtype=torch.long)
        if func is aten.bincount.default:
            self.wait()
            least = args[2] if len(args) > 2 else 0  # args: x, weights, minlength
            return x.new_zeros(least, dtype=torch.long)

        # An index on the CPU is copied, and a mask is searched for what is true in it.
        index = []
        for one in args[1]:
            if one is not None and (not is_cuda(one.device) or one.dtype == torch.bool):
                self.wait()
            if one is not None and one.dtype == torch.bool:
                index += [x.new_zeros(FOUND, dtype=torch.long)] * one.dim()
            else:
                index.append(one)
        return func(x, index)


def is_cuda(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def is_composite(func: Callable) -> bool:
    """Whether an operation is made of others, which in inference mode has not happened yet."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return func.namespace == "aten" and has_kernel(func.name(), "CompositeImplicitAutograd")


def backward(loss: Tensor) -> None:
    """Walk the graph of gradients as `Tensor.backward` does, which needs a driver for "cuda"."""
    uses = {}
    seen = [loss.grad_fn]
    for node in seen:
        for after, _ in node.next_functions:
            if after is not None:
                uses[after] = uses.get(after, 0) + 1
                if uses[after] == 1:
                    seen.append(after)

    # A node is called when all its users have added their gradients.
    given = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        mine = given.pop(node, {})
        grads = node(*[mine.get(i) for i in range(len(node._input_metadata))])
        grads = grads if isinstance(grads, tuple) else (grads,)
        for (after, place), grad in zip(node.next_functions, grads):
            if after is None:
                continue
            if grad is not None:
                wanted = after._input_metadata[place]
                grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)
                theirs = given.setdefault(after, {})
                theirs[place] = theirs[place] + grad if place in theirs else grad
            uses[after] -= 1
            if uses[after] == 0:
                ready.append(after)


def dense(ends: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """In place of a sparse matrix, of which torch has no fake."""
    assert ends.device == columns.device == values.device and len(columns) == len(values)
    return values.new_zeros(shape)


@pytest.fixture
def gpu(monkeypatch) -> Iterator[PretendedGPU]:
    """A pretended GPU; training steps are what happens between two batches of a `Run`."""
    gpu = PretendedGPU()
    drawn = Run.batches

    def batches(run: Run, *args, **kwargs) -> Iterator:
        for batch in drawn(run, *args, **kwargs):
            gpu.inside = True
            yield batch
            gpu.inside = False

    def save(content: dict, file) -> None:
        real = tree_map_only(FakeTensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), content)
        with unset_fake_temporarily():
            torch_save(real, file)

    def load(*args, **kwargs) -> dict:
        with unset_fake_temporarily():
            return torch_load(*args, **kwargs)

    def to(net: nn.Module, *place, **kwargs) -> nn.Module:
        return net_to(net, *place, **kwargs) if place else net  # the order in memory is left as is

    net_to = nn.Module.to
    torch_save = torch.save
    torch_load = torch.load
    generator = torch.Generator
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(Run, "batches", batches)
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(crf, "csr", dense)
    monkeypatch.setattr(torch.Tensor, "backward", torch.no_grad()(backward))
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for name, value in {
        "is_bf16_supported": True,
        "set_device": None,
        "get_device_name": "a pretended GPU",
        "memory_reserved": 0,
        "memory_allocated": 0,
        "mem_get_info": (1 << 36, 1 << 36),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    with gpu:
        yield gpu


# ---- The pretended GPU itself --------------------------------------------------------------------
def test_a_wrong_device_is_an_error(gpu):
    x = torch.ones(3, device=CUDA)
    assert (x + 1).device == CUDA and (torch.ones(3) + 1).tolist() == [2, 2, 2]
    with pytest.raises(Exception, match="device"):
        x + torch.ones(3)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
    ],
    ids="item bool nonzero mask index cpu to copy".split(),
)
def test_waiting_inside_a_step_is_noticed(gpu, wait):
    gpu.inside = True
    x = torch.ones(3, device=CUDA)
    F.relu(x * 2).sum() + torch.ones(3).to(CUDA, non_blocking=True)
    assert not gpu.in_steps
    wait(x)
    assert gpu.in_steps


def test_gradients_are_those_of_torch():
    torch.manual_seed(0)
    net = class_net.CLASSNet(class_net.backbone("tiny", "none"))
    out = net(torch.rand(2, 3, 64, 64))
    loss = sum(y.square().mean() for y in out)
    loss.backward(retain_graph=True)
    wanted = [p.grad for p in net.parameters()]
    net.zero_grad()
    with torch.no_grad():
        backward(loss)
    for p, grad in zip(net.parameters(), wanted):
        torch.testing.assert_close(p.grad, grad)


# ---- The scripts ---------------------------------------------------------------------------------
# Where Python waits for the GPU outside of training steps: in all scripts, and in the CRF.
USUAL = {
    "bank __init__",  # the photos move to the GPU, once
    "flags place",  # so does the network
    "harness finish",  # a map comes back as a picture
    "harness stack",  # a batch of photos to predict moves to the GPU
    "metrics to_uint8",  # is every value of the map a number?
    "run batches",  # the mean losses of an epoch
    "runtime picture_strip",
}
CRF = {
    "crf check",  # are all values in range?
    "crf colour_grid",  # which grid colours are used, and which are neighbours?
    "crf mean_field",  # the functions of the place move to the GPU
    "crf smoothness",  # which entries are large enough?
}
LABELS = {
    *CRF,
    "crf median_filter",  # does the map have two values?
    "harness mirror",  # the number in the log
    "run save",  # corrected labels go to the disk
}


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Lists of 4 scenes to train on and of 2 to test."""
    return write_lists(tmp_path_factory.mktemp("few"), train=4, test=2)


def flags(lists: Path, out: Path, more: str = "") -> list[str]:
    """A run on the pretended GPU, in bf16: one step in each of two epochs."""
    return [*small_flags(lists, epochs=2), *f"--device cuda --dry-run --out {out} {more}".split()]


def test_bf16_is_traced(gpu):
    x = torch.ones(1, 3, 8, 8, device=CUDA)
    with runtime.autocast(CUDA, "auto"):
        assert F.conv2d(x, x).dtype == torch.bfloat16


def test_a2s_waits_nowhere_in_a_step_but_in_the_crf_of_hma(gpu, few, tmp_path):
    a2s.main(flags(few, tmp_path))
    assert gpu.in_steps == set()
    assert gpu.elsewhere <= USUAL | LABELS | {"a2s make_labels", "a2s study_thresholds"}

    # D11: with HMA the CRF refines the prediction of every step.
    a2s.main(flags(few, tmp_path, "--stage 2 --rectify hma --overwrite"))
    assert gpu.in_steps == CRF


def test_prediction_waits_for_its_maps_alone(gpu, few, tmp_path):
    a2s.main(flags(few, tmp_path, "--stage 1 --epochs 1"))
    gpu.elsewhere.clear()
    photo = write_photo(tmp_path / "photo.png")
    a2s.main(flags(few, tmp_path, f"--stage 1 --crf --predict {photo}"))
    assert (tmp_path / "predict" / "photo.png").exists()
    assert gpu.elsewhere <= USUAL | CRF | {"crf median_filter"}


def test_class_net_waits_nowhere_in_a_step(gpu, few, tmp_path):
    class_net.main(flags(few, tmp_path, "--epochs 1 --augment flip scale crop"))
    assert gpu.in_steps == set()
    assert gpu.elsewhere <= USUAL


def test_unified_usod_waits_nowhere_in_a_step(gpu, few, tmp_path):
    """Both stages on photos and pairs, with SPR."""
    train, test = few / "train.txt", few / "test.txt"
    sets = f"--data shapes@{train}+shapes-depth@{train} --eval shapes-depth-test@{test}"
    unified_usod.main(flags(few, tmp_path, f"{sets} --width 0.05"))
    assert gpu.in_steps == set()
    own = {"unified_usod make_labels", "unified_usod write_labels"}  # labels become files
    assert gpu.elsewhere <= USUAL | LABELS | own


def test_sdg_sod_waits_nowhere_in_a_step(gpu, few, tmp_path):
    """All four stages: saliency, captions, control, guidance."""
    sdg_sod.main(flags(few, tmp_path, "--epochs 1 --hidden 64 --beam 2 --width 16"))
    assert gpu.in_steps == set()
    assert gpu.elsewhere <= USUAL | {
        "captions draw_words",  # words, maps and pictures come back
        "captions spoken",
        "ladder add",
        "sdg_sod own_maps",  # the maps of all photos are made once
        "sdg_sod study",
        "sdg_sod write",  # have all captions ended?
    }


def test_scores_are_counted_on_the_gpu(gpu):
    pred = torch.zeros(2, 8, 8, dtype=torch.uint8, device=CUDA)
    found = metrics.Metrics(wf=False)
    found.add(pred, pred > 0)
    assert gpu.elsewhere == {"metrics count"}  # the counts come back


# ---- The benchmark of a GPU ----------------------------------------------------------------------
def test_a_clock_counts_inner_parts_alone(monkeypatch):
    """The clock is read at 0, 1, 3, 6, 10 seconds: the inner part lasts from 1 to 3."""
    reads = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(gpu_day.time, "perf_counter", lambda: next(reads))
    clock = gpu_day.Clock(torch.device("cpu"))
    with clock.part("outer"):
        with clock.part("inner"):
            pass
    assert clock.seconds == {"outer": 1 + 3, "inner": 2}


def test_stacked_neighbours_refine_alike():
    image = torch.rand(2, 3, 20, 24)
    s = torch.rand(2, 1, 20, 24)
    wanted = unified_usod.pixel_refiner(image, s)
    torch.testing.assert_close(gpu_day.stacked_refiner(image, s), wanted)


def test_the_benchmark_runs_on_the_cpu_and_goes_on_where_it_stopped(tmp_path, capsys):
    flags = ["--tiny", "--device", "cpu", "--out", str(tmp_path)]
    gpu_day.main(flags)
    printed = capsys.readouterr().out
    for what in (
        "stage 1",
        "labels",
        "checkpoints",
        "CRF",
        "CLASS",
        "SPR",
        "captions",
        "--compile",
    ):
        assert f"| {what}" in printed or f" {what}" in printed
    rows = [line for line in printed.split("\n") if line.startswith("| ")]
    assert all(line.count("|") == 8 for line in rows) and len(rows) > 30

    gpu_day.main(flags)
    again = capsys.readouterr().out
    assert again.count("finished before") == len(gpu_day.PHASES)
    assert [line for line in again.split("\n") if line.startswith("| ")] == rows

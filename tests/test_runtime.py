"""Errors, files, random numbers and processes of common.runtime."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from common import run, runtime
from common.runtime import UserError


def test_generators_depend_on_their_key_alone():
    def draw(*key):
        return torch.rand(4, generator=runtime.generator("cpu", *key)).tolist()

    assert draw(0, "drop", 1) == draw(0, "drop", 1)
    keys = [(0, "drop", 1), (0, "drop", 2), (1, "drop", 1), (0, "flip", 1)]
    assert len({tuple(draw(*key)) for key in keys}) == 4


def pid(_):
    return os.getpid()


def test_parallel_map_uses_what_it_is_told_to_and_keeps_the_order():
    assert list(runtime.parallel_map(str, range(30))) == [str(i) for i in range(30)]
    assert list(runtime.parallel_map(str, range(30), True)) == [str(i) for i in range(30)]
    assert list(runtime.parallel_map(str, iter(()))) == []
    assert set(runtime.parallel_map(pid, range(3))) == {os.getpid()}
    if sys.platform == "linux":
        assert os.getpid() not in set(runtime.parallel_map(pid, range(3), True))


def test_parallel_map_works_only_a_little_ahead_of_its_reader():
    started = []
    results = runtime.parallel_map(started.append, range(10_000))
    for read in range(1, 6):
        next(results)
        assert read <= len(started) < 5000
    results.close()
    assert len(started) < 5000
    failing = runtime.parallel_map(lambda i: 1 // (i - 7), range(1000))
    assert [next(failing) for _ in range(7)] == [-1] * 7
    with pytest.raises(ZeroDivisionError):
        next(failing)


class Terminal(io.StringIO):
    """What is written, and that it is a terminal."""

    def isatty(self):
        return True


def test_the_last_progress_line_leaves_no_rest_of_those_before(monkeypatch):
    for stream, lines in ((Terminal(), 4), (io.StringIO(), 1)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(runtime.progress("abc", "letters")) == ["a", "b", "c"]
        assert len(stream.getvalue().strip().split("\r")) == lines
    assert stream.getvalue().startswith("letters: 3 in ")


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a" / "last.pt"
    content = {"method": "m", "stage": 1, "epoch": 2, "args": {}, "model": {}}
    runtime.save_checkpoint(path, **content)

    def fail(part):
        part.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        runtime.write_atomic(path, fail)
    assert runtime.load_checkpoint(path, "m") == content
    assert os.listdir(path.parent) == ["last.pt"]


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/x.json \(File exists\)"):
        runtime.save_json(tmp_path / "file" / "x.json", 1)


def test_checkpoints_of_others_are_refused_by_name(tmp_path):
    path = tmp_path / "last.pt"
    runtime.save_checkpoint(path, method="class_net", stage=1, epoch=2, args={}, model={})
    with pytest.raises(UserError, match="class_net stage 1, not of a2s"):
        runtime.load_checkpoint(path, "a2s")
    with pytest.raises(UserError, match="not of class_net stage 2"):
        runtime.load_checkpoint(path, "class_net", 2)
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a checkpoint.*--backbone-weights"):
        runtime.load_checkpoint(path, "a2s")
    runtime.save_checkpoint(path, method="a2s", stage=1, epoch="2", args={})
    with pytest.raises(UserError, match=r"damaged checkpoint \(epoch, model missing or of a wrong"):
        runtime.load_checkpoint(path, "a2s")
    path.write_bytes(b"PK\x03\x04 half a zip")
    with pytest.raises(UserError, match="not a readable file of tensors"):
        runtime.load_checkpoint(path, "a2s")
    with pytest.raises(UserError, match="there is no file"):
        runtime.load_checkpoint(tmp_path / "none.pt", "a2s")


@pytest.mark.parametrize(
    "content",
    [b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1", b"PK\x05\x06" + bytes(18)],
)
def test_what_torch_did_not_write_is_told_so(tmp_path, content):
    """A web page, a pointer of git LFS, an empty zip: not torch's long text on safety."""
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w.pth is no file that torch.save wrote; fetch it again$"):
        runtime.torch_load(path)


class Halved(nn.Module):
    """A module for `torch.jit.trace`."""

    def forward(self, x):
        return x / 2


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_weights_of_another_kind_are_named(tmp_path, recwarn):
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    np.savez_compressed(tmp_path / "small.npz", a=np.zeros(2))
    np.save(tmp_path / "w.npy", np.zeros(2))
    torch.jit.trace(Halved(), torch.ones(1)).save(tmp_path / "script.pt")
    recwarn.clear()
    for name, kind in {
        "w.npz": "a file of numpy arrays",
        "small.npz": "a file of numpy arrays",
        "w.npy": "a file of numpy arrays",
        "script.pt": "a TorchScript archive",
    }.items():
        path = tmp_path / name
        with pytest.raises(UserError, match=f"{path} is {kind}; a state_dict saved with torch.sa"):
            runtime.torch_load(path)
    assert not recwarn.list


def test_flags_of_a_checkpoint_are_plain_values(tmp_path):
    path = tmp_path / "last.pt"
    content = {"method": "m", "stage": 1, "epoch": 2, "model": {}}
    runtime.save_checkpoint(path, **content, args={"lr": 0.1, "taps": [1, 2], "crop": None})
    assert runtime.load_checkpoint(path, "m")["args"]["taps"] == [1, 2]
    for value in (torch.ones(2), [torch.ones(2)], {"a": {"b": torch.ones(1)}}):
        runtime.save_checkpoint(path, **content, args={"taps": value})
        with pytest.raises(UserError, match=r"damaged checkpoint \(args missing or of a wrong"):
            runtime.load_checkpoint(path, "m")


def test_numbers_of_numpy_beside_the_weights_are_read(tmp_path):
    path = tmp_path / "w.pth"
    numbers = {"best": np.float64(0.25), "small": np.float32(0.5), "epoch": np.int64(7)}
    torch.save(numbers | {"flag": np.bool_(True)}, path)
    assert runtime.torch_load(path) == {"best": 0.25, "small": 0.5, "epoch": 7, "flag": True}
    torch.save({"a": np.zeros(2)}, path)  # not an array, which weights do not need
    with pytest.raises(UserError, match=r"holds an object .*multiarray._reconstruct"):
        runtime.torch_load(path)


def test_load_state_takes_nothing_but_floats_for_floats():
    net = nn.Linear(2, 3)
    good = net.state_dict()
    for wrong in (torch.ones(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.complex64)):
        with pytest.raises(UserError, match=r"1 that are no floating-point numbers \(weight\)"):
            runtime.load_state(net, {**good, "weight": wrong}, "f")
    for wrong in (torch.eye(3, 2).to_sparse(), torch.empty(3, 2, device="meta"), None):
        with pytest.raises(UserError, match=r"1 that are no tensors \(weight\)"):
            runtime.load_state(net, {**good, "weight": wrong}, "f")
    runtime.load_state(net, {**good, "weight": torch.ones(3, 2, dtype=torch.half)}, "f")
    assert (net.weight == 1).all()


def test_load_state_accounts_for_every_key():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm2d(3))
    good = {key: torch.ones_like(value) for key, value in net.state_dict().items()}
    runtime.load_state(net, {**good, "fc.weight": torch.ones(1)}, "f", surplus=("fc.",))
    assert (net[0].weight == 1).all()
    del good["1.num_batches_tracked"]  # older files lack it
    runtime.load_state(net, good, "f")
    bad = {**good, "0.weight": torch.ones(3, 3), "extra": torch.ones(1)}
    del bad["0.bias"]
    with pytest.raises(
        UserError,
        match=r"1 missing \(0.bias\); 1 unexpected \(extra\); "
        r"1 of another shape \(0.weight\)",
    ):
        runtime.load_state(net, bad, "f")


def test_log_forgets_what_came_after_the_checkpoint(tmp_path, capsys):
    log = run.Log(tmp_path, 4)
    for epoch in (1, 2, 3):
        log.epoch(epoch, 10, 2.0, loss=float(epoch))
    assert "epoch  3/4 | loss 3 | 5 img/s" in capsys.readouterr().out
    run.Log(tmp_path, 4, done=2).epoch(3, 10, 2.0, loss=30.0)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["loss"]) for r in records] == [(1, 1), (2, 2), (3, 30)]
    run.Log(tmp_path, 4)  # a new run starts afresh
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_line_that_a_crash_has_cut_is_forgotten(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3, "lo')
    run.Log(tmp_path, 4, done=2)
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_shares_of_a_world_are_disjoint_and_complete():
    parts = [runtime.World(rank, 3).share(range(10)) for rank in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(10))
    assert runtime.World().gather("x") == ["x"]


STATISTICS = """
import torch
from common import run, runtime

def main():
    world = runtime.join_world(torch.device("cpu"))
    norm = torch.nn.BatchNorm2d(1)
    net = world.parallel(torch.nn.Sequential(norm))
    for _ in range(60):  # process 0 sees 0, process 1 sees 10
        net(torch.full((2, 1, 2, 2), 10.0 * world.rank)).sum().backward()
    own = norm.running_mean.item()
    world.average_statistics(net)
    values = world.gather((own, norm.running_mean.item()))
    if world.main:
        print(values)

runtime.cli(main)  # leaves the group, without which a process may abort at its end
"""


def test_batchnorm_statistics_are_the_mean_of_all_processes(tmp_path):
    (tmp_path / "job.py").write_text(STATISTICS)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            tmp_path / "job.py",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (own0, mean0), (own1, mean1) = eval(done.stdout)
    assert own0 == pytest.approx(0, abs=0.05) and own1 == pytest.approx(10, abs=0.05)
    assert mean0 == mean1 == pytest.approx(5, abs=0.05)


def test_an_unusable_device_is_one_sentence():
    assert runtime.pick_device("cpu")[0].type == "cpu"
    for name in ("cuda:77", "toaster"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here"):
            runtime.pick_device(name)


def test_picture_strip_places_pictures_in_rows(tmp_path):
    from PIL import Image

    row = [torch.ones(1, 8, 8), torch.zeros(3, 4, 4)]
    runtime.picture_strip(tmp_path / "s.png", [row], (10, 20))
    image = Image.open(tmp_path / "s.png")
    assert image.size == (40, 10)
    assert image.getpixel((5, 5)) == (255, 255, 255) and image.getpixel((25, 5)) == (0, 0, 0)

"""The recipe of docs/own_photos.md: networks leave PyTorch's Python through torch.export."""

import pytest
import torch

import a2s
import class_net
import sdg_sod
import unified_usod

FLAGS = "--data shapes --size 64 --backbone tiny"


def network(method: str) -> torch.nn.Module:
    """A small network of a method with random weights."""
    if method == "sdg_sod":
        return sdg_sod.make_net(sdg_sod.complete(sdg_sod.build_parser().parse_args([])))
    script = {"a2s": a2s, "class_net": class_net, "unified_usod": unified_usod}[method]
    args = script.complete(script.build_parser().parse_args(FLAGS.split()))
    if method == "class_net":
        return script.make_net(args, "none")
    return script.make_net(2, args, "none")


@pytest.mark.parametrize(
    "method, channels", [("a2s", 3), ("class_net", 3), ("unified_usod", 6), ("sdg_sod", 3)]
)
def test_an_exported_network_gives_the_same_logits_for_any_batch(method, channels, tmp_path):
    torch.manual_seed(0)
    net = network(method).eval()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    many = {"unified_usod": ((batch,),)}.get(method, (batch,))  # it takes photos of several sizes
    program = torch.export.export(net, (torch.rand(2, channels, 64, 64),), dynamic_shapes=many)
    torch.export.save(program, tmp_path / "net.pt2")

    photos = torch.rand(3, channels, 64, 64)
    with torch.no_grad():
        expected = net(photos)
        found = torch.export.load(tmp_path / "net.pt2").module()(photos)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

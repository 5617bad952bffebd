"""Tests run from the repository's root, on one thread, without network, data sets or a GPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lists(tmp_path_factory) -> Path:
    """A folder with train.txt and test.txt, which restrict the shapes to 16 and 4 scenes."""
    from helpers import write_lists  # found through the path above

    return write_lists(tmp_path_factory.mktemp("lists"))


@pytest.fixture(autouse=True)
def bf16(monkeypatch):
    """Let --amp bf16 act on every processor; without the instructions it would be fp32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)

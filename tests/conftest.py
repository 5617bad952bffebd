"""Tests run from the repository's root, on one thread, without network, data sets or a GPU."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

"""Tests of this folder import their helpers by name, and use one thread: they are small, two would only add noise."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

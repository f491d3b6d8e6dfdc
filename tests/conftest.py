"""What all tests share: the two markers skip with their reason, and nothing looks for the model hub."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
    if item.get_closest_marker("weights") and "MVWAN_WEIGHTS" not in os.environ:
        pytest.skip("MVWAN_WEIGHTS does not name a folder with the official Wan2.2-TI2V-5B weights")

"""What tests of experiments share."""

import pytest
import torch

torch.set_num_threads(1)  # as runs do; on a busy machine two wait for each other


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """An empty working directory: commands work from anywhere."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))

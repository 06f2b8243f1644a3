"""Every test gets its own cache, no progress bars."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory):
    os.environ["WELLREAD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    from wellread import runtime

    with runtime.using(progress=False):
        yield Path(os.environ["WELLREAD_CACHE"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

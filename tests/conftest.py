"""Fixtures and settings that all tests share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# The same draws in every run, so that a red run means a change; FTC_EXPLORE=1 draws anew each time.
settings.register_profile(
    "quick",
    deadline=None,
    max_examples=25,
    derandomize=not os.environ.get("FTC_EXPLORE"),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("quick")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; tests that need it skip where it is missing."""
    repository = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("FTC_SHARED_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder: {folder} is missing; set FTC_SHARED_DATA to where it is")
    return folder


@pytest.fixture(scope="session")
def ranks():
    """Processes that run functions as the ranks of a gloo group; see tests/ranks.py."""
    from ranks import Pool

    pool = Pool()
    yield pool
    pool.close()

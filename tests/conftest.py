"""Fixtures and settings that all tests share."""

import os
import shutil
import subprocess
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


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of the given size ("300k") and returns its folder; skips where one cannot."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
            )
            if shutil.which("mount")
            else None
        )
        if done is None or done.returncode:
            pytest.skip("a small disk to fill needs the right to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)

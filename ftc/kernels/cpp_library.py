"""Plain C++ kernels of the CPU: one source, compiled when first asked for, loaded with ctypes, kept in the user's cache folder.

A source has `extern "C"` functions, needs nothing but the compiler (some seconds, once a machine) and shares PyTorch's own OpenMP.
FTC_CPU_KERNELS=0 turns all of them off; each has a plain PyTorch path behind it.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

# No -ffast-math: the exponentials round by adding and subtracting a constant.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ftc" / "kernels"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _text(source: Path) -> str:
    """The source and the headers beside it that it includes."""
    text = source.read_text()
    return "\0".join([text, *((source.parent / name).read_text() for name in re.findall(r'#include "(.+)"', text))])


def build(source: Path, compiler: str, folder: Path) -> Path:
    """The compiled library in `folder`, named by source, compiler, flags and processor; RuntimeError with the compiler's words."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\0".join([_text(source), version, *FLAGS, _processor()]).encode()).hexdigest()[:16]
    library = folder / f"{source.stem}-{key}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / library.name
        done = subprocess.run([compiler, *FLAGS, str(source), "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{compiler} could not compile {source}:\n{done.stderr[-2000:]}")
        os.replace(made, library)  # whole or not there: another process may be looking
    return library


def load(source: Path) -> ctypes.CDLL | None:
    """The compiled kernels of `source`, or None where they are turned off or cannot be built (a warning then says why). Callers keep the result."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get("FTC_CPU_KERNELS") == "0" or compiler is None:
        return None
    try:
        return ctypes.CDLL(str(build(source, compiler, cache_folder())))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(f"without the compiled kernels of {source.name}, which is slower: {error}", stacklevel=3)
        return None

"""The run files that come with ftc, by name."""

from functools import cache
from importlib import resources
from pathlib import Path

from ftc.errors import FtcError, nearest


@cache
def shipped() -> dict[str, str]:
    """{name: what it trains} of every run file that comes with ftc, the smallest first."""
    files = [file for file in (resources.files("ftc.train") / "configs").iterdir() if file.name.endswith(".toml")]
    about = {file.name.removesuffix(".toml"): _first_sentence(file.read_text()) for file in files}
    first = ("quickstart", "four-domains", "dense-1b", "llama3-8b")
    return {name: about[name] for name in sorted(about, key=lambda n: (first.index(n) if n in first else len(first), n))}


def run_file(config: str | Path) -> Path:
    """The file that `config` names: that of a shipped run, else a path. FtcError for a name that is neither."""
    name = str(config)
    if name in shipped():
        return Path(str(resources.files("ftc.train") / "configs" / f"{name}.toml"))
    path = Path(config)
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        raise FtcError(f"there is no run file {name!r} here, and none of that name comes with ftc; {nearest(name, shipped())}")
    return path


def _first_sentence(text: str) -> str:
    """Of the comment at the file's top."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines).partition(". ")[0].partition(": ")[0].removesuffix(".")

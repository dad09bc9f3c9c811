"""The machines of a run: where they meet, which of them this one is, and that all were given the same run."""

import contextlib
import errno
import socket
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ftc.errors import FtcError, FtcFailure
from ftc.files import folder_kind
from ftc.train.config import differences

RENDEZVOUS_ID = "ftc"


@dataclass(frozen=True)
class Machines:
    """`count` machines that meet at `endpoint` ("host:port"), which the first of them (`index` 0) listens on.

    `wait`: seconds for which each waits for the others. Raises FtcError for what cannot be.
    """

    count: int = 1
    index: int = 0
    endpoint: str = ""
    wait: int = 600

    def __post_init__(self):
        if self.count < 1:
            raise FtcError(f"{self.count} machines cannot train; use 1 or more")
        if not 0 <= self.index < self.count:
            raise FtcError(f"machine {self.index} is not one of {self.count}; they count from 0 to {self.count - 1}")
        if self.wait < 1:
            raise FtcError(f"{self.wait} s is no time to wait for the other machines; use 1 or more")
        if self.count > 1:
            self.host_and_port()
        elif self.endpoint:
            raise FtcError(f"{self.endpoint!r} is where several machines meet, but there is 1; say how many: --nnodes")

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.endpoint.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            given = repr(self.endpoint) if self.endpoint else "nothing"
            raise FtcError(f"{self.count} machines need a place to meet, host:port of the first one, such as node0:29500; got {given}")
        return host.strip("[]"), int(port)

    def torchrun_arguments(self) -> list[str]:
        """torchrun's own flags for them."""
        if self.count == 1:
            return ["--standalone"]
        conf = f"is_host={int(self.is_first)},join_timeout={self.wait},timeout={self.wait}"
        rendezvous = [f"--rdzv_endpoint={self.endpoint}", f"--rdzv_id={RENDEZVOUS_ID}", f"--rdzv_conf={conf}"]
        return [f"--nnodes={self.count}", "--rdzv_backend=c10d", *rendezvous]

    def check_endpoint(self) -> None:
        """Raise FtcError where the place to meet cannot be: an unknown host, or a port of this machine that is taken."""
        if self.count == 1:
            return
        host, port = self.host_and_port()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise FtcError(f"the machines should meet at {self.endpoint}, but {host!r} is not known here ({error.strerror or error})") from None
        if self.is_first:
            with socket.socket(found[0][0]) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("", port))
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                    said = f"port {port} is in use on this machine, so the others cannot meet here; choose another"
                    raise FtcError(f"{said} for all of them, such as {host}:{_free_port()}") from None


ONE = Machines()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def wait_for_the_first(folder: Path, run_file: Path, text: str, machines: Machines) -> None:
    """On another machine than the first: return once the first has written the same run into the shared folder.

    Raises FtcFailure when it never appears, and FtcError, naming the key, when what is there is another run.
    """
    end, own = time.monotonic() + machines.wait, tomllib.loads(text)
    theirs = None
    while time.monotonic() < end:
        if folder_kind(folder) == "train":
            with contextlib.suppress(FileNotFoundError, tomllib.TOMLDecodeError):
                theirs = tomllib.loads(run_file.read_text())
                if not _other_keys(theirs, own):
                    return
        time.sleep(0.2)
    if theirs is None:
        raise FtcFailure(
            f"waited {machines.wait} s for the first machine to begin in {folder}: it was not started, or this is not a folder that the "
            "machines share"
        )
    raise FtcError(f"this machine was given another {_other_keys(theirs, own)} than the first machine's run in {folder}")


def _other_keys(theirs: dict, own: dict) -> str:
    """The first difference of two run files; folders may have other names on other machines."""
    for values in (theirs, own):
        values.get("job", {}).pop("dump_folder", None)
    return next(iter(differences(theirs, own).values()), "")

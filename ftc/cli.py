"""The command `ftc`: what it offers, and how every error ends (2: the input is wrong, 1: the work failed, 130: Ctrl-C)."""

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import typer

from ftc.commands import healing, inspect, memory, pipeline, plan, quantize, rewriting, sweep, use
from ftc.errors import FtcError, FtcFailure, Interrupted

USER_ERROR, FAILURE, INTERRUPTED, TERMINATED = 2, 1, 130, 143

app = typer.Typer(
    name="ftc",
    help="A compiler for decoder language models: captures plain PyTorch models as graphs, rewrites graphs and weights, "
    "and proves every rewrite.",
    epilog="MODEL is a folder that ftc saved, a Hugging Face folder, a llama2.c file, or preset:NAME (random weights). "
    "Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 130 interrupted. --debug, anywhere, shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from ftc import __version__

        typer.echo(f"ftc {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    pass


for module in (inspect, rewriting, healing, sweep, use, memory, pipeline, plan, quantize):
    module.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # Read when torch is first imported: waiting threads sleep rather than spin, or a busy machine slows down several times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # as an exception, so that nothing half-written stays
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors are printed on stderr, as JSON with `--json`."""
    own, rest = _before_double_dash(arguments)
    debug = "--debug" in own or bool(os.environ.get("FTC_DEBUG"))
    own = [argument for argument in own if argument != "--debug"]
    as_json = "--json" in own
    try:
        code = _call(own + rest)
        if code == INTERRUPTED:  # typer has made an exit code of Ctrl-C
            raise KeyboardInterrupt
        return code
    except BrokenPipeError:  # the reader of our output (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code, message = explain_error(error)
        _print_error(message, code, as_json)
        return code


def _call(arguments: list[str]) -> int:
    try:
        result = app(arguments, standalone_mode=False, prog_name="ftc")
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else FAILURE


def explain_error(error: BaseException) -> tuple[int, str]:
    """The exit code and the paragraph for an error that ended a command."""
    if hasattr(error, "format_message"):
        return USER_ERROR, _usage(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED, "interrupted; the same command continues from what is finished"
    if isinstance(error, Interrupted):
        return INTERRUPTED, str(error)
    if isinstance(error, FtcError) or (isinstance(error, ValueError) and _raised_by_us(error)):
        return USER_ERROR, str(error)
    if isinstance(error, FtcFailure):
        return FAILURE, str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            FAILURE,
            f"the disk is full ({error.filename or error.strerror}); free space and run the same command again",
        )
    if isinstance(error, MemoryError):
        return FAILURE, "out of memory; use a smaller batch, context or model"
    return FAILURE, f"{type(error).__name__}: {error} (unexpected; --debug shows where it happened)"


def _usage(error: Exception) -> str:
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; {context.command_path} --help shows what is valid" if context is not None else message


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    here = os.path.dirname(os.path.abspath(__file__))
    roots = (here, os.path.join(os.path.dirname(here), "passes"), os.path.join(os.path.dirname(here), "models"))
    return bool(frames) and os.path.abspath(frames[-1].filename).startswith(tuple(root + os.sep for root in roots))


def _print_error(message: str, code: int, as_json: bool) -> None:
    message = " ".join(message.split())
    if as_json:
        sys.stderr.write(json.dumps({"error": message, "exit_code": code}) + "\n")
    else:
        sys.stderr.write(f"error: {message}\n")


def _before_double_dash(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at:]

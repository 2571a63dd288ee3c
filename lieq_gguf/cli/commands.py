"""The command line. Thin: every command reads its options, calls one function, and shows the result.

Heavy imports are inside the commands, so that ``--help`` is fast. stdout is the result, stderr is progress.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from lieq_gguf import __version__
from lieq_gguf.cli import file_commands, model_commands, options
from lieq_gguf.cli.grouping import grouped
from lieq_gguf.cli.old_spellings import with_new_spellings
from lieq_gguf.errors import LieqError

app = typer.Typer(
    name="lieq-gguf",
    help="""Mixed-precision GGUF files for llama.cpp at the average bit width you ask for, never above it.

    Example: `lieq-gguf convert ./Llama-3.2-1B --bits 2.7 -o llama.gguf`
    """,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich takes longer to load than all of the help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Entry point: a LieqError is one line and exit code 1, wrong usage exit code 2, Ctrl-C 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds the stack, which removes temporary files
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is loaded; it advises on kernels for GPUs
    try:
        app(args=with_new_spellings(sys.argv[1:]))
    except LieqError as error:
        if options.debug_is_on:
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _show_version(value: bool) -> None:
    if value:
        print(f"lieq-gguf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version


_COMMANDS: dict[str, Callable[..., None]] = {
    "convert": model_commands.convert,
    "score": model_commands.score,
    "imatrix": model_commands.imatrix,
    "plan": model_commands.plan,
    "inspect": file_commands.inspect,
    "verify": file_commands.verify,
    "eval": file_commands.evaluate,
    "bench": file_commands.bench,
    "run": file_commands.run,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(grouped(_command))

"""The command ``imagen-kit``: one file per sub-command; what a user got wrong is one plain line on stderr.

Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

import typer

from imagen_kit import __version__
from imagen_kit.cli.bench import bench
from imagen_kit.cli.common import Interrupted
from imagen_kit.cli.compare import compare
from imagen_kit.cli.convert import convert
from imagen_kit.cli.evaluate import evaluate
from imagen_kit.cli.generate import generate
from imagen_kit.cli.listing import list_parts
from imagen_kit.cli.show import show
from imagen_kit.cli.train import train
from imagen_kit.errors import KitError

INTERRUPTED = 130  # the exit code that shells give to what Ctrl-C stopped

app = typer.Typer(
    name="imagen-kit",
    help="Text-to-image diffusion out of swappable parts.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate)
app.command("list")(list_parts)
app.command("show")(show)
app.command("train")(train)
app.command("evaluate")(evaluate)
app.command("compare")(compare)
app.command("bench")(bench)
app.command("convert")(convert)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"imagen-kit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        arguments: words after the command's name; those of the process by default.
    """
    _quiet()
    try:
        code = app(
            args=None if arguments is None else list(arguments), prog_name="imagen-kit", standalone_mode=False
        )
        if code == INTERRUPTED:  # typer's own answer to Ctrl-C, which says nothing
            return _interrupted()
        return code if isinstance(code, int) else 0
    except KitError as error:
        return _refuse(str(error))
    except Interrupted as stopped:
        return _interrupted(f": {stopped}")
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:
        # Some versions of typer have their own copy of click's exceptions: these are known by what they do.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _refuse(error.format_message())
        raise


def _quiet() -> None:
    """Keep warnings of libraries off stderr, where our one line goes; ``python -W default`` shows them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        # torchao's, when transformers finds it
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else a line for each try to reach the hub


def _interrupted(advice: str = "") -> int:
    print(f"interrupted{advice}", file=sys.stderr)
    return INTERRUPTED


def _refuse(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2

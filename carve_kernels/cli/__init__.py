"""The command line: carve-kernels demo, run, batch, profile, doctor, check."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
import typer.core

from carve_kernels import __version__
from carve_kernels.cli.batch import batch
from carve_kernels.cli.check import check
from carve_kernels.cli.demo import demo
from carve_kernels.cli.doctor import doctor
from carve_kernels.cli.output import INTERRUPTED, TYPED, advised, clock, exit_code, fail, note, printable
from carve_kernels.cli.profile import profile
from carve_kernels.cli.run import run
from carve_kernels.extras import is_interrupted

# What an error may begin with: an argument, or an element of one.
_ARGUMENT = re.compile(r"(?P<name>\w+)(\[\d+\])*(='(?P<value>[^']*)')?: ")


class _Commands(typer.core.TyperGroup):
    """Ends every command in the same way: an expected error is one line; `--debug` shows its traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        clock.start()
        with printable():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _interrupted(error) from None
        except BrokenPipeError:
            # The reader of the pipe has enough, and typer ends silently.
            raise
        except Exception as error:
            if is_interrupted(error):
                raise _interrupted(error) from None
            code = exit_code(error)
            if code is None or ctx.params.get("debug"):
                raise
            fail(error)
            raise typer.Exit(code) from error


def _interrupted(error: BaseException) -> typer.Exit:
    written = str(error) if isinstance(error, KeyboardInterrupt) else ""
    fail(f"interrupted; {written or 'nothing was written'}")
    return typer.Exit(INTERRUPTED)


@contextmanager
def _extension_warning() -> Iterator[None]:
    """Say first that the extension is not built, and keep the log from saying it again."""
    try:
        from carve_kernels.backends.native import extension
    # Without torch, the command says so itself.
    except ImportError:
        reason = None
    else:
        reason = extension.not_built()
    if reason is None:
        yield
        return
    note(f"on a CPU: {extension.SLOWER}; {reason}")
    log = logging.getLogger("carve_kernels")

    def is_new(record: logging.LogRecord) -> bool:
        return reason not in record.getMessage()

    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


class _Command(typer.core.TyperCommand):
    """Names an argument in an error as the user typed it: `model:` becomes `--model:`."""

    def __init__(self, *args: Any, help: str | None = None, **kwargs: Any) -> None:
        # Otherwise the lines of a paragraph would end where they do in the source.
        paragraphs = (" ".join(paragraph.split()) for paragraph in (help or "").split("\n\n"))
        super().__init__(*args, help="\n\n".join(paragraphs), **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _extension_warning():
                return super().invoke(ctx)
        except Exception as error:
            message = str(error)
            text = advised(self._named(ctx, message))
            if text != message:
                error.args = (text,)
                if isinstance(error, ImportError):
                    # An ImportError prints this, not its arguments.
                    error.msg = text
            raise

    def _named(self, ctx: Any, message: str) -> str:
        match = _ARGUMENT.match(message)
        if match is None:
            return message
        options = {parameter.name: parameter.opts[0] for parameter in self.params}
        name = match["name"] if match["name"] in options else TYPED.get(match["name"], "")
        source = ctx.get_parameter_source(name)
        # The argument may not be typed but come from elsewhere, such as a carve.json.
        if source is None or source.name != "COMMANDLINE":
            return message
        value = f" {match['value']}" if match["value"] else ""
        return f"{options[name]}{value}: {message[match.end() :]}"


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"carve-kernels {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """See where a vision-language model looks, keep that part of the image, and ask again (CARVE).

    Exit codes: 0 done; 1 an error of the machine, or some questions of a batch failed; 2 a wrong argument; 130 Ctrl-C.
    """


app.command(cls=_Command)(demo)
app.command(cls=_Command, no_args_is_help=True)(run)
app.command(cls=_Command, no_args_is_help=True)(batch)
app.command(cls=_Command, no_args_is_help=True)(profile)
app.command(cls=_Command)(doctor)
app.command(cls=_Command)(check)

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
from carve_kernels.backends.native import extension
from carve_kernels.cli.batch import batch
from carve_kernels.cli.check import check
from carve_kernels.cli.demo import demo
from carve_kernels.cli.doctor import doctor
from carve_kernels.cli.output import INTERRUPTED, TYPED, advised, clock, exit_code, fail, note, printable
from carve_kernels.cli.profile import profile
from carve_kernels.cli.run import run

# What an error may begin with: an argument, or a place in one.
_ARGUMENT = re.compile(r"(?P<name>\w+)(\[\d+\])*(='(?P<value>[^']*)')?: ")


class _Commands(typer.core.TyperGroup):
    """Ends every command alike: an expected error is one line, `--debug` shows where it came from."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        clock.start()
        with printable():
            return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _without_extension():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            fail("interrupted; nothing was written")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever closed the pipe has read enough, and typer ends without a word.
            raise
        except Exception as error:
            code = exit_code(error)
            if code is None or ctx.params.get("debug"):
                raise
            fail(error)
            raise typer.Exit(code) from error


@contextmanager
def _without_extension() -> Iterator[None]:
    """Say first of all that the extension is not built, and do not let the log say so again."""
    reason = extension.not_built()
    if reason is None:
        yield
        return
    note(f"on a CPU: {extension.SLOWER}; {reason}")
    log = logging.getLogger("carve_kernels")

    def is_news(record: logging.LogRecord) -> bool:
        return reason not in record.getMessage()

    log.addFilter(is_news)
    try:
        yield
    finally:
        log.removeFilter(is_news)


class _Command(typer.core.TyperCommand):
    """Names an argument in an error as it was typed: `model:` is `--model:` here."""

    def __init__(self, *args: Any, help: str | None = None, **kwargs: Any) -> None:
        # A paragraph's lines would end where they do in the source.
        paragraphs = (" ".join(paragraph.split()) for paragraph in (help or "").split("\n\n"))
        super().__init__(*args, help="\n\n".join(paragraphs), **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            message = str(error)
            told = advised(self._named(ctx, message))
            if told != message:
                error.args = (told,)
                if isinstance(error, ImportError):
                    # It prints this, and not its arguments.
                    error.msg = told
            raise

    def _named(self, ctx: Any, message: str) -> str:
        found = _ARGUMENT.match(message)
        option = found and self._typed(ctx, found["name"])
        if not found or not option:
            return message
        value = f" {found['value']}" if found["value"] else ""
        return f"{option}{value}: {message[found.end() :]}"

    def _typed(self, ctx: Any, name: str) -> str | None:
        """The option of an argument, None if it was not typed: what was not stands elsewhere, as in a carve.json."""
        options = {parameter.name: parameter.opts[0] for parameter in self.params}
        name = name if name in options else TYPED.get(name, name)
        source = ctx.get_parameter_source(name)
        return options.get(name) if source is not None and source.name == "COMMANDLINE" else None


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
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """See where a vision-language model looks, keep that part of the image, and ask again (CARVE)."""


app.command(cls=_Command)(demo)
app.command(cls=_Command, no_args_is_help=True)(run)
app.command(cls=_Command, no_args_is_help=True)(batch)
app.command(cls=_Command, no_args_is_help=True)(profile)
app.command(cls=_Command)(doctor)
app.command(cls=_Command)(check)

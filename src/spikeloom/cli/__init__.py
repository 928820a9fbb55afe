"""The command line. Nothing heavy is imported until a command needs it, so that `--help` answers at once."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer

import spikeloom
from spikeloom import plugins
from spikeloom.cli import (
    arguments,
    audit,
    bench,
    compare,
    data,
    doctor,
    evaluate,
    export,
    import_,
    predict,
    report,
    reproduce,
    run,
    schema,
    show,
    sweep,
    train,
)
from spikeloom.cli import list as list_
from spikeloom.documentation import ADDRESS, page, page_of
from spikeloom.errors import UsageError
from spikeloom.memory import keep_memory

app = typer.Typer(
    name="spikeloom",
    help="Deep spiking neural networks: train them, measure them, reproduce published tables.\n\n"
    f"Documentation: {page('index')}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"spikeloom {spikeloom.__version__}")
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    modules: arguments.Modules = None,
) -> None:
    if {"-h", "--help"}.isdisjoint(sys.argv):  # which answers at once
        plugins.load_installed()
        plugins.import_modules(modules or [])


app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(audit.audit)
app.command()(run.run)
app.command()(predict.predict)
app.command()(show.show)
app.command()(export.export)
app.command(name="import")(import_.import_)
app.command()(report.report)
app.command()(reproduce.reproduce)
app.command()(sweep.sweep)
app.command()(compare.compare)
app.command()(bench.bench)
app.command(name="list")(list_.list_)
app.command()(schema.schema)
app.add_typer(data.app, name="data")
app.command()(doctor.doctor)


def main() -> None:
    """The `spikeloom` command: a user's mistake is one line on standard error and exit code 2."""
    keep_memory()
    try:
        code = app(_imports_first(sys.argv[1:]) or ["--help"], prog_name="spikeloom", standalone_mode=False)
    except UsageError as error:
        code = _fail(f"{error}{_reading(error)}")
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # A wrong command or option: an exception of click's, of which typer may carry a copy of its own.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        code = _fail(f"{describe()}{_advice(error)}")
    sys.exit(code if isinstance(code, int) else 0)


def _imports_first(words: list[str]) -> list[str]:
    """The words with each `--import MODULE` in front of the command, as the option of all commands that it is."""
    first: list[str] = []
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word == "--import":
            module = next(remaining, "")
            if not module or module.startswith("-"):
                raise UsageError("--import needs a module's name behind it, such as my_neurons")
            first += [word, module]
        elif word.startswith("--import="):
            first.append(word)
        else:
            rest.append(word)
    return first + rest


def _advice(error: Any) -> str:
    """What follows click's own words: the setting that an unknown option may be, and where help is."""
    context = error.ctx
    if context is None:
        return " (see 'spikeloom --help')"
    place = f" (see '{context.command_path} --help')"
    option = getattr(error, "option_name", None)
    near = getattr(error, "possibilities", None)  # click names them itself
    if option is None or near or all(p.name != "words" for p in context.command.params):
        return place
    if "." in option:
        return f"; settings are written KEY=VALUE: {option.lstrip('-')}=VALUE{place}"
    from spikeloom.train.recipe import nearest_key

    found = nearest_key(option.lstrip("-").replace("-", "_"), arguments.RECIPE_KEYS)
    return f"; settings are written KEY=VALUE: {found}{place}" if found.startswith("did you mean") else place


def _reading(error: UsageError) -> str:
    """The page on what failed, unless the message names one itself, or a command that can be pasted."""
    found = page_of(error.__traceback__)
    return f" (see {found})" if found and not re.search(rf"{re.escape(ADDRESS)}/|spikeloom [a-z]", str(error)) else ""


def _fail(message: str) -> int:
    print(f"spikeloom: error: {' '.join(message.split())}", file=sys.stderr)
    return 2

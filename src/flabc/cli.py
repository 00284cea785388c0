"""The command line: its commands, and what becomes of errors. Imports nothing heavy until a command runs.

A command is a module of ``commands``: parse, one call of the API, print.

Data goes to stdout, progress and notes to stderr. With ``--json`` stdout holds one object and nothing else.
"""

from __future__ import annotations

import json
import os
import sys

import click

from flabc import __version__
from flabc.commands.bench import bench
from flabc.commands.compress import compress
from flabc.commands.data import data
from flabc.commands.doctor import doctor
from flabc.commands.evaluate import evaluate
from flabc.commands.export import export
from flabc.commands.gate import gate
from flabc.commands.init import init
from flabc.commands.inspect import inspect
from flabc.commands.parameters import Group
from flabc.commands.recipes import recipes
from flabc.commands.recover import recover
from flabc.commands.run import run
from flabc.commands.search import search
from flabc.commands.serve import serve
from flabc.errors import FlabcError

COMMANDS = (inspect, compress, export, run, evaluate, bench, serve, gate, search, data, recover, recipes, init, doctor)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flabc")
def cli() -> None:
    """Cut a code language model, prove what it cost, and ship the engine.

    \b
    flabc init --model smollm2-135m && flabc compress && flabc export && flabc bench
    """


for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Run the command line; every failure is one readable paragraph and an exit code."""
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_fail("Interrupted.", 130))
    except BrokenPipeError:
        # Whoever read our output has gone; do not let the interpreter complain while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except FlabcError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except Exception as error:
        if os.environ.get("FLABC_TRACEBACK"):
            raise
        text = f"{type(error).__name__}: {error}".rstrip(". ")
        # A command for which 1 means something else gives the error a code of its own.
        sys.exit(_fail(f"Unexpected {text}. Set FLABC_TRACEBACK=1 to see where.", getattr(error, "exit_code", 1)))


def _fail(message: str, code: int) -> int:
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": message}, ensure_ascii=False))
    click.echo(f"flabc: {message}", err=True)
    return code

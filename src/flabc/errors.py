"""Every error that flabc raises on purpose, as one tree.

    FlabcError                 exit code 1
    ├── UsageError             the call itself is wrong (exit code 2)
    ├── UnknownNameError       a name that no registry holds, with "Did you mean"
    ├── MissingExtraError      a package that an optional extra would bring
    ├── ModelError             a model that cannot be read, or is of no known family
    ├── RecipeError            a recipe or flabc.yaml that does not validate
    ├── CorpusError            calibration or evaluation text that cannot serve
    ├── StageError             a compression stage that cannot do what it was asked
    ├── RecoveryError          training that cannot go on
    ├── LanguageModelError     a language model that a search asks, and that fails for good
    ├── ArtifactError          a folder that is not what it claims to be
    ├── ParityError            an engine whose answers differ from the reference
    ├── EngineError            an engine that cannot be opened or run
    ├── RequestError           a request that a server does not answer
    │   ├── QueueFullError     too many others wait
    │   ├── ClosedError        the server is shutting down
    │   ├── CancelledError     whoever asked has gone
    │   └── DeadlineError      it has taken too long
    └── SandboxError           model-written code that cannot be run safely

A message says what was expected, what was found, and what to do, in one paragraph.

Exit code 3 is no error: what was asked for is written but for the part that this machine cannot make (NOT_BUILT).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

#: The exit code of an export whose engine is still to be built elsewhere.
NOT_BUILT = 3


class FlabcError(Exception):
    """Root of the tree.

    Args:
        problem: what went wrong, one sentence.
        expected: what would have been right.
        found: what was there instead.
        fix: what the reader can do about it.
    """

    exit_code = 1

    def __init__(
        self, problem: str, *, expected: str | None = None, found: str | None = None, fix: str | None = None
    ) -> None:
        parts = [problem]
        parts += [f"Expected: {expected}."] if expected else []
        parts += [f"Found: {found}."] if found else []
        parts += [fix] if fix else []
        super().__init__(" ".join(parts))


class UsageError(FlabcError):
    """The call itself is wrong: an argument is missing or two of them exclude each other."""

    exit_code = 2


class UnknownNameError(FlabcError):
    """A name that is in no registry."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        guess = f"Did you mean {close[0]!r}? " if close else ""
        super().__init__(f"Unknown {kind} {name!r}. {guess}Known: {', '.join(names)}.")


class MissingExtraError(FlabcError):
    """A package that an optional extra of flabc would have brought."""


class ModelError(FlabcError):
    """A model that cannot be read, or that no known family describes."""


class RecipeError(FlabcError):
    """A recipe or a flabc.yaml that does not validate."""


class CorpusError(FlabcError):
    """Calibration or evaluation text that cannot serve its purpose."""


class StageError(FlabcError):
    """A compression stage that cannot do what it was asked."""


class RecoveryError(FlabcError):
    """Training that cannot go on: its loss is no number any more, or there is nothing to train on."""


class LanguageModelError(FlabcError):
    """A language model that a search asks does not answer, or not in a way that can be used."""


class ArtifactError(FlabcError):
    """A folder that is not what it claims to be, or that may not be overwritten."""


class ParityError(FlabcError):
    """An engine whose answers differ from those of the reference."""


class EngineError(FlabcError):
    """An engine that cannot be opened or run."""


class RequestError(FlabcError):
    """A request that a server does not answer, or not to its end."""


class QueueFullError(RequestError):
    """Too many requests wait.

    Args:
        problem: what went wrong, one sentence.
        retry_after_s: seconds after which there will probably be room.
    """

    def __init__(self, problem: str, *, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(problem, fix=f"Try again in {retry_after_s} s.")


class ClosedError(RequestError):
    """The server is shutting down."""


class CancelledError(RequestError):
    """Whoever asked has gone."""


class DeadlineError(RequestError):
    """The request has taken too long."""


class SandboxError(FlabcError):
    """Walls around model-written code that cannot be built."""


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of flabc brings it.

    Raises:
        MissingExtraError: if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # installed, but something that it needs is not: that is another fault
        raise MissingExtraError(
            f"This needs the package {module.split('.')[0]!r}, which is not installed.",
            fix=f"Run: pip install 'flabc[{extra}]'",
        ) from error

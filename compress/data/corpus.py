"""Text for calibration and evaluation, split so that the two never share a file.

A corpus is a list of documents. Which split a document belongs to is decided by the hash of its content alone, so
two copies of one file never end up on both sides.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flabc.errors import CorpusError, UnknownNameError

Split = Literal["calibration", "heldout"]

#: One document in this many is held out.
HELDOUT_ONE_IN = 5

#: Characters of the documents that a single file is cut into: enough for a calibration sequence.
PIECE_CHARACTERS = 8192

#: Files that are read as text when a folder is given.
TEXT_SUFFIXES = frozenset(
    [
        ".c",
        ".cc",
        ".cpp",
        ".cs",
        ".go",
        ".h",
        ".hpp",
        ".java",
        ".js",
        ".jsx",
        ".kt",
        ".md",
        ".php",
        ".py",
        ".pyi",
        ".rb",
        ".rs",
        ".rst",
        ".scala",
        ".sh",
        ".sql",
        ".swift",
        ".ts",
        ".tsx",
        ".txt",
    ]
)


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str

    @property
    def split(self) -> Split:
        """The side that the document's content puts it on."""
        digest = hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "calibration"


def python_stdlib() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


#: Built-in corpora: a name, and the folder whose files they are.
CORPORA = {"python-stdlib": python_stdlib}

#: Folders of the standard library that are not its source: installed packages, and data the tests feed on.
_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})


def load(name: str, split: Split) -> list[Document]:
    """Read one side of a corpus.

    Args:
        name: a built-in corpus (a key of ``CORPORA``), or the path of a text file or a folder.
        split: ``calibration`` or ``heldout``.

    Returns:
        the documents, ordered by their hash, so that a prefix is a sample of the whole.

    Raises:
        UnknownNameError: if it is neither a corpus nor a path that exists.
        CorpusError: if there is no text on that side.
    """
    documents = [document for document in _read(name) if document.split == split]
    if not documents:
        raise CorpusError(
            f"The corpus {name!r} has no {split} text.",
            expected="UTF-8 text files; one in five is held out, by the hash of its content",
            fix="Give a larger folder.",
        )
    return sorted(documents, key=lambda document: hashlib.sha256(document.text.encode()).digest()[::-1])


def fingerprint(documents: Sequence[Document]) -> str:
    """A sha256 over the documents' content, for receipts."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(hashlib.sha256(document.text.encode()).digest())
    return whole.hexdigest()


def _read(name: str) -> Iterator[Document]:
    if name in CORPORA:
        root = CORPORA[name]()
        files = [file for file in sorted(root.rglob("*.py")) if not _SKIPPED.intersection(file.relative_to(root).parts)]
    elif Path(name).is_dir():
        root = Path(name)
        files = [file for file in sorted(root.rglob("*")) if file.suffix in TEXT_SUFFIXES and file.is_file()]
    elif Path(name).is_file():
        yield from _pieces(Path(name))
        return
    else:
        raise UnknownNameError("corpus", name, [*CORPORA, "PATH"])
    for file in files:
        text = _text_of(file)
        if text:
            yield Document(file.relative_to(root).as_posix(), text)


def _pieces(file: Path) -> Iterator[Document]:
    """One file as many documents, cut at line ends, so that it too has two sides."""
    piece, size = list[str](), 0
    for line in _text_of(file).splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield Document(file.name, "".join(piece))
            piece, size = [], 0
    if piece:
        yield Document(file.name, "".join(piece))


def _text_of(file: Path) -> str:
    """The file's text, or "" if it is not UTF-8: the standard library keeps some such files on purpose."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""

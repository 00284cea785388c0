"""Where text comes from: built-in corpora, folders, files, JSON lines and Hugging Face datasets, read as a stream.

To add a built-in corpus, write a function that yields its files and list it in ``CORPORA``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flabc.errors import CorpusError, UnknownNameError, require

#: Characters of the documents that a single file is cut into: enough for a calibration sequence.
PIECE_CHARACTERS = 8192

#: Characters that a built-in corpus made of whatever is installed gives at most.
INSTALLED_CHARACTERS = 48_000_000

#: What a line of JSON or a row of a dataset calls its text.
TEXT_FIELDS = ("text", "content", "code")

#: How a Hugging Face dataset is written: ``hf:owner/name``, ``hf:owner/name:split`` or ``hf:owner/name:split:column``.
HUB = "hf:"

#: Files that are read as text when a folder is given.
TEXT_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("c", "cc", "cpp", "cs", "go", "h", "hpp", "java", "js", "jsx", "kt", "md", "php"),
        *("py", "pyi", "rb", "rs", "rst", "scala", "sh", "sql", "swift", "ts", "tsx", "txt"),
    )
)

#: Files whose lines are JSON objects with a text each.
LINES_SUFFIXES = (".jsonl", ".jsonl.gz")

#: Folders that hold no source of their own: installed packages, and data that tests feed on.
SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"})

#: A document's name and its text.
Text = tuple[str, str]


def python_stdlib() -> Iterator[Text]:
    """The running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _texts(root, sorted(file for file in root.rglob("*.py") if not _skipped(file, root)))


def python_packages() -> Iterator[Text]:
    """The Python files of the packages installed beside flabc: a sample, picked by the hash of their paths."""
    root = Path(sysconfig.get_paths()["purelib"])
    return _sample(root, (file for file in root.rglob("*.py") if not _skipped(file, root)))


def english() -> Iterator[Text]:
    """English prose about software: the documentation and descriptions of the packages installed beside flabc."""
    root = Path(sysconfig.get_paths()["purelib"])
    return _sample(
        root, (file for file in root.rglob("*") if file.suffix in (".md", ".rst") or file.name == "METADATA")
    )


#: Built-in corpora: what each reads.
CORPORA: dict[str, Callable[[], Iterator[Text]]] = {
    "english": english,
    "python-packages": python_packages,
    "python-stdlib": python_stdlib,
}


def read(name: str) -> Iterator[Text]:
    """Every text of a corpus, one after another.

    Args:
        name: a key of ``CORPORA``, the path of a folder, a text file, a JSON-lines or a parquet file, or ``hf:`` and a
            dataset.

    Raises:
        UnknownNameError: if it is none of these.
        CorpusError: if a line or row has no text.
        MissingExtraError: if a dataset is asked for and the library that reads it is not installed.
    """
    path = Path(name)
    if name in CORPORA:
        return CORPORA[name]()
    if name.startswith(HUB) or ".parquet" in path.name:
        return _rows(name)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _lines(path) if path.name.endswith(LINES_SUFFIXES) else _pieces(path)
    raise UnknownNameError("corpus", name, [*CORPORA, "PATH", f"{HUB}owner/name"])


def _folder(root: Path) -> Iterator[Text]:
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    yield from _texts(root, [file for file in files if file.suffix in TEXT_SUFFIXES])
    for file in files:
        if file.name.endswith(LINES_SUFFIXES):
            yield from _lines(file)


def _texts(root: Path, files: Iterable[Path]) -> Iterator[Text]:
    for file in files:
        if text := _text_of(file):
            yield file.relative_to(root).as_posix(), text


def _sample(root: Path, files: Iterable[Path]) -> Iterator[Text]:
    """Files in the order of their paths' hashes until they are enough: reading all of them would take minutes."""
    left = INSTALLED_CHARACTERS
    for name, text in _texts(root, sorted(files, key=lambda file: _hash(file.relative_to(root).as_posix()))):
        yield name, text
        left -= len(text)
        if left <= 0:
            return


def _pieces(file: Path) -> Iterator[Text]:
    """One file as many documents, cut at line ends, so that it too has two sides."""
    piece, size = list[str](), 0
    for line in _text_of(file).splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield file.name, "".join(piece)
            piece, size = [], 0
    if piece:
        yield file.name, "".join(piece)


def _lines(file: Path) -> Iterator[Text]:
    """The texts of a file with one JSON object per line.

    Raises:
        CorpusError: naming the line that is no such object, or behind which the file is damaged.
    """
    number = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file.name}:{number}", _field(_object(file, number, line), f"{file}, line {number},")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # gzip's own errors are among these
        raise CorpusError(f"{file} cannot be read behind line {number}: {error}") from error


def _object(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise CorpusError(f"{file}, line {number}, is not JSON: {error}") from error


def _rows(name: str) -> Iterator[Text]:
    """The texts of a Hugging Face dataset, or of a parquet file, streamed.

    Raises:
        UnknownNameError: if its rows have no column of the name that was given.
        CorpusError: if the dataset cannot be read, or its rows have no text.
    """
    require("datasets", "data")
    import datasets

    dataset, split, column = [*name.removeprefix(HUB).split(":"), "", ""][:3]
    how: dict[str, Any] = {"split": split or "train", "streaming": True}
    try:
        rows = (
            datasets.load_dataset(dataset, **how)
            if name.startswith(HUB)
            else datasets.load_dataset("parquet", data_files=dataset, **how)
        )
        for number, row in enumerate(rows):
            if column and column not in row:
                raise UnknownNameError("column", column, row)
            yield f"{dataset}:{number}", str(row[column]) if column else _field(row, f"{name}, row {number},")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CorpusError(f"The dataset {name!r} cannot be read: {error}") from error


def _field(content: Any, place: str) -> str:
    """The text of a line or row.

    Raises:
        CorpusError: if it has none.
    """
    for field in TEXT_FIELDS:
        if isinstance(content, dict) and isinstance(content.get(field), str):
            return str(content[field])
    found = f"fields {sorted(content)}" if isinstance(content, dict) else type(content).__name__
    raise CorpusError(f"{place} has no text.", expected=f"one of the fields {', '.join(TEXT_FIELDS)}", found=found)


def _text_of(file: Path) -> str:
    """The file's text, or "" if it is not UTF-8: the standard library keeps some such files on purpose."""
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _skipped(file: Path, root: Path) -> bool:
    return bool(SKIPPED.intersection(file.relative_to(root).parts))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

"""Projects: whose code tasks are mined from. Folders, installed packages, archives, each with its licence."""

from __future__ import annotations

import difflib
import importlib.metadata
import re
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from email.policy import compat32
from pathlib import Path, PurePosixPath

from flabc.errors import CorpusError, UnknownNameError

from .source import SKIPPED

#: The standard library as one project; every package that is installed beside flabc, each as one.
STDLIB, PACKAGES = "python-stdlib", "python-packages"

#: Files larger than this are data or generated.
LARGEST_FILE = 1_000_000

#: Folders that hold no code of the project's own: copies of others' keep their licences.
_NOT_OWN = SKIPPED | {"_vendor", "_vendored_packages", "thirdparty_files", "vendor", "vendored"}

#: Folders of tests.
_TESTS = {"test", "tests"}

_ZIPS, _TARS = (".zip", ".whl"), (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

#: Where the metadata of a package is, as wheels and source archives name it.
_METADATA = ("METADATA", "PKG-INFO")

_CLASSIFIER = "License :: OSI Approved :: "


@dataclass(frozen=True)
class Project:
    """Code that belongs together: it is never on two sides of a split.

    Args:
        name: what it is called.
        licence: as its metadata says it; empty if that says nothing.
        files: paths and sources of its Python files.
        tests: those of its tests, where they are installed with it.
        importable: whether its modules can be imported here, by their paths.
    """

    name: str
    licence: str
    files: tuple[tuple[str, str], ...]
    tests: tuple[tuple[str, str], ...] = ()
    importable: bool = False


def projects(source: str) -> Iterator[Project]:
    """The projects of a source.

    Args:
        source: a folder, an archive (zip, whl, tar), an installed package's name, ``python-stdlib`` or
            ``python-packages``.

    Raises:
        UnknownNameError: if it is none of these.
        CorpusError: if an archive cannot be read.
    """
    path = Path(source)
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        tests = ((f"test/{file.relative_to(root / 'test').as_posix()}", file) for file in (root / "test").rglob("*.py"))
        yield Project(STDLIB, "PSF-2.0", _folder_files(root), _test_files(tests), importable=True)
    elif source == PACKAGES:
        installed = {each.metadata["Name"] or "": each for each in importlib.metadata.distributions()}
        yield from (_package(each) for name, each in sorted(installed.items()) if name)
    elif path.is_dir():
        yield Project(path.resolve().name, _folder_licence(path), _folder_files(path))
    elif path.is_file():
        yield _archive(path)
    else:
        yield _installed(source)


def _folder_files(root: Path) -> tuple[tuple[str, str], ...]:
    files = sorted(file for file in root.rglob("*.py") if file.is_file())
    found = ((file.relative_to(root).as_posix(), file.read_bytes()) for file in files if _wanted(file, root))
    return tuple(_decoded(found))


def _test_files(files: Iterable[tuple[str, Path]]) -> tuple[tuple[str, str], ...]:
    """Those of files that hold tests."""
    named = sorted((name, file) for name, file in files if _is_test(name) and file.is_file())
    return tuple(_decoded((name, file.read_bytes()) for name, file in named if file.stat().st_size <= LARGEST_FILE))


def _is_test(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith("test_") and not (_NOT_OWN - _TESTS).intersection(path.parts)


def _wanted(file: Path, root: Path) -> bool:
    return not _NOT_OWN.intersection(file.relative_to(root).parts) and file.stat().st_size <= LARGEST_FILE


def _decoded(files: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, str]]:
    """What is UTF-8; the rest is left out: the standard library keeps such files on purpose."""
    for name, content in files:
        try:
            yield name, content.decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue


def _folder_licence(folder: Path) -> str:
    """What ``pyproject.toml`` or ``PKG-INFO`` says."""
    project, info = folder / "pyproject.toml", folder / "PKG-INFO"
    if project.is_file():
        try:
            return _toml_licence(project.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, tomllib.TOMLDecodeError):
            return ""
    return _header_licence(info.read_text(encoding="utf-8", errors="replace")) if info.is_file() else ""


def _toml_licence(text: str) -> str:
    given = tomllib.loads(text).get("project", {}).get("license", "")
    return str(given.get("text", "")) if isinstance(given, dict) else str(given)


def _header_licence(text: str) -> str:
    """The licence of a package's metadata: the expression, the field if it is short, or a classifier."""
    headers = HeaderParser(policy=compat32).parsestr(text)
    if expression := headers.get("License-Expression"):
        return str(expression)
    named = str(headers.get("License", "")).strip()
    if named and "\n" not in named and named.upper() != "UNKNOWN":
        return named
    classifiers = (str(each) for each in headers.get_all("Classifier", []))
    return next((each.removeprefix(_CLASSIFIER) for each in classifiers if each.startswith(_CLASSIFIER)), "")


def _installed(name: str) -> Project:
    """A package that is installed, by the name of its distribution or of a module in it.

    Raises:
        UnknownNameError: if nothing of the name is installed.
    """
    modules = importlib.metadata.packages_distributions()
    try:
        found = importlib.metadata.distribution(modules.get(name, [name])[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        names = [*modules, STDLIB, PACKAGES, "PATH"]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        raise UnknownNameError("source", name, near or [STDLIB, PACKAGES, "PATH", "an installed package"]) from None
    return _package(found)


def _package(found: importlib.metadata.Distribution) -> Project:
    licence = _header_licence(found.read_text("METADATA") or found.read_text("PKG-INFO") or "")
    listed = sorted({str(file) for file in found.files or () if file.suffix == ".py" and ".." not in file.parts})
    paths = [(each, Path(str(found.locate_file(each)))) for each in listed]
    kept = [(each, file) for each, file in paths if file.is_file() and not _NOT_OWN.intersection(Path(each).parts)]
    contents = ((each, file.read_bytes()) for each, file in kept if file.stat().st_size <= LARGEST_FILE)
    tests = _test_files((each, file) for each, file in paths if _TESTS.intersection(Path(each).parts))
    return Project(_normal(found.metadata["Name"]), licence, tuple(_decoded(contents)), tests, importable=True)


def _archive(file: Path) -> Project:
    """An archive, read without being unpacked.

    Raises:
        CorpusError: if it is none, or is damaged.
    """
    try:
        members = dict(_members(file))
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise CorpusError(f"{file} cannot be read as an archive: {error}") from error
    named = [member for member in sorted(members) if PurePosixPath(member).name in _METADATA]
    text = members[named[0]].decode(errors="replace") if named else ""
    projects_toml = [member for member in sorted(members) if PurePosixPath(member).name == "pyproject.toml"]
    licence = _header_licence(text)
    if not named and projects_toml:
        try:
            licence = _toml_licence(members[projects_toml[0]].decode(errors="replace"))
        except tomllib.TOMLDecodeError:
            licence = ""
    name = HeaderParser(policy=compat32).parsestr(text).get("Name") or file.name.split(".")[0]
    code = ((member, content) for member, content in sorted(members.items()) if member.endswith(".py"))
    return Project(_normal(name), licence, tuple(_decoded(code)))


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Python files and metadata of an archive, none larger than ``LARGEST_FILE``.

    Raises:
        CorpusError: if its name says that it is none.
    """
    if file.name.endswith(_ZIPS):
        with zipfile.ZipFile(file) as opened:
            for info in opened.infolist():
                if _is_read(info.filename, info.file_size):
                    yield info.filename, opened.read(info)
    elif file.name.endswith(_TARS):
        with tarfile.open(file) as packed:
            for member in packed:
                stream = packed.extractfile(member) if member.isfile() and _is_read(member.name, member.size) else None
                if stream is not None:
                    yield member.name, stream.read()
    else:
        raise CorpusError(f"{file} is no archive.", expected=f"a name that ends in {', '.join(_ZIPS + _TARS)}")


def _is_read(name: str, size: int) -> bool:
    path = PurePosixPath(name)
    wanted = path.suffix == ".py" or path.name in (*_METADATA, "pyproject.toml")
    return wanted and size <= LARGEST_FILE and not _NOT_OWN.intersection(path.parts)


def _normal(name: str) -> str:
    """A package's name as the Python registry compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()

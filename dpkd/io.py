"""Files that survive a crash: the one atomic write, the one append-only log of JSON lines.

A file or folder appears whole or not at all: it is written under a temporary name in the same folder, flushed to the
disk and renamed. Temporary names are new and exclusive, so no symbolic link is followed; modes follow the umask. What
the file system refuses (a full disk, no permission) becomes a DpkdError, and the older state stays as it was.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dpkd.errors import DpkdError

_TEMPORARY = ".{name}.{token}.tmp"
APPEND = os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a log is never a link that somebody planted
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class StorageError(DpkdError):
    """The file system refused: no space, no permission, a read-only disk."""


@contextmanager
def storage_errors(path: Path, advice: str = "") -> Iterator[None]:
    """What the file system, or the writer of safetensors, refuses in the block becomes a StorageError about `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(_refusal(path, error, advice)) from error


def _refusal(path: Path, error: Exception, advice: str) -> str:
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    is_link = getattr(error, "errno", None) == errno.ELOOP
    known = "the disk is full" if full else "it is a symbolic link" if is_link else None
    reason = known or getattr(error, "strerror", None) or str(error)
    what_next = "Free some space and run the command again; what was saved before is intact." if full else ""
    return " ".join(part for part in (f"{path} cannot be written or read: {reason}.", advice or what_next) if part)


# --- whole files and folders -----------------------------------------------------------------------------------------


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else has; it begins with a dot, and does not grow with a long name."""
    return path.with_name(_TEMPORARY.format(name=path.name[:100], token=secrets.token_hex(6)))


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file to write into; at the end of the block it takes the place of `path`, if all went well.

    Raises StorageError when the file system refuses; an older file is then as it was.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = _temporary(path)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            mode = os.fstat(descriptor).st_mode & 0o777
        finally:
            os.close(descriptor)
        try:
            yield unfinished
            os.chmod(unfinished, mode)  # some writers put a private file of their own in its place
            sync(unfinished)
            os.replace(unfinished, path)
            sync(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into; at the end of the block it takes the place of `path`, if all went well.

    Raises StorageError when the file system refuses; an older folder is then as it was.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, old = _temporary(path), _temporary(path)
        os.mkdir(unfinished)
        try:
            yield unfinished
            _seal(unfinished)
            with suppress(FileNotFoundError):
                os.rename(path, old)
            try:
                os.rename(unfinished, path)
            except OSError:
                with suppress(FileNotFoundError):
                    os.rename(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
            sync(path.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Everything in a folder that was just made, on the disk and readable as the umask says."""
    mode = os.stat(folder).st_mode & 0o666
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place, name)
            if not file.is_symlink():
                os.chmod(file, mode | (os.stat(file).st_mode & 0o111))
                sync(file)
        sync(Path(place))


def link_folder(source: Path, target: Path) -> None:
    """Make `target` a second folder of the files in `source`, whole or not at all; nothing, where there is none.

    Hard links where the file system has them: our files are replaced and never changed.
    """
    if source.is_dir():
        with whole_folder(target) as unfinished:
            shutil.copytree(source, unfinished, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove_folder(folder: Path) -> None:
    """Delete a folder; a process that is killed in here leaves no half of it under its name."""
    going = _temporary(folder)
    os.rename(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Delete what killed processes left half-written in a folder, or `of` one file there; only while it is locked."""
    own = ".*.tmp" if of is None else _TEMPORARY.format(name=glob.escape(of[:100]), token="[0-9a-f]" * 12)
    foreign = [".tmp??????"] if of is None else []  # where safetensors writes, before it renames
    for entry in [entry for pattern in (own, *foreign) for entry in folder.glob(pattern)]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all; a pipe or a device is written to as it is.

    Raises StorageError when the file system refuses.
    """
    if path.exists() and not path.is_file():
        with storage_errors(path):
            path.write_bytes(content)
        return path
    with whole_file(path) as unfinished:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_TRUNC)
        try:
            _write(descriptor, content)
        finally:
            os.close(descriptor)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text in UTF-8, whole or not at all; half a surrogate pair, which has no UTF-8, as its JSON escape."""
    return write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, values: Any) -> Path:
    """Write indented JSON, whole or not at all; numbers that are not finite as the texts NaN, Infinity, -Infinity."""
    return write_text(path, dumps(values, indent=2) + "\n")


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def cache_folder() -> Path:
    """`$DPKD_CACHE`, else `$XDG_CACHE_HOME/dpkd`, else `~/.cache/dpkd`."""
    if cache := os.environ.get("DPKD_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpkd"


# --- JSON ------------------------------------------------------------------------------------------------------------


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: numbers that are not finite become the texts NaN, Infinity and -Infinity.

    >>> dumps({"loss": float("nan"), "steps": [1, 2]})
    '{"loss": "NaN", "steps": [1, 2]}'
    """
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_strict(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: _strict(item) for name, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def with_non_finite(value: Any) -> Any:
    """The inverse of what `dumps` does to numbers that are not finite."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: with_non_finite(item) for name, item in value.items()}
    return [with_non_finite(item) for item in value] if isinstance(value, list) else value


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Raises DpkdError, with `advice` on what to do, when it cannot be read or holds anything else.
    """
    with storage_errors(path, advice):
        content = path.read_bytes()
    row = parsed(content)
    if row is None:
        found = "an empty file" if not content.strip() else "text that is no JSON object, or is cut off"
        raise DpkdError(f"{path} is damaged: expected a JSON object, found {found}. {advice}".rstrip())
    return row


def parsed(content: bytes | str) -> dict[str, Any] | None:
    """A JSON object; None when it is none."""
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def digest(value: Any) -> str:
    """A hash, 32 hexadecimal digits, of anything that JSON can say; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:32]


def regular(path: Path) -> Path:
    """The path, unless it is a pipe, a device, a socket or a folder: reading one of these may never end.

    Raises OSError for those, for what is not there, and for a name that no file can have.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file", str(path))
    return path


def sha256(path: Path) -> str:
    """The hash of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- logs of JSON lines ----------------------------------------------------------------------------------------------


class JsonLog:
    """An append-only file of JSON objects, one a line.

    A process can die at any byte, so the last line may be torn: it is never read, and is cut off before another
    follows. A damaged line before it is an error that names the file and the line.
    """

    def __init__(self, path: Path, **fields: type) -> None:
        """Every line has the `fields`, each of its type."""
        self.path = path
        self._fields = fields
        self._repaired = False

    def lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Each line as its bytes without the line feed, and as JSON; without a torn last one.

        Raises DpkdError, with file and line, when another line is damaged, or the file cannot be read.
        """
        if not self.path.exists():
            return []
        with storage_errors(self.path):
            *lines, tail = self.path.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate([*lines, tail], start=1):
            row = parsed(line)
            if row is not None and all(isinstance(row.get(name), kind) for name, kind in self._fields.items()):
                rows.append((line, row))
            elif line.strip() and number <= len(lines):
                fields = " and ".join(f"`{name}`" for name in self._fields)
                raise DpkdError(
                    f"{self.path}:{number}: expected one JSON object{' with ' if fields else ''}{fields} on this line. "
                    "Only the last line of a process that was killed may be damaged; remove this line to go on."
                )
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """All lines as JSON; raises as `lines` does."""
        return [row for _, row in self.lines()]

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add lines in one piece; they are with the operating system when this returns.

        Raises StorageError when the file system refuses; the file then ends where it did.
        """
        content = "".join(f"{dumps(row)}\n" for row in rows).encode("utf-8", errors="backslashreplace")
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | APPEND, 0o666)
            try:
                self._repair(descriptor)
                append_to(descriptor, content)
            finally:
                os.close(descriptor)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Drop the lines that are not wanted, all at once or not at all; returns how many went.

        Raises DpkdError for a damaged line.
        """
        rows = self.lines()
        kept = [line for line, row in rows if wanted(row)]
        if len(kept) < len(rows):
            write_bytes(self.path, b"".join(line + b"\n" for line in kept))
        return len(rows) - len(kept)

    def _repair(self, descriptor: int) -> None:
        """Once for each process, make the file end at the end of a line."""
        if not self._repaired:
            cut_torn_line(descriptor)
            self._repaired = True


def open_log(path: Path) -> IO[str]:
    """A text file to append to. Raises StorageError for a symbolic link, and when the file system refuses."""
    with storage_errors(path):
        return os.fdopen(os.open(path, os.O_WRONLY | APPEND, 0o666), "a", encoding="utf-8")


def append_to(descriptor: int, content: bytes) -> None:
    """Add bytes to an open file, all of them or none."""
    size = os.fstat(descriptor).st_size
    try:
        _write(descriptor, content)
    except BaseException:
        os.ftruncate(descriptor, size)
        raise


def cut_torn_line(descriptor: int) -> bool:
    """Make an open file end at the end of a line: a whole last line gets its line feed, half a line goes.

    Returns whether half a line went.
    """
    size = os.fstat(descriptor).st_size
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        begin = max(0, start - (1 << 16))
        tail = os.pread(descriptor, start - begin, begin) + tail
        start = begin
    tail = tail[tail.rfind(b"\n") + 1 :]
    if tail.strip() and parsed(tail) is not None:
        append_to(descriptor, b"\n")
        return False
    if tail:
        os.ftruncate(descriptor, size - len(tail))
    return bool(tail)

"""Records of answers: one line of JSON per sample and reading, in a file from which a run can be resumed."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Record:
    """One answer to one sample.

    Attributes:
        suite, task, length, sample: identify the sample; `length` is the one it is listed under.
        prompt: hash of the tokens that the model read.
        prompt_tokens: number of these tokens.
        model: the checkpoint's name and a hash of its weights.
        heads: name and hash of the file of trained heads, if they were asked for.
        asked: the options that were given: strategy, blocks, compressor, anchor_length, passing_length, max_new_tokens.
        strategy, compressor, blocks, anchor_length, passing_length, ranks: the reading, by the plan.
        exact: as in :class:`apb.Generation`; without an answer, by plan and decode method.
        device, dtype: of the run.
        processes: number of answers that were worked on at a time, in one run or in several that shared the machine;
            times measure speed only if it is 1.
        prediction, answers, score: the model's answer, the correct ones, and 0 to 100.
        seconds, prefill_s: of the whole answer, and of prefill alone.
        decode: how the answer was decoded: its method, the share of the keys that tokens attended to, and if that is
            exact; None in older records, and without an answer.
        error: why there is no answer, as a sentence; the score is then 0, and a resumed run tries again.
    """

    suite: str
    task: str
    length: int
    sample: str
    prompt: str
    prompt_tokens: int
    model: str
    asked: dict[str, Any]
    strategy: str
    compressor: str | None
    heads: str | None
    blocks: int
    anchor_length: int
    passing_length: int
    ranks: int
    exact: bool
    device: str
    dtype: str
    processes: int
    prediction: str
    answers: tuple[str, ...]
    score: float
    seconds: float
    prefill_s: float
    decode: dict[str, Any] | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Key by which a resumed run skips a record: the same sample, read in the same way by the same model."""
        return (*self.group, self.sample, self.prompt)

    @property
    def group(self) -> tuple[Any, ...]:
        """The cell of a table that the record belongs to."""
        return (self.model, self.dtype, self.suite, self.task, self.length, *self.reading)

    @property
    def reading(self) -> tuple[Any, ...]:
        """The requested reading; options left to the plan may vary with the sample."""
        return (*sorted(self.asked.items()), self.heads, self.ranks)

    @property
    def reading_name(self) -> str:
        """The reading in words: what was asked for, as the plan's own choices may differ between its samples."""
        parts, passes = [self.strategy], self.asked.get("passing_length") != 0
        if passes and "compressor" in self.asked:
            parts.append(self.asked["compressor"])
        if self.asked.get("blocks", 1) > 1:
            parts.append(f"{self.asked['blocks']} blocks")
        for name, word in (("anchor_length", "anchor"), ("passing_length", "passing")):
            if name in self.asked:
                parts.append(f"{word} {self.asked[name]:,}" if self.asked[name] else f"no {word}")
        said = ("strategy", "compressor", "blocks", "anchor_length", "passing_length")
        for name, value in self.asked.items():
            if name not in said:
                parts.append(name.replace("_", " ") + ("" if value is True else f" {value}"))
        if self.heads and passes:
            parts.append(self.heads)
        if self.ranks > 1:
            parts.append(f"{self.ranks} ranks")
        return ", ".join(parts)

    def line(self) -> str:
        """The record as a line of a file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


# Checks that a parsed value fits a field, by the field's annotation.
_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int": lambda value: isinstance(value, int),
    "float": lambda value: isinstance(value, (int, float)),
    "bool": lambda value: isinstance(value, bool),
    "dict[str, Any]": lambda value: isinstance(value, dict) and not any(map(_several, value.values())),
    "dict[str, Any] | None": lambda value: value is None or _FITS["dict[str, Any]"](value),
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
}
_LATER = {"decode", "error"}  # fields that older records do not have
_FIELDS = {field.name: _FITS[str(field.type)] for field in fields(Record)}


def _several(value: Any) -> bool:
    return isinstance(value, (dict, list))


def record_of(values: Any) -> Record:
    """The record of a parsed line; ValueError if a field is missing, unknown, or of another type."""
    if not isinstance(values, dict) or set(values) | _LATER != set(_FIELDS):
        raise ValueError("not the fields of a record")
    for name, value in values.items():
        if not _FIELDS[name](value):
            raise ValueError(f"the field {name!r} cannot be {value!r}")
    return Record(**{**values, "answers": tuple(values["answers"])})


def read_records(path: Path) -> Iterator[Record]:
    """The records of a .jsonl or .jsonl.gz file; a last line that was cut short is left out."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                record = _parsed(path, number, line)
                if record is not None:
                    yield record
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error  # errors inside a gzip file have no errno
        raise InputError(f"The records {str(path)!r} cannot be read: {reason}.") from error


def _parsed(path: Path, number: int, line: bytes) -> Record | None:
    """The record of a line; None if it was cut short; InputError if it is not a record."""
    try:
        return record_of(json.loads(line.decode()))  # here: a cut may go through a character
    except ValueError as error:
        if not line.endswith(b"\n"):
            return None
        raise InputError(f"Line {number} of {str(path)!r} is no record of apb eval: {error}.") from error


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a .jsonl or .jsonl.gz file, replacing it atomically; the same records give the same bytes."""
    text = "".join(record.line() for record in records).encode()
    part = path.with_name(path.name + ".part")
    part.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    part.replace(path)


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


class Store:
    """The records of a run, and the file they are appended to as they come (none if `path` is None).

    Several runs may append to one file at a time: each takes its turn by a lock on it, and sees the others' records.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._records: dict[tuple[Any, ...], Record] = {}
        self._file: FileIO | None = None
        self._lines = self._seen = 0  # of the file, in lines and bytes
        if path is None:
            return
        if path.suffix == ".gz":
            raise InputError(f"Records cannot be appended to {str(path)!r}; name a file that ends in .jsonl.")
        self._path = path
        try:
            self._file = FileIO(path, "a+")
            with self._turn():
                pass
        except OSError as error:
            raise InputError(f"The records cannot be written to {str(path)!r}: {error.strerror}.") from error

    def __iter__(self) -> Iterator[Record]:
        """The records, in the order in which they came."""
        return iter(self._records.values())

    def get(self, key: tuple[Any, ...]) -> Record | None:
        """The answer of that key, from this run or another one that writes to the file; None if there is none."""
        if key not in self._records and self._file is not None and os.fstat(self._file.fileno()).st_size > self._seen:
            with self._turn():
                pass
        return self._records[key] if self._answered(key) else None

    def _answered(self, key: tuple[Any, ...]) -> bool:
        return key in self._records and self._records[key].error is None

    def add(self, record: Record) -> None:
        """Keep a record, unless another run has added an answer of its key by now; on disk when this returns."""
        if self._file is None:
            self._records[record.key] = record
            return
        with self._turn() as file:
            if not self._answered(record.key):
                line = record.line().encode()
                left = memoryview(line)
                while left:
                    left = left[file.write(left) :]
                self._records[record.key] = record
                self._lines, self._seen = self._lines + 1, self._seen + len(line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    @contextmanager
    def _turn(self) -> Iterator[FileIO]:
        """Lock the file, read the lines that others have appended, and remove the partial line of a killed run."""
        assert self._file is not None, "there is a file to write to"
        with suppress(OSError):  # on file systems without locks lines are still appended whole
            fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self._file.seek(self._seen)
            for line in BytesIO(self._file.readall()):
                record = _parsed(self._path, self._lines + 1, line)
                if record is None:
                    self._file.truncate(self._seen)  # a partial last line; under the lock nobody else is writing
                    break
                if not line.endswith(b"\n"):
                    self._file.write(b"\n")
                    self._seen += 1
                if not self._answered(record.key):
                    self._records[record.key] = record
                self._lines, self._seen = self._lines + 1, self._seen + len(line)
            yield self._file
        finally:
            with suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)


def file_name(path: str | None) -> str | None:
    """A file's name with 8 hex digits of its content."""
    if path is None:
        return None
    with open(path, "rb") as file:
        return f"{Path(path).name} {hashlib.file_digest(file, 'sha256').hexdigest()[:8]}"


def model_name(model: torch.nn.Module, name: str) -> str:
    """A checkpoint's name (folder, file or id) with 8 hex digits of its weights: 64 values of every parameter."""
    from ..hf.identity import weights_digest

    path = Path(name)
    return f"{path.resolve().name if path.exists() else name} {weights_digest(model).hexdigest()[:8]}"

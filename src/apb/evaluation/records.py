"""What happened to every sample: one line of JSON each, in a file that a run can be resumed from."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Record:
    """One answer to one sample.

    Attributes:
        suite, task, length, sample: which sample; `length` is the one it is listed under.
        prompt: hash of the tokens that the model read.
        prompt_tokens: how many they were.
        model: the checkpoint's name and a hash of its weights.
        heads: name and hash of the file of trained heads, where they scored.
        asked: the options that were given: strategy, blocks, compressor, anchor_length, passing_length.
        strategy, compressor, blocks, anchor_length, passing_length, ranks, exact: how it was read, by the plan.
        device, dtype: what it ran on.
        processes: how many runs shared the machine; the times tell of speed only where it is 1.
        prediction, answers, score: what was said, what is right, and 0 to 100.
        seconds, prefill_s: of the whole answer, and of reading alone.
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

    @property
    def key(self) -> tuple[Any, ...]:
        """What a run that is resumed must not do again: the same sample, read in the same way by the same model."""
        return (*self.group, self.sample, self.prompt)

    @property
    def group(self) -> tuple[Any, ...]:
        """The cell of a table that it belongs to."""
        return (self.model, self.dtype, self.suite, self.task, self.length, *self.reading)

    @property
    def reading(self) -> tuple[Any, ...]:
        """How it was to be read; what was left to the plan may vary with the sample."""
        return (*sorted(self.asked.items()), self.heads, self.ranks)

    @property
    def reading_name(self) -> str:
        """How it was read, in words."""
        parts = [self.strategy]
        if self.compressor:
            parts.append(self.compressor)
        if self.blocks > 1:
            parts.append(f"{self.blocks} blocks")
        for name, word in (("anchor_length", "anchor"), ("passing_length", "passing")):
            if name in self.asked:
                parts.append(f"{word} {self.asked[name]:,}" if self.asked[name] else f"no {word}")
        if self.heads and self.compressor:
            parts.append(self.heads)
        if self.ranks > 1:
            parts.append(f"{self.ranks} ranks")
        return ", ".join(parts)

    def line(self) -> str:
        """The record as a line of a file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


# Whether a parsed value fits a field, by the field's annotation.
_FITS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int": lambda value: isinstance(value, int),
    "float": lambda value: isinstance(value, (int, float)),
    "bool": lambda value: isinstance(value, bool),
    "dict[str, Any]": lambda value: isinstance(value, dict) and not any(map(_several, value.values())),
    "tuple[str, ...]": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
}
_FIELDS = {field.name: _FITS[str(field.type)] for field in fields(Record)}


def _several(value: Any) -> bool:
    return isinstance(value, (dict, list))


def record_of(values: Any) -> Record:
    """The record of a parsed line; ValueError where a field is missing, unknown, or of another kind."""
    if not isinstance(values, dict) or set(values) != set(_FIELDS):
        raise ValueError("not the fields of a record")
    for name, fits in _FIELDS.items():
        if not fits(values[name]):
            raise ValueError(f"the field {name!r} cannot be {values[name]!r}")
    return Record(**{**values, "answers": tuple(values["answers"])})


def read_records(path: Path) -> Iterator[Record]:
    """The records of a .jsonl or .jsonl.gz file; a last line that was cut short is left out."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    yield record_of(json.loads(line.decode()))  # here: a cut may go through a character
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        return
                    raise InputError(f"Line {number} of {str(path)!r} is no record of apb eval: {error}.") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error  # what is wrong inside a gzip file has no number
        raise InputError(f"The records {str(path)!r} cannot be read: {reason}.") from error


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a .jsonl or .jsonl.gz file anew, or replace it at once; the same records give the same bytes."""
    text = "".join(record.line() for record in records).encode()
    part = path.with_name(path.name + ".part")
    part.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    part.replace(path)


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


class Store:
    """The records of a run, and the file they are appended to as they come (none if `path` is None)."""

    def __init__(self, path: Path | None = None) -> None:
        self._records: dict[tuple[Any, ...], Record] = {}
        self._file: IO[str] | None = None
        if path is None:
            return
        if path.suffix == ".gz":
            raise InputError(f"Records cannot be appended to {str(path)!r}; name a file that ends in .jsonl.")
        try:
            if path.exists():
                for record in read_records(path):
                    self._records[record.key] = record
                write_records(path, self._records.values())  # without a last line that was cut short
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"The records cannot be written to {str(path)!r}: {error.strerror}.") from error

    def __iter__(self) -> Iterator[Record]:
        """The records, in the order in which they came."""
        return iter(self._records.values())

    def get(self, key: tuple[Any, ...]) -> Record | None:
        """The record of that key, where there is one."""
        return self._records.get(key)

    def add(self, record: Record) -> None:
        """Keep a record; on disk when this returns."""
        self._records[record.key] = record
        if self._file is not None:
            self._file.write(record.line())
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def file_name(path: str | None) -> str | None:
    """A file's name with 8 hex digits of its content."""
    if path is None:
        return None
    with open(path, "rb") as file:
        return f"{Path(path).name} {hashlib.file_digest(file, 'sha256').hexdigest()[:8]}"


def model_name(model: torch.nn.Module, name: str) -> str:
    """A checkpoint's name (folder, file or id) with 8 hex digits of its weights: 64 values of every parameter."""
    digest = hashlib.sha256()
    for parameter_name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()[:64].float().cpu().numpy()
        digest.update(f"{parameter_name} {tuple(parameter.shape)} ".encode() + values.tobytes())
    path = Path(name)
    return f"{path.resolve().name if path.exists() else name} {digest.hexdigest()[:8]}"

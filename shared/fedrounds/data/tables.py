"""CSV files as rows of numbers with a label each."""

import csv
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedrounds.data.folders import files_under, unreadable
from fedrounds.errors import DataUnavailable, InvalidInput

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What is read of a table: the feature columns in this order, and the label's.

    `classes` are the label's values as in the file; a label's number is its index among them.
    """

    label: str
    features: tuple[str, ...]
    classes: tuple[str, ...]


def load_tables(root: Path, columns: Columns) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read every `.csv` file under `root`: UTF-8, comma-separated, first line the column names.

    Columns may stand in any order, others are passed over, and so are empty lines.

    Returns:
        rows float32 [n, features] and labels int64 [n], in the order of the files' names.

    Raises:
        DataUnavailable: no rows, or a file can't be read.
        InvalidInput: a column is missing, or a cell is no finite number or no class; the message
            names file, line and column.
    """
    numbers = array("f")
    labels = array("q")
    class_numbers = {name: number for number, name in enumerate(columns.classes)}
    for path in files_under(root, ".csv"):
        for line, cells in _read_rows(path, (*columns.features, columns.label)):
            for column, cell in zip(columns.features, cells, strict=False):
                value = _number(cell)
                if value is None:
                    raise InvalidInput(
                        f"{path}, line {line}, column {column!r}: {cell!r} is no finite float32 "
                        "number; correct the cell or leave the row out"
                    )
                numbers.append(value)
            if cells[-1] not in class_numbers:
                raise InvalidInput(
                    f"{path}, line {line}, column {columns.label!r}: {cells[-1]!r} is none of the "
                    f"classes {', '.join(columns.classes)}; correct the cell, or the task's "
                    "classes on both sides"
                )
            labels.append(class_numbers[cells[-1]])
    if not labels:
        raise DataUnavailable(
            f"there is no .csv file with rows under {root}; pass --data-root with the folder of "
            "your tables"
        )
    rows = np.frombuffer(numbers, np.float32).reshape(len(labels), len(columns.features))
    return rows, np.frombuffer(labels, np.int64)


def _read_rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each row's line number (from 1) and its cells of the wanted columns, stripped."""
    try:
        # Excel begins UTF-8 files with a mark, which would become part of the first name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = [name.strip() for name in next(reader, [])]
            indices = [_column_index(name, names, path) for name in wanted]
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise InvalidInput(
                        f"{path}, line {reader.line_num}: there are {len(cells)} cells, but "
                        f"{len(names)} column names in line 1"
                    )
                yield reader.line_num, [cells[index].strip() for index in indices]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 ({error.reason}); convert the file") from error
    except OSError as error:
        raise unreadable(error, path) from error
    except csv.Error as error:
        raise InvalidInput(f"{path}, line {reader.line_num}: {error}") from error


def _column_index(name: str, names: list[str], path: Path) -> int:
    if names.count(name) != 1:
        how_many = "no column" if name not in names else "more than one column"
        raise InvalidInput(
            f"{path}, line 1: there is {how_many} {name!r}; the columns are: {', '.join(names)}"
        )
    return names.index(name)


def _number(cell: str) -> float | None:
    """Return the cell's value, None if it is no number that float32 can hold."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if abs(value) <= _FLOAT32_MAX else None

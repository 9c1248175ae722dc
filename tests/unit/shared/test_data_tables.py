"""CSV files become rows and labels; what can't be read is named by file, line and column."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from fedrounds.data.tables import Columns, load_tables
from fedrounds.errors import DataUnavailable, InvalidInput
from fedrounds.tasks.builtin import find_task
from fedrounds.tasks.task import DataRequest, Partition

IRIS = Columns(label="species", features=("length", "width"), classes=("setosa", "virginica"))
IRIS_TASK = "tabular,label=species,features=length+width,classes=setosa+virginica"


def write(root: Path, name: str, *lines: str) -> Path:
    """Write a table and return its folder."""
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_columns_are_found_by_name_whatever_their_order(tmp_path: Path) -> None:
    """Two files with other orders, a mark at the start, a quoted comma, spaces, an empty line."""
    write(tmp_path, "a.csv", "species,note,width,length", 'setosa,"x, y",2,1', "", "virginica,,4,3")
    write(tmp_path, "b.csv", "\ufefflength, width ,species", " 5 ,6e0, setosa ")
    rows, labels = load_tables(tmp_path, IRIS)
    assert rows.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert labels.tolist() == [0, 1, 0]
    assert rows.dtype == np.float32
    assert labels.dtype == np.int64


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(table=st.lists(st.tuples(FLOATS, FLOATS, st.sampled_from(IRIS.classes)), min_size=1))
def test_numbers_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[float, float, str]]
) -> None:
    root = tmp_path_factory.mktemp("table")
    lines = [f"{length!r},{width!r},{species}" for length, width, species in table]
    rows, labels = load_tables(write(root, "t.csv", "length,width,species", *lines), IRIS)
    assert rows.tolist() == [[length, width] for length, width, _ in table]
    assert [IRIS.classes[label] for label in labels] == [species for _, _, species in table]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["1,2,setosa", "1,n/a,setosa"], r"t.csv, line 3, column 'width': 'n/a' is no finite"),
        (["1,,setosa"], r"line 2, column 'width': '' is no finite"),
        (["nan,2,setosa"], r"line 2, column 'length': 'nan' is no finite"),
        (["-inf,2,setosa"], r"column 'length': '-inf' is no finite"),
        (["1e39,2,setosa"], r"column 'length': '1e39' is no finite float32"),
        (["", '"1', '",2,setosa', "1,x,setosa"], r"line 5, column 'width': 'x'"),
        (["1,2,tulip"], r"line 2, column 'species': 'tulip' is none of the classes setosa, virg"),
        (["1,2"], r"line 2: there are 2 cells, but 3 column names"),
        (["1,2,setosa,4"], r"line 2: there are 4 cells"),
        (['1,2,"setosa'], r"t.csv, line 2: unexpected end of data"),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, lines: list[str], complaint: str) -> None:
    write(tmp_path, "t.csv", "length,width,species", *lines)
    with pytest.raises(InvalidInput, match=complaint):
        load_tables(tmp_path, IRIS)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("length,species", r"line 1: there is no column 'width'; the columns are: length, species"),
        ("length,width,width,species", "more than one column 'width'"),
        ("length,width,Species", "no column 'species'"),
        ("", "no column 'length'"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, header: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        load_tables(write(tmp_path, "t.csv", header), IRIS)


def test_no_rows_and_no_text_are_distinguished(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match=r"no .csv file with rows under .*--data-root"):
        load_tables(tmp_path, IRIS)
    with pytest.raises(DataUnavailable, match=r"no .csv file with rows"):
        load_tables(write(tmp_path, "t.csv", "length,width,species"), IRIS)
    (tmp_path / "t.csv").write_bytes(b"length,width,species\n\xff,1,setosa\n")
    with pytest.raises(InvalidInput, match=r"t.csv is not UTF-8"):
        load_tables(tmp_path, IRIS)


def test_a_tasks_name_says_all_that_both_sides_must_know(tmp_path: Path) -> None:
    task = find_task(IRIS_TASK)
    assert (task.name, task.num_classes) == (IRIS_TASK, 2)
    lines = [f"{k},{-k},{IRIS.classes[k % 2]}" for k in range(20)]
    root = write(tmp_path, "t.csv", "length,width,species", *lines)
    shares = []
    for index in range(4):
        partition = Partition(num_partitions=4, index=index, seed=0)
        examples = task.load_train(DataRequest(data_root=root, partition=partition))
        assert isinstance(examples, TensorDataset)
        shares.append(examples.tensors[0])
    assert torch.cat(shares)[:, 0].sort().values.tolist() == list(range(20))
    held_out = task.load_test(root)
    assert isinstance(held_out, TensorDataset)
    assert task.build_model()(held_out.tensors[0]).shape == (20, 2)
    assert task.load_test(None) is None
    with pytest.raises(InvalidInput, match="needs --data-root"):
        task.load_train(DataRequest())


def test_a_folder_named_like_a_table_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "t.csv", "length,width,species", "1,2,setosa")
    (tmp_path / "old.csv").mkdir()
    assert load_tables(tmp_path, IRIS)[0].tolist() == [[1, 2]]


@pytest.mark.parametrize("number", ["1000000000", "9" * 4301])
def test_absurdly_many_classes_are_refused(number: str) -> None:
    with pytest.raises(InvalidInput, match=f"classes is a number of {len(number)} digits; give"):
        find_task(f"tabular,label=a,features=b,classes={number}")


def test_numbered_classes_and_names_with_spaces(tmp_path: Path) -> None:
    task = find_task("tabular,label=a,features=c+e f,classes=3")
    assert task.num_classes == 3
    write(tmp_path, "t.csv", "a,c,e f", "2,0.5,1", "0,1.5,2")
    examples = task.load_train(DataRequest(data_root=tmp_path))
    assert isinstance(examples, TensorDataset)
    assert examples.tensors[0].tolist() == [[0.5, 1], [1.5, 2]]
    assert examples.tensors[1].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("tabular", "lacks label, features, classes; write it as tabular,label=NAME"),
        ("tabular,label=y,features=a", "lacks classes"),
        ("tabular,label=y,features=a,classes=2,colour=red", "'colour=red' is unknown"),
        ("tabular,label=y,label=z,features=a,classes=2", "'label=z' is unknown, empty or given tw"),
        ("tabular,label=,features=a,classes=2", "'label=' is unknown, empty"),
        ("tabular,label=y,features=a,classes=1", "two classes or more"),
        ("tabular,label=y,features=a,classes=x", "two classes or more"),
        ("tabular,label=y,features=a,classes=x+x+z", "no name twice"),
        ("tabular,label=y,features=a+a,classes=2", "no name twice"),
        ("tabular,label=a,features=a,classes=2", "no name twice"),
    ],
)
def test_a_name_that_says_too_little_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        find_task(name)

import os
import random
from pathlib import Path

import numpy as np
import pytest

from cldf_dist.data.formats.label_table import LabelTable, axis_to_head, read_labels

SLICES = "patient,slice,liver\na,0,1\na,2,0\na,3,\nb,1,1\n"


def table_of(tmp_path: Path, text: str | bytes) -> LabelTable:
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(path)


def test_slices_that_are_not_listed_are_unknown(tmp_path: Path) -> None:
    table = table_of(tmp_path, SLICES)
    labels = table.slice_labels("a", 5, "")
    assert labels.dtype == np.int8
    assert labels.tolist() == [1, -2, 0, -2, -2]
    assert table.slice_labels("b", 2, "liver").tolist() == [-2, 1]
    assert table.slice_labels("nobody", 3, "").tolist() == [-2, -2, -2]
    assert table.named_slices("a") == ("0", "2", "3")
    assert table.named_slices("nobody") == ()


def test_a_label_of_a_volume_is_that_of_all_its_slices(tmp_path: Path) -> None:
    table = table_of(tmp_path, "patient,liver\na,1\nb,0\nc,\n")
    assert [table.slice_labels(name, 2, "").tolist() for name in "abcd"] == [
        [1, 1],
        [0, 0],
        [-2, -2],
        [-2, -2],
    ]
    assert table.named_slices("a") == ()


@pytest.mark.parametrize(
    ("values", "label"),
    [("1,0", 1), ("1,", 1), (",1", 1), ("1,1", 1), ("0,0", 0), ("0,", -2), (",0", -2), (",", -2)],
)
def test_joined_objects_are_there_if_any_is(tmp_path: Path, values: str, label: int) -> None:
    table = table_of(tmp_path, f"patient,left,right\na,{values}\nb,1,1\n")
    assert table.slice_labels("a", 1, "left+right").tolist() == [label]


def test_columns_may_stand_in_any_order(tmp_path: Path) -> None:
    table = table_of(tmp_path, "liver,slice,spleen,patient\n0,1,1,a\n")
    assert table.objects == ("liver", "spleen")
    assert table.slice_labels("a", 2, "liver").tolist() == [-2, 0]
    assert table.slice_labels("a", 2, "spleen").tolist() == [-2, 1]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_what_spreadsheets_write_is_read(
    tmp_path: Path, delimiter: str, newline: str, mark: bytes
) -> None:
    lines = [["patient", "slice", "liver"], ["ä", " 0 ", "1.0"], ["", "", ""], ['"b"', "1", "0.0"]]
    text = newline.join(delimiter.join(line) for line in lines) + newline
    table = table_of(tmp_path, mark + text.encode())
    assert table.slice_labels("ä", 2, "").tolist() == [1, -2]
    assert table.slice_labels("b", 2, "").tolist() == [-2, 0]


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [f"a,{index},{rng.choice(['0', '1', ''])}" for index in range(40)]
    one = table_of(tmp_path, "\n".join(["patient,slice,liver", *rows])).slice_labels("a", 40, "")
    rng.shuffle(rows)
    other = table_of(tmp_path, "\n".join(["patient,slice,liver", *rows])).slice_labels("a", 40, "")
    assert set(one.tolist()) == {1, 0, -2}
    np.testing.assert_array_equal(one, other)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    assert table_of(tmp_path, SLICES).slice_labels("a", 4, "")[0] == 1
    path = tmp_path / "labels.csv"
    path.write_text(SLICES.replace("a,0,1", "a,0,0"))
    os.utime(path, ns=(1, 1))
    assert read_labels(path).slice_labels("a", 4, "")[0] == 0


def test_slices_go_by_any_of_their_names(tmp_path: Path) -> None:
    table = table_of(tmp_path, "patient,slice,liver\na,one.dcm,1\na,1.2.3,0\na,t1/x,1\n")
    names = [{"zero"}, {"one", "one.dcm"}, {"two", "1.2.3"}, {"x", "t1/x"}]
    assert table.slice_labels("a", names, "").tolist() == [-2, 1, 0, 1]


def test_zeros_before_a_number_do_not_count(tmp_path: Path) -> None:
    table = table_of(tmp_path, "patient,slice,liver\na,00,1\na,01,0\na,10,1\n")
    assert table.slice_labels("a", 11, "").tolist() == [1, 0] + [-2] * 8 + [1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: expected the header patient,slice,OBJECT or .*; got an empty file"),
        ("\n \n", "line 1: expected the header"),
        ("name,liver\na,1\n", "line 1: expected the header .*; got name,liver"),
        ("Patient,liver\na,1\n", "line 1: expected the header .*; got Patient,liver"),
        ("patient,slice\na,1\n", "line 1: expected the header .*; got patient,slice"),
        ("patient,liver\n", "has no rows; expected the header"),
        ("patient,liver,liver\na,1,1\n", "line 1: the column 'liver' is there twice"),
        ("patient,patient,liver\na,a,1\n", "line 1: the column 'patient' is there twice"),
        ("patient,liver,\na,1,\n", "line 1: a column has no name"),
        ("patient,a+b\na,1\n", r"line 1: objects must have no '\+' or ',' in their names, got"),
        ('patient,"a,b"\na,1\n', r"line 1: objects must have no .*got \['a,b'\]"),
        ("patient,liver\na,1\nb,yes\n", r"line 3: liver must be 0, 1 or empty .*got 'yes'"),
        ("patient,liver\na,1\nb,-1\n", "line 3: liver must be 0, 1 or empty"),
        ("patient,liver\na,2\n", "line 2: liver must be 0, 1 or empty"),
        ("patient,liver\na,1\n,0\n", "line 3: patient is empty"),
        ("patient,slice,liver\na,,1\n", "line 2: slice is empty"),
        ("patient,liver\na,1\nb\n", "line 3: must have 2 columns, got 1"),
        ("patient,liver\na,1,0\n", "line 2: must have 2 columns, got 3"),
        ("patient,liver\na,1\nb,0\na,1\n", "line 4: patient a is already in line 2; keep one"),
        ("patient,slice,liver\na,3,1\na,3,1\n", "line 3: slice '3' of patient a is already in li"),
        ('patient,liver\na,1\n"b,0\n', "line 3: not CSV"),
        ("patient,liver\na,1\nJos\xe9,0\n".encode("latin-1"), "line 3: not UTF-8; save it as CSV"),
        ("patient,liver\na,1\n".encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_faults_are_told_with_their_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(ValueError, match=rf"labels\.csv,? {said}"):
        table_of(tmp_path, text)


def test_blank_lines_do_not_shift_the_line_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labels\.csv, line 5: liver must be"):
        table_of(tmp_path, "patient,liver\n\na,1\n;;\n".replace(";", ",")[:-2] + "\nb,x\n")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.labels: .*absent\.csv does not exist"):
        read_labels(tmp_path / "absent.csv")


def test_patients_who_are_not_there_are_told_with_their_lines(tmp_path: Path) -> None:
    table = table_of(tmp_path, "patient,slice,liver\na,0,1\n7,0,1\n7,1,1\nb,0,0\n")
    table.check_patients({"a", "b", "7", "more"})
    with pytest.raises(ValueError, match=r"not in the data: '7' \(line 3\); the patients must"):
        table.check_patients({"a", "b", "007"})
    with pytest.raises(ValueError, match=r"'a' \(line 2\), '7' \(line 3\), 'b' \(line 5\); the"):
        table.check_patients(set())
    many = table_of(tmp_path, "patient,x\n" + "".join(f"p{index},1\n" for index in range(8)))
    with pytest.raises(ValueError, match=r"'p4' \(line 6\) and 3 more; the patients must"):
        many.check_patients(set())


@pytest.mark.parametrize("name", ["4", "-1", "1.5", "a_0001"])
def test_slices_that_are_not_there_are_told(tmp_path: Path, name: str) -> None:
    table = table_of(tmp_path, f"patient,slice,liver\na,0,1\na,{name},1\n")
    said = rf"line 3: patient a has no slice '{name}'; its 4 slices go by '0' to '3'"
    with pytest.raises(ValueError, match=said):
        table.slice_labels("a", 4, "")


def test_rows_of_one_slice_are_told(tmp_path: Path) -> None:
    for text, slices in (
        ("patient,slice,liver\na,7,1\na,07,0\n", 8),
        ("patient,slice,liver\na,x,1\na,x.dcm,0\n", [{"x", "x.dcm"}]),
    ):
        with pytest.raises(ValueError, match="lines 2 and 3: both are of the same slice of patien"):
            table_of(tmp_path, text).slice_labels("a", slices, "")


def test_a_name_of_several_slices_is_told(tmp_path: Path) -> None:
    table = table_of(tmp_path, "patient,slice,liver\na,x,1\n")
    with pytest.raises(ValueError, match="line 2: patient a has 2 slices that go by 'x'; name the"):
        table.slice_labels("a", [{"x", "t1/x"}, {"x", "t2/x"}], "")


def test_unknown_object_is_told(tmp_path: Path) -> None:
    table = table_of(tmp_path, "patient,liver,spleen\na,1,0\n")
    for name, said in (("kidney", "got 'kidney'"), ("liver+lung", "got"), ("", "it is empty")):
        with pytest.raises(ValueError, match=rf"labels\.csv: data\.object must be one of .*{said}"):
            table.object_names(name)
    assert table.object_names("spleen+liver") == ("spleen", "liver")


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1, -1])
def test_the_axis_to_the_head_is_found_in_any_order(axis: int, sign: int) -> None:
    order = [0, 1]
    order.insert(axis, 2)
    affine = np.eye(4)[:, [*order, 3]].copy()
    affine[:, axis] *= sign
    assert axis_to_head(affine) == axis

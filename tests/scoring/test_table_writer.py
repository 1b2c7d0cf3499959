"""One table as aligned text, as Markdown and as the cells of an HTML page."""

import math

import jinja2

from cldf_dist.scoring.table_writer import Cell, Table, format_interval, format_number

TABLE = Table(["method", "Dice"], [["supervised_plus", Cell("0.5", "[0.4, 0.6]")], ["cldf", "-"]])


def test_columns_of_a_text_table_are_aligned_and_methods_have_their_mark() -> None:
    assert TABLE.text().splitlines() == [
        "method             Dice",
        "supervised_plus *  0.5 [0.4, 0.6]",
        "cldf               -",
    ]


def test_a_table_in_markdown_has_the_same_cells() -> None:
    assert TABLE.markdown().splitlines() == [
        "| method | Dice |",
        "| --- | --- |",
        "| supervised_plus * | 0.5 [0.4, 0.6] |",
        "| cldf | - |",
    ]


def test_the_interval_of_a_cell_is_set_apart_in_a_page() -> None:
    template = jinja2.Environment(autoescape=True).from_string("{{ cell }} {{ text }}")
    page = template.render(cell=Cell("1", "[0, 2]"), text="<b>")
    assert page == '1 <span class="interval">[0, 2]</span> &lt;b&gt;'


def test_what_is_undefined_is_a_dash() -> None:
    assert format_number(None) == "-"
    assert (
        str(format_interval(0.5, None, None)) == str(format_interval(0.5, math.nan, 1)) == "0.500"
    )
    assert str(format_interval(0.25, -0.5, 1, 1, signed=True)) == "+0.2 [-0.5, +1.0]"

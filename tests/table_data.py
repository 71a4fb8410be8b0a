"""The template's data over a table that a test has made."""

from typing import Any

from downslope.tables.table import Table, split
from template.regression.data import TableData


def data_of(table: Table, **settings: Any) -> TableData:
    data = TableData(table.name, table.target_name, **settings)
    data.table = table
    return data


def rows_of(data: TableData) -> dict[str, Any]:
    """The rows of each part."""
    return split(data.table, data.seed, data.fractions)

"""The template's data over a table that a test has made."""

from typing import Any

from downslope.tables.table import Table
from template.regression.data import TableData


def data_of(table: Table, **settings: Any) -> TableData:
    data = TableData(table.name, table.target_name, **settings)
    data.table = table
    return data

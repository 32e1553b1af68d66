"""Rows of Parquet files, read by pyarrow, which is optional."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from qmoe_jax.data.archives import INSTALL
from qmoe_jax.data.errors import TextError

ROWS_PER_READ = 1024
"""Rows in memory together, of their row group's text column."""


def pyarrow_parquet(path: object) -> Any:
    """Return pyarrow's module for Parquet.

    Raises:
        TextError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise TextError(
            "is a Parquet file, and no library that reads it is installed",
            path=path,
            expected="pyarrow, or text as .jsonl or .txt (.gz, .bz2, .xz or .zst too)",
            found=error,
            remedy=f"{INSTALL}, or write its column text as JSON lines",
        ) from error
    return pyarrow.parquet


def parquet_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file: its columns "text" and, where there is one, "split".

    Memory: `ROWS_PER_READ` rows, and pyarrow's pages.

    Raises:
        TextError: the file is damaged, or has no column "text" of strings.
    """
    parquet = pyarrow_parquet(path)
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if "text" not in schema.names:
                raise TextError(
                    "has no column of text",
                    path=path,
                    expected='a column "text"',
                    found=f"columns {', '.join(schema.names)}",
                    remedy='rename the column that holds the text to "text"',
                )
            kind = schema.field("text").type
            kind = getattr(kind, "value_type", kind) if pyarrow.types.is_dictionary(kind) else kind
            if str(kind) not in ("string", "large_string", "string_view"):
                raise TextError(
                    "has a text that is not a string",
                    path=path,
                    expected="strings",
                    found=f"a column of {kind}",
                )
            columns = [name for name in ("text", "split") if name in schema.names]
            for batch in file.iter_batches(ROWS_PER_READ, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TextError(
            "is damaged, or not a Parquet file",
            path=path,
            found=str(error).splitlines()[0],
            remedy="copy or download the file again",
        ) from error

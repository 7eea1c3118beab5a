"""Finished parts to one file, part by part: never more than one of them in memory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from hardpatch.embed.chunks import Parts


class Table(NamedTuple):
    """What is joined."""

    parts: Parts
    """The parts that hold the rows."""
    numbers: Sequence[int]
    """The parts that have any, in order."""
    names: Sequence[str]
    """What the source calls each image, by position."""
    labels: Sequence[str] | None
    """Its class, by position, where the source knows."""
    about: dict[str, Any]
    """Kept in the file: where the features come from."""

    def column(self, name: str) -> np.ndarray:
        """A column as a whole: for the small ones."""
        return np.concatenate([self.parts.column(number, name) for number in self.numbers])


def write_npz(table: Table, to: Path) -> None:
    """A zip of ``.npy``, each column streamed; ``numpy.load`` reads it without pickle."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as archive:

        def put(name: str, array: np.ndarray) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)

        positions = table.column("position")
        put("path", np.array([table.names[i] for i in positions]))
        if table.labels is not None:
            put("label", np.array([table.labels[i] for i in positions]))
        for name, column in table.parts.read(table.numbers[0]).columns.items():
            descr, shape = np.lib.format.dtype_to_descr(column.dtype), (len(positions), *column.shape[1:])
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
                for number in table.numbers:
                    file.write(np.ascontiguousarray(table.parts.column(number, name)).data)
        put("about", np.array(json.dumps(table.about)))


def _as_utf8(text: str) -> str:
    """Text as it is, with ``\\xe9`` for a byte that is not UTF-8: Parquet holds nothing else."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_parquet(table: Table, to: Path) -> None:
    """A row group per part; arrays as lists of fixed size, nested where they have rows and columns."""

    def column(array: np.ndarray) -> Any:
        flat = pa.array(np.ascontiguousarray(array).reshape(-1))
        for size in reversed(array.shape[1:]):
            flat = pa.FixedSizeListArray.from_arrays(flat, size)
        return flat

    def batch(rows: dict[str, np.ndarray]) -> Any:
        columns = {
            "position": pa.array(rows["position"]),
            "path": pa.array([_as_utf8(table.names[i]) for i in rows["position"]], pa.string()),
        }
        if table.labels is not None:
            columns["label"] = pa.array([_as_utf8(table.labels[i]) for i in rows["position"]], pa.string())
        columns |= {name: column(array) for name, array in rows.items() if name != "position"}
        return pa.table(columns)

    schema = batch(table.parts.read(table.numbers[0]).columns).schema.with_metadata(
        {"hardpatch": json.dumps(table.about)}
    )
    with to.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:  # a name that is no UTF-8 it cannot open
        for number in table.numbers:
            writer.write_table(batch(table.parts.read(number).columns).replace_schema_metadata(schema.metadata))

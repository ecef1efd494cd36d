"""Makes pictures.parquet: run with pyarrow 26 and Pillow 12 in this folder.

Two row groups of four rows as `datasets` lays them out, a packing for each column, and what rows of the wild look like: nulls, a path
instead of bytes, integers, decimals, dates, lists, a page with repeated values (dictionary) and one without.
"""

import datetime
import decimal
import io

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(i):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (i * 30, 100, 200)).save(out, "PNG")
    return out.getvalue()


N = 8
image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
pictures = [{"bytes": png(i), "path": f"{i}.png"} for i in range(N)]
pictures[2] = None
pictures[3] = {"bytes": None, "path": "beside.png"}
table = pa.table(
    {
        "id": pa.array([2**60 + i for i in range(N)], pa.int64()),
        "image": pa.array(pictures, image),
        "caption": pa.array(["a caption, again and again " * (i + 1) if i != 5 else None for i in range(N)], pa.string()),
        "tag": pa.array(["x" if i % 2 else "y" for i in range(N)]).dictionary_encode(),
        "aesthetic": pa.array([i / 4 for i in range(N)], pa.float32()),
        "price": pa.array([decimal.Decimal(i) / 8 for i in range(N)], pa.decimal128(9, 3)),
        "small": pa.array([-i / 2 for i in range(N)], pa.float16()),
        "exact": pa.array([decimal.Decimal(-i) / 4 for i in range(N)], pa.decimal128(30, 2)),
        "when": pa.array([datetime.date(2024, 1, 1 + i) for i in range(N)], pa.date32()),
        "safe": pa.array([True] * N, pa.bool_()),
        "tags": pa.array([["a", "b"]] * N, pa.list_(pa.string())),
    }
)
packings = {
    "id": "none",
    "image.bytes": "snappy",
    "image.path": "gzip",
    "caption": "lz4",
    "tag": "zstd",
    "aesthetic": "gzip",
    "price": "snappy",
    "small": "none",
    "exact": "none",
    "when": "none",
    "safe": "none",
    "tags.list.element": "none",
}
pq.write_table(
    table,
    "pictures.parquet",
    row_group_size=4,
    compression=packings,
    use_dictionary=["tag", "image.path"],
    data_page_version="1.0",
    write_page_checksum=True,
    store_decimal_as_integer=True,
    store_schema=False,
)

"""The logit cache: what a teacher said about samples, on disk, found by their content. docs/cache-format.md."""

from megakd.cache.header import Header, read_header
from megakd.cache.reader import CacheReader, check_identity
from megakd.cache.row import Contents, Row, decode_row, encode_row
from megakd.cache.tables import Table, build_table
from megakd.cache.writer import finish, publish_part, writing

__all__ = [
    "CacheReader",
    "Contents",
    "Header",
    "Row",
    "Table",
    "build_table",
    "check_identity",
    "decode_row",
    "encode_row",
    "finish",
    "publish_part",
    "read_header",
    "writing",
]

"""The logit cache: what a teacher said about samples, on disk, found by their content. docs/cache-format.md."""

from megakd.cache.head import publish_head, read_head, whole_head
from megakd.cache.header import Header, HeadRecord, read_header
from megakd.cache.reader import CacheReader, check_identity
from megakd.cache.row import Contents, HiddenRow, Row, decode_row, encode_row
from megakd.cache.tables import HiddenTable, Table, build_table
from megakd.cache.writer import finish, publish_part, writing

__all__ = [
    "CacheReader",
    "Contents",
    "HeadRecord",
    "Header",
    "HiddenRow",
    "HiddenTable",
    "Row",
    "Table",
    "build_table",
    "check_identity",
    "decode_row",
    "encode_row",
    "finish",
    "publish_head",
    "publish_part",
    "read_head",
    "read_header",
    "whole_head",
    "writing",
]

"""A record read by the names that megakd gives its keys, and which of its keys were read."""

from collections.abc import Mapping

from megakd.data.chat_template import BadRecord


class Fields:
    """A record behind `data.columns`.

    A name that `columns` maps is that key of the record and no other.

    Args:
        record: as it was read.
        columns: for a name used here, the key that the records use instead.
    """

    def __init__(self, record: Mapping, columns: Mapping[str, str]):
        self.record, self._columns = record, columns
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self.record

    def get(self, name: str, default=None):
        """The value under a name, which counts as used from now on."""
        key = self._key(name)
        self._read.add(key)
        return self.record.get(key, default)

    def text(self, name: str) -> str:
        """The text under a name.

        Raises:
            BadRecord: there is none.
        """
        value = self.get(name)
        if not isinstance(value, str):
            raise BadRecord(self.missing(name, "a string"))
        return value

    def first_of(self, *names: str) -> str:
        """The first of these names that is there; the first of all if none is."""
        return next((name for name in names if name in self), names[0])

    def missing(self, name: str, wanted: str) -> str:
        """A sentence about a name that is not there, or not what is wanted."""
        key = self._key(name)
        if key in self.record:
            return f'"{key}" is a {type(self.record[key]).__name__}, not {wanted}'
        why = "" if key == name else f", which data.columns gives for {name},"
        return f'no key "{key}"{why} (found {", ".join(sorted(map(str, self.record))) or "an empty object"})'

    def unused(self) -> list[str]:
        """Keys with a text that nothing has read."""
        return [k for k, v in self.record.items() if k not in self._read and isinstance(v, str) and v.strip()]

    def _key(self, name: str) -> str:
        return self._columns.get(name, name)

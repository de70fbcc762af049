"""How the parts of a token file get their names together, and where they are meanwhile.

A file system renames one file at a time, and Megatron's format is several side by side. So PREFIX.json decides which
set there is. SET is the digest that it carries.

1. Each part is written under a name that no other writer has, PREFIX.bin.RANDOM.incomplete, and synced.
2. All of them are renamed to PREFIX.bin.SET.new and so on, and the folder is synced.
3. PREFIX.json is renamed over the one before: until then the old set is whole, from then on the new one. Synced.
4. The parts are renamed to PREFIX.bin and so on, over the old ones; a mask that the new set does not have is removed.

A reader takes PREFIX.bin.SET.new if that is there, and PREFIX.bin if it is not, so that it finds a whole set after a
kill or a power cut at any moment. What is left of step 4 the next writer does. (Megatron's own reader knows nothing of
step 3: between the renames of step 4 it may see parts of both.)
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megakd.data.token_files.layout import TokenFileInfo, load_info, part
from megakd.errors import DataError
from megakd.publish import INCOMPLETE, sync, sync_folder

PARTS = (".bin", ".mask", ".idx")
NEW = ".new"


def waiting(prefix: Path, suffix: str, info: TokenFileInfo) -> Path:
    """What a part is called from step 2 to step 4."""
    return part(prefix, f"{suffix}.{info.record()['digest'][:16]}{NEW}")


def publish_parts(prefix: Path, written: Mapping[str, Path], info: TokenFileInfo) -> None:
    """Steps 2 to 4, for the owner of a prefix.

    Args:
        written: the path of each part, and of ".json", by suffix; all but the last are synced.
        info: what ".json" says.
    Raises:
        OSError: one of them cannot be renamed.
    """
    sync(written[".json"])
    for suffix in info.parts:
        os.rename(written[suffix], waiting(prefix, suffix, info))
    sync_folder(prefix.parent)
    os.replace(written[".json"], part(prefix, ".json"))
    sync_folder(prefix.parent)
    _name_parts(prefix, info)


def settle(prefix: Path) -> None:
    """Finish what a kill in step 4 has left, and remove what killed writers have, for the owner of a prefix."""
    try:
        info = load_info(prefix)
    except DataError:
        info = None  # nothing there, or nothing that could be told whole
    if info is not None and info.parts is not None:
        _name_parts(prefix, info)
    left = re.compile(
        re.escape(prefix.name)
        + rf"\.(bin|mask|idx|json)\.([0-9a-f]{{8}}{re.escape(INCOMPLETE)}|[0-9a-f]{{16}}{re.escape(NEW)})"
    )
    for path in prefix.parent.iterdir():
        if left.fullmatch(path.name):
            path.unlink()


def _name_parts(prefix: Path, info: TokenFileInfo) -> None:
    for suffix in info.parts:
        path = waiting(prefix, suffix, info)
        if path.exists():
            os.replace(path, part(prefix, suffix))
    for suffix in set(PARTS) - info.parts.keys():
        part(prefix, suffix).unlink(missing_ok=True)
    sync_folder(prefix.parent)

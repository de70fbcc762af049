"""Names inside a checkpoint: plain, and never a way out of its folder."""

import os
import pathlib
import re
import stat

from megakd.errors import CheckpointError

_PLAIN = re.compile(r"[^/\\\0]+")


def plain_name(name, where) -> str:
    """A name that a record gives to a file in its own folder, as it is.

    Args:
        where: the record, for the error.
    Raises:
        CheckpointError: it is no text, or would lead into another folder.
    """
    if not isinstance(name, str) or not _PLAIN.fullmatch(name) or name in (".", ".."):
        raise CheckpointError(
            f"{where} names the file {str(name)[:200]!r}, which is no plain name",
            hint="files of a checkpoint lie in its own folder; this record is damaged or made to do harm",
        )
    return name


def below(folder: pathlib.Path, name, where) -> pathlib.Path:
    """The path of a file that a record names by its way down from `folder`.

    Raises:
        CheckpointError: as plain_name, for every part of it.
    """
    parts = name.split("/") if isinstance(name, str) else [name]
    return folder.joinpath(*(plain_name(part, where) for part in parts))


def check_folder(folder: pathlib.Path) -> None:
    """Refuse a folder in which a link leads out, or that holds anything but files and folders.

    Links to files inside are allowed, and so is the layout of the Hub's cache, whose snapshots are links into `blobs`
    two folders up.

    Raises:
        CheckpointError: naming the link and where it leads.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append((root.parent.parent / "blobs").resolve())
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = pathlib.Path(parent) / name
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                target = path.resolve()
                if not any(target.is_relative_to(place) for place in allowed):
                    raise CheckpointError(
                        f"{path} is a link that leads out of its folder, to {os.readlink(path)}",
                        hint="links are not followed out of a checkpoint; put the file itself there (cp -L)",
                    )
                mode = target.stat().st_mode if target.exists() else stat.S_IFREG
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise CheckpointError(
                    f"{path} is neither a file nor a folder", hint="no checkpoint holds such a thing; remove it"
                )

"""What a crash can leave of a save: its file operations are recorded, and the disk is put together after each of them.

`recorded` notes, in order, every file that appears or changes below a folder and every fsync, rename, exchange, unlink,
mkdir and rmdir. `crash_states` then gives the folders that a power cut may leave after each operation, as in the tests
of SQLite and in ALICE (Pillai et al., OSDI 2014):

- what was written to a file since its last fsync is lost, torn, zeros, or there;
- of the names that changed in a folder since its last fsync, the changes so far are there in order (a journal) up to
  any one, or all but one (no journal).
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
import pathlib
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megakd import publish

Tree = dict[str, "bytes | Tree"]


@contextlib.contextmanager
def recorded(root: pathlib.Path, log: pathlib.Path) -> Iterator[None]:
    """Note the file operations below `root` that happen in the block, in this process, its threads and its forks.

    Several processes may record into one log; they all enter before the first operation, and their operations are in
    the log in the order in which they happened.

    Args:
        root: the folder; what it holds at the start is taken to be on the disk.
        log: a file outside of it, for `crash_states`.
    """
    recorder = _Recorder(root.resolve(), log)
    with recorder.alone():
        if not log.exists():
            recorder.note("start", read_tree(root))
    old = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")}
    exchange = publish.exchange
    for name, function in old.items():
        setattr(os, name, recorder.wrapped(name, function))
    publish.exchange = recorder.wrapped("exchange", exchange)
    try:
        yield
    finally:
        for name, function in old.items():
            setattr(os, name, function)
        publish.exchange = exchange
        with recorder.alone():
            recorder.observe()


class _Recorder:
    def __init__(self, root: pathlib.Path, log: pathlib.Path):
        self.root, self.log, self.lock = root, log, threading.RLock()
        self.seen: Tree = read_tree(root)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread or process of the recording operates on the files meanwhile."""
        with self.lock, open(f"{self.log}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def wrapped(self, name: str, function: Callable) -> Callable:
        def call(*arguments, **keywords):
            folder = keywords.get("dir_fd", keywords.get("src_dir_fd"))
            paths = [self.below(argument, folder) for argument in arguments[: 2 if name in PAIRS else 1]]
            if None in paths:
                return function(*arguments, **keywords)
            with self.alone():
                self.observe()
                result = function(*arguments, **keywords)
                if name != "exchange" or result:
                    self.note(NAMES.get(name, name), *paths)
                    change_names(self.seen, NAMES.get(name, name), *paths)
            return result

        return call

    def below(self, path, folder: int | None) -> str | None:
        """The path from the root on; None for one that is not below it."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fspath(path)
        path = os.fsdecode(path)
        if folder is not None and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        path = pathlib.Path(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else None

    def observe(self) -> None:
        """Note the files that have appeared or changed since the last operation."""
        before, tree = flat(self.seen), read_tree(self.root)
        for path, content in flat(tree).items():
            if content is not None and before.get(path) != content:
                self.note("write", path, content)
        self.seen = tree  # and nothing that other threads have written meanwhile

    def note(self, *operation) -> None:
        with open(self.log, "ab") as file:
            file.write(pickle.dumps(operation))


PAIRS = ("rename", "replace", "exchange")
NAMES = {"replace": "rename", "remove": "unlink"}


def change_names(tree: Tree, operation: str, path: str, other: str | None = None) -> None:
    """What an operation does to the names of a tree, in place."""

    def folder_of(path: str) -> tuple[Tree, str]:
        *parents, name = pathlib.PurePosixPath(path).parts
        node = tree
        for parent in parents:
            node = node[parent]
        return node, name

    if operation == "fsync":
        return
    folder, name = folder_of(path)
    if operation == "mkdir":
        folder[name] = {}
        return
    node = folder.pop(name, None)
    if operation in ("rename", "exchange"):
        target, target_name = folder_of(other)
        if operation == "exchange":
            folder[name] = target[target_name]
        target[target_name] = node


def read_tree(folder: pathlib.Path) -> Tree:
    """Name -> content of a file, or tree of a folder; what vanishes while it is read is left out."""
    tree = {}
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            tree[path.name] = read_tree(path) if path.is_dir() else path.read_bytes()
    return tree


def write_tree(tree: Tree, folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(content, folder / name)
        else:
            (folder / name).write_bytes(content)
    return folder


def flat(tree: Tree, prefix: str = "") -> dict[str, bytes | None]:
    """Path -> content, None for a folder."""
    found = {}
    for name, content in tree.items():
        is_folder = isinstance(content, dict)
        found[prefix + name] = None if is_folder else content
        found |= flat(content, f"{prefix}{name}/") if is_folder else {}
    return found


@dataclass(eq=False)
class _File:
    content: bytes
    synced: bytes = b""

    def states(self) -> list[bytes]:
        """Lost, torn, zeros, there."""
        new = self.content
        return [self.synced] if new == self.synced else [self.synced, new[: len(new) // 2], bytes(len(new)), new]


@dataclass(eq=False)
class _Folder:
    synced: dict[str, "_File | _Folder"] = field(default_factory=dict)
    pending: list[dict[str, "_File | _Folder | None"]] = field(default_factory=list)

    def names(self, changes=None) -> dict[str, "_File | _Folder"]:
        found = dict(self.synced)
        for change in self.pending if changes is None else changes:
            found |= change
        return {name: node for name, node in found.items() if node is not None}

    def states(self) -> Iterator[list[dict]]:
        """The changes of names that may be on the disk: all up to any one, all but one."""
        for count in range(len(self.pending)):
            yield self.pending[:count]
            yield self.pending[:count] + self.pending[count + 1 :]


class _Disk:
    """The files as the process sees them, and what of them is on the disk."""

    def __init__(self, tree: Tree):
        self.root = self._on_disk(tree)

    def _on_disk(self, tree: Tree) -> _Folder:
        nodes = {n: self._on_disk(c) if isinstance(c, dict) else _File(c, c) for n, c in tree.items()}
        return _Folder(nodes)

    def at(self, path: str) -> "_File | _Folder":
        node = self.root
        for name in pathlib.PurePosixPath(path).parts:
            node = node.names()[name]
        return node

    def change(self, *changes: tuple[str, "_File | _Folder | None"]) -> None:
        """Give names other nodes (None: none), in one step per folder."""
        by_folder = {}
        for path, node in changes:
            parent, _, name = path.rpartition("/")
            by_folder.setdefault(parent, {})[name] = node
        for parent, names in by_folder.items():
            self.at(parent).pending.append(names)

    def apply(self, name: str, *values) -> None:
        if name == "write":
            path, content = values
            parent, _, last = path.rpartition("/")
            if last in self.at(parent).names():
                self.at(path).content = content
            else:
                self.change((path, _File(content)))
        elif name == "fsync":
            node = self.at(values[0])
            if isinstance(node, _File):
                node.synced = node.content
            else:
                node.synced, node.pending = node.names(), []
        elif name == "mkdir":
            self.change((values[0], _Folder()))
        elif name in ("unlink", "rmdir"):
            self.change((values[0], None))
        elif name == "rename":
            self.change((values[1], self.at(values[0])), (values[0], None))
        else:
            assert name == "exchange", name
            self.change((values[0], self.at(values[1])), (values[1], self.at(values[0])))

    def folders(self, node: _Folder | None = None) -> Iterator[_Folder]:
        node = node or self.root
        yield node
        for below in node.names().values():
            if isinstance(below, _Folder):
                yield from self.folders(below)

    def states(self) -> Iterator[Tree]:
        """Every tree that a power cut may leave now."""
        yield from self.contents({})
        yield from self.contents({folder: [] for folder in self.folders()})
        for folder in list(self.folders()):
            for changes in folder.states():
                yield from self.contents({folder: changes})

    def contents(self, changes: dict[_Folder, list[dict]]) -> Iterator[Tree]:
        """The trees with these changes of names (all of them, for a folder that is not given), for every data state."""

        def tree(node, kind):
            if isinstance(node, _Folder):
                return {name: tree(below, kind) for name, below in node.names(changes.get(node)).items()}
            return node.states()[kind % len(node.states())]

        yield from (tree(self.root, kind) for kind in range(4))


def operations(log: pathlib.Path) -> list[tuple]:
    """What was recorded, in order."""
    found = []
    with open(log, "rb") as file, contextlib.suppress(EOFError):
        while True:
            found.append(pickle.load(file))
    return found


def crash_states(
    log: pathlib.Path, scratch: pathlib.Path, *, at_the_end: bool = False
) -> Iterator[tuple[str, pathlib.Path]]:
    """(after which operation, a folder as a power cut may leave it), each different folder once.

    Args:
        scratch: for these folders; is made.
        at_the_end: only those after the last operation, which show whether a save that has returned is durable.
    """
    scratch.mkdir()
    (_, tree), *recorded_operations = operations(log)
    disk, known, numbers = _Disk(tree), set(), itertools.count()
    for number, operation in enumerate([None, *recorded_operations]):
        if operation is not None:
            disk.apply(*operation)
        for state in () if at_the_end and number < len(recorded_operations) else disk.states():
            digest = hashlib.sha256(pickle.dumps(sorted(flat(state).items()))).digest()
            if digest not in known:
                known.add(digest)
                short = "the start" if operation is None else f"{operation[0]} {operation[1]}"
                yield f"{number}: {short}", write_tree(state, scratch / f"{next(numbers):05d}")

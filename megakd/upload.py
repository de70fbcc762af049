"""Finished files to an address elsewhere: a store that fsspec knows (s3://, gs://, hf://datasets/, file://, ...)."""

import contextlib
import pathlib
import secrets
from collections.abc import Iterator

from megakd.errors import ConfigError
from megakd.paths import ADDRESS
from megakd.publish import INCOMPLETE

BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "hf"}
"""Stores where a file appears whole or not at all, in a bucket or repository that must be there before."""


class Target:
    """Where a file and the small one that describes it are to go, under the name and that name + `suffix`.

    The description goes first: where the file is, its description is.

    Args:
        address: with its scheme; one that ends with / is a folder, in which the file keeps its name.
        file: on this machine; need not be there yet.
        suffix: of the description's name.
    Raises:
        ConfigError: there is no scheme, fsspec does not know it, or its package is missing.
    """

    def __init__(self, address: str, file: pathlib.Path, suffix: str):
        import fsspec

        self.address = address + file.name if address.endswith("/") else address
        self.file, self.description = file, file.with_name(file.name + suffix)
        if not ADDRESS.match(address):
            raise ConfigError(
                f"--upload {address} is no address",
                hint="s3://BUCKET/NAME.jsonl, hf://datasets/OWNER/NAME/FILE.jsonl, file:///FOLDER/",
            )
        with self.store_errors("install what it names, or another scheme"):
            self.store, self.path = fsspec.core.url_to_fs(self.address)
        self.described = self.path + suffix
        self.scheme = address.partition("://")[0]

    @contextlib.contextmanager
    def store_errors(self, hint: str) -> Iterator[None]:
        """Every store has exceptions of its own: they become ConfigErrors that say which address."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            message = f"--upload {self.address}: {type(error).__name__}: {error}".rstrip(": ")
            raise ConfigError(message, hint=hint) from error

    def check(self) -> None:
        """Ask the store while nothing has been computed: does it answer, is there room for the name.

        Raises:
            ConfigError: it does not answer, its bucket or repository is not there, the name is a folder's.
        """
        with self.store_errors("its credentials and the address; see the documentation of that store for fsspec"):
            container = "/".join(self.path.split("/")[: self.parts_of_container()])
            if self.scheme in BUCKETS and not self.store.exists(container):
                raise ConfigError(f"--upload {self.address}: there is no {container}", hint="create it first")
            if self.store.isdir(self.path):
                raise ConfigError(f"--upload {self.address} is a folder", hint=f"--upload {self.address}/")

    def parts_of_container(self) -> int:
        """Of the path: one for a bucket, on the Hub OWNER/NAME or datasets/OWNER/NAME."""
        if self.scheme != "hf":
            return 1
        return 3 if self.path.startswith(("datasets/", "spaces/", "buckets/")) else 2

    def upload(self) -> bool:
        """Send both files; False where they are there already.

        Raises:
            ConfigError: another file has the name, or the store refuses; the files here are kept.
        """
        with self.store_errors(f"{self.file} is complete and kept; the same command again uploads it"):
            self.store.invalidate_cache()
            if self.store.exists(self.path):
                known = self.store.exists(self.described) and self.store.cat_file(self.described)
                if known == self.description.read_bytes():
                    return False
                raise ConfigError(
                    f"--upload {self.address}: another file has this name already",
                    hint=f"{self.file} is complete and kept; remove the other, or name another address",
                )
            if self.scheme not in BUCKETS:
                self.store.makedirs(self.path.rpartition("/")[0], exist_ok=True)
            self.put(self.description, self.described)
            self.put(self.file, self.path)
        return True

    def put(self, file: pathlib.Path, path: str) -> None:
        """One file, whole or not there."""
        if self.scheme in BUCKETS:
            self.store.put_file(str(file), path)
            return
        partial = f"{path}.{secrets.token_hex(4)}{INCOMPLETE}"
        try:
            self.store.put_file(str(file), partial)
            self.store.mv(partial, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self.store.rm_file(partial)
            raise

"""Bytes from far away: http(s), S3 and whatever else fsspec reaches; tried again where trying again may help.

A server that is slow, restarts or breaks off is waited for: every try has a time-out, a body that is shorter than
announced is no success, and the waits grow from half a second to half a minute. What no second try can mend (not
there, not allowed, no credentials) is refused at once.
"""

from __future__ import annotations

import errno
import os
import posixpath
import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from hardpatch.runtime.errors import InputError
from hardpatch.runtime.extras import install
from hardpatch.runtime.log import warn

Fetched = TypeVar("Fetched")

_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "hf": "datasets"}
"""Which extra of hardpatch brings what fsspec needs for a protocol."""

_ASK_AGAIN = {408, 425, 429}
"""Answers of the kind 4xx that mean: later."""

_NOT_THERE = (FileNotFoundError, PermissionError, NotImplementedError)

_HOPELESS = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL"}
"""Errors of the libraries below fsspec that no second try mends, by name so as not to import them."""


class Patience(NamedTuple):
    """How long a server is waited for."""

    tries: int = 8
    first_wait: float = 0.5
    """Seconds before the second try; doubled before every further one."""
    longest_wait: float = 30.0
    """Seconds."""
    timeout: float = 60.0
    """Seconds without a byte after which a try has failed."""

    def wait(self, url: str, tries: int) -> float:
        """Seconds to wait after so many tries: up to a quarter more or less, so that many workers do not come back at
        once; a function of the URL and the try, so that nothing here is random."""
        spread = zlib.crc32(f"{url} {tries}".encode()) / 2**32 - 0.5
        return min(self.longest_wait, self.first_wait * 2.0 ** (tries - 1)) * (1 + spread / 2)


PATIENCE = Patience()
"""While a run goes on."""

SHORT_OF_PATIENCE = 5
"""Tries while the user waits for the command to begin: a misspelt name of a server looks like one that is down."""


class UnreachableError(OSError):
    """A URL that cannot be read, after all tries; the message names it and says why."""


class RefusedError(UnreachableError):
    """A URL that no second try would have brought: not there, not allowed."""


class RemoteFile(NamedTuple):
    """What a server says of a file."""

    size: int | None
    """Bytes; None where it does not say."""
    version: str
    """Its checksum or date, whatever changes with the content; empty where it does not say."""


def is_url(name: str) -> bool:
    """Is this a URL, and not a path?"""
    scheme, separator, _ = name.partition("://")
    return bool(separator) and scheme.isalnum()


def join(folder: str, name: str) -> str:
    """A file of a remote folder, or the URL itself where ``name`` is one."""
    return name if is_url(name) else posixpath.join(folder, name)


def ending(url: str) -> str:
    """The file name in a URL, on a web server without what follows a question mark."""
    return posixpath.basename(urlsplit(url).path if url.startswith("http") else url)


def folder(url: str) -> str:
    """What stands before the file name in a URL, without its last slash."""
    return (url.partition("?")[0] if url.startswith("http") else url).rpartition("/")[0]


def fetch(url: str, *, patience: Patience | None = None) -> bytes:
    """The bytes of a small file.

    Raises:
        UnreachableError: Not after all tries.
        InputError: A library is missing.
    """
    return _patiently(url, lambda system: bytes(system.cat_file(url)), patience)


def describe(url: str, *, patience: Patience | None = None) -> RemoteFile:
    """Size and version of a file.

    Raises:
        UnreachableError: Not after all tries.
        InputError: A library is missing.
    """
    about = _patiently(url, lambda system: system.info(url), patience, max_tries=SHORT_OF_PATIENCE)
    version = next((about[key] for key in ("ETag", "etag", "md5Hash", "Last-Modified") if about.get(key)), "")
    return RemoteFile(about.get("size"), str(version))


def download(url: str, file: Path, *, size: int | None, patience: Patience | None = None) -> None:
    """Stream a file to the disk.

    Args:
        url: What to fetch.
        file: Where to write it; what is there is overwritten.
        size: Bytes that it must have; None: the server has not said.
        patience: How long to wait for the server.

    Raises:
        UnreachableError: Not after all tries.
        InputError: A library is missing.
        OSError: The disk is full.
    """

    def stream(system: Any) -> None:
        system.get_file(url, str(file))
        if size is not None and (got := file.stat().st_size) != size:
            raise EOFError(f"broke off after {got:,} of {size:,} bytes")

    _patiently(url, stream, patience)


def parquet_footer(url: str, *, patience: Patience | None = None) -> tuple[Any, int] | None:
    """Schema and number of rows of a parquet file, from its last bytes; None where the server gives only whole files.

    Raises:
        UnreachableError: Not after all tries.
        InputError: A library is missing.
    """

    def look(system: Any) -> tuple[Any, int] | None:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            with system.open(url, "rb", block_size=1 << 20) as file, ParquetFile(file) as table:
                return table.schema_arrow, int(table.metadata.num_rows)
        except ArrowInvalid as error:
            raise RefusedError(f"{url}: {error}") from error
        except ValueError:  # fsspec: the server does not support range requests
            return None

    return _patiently(url, look, patience, max_tries=SHORT_OF_PATIENCE)


def find(pattern: str, *, patience: Patience | None = None) -> list[str]:
    """URLs that match a pattern with stars, sorted; object storage can list them, a web server cannot.

    Raises:
        UnreachableError: Not after all tries.
        InputError: A library is missing.
    """

    def look(system: Any) -> list[str]:
        return sorted(system.unstrip_protocol(path) for path in system.glob(pattern))

    return _patiently(pattern, look, patience, max_tries=SHORT_OF_PATIENCE)


def _patiently(
    url: str, attempt: Callable[[Any], Fetched], patience: Patience | None, *, max_tries: int | None = None
) -> Fetched:
    """Try until it works, or trying is hopeless."""
    patience = patience or PATIENCE
    patience = patience._replace(tries=min(patience.tries, max_tries or patience.tries))
    for tries in range(1, patience.tries + 1):
        try:
            return attempt(_file_system(url, patience.timeout))
        except (InputError, RefusedError):
            raise
        except Exception as error:  # aiohttp, botocore, asyncio and the sockets each have errors of their own
            if _no_space(error):
                raise
            cause = _cause(error)
            reason = _reason(cause)
            if _is_hopeless(cause):
                raise RefusedError(f"{url}: {reason}") from error
            if tries == patience.tries:
                raise UnreachableError(f"{url}: {reason}; given up after {tries} tries") from error
            wait = patience.wait(url, tries)
            if wait >= 4:
                warn(f"{url}: {reason}; trying again in {wait:.0f} s ({tries} of {patience.tries} tries)")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _file_system(url: str, timeout: float) -> Any:
    """fsspec's file system for a URL.

    Raises:
        InputError: Nothing that is installed reads such URLs.
    """
    scheme = url.partition("://")[0].lower()
    try:
        return _opened(scheme, timeout, os.getpid())
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        hint = install(extra) if extra else str(error)
        raise InputError(f"data: reading {url} needs a package that is not installed: {hint}") from None
    except ValueError as error:  # a protocol that fsspec has never heard of
        raise InputError(f"data: {url}: {error}") from None


@lru_cache
def _opened(scheme: str, timeout: float, process: int) -> Any:
    """One per process: its connections live in a thread that a fork does not copy."""
    import fsspec

    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        options = {"client_kwargs": {"timeout": limits, "trust_env": True}}
    elif scheme in ("s3", "s3a"):
        options = {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout}}
    return fsspec.filesystem(scheme, **options)


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error, if there is one."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _cause(error: Exception) -> Exception:
    """What went wrong: fsspec says that a file is not there whatever kept it from asking for its size."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _is_hopeless(error: BaseException) -> bool:
    if type(error).__name__ in _HOPELESS or isinstance(
        error, FileNotFoundError | PermissionError | NotImplementedError
    ):
        return True
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in _ASK_AGAIN


def _no_space(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _reason(error: BaseException) -> str:
    """Why, in words."""
    if (status := _status(error)) is not None:
        return f"the server says {status} {getattr(error, 'message', '') or ''}".rstrip()
    match error:
        case FileNotFoundError():
            return "there is no such file (404)"
        case PermissionError():
            return f"not allowed (403): {error}"
        case TimeoutError():
            return "the server does not answer in time"
        case _ if type(error).__name__ == "NoCredentialsError":
            return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more is known'}"

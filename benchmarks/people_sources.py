"""Sources of every kind for ``people_files.py``, with the names and in the places that people have."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from people_images import Picture

SOURCES = ("folder", "flat folder", "list", "csv", "parquet", "parquet images", "tar", "tar.gz", "saved", "http csv",
           "http tar", "s3 csv", "s3 tar")  # fmt: skip
CLASSES = ("cat", "dog")
_SERVE = """
import sys, functools, http.server
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
handler.func.log_message = lambda *_: None
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
_STORE = """
import time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(1e6)
"""


@dataclass
class Made:
    """A source that lies there."""

    spec: str
    """What is given to the command."""
    pictures: list[Picture]
    """In it, with their labels."""
    labelled: bool
    """Can the source have labels?"""
    standing: bytes
    """The folder in which the command is given."""
    folder: bytes | None = None
    """The folder of the data, where it lies on this machine."""


class Servers:
    """A web server for what lies below a folder, and an object store; both start when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root / "site"
        self.root.mkdir(exist_ok=True)
        self._children: list[subprocess.Popen[str]] = []
        self.web = self.store = ""

    def start(self, *, web: bool, store: bool) -> None:
        """Before the first child is forked, so that all have the same."""
        if web:
            self.web = f"http://127.0.0.1:{self._begin(_SERVE, str(self.root))}"
        if store:
            self.store = f"http://127.0.0.1:{self._begin(_STORE)}"
            os.environ |= {"AWS_ENDPOINT_URL": self.store, "AWS_ACCESS_KEY_ID": "t", "AWS_SECRET_ACCESS_KEY": "t",
                           "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
            for _ in range(100):
                try:
                    self._client().create_bucket(Bucket="photos")
                    return
                except OSError:
                    time.sleep(0.1)

    def _begin(self, program: str, *words: str) -> int:
        child = subprocess.Popen(
            [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._children.append(child)
        assert child.stdout is not None
        return int(child.stdout.readline())

    def _client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.store)

    def put(self, name: str, content: bytes) -> None:
        """An object of the store."""
        self._client().put_object(Bucket="photos", Key=name, Body=content)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
            child.wait()


def make_source(case: Any, word: bytes, pictures: Sequence[Picture], work: Path, servers: Servers) -> Made:
    """Write the images of a case as its source.

    Raises:
        OSError: The file system has no such name.
    """
    classes = [word, b"dog"] if case.where == "class" else [b"cat", b"dog"]
    labels = [classes[n % 2] for n in range(len(pictures))]
    if case.name == "case twins" and case.where == "class":
        labels = [(b"Cat", b"cat")[n % 2] for n in range(len(pictures))]
    stems = []
    for n in range(len(pictures)):
        stem = word + b"_%d" % n if case.where == "file" else b"%d" % n
        if case.where == "file" and case.name == "case twins":
            stem = (b"Photo_%d" if n % 2 else b"photo_%d") % (n // 2)
        stems.append(stem)
    files = [b"%s.%s" % (stem, picture.ending.encode()) for stem, picture in zip(stems, pictures)]
    labelled = [picture._replace(label=os.fsdecode(label)) for picture, label in zip(pictures, labels)]
    called = word if case.where == "source" else b"data"
    data = os.fsencode(work) + b"/" + (b"place/" if case.source.startswith(("folder", "flat")) else b"") + called
    made = _KINDS[case.source](case, data, files, labels, labelled, servers)
    return _placed(case, made, os.fsencode(work))


def _write(path: bytes, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def _folder(case: Any, data: bytes, files: list[bytes], labels: list[bytes], pictures: list[Picture], _: Any) -> Made:
    nested = case.labelled and case.source == "folder"
    for file, label, picture in zip(files, labels, pictures):
        _write(data + b"/" + (label + b"/" if nested else b"") + file, picture.content)
    return Made(os.fsdecode(data), pictures, nested, b"", data)


def _images_beside(data: bytes, files: list[bytes], pictures: list[Picture]) -> list[bytes]:
    """Images in a folder beside a table; their paths from there."""
    for file, picture in zip(files, pictures):
        _write(data + b"/in/" + file, picture.content)
    return [b"in/" + file for file in files]


def _list(case: Any, data: bytes, files: list[bytes], labels: list[bytes], pictures: list[Picture], _: Any) -> Made:
    paths = _images_beside(data, files, pictures)
    _write(data + b"/list.txt", b"".join(path + b"\n" for path in paths))
    return Made(os.fsdecode(data + b"/list.txt"), pictures, False, b"", data)


def _as_csv(case: Any, paths: list[bytes], labels: list[bytes]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "label"] if case.labelled else ["path"])
    for path, label in zip(paths, labels):
        writer.writerow([os.fsdecode(path), os.fsdecode(label)][: 1 + case.labelled])
    return text.getvalue().encode("utf-8", "surrogateescape")


def _csv(case: Any, data: bytes, files: list[bytes], labels: list[bytes], pictures: list[Picture], _: Any) -> Made:
    paths = _images_beside(data, files, pictures)
    _write(data + b"/table.csv", _as_csv(case, paths, labels))
    return Made(os.fsdecode(data + b"/table.csv"), pictures, case.labelled, b"", data)


def _parquet(case: Any, data: bytes, files: list[bytes], labels: list[bytes], pictures: list[Picture], _: Any) -> Made:
    import pyarrow
    import pyarrow.parquet

    os.makedirs(data, exist_ok=True)
    names = [label.decode() for label in labels]
    if case.source == "parquet":
        columns: dict[str, Any] = {"path": [path.decode() for path in _images_beside(data, files, pictures)]}
    else:
        columns = {
            "image": [{"bytes": picture.content, "path": file.decode()} for file, picture in zip(files, pictures)]
        }
    if case.labelled:
        columns["label"] = names
    half = len(files) // 2 if case.source == "parquet images" else len(files)
    for part, start in enumerate(range(0, len(files), half)):
        some = pyarrow.table({name: values[start : start + half] for name, values in columns.items()})
        pyarrow.parquet.write_table(some, io_path(data + b"/part-%d.parquet" % part))
    spec = b"/part-*.parquet" if half < len(files) else b"/part-0.parquet"
    return Made(os.fsdecode(data + spec), pictures, case.labelled, b"", data)


def io_path(path: bytes) -> Any:
    """A path for a library that takes no bytes."""
    return open(path, "wb")


def _tar(
    case: Any, data: bytes, files: list[bytes], labels: list[bytes], pictures: list[Picture], servers: Servers
) -> Made:
    packed = case.source == "tar.gz"
    os.makedirs(data, exist_ok=True)
    half = len(files) // 2
    for shard in range(2):
        buffer = io.BytesIO()
        with tarfile.open(
            fileobj=buffer,
            mode="w:gz" if packed else "w",
            format=(tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[case.number % 2],
        ) as archive:
            for n in range(shard * half, shard * half + half):
                for name, content in (
                    (files[n], pictures[n].content),
                    (files[n].rpartition(b".")[0] + b".cls", labels[n]),
                ):
                    if name.endswith(b".cls") and not case.labelled:
                        continue
                    entry = tarfile.TarInfo(os.fsdecode(name))
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        _write(data + b"/s-%d.tar%s" % (shard, b".gz" if packed else b""), buffer.getvalue())
    return Made(os.fsdecode(data + b"/s-{0..1}.tar" + (b".gz" if packed else b"")), pictures, case.labelled, b"", data)


def _saved(case: Any, data: bytes, files: list[bytes], labels: list[bytes], pictures: list[Picture], _: Any) -> Made:
    import datasets

    datasets.disable_progress_bars()
    features: dict[str, Any] = {"image": datasets.Image()}
    columns: dict[str, Any] = {
        "image": [{"bytes": picture.content, "path": file.decode()} for file, picture in zip(files, pictures)]
    }
    if case.labelled:
        features["label"] = datasets.ClassLabel(names=sorted({label.decode() for label in labels}))
        columns["label"] = [label.decode() for label in labels]
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(os.fsdecode(data))
    return Made(os.fsdecode(data), pictures, case.labelled, b"", data)


def _far(
    case: Any, data: bytes, files: list[bytes], labels: list[bytes], pictures: list[Picture], servers: Servers
) -> Made:
    """The table or the shards, served from far away."""
    near = (_tar if case.source.endswith("tar") else _csv)(case, data, files, labels, pictures, servers)
    below = f"{case.seed}-{case.number}/{os.fsdecode(os.path.basename(data))}"
    last = os.path.basename(near.spec)
    if case.source.startswith("http"):
        os.makedirs(servers.root / f"{case.seed}-{case.number}", exist_ok=True)
        os.rename(data, os.fsencode(servers.root / below))
        return Made(f"{servers.web}/{quote(os.fsencode(below))}/{last}", pictures, near.labelled, b"")
    for folder, _, names in os.walk(data):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                servers.put(f"{below}/{os.path.relpath(path, data).decode()}", file.read())
    return Made(f"s3://photos/{below}/{last}", pictures, near.labelled, b"")


_KINDS = {
    "folder": _folder, "flat folder": _folder, "list": _list, "csv": _csv, "parquet": _parquet,
    "parquet images": _parquet, "tar": _tar, "tar.gz": _tar, "saved": _saved, "http csv": _far, "http tar": _far,
    "s3 csv": _far, "s3 tar": _far,
}  # fmt: skip


def _placed(case: Any, made: Made, work: bytes) -> Made:
    """The source where a person has it, and the words that name it from there."""
    made.standing = work
    if made.folder is None:
        return made
    spec, folder = os.fsencode(made.spec), made.folder
    beyond = spec[len(folder) :]
    match case.place:
        case "relative":
            made.spec = os.fsdecode(os.path.relpath(folder, work) + beyond)
        case "inside" | "nested":
            made.standing = folder
            made.spec = os.fsdecode(beyond.lstrip(b"/") or b".")
        case "dotdot":
            os.makedirs(work + b"/elsewhere")
            made.standing = work + b"/elsewhere"
            made.spec = os.fsdecode(b"../" + os.path.relpath(folder, work) + beyond)
        case "link":
            os.symlink(folder, work + b"/link")
            made.spec = os.fsdecode(work + b"/link" + beyond)
        case "slash" if not beyond:
            made.spec += "/"
        case "read-only":
            made.standing = folder
    return made

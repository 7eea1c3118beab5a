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
    standing: Path
    """The folder in which the command is given."""
    folder: Path | None = None
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


def make_source(case: Any, word: str, pictures: Sequence[Picture], work: Path, servers: Servers) -> Made:
    """Write the images of a case as its source.

    Args:
        case: What is wanted.
        word: What is called so is in the case; bytes that are no UTF-8 are as Python has them in names.
        pictures: What is put in.
        work: A folder of the case's own.
        servers: For what is to lie far away.

    Raises:
        OSError: The file system has no such name.
    """
    twins = case.name == "case twins"
    classes = (word, "dog") if case.where == "class" else CLASSES
    if case.where == "class" and twins:
        classes = ("Cat", "cat")
    labels = [classes[n % 2] for n in range(len(pictures))]
    stems = [str(n) for n in range(len(pictures))]
    if case.where == "file":
        stems = [
            f"{word if n % 2 or not twins else word.lower()}_{n // 2 if twins else n}" for n in range(len(pictures))
        ]
    files = [f"{stem}.{picture.ending}" for stem, picture in zip(stems, pictures)]
    labelled = [p._replace(label=label, name=file) for p, label, file in zip(pictures, labels, files)]
    data = work / "place" / (word if case.where == "source" else "data")
    data.mkdir(parents=True)
    made = _KINDS[case.source](case, data, files, labels, labelled, servers)
    return _placed(case, made, work)


def _folder(case: Any, data: Path, files: list[str], labels: list[str], pictures: list[Picture], _: Any) -> Made:
    nested = case.labelled and case.source == "folder"
    for file, label, picture in zip(files, labels, pictures):
        path = data / label / file if nested else data / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture.content)
    return Made(str(data), pictures, nested, data, data)


def _images_beside(data: Path, files: list[str], pictures: list[Picture]) -> list[str]:
    """Images in a folder beside a table; their paths from there."""
    (data / "in").mkdir()
    for file, picture in zip(files, pictures):
        (data / "in" / file).write_bytes(picture.content)
    return [f"in/{file}" for file in files]


def _list(case: Any, data: Path, files: list[str], labels: list[str], pictures: list[Picture], _: Any) -> Made:
    lines = "".join(f"{path}\n" for path in _images_beside(data, files, pictures))
    (data / "list.txt").write_bytes(_encoded(lines))
    return Made(str(data / "list.txt"), pictures, False, data, data)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _csv(case: Any, data: Path, files: list[str], labels: list[str], pictures: list[Picture], _: Any) -> Made:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "label"][: 1 + case.labelled])
    for row in zip(_images_beside(data, files, pictures), labels):
        writer.writerow(row[: 1 + case.labelled])
    (data / "table.csv").write_bytes(_encoded(text.getvalue()))
    return Made(str(data / "table.csv"), pictures, case.labelled, data, data)


def _parquet(case: Any, data: Path, files: list[str], labels: list[str], pictures: list[Picture], _: Any) -> Made:
    import pyarrow
    import pyarrow.parquet

    inside = case.source == "parquet images"
    columns: dict[str, Any] = (
        {"image": [{"bytes": picture.content, "path": file} for file, picture in zip(files, pictures)]}
        if inside else {"path": _images_beside(data, files, pictures)}
    )  # fmt: skip
    if case.labelled:
        columns["label"] = labels
    size = len(files) // 2 if inside else len(files)
    for start in range(0, len(files), size):
        some = pyarrow.table({name: values[start : start + size] for name, values in columns.items()})
        with (data / f"part-{start // size}.parquet").open("wb") as file:
            pyarrow.parquet.write_table(some, file)
    return Made(str(data / f"part-{'*' if inside else '0'}.parquet"), pictures, case.labelled, data, data)


def _tar(case: Any, data: Path, files: list[str], labels: list[str], pictures: list[Picture], _: Any) -> Made:
    gz = ".gz" if case.source == "tar.gz" else ""
    half = len(files) // 2
    form = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[case.number % 2]
    for shard in range(2):
        with tarfile.open(data / f"s-{shard}.tar{gz}", "w:gz" if gz else "w", format=form) as archive:
            for n in range(shard * half, shard * half + half):
                members = {files[n]: pictures[n].content}
                if case.labelled:
                    members[f"{files[n].rpartition('.')[0]}.cls"] = _encoded(labels[n])
                for name, content in members.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return Made(str(data / f"s-{{0..1}}.tar{gz}"), pictures, case.labelled, data, data)


def _saved(case: Any, data: Path, files: list[str], labels: list[str], pictures: list[Picture], _: Any) -> Made:
    import datasets

    datasets.disable_progress_bars()
    features: dict[str, Any] = {"image": datasets.Image()}
    columns: dict[str, Any] = {"image": [{"bytes": p.content, "path": file} for file, p in zip(files, pictures)]}
    if case.labelled:
        features["label"] = datasets.ClassLabel(names=sorted(set(labels)))
        columns["label"] = labels
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(data))
    return Made(str(data), pictures, case.labelled, data, data)


def _far(case: Any, data: Path, files: list[str], labels: list[str], pictures: list[Picture], servers: Any) -> Made:
    """The table or the shards, served from far away."""
    near = (_tar if case.source.endswith("tar") else _csv)(case, data, files, labels, pictures, servers)
    below, last = f"{case.seed}-{case.number}/{data.name}", Path(near.spec).name
    if case.source.startswith("http"):
        (servers.root / below).parent.mkdir()
        data.rename(servers.root / below)
        return Made(f"{servers.web}/{quote(_encoded(below))}/{last}", pictures, near.labelled, data.parent)
    for path in filter(Path.is_file, data.rglob("*")):
        servers.put(f"{below}/{path.relative_to(data)}", path.read_bytes())
    return Made(f"s3://photos/{below}/{last}", pictures, near.labelled, data.parent)


_KINDS = {
    "folder": _folder, "flat folder": _folder, "list": _list, "csv": _csv, "parquet": _parquet,
    "parquet images": _parquet, "tar": _tar, "tar.gz": _tar, "saved": _saved, "http csv": _far, "http tar": _far,
    "s3 csv": _far, "s3 tar": _far,
}  # fmt: skip


def _placed(case: Any, made: Made, work: Path) -> Made:
    """The source where a person has it, and the words that name it from there."""
    made.standing = work
    if made.folder is None:
        return made
    folder, beyond = made.folder, made.spec[len(str(made.folder)) :]
    match case.place:
        case "relative":
            made.standing = folder.parent
            made.spec = f"{folder.name}{beyond}"
        case "inside" | "nested":
            made.standing = folder
            made.spec = beyond.lstrip("/") or "."
        case "dotdot":
            made.standing = work / "elsewhere"
            made.standing.mkdir()
            made.spec = f"../{folder.relative_to(work)}{beyond}"
        case "link":
            (work / "link").symlink_to(folder)
            made.spec = f"{work}/link{beyond}"
        case "slash" if not beyond:
            made.spec += "/"
        case "read-only":
            made.standing = folder
    return made

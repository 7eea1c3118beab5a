"""Images from far away: retried, cached, and each seen exactly once whatever the server does."""

import json
import multiprocessing
import os
import pwd
import random
import threading
import time
from collections import Counter
from contextlib import closing

import pyarrow
import pyarrow.parquet
import pytest
from test_sources import png, values, write, write_tar
from torch.utils.data import Dataset

from hardpatch.data.loader.loading import Position, TrainingOrder, batches_in_order
from hardpatch.data.sources import Blocks, Downloads, fingerprint, open_source, remote
from hardpatch.data.sources.cached_shards import FarShardSource
from hardpatch.data.sources.remote import Patience, UnreachableError
from hardpatch.runtime.errors import InputError
from web_server import serving

QUICK = Patience(tries=8, first_wait=0.01, longest_wait=0.05, timeout=1.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", QUICK)


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


@pytest.fixture
def downloads(tmp_path):
    return Downloads(tmp_path / "cache", gigabytes=1)


def write_shards(folder, num_shards=6, *, images=4, sidecar=False, ending="tar"):
    """Shards of which every image has a grey value and a label of its own."""
    folder.mkdir(exist_ok=True)
    for number in range(num_shards):
        members = []
        for i in range(images):
            value = number * images + i
            members += [(f"{i}.png", png(value)), (f"{i}.cls", str(value % 3).encode())]
        write_tar(folder / f"s-{number}.{ending}", members, "w:gz" if ending == "tar.gz" else "w")
    if sidecar:
        rows = [
            {"name": file.name, "samples": images, "bytes": file.stat().st_size} for file in sorted(folder.glob("s-*"))
        ]
        (folder / "index.json").write_text(json.dumps({"shards": rows}))


def failing_often(share, seed=0):
    """Fails a share of all requests, each in a way of its own; which ones is a function of path and number."""

    def fail(path, number):
        draw = random.Random(f"{seed} {path} {number}")
        return draw.choice([500, 503, 429, "cut", "slow"]) if draw.random() < share else None

    return fail


# One file


@pytest.mark.parametrize("failure", [500, 503, 408, 429, "cut", "hang"])
def test_what_may_pass_is_tried_again(site, failure, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", QUICK._replace(timeout=0.3))
    (site / "a.bin").write_bytes(b"x" * 100_000)
    with serving(site, lambda path, number: failure if number <= 2 else None) as server:
        assert remote.fetch(f"{server.url}/a.bin") == b"x" * 100_000
        assert server.count("/a.bin") == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_cannot_pass_is_refused_at_once_by_its_url(site, status):
    with (
        serving(site, lambda path, number: status) as server,
        pytest.raises(UnreachableError, match=f"{server.url}/a.bin: .*{status}"),
    ):
        remote.fetch(f"{server.url}/a.bin")
    assert server.count("/a.bin") == 1


def test_a_server_that_stays_down_is_given_up_after_all_tries(site):
    with (
        serving(site, lambda path, number: 503) as server,
        pytest.raises(UnreachableError, match=r"503.*after 8 tries"),
    ):
        remote.fetch(f"{server.url}/a.bin")
    assert server.count("/a.bin") == 8


def test_a_body_that_is_shorter_than_the_file_is_no_download(site, tmp_path):
    (site / "a.bin").write_bytes(b"x" * 1000)
    with serving(site, lambda path, number: "short" if number <= 3 else None) as server:
        remote.download(f"{server.url}/a.bin", tmp_path / "a", size=1000)
        assert server.count("/a.bin") == 4
    assert (tmp_path / "a").stat().st_size == 1000


def test_a_slow_body_takes_longer_than_the_timeout_and_is_no_failure(site, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", QUICK._replace(timeout=0.1))
    (site / "a.bin").write_bytes(bytes(range(250)) * 40)
    with serving(site, lambda path, number: "slow") as server:
        assert remote.fetch(f"{server.url}/a.bin") == (site / "a.bin").read_bytes()
        assert server.count("/a.bin") == 1


def test_waits_grow_to_a_bound_and_differ_between_urls_but_not_between_runs():
    waits = [Patience().wait("http://a/b", tries) for tries in range(1, 20)]
    assert all(0.375 * 2**n <= waits[n] <= 0.625 * 2**n for n in range(6))
    assert max(waits) <= 37.5
    assert waits == [Patience().wait("http://a/b", tries) for tries in range(1, 20)]
    assert len({Patience().wait(f"http://a/{n}", 3) for n in range(20)}) == 20


def test_protocols_that_nothing_reads_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"data: nonsense://a/b.tar"):
        open_source("nonsense://a/b.tar")
    import builtins

    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name in ("aiohttp", "s3fs"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    remote._opened.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install .*aiohttp"):
        open_source("https://x.org/a.tar")


# Tables


def test_a_table_on_the_web_lists_files_beside_it_or_anywhere(site, downloads):
    write(site / "in", "a.png", "b.png")
    with serving(site, failing_often(0.2)) as server:
        (site / "in" / "list.txt").write_text(f"a.png\n{server.url}/in/b.png\n")
        (site / "in" / "table.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
        rows = {"path": ["a.png", "b.png"], "label": ["cat", "dog"]}
        pyarrow.parquet.write_table(pyarrow.table(rows), site / "in" / "table.parquet")
        for name, labels in (("list.txt", None), ("table.csv", ["cat", "dog"]), ("table.parquet", ["cat", "dog"])):
            source = open_source(f"{server.url}/in/{name}", downloads=downloads)
            assert values(source) == [0, 1]
            assert source.labels == labels
            assert source.name(1) == f"{server.url}/in/b.png"


ODD = (
    "#1 a.png",
    "what? b=c.png",
    "100% sure.png",
    "a,b;c&d.png",
    "größe 日本.png",
    os.fsdecode(b"caf\xe9.png"),
    "a+b.png",
    "tab\there.png",
    "bell\a.png",
)


@pytest.mark.parametrize("ending", ["txt", "csv"])
def test_a_table_on_the_web_names_files_as_the_disk_does(site, downloads, ending):
    """An address ends at a ``#`` and a ``?``: what the server gave instead would be called damaged."""
    write(site / "in", *ODD)
    lines = [f'"{name}"' if ending == "csv" else name for name in ODD]
    text = "".join(f"{line}\n" for line in (["path", *lines] if ending == "csv" else lines))
    (site / "in" / f"table.{ending}").write_bytes(text.encode("utf-8", "surrogateescape"))
    with serving(site) as server:
        source = open_source(f"{server.url}/in/table.{ending}", downloads=downloads)
        assert values(source) == list(range(len(ODD)))


def test_a_local_table_may_list_urls_and_a_missing_one_is_damage_not_the_end(site, tmp_path):
    write(site, "a.png")
    with serving(site) as server:
        (tmp_path / "list.txt").write_text(f"{server.url}/a.png\n{server.url}/b.png\n")
        source = open_source(str(tmp_path / "list.txt"))
        assert int(source.read(0).image.max()) == 0
        with pytest.raises(OSError, match=r"b\.png.*404"):
            source.read(1)


def test_a_missing_table_is_refused_by_its_url(site, downloads):
    with serving(site) as server, pytest.raises(InputError, match=rf"^val: .*{server.url}/no\.csv.*404"):
        open_source(f"{server.url}/no.csv", field="val", downloads=downloads)


# Shards that fit


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
@pytest.mark.parametrize("sidecar", [False, True])
def test_shards_on_the_web_are_those_on_the_disk(site, downloads, ending, sidecar):
    write_shards(site, ending=ending, sidecar=sidecar)
    local = open_source(f"{site}/s-{{0..5}}.{ending}")
    with serving(site, failing_often(0.1)) as server:
        source = open_source(f"{server.url}/s-{{0..5}}.{ending}", downloads=downloads)
        assert values(source) == values(local) == list(range(24))
        assert source.labels == local.labels
        assert source.blocks() is None
        assert source.name(5) == f"{server.url}/s-1.{ending}:1"
        assert fingerprint(source) == fingerprint(local)
        before, server.fail = len(server.requests), lambda path, number: None
        again = open_source(f"{server.url}/s-{{0..5}}.{ending}", downloads=downloads)
        assert values(again) == values(local)
        assert not any(path.endswith(ending) for command, path in server.requests[before:] if command == "GET")


def test_a_shard_that_changes_is_fetched_again(site, downloads):
    write_shards(site, 1)
    with serving(site) as server:
        assert values(open_source(f"{server.url}/s-0.tar", downloads=downloads)) == [0, 1, 2, 3]
        write_tar(site / "s-0.tar", [("x.png", png(77))])
        assert values(open_source(f"{server.url}/s-0.tar", downloads=downloads)) == [77]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("s-{0..7}.tar", r"s-6\.tar.*404"),
        ("none.tar", r"none\.tar.*404"),
        ("s-*.tar", "use braces"),
        ("torn.tar", r"cannot read the shard http.*torn\.tar"),
        ("s-{0..7.tar", "unbalanced braces"),
    ],
)
def test_shards_that_are_not_good_are_refused_by_their_url(site, downloads, spec, said):
    write_shards(site)
    (site / "torn.tar").write_bytes((site / "s-0.tar").read_bytes()[:1500])
    with serving(site) as server, pytest.raises(InputError, match=f"^val: .*{said}"):
        open_source(f"{server.url}/{spec}", field="val", downloads=downloads)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "must be"),
        ('{"shards": [{"name": "s-0.tar"}]}', "must be"),
        ('{"shards": [{"name": "s-0.tar", "samples": 3, "bytes": BYTES}]}', "says 3"),
        ('{"shards": [{"name": "s-0.tar", "samples": 4, "bytes": 7}]}', "says 7"),
    ],
)
def test_an_index_that_is_wrong_is_refused(site, downloads, content, said):
    write_shards(site, 1)
    (site / "index.json").write_text(content.replace("BYTES", str((site / "s-0.tar").stat().st_size)))
    with serving(site) as server, pytest.raises(InputError, match=said):
        open_source(f"{server.url}/s-0.tar", downloads=downloads)


@pytest.mark.parametrize("ranges", [True, False])
def test_parquet_files_with_images_inside_are_shards(site, downloads, ranges):
    about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    schema = pyarrow.schema(
        [
            ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            ("label", pyarrow.int64()),
        ],
        metadata={"huggingface": json.dumps(about)},
    )
    for number in range(2):
        images = [{"bytes": png(2 * number + i), "path": f"{i}.png"} for i in range(2)]
        table = pyarrow.table({"image": images, "label": [0, 1]}, schema=schema)
        pyarrow.parquet.write_table(table, site / f"t-{number}.parquet")
    with serving(site, ranges=ranges) as server:
        for spec in (f"{server.url}/t-{{0..1}}.parquet", f"{site}/t-*.parquet"):
            source = open_source(spec, downloads=downloads)
            assert values(source) == [0, 1, 2, 3]
            assert source.labels == ["cat", "dog", "cat", "dog"]
            assert source.name(2).endswith("t-1.parquet:0.png")


# Shards of which the disk holds a few


class Keys(Dataset):
    """The grey value of what is asked for, and by whom."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, key):
        number, index = key
        value = int(self.source.read(index).image[0, 0, 0])
        assert value == index
        return number, value


def far_source(server, folder, *, num_shards, held):
    """Opened in a folder that holds so many shards and half of one."""
    size = max(file.stat().st_size for file in server.folder.glob("s-*"))
    downloads = Downloads(folder, gigabytes=size * (held + 0.5) / 1e9)
    source = open_source(f"{server.url}/s-{{0..{num_shards - 1}}}.tar", downloads=downloads)
    assert isinstance(source, FarShardSource)
    assert source.blocks() == Blocks((4,) * num_shards, held // 2)
    return source


def epoch(source, *, first_step=0, total_steps, batch_size, position, workers):
    order = TrainingOrder(
        len(source), batch_size=batch_size, first_step=first_step, total_steps=total_steps, seed=3, position=position,
        blocks=source.blocks(),
    )  # fmt: skip
    return list(
        batches_in_order(Keys(source), order, collate=list, workers=workers, pin_memory=False, prepare=source.prepare)
    )


@pytest.mark.parametrize("sidecar", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_over_a_web_that_fails_sees_every_image_once_and_resumes_exactly(site, tmp_path, workers, sidecar):
    """5 % of the requests fail; two processes; the disk holds 4 of 12 shards."""
    write_shards(site, 12, sidecar=sidecar)
    with serving(site, failing_often(0.05, seed=1)) as server:
        source = far_source(server, tmp_path / "cache", num_shards=12, held=4)
        ranks = [
            epoch(source, total_steps=12, batch_size=8, position=Position(rank, 2, 2), workers=workers)
            for rank in range(2)
        ]
        for number in range(2):  # two passes of six steps
            seen = Counter(key for rank in ranks for batch in rank for key in batch if key[0] == number)
            assert seen == Counter((number, index) for index in range(48))
        late = epoch(source, first_step=5, total_steps=12, batch_size=8, position=Position(1, 2, 2), workers=workers)
        assert late == ranks[1][10:]
        assert server.failures
    on_disk = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.data"))
    assert on_disk <= source.shards[0].downloads.max_bytes


def test_windows_are_fetched_ahead_and_each_shard_once_a_pass(site, tmp_path):
    write_shards(site, 12, sidecar=True)
    with serving(site) as server:
        source = far_source(server, tmp_path / "cache", num_shards=12, held=4)
        epoch(source, total_steps=12, batch_size=4, position=Position(), workers=0)
        assert [server.count(f"/s-{n}.tar") for n in range(12)] == [1] * 12


def test_the_next_window_is_there_before_it_is_needed(site, tmp_path):
    write_shards(site, 12, sidecar=True)
    with serving(site) as server:
        source = far_source(server, tmp_path / "cache", num_shards=12, held=4)
        order = TrainingOrder(
            48, batch_size=4, first_step=0, total_steps=12, seed=0, position=Position(), blocks=source.blocks()
        )
        batches = batches_in_order(
            Keys(source), order, collate=list, workers=0, pin_memory=False, prepare=source.prepare
        )
        with closing(batches):
            next(batches)
            wanted = {f"/s-{block}.tar" for window in order.windows(0)[:2] for block in window.blocks}
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and len(list((tmp_path / "cache").glob("*.data"))) < 4:
                time.sleep(0.02)
            assert {path for command, path in server.requests if command == "GET" and "/s-" in path} == wanted


def test_a_shard_that_cannot_be_had_stops_the_run_by_its_url(site, tmp_path):
    write_shards(site, 6, sidecar=True)
    with serving(site) as server:
        source = far_source(server, tmp_path / "cache", num_shards=6, held=2)
        (site / "s-4.tar").unlink()
        for workers in (0, 1):
            with pytest.raises(InputError, match=rf"^data: cannot fetch the shard {server.url}/s-4\.tar.*404"):
                epoch(source, total_steps=6, batch_size=4, position=Position(), workers=workers)


def test_a_folder_too_small_for_two_shards_is_refused(site, tmp_path):
    write_shards(site, 3)
    size = (site / "s-0.tar").stat().st_size
    with serving(site) as server, pytest.raises(InputError, match=r"^download_gigabytes: must hold two shards"):
        open_source(f"{server.url}/s-{{0..2}}.tar", downloads=Downloads(tmp_path / "c", gigabytes=1.5 * size / 1e9))


def test_the_fingerprint_of_a_far_set_needs_no_image(site, tmp_path):
    write_shards(site, 6, sidecar=True)
    with serving(site) as server:
        source = far_source(server, tmp_path / "cache", num_shards=6, held=2)
        before = fingerprint(source)
        assert not any(path.endswith(".tar") for command, path in server.requests if command == "GET")
        rows = json.loads((site / "index.json").read_text())
        write_tar(site / "s-5.tar", [(f"{i}.png", png(i)) for i in range(20)])
        rows["shards"][5] |= {"samples": 20, "bytes": (site / "s-5.tar").stat().st_size}
        (site / "index.json").write_text(json.dumps(rows))
        downloads = Downloads(tmp_path / "other", gigabytes=(rows["shards"][5]["bytes"] * 2 + 1) / 1e9)
        assert fingerprint(open_source(f"{server.url}/s-{{0..5}}.tar", downloads=downloads)) != before


# Order in windows


def order_of(sizes, together, *, first_step=0, total_steps, batch_size=4, position=None):
    return TrainingOrder(
        sum(sizes), batch_size=batch_size, first_step=first_step, total_steps=total_steps, seed=0,
        position=position or Position(), blocks=Blocks(tuple(sizes), together),
    )  # fmt: skip


def test_a_window_holds_whole_blocks_and_passes_differ():
    sizes, starts = (5, 7, 3, 9, 4, 8), (0, 5, 12, 15, 24, 28)
    order = order_of(sizes, 2, total_steps=18, batch_size=6)
    batches = list(order)
    passes = [[index for batch in batches[6 * n : 6 * n + 6] for _, index in batch] for n in range(3)]
    assert all(sorted(indices) == list(range(36)) for indices in passes)
    assert len({tuple(indices) for indices in passes}) == 3
    assert len({tuple(window.blocks for window in order.windows(number)) for number in range(3)}) == 3
    for number, indices in enumerate(passes):
        windows = order.windows(number)
        assert sorted(block for window in windows for block in window.blocks) == list(range(6))
        assert [len(window.blocks) for window in windows] == [2, 2, 2]
        for window in windows:
            wanted = {i for b in window.blocks for i in range(starts[b], starts[b] + sizes[b])}
            inside = indices[window.start : window.end]
            assert set(inside) == wanted
            assert inside != sorted(inside)


@pytest.mark.parametrize("first_step", range(0, 18, 5))
def test_starting_later_gives_the_tail_of_the_order_in_windows(first_step):
    for position in (Position(), Position(1, 2, 2)):
        whole = list(order_of((5, 7, 3, 9, 4, 8), 2, total_steps=18, position=position))
        tail = list(order_of((5, 7, 3, 9, 4, 8), 2, first_step=first_step, total_steps=18, position=position))
        assert tail == whole[first_step * position.num_micro_batches :]


# The folder of downloads


def fill_with(content, calls=None):
    def fill(path):
        if calls is not None:
            calls.append(path)
            time.sleep(0.05)
        path.write_bytes(content)

    return fill


def read(downloads, key, content, calls=None):
    descriptor = downloads.open(key, fill_with(content, calls), size=len(content))
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def test_least_recently_used_files_go_first(tmp_path):
    downloads = Downloads(tmp_path, gigabytes=30 / 1e9)
    for number, key in enumerate("abc"):
        read(downloads, key, b"x" * 10)
        os.utime(tmp_path / f"{key}.data", (number, number))
    downloads._touched.clear()
    read(downloads, "a", b"")  # used again
    read(downloads, "d", b"y" * 10)
    assert sorted(file.name for file in tmp_path.glob("*.data")) == ["a.data", "c.data", "d.data"]


def test_several_threads_and_processes_fetch_a_file_once(tmp_path):
    downloads, calls = Downloads(tmp_path), []
    threads = [threading.Thread(target=read, args=(downloads, "a", b"abc", calls)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_append_and_read, args=(tmp_path, tmp_path / "log")) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert (tmp_path / "log").read_text() == "x"


def _append_and_read(folder, log):
    def fill(path):
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.2)
        path.write_bytes(b"abc")

    descriptor = Downloads(folder).open("b", fill, size=3)
    assert os.read(descriptor, 9) == b"abc"


def _fetch_and_hang(folder, started):
    def fill(path):
        path.write_bytes(b"half")
        started.set()
        time.sleep(60)

    Downloads(folder).ensure("a", fill, size=8)


def test_a_process_that_is_killed_while_it_fetches_blocks_nobody_and_leaves_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    child = context.Process(target=_fetch_and_hang, args=(tmp_path, started))
    child.start()
    started.wait(10)
    child.kill()
    child.join()
    assert (tmp_path / "a.part").exists()
    assert read(Downloads(tmp_path), "b", b"abc") == b"abc"
    assert not (tmp_path / "a.part").exists()
    assert read(Downloads(tmp_path), "a", b"whole") == b"whole"


@pytest.fixture
def homeless(monkeypatch):
    """A user id without a name in a batch system: no HOME, and nobody knows where it would be."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nobody(_):
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(pwd, "getpwuid", nobody)


@pytest.mark.parametrize("spec", ["in", "list.txt", "s-*.tar", "shapes:4"])
def test_what_lies_here_needs_no_home_folder(homeless, tmp_path, spec):
    write_shards(tmp_path)
    write(tmp_path / "in", "a.png", "b.png")
    (tmp_path / "list.txt").write_text("in/a.png\nin/b.png\n")
    assert len(open_source(spec if ":" in spec else str(tmp_path / spec))) > 1


def test_what_is_fetched_without_a_home_folder_says_what_to_give(homeless, site):
    write_shards(site, num_shards=1)
    said = "download_dir: must be given here, because this user has no home folder"
    with serving(site) as server, pytest.raises(InputError, match=said):
        open_source(f"{server.url}/s-0.tar")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_home_folder_that_is_another_users_is_named(tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    downloads = Downloads(home / "cache")
    os.seteuid(54321)
    try:
        for ask in (lambda: downloads.ensure("a", lambda _: None, size=1), lambda: downloads.index_path("a")):
            with pytest.raises(InputError, match="download_dir: cannot write in"):
                ask()
    finally:
        os.seteuid(0)


def test_a_full_disk_is_said_with_the_folder(tmp_path):
    def fill(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=f"^download_dir: cannot write in '{tmp_path}'.*No space left"):
        Downloads(tmp_path).ensure("a", fill, size=1)
    assert not list(tmp_path.glob("*.part"))

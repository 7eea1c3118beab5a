"""Images in S3: a server of moto on this machine."""

import pytest
from test_remote import write_shards
from test_sources import values, write

from hardpatch.data.sources import Downloads, fingerprint, open_source, remote
from hardpatch.data.sources.remote import Patience
from hardpatch.runtime.errors import InputError

boto3 = pytest.importorskip("boto3")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def storage():
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def bucket(storage, monkeypatch, tmp_path):
    """A bucket with the files of a folder, reached as users reach theirs: by the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": storage,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PATIENCE", Patience(tries=3, first_wait=0.01, longest_wait=0.05, timeout=5))
    remote._opened.cache_clear()
    write_shards(tmp_path / "site")
    write(tmp_path / "site" / "in", "a.png", "b.png")
    (tmp_path / "site" / "table.csv").write_text("path,label\nin/a.png,cat\nin/b.png,dog\n")
    client = boto3.client("s3")
    client.create_bucket(Bucket="photos")
    for file in sorted((tmp_path / "site").rglob("*")):
        if file.is_file():
            client.upload_file(str(file), "photos", str(file.relative_to(tmp_path / "site")))
    yield "s3://photos"
    remote._opened.cache_clear()


def test_shards_and_tables_in_a_bucket_are_those_on_the_disk(bucket, tmp_path):
    downloads = Downloads(tmp_path / "cache")
    local = open_source(str(tmp_path / "site" / "s-*.tar"))
    for spec in ("s-{0..5}.tar", "s-*.tar"):
        source = open_source(f"{bucket}/{spec}", downloads=downloads)
        assert values(source) == values(local) == list(range(24))
        assert source.labels == local.labels
        assert fingerprint(source) == fingerprint(local)
    table = open_source(f"{bucket}/table.csv", downloads=downloads)
    assert values(table) == [0, 1]
    assert table.labels == ["cat", "dog"]
    assert table.name(1) == "s3://photos/in/b.png"
    for spec, said in (("s-{0..9}.tar", r"s-6\.tar"), ("no-*.tar", "no shard"), ("no.csv", r"no\.csv")):
        with pytest.raises(InputError, match=f"^val: .*{said}"):
            open_source(f"{bucket}/{spec}", field="val", downloads=downloads)

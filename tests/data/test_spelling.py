"""One set in every spelling: relative, through links and .., with braces, stars and brackets in its folders."""

import pyarrow
import pyarrow.parquet
import pytest
from test_sources import png, values, write_tar

from hardpatch.data.sources import Downloads, fingerprint, open_source
from hardpatch.runtime.errors import InputError


def write_set(folder, kind):
    """Two files of two images each; the pattern that names them."""
    folder.mkdir(parents=True)
    for number in range(2):
        contents = [png(2 * number + i) for i in range(2)]
        if kind == "tar":
            write_tar(folder / f"s-{number}.tar", [(f"{i}.png", content) for i, content in enumerate(contents)])
        else:
            images = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]
            pyarrow.parquet.write_table(pyarrow.table({"image": images}), folder / f"s-{number}.parquet")
    return f"s-*.{kind}"


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("place", ["inside", "dotted", "relative", "up", "link", "absolute", "home"])
def test_a_set_is_the_same_however_it_is_named(tmp_path, monkeypatch, kind, place):
    folder = tmp_path / "photos" / "all"
    name = write_set(folder, kind)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    standing, spec = {
        "inside": (folder, name), "dotted": (folder, f"./{name}"), "relative": (tmp_path, f"photos/all/{name}"),
        "up": (tmp_path / "link" / "..", f"../photos/all/{name}"), "link": (tmp_path, f"link/{name}"),
        "absolute": (tmp_path, f"{folder}/{name}"), "home": (tmp_path, f"~/photos/all/{name}"),
    }[place]  # fmt: skip
    monkeypatch.chdir(standing)
    downloads = Downloads(tmp_path / "cache")
    source = open_source(spec, downloads=downloads)
    assert values(source) == [0, 1, 2, 3]
    assert fingerprint(source) == fingerprint(open_source(f"{folder}/{name}", downloads=downloads))
    for one in (name.replace("*", "{0..1}"), name.replace("*", "0")):
        assert values(open_source(spec.replace(name, one), downloads=downloads))[:2] == [0, 1]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("called", ["[1] {a,b} (copy)", r"$\frac{a}{b}$", "st*r?", r"a\b", "{000..003}"])
def test_a_folder_that_is_there_is_meant_as_it_is_written(tmp_path, kind, called):
    name = write_set(tmp_path / called, kind)
    downloads = Downloads(tmp_path / "cache")
    for spec in (name, name.replace("*", "{0..1}")):
        assert values(open_source(f"{tmp_path / called}/{spec}", downloads=downloads)) == [0, 1, 2, 3]
    file = tmp_path / called / name.replace("*", "0")
    odd = file.rename(file.with_name(f"[x]{{a,b}}.{kind}"))
    assert values(open_source(str(odd), downloads=downloads)) == [0, 1]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_stars_and_braces_in_the_folder_part_name_files_of_several(tmp_path, kind):
    for day in ("monday", "tuesday"):
        name = write_set(tmp_path / day / "parts", kind)
    for spec in (f"*/parts/{name}", f"{{monday,tuesday}}/parts/{name}", f"*day/*/{name}"):
        assert values(open_source(f"{tmp_path}/{spec}", downloads=Downloads(tmp_path / "cache"))) == 2 * [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"no shard|does not exist"):
        open_source(f"{tmp_path}/*night/parts/{name}")


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_parquet_file_that_is_a_folder_of_parts(tmp_path, slash):
    """As Spark and pandas write it, with a mark that it is whole."""
    write_set(tmp_path / "train.parquet", "parquet")
    (tmp_path / "train.parquet" / "_SUCCESS").touch()
    source = open_source(f"{tmp_path}/train.parquet{slash}", downloads=Downloads(tmp_path / "cache"))
    assert values(source) == [0, 1, 2, 3]

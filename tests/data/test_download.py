"""rescom-timm get, against a server on 127.0.0.1 with small archives in the official layout."""

import errno
import io
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from rescom_timm.__main__ import main
from rescom_timm.data import download, sources
from rescom_timm.data.benchmarks import BENCHMARKS, data_path, get_hint, human
from rescom_timm.data.config import DataConfig
from tests.data.archives import archive, git_id, inat, served
from tests.raises import raises


@pytest.fixture
def server(monkeypatch):
    with served(monkeypatch) as state:
        yield state


def files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name
    )


INAT = [
    "train2018.json",
    "train_val2018/A/0/x.jpg",
    "train_val2018/B/1/y.jpg",
    "train_val2018/B/1/z.jpg",
    "val2018.json",
]


def test_places_lt_loads_as_its_recipe_reads_it(server, tmp_path, monkeypatch, capsys):
    assert main(["get", "places_lt", "--to", str(tmp_path), "--yes"]) == 0
    assert f"export RESCOM_DATA={tmp_path}" in capsys.readouterr().out
    assert not [name for name in files(tmp_path) if ".get" in name], "nothing unfinished is left"
    monkeypatch.setenv("RESCOM_DATA", str(tmp_path))
    lists = {"index": "./lists/Places_LT_train.txt", "test_index": "./lists/Places_LT_test.txt"}
    data = sources.load(DataConfig("./data/places365", **lists))
    assert data.counts.tolist() == [2, 1] and data.test.labels.tolist() == [0, 1]
    assert Path(data.test.dataset[1]["image"]["path"]) == tmp_path / "data/places365/val_256/Places365_val_1.jpg"
    assert Path(data.train.dataset[2]["image"]["path"]) == tmp_path / "data/places365/data_256/a/arena/hockey/2.jpg"
    server["asked"].clear()
    assert main(["get", "places_lt", "--to", str(tmp_path)]) == 0, "no question where all is there"
    assert server["asked"] == []


def test_inat18_from_archives_at_hand(server, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    for name, content in inat().items():
        (own / name).write_bytes(content)
        server["gone"].add(name)
    server["files"] |= {path.name: path.read_bytes() for path in own.iterdir()}
    words = [word for path in own.iterdir() for word in ("--from", str(path))]
    huge = tuple(replace(file, size=10**18) for file in BENCHMARKS["inat18"].files)
    monkeypatch.setitem(BENCHMARKS, "inat18", replace(BENCHMARKS["inat18"], files=huge))  # not of what is at hand
    assert main(["get", "inat18", "--to", str(tmp_path / "to"), "--yes", "--no-check", *words]) == 0
    assert files(tmp_path / "to/data/inat2018") == INAT and len(list(own.iterdir())) == 3
    monkeypatch.chdir(tmp_path / "to")
    lists = {"index": "./data/inat2018/train2018.json", "test_index": "./data/inat2018/val2018.json"}
    assert sources.load(DataConfig("./data/inat2018", **lists)).class_names == ["Apis mellifera", "Bufo bufo"]


def test_a_cut_connection_is_tried_again(server, tmp_path):
    server["cut"]["train_val2018.tar.gz"] = 100
    download.get("inat18", tmp_path, say=lambda line: None)
    asked = [name for name, _ in server["asked"] if name == "train_val2018.tar.gz"]
    assert len(asked) == 2 and files(tmp_path / "data/inat2018") == INAT


def test_the_next_command_goes_on_where_the_last_one_stopped(server, tmp_path, monkeypatch):
    work = tmp_path / "data/inat2018/.get"
    work.mkdir(parents=True)
    (work / "train_val2018.tar.gz").write_bytes(server["files"]["train_val2018.tar.gz"][:77])
    (work / "val2018.json.tar.gz").write_bytes(server["files"]["val2018.json.tar.gz"])
    download.get("inat18", tmp_path, say=lambda line: None)
    assert ("train_val2018.tar.gz", "bytes=77-") in server["asked"]
    assert "val2018.json.tar.gz" not in dict(server["asked"]) and files(tmp_path / "data/inat2018") == INAT


def test_another_checksum_is_refused_and_fetched_again(server, tmp_path):
    right = server["files"]["val2018.json.tar.gz"]
    server["files"]["val2018.json.tar.gz"] = right[:-1] + bytes([right[-1] ^ 1])
    with raises("get.checksum", "val2018.json.tar.gz"):
        download.get("inat18", tmp_path)
    server["files"]["val2018.json.tar.gz"] = right
    download.get("inat18", tmp_path, say=lambda line: None)
    assert files(tmp_path / "data/inat2018") == INAT


def test_a_missing_file_on_the_server(server, tmp_path, capsys):
    server["gone"].add("val_256.tar")
    assert main(["get", "places_lt", "--to", str(tmp_path), "--yes"]) == 1
    error = capsys.readouterr().err
    assert "error[get.unreachable]" in error and "val_256.tar" in error and "--from" in error
    assert (tmp_path / "lists/Places_LT_train.txt").is_file(), "what came stays"


def test_no_server(server, tmp_path, monkeypatch):
    file = replace(BENCHMARKS["inat18"].files[0], url="http://127.0.0.1:9/train2018.json.tar.gz")
    monkeypatch.setitem(BENCHMARKS, "inat18", replace(BENCHMARKS["inat18"], files=(file,)))
    with raises("get.unreachable", "train2018.json.tar.gz"):
        download.get("inat18", tmp_path)


def test_too_little_space_is_said_before_the_first_byte(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with raises("get.space", "10 bytes"):
        download.get("inat18", tmp_path)
    assert server["asked"] == []


def test_too_little_space_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    """Unless the cache holds the data set."""
    monkeypatch.setattr(download, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(download, "free_space", lambda folder: 10**8 if folder == tmp_path / "cache" else 10**12)
    monkeypatch.setattr(download, "_from_hub", lambda name, split: 10)
    with raises("get.space", "100 MB free"):
        download.get("cifar10_lt", tmp_path / "to")
    (tmp_path / "cache" / "uoft-cs___cifar10").mkdir(parents=True)
    download.get("cifar10_lt", tmp_path / "to")


def test_a_full_disk_while_unpacking_and_then_more_space(server, tmp_path, monkeypatch, capsys):
    extract = tarfile.TarFile.extract

    def full(self, member, path, **options):
        if member.name.endswith("y.jpg"):
            raise OSError(errno.ENOSPC, "No space left on device", member.name)
        return extract(self, member, path, **options)

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    assert main(["get", "inat18", "--to", str(tmp_path), "--yes"]) == 1
    assert "free disk space" in capsys.readouterr().err
    assert not (tmp_path / "data/inat2018/train_val2018").exists(), "half an archive does not look like a whole one"
    unpacked = []
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *a, **o: unpacked.append(a[1].name) or extract(*a, **o))
    server["asked"].clear()
    assert main(["get", "inat18", "--to", str(tmp_path), "--yes"]) == 0
    assert unpacked == INAT[2:4], "what was unpacked in full is passed over"
    assert server["asked"] == [] and files(tmp_path / "data/inat2018") == INAT


@pytest.mark.parametrize(("name", "content"), [("train_val2018.tar.gz", b"junk"), ("val2018.json.tar.gz", None)])
def test_what_is_no_such_archive(name, content, server, tmp_path):
    given = tmp_path / name
    given.write_bytes(archive({"other.json": b"{}"}, gz=True) if content is None else content)
    with raises("get.archive", name):
        download.get("inat18", tmp_path / "to", [given], check=False)


def test_a_member_that_leads_out_is_refused(server, tmp_path):
    given = tmp_path / "val2018.json.tar.gz"
    given.write_bytes(archive({"../../../out.json": b"{}", "val2018.json": b"{}"}, gz=True))
    with raises("get.archive"):
        download.get("inat18", tmp_path / "to", [given], check=False)
    assert not list(tmp_path.rglob("out.json"))


def test_two_at_once_wait_for_each_other(server, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(download.get("inat18", tmp_path, say=lambda s: None)))
               for _ in range(2)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = [name for name, _ in server["asked"]]
    assert found == [None, None] and sorted(asked) == sorted(set(asked)), "each file once"


def test_numbers_other_than_the_published_ones(server, tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "places_lt", replace(BENCHMARKS["places_lt"], rows=62_500))
    with raises("get.list", "Places_LT_train.txt", "62,500"):
        download.get("places_lt", tmp_path, say=lambda line: None)


def test_a_gated_data_set_names_its_terms_and_the_login(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(download, "free_space", lambda folder: 10**12)
    monkeypatch.setitem(BENCHMARKS, "imagenet_lt", replace(BENCHMARKS["imagenet_lt"], files=()))
    assert main(["get", "imagenet_lt", "--to", str(tmp_path), "--yes"]) == 1
    error = capsys.readouterr().err
    assert "error[hub.not_found]" in error and "hf auth login" in error
    assert "https://huggingface.co/datasets/ILSVRC/imagenet-1k" in error


def test_dry_run_and_a_shell_without_a_terminal(server, tmp_path, monkeypatch, capsys):
    assert main(["get", "inat18", "--to", str(tmp_path / "to"), "--dry-run"]) == 0
    assert "train_val2018" in capsys.readouterr().out and not (tmp_path / "to").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["get", "inat18", "--to", str(tmp_path / "to")]) == 1
    assert "error[get.terms]" in capsys.readouterr().err and server["asked"] == []


@pytest.mark.parametrize(
    ("words", "code"),
    [("nothing", "get.name"), ("inat18 --from none.tar", "get.archive"), ("cifar10_lt --from x.tar", "get.archive"),
     ("inat18 --from train_val2018.tar.gz", "file.missing")],
)  # fmt: skip
def test_bad_input(words, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["get", *words.split(), "--dry-run"]) == 1
    assert f"error[{code}]" in capsys.readouterr().err


def test_a_recipe_without_its_data_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESCOM_DATA", raising=False)
    for recipe, command in {"inat18_r50": "get inat18 (120 GB)", "places_lt_r152": "get places_lt (24.5 GB)"}.items():
        assert main(["train", recipe, "--dry-run"]) == 1
        assert command in capsys.readouterr().err
    assert get_hint("./lists/ImageNet_LT_train.txt").startswith(": rescom-timm get imagenet_lt (155 GB)")
    assert get_hint("./photos") == get_hint("./data/other") == ""


def test_rescom_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESCOM_DATA", str(tmp_path / "big"))
    assert data_path("./data/x") == tmp_path / "big/data/x"
    assert data_path("photos") == Path("photos") and data_path("/data/x") == Path("/data/x")
    Path("lists").mkdir()
    assert data_path("./lists") == Path("lists"), "what is here alone is read here"
    monkeypatch.delenv("RESCOM_DATA")
    assert data_path("./data/x") == Path("data/x")


def test_published_addresses_and_checksums_are_torchvisions():
    from torchvision.datasets import Places365, inaturalist

    digests = {file.url: file.digest for benchmark in BENCHMARKS.values() for file in benchmark.files}
    assert digests[inaturalist.DATASET_URLS["2018"]] == f"md5:{inaturalist.DATASET_MD5['2018']}"
    for key in (("train-standard", True), ("val", True)):
        name, digest = Places365._IMAGES_META[key]
        assert digests[f"{Places365._BASE_URL}{name}"] == f"md5:{digest}"


def test_published_lists(shared_lists):
    """Their ids in git are those of the lists at hand."""
    for file in (file for benchmark in BENCHMARKS.values() for file in benchmark.files if file.folder == "lists"):
        if (path := shared_lists / file.makes).is_file():
            content = path.read_bytes()
            assert file.digest == git_id(content)
            assert file.size == len(content)


@pytest.mark.parametrize(("size", "text"), [(120 * 10**9, "120 GB"), (2_092_674, "2.09 MB"), (12, "12 bytes")])
def test_human(size, text):
    assert human(size) == text

"""Which names are ids of the Hub and which are paths, and how long the Hub is waited for."""

import socket
import threading
import time
from pathlib import Path

import pytest

from rescom_timm import hub_client
from rescom_timm.config.loading import shipped
from rescom_timm.config.recipe import HubConfig
from rescom_timm.data.config import DataConfig
from rescom_timm.data.sources import load
from rescom_timm.errors import UnreachableError
from rescom_timm.hub_client import hub_id, online
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.io import read_yaml
from rescom_timm.models.net import NetConfig, create_model
from tests.raises import raises

IDS = {"me/x": "me/x", "me/x@v1": "me/x@v1", "hf://me/x": "me/x", "hf://datasets/me/x@v1": "me/x@v1"}
PATHS = [
    "./me/x", "../x", "/me/x", "~/x", "~me/x", "C:\\me\\x", "C:/me/x", "me\\x", "a/b/c", ".", "x", Path("me/x"), None,
    "here/x", "here/gone", "me/a--b",
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.setattr(hub_client, "_state", {"asked": -hub_client.REMEMBERED, "trouble": "", "depth": 0})
    return tmp_path


@pytest.mark.parametrize(("source", "found"), [*IDS.items(), ("hf-hub:me/x", "me/x"), ("hf://here/x", "here/x")])
def test_ids_of_the_hub(place, source, found):
    assert hub_id(source) == found == hub_id(source, alone=True)


@pytest.mark.parametrize("source", PATHS)
def test_paths(place, source):
    assert hub_id(source) is None
    assert hub_id("mnist") is None and hub_id("mnist", alone=True) == "mnist"
    assert hub_id("here", alone=True) is None, "a folder here is a path"
    assert hub_id("runs/first", plain=False) is None and hub_id("hf://runs/first", plain=False) == "runs/first"


@pytest.mark.parametrize("source", ["hf://x", "hf://../x/y", "hf-hub:", "hf:///me/x"])
def test_a_prefix_before_something_else(source):
    with raises("hub.id", repr(source)):
        hub_id(source)


def test_the_same_rule_everywhere(place):
    assert HubConfig(repo="hf://me/x").repo == "me/x"
    assert NetConfig(backbone="hf://me/x").backbone == "hf-hub:me/x"


@pytest.fixture
def silent(place, monkeypatch):
    """A server that takes every call and answers none, as behind a firewall. Returns how many called."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
        monkeypatch.setattr(hub_client, "PATIENCE", 0.3)
        yield server


ASKS = {
    "model": lambda: from_pretrained("me/x"),
    "data set": lambda: load(DataConfig("me/x")),
    "forced": lambda: from_pretrained("hf://here/x"),
    "weights": lambda: create_model("resnet18.a1_in1k", 2, pretrained=True),
}


@pytest.mark.parametrize("what", ASKS)
def test_a_network_that_is_silent_is_waited_for_once(silent, what):
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises((OSError, RuntimeError)) as caught:
            ASKS[what]()
    assert time.monotonic() - started < 12, "three times 23 seconds of retries, else"
    assert "Retrying" not in str(caught.value)
    if what != "weights":
        assert "cannot be reached" in str(caught.value) and "\n" not in str(caught.value)


MISSING = {
    "data": lambda: load(DataConfig("./data/inat2018")),
    "data below a folder that is here": lambda: load(DataConfig("here/inat2018")),
    "home": lambda: load(DataConfig("~/no such folder")),
    "Windows": lambda: load(DataConfig("D:\\photos")),
    "run": lambda: from_pretrained("here/run"),
}


@pytest.mark.parametrize("what", MISSING)
def test_a_folder_that_is_missing_asks_nobody(place, monkeypatch, what):
    monkeypatch.setattr(hub_client, "_trouble", lambda: pytest.fail("the Hub is asked"))
    with pytest.raises(FileNotFoundError):
        MISSING[what]()


@pytest.mark.parametrize("key", ["index", "test_index"])
def test_a_list_that_is_missing_is_told_before_the_hub_is_asked(place, monkeypatch, key):
    monkeypatch.setattr(hub_client, "_trouble", lambda: pytest.fail("the Hub is asked"))
    with pytest.raises(FileNotFoundError, match=r"lists/x\.txt"):
        load(DataConfig("me/x", **{key: "lists/x.txt"}))


def test_offline_lasts_as_long_as_the_block(silent):
    from huggingface_hub import constants

    with raises("hub.unreachable", kind=UnreachableError), online():
        assert constants.HF_HUB_OFFLINE
        raise OSError("?")
    assert not constants.HF_HUB_OFFLINE and socket.getdefaulttimeout() is None
    with pytest.raises(ZeroDivisionError), online():
        1 / 0  # noqa: B018


def test_an_answer_of_any_kind_is_a_network(place, monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            one, _ = server.accept()
            with one:
                one.recv(1000)
                one.sendall(b"HTTP/1.1 503 busy\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with online():
            assert not constants.HF_HUB_OFFLINE


def test_shipped_recipes_name_folders_that_cannot_be_ids_of_the_hub():
    for path in shipped():
        data = read_yaml(path).get("data", {})
        for key, value in data.items():
            if "/" in str(value):
                assert value.startswith("./") or (key == "source" and hub_id(value)), f"{path.name}: {key}: {value}"

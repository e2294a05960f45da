"""What tests/hub/test_hub.py runs in a process of its own: the Hub's real client and timm against hub_server.py.

The addresses must stand in the environment before huggingface_hub is imported; so this file is no test module itself.
"""

# ruff: noqa: E402

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from tests.hub.hub_server import Fault, HubServer
from tests.raises import raises

assert "huggingface_hub" not in sys.modules, "set HF_ENDPOINT before huggingface_hub is imported"
TOKEN, STRANGER = "hf_TheSecretOfMe", "hf_TheSecretOfAnother"
SERVER = HubServer({TOKEN: {"me"}, STRANGER: {"another"}})
os.environ |= {
    "HF_ENDPOINT": SERVER.url,
    "HF_HOME": tempfile.mkdtemp(),
    "HF_TOKEN": TOKEN,
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

import huggingface_hub
import pytest
import timm
import torch
import yaml

import rescom_timm
from rescom_timm.__main__ import main
from rescom_timm.cli import export as export_command
from rescom_timm.cli import push as tool
from rescom_timm.config.loading import load, load_fetched
from rescom_timm.config.recipe import HubConfig
from rescom_timm.engine import checkpoint
from rescom_timm.engine.run_folder import choose_folder
from rescom_timm.hub import staging
from rescom_timm.hub.push import build, push
from rescom_timm.hub.space import push_space
from rescom_timm.hub.staging import Pusher, stage, staged, status
from rescom_timm.hub_download import HubError, PushedRun
from rescom_timm.inference.pretrained import from_pretrained
from rescom_timm.io import MAX_RECIPE
from tests.data.archives import served
from tests.engine.made_up_run import HOME, NAMES, add_evaluation, make_run

torch.set_num_threads(1)
REPO = "me/rescom-tiny"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the client's own


@pytest.fixture(scope="session", autouse=True)
def running():
    with SERVER:
        yield


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No repository, no fault, an empty cache, and a client that does not sleep for seconds."""
    for found in (SERVER.repos, SERVER.blobs, SERVER.faults, SERVER.requests):
        found.clear()
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    shutil.rmtree(cache, ignore_errors=True)
    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.4 if seconds < 1 else 0.01)))


def stage_all(run, strategy="checkpoint", best="step-00000002", newest="step-00000004", end=True, **config):
    return stage(run, HubConfig(repo=REPO, strategy=strategy, **config), newest, best, end)


def pushed(tmp_path, strategy="checkpoint", **config):
    run = make_run(tmp_path / "run")
    stage_all(run, strategy, **config)
    return run, push(run, pause=0.01)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A run that has staged its push and has exported the model already."""
    run = make_run(tmp_path_factory.mktemp("exported") / "run")
    folder = stage_all(run)
    build(folder, json.loads((folder / "push.json").read_text()))
    return run


@pytest.fixture
def ready(exported, tmp_path):
    """A copy of it, which is pushed in a moment."""
    return Path(shutil.copytree(exported, tmp_path / "run"))


def arrived():
    """Whether the repository holds a whole model and a whole checkpoint: every file as its hashes say."""
    files = SERVER.repos[REPO].files
    for folder in ("", "checkpoints/step-00000004/"):
        for name, value in json.loads(files[f"{folder}hashes.json"]).items():
            assert hashlib.sha256(files[folder + name]).hexdigest() == value, name
    return "README.md" in files


def same_net(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_one_repository_for_two_readers(tmp_path):
    run, told = pushed(tmp_path, license="mit")
    repo = SERVER.repos[REPO]
    assert told["url"].startswith(SERVER.url) and told == status(run) and not staged(run)
    assert repo.private and len(repo.commits) == 2
    model, local = from_pretrained(REPO), from_pretrained(run)
    assert same_net(model.method(), local.method()) and model.class_names == NAMES
    for address in (f"hf://{REPO}", f"hf-hub:{REPO}", f"{REPO}@main", f"{REPO}@{repo.commits[-1][0]}"):
        assert same_net(from_pretrained(address).net, local.net)
    commit = repo.commits[-1][0]
    for address, revision in ((REPO, "main"), (REPO, commit), (f"hf://{REPO}", commit), (f"{REPO}@main", "main")):
        assert same_net(from_pretrained(address, revision=revision).net, local.net)
    with raises("hub.not_found", REPO, kind=FileNotFoundError):
        from_pretrained(REPO, revision="v9")
    plain = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(plain(x), local.net.classify(x))
    assert plain.pretrained_cfg["label_names"] == NAMES
    assert not [name for name in repo.files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    images = [torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()]
    assert rescom_timm.predict(REPO, images, top_k=2) == rescom_timm.predict(run, images, top_k=2)


def test_a_run_goes_on_elsewhere(ready, tmp_path):
    run = ready
    push(run)
    assert load(PushedRun(f"hf://{REPO}").recipe()).name == "tiny"
    there = tmp_path / "there"
    there.mkdir()
    PushedRun(f"hf://{REPO}").fetch(there)
    assert [path.name for path in checkpoint.listed(there / "checkpoints")] == ["step-00000002", "step-00000004"]
    for name in ("step-00000002", "step-00000004"):
        for file in (run / "checkpoints" / name).iterdir():
            assert (there / "checkpoints" / name / file.name).read_bytes() == file.read_bytes()
    assert (there / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


def test_a_folder_that_is_further_is_left_alone(ready, capsys):
    run = ready
    push(run)
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    PushedRun(f"hf://{REPO}").fetch(run)
    assert f"{run} has step-00000004" in capsys.readouterr().out
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_another_local_run_of_the_name_stays_as_it_is(ready, tmp_path, monkeypatch):
    """--resume hf:// takes the folder of that run, or a new one; a recipe from the Hub decides no folder."""
    push(ready)
    address, home = f"hf://{REPO}", tmp_path / "runs"
    other = make_run(home / "tiny")
    lines = (ready / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(lines.replace('"test/top1": ', '"test/top1": 9'))
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.warns(UserWarning, match="output="):
        recipe = load_fetched(PushedRun(address).recipe(), [f"output={home}"])
    assert choose_folder(recipe, PushedRun(address)) == home / "tiny-2"
    PushedRun(address).fetch(home / "tiny-2")
    assert choose_folder(recipe, PushedRun(address)) == home / "tiny-2"  # known again, by its log
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_no_checkpoint_to_go_on_from(tmp_path):
    pushed(tmp_path, strategy="end")
    with raises("hub.not_found", REPO, "hub.strategy", kind=HubError):
        PushedRun(f"hf://{REPO}").fetch(tmp_path / "there")
    with raises("hub.id", "'rescom'", kind=HubError):
        PushedRun("rescom").fetch(tmp_path / "there")
    with raises("hub.not_found", "me/nothing", kind=HubError):
        PushedRun("hf://me/nothing").fetch(tmp_path / "there")


@pytest.mark.slow
def test_only_the_newest_checkpoints_stay_unless_all_are_wanted(tmp_path):
    names = {}
    for strategy in ("checkpoint", "all_checkpoints"):
        SERVER.repos.clear()
        run = make_run(tmp_path / strategy, steps=(4, 6), best=None)
        for step in (4, 6):
            stage_all(run, strategy, best=None, newest=f"step-{step:08d}", end=False)
            push(run)
        files = SERVER.repos[REPO].files
        names[strategy] = sorted({name.split("/")[1] for name in files if name.startswith("checkpoints/")})
        assert json.loads(files["rescom.json"])["checkpoint"] == "step-00000006"
    assert names == {
        "checkpoint": ["step-00000006"],
        "all_checkpoints": ["step-00000004", "step-00000006"],
    }


@pytest.mark.parametrize(("strategy", "kept"), [("checkpoint", [6]), ("all_checkpoints", [4, 6])])
@pytest.mark.slow
def test_of_several_that_wait_the_newest_is_pushed_or_all_are(tmp_path, strategy, kept):
    run = make_run(tmp_path / "run", steps=(4, 6), best=None)
    for step in (4, 6):
        stage_all(run, strategy, best=None, newest=f"step-{step:08d}", end=False)
    push(run)
    repo = SERVER.repos[REPO]
    assert [json.loads(files["rescom.json"])["checkpoint"] for _, files in repo.commits[1:]] == [
        f"step-{step:08d}" for step in kept
    ]
    assert {name.split("/")[1] for name in repo.files if name.startswith("checkpoints/")} == {
        f"step-{step:08d}" for step in kept
    }
    assert not staged(run)


# ------------------------------------------------------------------------------------------------------ what goes wrong


ANY = r"(GET|POST) "


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST /api/repos/create", 500),
        Fault("POST /api/models/.*/preupload", 503),
        Fault("POST .*/objects/batch", 500),
        Fault("PUT /lfs/", 500),
        Fault("PUT /lfs/", "cut"),
        Fault("PUT /lfs/", "slow", times=2),
        Fault("POST .*/commit/main", 500, times=2),
        Fault("POST .*/commit/main", 409),
        Fault("POST .*/commit/main", "cut"),
        Fault("POST .*/commit/main", 429),
        Fault("GET /api/models", 502),
    ],
    ids=lambda fault: f"{fault.where} {fault.what}",
)
def test_passing_trouble_is_overcome(ready, fault):
    SERVER.faults.append(fault)
    assert "url" in push(ready, pause=0.01)
    assert fault.times == 0 and arrived()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("POST /api/repos/create", 401, 99), "hub.token"),
        (Fault("POST .*/preupload", 401, 99), "hub.token"),
        (Fault("POST .*/preupload", 403, 99), "hub.token"),
        (Fault("POST .*/preupload", 404, 99), "hub.not_found"),
        (Fault("POST .*/commit/main", 500, 99), "hub.busy"),
        (Fault("POST .*/commit/main", 409, 99), "hub.busy"),
        (Fault("PUT /lfs/", "cut", 999), "hub.unreachable"),
        (Fault("POST .*/commit/main", 413, 99), "hub.refused"),
    ],
    ids=lambda value: f"{value.where} {value.what}" if isinstance(value, Fault) else "",
)
def test_lasting_trouble_is_reported_and_completed_later(ready, fault, code):
    run = ready
    SERVER.faults.append(fault)
    with raises(code, REPO, kind=HubError) as caught:
        push(run, attempts=2, pause=0.01)
    assert status(run) == {"error": str(caught.value)} and len(staged(run)) == 1
    assert set(getattr(SERVER.repos.get(REPO), "files", {})) <= {".gitattributes"}
    SERVER.faults.clear()
    assert tool.main([str(run)]) == 0
    assert "url" in status(run) and not staged(run) and arrived()


def test_tokens_that_may_not(ready, monkeypatch):
    run = ready
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with raises("hub.token", 403, kind=HubError):
        push(run)
    monkeypatch.setenv("HF_TOKEN", "hf_Expired")
    with raises("hub.token", 401, kind=HubError):
        push(run)
    monkeypatch.delenv("HF_TOKEN")
    with raises("hub.token", "HF_TOKEN", kind=HubError):
        push(run)
    assert REPO not in SERVER.repos and staged(run)


def test_a_name_that_is_taken(ready):
    theirs = SERVER.add(REPO, {"model.safetensors": b"another", "config.json": b"{}"})
    run = ready
    with raises("hub.occupied", kind=HubError):
        push(run)
    assert len(theirs.commits) == 1
    SERVER.repos.clear()
    SERVER.add(REPO, {".gitattributes": b"", "README.md": b"# Mine\n\nHands off.\n"}, private=False)
    push(run)
    assert SERVER.repos[REPO].private is False, "an existing repository stays public or private as it was"
    assert "# Mine\n\nHands off.\n" in SERVER.repos[REPO].files["README.md"].decode()


def test_offline(ready, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with raises("hub.unreachable", "HF_HUB_OFFLINE", kind=HubError):
        push(ready)
    with raises("hub.unreachable", "HF_HUB_OFFLINE", kind=FileNotFoundError):
        from_pretrained(REPO)


def test_no_network(ready, monkeypatch):
    run = ready
    monkeypatch.setattr("rescom_timm.hub.push.HfApi", lambda **_: huggingface_hub.HfApi(endpoint="http://127.0.0.1:9"))
    with raises("hub.unreachable", REPO, kind=HubError):
        push(run, attempts=2, pause=0.01)
    assert staged(run)


def test_what_was_read_once_is_read_without_a_network(ready):
    run = ready
    push(run)
    from_pretrained(REPO)
    SERVER.faults.append(Fault("", 503, 999))
    assert same_net(from_pretrained(REPO).net, from_pretrained(run).net)


@pytest.mark.parametrize("name", ["model.safetensors", "rescom.safetensors"])
def test_a_download_that_arrives_damaged(ready, name):
    run = ready
    push(run)
    SERVER.faults.append(Fault(f"GET /{REPO}/resolve/.*/{name}", "corrupt", 1))
    assert same_net(from_pretrained(REPO).net, from_pretrained(run).net), "fetched once more"
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    SERVER.faults.append(Fault(f"GET /{REPO}/resolve/.*/{name}", "corrupt", 9))
    with raises("model.damaged", name):
        from_pretrained(REPO)


def test_a_checkpoint_that_arrives_damaged(ready, tmp_path):
    push(ready)
    SERVER.faults.append(Fault(f"GET /{REPO}/resolve/.*/state.safetensors", "corrupt", 1))
    PushedRun(f"hf://{REPO}").fetch(tmp_path / "there")
    checkpoint.load(tmp_path / "there" / "checkpoints" / "step-00000004")
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    SERVER.faults.append(Fault(f"GET /{REPO}/resolve/.*/state.safetensors", "corrupt", 9))
    with raises("hub.damaged", REPO, kind=HubError):
        PushedRun(f"hf://{REPO}").fetch(tmp_path / "elsewhere")
    assert not checkpoint.listed(tmp_path / "elsewhere" / "checkpoints")


@pytest.mark.slow
def test_a_download_that_is_cut(ready):
    run = ready
    push(run)
    SERVER.faults.append(Fault(f"GET /{REPO}/resolve/.*/model.safetensors", "cut", 1))
    assert same_net(from_pretrained(REPO).net, from_pretrained(run).net)


def test_repositories_that_cannot_be_read(ready, monkeypatch):
    with raises("hub.not_found", "me/nothing", kind=FileNotFoundError):
        from_pretrained("me/nothing")
    SERVER.add("them/other", {"model.safetensors": b"x", "config.json": b"{}"})
    with raises("model.missing", "them/other"):
        from_pretrained("them/other")
    push(ready)
    with raises("hub.not_found", REPO, kind=FileNotFoundError):
        from_pretrained(f"{REPO}@v9")
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    with raises("hub.not_found", REPO, kind=FileNotFoundError):
        from_pretrained(REPO)


# ----------------------------------------------------------------------------- answers that are none, files that lie

PAGE = b"<html><body>Please log in to this network</body></html>"
ANSWERS = {
    "page": Fault("", "body", body=PAGE, headers={"Content-Type": "text/html"}),
    "object": Fault("", "body", body=b"{}"),
    "null": Fault("", "body", body=b"null"),
    "deep": Fault("", "body", body=b"[" * 50_000),
    "sha": Fault("", "body", body=b'{"sha": "../../x", "id": 3, "siblings": 4}'),
    "torn": Fault("", "torn"),
    "longer": Fault("", "longer"),
    "shorter": Fault("", "shorter"),
    "huge": Fault("", "huge"),
    "elsewhere": Fault("", "redirect", headers={"Location": "http://127.0.0.1:9/x"}),
    "round": Fault("", "redirect", headers={"Location": "/api/models/me/rescom-tiny"}),
    "server": Fault("", 500),
}
"""What a proxy, a mirror or a stranger in between may answer."""
ROUTES = (".*/api/models/[^/]+/[^/]+(/revision/[^/]+)?$", ".*/tree/", ".*/resolve/")


def read_all(tmp_path):
    """Everything that is read of a repository: (net, recipe, checkpoint)."""
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE, ignore_errors=True)
    shutil.rmtree(tmp_path / "there", ignore_errors=True)
    (tmp_path / "there").mkdir()
    found, said = [], []
    for read in (
        lambda: from_pretrained(REPO).net.state_dict(),
        lambda: {"recipe": PushedRun(f"hf://{REPO}").recipe().read_bytes()},
        lambda: (
            PushedRun(f"hf://{REPO}").fetch(tmp_path / "there")
            or checkpoint.load(tmp_path / "there" / "checkpoints" / "step-00000004")[0]
        ),
    ):
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                value = read()
            found.append(None if any("may not be what was pushed" in str(one.message) for one in told) else value)
        except (FileNotFoundError, ValueError, HubError) as error:
            said.append(str(error))
            found.append(None)
    assert all(text.strip() and TOKEN not in text for text in said)
    return found


def equal(one, other):
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize("route", ROUTES, ids=["info", "tree", "file"])
@pytest.mark.slow
def test_an_answer_that_is_none_is_an_error_in_words(ready, tmp_path, route):
    push(ready)
    right = read_all(tmp_path)
    assert None not in right
    for name, answer in ANSWERS.items():
        SERVER.faults[:] = [replace(answer, where=f"(GET|HEAD) {route}", times=999)]
        for found, expected in zip(read_all(tmp_path), right, strict=True):
            if found is not None:
                assert found.keys() == expected.keys(), name
                assert all(equal(found[key], expected[key]) for key in found), name


def test_a_token_is_not_sent_to_where_an_answer_points(ready):
    push(ready)
    port = SERVER.url.rpartition(":")[2]
    SERVER.headers.clear()
    SERVER.faults.append(
        Fault(f"GET /{REPO}/resolve/.*", "redirect", 9, headers={"Location": f"http://localhost:{port}/stolen"})
    )
    with pytest.raises((FileNotFoundError, ValueError)):
        from_pretrained(REPO)
    there = [headers for headers in SERVER.headers if headers["Host"].startswith("localhost")]
    assert there and not any("Authorization" in headers or "authorization" in headers for headers in there)


@pytest.mark.slow
def test_names_in_a_repository_lead_nowhere_else(tmp_path):
    run, _ = pushed(tmp_path)
    repo, evil = SERVER.repos[REPO], b"evil"
    step = "checkpoints/step-00000004"
    names = [f"{step}/../../../evil", f"{step}/more/evil", "checkpoints/step-../evil", f"{step}x/hashes.json"]
    names += ["../../../evil", "/evil", "evaluation/../../evil"]
    repo.commit({**repo.files, **dict.fromkeys(names, evil)}, "by a stranger")
    before = {path for path in tmp_path.rglob("*") if "there" not in path.parts}
    found = read_all(tmp_path)
    assert same_net(from_pretrained(REPO).net, from_pretrained(run).net) and found[2] is not None
    assert not [path for path in tmp_path.rglob("*") if path.name == "evil"]
    assert {path for path in tmp_path.rglob("*") if "there" not in path.parts} == before
    assert sorted(path.name for path in (tmp_path / "there" / "checkpoints" / "step-00000004").iterdir()) == sorted(
        [*checkpoint.FILES, "hashes.json"]
    )


def test_a_file_of_any_size_is_not_fetched(ready, monkeypatch):
    push(ready)
    repo = SERVER.repos[REPO]
    repo.commit({**repo.files, "recipe.yaml": b"#" * (MAX_RECIPE + 1)}, "large")
    for read in (lambda: from_pretrained(REPO), lambda: PushedRun(f"hf://{REPO}").recipe()):
        with raises("hub.size", "recipe.yaml", "1 MiB"):
            read()
    assert not [request for request in SERVER.requests if request.startswith(f"GET /{REPO}/resolve")]
    repo.commit({**repo.files, "recipe.yaml": b""}, "small")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with raises("hub.size", REPO):
        from_pretrained(REPO)


# --------------------------------------------------------------------------------------------------- cards and secrets


def test_what_a_person_wrote_on_the_card_stays(tmp_path):
    run, _ = pushed(tmp_path)
    repo = SERVER.repos[REPO]
    text = repo.files["README.md"].decode()
    edited = text.replace("# rescom-tiny\n", "# My model\n\nRead this first.\n").replace("tags:\n", "tags:\n- birds\n")
    repo.commit({**repo.files, "README.md": edited.encode()}, "by a person")
    add_evaluation(run, "test-last", 61.5)
    stage_all(run)
    push(run)
    after = repo.files["README.md"].decode()
    assert "Read this first." in after and "- birds" in after and "| 61.50 |" in after and "| 61.50 |" not in text


def test_an_edit_during_the_push_is_not_lost(tmp_path, monkeypatch):
    run, _ = pushed(tmp_path)
    repo = SERVER.repos[REPO]
    add_evaluation(run, "test-last", 61.5)
    stage_all(run)
    edits = []

    def edit_first(*words, **named):
        if not edits:
            edits.append(repo.commit({**repo.files, "README.md": b"# Edited now\n"}, "by a person"))
        return create(*words, **named)

    create = huggingface_hub.HfApi.create_commit
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", edit_first)
    push(run, pause=0.01)
    assert "# Edited now" in repo.files["README.md"].decode()


def test_the_hub_understands_the_results(tmp_path):
    run = make_run(tmp_path / "run")
    add_evaluation(run, "test-last", 61.5)
    stage_all(run, benchmark="someone/birds#default")
    push(run)
    files = SERVER.repos[REPO].files
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["top-1 (last)"] == 61.5 and results["few (last)"] == 21.5
    (entry,) = huggingface_hub.parse_eval_result_entries(yaml.safe_load(files[".eval_results/rescom_timm.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("someone/birds", "default", 61.5)


def test_no_token_and_no_home_leaves_this_machine(tmp_path, monkeypatch):
    run, _ = pushed(tmp_path)
    everything = {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    everything |= SERVER.repos[REPO].files
    assert len(everything) > 20
    for name, content in everything.items():
        assert TOKEN.encode() not in content, name
    private = HOME.as_posix().encode()
    assert private in (run / "environment.json").read_bytes()
    for name in ("environment.json", "recipe.yaml"):
        assert b"~/photos/r" in SERVER.repos[REPO].files[name]
    assert not [name for name, content in SERVER.repos[REPO].files.items() if private in content]
    environment = json.loads((run / "environment.json").read_text())
    environment["command"] += f" --token {TOKEN}"
    (run / "environment.json").write_text(json.dumps(environment))
    stage_all(run)
    commits = len(SERVER.repos[REPO].commits)
    with raises("hub.secret", kind=HubError) as caught:
        push(run)
    assert TOKEN not in str(caught.value) and len(SERVER.repos[REPO].commits) == commits


def test_a_token_in_a_recipe_is_refused(tmp_path):
    run = make_run(tmp_path / "run", output=f"/data/{TOKEN}/runs")
    stage_all(run, "end")
    with raises("hub.secret", "recipe.yaml", kind=HubError):
        push(run)
    assert TOKEN.encode() not in b"".join(SERVER.repos[REPO].files.values())


# ---------------------------------------------------------------------------------------------------------- background


class Here:
    """Stands in for the process: the push happens at once, in this one, or not before `busy` ends."""

    busy = False

    def __init__(self, words, **_):
        self.run = Path(words[-1])
        if not self.busy:
            self.work()

    def work(self):
        with suppress(HubError):
            push(self.run, attempts=1)

    def poll(self):
        return None if self.busy else 0

    def wait(self, seconds):
        self.busy = False
        self.work()


def train(run, config, bests):
    """The calls of a training of three checkpoints and its end; returns what each commit exports."""
    pusher = Pusher(config, run)
    for step, best in zip((2, 4, 6), bests, strict=True):
        pusher.saved(f"step-{step:08d}", f"step-{best:08d}" if best else None)
    pusher.finished("step-00000006", f"step-{bests[-1]:08d}" if bests[-1] else None)
    pusher.wait()
    repo = SERVER.repos.get(REPO)
    return [json.loads(files["rescom.json"])["checkpoint"] for _, files in repo.commits[1:]] if repo else []


@pytest.mark.parametrize(
    ("strategy", "exported"),
    [
        ("end", [4]),
        ("best", [2, 4]),
        ("checkpoint", [2, 4, 6, 4]),
        ("all_checkpoints", [2, 4, 6, 4]),
    ],
)
@pytest.mark.slow
def test_strategies(tmp_path, monkeypatch, strategy, exported):
    monkeypatch.setattr(staging.subprocess, "Popen", Here)
    run = make_run(tmp_path / "run", steps=(2, 4, 6), best=(2, 4, 4))
    found = train(run, HubConfig(repo=REPO, strategy=strategy), (2, 4, 4))
    # The best one is pushed again at the end, where some versions of the client make an empty commit.
    assert [name for name, _ in itertools.groupby(found)] == [f"step-{step:08d}" for step in exported]
    assert not staged(run)
    assert train(run, HubConfig(), (2, 4, 4)) == found, "without a repository nothing more is pushed"


def test_while_one_is_under_way_the_newest_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(Here, "busy", True)
    monkeypatch.setattr(staging.subprocess, "Popen", Here)
    run = make_run(tmp_path / "run", steps=(2, 4, 6), best=None)
    assert train(run, HubConfig(repo=REPO, strategy="every_save"), (None, None, None)) == ["step-00000006"]


def test_training_survives_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(staging.subprocess, "Popen", Here)
    run = make_run(tmp_path / "run", steps=(2, 4, 6), best=None)
    SERVER.faults.append(Fault("", 403, 9999))
    train(run, HubConfig(repo=REPO, strategy="every_save"), (None, None, None))
    told = capsys.readouterr().err
    assert "403" in told and "rescom-timm push" in told and len(staged(run)) == 1

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging.os, "link", full)
    monkeypatch.setattr(staging.shutil, "copy2", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        Pusher(HubConfig(repo=REPO, strategy="every_save"), run).saved("step-00000002", None)


def test_a_push_that_is_killed_is_told_and_tried_once_more(ready, monkeypatch, capsys):
    class Killed(Here):
        def work(self):
            if "times" not in vars(Killed):
                Killed.times = 1
            else:
                push(self.run)

    monkeypatch.setattr(staging.subprocess, "Popen", Killed)
    pusher = Pusher(HubConfig(repo=REPO), ready)
    pusher.finished("step-00000004", "step-00000002")
    pusher._print_status()
    assert "push.log" in capsys.readouterr().out
    pusher.wait()
    assert "pushed step-00000004-end" in capsys.readouterr().out and arrived()


@pytest.mark.slow
def test_what_is_staged_is_what_is_pushed(tmp_path):
    run = make_run(tmp_path / "run")
    weights = from_pretrained(run).net
    stage_all(run)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text("")
    push(run)
    assert same_net(from_pretrained(REPO).net, weights)
    assert SERVER.repos[REPO].files["metrics.jsonl"]


@pytest.mark.slow
def test_a_real_process(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    pusher = Pusher(HubConfig(repo=REPO, strategy="checkpoint"), run)
    pusher.saved("step-00000004", "step-00000002")
    with raises("hub.busy", run, kind=HubError):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and pusher.process.poll() is None:
            if (run / "hub" / ".lock").exists():
                push(run)
    pusher.wait()
    assert "pushed step-00000004" in capsys.readouterr().out
    assert same_net(from_pretrained(REPO).net, from_pretrained(run).net) is False, "the newest, not the best"
    log = (run / "hub" / "push.log").read_text()
    assert SERVER.url in log and TOKEN not in log


@pytest.mark.slow
def test_a_space_shows_what_was_pushed(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert tool.main([str(run), "--repo", REPO, "--space", "me/rescom-demo"]) == 0
    assert "pushed: " in capsys.readouterr().out
    files = SERVER.repos["spaces/me/rescom-demo"].files
    assert set(files) == {".gitattributes", "app.py", "requirements.txt", "README.md"}
    assert SERVER.repos["spaces/me/rescom-demo"].private
    compile(files["app.py"], "app.py", "exec")
    assert f'page("{REPO}").launch(max_file_size=' in files["app.py"].decode()
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", [REPO])
    assert files["requirements.txt"] == b"rescom-timm[demo]\n"
    assert push_space("me/rescom-demo", REPO), "the same again"
    SERVER.repos["spaces/me/rescom-demo"].files["other.py"] = b""
    with raises("hub.occupied", kind=HubError):
        push_space("me/rescom-demo", REPO)
    with raises("hub.token", 403, kind=HubError):
        push_space("another/demo", REPO)
    with raises("hub.id", "'demo'", kind=HubError):
        push_space("demo", REPO)


@pytest.mark.slow
def test_the_tool(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert tool.main([str(run)]) == 1 and "--repo owner/name" in capsys.readouterr().err
    assert tool.main([str(run), "--repo", "rescom"]) == 1 and "owner/name" in capsys.readouterr().err
    assert tool.main([str(run), "--repo", REPO, "hub.license=mit", "hub.strategy=checkpoint"]) == 0
    assert "license: mit" in SERVER.repos[REPO].files["README.md"].decode()
    assert "checkpoints/step-00000004/state.json" in SERVER.repos[REPO].files
    assert export_command.main([str(run), "-o", str(tmp_path / "out")]) == 0
    assert same_net(from_pretrained(tmp_path / "out").net, from_pretrained(run).net)
    assert (tmp_path / "out" / "README.md").is_file() and not staged(run)
    assert tool.main([str(tmp_path / "nothing"), "--repo", REPO]) == 1


def test_places_lt_from_an_empty_folder_to_the_hub(tmp_path, monkeypatch):
    """README's four commands, with small archives, a small net and its weights in a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESCOM_DATA", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    torch.save(timm.create_model("test_resnet").state_dict(), "imagenet.pth")
    small = [
        "net.backbone=test_resnet", "net.weights_file=imagenet.pth", "net.projector.dim=8", "method.negatives=1",
        "views.train=random_resized_crop(32) | flip | jitter(0.4,0.4,0.4,0)", "views.eval=resize(36) | center_crop(32)",
        "train.epochs=2", "train.batch_size=2", "train.precision=no", "schedule.warmup_epochs=1", "speed.workers=0",
    ]  # fmt: skip
    with served(monkeypatch):
        assert main(["get", "places_lt", "--yes"]) == 0
    assert main(["train", "places_lt_r152", *small]) == 0
    assert main(["evaluate", "runs/places_lt_r152"]) == 0
    assert main(["push", "runs/places_lt_r152", "--repo", REPO]) == 0
    assert json.loads(Path("runs/places_lt_r152/classes.json").read_text())["counts"] == [2, 1]
    assert same_net(from_pretrained(REPO).net, from_pretrained("runs/places_lt_r152").net)

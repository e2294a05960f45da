"""Uploads the staged folders of RUN/hub/ (hub/staging.py) in a separate process.

    python -m rescom_timm.hub.push RUN

Each staged folder becomes one commit: the export, the model card, the evaluations and, by the strategy, checkpoints.
It is removed after the commit; on failure it stays for the next attempt.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from rescom_timm.config.recipe import HubConfig
from rescom_timm.config.secrets import secret_in, without_home
from rescom_timm.engine import checkpoint
from rescom_timm.engine.build import Weights
from rescom_timm.engine.errors import CheckpointError
from rescom_timm.engine.run_folder import FOLDERS, class_names, run_recipe
from rescom_timm.errors import InputError, MissingFileError, UnreachableError, code_of
from rescom_timm.hub import card
from rescom_timm.hub.staging import NO_RULE, Request, Rule, stage, staged, status
from rescom_timm.hub_client import online
from rescom_timm.hub_download import HubError, explain, no_token
from rescom_timm.inference.export import DETAILS, export_run
from rescom_timm.inference.rules import read_costs
from rescom_timm.io import atomic_path, errors_named, file_lock, read_json, refuse_links, write_json, write_text
from rescom_timm.text import escape_output

OWN = (".gitattributes", "README.md", "LICENSE")
"""Files that a repository without a run may hold."""


def push(run: str | Path, attempts: int = 5, pause: float = 2.0) -> dict[str, str]:
    """Upload all staged folders, each in up to `attempts` attempts with pauses of 1, 2, 4 ... times `pause` seconds.

    Returns the status of the last push: {"what", "url"}, or {} if nothing was staged. If a push fails, raises HubError
    and writes it into RUN/hub/status.json; the staged folder stays.
    """
    run = Path(run)
    last: dict[str, str] = {}
    try:
        with file_lock(run / "hub" / ".lock", timeout=0):
            while waiting := staged(run):
                folder = waiting[0]
                if len(waiting) > 1 and not _request(folder)["keep"]:
                    shutil.rmtree(folder)  # a newer one replaces it
                    continue
                last = _attempt(folder, attempts, pause)
                _write_status(run, last)
                shutil.rmtree(folder)
    except Timeout:
        message = f"another push of {run} is running; see {run / 'hub' / 'push.log'}"
        raise HubError("hub.busy", message, lasting=False) from None
    except HubError as error:
        _write_status(run, {"error": str(error)})
        raise
    return last


def kept_rule(run: Path, recall: Mapping[str, float] | None, costs: str | Path | None) -> Rule:
    """Recall and costs (a file) as export_run takes them. Raises as read_costs does."""
    rule = Rule(recall=dict(recall)) if recall else Rule()
    if costs:
        rule["costs"] = read_costs(costs, class_names(run) or []).record()
    return rule


def push_run(run: Path, overrides: Sequence[str] = (), rule: Rule = NO_RULE) -> str:
    """Push what is staged in RUN/hub/, or else the run as it is; returns the commit's address.

    With overrides or a rule, always the run as it is. overrides: key=value arguments of the hub section. rule: of
    kept_rule. Raises HubError, and as stage_now and build do.
    """
    refuse_links(run, FOLDERS)
    config = run_recipe(run, overrides).hub
    for folder in staged(run):
        if config.repo is not None and (repo := _request(folder)["repo"]) != config.repo:
            raise HubError(
                "hub.occupied",
                f"{folder} is staged for {repo}, not for {config.repo}: remove that folder, or give --repo {repo}",
            )
    if overrides or rule or not staged(run):
        if config.repo is None:
            raise HubError("hub.id", "the recipe names no hub.repo: give --repo owner/name")
        waiting = stage_now(run, config, rule)
        try:
            if rule:  # which may ask for what the run does not have
                build(waiting, _request(waiting))
        except BaseException:
            shutil.rmtree(waiting)
            raise
    return push(run)["url"]


def stage_now(run: Path, config: HubConfig, rule: Rule = NO_RULE) -> Path:
    """Stage the run as it is, with a rule (`kept_rule`); replaces an earlier staging of the same checkpoint.

    Raises MissingFileError (checkpoint.missing) if there is no checkpoint.
    """

    def read() -> Path:
        newest = checkpoint.newest(run / "checkpoints")
        if newest is None:
            raise MissingFileError("checkpoint.missing", f"{run} holds no checkpoint: name a run's folder")
        shutil.rmtree(run / "hub" / f"{newest[0].name}-end", ignore_errors=True)
        best = newest[2].get("progress", {}).get("best_checkpoint")
        return stage(run, config, newest[0].name, best, end=True, rule=rule)

    return checkpoint.whole_read(run / "checkpoints", read)


def export_push(
    run: Path, folder: Path, overrides: Sequence[str] = (), weights: Weights | None = None,
    rule: Rule = NO_RULE,
) -> Path:  # fmt: skip
    """Copy what would be pushed into a folder, without a network.

    weights: as in export_run. rule: of kept_rule. Raises as stage_now and build do, and InputError (file.exists) where
    the folder is a file, or holds other files than an export.
    """
    config = run_recipe(run, overrides).hub
    request = Request(
        repo=config.repo or f"owner/{run.resolve().name}", license=config.license, benchmark=config.benchmark,
        export="best", checkpoints=False, weights=weights, **rule,
    )  # fmt: skip
    waiting = stage_now(run, config, rule)
    try:
        files = build(waiting, request)
        _refuse_other_files(folder, files)
        for name, path in files.items():
            with errors_named(folder / name), atomic_path(folder / name) as beside:
                shutil.copyfile(path, beside)
    finally:
        shutil.rmtree(waiting)
    return folder


def _refuse_other_files(folder: Path, export: Collection[str]) -> None:
    """Raises InputError (file.exists) for a file, or a folder of what is neither an export's nor a repository's."""
    if not folder.exists() or (folder / DETAILS).is_file():
        return
    if not folder.is_dir():
        raise InputError("file.exists", f"{folder} is a file: name a new folder for the export")
    own = {*OWN, *(Path(name).parts[0] for name in export)}
    if other := sorted(each.name for each in folder.iterdir() if each.name[0] != "." and each.name not in own):
        what = f"{', '.join(other[:3])}{' ...' if len(other) > 3 else ''}"
        raise InputError("file.exists", f"{folder} holds other files ({what}): name a new folder for the export")


def _request(folder: Path) -> Request:
    """The content of a staged folder's push.json. Raises HubError (file.format)."""
    try:
        request: Request = read_json(folder / "push.json")
        HubConfig(request["repo"], private=bool(request["private"]))
        if missing := {"keep", "export", "checkpoints"} - request.keys():
            raise KeyError(min(missing))
        return request
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        message = f"{folder / 'push.json'} cannot be read ({reason}): remove {folder}, then push again"
        raise HubError("file.format", message) from error


def _attempt(folder: Path, attempts: int, pause: float) -> dict[str, str]:
    request = _request(folder)
    for attempt in range(1, attempts + 1):
        try:
            with online():
                return {"what": folder.name, "url": _upload(folder, request)}
        except (HubError, CheckpointError) as error:
            raise HubError(error.code, str(error)) from error
        except Exception as error:  # any other error is explained, and the staged folder stays
            failure = explain(error, request["repo"])
            if isinstance(error, UnreachableError):
                raise failure from error
        print(f"{time.strftime('%H:%M:%S')} {failure} (attempt {attempt} of {attempts})", flush=True)
        if failure.lasting or attempt == attempts:
            raise failure
        time.sleep(pause * 2 ** (attempt - 1))
    raise AssertionError


def _write_status(run: Path, values: dict[str, str]) -> None:
    write_json(run / "hub" / "status.json", values)


def _upload(stage: Path, request: Request) -> str:
    """One commit of a staged folder; returns its address. Raises what the Hub's client raises, and HubError."""
    repo, api = request["repo"], HfApi(library_name="rescom_timm")
    if not get_token():
        raise no_token(f"pushing to {repo} failed")
    api.create_repo(repo, private=request["private"], exist_ok=True)
    head = api.model_info(repo).sha
    there = api.list_repo_files(repo, revision=head)
    if DETAILS not in there and (foreign := [name for name in there if name not in OWN]):
        raise HubError(
            "hub.occupied",
            f"{repo} holds other files ({', '.join(foreign[:3])}), which are not overwritten: name another repository "
            "(hub.repo), or empty this one",
        )
    readme = None
    if "README.md" in there:
        readme = Path(api.hf_hub_download(repo, "README.md", revision=head)).read_text(encoding="utf-8")
    files = build(stage, request, readme)
    _refuse_secrets(files)
    operations: list[Any] = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    if not request["keep"]:
        gone = [name for name in there if name.startswith("checkpoints/") and name not in files]
        operations += [CommitOperationDelete(name) for name in gone]
    message = f"rescom_timm: {json.loads((stage / 'upload' / DETAILS).read_text())['checkpoint']}"
    return api.create_commit(repo, operations, commit_message=message, parent_commit=head).commit_url


def build(stage: Path, request: Request, readme: str | None = None) -> dict[str, Path]:
    """Export a staged folder (or a run's) into STAGE/upload and write its card.

    readme: the repository's present card. Returns the files to push: name in the repository -> file.
    """
    upload, refusal = stage / "upload", stage / "refusal.txt"
    if not (upload / "hashes.json").is_file():
        which, weights, rule = request["export"], request.get("weights"), (request.get("recall"), request.get("costs"))
        try:
            export_run(stage, upload, which, True, weights, *rule)
        except ValueError as error:
            write_text(refusal, str(error))
            export_run(stage, upload, which, False, weights, *rule)
    reason = refusal.read_text(encoding="utf-8") if refusal.is_file() else ""
    files = {path.name: path for path in upload.iterdir() if path.name != "README.md"}
    files |= {path.relative_to(stage).as_posix(): path for path in stage.glob("evaluation/*.json")}
    files |= {path.relative_to(stage).as_posix(): path for path in stage.glob("figures/*.png")}
    if (stage / "metrics.jsonl").is_file():
        files["metrics.jsonl"] = stage / "metrics.jsonl"
    if (stage / "environment.json").is_file():
        private = (stage / "environment.json").read_text(encoding="utf-8")
        files["environment.json"] = upload / "environment.json"
        write_text(files["environment.json"], without_home(private))
    if request["checkpoints"]:
        own = [path for name in (*checkpoint.FILES, "hashes.json") for path in stage.glob(f"checkpoints/*/{name}")]
        files |= {path.relative_to(stage).as_posix(): path for path in own}
    facts = card.read_facts(stage, upload, request["repo"], request["license"], reason)
    files["README.md"] = upload / "README.md"
    write_text(files["README.md"], card.write(facts, readme))
    if request["benchmark"] and (top1 := facts.accuracy()) is not None:
        notes = f"trained on {facts.train_name} with rescom_timm"
        path = _leaderboard(stage / "eval_results.yaml", request["benchmark"], top1, notes)
        files[".eval_results/rescom_timm.yaml"] = path
    return files


def _leaderboard(path: Path, benchmark: str, top1: float, notes: str) -> Path:
    """The test accuracy in the Hub's format of Benchmark data sets (.eval_results/*.yaml)."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml  # not in older clients

    dataset, task = benchmark.split("#")
    entry = EvalResultEntry(dataset_id=dataset, task_id=task, value=top1, notes=notes)
    write_text(path, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    return path


def _refuse_secrets(files: dict[str, Path]) -> None:
    """Raises HubError (hub.secret) if a text to push contains the token in use or another secret."""
    token = get_token() or ""
    for name, path in files.items():
        text = "" if path.suffix == ".safetensors" else path.read_bytes().decode("latin-1")
        if token and token in text:
            kind: str | None = "your Hub token"
        else:
            kind = None if path.suffix in (".safetensors", ".png") else secret_in(text)
        if kind:
            raise HubError("hub.secret", f"{name} contains {kind}: nothing is pushed; remove it, also from the recipe")


def main() -> int:
    """Push sys.argv[1] or print its last status; returns the exit code."""
    escape_output()
    try:
        print(push(sys.argv[1]) or status(Path(sys.argv[1])))
    except HubError as error:
        print(f"error[{code_of(error)}]: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

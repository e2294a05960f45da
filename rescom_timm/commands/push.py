"""Push a run to the Hub, or complete a push that failed:  rescom-timm push RUN [--repo owner/name] [key=value ...]

What the training left in RUN/hub/ is uploaded; where nothing is left, the run as it stands is. key=value changes the
recipe's hub section, such as hub.strategy=checkpoint or hub.license=apache-2.0. --export FOLDER only writes what would
be pushed, with its model card, and needs no network; --onnx FILE writes the classifier as ONNX.
The token comes from  hf auth login  or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rescom_timm.recipe.config import HubConfig
from rescom_timm.sharing.hub import HubError
from rescom_timm.sharing.onnx import export_onnx
from rescom_timm.sharing.push import build, push
from rescom_timm.sharing.staging import stage, staged
from rescom_timm.training import checkpoint
from rescom_timm.training.errors import CheckpointError
from rescom_timm.training.run_folder import run_recipe


def main(words: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the hub section, such as hub.private=false"
    )
    parser.add_argument("--repo", help="owner/name; the recipe's hub.repo by default")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write what would be pushed, and push nothing")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write the classifier as ONNX, and push nothing")
    arguments = parser.parse_intermixed_args(words)
    try:
        if arguments.onnx:
            print(export_onnx(arguments.run, arguments.onnx))
            return 0
        overrides = [*arguments.overrides, *([f"hub.repo={arguments.repo}"] if arguments.repo else [])]
        config = run_recipe(arguments.run, overrides).hub
        if arguments.export:
            return write(arguments.run, config, arguments.export)
        if overrides or not staged(arguments.run):
            if config.repo is None:
                raise HubError("the recipe names no hub.repo: give --repo owner/name")
            stage_now(arguments.run, config)
        print(f"pushed: {push(arguments.run)['url']}")
    except (HubError, CheckpointError, ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def stage_now(run: Path, config: HubConfig) -> Path:
    """Stage the run as it stands, in place of what was staged of the same checkpoint."""
    newest = checkpoint.newest(run / "checkpoints")
    if newest is None:
        raise FileNotFoundError(f"{run} holds no checkpoint: is it a run's folder?")
    shutil.rmtree(run / "hub" / f"{newest[0].name}-end", ignore_errors=True)
    return stage(run, config, newest[0].name, newest[2]["progress"].get("best_checkpoint"), end=True)


def write(run: Path, config: HubConfig, folder: Path) -> int:
    """Copy what would be pushed into a folder."""
    request = {**asdict(config), "repo": config.repo or f"owner/{run.resolve().name}", "export": "best"}
    waiting = stage_now(run, config)
    try:
        for name, path in build(waiting, {**request, "checkpoints": False}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    finally:
        shutil.rmtree(waiting)
    print(folder)
    return 0

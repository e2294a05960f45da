"""A Space of the Hub that shows a pushed model: the demo page with the model's address."""

from __future__ import annotations

import re

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token

from rescom_timm.hub_client import online, target
from rescom_timm.hub_download import HubError, explain, no_token

APP = '''"""The demo of {repo}. Written by  rescom-timm push --space."""

from rescom_timm.commands.demo import page

page("{repo}").launch(max_file_size="64mb")
'''
TEXT = """
# {title}

Drop images to classify them with [{repo}](https://huggingface.co/{repo}), with class frequencies as in training, equal,
or your own. If that model is private, give this Space a secret `HF_TOKEN` that may read it.
"""


def space_files(repo: str) -> dict[str, str]:
    """Name -> text. repo: owner/name of the model."""
    title = f"{repo.partition('/')[2]} demo"
    front = {"title": title, "sdk": "gradio", "app_file": "app.py", "models": [repo], "tags": ["rescom-timm"]}
    readme = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{TEXT.format(title=title, repo=repo)}"
    return {"app.py": APP.format(repo=repo), "requirements.txt": "rescom-timm[demo]\n", "README.md": readme}


def push_space(space: str, repo: str, private: bool = True) -> str:
    """Write a Space's files as one commit; returns the commit's address.

    space, repo: owner/name. Raises HubError, also for a Space that holds other files (hub.occupied).
    """
    space, repo = target(space), target(repo)
    for name in (space, repo):
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            raise HubError("hub.id", f"{name!r} is not a name on the Hub: write owner/name")
    if not get_token():
        raise no_token(f"pushing to {space} failed")
    files, api = space_files(repo), HfApi(library_name="rescom_timm")
    try:
        with online():
            api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
            there = set(api.list_repo_files(space, repo_type="space")) - {".gitattributes", *files}
            if there:
                message = f"the Space {space} holds other files ({sorted(there)[0]}): name another Space"
                raise HubError("hub.occupied", message)
            operations = [CommitOperationAdd(name, text.encode()) for name, text in files.items()]
            message = f"rescom_timm: the demo of {repo}"
            return str(api.create_commit(space, operations, commit_message=message, repo_type="space").commit_url)
    except HubError:
        raise
    except Exception as error:  # of the client and the network
        raise explain(error, space) from error

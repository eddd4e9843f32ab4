"""Uploads the model of a finished run to the hub: its files, card and results, in one commit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from simpo.errors import SimpoError, one_line, third_party
from simpo.runs import manifest

# A model's files, its card and results. A run's recipe, log, data and checkpoints are not uploaded.
_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
    "chat_template.jinja", "*processor_config.json", "README.md", "results.json", "LICENSE*",
)  # fmt: skip
_DENIED = (401, 403)


def files_to_push(folder: Path, include: Sequence[str] = ()) -> list[Path]:
    """List the model's files in ``folder`` and all files that match a pattern in ``include``, sorted."""
    if not folder.is_dir():
        raise SimpoError(f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise SimpoError(f"{folder}: contains no model; name the folder of a finished run")
    if (folder / manifest.FILE_NAME).is_file() and (fault := manifest.find_damage(folder)):
        raise SimpoError(f"{folder}: damaged ({fault}); rerun the command that made it, or restore the files")
    files = {path for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, name) for name in _FILES)}
    for pattern in include:
        if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise SimpoError(f"include: {pattern!r} does not name files inside {folder}")
        matching = {path for path in folder.glob(pattern) if path.is_file()}
        if not matching:
            raise SimpoError(f"include: {pattern!r} matches no file in {folder}")
        files |= matching
    adapter = folder / "adapter_config.json"
    base = _base_of(adapter) if adapter.is_file() else None
    if base and (Path(base).is_absolute() or Path(base).exists()):
        raise SimpoError(
            f"{adapter}: its base model is a local folder ({base}), which others cannot load; merge the adapter with "
            "simpo merge and push the result"
        )
    return sorted(files)


def _base_of(adapter: Path) -> str | None:
    """Return the base model named in an adapter's configuration; raises :class:`SimpoError` if it is unreadable."""
    with third_party(f"{adapter}: not a valid adapter configuration; restore the file, or train again"):
        settings = json.loads(adapter.read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path")
        if not isinstance(base, str | None):
            raise TypeError(f"base_model_name_or_path is {base!r}")
    return base


def check_target(repo: str) -> str:
    """Return the token to use for ``repo``; raises :class:`SimpoError` if there is none or the name is invalid."""
    with third_party(f"{repo!r} is not a repository id such as name/model"):
        validate_repo_id(repo)
    token = get_token()
    if token is None:
        raise SimpoError("no token for the hub; set HF_TOKEN, or run 'hf auth login'")
    return token


def push(
    folder: Path,
    repo: str,
    files: Sequence[Path],
    *,
    private: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Upload ``files`` from ``folder`` in one commit, so that the repository gets all of them or none.

    Large files are uploaded before the commit, one by one, and the hub keeps them: after an interruption, the same call
    uploads only what is missing. Without changes there is no commit. Returns the URL of the repository.
    """
    api = HfApi(token=check_target(repo))
    with _hub_errors(repo):
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise SimpoError(
                f"{repo}: private: this repository already exists and is public; nothing was uploaded. Make it private "
                "on the hub, choose another name, or leave private out"
            )
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        for number, operation in enumerate(operations, start=1):
            api.preupload_lfs_files(url.repo_id, additions=[operation], free_memory=False)
            report(f"{number} of {len(files)}: {operation.path_in_repo}")
        api.create_commit(url.repo_id, operations, commit_message=f"Upload {folder.resolve().name}")
    return str(url)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in _DENIED:
            raise SimpoError(
                f"{repo}: the token has no write access ({status}); nothing was committed. Use a token with write "
                "access, or choose another repository"
            ) from error
        raise SimpoError(f"{repo}: {one_line(error)}; nothing was committed, rerun the command to continue") from error
    except (OSError, RuntimeError, httpx.HTTPError, OfflineModeIsEnabled) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise SimpoError(
            f"{repo}: the upload was interrupted ({one_line(cause)}); nothing was committed, rerun the command to "
            "continue"
        ) from error

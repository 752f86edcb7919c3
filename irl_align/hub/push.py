"""Push a reward, a policy or pairs of a run to the Hub, in one commit."""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from irl_align.errors import UserError
from irl_align.hub.export import Exported, export
from irl_align.hub.facts import UNKNOWN, Licence
from irl_align.utils.files import files_of, locked

logger = logging.getLogger(__name__)
TRIES = 4
"""Tries of a step when the server or the connection fails."""
WAIT = 2.0
"""Seconds before the second try; twice as long before each further one."""
RETRIED = (408, 429, 500, 502, 503, 504)
# Files of an earlier push that this push may not have: other shards, other iterations.
STALE = re.compile(r"(model.*\.safetensors(\.index\.json)?|(pairs|samples)/[^/]+\.parquet)")
NO_MODEL = "no known model"
NO_RIGHT = "push: the token may not write to {repo}; use one with the right to write there"
RESUMES = "the same command resumes"
Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Target:
    """Where to push."""

    repo: str
    """user/name, org/name, or name alone for the token's own user."""
    revision: str | None = None
    """Branch, which is created if it is missing; None is the main branch."""
    private: bool = False
    """Create a new repository as private; refuse an existing public one."""
    force: bool = False
    """Overwrite a repository of another model family or of another origin."""


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    url: str
    commit: str
    changed: bool
    """Whether the push made a new commit."""


def push(
    run: Path, what: str, target: Target, iteration: int | None = None, licence: str | None = None
) -> Pushed:
    """Export a run's reward, policy or pairs and commit it to a Hub repository.

    The token is that of huggingface_hub (HF_TOKEN, or `hf auth login`). An interrupted push can be
    repeated: files that were uploaded are not uploaded again. A reward or policy is tagged
    iteration-K. Raises UserError: no token or a wrong one, no rights, no licence, a repository with
    another kind of model, or a server or connection that still fails after TRIES tries.
    """
    check_repo_name(target.repo)
    token = get_token()
    if token is None:
        raise UserError("push: found no Hub token; set HF_TOKEN, or log in with `hf auth login`")
    with hub_errors(target.repo):
        api = HfApi(token=token)
        user = str(retried(api.whoami)["name"])  # checks the token too
        repo = target.repo if "/" in target.repo else f"{user}/{target.repo}"
        with temporary_export(run, what, iteration, licence) as exported:
            require_licence(exported.licence, target.private)
            return _Push(api, repo, target, exported).run()


@contextmanager
def temporary_export(
    run: Path, what: str, iteration: int | None, licence: str | None
) -> Iterator[Exported]:
    """An export in the run's folder, which is deleted afterwards; one push of a run at a time."""

    def refuse(holder: str) -> None:
        raise UserError(f"push: {run} is being pushed by {holder}: wait for it, or stop it")

    if not run.is_dir():
        raise UserError(f"{run}: found no such folder, expected the folder of a run")
    folder = run / ".push"
    with locked(run / ".push.lock", refuse):
        shutil.rmtree(folder, ignore_errors=True)  # left over from a push that was killed
        try:
            yield export(run, what, folder, iteration, licence)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def require_licence(licence: Licence, private: bool) -> None:
    """Raise UserError where the licence is unknown: a publication must say how it may be used.

    In a private repository only that of the demonstrations must be known.
    """
    if licence.name == UNKNOWN and not (private and licence.data):
        raise UserError(
            f"licence: {licence.why}; give `license` in the data card or in the base model's card, "
            "or choose one with --license"
        )


def check_repo_name(repo: str) -> None:
    """Raise UserError where `repo` is not the name of a repository."""
    expected = "expected user/name, organisation/name or name"
    kind = repo.partition("/")[0]
    if kind in ("datasets", "models", "spaces", "https:", "http:") and repo.count("/"):
        raise UserError(f"--repo: found {repo!r}, {expected}; the kind follows from --what")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo: found {repo!r}, {expected}: {_line(error)}") from error


class _Push:
    """One push of one exported folder."""

    def __init__(self, api: HfApi, repo: str, target: Target, exported: Exported) -> None:
        self.api = api
        self.repo = repo
        self.target = target
        self.exported = exported
        self.kind = "dataset" if exported.what == "pairs" else "model"
        self.at: dict[str, Any] = {"repo_id": repo, "repo_type": self.kind}

    def run(self) -> Pushed:
        """Check an existing repository, create what is missing, commit, tag."""
        self._check_existing()
        url = retried(self.api.create_repo, **self.at, private=self.target.private, exist_ok=True)
        branch = self.target.revision
        if branch is not None:
            retried(self.api.create_branch, **self.at, branch=branch, exist_ok=True)
        before = retried(self.api.repo_info, **self.at, revision=branch).sha
        commit = retried(self._commit)
        if self.exported.iteration is not None:
            self._tag(commit, f"iteration-{self.exported.iteration}")
        return Pushed(str(url), commit, commit != before)

    def _check_existing(self) -> None:
        """Refuse a public repository for private data, and one that holds something else."""
        info: Any  # the union of the client's records lacks fields that models and datasets have
        try:
            info = retried(self.api.repo_info, **self.at, revision=self.target.revision)
        except RevisionNotFoundError:  # a new branch starts from the main one
            info = retried(self.api.repo_info, **self.at)
        except RepositoryNotFoundError:
            return
        if self.target.private and not info.private:
            raise UserError(
                f"--private: {self.repo} exists and is public; make it private in its settings, or "
                "choose another name"
            )
        names = {file.rfilename for file in info.siblings or []} - {".gitattributes", "README.md"}
        if self.target.force or not names:
            return
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        contents = f"{self.repo} holds {', '.join(sorted(names)[:3])}{more}"
        advice = "choose another name, or overwrite it with --force"
        if self.kind == "dataset":
            if "irl-align" in (info.tags or []):
                return
            raise UserError(
                f"--repo: the dataset {contents} and was not made by irl-align; {advice}"
            )
        file = {**self.at, "filename": "config.json", "revision": info.sha}
        theirs, ours = NO_MODEL, _architecture(self.exported.folder / "config.json")
        with suppress(EntryNotFoundError):
            theirs = _architecture(Path(retried(lambda: self.api.hf_hub_download(**file))))
        if theirs != ours:
            raise UserError(f"--repo: {contents} of {theirs}, and this is {ours}; {advice}")

    def _commit(self) -> str:
        """Commit all files, unless the repository has them already. Returns the commit's hash.

        One create_commit: upload_folder may split an upload into several commits. Every try makes
        its own operations: a try whose response was lost has changed the head, and then nothing
        is left to commit.
        """
        folder = self.exported.folder
        files = {file.relative_to(folder).as_posix(): file for file in files_of(folder)}
        existing = self.api.list_repo_files(**self.at, revision=self.target.revision)
        stale = [name for name in existing if STALE.fullmatch(name) and name not in files]
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
        operations += [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file))
            for name, file in files.items()
        ]
        info = self.api.create_commit(
            **self.at,
            operations=operations,
            commit_message=f"{self.exported.what} by irl-align",
            revision=self.target.revision,
        )
        return str(info.oid)

    def _tag(self, commit: str, tag: str) -> None:
        """Tag the commit; the tag moves if this iteration was pushed before."""
        refs = retried(self.api.list_repo_refs, **self.at)
        old = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
        if old == commit:
            return
        if old is not None:
            logger.warning("%s: tag %s moves from %s to %s", self.repo, tag, old[:8], commit[:8])
            with suppress(RevisionNotFoundError):  # the response to an earlier try was lost
                retried(self.api.delete_tag, **self.at, tag=tag)
        retried(self.api.create_tag, **self.at, tag=tag, revision=commit, exist_ok=True)


def _architecture(config: Path) -> str:
    """The classes of a model, or its type, by its config.json."""
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return NO_MODEL
    names = values.get("architectures") or [values.get("model_type")]
    return ", ".join(map(str, names)) if any(names) else NO_MODEL


def retried(
    step: Callable[Parameters, Value], *args: Parameters.args, **options: Parameters.kwargs
) -> Value:
    """Do one step, and repeat it after a wait if the server or the connection failed.

    A repeated step must have the same effect as a single one.
    """
    for number in range(TRIES - 1):
        try:
            return step(*args, **options)
        except Exception as error:
            if not _is_temporary(error):
                raise
            wait = WAIT * 2**number
            logger.warning("push: %s; trying again in %g s", _line(error), wait)
            time.sleep(wait)
    return step(*args, **options)


def _is_temporary(error: BaseException) -> bool:
    """Whether the next try may succeed."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in RETRIED
        if _is_connection_error(cause):
            return not isinstance(cause, OfflineModeIsEnabled)
    return False


def _is_connection_error(error: BaseException) -> bool:
    # By name: huggingface_hub has changed its HTTP library (requests, httpx, httpx2) and may again.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError"})


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into a UserError that says what to do, without the token."""
    try:
        yield
    except Exception as error:
        message = None if isinstance(error, UserError) else _message(repo, error)
        if message is None:
            raise
        raise UserError(message) from error


def _message(repo: str, error: Exception) -> str | None:
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "push: HF_HUB_OFFLINE is set; unset it to reach the Hub"
        if isinstance(cause, RepositoryNotFoundError):
            return f"push: the Hub has no {repo} that this token may see; check the name and rights"
        if isinstance(cause, RevisionNotFoundError):
            return f"--revision: {repo} has no such branch, and it could not be created"
        if isinstance(cause, HfHubHTTPError):
            return _status_message(repo, cause)
        if type(cause).__name__ == "XetAuthenticationError":  # hf_xet sends large files
            return NO_RIGHT.format(repo=repo)
        if _is_connection_error(cause):
            return f"push: the connection to the Hub failed ({_line(cause)}); {RESUMES}"
    return None


def _status_message(repo: str, error: Any) -> str:
    status = error.response.status_code
    if status == 401:
        return "push: the Hub does not accept the token; renew it with `hf auth login --force`"
    if status == 403:
        return NO_RIGHT.format(repo=repo)
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} s" if wait else "later"
        return f"push: the Hub's rate limit is reached; try again {when}: {RESUMES}"
    if status >= 500:
        return f"push: the Hub failed {TRIES} times (status {status}); try later: {RESUMES}"
    return f"push: the Hub refused {repo}: {_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    token = get_token()
    return text.replace(token, "***") if token else text

"""Push what a run made to the Hub: `irl-align push`. One commit a push, the same again or none."""

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
from typing import TYPE_CHECKING, Any, TypeVar

from irl_align.errors import UserError
from irl_align.hub.licences import UNKNOWN
from irl_align.utils.files import locked

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from irl_align.hub.export import Exported

logger = logging.getLogger(__name__)
TRIES = 4
"""Times that a step is tried when the server or the connection fails."""
WAIT = 2.0
"""Seconds before the second try; twice as long before each further one."""
_RETRIED = (408, 429, 500, 502, 503, 504)
# What an earlier push may have left and this one may not have: other shards, other iterations.
_STALE = re.compile(r"(model.*\.safetensors(\.index\.json)?|(pairs|samples)/[^/]+\.parquet)")
_FAMILY = ("model_type", "architectures")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Target:
    """Where to push."""

    repo: str
    """user/name, org/name, or name alone for the token's own user."""
    revision: str | None = None
    """Branch; the repository's main one if None. Made where it is missing."""
    private: bool = False
    """A new repository is made private; an existing public one is refused."""
    force: bool = False
    """Overwrite a repository of another model family or of another origin."""


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    url: str
    commit: str
    changed: bool
    """Whether there was anything new to commit."""
    tag: str | None


def push(
    run: Path, what: str, target: Target, iteration: int | None = None, licence: str | None = None
) -> Pushed:
    """Export a run's reward, policy or pairs and commit it to a Hub repository.

    The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`). Doing it again
    after a cut goes on: what was uploaded is not uploaded again. A reward or policy is tagged
    iteration-K. Raises UserError: no token or a wrong one, no rights, no licence, a repository of
    another family, and whatever the server or the connection still refuses after TRIES tries.
    """
    from huggingface_hub import HfApi, get_token

    check_repo_name(target.repo)
    token = get_token()
    if token is None:
        raise UserError("push: found no Hub token; set HF_TOKEN, or log in with `hf auth login`")
    with told(target.repo):
        api = HfApi(token=token)
        repo = _full_name(api, target.repo)
        with exported_aside(run, what, iteration, licence) as exported:
            require_licence(exported)
            return _Push(api, repo, target, exported).run()


@contextmanager
def exported_aside(
    run: Path, what: str, iteration: int | None, licence: str | None
) -> Iterator[Exported]:
    """An export in a folder of the run that is gone afterwards; one push of a run at a time."""
    from irl_align.hub.export import export

    def refuse(holder: str) -> None:
        raise UserError(f"push: {run} is being pushed by {holder}: wait for it, or stop it")

    if not run.is_dir():
        raise UserError(f"{run}: found no such folder, expected the folder of a run")
    aside = run / ".push"
    with locked(run / ".push.lock", refuse):
        shutil.rmtree(aside, ignore_errors=True)  # what a kill left
        try:
            yield export(run, what, aside, iteration, licence)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def require_licence(exported: Exported) -> None:
    """UserError where the licence is not known: what is published must say how it may be used."""
    if exported.licence.name == UNKNOWN:
        raise UserError(
            f"licence: {exported.licence.why}; give `license` in the data card or in the base "
            "model's card, or choose one with --license"
        )


def check_repo_name(repo: str) -> None:
    """UserError where `repo` is no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

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
        """Check what is there, make what is missing, commit, tag."""
        info = self._existing()
        if info is not None:
            self._check_existing(info)
        url = retried(
            lambda: self.api.create_repo(**self.at, private=self.target.private, exist_ok=True)
        )
        if self.target.revision is not None:
            branch = self.target.revision
            retried(lambda: self.api.create_branch(**self.at, branch=branch, exist_ok=True))
        before = self._head()
        commit = retried(self._commit)
        return Pushed(str(url), commit, commit != before, self._tag(commit))

    def _existing(self) -> Any | None:
        """What the Hub says of the branch, or of the main one where it is missing."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        branch = self.target.revision
        try:
            with suppress(RevisionNotFoundError):
                return retried(lambda: self.api.repo_info(**self.at, revision=branch))
            return retried(lambda: self.api.repo_info(**self.at))
        except RepositoryNotFoundError:
            return None

    def _head(self) -> str:
        info = retried(lambda: self.api.repo_info(**self.at, revision=self.target.revision))
        return str(info.sha)

    def _check_existing(self, info: Any) -> None:
        """Refuse to put private data in public, and to overwrite what is something else."""
        if self.target.private and not info.private:
            raise UserError(
                f"--private: {self.repo} exists and is public; make it private in its settings, or "
                "choose another name"
            )
        if self.target.force:
            return
        names = {file.rfilename for file in info.siblings or []} - {".gitattributes", "README.md"}
        if not names:
            return
        if self.kind == "dataset":
            if "irl-align" not in (info.tags or []):
                raise UserError(
                    f"--repo: the dataset {self.repo} holds {_some(names)} and was not made by "
                    "irl-align; choose another name, or overwrite it with --force"
                )
            return
        there, ours = self._family(info.sha), _family_of(self.exported.folder / "config.json")
        if there != ours:
            raise UserError(
                f"--repo: {self.repo} holds {_some(names)} of {_described(there)}, and this is "
                f"{_described(ours)}; choose another name, or overwrite it with --force"
            )

    def _family(self, commit: str) -> dict[str, Any]:
        from huggingface_hub.errors import EntryNotFoundError

        where = {**self.at, "filename": "config.json", "revision": commit}
        try:
            path = retried(lambda: self.api.hf_hub_download(**where))
        except EntryNotFoundError:
            return {}
        return _family_of(Path(path))

    def _commit(self) -> str:
        """One commit of all files; none where the repository has them already. Its hash.

        Operations are made anew for every try: a try whose answer was lost has changed the head,
        and then there is nothing left to commit.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = {
            file.relative_to(self.exported.folder).as_posix(): file
            for file in sorted(self.exported.folder.rglob("*"))
            if file.is_file()
        }
        there = self.api.list_repo_files(**self.at, revision=self.target.revision)
        stale = [name for name in there if _STALE.fullmatch(name) and name not in files]
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in stale]
        operations += [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file))
            for name, file in files.items()
        ]
        done = self.api.create_commit(
            **self.at,
            operations=operations,
            commit_message=f"{self.exported.what} by irl-align",
            revision=self.target.revision,
        )
        return str(done.oid)

    def _tag(self, commit: str) -> str | None:
        """Tag the commit iteration-K; the tag moves where this iteration was pushed before."""
        if self.exported.iteration is None:
            return None
        tag = f"iteration-{self.exported.iteration}"
        refs = retried(lambda: self.api.list_repo_refs(**self.at))
        old = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
        if old == commit:
            return tag
        if old is not None:
            logger.warning("%s: tag %s moves from %s to %s", self.repo, tag, old[:8], commit[:8])
            retried(lambda: self._delete_tag(tag))
        retried(lambda: self.api.create_tag(**self.at, tag=tag, revision=commit, exist_ok=True))
        return tag

    def _delete_tag(self, tag: str) -> None:
        from huggingface_hub.errors import RevisionNotFoundError

        with suppress(RevisionNotFoundError):  # the answer to an earlier try was lost
            self.api.delete_tag(**self.at, tag=tag)


def _full_name(api: HfApi, repo: str) -> str:
    """repo with its owner; asks the Hub whose the token is, which also checks the token."""
    user = str(retried(api.whoami)["name"])
    return repo if "/" in repo else f"{user}/{repo}"


def _family_of(config: Path) -> dict[str, Any]:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return {name: values.get(name) for name in _FAMILY}


def _described(family: dict[str, Any]) -> str:
    names = family.get("architectures") or [family.get("model_type")]
    return ", ".join(map(str, names)) if any(names) else "no known model"


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def retried(step: Callable[[], Value]) -> Value:
    """Do one step, again after a wait where the server or the connection failed.

    Every step here has the same effect when it is done twice.
    """
    for number in range(1, TRIES):
        try:
            return step()
        except Exception as error:
            if not _passing(error):
                raise
            wait = WAIT * 2 ** (number - 1)
            logger.warning("push: %s; trying again in %g s", _line(error), wait)
            time.sleep(wait)
    return step()


def _passing(error: BaseException) -> bool:
    """Whether a fault may be gone the next time."""
    from huggingface_hub.errors import HfHubHTTPError

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response.status_code in _RETRIED
        if _of_connection(cause):
            return type(cause).__name__ != "OfflineModeIsEnabled"
    return False


def _of_connection(error: BaseException) -> bool:
    # By name: huggingface_hub has changed its HTTP library (requests, httpx, httpx2) and may again.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError"})


@contextmanager
def told(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do, without the token."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _message(repo, error)
        if message is None:
            raise
        raise UserError(message) from error


def _message(repo: str, error: Exception) -> str | None:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    again = "the same command goes on from there"
    for cause in _causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return "push: HF_HUB_OFFLINE is set; unset it to reach the Hub"
        if isinstance(cause, RepositoryNotFoundError):
            return f"push: the Hub has no {repo} that this token may see; check the name and rights"
        if isinstance(cause, RevisionNotFoundError):
            return f"--revision: {repo} has no such revision, and it could not be made"
        if isinstance(cause, HfHubHTTPError):
            return _status_message(repo, cause, again)
        if type(cause).__name__ == "XetAuthenticationError":  # hf_xet sends large files
            return f"push: the token may not write to {repo}; use one with the right to write there"
        if _of_connection(cause):
            return f"push: the connection to the Hub failed ({_line(cause)}); {again}"
    return None


def _status_message(repo: str, error: Any, again: str) -> str:
    status = error.response.status_code
    if status == 401:
        return "push: the Hub does not accept the token; renew it with `hf auth login --force`"
    if status == 403:
        return f"push: the token may not write to {repo}; use one with the right to write there"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} s" if wait else "later"
        return f"push: the Hub's rate limit is reached; try again {when}: {again}"
    if status >= 500:
        return f"push: the Hub failed {TRIES} times (status {status}); try later: {again}"
    return f"push: the Hub refused {repo}: {_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(error: BaseException) -> str:
    from huggingface_hub import get_token

    text = " ".join(str(error).split())[:300] or type(error).__name__
    token = get_token()
    return text.replace(token, "***") if token else text

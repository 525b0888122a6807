"""Pushing a folder to the Hugging Face Hub: one commit, a tag for the run, and again as often as it is interrupted.

A push begins with what the repository holds, so that repeating it whole is safe: large files that arrived are not sent
again, a commit that was made is recognised by the content of its files, and a missing tag is made up. What somebody
deleted or edited there since is put back. A tag never moves: whoever loads a run by it gets the same files each time.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import httpx
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from lora_rlhf.errors import UserError, first_line
from lora_rlhf.hub.folder import RUN_FILE, HubFolder
from lora_rlhf.terminal import console, note

Outcome = Literal["pushed", "replaced", "updated", "repaired", "tagged", "nothing to do"]
"""In one commit, the run came into an empty repository, took another's place, got new files beside the same weights, or
got back what was deleted or edited on the Hub; or the commit was there and got its tag; or all was there."""
COMMIT_OF = {"pushed": "Push", "replaced": "Push", "updated": "Update", "repaired": "Repair"}

PAUSES_S = (1.0, 3.0, 9.0)
"""Waits before a push that failed for a passing reason is repeated, where the Hub does not name its own."""
LONGEST_WAIT_S = 120
"""A wait that the Hub asks for beyond this is left to the user."""
SERVERS_OWN = (".gitattributes",)
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"


@dataclass(frozen=True)
class Pushed:
    """What came of a push.

    Attributes:
        url: the repository's address.
        head: the commit that its main branch is at, which holds the folder whole.
        tag: the run's.
        tagged: the commit that the tag is at, which was `head` when it was made. They differ where the run was updated
            or repaired since, replaced and put back, or somebody put a file of their own beside it.
        outcome: what was done.
    """

    url: str
    head: str
    tag: str
    tagged: str
    outcome: Outcome

    @property
    def text(self) -> str:
        """What was done, and at which commits, for people."""
        if self.outcome in ("tagged", "nothing to do") or self.head == self.tagged:
            return f"{self.outcome}: {self.tag} is commit {self.tagged[:12]} of {self.url}"
        return (
            f"{self.outcome}: {self.url} is now at commit {self.head[:12]}; "
            f"its tag {self.tag} stays at commit {self.tagged[:12]}"
        )


@dataclass(frozen=True)
class Held:
    """What a repository holds before a push.

    Attributes:
        head: the commit that its main branch is at.
        private: whether it is.
        files: name -> SHA-256 of those in git-LFS, the blob's SHA-1 of others; None where the Hub does not say.
        tags: name -> commit.
        run: `run.json`, where it is one of ours.
    """

    head: str
    private: bool
    files: dict[str, str | None]
    tags: dict[str, str]
    run: dict[str, Any] | None

    @property
    def empty(self) -> bool:
        """Whether nobody has put anything there."""
        return self.files.keys() <= set(SERVERS_OWN)


@dataclass(frozen=True)
class Trouble:
    """An error in words, whether it may pass by itself, and how long the Hub asks to wait."""

    text: str
    passing: bool = False
    wait_s: float | None = None


def check_repo_id(repo_id: str, option: str = "--repo_id") -> None:
    """Raise `UserError` where `repo_id` is not OWNER/NAME as the Hub writes names."""
    if not re.fullmatch(f"{_NAME}/{_NAME}", repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise UserError(
            f"{option}: {repo_id!r} is no name of a repository; write OWNER/NAME, such as you/mistral-plus-lora, with "
            "letters, digits, '-', '_' and '.', a letter or digit at both ends of each, and no '--', '..' or '.git'"
        )


def push(folder: HubFolder, repo_id: str, private: bool = False, force: bool = False) -> Pushed:
    """Make `repo_id` hold `folder`, in one commit on top of what it holds, and tag it where the tag is not there yet.

    Args:
        folder: what is pushed.
        repo_id: OWNER/NAME; created where it is missing.
        private: create it as a private one.
        force: replace whatever it holds; earlier commits stay in its history.

    Raises:
        UserError: not logged in, no right, another run there, no network, or the Hub refuses.
    """
    check_repo_id(repo_id)
    api = HfApi(library_name="lora_rlhf", library_version=version("lora-rlhf"))
    with _quiet_hub():
        for pause in (*PAUSES_S, None):
            trouble = None
            try:
                return _pushed(api, folder, repo_id, private, force)
            except (httpx.HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
                trouble = hub_trouble(error, repo_id)
            wait = pause if trouble.wait_s is None else trouble.wait_s
            if not trouble.passing or pause is None or wait is None or wait > LONGEST_WAIT_S:
                raise UserError(without_token(trouble.text))
            note(without_token(f"  {trouble.text}: trying again in {wait:g} s"))
            time.sleep(wait)
    raise AssertionError("a push ends or raises")


def _pushed(api: HfApi, folder: HubFolder, repo_id: str, private: bool, force: bool) -> Pushed:
    api.whoami(cache=True)
    held = _held(api, repo_id)
    if held is None:
        api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        held = _held(api, repo_id)
    if held is None:
        raise UserError(f"{repo_id} is there and cannot be read: does the token have read access to it?")
    if private and not held.private:
        raise UserError(
            f"--private: {repo_id} exists and is public. Make it private in its settings on the Hub first, choose "
            "another --repo_id, or leave --private out"
        )
    head = held.head
    outcome: Outcome = "nothing to do" if folder.tag in held.tags else "tagged"
    if lacking := _lacking(folder, held):
        ours = _is_ours(folder, held, lacking)
        if not (ours or held.empty or force):
            raise UserError(_occupied(repo_id, held))
        change = _change(folder, held, ours)
        gone = _gone(folder, held, everything=not ours)
        head = api.create_commit(
            repo_id,
            [*_additions(folder, lacking), *(CommitOperationDelete(name, is_folder=False) for name in gone)],
            commit_message=f"{COMMIT_OF[change]} {folder.tag} with lora_rlhf {version('lora-rlhf')}",
            parent_commit=held.head,
        ).oid
        if head != held.head:  # the client makes no commit of files that the Hub turns out to have
            outcome = change
    if folder.tag not in held.tags:
        api.create_tag(repo_id, tag=folder.tag, revision=head, exist_ok=True)
    return Pushed(f"{api.endpoint}/{repo_id}", head, folder.tag, held.tags.get(folder.tag, head), outcome)


def _held(api: HfApi, repo_id: str) -> Held | None:
    """Return what the repository holds; none where there is none."""
    try:
        info = api.model_info(repo_id, files_metadata=True)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
    files = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()}
    tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
    run = None
    if RUN_FILE in files:
        run = _run_of(Path(api.hf_hub_download(repo_id, RUN_FILE, revision=info.sha)))
    return Held(str(info.sha), bool(info.private), files, tags, run)


def _run_of(file: Path) -> dict[str, Any] | None:
    """Return the content of a `run.json`; none where it is not one that this package wrote."""
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    whole = isinstance(run, dict) and isinstance(run.get("files"), dict)
    return run if whole and "lora_rlhf" in run and isinstance(run.get("run"), str) else None


def _lacking(folder: HubFolder, held: Held) -> list[str]:
    """Return the files of the folder that the repository has not, or not with this content."""
    return [name for name in folder.sizes() if not folder.is_content(name, held.files.get(name))]


def _is_ours(folder: HubFolder, held: Held, lacking: list[str]) -> bool:
    """Return whether the repository holds this run, whatever it lacks of it."""
    if held.run is not None:
        return held.run["run"] == folder.tag
    # run.json itself was deleted or edited: the tag tells whose it was, if nothing of another model is there
    known = {*folder.files, RUN_FILE, *SERVERS_OWN}
    other_weights = any(name in held.files for name in lacking if name.endswith(".safetensors"))
    return folder.tag in held.tags and held.files.keys() <= known and not other_weights


def _change(folder: HubFolder, held: Held, ours: bool) -> Outcome:
    if held.empty or not ours:
        return "pushed" if held.empty else "replaced"
    pushed_so = held.run and (held.run["files"], held.run["lora_rlhf"]) == (folder.files, version("lora-rlhf"))
    return "repaired" if held.run is None or pushed_so else "updated"


def _additions(folder: HubFolder, names: Iterable[str]) -> Iterator[CommitOperationAdd]:
    for name in names:
        yield CommitOperationAdd(name, folder.path / name)


def _gone(folder: HubFolder, held: Held, everything: bool) -> list[str]:
    """Return the files of the repository that the push takes away: all it lacks, or those of the run's last push."""
    theirs = held.files.keys() if everything or held.run is None else held.files.keys() & held.run["files"].keys()
    return sorted(theirs - folder.files.keys() - {RUN_FILE, *SERVERS_OWN})


def _occupied(repo_id: str, held: Held) -> str:
    if held.run is None:
        what = f"files that lora_rlhf did not push ({', '.join(sorted(held.files.keys() - set(SERVERS_OWN))[:3])}, …)"
    else:
        what = f"another push ({held.run.get('kind')}, {held.run['run']})"
    return (
        f"{repo_id} holds {what}, which this one would replace. Choose another --repo_id, or replace it with --force "
        "(its earlier commits stay in the history)"
    )


def hub_trouble(error: BaseException, repo_id: str) -> Trouble:
    """Return in words what went wrong between here and the Hub."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, LocalTokenNotFoundError):
            return Trouble(
                "not logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token with write access"
            )
        if isinstance(link, OfflineModeIsEnabled):
            return Trouble("HF_HUB_OFFLINE is set, so that nothing can be pushed: unset it, or look with --dry_run")
        if isinstance(link, HfHubHTTPError):
            return _refusal(link, repo_id)
        if isinstance(link, httpx.UnsupportedProtocol | httpx.InvalidURL):
            return Trouble(f"HF_ENDPOINT is no address of a Hub: {first_line(link)}")
        if isinstance(link, httpx.ConnectError):
            return Trouble("the Hub cannot be reached: check the network (and HF_ENDPOINT, where it is set)", True)
        if isinstance(link, httpx.TransportError):
            return Trouble(f"the connection to the Hub was lost ({type(link).__name__}): {AGAIN}", True)
        if type(link).__name__ == "XetAuthenticationError":
            return Trouble(f"no right to upload to {repo_id}: use a token with write access")
        if isinstance(link, ConnectionError | TimeoutError):  # xet's client has no errors of its own for these
            return Trouble(
                f"the upload broke off ({first_line(link)}): {AGAIN} (HF_HUB_DISABLE_XET=1 takes another way)", True
            )
    if isinstance(error, KeyError):
        return Trouble(f"the Hub gave an answer without {error}: {AGAIN}", True)
    return Trouble(f"the push to {repo_id} failed: {first_line(error)}. {AGAIN.capitalize()}")


AGAIN = "the same command goes on, and what arrived is not sent again"


def _refusal(error: HfHubHTTPError, repo_id: str) -> Trouble:
    status, headers = error.response.status_code, error.response.headers
    said = f" ({first_line(error.server_message)})" if error.server_message else ""
    if isinstance(error, GatedRepoError):
        return Trouble(
            f"{repo_id} is gated, and this account has no access: ask its owner, or choose another --repo_id"
        )
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return Trouble("the Hub does not know the token: run `hf auth login`, or set HF_TOKEN to a valid one")
    if status == 403:
        return Trouble(
            f"no right to write to {repo_id}{said}: use a token with write access "
            "(https://huggingface.co/settings/tokens), and an --repo_id of your own or of an organisation you are in"
        )
    if status in (401, 404):
        return Trouble(f"the Hub has no {repo_id}, or not for this account{said}: check the owner's name in --repo_id")
    if status in (409, 412):
        return Trouble(f"{repo_id} was changed by someone else meanwhile{said}", True)
    if status == 429:
        asked = headers.get("Retry-After", "")
        wait = float(asked) if asked.isdigit() else None
        when = f"; it asks to wait {wait:g} s" if wait is not None else ""
        return Trouble(f"the Hub has had too many requests{when}: {AGAIN}", True, wait)
    if status == 408 or status >= 500:
        return Trouble(f"the Hub has trouble of its own (HTTP {status}){said}: {AGAIN}", True)
    return Trouble(f"the Hub refuses the push to {repo_id} (HTTP {status}){said}")


def without_token(text: str) -> str:
    """Return `text` without the token that is in use, whoever put it there."""
    token = get_token()
    return text.replace(token, "***") if token else text


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Hold back the client's warnings, which print signed addresses of uploads, and its bars where no one sees them."""
    level, bars = hub_logging.get_verbosity(), not are_progress_bars_disabled()
    hub_logging.set_verbosity_error()
    if bars and not console.is_terminal:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if bars and not console.is_terminal:
            enable_progress_bars()

"""Pushing while things go wrong: errors of one line, retries, interruptions that end in one commit, no token shown."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from hub_state import READER, TOKEN, Fault
from huggingface_hub import constants
from recipe_runs import ROOT, assert_one_line_of_error
from test_hub import Push, arrived, on_disk, our_commits

Recipe = Callable[..., tuple[int, str]]


@pytest.fixture
def refused(recipe: Recipe, finished_run: Path) -> Callable[..., str]:
    """Run the recipe to an error of one line; return all it printed."""

    def push(*words: str, repo_id: str = "you/plus", options: tuple[str, ...] = ()) -> str:
        status, printed = recipe("push_to_hub.py", "--output_dir", str(finished_run), "--repo_id", repo_id, *options)
        assert_one_line_of_error(status, printed, *words)
        assert TOKEN not in printed
        return printed

    return push


def assert_whole(hub: HubServer, run: Path) -> None:
    """Check that the repository holds the run in exactly one commit of ours, with its tag on it."""
    assert len(our_commits(hub)) == 1
    assert arrived(hub) == on_disk(run / "hub" / "adapter")
    assert list(hub.repositories["you/plus"].tags.values()) == [hub.repositories["you/plus"].head.oid]


# Refusals


def test_without_a_login_it_says_how_to_log_in(
    hub: HubServer, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused("not logged in", "hf auth login", "HF_TOKEN")
    assert hub.requests == []


def test_a_login_that_the_hub_keeps_is_used(
    hub: HubServer, pushed: Push, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    pushed(finished_run)
    assert_whole(hub, finished_run)


def test_a_token_that_the_hub_does_not_know(
    hub: HubServer, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_NobodyHasGivenThisOut")
    assert "hf_NobodyHasGivenThisOut" not in refused("does not know the token", "HF_TOKEN")


def test_a_token_that_may_not_write(
    hub: HubServer, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    refused("no right to write to guest/plus", "settings/tokens", repo_id="guest/plus")
    hub.create("you/plus")
    refused("no right to write to you/plus")


def test_an_owner_that_is_someone_else(hub: HubServer, refused: Callable[..., str]) -> None:
    refused("no right to write to elsewhere/plus", "--repo_id", repo_id="elsewhere/plus")


def test_an_owner_that_does_not_exist(hub: HubServer, refused: Callable[..., str]) -> None:
    hub.faults = [Fault("repos/create", 404, {"X-Error-Code": "RepoNotFound"})]
    refused("the Hub has no nobody/plus", "owner's name", repo_id="nobody/plus")


def test_a_gated_repository(hub: HubServer, refused: Callable[..., str]) -> None:
    hub.create("other/plus").gated = True
    refused("other/plus is gated", repo_id="other/plus")


def test_a_request_that_the_hub_finds_wrong(hub: HubServer, refused: Callable[..., str]) -> None:
    hub.faults = [Fault("/commit/", 400, body='{"error": "the card is too long\\nline two"}')]
    refused("refuses the push to you/plus (HTTP 400)", "the card is too long")


def test_offline_mode(hub: HubServer, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set", "--dry_run")
    assert hub.requests == []


def test_no_network(
    hub: HubServer, refused: Callable[..., str], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    refused("the Hub cannot be reached", "check the network")
    assert len(waits) == 3


# What passes by itself


@pytest.mark.parametrize(
    "fault",
    [
        Fault("whoami", 503, times=2),
        Fault("repos/create", 500),
        Fault("repos/create", drop="after"),
        Fault("GET /api/models/you/plus$", drop="after", times=3),
        Fault("preupload", 502, times=2),
        Fault("objects/batch", 500),
        Fault("PUT /storage/", 500, times=2),
        Fault("PUT /storage/", drop="midway", times=2),
        Fault("/commit/", 500),
        Fault("/commit/", 409),
        Fault("/commit/", drop="midway"),
        Fault("/commit/", drop="after"),
        Fault("/tag/", 500),
        Fault("/tag/", drop="midway"),
        Fault("/tag/", drop="after"),
        Fault("resolve/", 500, times=2),
    ],
    ids=lambda fault: f"{fault.where} {fault.status or fault.drop}",
)
def test_what_passes_by_itself_ends_in_one_whole_commit(
    hub: HubServer, pushed: Push, finished_run: Path, waits: list[float], fault: Fault
) -> None:
    hub.faults = [fault]
    if "resolve" in fault.where:  # of run.json, which is read where there was a push before
        pushed(finished_run)
    pushed(finished_run)
    assert hub.faults == []
    assert_whole(hub, finished_run)
    adapter = finished_run / "hub" / "adapter"
    whole = {digest: (adapter / name).stat().st_size for name, digest in on_disk(adapter).items()}
    assert all(sent == whole[digest] for digest, sent in hub.uploads.items())  # nothing came twice


def test_someone_elses_commit_in_between_is_seen(
    hub: HubServer, refused: Callable[..., str], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_rlhf.hub.push

    hub.create("you/plus")
    additions = lora_rlhf.hub.push._additions

    def meanwhile(folder: Any, names: list[str]) -> Any:
        if len(hub.repositories["you/plus"].commits) == 1:
            hub.commit("you/plus", "theirs", {"model.bin": b"x"})
        return additions(folder, names)

    monkeypatch.setattr(lora_rlhf.hub.push, "_additions", meanwhile)
    refused("files that lora_rlhf did not push (model.bin")
    assert hub.repositories["you/plus"].head.files == {"model.bin": b"x"}


def test_the_hubs_own_wait_is_kept(hub: HubServer, pushed: Push, finished_run: Path, waits: list[float]) -> None:
    hub.faults = [Fault("whoami", 429, {"Retry-After": "7"}), Fault("/commit/", 429, {"Retry-After": "11"})]
    printed = pushed(finished_run)
    assert waits == [7, 11]
    assert "too many requests; it asks to wait 7 s" in printed
    assert_whole(hub, finished_run)


def test_too_many_requests_for_good(hub: HubServer, refused: Callable[..., str], waits: list[float]) -> None:
    hub.faults = [Fault("whoami", 429, {"Retry-After": "2"}, times=99)]
    refused("too many requests", "the same command goes on")
    assert waits == [2, 2, 2]


def test_a_wait_of_an_hour_is_left_to_the_user(hub: HubServer, refused: Callable[..., str], waits: list[float]) -> None:
    hub.faults = [Fault("whoami", 429, {"Retry-After": "3600"}, times=99)]
    refused("it asks to wait 3600 s")
    assert waits == []


@pytest.mark.parametrize("where", ["whoami", "preupload", "PUT /storage/", "/commit/", "/tag/"])
def test_trouble_that_stays_ends_in_one_line_and_the_next_time_completes(
    hub: HubServer, refused: Callable[..., str], pushed: Push, finished_run: Path, waits: list[float], where: str
) -> None:
    hub.faults = [Fault(where, 500, times=999)]
    refused("trouble of its own (HTTP 500)", "the same command goes on")
    hub.faults = []
    pushed(finished_run)
    assert_whole(hub, finished_run)


def test_a_hub_without_xet_storage_is_an_error_that_names_the_other_way(
    hub: HubServer, refused: Callable[..., str], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    refused("the upload broke off", "xet-write-token", "HF_HUB_DISABLE_XET=1")
    assert our_commits(hub) == []


# The token


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 429, 500])
@pytest.mark.parametrize("where", ["whoami", "repos/create", "preupload", "PUT /storage/", "/commit/"])
def test_a_server_that_repeats_the_token_does_not_get_it_shown(
    hub: HubServer, recipe: Recipe, finished_run: Path, waits: list[float], where: str, status: int
) -> None:
    echo = f'{{"error": "Bearer {TOKEN} is wrong"}}'
    hub.faults = [Fault(where, status, {"X-Error-Message": f"not with {TOKEN}"}, echo, times=999)]
    status, printed = recipe("push_to_hub.py", "--output_dir", str(finished_run), "--repo_id", "you/plus")
    assert_one_line_of_error(status, printed)
    assert TOKEN not in printed


def test_the_token_is_in_no_file(
    hub: HubServer, pushed: Push, finished_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = pushed(finished_run, "--reward_repo_id", "you/reward")
    assert TOKEN not in printed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    sent = [content for repo in hub.repositories.values() for content in repo.head.files.values()]
    assert not [content for content in sent if TOKEN.encode() in content]


# Killed


@pytest.mark.parametrize("where", ["PUT /storage/", "/commit/", "/tag/"])
def test_killed_and_run_again_it_completes(hub: HubServer, pushed: Push, finished_run: Path, where: str) -> None:
    reached, release = threading.Event(), threading.Event()
    hub.faults = [Fault(where, drop="midway", reached=reached, release=release)]
    command = [sys.executable, "recipes/push_to_hub.py", "--output_dir", str(finished_run), "--repo_id", "you/plus"]
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN,
        "HF_HOME": str(finished_run.parent / "home"),
    }  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    printed = process.communicate(timeout=30)[0].decode()
    release.set()
    assert process.returncode == -signal.SIGKILL
    assert TOKEN not in printed
    assert len(our_commits(hub)) == (1 if where == "/tag/" else 0)
    assert hub.repositories["you/plus"].tags == {}

    came, stored = dict(hub.uploads), set(hub.stored)
    pushed(finished_run)
    assert_whole(hub, finished_run)
    assert {digest: hub.uploads[digest] for digest in stored} == {digest: came[digest] for digest in stored}
    if where != "PUT /storage/":
        assert hub.uploads == came  # what had arrived was not sent again


def test_a_push_starts_without_torch(finished_run: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = ['push', '--output_dir', sys.argv[1], '--repo_id', 'you/plus', '--dry_run'];"
        "runpy.run_path('recipes/push_to_hub.py', run_name='__main__');"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(finished_run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^False False$", done.stdout, re.MULTILINE)
    assert done.stderr == ""

"""Pushing again after somebody changed the repository: what is missing or differs is put back; where the tag stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from hub_state import Commit, Fault, oid_of
from recipe_runs import assert_one_line_of_error
from test_hub import Push, add_claim, arrived, on_disk, our_commits

from lora_rlhf.hub.folder import hub_folder
from lora_rlhf.hub.push import Pushed, push

WEIGHTS = "adapter_model.safetensors"


def changed(hub: HubServer, **files: bytes | None) -> Commit:
    """Commit `files` as people do on the web; None deletes. `__` stands for the dot of a name."""
    held = dict(hub.repositories["you/plus"].head.files)
    for name, content in files.items():
        if content is None:
            del held[name.replace("__", ".")]
        else:
            held[name.replace("__", ".")] = content
    return hub.commit("you/plus", "by hand", held)


def repair(run: Path) -> Pushed:
    return push(hub_folder(run, "adapter", "you/plus", ask_hub=False), "you/plus")


# Repairs


@pytest.mark.parametrize(
    "files",
    [
        {"adapter_model__safetensors": None},
        {"adapter_model__safetensors": b"of another size"},
        {"README__md": b"# Edited\n"},
        {"README__md": None, "config__yaml": None, "tokenizer__json": b"{}"},
        {"run__json": None},
        {"run__json": b"{"},
        {"run__json": b'{"run": "mine", "files": {}}', "adapter_model__safetensors": None},
    ],
    ids=str,
)
def test_what_was_deleted_or_edited_on_the_hub_is_put_back(
    hub: HubServer, pushed: Push, finished_run: Path, files: dict[str, bytes | None]
) -> None:
    pushed(finished_run)
    first, uploads = hub.repositories["you/plus"].head, dict(hub.uploads)
    changed(hub, **files)
    assert "repaired: " in pushed(finished_run)
    assert arrived(hub) == on_disk(finished_run / "hub" / "adapter")
    assert [message.split()[0] for message in our_commits(hub)] == ["Push", "Repair"]
    assert list(hub.repositories["you/plus"].tags.values()) == [first.oid]
    assert hub.uploads == uploads
    assert "nothing to do" in pushed(finished_run)
    assert len(our_commits(hub)) == 2


def test_weights_of_the_same_size_with_another_content_are_put_back(
    hub: HubServer, pushed: Push, finished_run: Path
) -> None:
    pushed(finished_run)
    weights = bytearray(hub.repositories["you/plus"].head.files[WEIGHTS])
    weights[-1] ^= 1
    changed(hub, adapter_model__safetensors=bytes(weights))
    assert "repaired: " in pushed(finished_run)
    assert arrived(hub) == on_disk(finished_run / "hub" / "adapter")


def test_a_repository_that_was_emptied_is_filled(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run)
    hub.commit("you/plus", "by hand", {})
    assert "pushed: " in pushed(finished_run)
    assert arrived(hub) == on_disk(finished_run / "hub" / "adapter")


def test_files_that_others_put_beside_the_run_stay(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run)
    changed(hub, notes__txt=b"mine", README__md=b"# Edited\n")
    pushed(finished_run)
    assert hub.repositories["you/plus"].head.files["notes.txt"] == b"mine"
    assert arrived(hub).keys() - {"notes.txt"} == on_disk(finished_run / "hub" / "adapter").keys()


def test_a_check_of_what_is_there_reads_no_content(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run)
    hub.requests.clear()
    assert "nothing to do" in pushed(finished_run)
    read = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert read == {"run.json"}


def test_a_run_with_new_figures_and_a_missing_file_is_updated_in_one_commit(
    hub: HubServer, pushed: Push, finished_run: Path
) -> None:
    pushed(finished_run)
    changed(hub, adapter_model__safetensors=None)
    add_claim(finished_run)
    assert "updated: " in pushed(finished_run)
    assert len(our_commits(hub)) == 2
    assert arrived(hub) == on_disk(finished_run / "hub" / "adapter")


@pytest.mark.parametrize(
    "files",
    [
        {"run__json": None, "adapter_model__safetensors": b"of another model"},
        {"run__json": None, "model__gguf": b"another model"},
        {"run__json": b'{"lora_rlhf": "1", "run": "run-of-another", "files": {}}'},
    ],
    ids=str,
)
def test_what_may_be_another_model_is_left_alone(
    hub: HubServer, pushed: Push, recipe: Callable[..., Any], finished_run: Path, files: dict[str, bytes | None]
) -> None:
    pushed(finished_run)
    theirs = changed(hub, **files)
    options = ["--output_dir", str(finished_run), "--repo_id", "you/plus"]
    assert_one_line_of_error(*recipe("push_to_hub.py", *options), "you/plus holds", "--force")
    assert hub.repositories["you/plus"].head is theirs
    assert "replaced: " in pushed(finished_run, "--force")
    assert arrived(hub) == on_disk(finished_run / "hub" / "adapter")


def test_without_the_tag_nothing_says_whose_a_repository_without_run_json_was(
    hub: HubServer, pushed: Push, recipe: Callable[..., Any], finished_run: Path
) -> None:
    pushed(finished_run)
    hub.repositories["you/plus"].tags.clear()
    changed(hub, run__json=None)
    options = ["--output_dir", str(finished_run), "--repo_id", "you/plus"]
    assert_one_line_of_error(*recipe("push_to_hub.py", *options), "files that lora_rlhf did not push", "--force")


def test_a_hub_that_does_not_tell_contents_is_asked_file_by_file(
    hub: HubServer, pushed: Push, finished_run: Path
) -> None:
    hub.tells_contents = False
    pushed(finished_run)
    commits, uploads = len(hub.repositories["you/plus"].commits), dict(hub.uploads)
    assert "nothing to do" in pushed(finished_run)
    assert (len(hub.repositories["you/plus"].commits), hub.uploads) == (commits, uploads)
    changed(hub, README__md=b"# Edited\n")
    assert "repaired: " in pushed(finished_run)
    assert arrived(hub) == on_disk(finished_run / "hub" / "adapter")


@pytest.mark.parametrize("drop", ["midway", "after"])
def test_a_repair_that_is_interrupted_ends_in_one_commit(
    hub: HubServer, pushed: Push, finished_run: Path, waits: list[float], drop: Any
) -> None:
    pushed(finished_run)
    changed(hub, adapter_model__safetensors=None)
    hub.faults = [Fault("/commit/", drop=drop)]
    pushed(finished_run)
    assert hub.faults == []
    assert len(our_commits(hub)) == 2
    assert arrived(hub) == on_disk(finished_run / "hub" / "adapter")


def test_content_is_told_by_what_git_and_git_lfs_call_it(finished_run: Path) -> None:
    folder = hub_folder(finished_run, "adapter", "you/plus", ask_hub=False)
    for name in folder.sizes():
        content = (folder.path / name).read_bytes()
        for oid, other in ((oid_of(as_name, content), oid_of(as_name, content + b"x")) for as_name in (WEIGHTS, "a")):
            assert folder.is_content(name, oid)
            assert not folder.is_content(name, other)
        assert not folder.is_content(name, None)
    assert oid_of("a", b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's own, of an empty file


# Head and tag


def test_what_was_done_names_head_and_tag_where_they_are(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    repository = pushed(finished_run) and hub.repositories["you/plus"]
    first, ((tag, _),) = repository.head.oid, repository.tags.items()
    url = f"{hub.endpoint}/you/plus"
    add_claim(finished_run)
    assert said(pushed(finished_run), "updated: ") == (
        f"updated: {url} is now at commit {repository.head.oid[:12]}; its tag {tag} stays at commit {first[:12]}"
    )
    assert first != repository.head.oid
    assert repository.tags == {tag: first}
    assert said(pushed(finished_run), "nothing to do: ") == f"nothing to do: {tag} is commit {first[:12]} of {url}"


def said(printed: str, start: str) -> str:
    """Return the printed text from `start` on, however the terminal broke its lines."""
    text = " ".join(printed.split())
    return text[text.index(start) :].partition(" from lora_rlhf")[0].strip()


def test_head_and_tag_are_what_the_hub_has(hub: HubServer, finished_run: Path, other_run: Path) -> None:
    first = repair(finished_run)
    repository = hub.repositories["you/plus"]
    assert (first.outcome, first.head, first.tagged) == ("pushed", repository.head.oid, repository.tags[first.tag])
    assert first.text == f"pushed: {first.tag} is commit {first.head[:12]} of {first.url}"

    changed(hub, README__md=b"# Edited\n")
    repaired = repair(finished_run)
    assert (repaired.outcome, repaired.head, repaired.tagged) == ("repaired", repository.head.oid, first.head)
    assert repaired.text.startswith("repaired: ") and repaired.head[:12] in repaired.text

    theirs = changed(hub, notes__txt=b"mine")
    nothing = repair(finished_run)
    assert (nothing.outcome, nothing.head, nothing.tagged) == ("nothing to do", theirs.oid, first.head)
    assert theirs.oid[:12] not in nothing.text and first.head[:12] in nothing.text

    repository.tags.clear()
    tagged = repair(finished_run)
    assert (tagged.outcome, tagged.head, tagged.tagged) == ("tagged", theirs.oid, theirs.oid)
    assert repository.tags == {first.tag: theirs.oid}

    other = hub_folder(other_run, "adapter", "you/plus", ask_hub=False)
    replaced = push(other, "you/plus", force=True)
    assert (replaced.outcome, replaced.head, replaced.tagged) == ("replaced", repository.head.oid, repository.head.oid)
    back = push(hub_folder(finished_run, "adapter", "you/plus", ask_hub=False), "you/plus", force=True)
    assert (back.outcome, back.head, back.tagged) == ("replaced", repository.head.oid, theirs.oid)
    assert "stays at commit" in back.text


def test_another_version_of_the_package_updates_run_json_alone(
    hub: HubServer, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lora_rlhf.hub.folder
    import lora_rlhf.hub.push

    repair(finished_run)
    before = arrived(hub)
    for module in (lora_rlhf.hub.folder, lora_rlhf.hub.push):
        monkeypatch.setattr(module, "version", lambda name: "99")
    assert repair(finished_run).outcome == "updated"
    after = arrived(hub)
    assert {name for name in after if after[name] != before[name]} == {"run.json"}
    assert repair(finished_run).outcome == "nothing to do"

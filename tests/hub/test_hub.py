"""Pushing a run with the real `huggingface_hub` to a stand-in Hub: what arrives, once, and again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from recipe_runs import assert_one_line_of_error

from lora_rlhf.hub.folder import hub_folder

Push = Callable[..., str]
OF_A_RUN = {"README.md", "run.json", "config.yaml", "metrics.jsonl", "summary.json", "curves.png"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}
FILES = {
    "adapter": OF_A_RUN | TOKENIZER | ADAPTER,
    "merged": OF_A_RUN | TOKENIZER | {"config.json", "generation_config.json", "model.safetensors"},
    "reward": (OF_A_RUN - {"metrics.jsonl", "curves.png"}) | TOKENIZER | ADAPTER,
}


def sha256s(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def on_disk(folder: Path) -> dict[str, str]:
    return sha256s({path.name: path.read_bytes() for path in folder.iterdir()})


def arrived(hub: HubServer, repo: str = "you/plus") -> dict[str, str]:
    return sha256s({k: v for k, v in hub.repositories[repo].head.files.items() if k != ".gitattributes"})


def our_commits(hub: HubServer, repo: str = "you/plus") -> list[str]:
    return [commit.message for commit in hub.repositories[repo].commits if "lora_rlhf" in commit.message]


# What arrives


@pytest.mark.parametrize(("kind", "options"), [("adapter", ()), ("merged", ("--merged",))])
def test_what_arrives_is_what_the_run_left(
    hub: HubServer, pushed: Push, finished_run: Path, kind: str, options: tuple[str, ...]
) -> None:
    printed = pushed(finished_run, *options)
    got = arrived(hub)
    assert got.keys() == FILES[kind]
    assert got == on_disk(finished_run / "hub" / kind)
    source = finished_run / {"adapter": "policy_adapter", "merged": "merged"}[kind]
    weights = {path.name for path in source.glob("*.safetensors")}
    assert {n: got[n] for n in weights} == {n: on_disk(source)[n] for n in weights}
    for name in ("metrics.jsonl", "summary.json", "curves.png"):
        assert got[name] == on_disk_file(finished_run / name)
    held = json.loads(hub.repositories["you/plus"].head.files["run.json"])
    assert held["files"] == {name: digest for name, digest in got.items() if name != "run.json"}
    assert hub.authorized_uploads == 0  # storage has addresses of its own, and no business with the token
    assert f"{hub.endpoint}/you/plus" in printed
    assert 'model, tokenizer = load_plus("you/plus")' in printed
    assert all(name in printed for name in FILES[kind])


def on_disk_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_large_files_come_in_parts_and_small_ones_in_one(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run, "--merged")
    parts = [request for request in hub.requests if request.startswith("PUT /storage/")]
    model = on_disk_file(finished_run / "merged" / "model.safetensors")
    assert len([request for request in parts if model in request]) == 3
    assert hub.uploads[model] == (finished_run / "merged" / "model.safetensors").stat().st_size


def test_a_push_is_one_commit_and_the_runs_tag(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run)
    repository = hub.repositories["you/plus"]
    assert len(our_commits(hub)) == 1
    ((tag, oid),) = repository.tags.items()
    assert oid == repository.head.oid
    assert tag == json.loads(repository.head.files["run.json"])["run"]
    assert tag.removeprefix("run-") != tag and len(tag) == 16
    assert tag in our_commits(hub)[0]


def test_the_reward_adapter_goes_to_its_own_repository(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run, "--reward_repo_id", "you/reward", "--private")
    assert arrived(hub, "you/reward").keys() == FILES["reward"]
    assert arrived(hub).keys() == FILES["adapter"]
    assert all(hub.repositories[name].private for name in ("you/plus", "you/reward"))
    files = hub.repositories["you/reward"].head.files
    trained = finished_run / "reward_adapter" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == trained.read_bytes()


def test_a_dry_run_sends_nothing_and_writes_what_a_push_sends(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    printed = pushed(finished_run, "--dry_run")
    dry = on_disk(finished_run / "hub" / "adapter")
    assert hub.requests == []
    assert (finished_run / "hub" / "adapter" / "README.md").read_text().strip() in printed
    pushed(finished_run)
    assert arrived(hub) == dry


def test_samples_and_paths_of_this_machine_stay_here(
    hub: HubServer, pushed: Push, finished_run: Path, cache: Path
) -> None:
    pushed(finished_run, "--reward_repo_id", "you/reward")
    pushed(finished_run, "--merged", repo_id="you/merged")
    answers = json.loads((finished_run / "samples.json").read_text())["plus"]
    assert any(len(answer) > 20 for answer in answers)
    for repository in hub.repositories.values():
        for name, content in repository.head.files.items():
            assert str(finished_run.parent).encode() not in content, name
            assert str(cache).encode() not in content, name
            assert not any(answer.encode() in content for answer in answers if len(answer) > 20), name


# Again


def test_the_same_run_again_does_nothing(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run)
    before = (len(hub.repositories["you/plus"].commits), dict(hub.uploads))
    hub.requests.clear()
    assert "nothing to do" in pushed(finished_run)
    assert (len(hub.repositories["you/plus"].commits), dict(hub.uploads)) == before
    assert not [request for request in hub.requests if request.split()[0] in ("POST", "PUT")]


def test_a_run_that_was_evaluated_since_gets_its_card_updated(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    pushed(finished_run)
    uploads = dict(hub.uploads)
    add_claim(finished_run)
    assert "updated" in pushed(finished_run)
    assert b"is as good as can be" in hub.repositories["you/plus"].head.files["README.md"]
    assert [message.split()[0] for message in our_commits(hub)] == ["Push", "Update"]
    assert hub.uploads == uploads
    assert len(hub.repositories["you/plus"].tags) == 1
    assert "nothing to do" in pushed(finished_run)


def add_claim(run: Path) -> None:
    claim = {
        "claim": "is as good as can be", "arm": "plus", "measure": "a test", "n": 40, "verdict": "cannot tell",
        "difference": {"value": 0.25, "low": -0.5, "high": 1.0, "stderr": 0.4, "n": 40}, "needed_n": None,
    }  # fmt: skip
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "results.json").write_text(json.dumps({"claims": [claim]}))


def test_another_run_is_refused_and_replaced_with_force(
    hub: HubServer, pushed: Push, recipe: Callable[..., Any], finished_run: Path, other_run: Path
) -> None:
    pushed(finished_run)
    repository = hub.repositories["you/plus"]
    first = repository.head
    hub.commit("you/plus", "by hand", first.files | {"notes.txt": b"of the old run"})
    options = ["--output_dir", str(other_run), "--repo_id", "you/plus"]
    assert_one_line_of_error(*recipe("push_to_hub.py", *options), "you/plus holds another push", "--force")
    assert len(our_commits(hub)) == 1

    assert "replaced" in pushed(other_run, "--force")
    assert len(our_commits(hub)) == 2
    assert arrived(hub) == on_disk(other_run / "hub" / "adapter")
    assert first in repository.commits
    assert set(repository.tags.values()) == {first.oid, repository.head.oid}


def test_a_merged_model_does_not_mix_with_an_adapter(
    hub: HubServer, pushed: Push, recipe: Callable[..., Any], finished_run: Path
) -> None:
    pushed(finished_run)
    options = ["--output_dir", str(finished_run), "--repo_id", "you/plus", "--merged"]
    assert_one_line_of_error(*recipe("push_to_hub.py", *options), "another push (adapter")
    pushed(finished_run, "--merged", "--force")
    assert arrived(hub).keys() == FILES["merged"]


@pytest.mark.parametrize(
    "files", [{"model.bin": b"x"}, {"run.json": b'{"run": "run-1", "files": {}}'}, {"run.json": b"{"}]
)
def test_a_repository_of_something_else_is_left_alone(
    hub: HubServer, recipe: Callable[..., Any], finished_run: Path, files: dict[str, bytes]
) -> None:
    hub.create("you/plus", files)
    options = ["--output_dir", str(finished_run), "--repo_id", "you/plus"]
    assert_one_line_of_error(*recipe("push_to_hub.py", *options), "files that lora_rlhf did not push", "--force")
    assert our_commits(hub) == []


def test_an_empty_repository_is_filled(hub: HubServer, pushed: Push, finished_run: Path) -> None:
    hub.create("you/plus")
    pushed(finished_run)
    assert arrived(hub) == on_disk(finished_run / "hub" / "adapter")
    assert not [request for request in hub.requests if "repos/create" in request]


def test_a_public_repository_is_not_taken_for_a_private_one(
    hub: HubServer, recipe: Callable[..., Any], finished_run: Path
) -> None:
    hub.create("you/plus")
    options = ["--output_dir", str(finished_run), "--repo_id", "you/plus", "--private"]
    assert_one_line_of_error(*recipe("push_to_hub.py", *options), "--private", "is public")
    assert our_commits(hub) == []


def test_what_is_pushed_follows_from_the_run_alone(finished_run: Path, tmp_path: Path) -> None:
    first = hub_folder(finished_run, "adapter", "you/plus", ask_hub=False)
    before = on_disk(first.path)
    again = hub_folder(finished_run, "adapter", "you/plus", ask_hub=False)
    assert (again.tag, on_disk(again.path)) == (first.tag, before)
    moved = finished_run.rename(tmp_path / "moved")
    assert hub_folder(moved, "adapter", "you/plus", ask_hub=False).tag == first.tag


def test_a_run_of_an_older_version_can_be_pushed(pushed: Push, finished_run: Path) -> None:
    config = (finished_run / "config.yaml").read_text()
    assert "  snapshots: 4\n" in config
    (finished_run / "config.yaml").write_text(config.replace("  snapshots: 4\n", ""))
    before = (finished_run / "config.yaml").read_bytes()
    pushed(finished_run, "--dry_run")
    assert (finished_run / "config.yaml").read_bytes() == before


# What is asked for


@pytest.mark.parametrize(
    "name", ["plus", "you/", "you/pl us", "you/a/b", "/plus", "you/-plus", "you/a--b", "you/x.git"]
)
def test_a_malformed_name_is_one_line_of_error(recipe: Callable[..., Any], finished_run: Path, name: str) -> None:
    status, printed = recipe("push_to_hub.py", "--output_dir", str(finished_run), "--repo_id", name)
    assert_one_line_of_error(status, printed, "--repo_id", "OWNER/NAME")
    assert not (finished_run / "hub").exists()


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        ("ppo", (), ("its ppo stage is missing", "recipes/ppo_lora.py")),
        ("compare", (), ("its compare stage is missing", "recipes/compare_lora.py")),
        ("merge", ("--merged",), ("--merged", "its merge stage is missing", "recipes/merge_lora.py")),
        ("reward", ("--reward_repo_id", "you/r"), ("--reward_repo_id", "its reward stage", "recipes/reward_lora.py")),
    ],
)
def test_an_unfinished_run_says_what_is_missing_and_sends_nothing(
    hub: HubServer,
    recipe: Callable[..., Any],
    finished_run: Path,
    stage: str,
    options: tuple[str, ...],
    said: tuple[str],
) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    del summary["seconds"][stage]
    (finished_run / "summary.json").write_text(json.dumps(summary))
    words = ["--output_dir", str(finished_run), "--repo_id", "you/plus", *options]
    assert_one_line_of_error(*recipe("push_to_hub.py", *words), *said, f"--config {finished_run / 'config.yaml'}")
    assert hub.requests == []


def test_help_says_what_is_pushed_and_how_to_load_it(recipe: Callable[..., Any]) -> None:
    status, printed = recipe("push_to_hub.py", "--help")
    assert status == 0
    for word in ("python recipes/push_to_hub.py", "load_plus(", "--merged", "--force", "--dry_run", "HF_TOKEN"):
        assert word in printed


def test_a_folder_without_a_run_is_one_line_of_error(recipe: Callable[..., Any], tmp_path: Path) -> None:
    options = ["--output_dir", str(tmp_path / "none"), "--repo_id", "you/plus", "--dry_run"]
    assert_one_line_of_error(*recipe("push_to_hub.py", *options), "holds no run", "direct_rlhf_lora.py")
    assert not (tmp_path / "none").exists()


def test_a_run_whose_merged_model_was_deleted_says_so(recipe: Callable[..., Any], finished_run: Path) -> None:
    (finished_run / "merged" / "config.json").unlink()
    options = ["--output_dir", str(finished_run), "--repo_id", "you/plus", "--merged", "--dry_run"]
    assert_one_line_of_error(*recipe("push_to_hub.py", *options), "no merged/config.json", "put back")


def test_without_a_merged_model_the_tokenizer_comes_from_the_base(
    hub: HubServer, pushed: Push, finished_run: Path
) -> None:
    import shutil

    pushed(finished_run)
    first = arrived(hub)
    shutil.rmtree(finished_run / "merged")
    pushed(finished_run, repo_id="you/second")
    assert arrived(hub, "you/second").keys() == first.keys()
    assert arrived(hub, "you/second")["tokenizer.json"] == first["tokenizer.json"]

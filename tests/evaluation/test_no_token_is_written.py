"""Tokens of the environment are used and never written: not in a file of a run, not in what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge_server import JudgeServer, Scripted
from recipe_runs import TINY, as_process

TOKENS = {
    "HF_TOKEN": "hf_TokenOfTheHubThatNobodyMaySee",
    "HUGGING_FACE_HUB_TOKEN": "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",
    "LORA_RLHF_JUDGE_API_KEY": "sk-KeyOfTheJudgeThatNobodyMaySee",
    "OPENAI_API_KEY": "sk-KeyOfAnotherJudgeThatNobodyMaySee",
    "WANDB_API_KEY": "40CharactersThatNobodyMaySee000000000000",
}
SMALL = ["--ppo.total_steps=1", "--reward.max_steps=1", "--sft.max_steps=1", "--ppo.num_ppo_epochs=1"]


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)


def leaks(folder: Path, *printed: str) -> list[str]:
    """Where a token stands, in whatever case and whatever file."""
    places = {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    places |= {f"printed {i}": text.encode() for i, text in enumerate(printed)}
    assert len(places) > len(printed)
    secrets = [token.encode().lower() for token in TOKENS.values()]
    return [place for place, content in places.items() if any(secret in content.lower() for secret in secrets)]


def test_the_search_finds_a_token(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file.bin").write_bytes(b"\x00" + TOKENS["HF_TOKEN"].upper().encode() + b"\xff")
    assert leaks(tmp_path, "fine", f"Bearer {TOKENS['OPENAI_API_KEY']}") == [
        str(tmp_path / "deep" / "file.bin"), "printed 1",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("tokens")
def test_a_run_and_its_evaluation_hold_no_token(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained = as_process("direct_rlhf_lora.py", *TINY, *SMALL, "--output_dir", str(folder))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    key = TOKENS["LORA_RLHF_JUDGE_API_KEY"]
    refusal = json.dumps({"error": {"message": f"Incorrect API key provided: {key}."}}).encode()
    judged = [
        "evaluate.py",
        "--output_dir",
        str(folder),
        "--suites",
        "moderation",
        "--limit",
        "2",
        "--judge_model",
        "x",
    ]
    with JudgeServer(script=[Scripted(status=401, body=refusal)] * 8) as judge:
        refused = as_process(*judged, "--judge_base_url", judge.base_url)
    assert refused.returncode == 2
    assert "Incorrect API key provided: [key]" in " ".join(refused.stdout.split())
    with JudgeServer(script=[Scripted(status=500, body=key.encode())]) as judge:
        evaluated = as_process(*judged, "--judge_base_url", judge.base_url)
        assert set(judge.keys) == {f"Bearer {key}"}  # it was used
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    pushed = as_process("push_to_hub.py", "--output_dir", str(folder), "--repo_id", "someone/plus", "--dry_run")
    printed = [text for done in (trained, refused, evaluated, pushed) for text in (done.stdout, done.stderr)]
    assert leaks(folder, *printed) == []
    assert (folder / "evaluation" / "results.json").is_file()

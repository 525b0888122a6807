"""What must not change what PPO learns: micro-batches, checkpointing, mixed passes, padding."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from trainer_cases import MakeTrainer, close, close_metrics, settled, text_length, watch, weights

from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase
from lora_rlhf.ppo import trainer as trainer_module
from lora_rlhf.ppo.rollout import Rollout


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_micro_batch_size_does_not_change_the_result(make_trainer: MakeTrainer, micro: int) -> None:
    results = []
    for size in (micro, 4):
        trainer = make_trainer(batch_size=8, num_mini_batches=2, micro_batch_size=size)
        metrics = trainer.step()
        assert 0 < metrics["ended_rate"] < 1  # answers of several lengths
        results.append((weights(trainer), metrics))
    close(results[0][0], results[1][0], 1e-5)
    close_metrics(results[0][1], results[1][1], 1e-4)


def test_checkpointing_does_not_change_the_result(make_trainer: MakeTrainer) -> None:
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(gradient_checkpointing=checkpointing)
        metrics = [trainer.step() for _ in range(2)]
        results.append((weights(trainer), metrics))
    close(results[0][0], results[1][0], 1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        close_metrics(one, other, 1e-4)


def test_scoring_in_one_mixed_pass_gives_the_same_metrics(make_trainer: MakeTrainer) -> None:
    runs = [
        [trainer.step() for _ in range(2)]
        for trainer in (make_trainer(mixed_adapter_scoring=mixed, scoring_batch_size=3) for mixed in (True, False))
    ]
    for one, other in zip(*runs, strict=True):
        close_metrics(one, other, 1e-4)


def test_base_weights_and_reward_adapter_stay_bit_identical(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(learning_rate=1e-2, num_ppo_epochs=2, gradient_checkpointing=True)

    def frozen() -> dict[str, torch.Tensor]:
        whole = {**trainer.base.model.state_dict(), **trainer.base.heads.state_dict(prefix="heads.")}
        learned = (f".{POLICY}.", f".{VALUE}.")
        return {n: t.clone() for n, t in whole.items() if not any(part in f".{n}." for part in learned)}

    before, learned = frozen(), weights(trainer)
    for _ in range(2):
        trainer.step()
    after = frozen()
    assert before.keys() == after.keys() and any("reward" in n for n in before)
    assert any(t.dtype == torch.uint8 for t in before.values())  # the 4-bit weights are among them
    assert [n for n in before if not torch.equal(before[n], after[n])] == []
    assert not any(torch.equal(a, b) for a, b in zip(learned, weights(trainer), strict=True))


def live_dropout(base: SharedBase) -> list[str]:
    """Modules that would drop something if they ran now."""
    live = [(name, module) for name, module in base.model.named_modules() if module.training]
    return [name for name, module in live if getattr(module, "p", 0.0) or getattr(module, "attention_dropout", 0.0)]


@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
def test_nothing_is_dropped_in_any_role_even_where_the_base_was_trained_with_dropout(
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Any,
    tmp_path: Any,
    attention_dropout: float,
) -> None:
    folder = tmp_path / "dropping"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": attention_dropout}))
    trainer = make_trainer(model=str(folder), gradient_checkpointing=True)
    dropping: list[str] = []
    roles: set[str] = set()

    def note(role: str, *_: Any) -> None:
        roles.add(role)
        dropping.extend(live_dropout(trainer.base))

    watch(monkeypatch, trainer.base, "hidden", note)
    metrics = trainer.step()
    assert roles == {POLICY, REFERENCE, REWARD, VALUE}
    assert metrics["first_ratio_deviation"] < 1e-5
    assert dropping == []


def widened(rollout: Rollout, pad: int, left: int, right: int) -> Rollout:
    """The same answers in wider arrays."""

    def wider(x: torch.Tensor, left: int, right: int, fill: float) -> torch.Tensor:
        return torch.nn.functional.pad(x, (left, right), value=fill)

    return replace(
        rollout,
        query_ids=wider(rollout.query_ids, left, 0, pad), query_mask=wider(rollout.query_mask, left, 0, False),
        response_ids=wider(rollout.response_ids, 0, right, pad),
        action_mask=wider(rollout.action_mask, 0, right, False), score_ids=wider(rollout.score_ids, 0, right, pad),
        score_mask=wider(rollout.score_mask, 0, right, False),
        sampled_logprobs=wider(rollout.sampled_logprobs, 0, right, 0.0),
    )  # fmt: skip


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_padding_changes_no_metric_and_no_parameter(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, whiten_rewards: bool
) -> None:
    sampled = trainer_module.sampled_answers
    results = []
    for columns in (0, 5):
        trainer = make_trainer(batch_size=8, num_ppo_epochs=2, whiten_rewards=whiten_rewards)
        monkeypatch.setattr(
            trainer_module,
            "sampled_answers",
            lambda *args, n=columns: widened(sampled(*args), tokenizer.pad_token_id, n, n),
        )
        results.append((trainer.step(), weights(trainer)))
    assert 0 < results[0][0]["ended_rate"] < 1
    close_metrics(results[0][0], results[1][0], 1e-4)
    close(results[0][1], results[1][1], 1e-5)


@pytest.mark.parametrize("function", [None, text_length], ids=["adapter reward", "function reward"])
def test_the_same_seed_gives_the_same_numbers_bit_for_bit(make_trainer: MakeTrainer, function: Any) -> None:
    runs = []
    for seed in (1, 1, 2):
        trainer = make_trainer(function, seed=seed, num_ppo_epochs=2, num_mini_batches=2)
        runs.append([settled(trainer.step()) for _ in range(3)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]

"""The arms: adapters share one base, whole models have their own, and fingerprints tell contents apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_rlhf.base.adapters import lora_config
from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.config import LoraSettings, RunConfig
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.answers import answer_logprob, given_answers, kl_to_base
from lora_rlhf.evaluation.loaded_arms import LoadedArm, folder_fingerprint, named_arms, run_arms
from lora_rlhf.evaluation.result_cache import ResultCache
from lora_rlhf.ppo.decoding import Sampling

IDS, MASK = torch.tensor([[5, 60, 70, 80]]), torch.ones(1, 4, dtype=torch.bool)
CHATS = [[{"role": "user", "content": text}] for text in ("hi", "why is the sea salty?", "a b c", "tell me more")]
SAMPLING = Sampling(8, 1.0)


@pytest.fixture
def adapters(make_base: Callable[..., SharedBase], make_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """A folder with `plus` and `instruct`, random adapters of different rank and targets."""
    make_base(seed=1).save_adapter(POLICY, tmp_path / "plus")
    other = make_config(lora=LoraSettings(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"]))
    make_base(other, seed=2).save_adapter(POLICY, tmp_path / "instruct")
    return tmp_path


def arms_of(adapters: Path, config: RunConfig, **more: str) -> dict[str, LoadedArm]:
    names = {"plus": str(adapters / "plus"), "base": config.model_name_or_path, "instruct": str(adapters / "instruct")}
    return named_arms(config, names | more)


def test_adapters_share_the_base_and_come_in_the_order_of_every_table(
    adapters: Path, make_config: Callable[..., RunConfig]
) -> None:
    arms = arms_of(adapters, make_config())
    assert list(arms) == ["base", "instruct", "plus"]
    assert len({id(arm.base) for arm in arms.values()}) == 1
    assert arms["base"].role == REFERENCE
    assert len({arm.fingerprint for arm in arms.values()}) == 3


@pytest.mark.parametrize("name", ["instruct", "plus"])
def test_an_arm_on_the_shared_base_is_the_arm_loaded_alone(
    adapters: Path, make_config: Callable[..., RunConfig], name: str
) -> None:
    from peft import PeftModel

    config = make_config(load_in_4bit=False)
    arm = arms_of(adapters, config)[name]
    alone = PeftModel.from_pretrained(load_causal_lm(config), str(adapters / name)).eval()
    with torch.no_grad():
        states = arm.base.hidden(arm.role, IDS, MASK)
        logits = alone(IDS).logits
    torch.testing.assert_close(arm.base.lm_head(states), logits, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(arm.base.hidden(REFERENCE, IDS, MASK), states, atol=1e-3)


def test_a_whole_model_gets_a_base_of_its_own(
    adapters: Path, make_config: Callable[..., RunConfig], tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "other")
    arms = arms_of(adapters, make_config(), instruct=str(tmp_path / "other"))
    assert arms["instruct"].base is not arms["base"].base
    assert (arms["instruct"].role, arms["plus"].base) == (REFERENCE, arms["base"].base)
    assert arms["instruct"].fingerprint == arms["base"].fingerprint  # the same content under another name


def test_a_fingerprint_follows_the_content_and_not_the_name(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "plus", tmp_path / "copy")
    assert folder_fingerprint(tmp_path / "copy") == folder_fingerprint(adapters / "plus")
    file = tmp_path / "copy" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert folder_fingerprint(tmp_path / "copy") != folder_fingerprint(adapters / "plus")


def test_settings_that_change_the_numbers_change_the_fingerprint(
    adapters: Path, make_config: Callable[..., RunConfig]
) -> None:
    quantized, whole = (arms_of(adapters, make_config(load_in_4bit=bits)) for bits in (True, False))
    assert all(quantized[name].fingerprint != whole[name].fingerprint for name in quantized)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"base": "x", "plsu": "y"}, "an arm is one of base, instruct, plus, not 'plsu'"),
        ({"plus": "y"}, "base is missing"),
        ({"base": "./nowhere"}, "no folder ./nowhere"),
    ],
)
def test_wrong_names_are_said(make_config: Callable[..., RunConfig], names: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        named_arms(make_config(), names)


def test_an_unfinished_run_says_how_to_finish_it(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no finished policy_adapter: run `python recipes/direct_rlhf_lora.py"):
        run_arms(make_config(), tmp_path)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_kept_batch_by_batch_and_not_sampled_again(
    adapters: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    arm, cache, seen = arms_of(adapters, make_config())["plus"], ResultCache(tmp_path / "cache"), []
    first = given_answers(arm, CHATS, SAMPLING, 3, 0, cache, seen.append)
    assert seen == [3, 4]
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    assert len(kept) == 2
    assert given_answers(arm, CHATS, SAMPLING, 3, 0, cache) == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == kept
    assert given_answers(arm, CHATS, SAMPLING, 3, 1, cache).texts != first.texts
    assert all(ids[-1] == arm.tokenizer.eos_token_id for ids, e in zip(first.answer_ids, first.ended, strict=True) if e)


def test_the_log_prob_of_an_answer_is_a_plain_sum_over_its_tokens(
    adapters: Path, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    arms = arms_of(adapters, make_config())
    given = given_answers(arms["plus"], CHATS, SAMPLING, 4, 0, ResultCache(tmp_path / "cache"))
    expected = []
    for name in ("plus", "base"):
        sums = []
        for prompt, answer in zip(given.prompt_ids, given.answer_ids, strict=True):
            row = torch.tensor([prompt + answer])
            with torch.no_grad():
                states = arms[name].base.hidden(arms[name].role, row, torch.ones_like(row, dtype=torch.bool))
            logprobs = torch.log_softmax(arms[name].base.lm_head(states[0]).float() / 0.7, -1)
            sums.append(sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
        expected.append(sums)
    assert answer_logprob(arms["plus"], given, 0.7, batch=2) == pytest.approx(expected[0], abs=1e-3)
    kl = kl_to_base(arms["plus"], arms["base"], given, 0.7)
    assert kl == pytest.approx([a - b for a, b in zip(*expected, strict=True)], abs=1e-3)
    assert kl_to_base(arms["base"], arms["base"], given, 0.7) == [0.0] * 4


def test_the_base_played_alone_takes_no_adapter_of_another_arm(
    adapters: Path, make_config: Callable[..., RunConfig]
) -> None:
    config = make_config()
    arm = arms_of(adapters, config)["base"]
    alone = SharedBase(load_causal_lm(config), lora_config(config.lora), torch.float32)
    with torch.no_grad():
        assert torch.equal(arm.base.hidden(arm.role, IDS, MASK), alone.hidden(REFERENCE, IDS, MASK))

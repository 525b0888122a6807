"""Arms answer together as each would alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_rlhf.base.packing import right_padded
from lora_rlhf.base.shared import INSTRUCT, POLICY, REFERENCE, REWARD, SharedBase
from lora_rlhf.chat.comparison import Answer, ChatComparison, settled_text
from lora_rlhf.chat.mixed_decoding import ChatSampling, MixedDecoding
from lora_rlhf.chat.prompts import clean_text
from lora_rlhf.data.chat import Message, answer_ids, prompt_ids
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.loaded_arms import LoadedArm
from lora_rlhf.ppo.decoding import Sampling
from lora_rlhf.ppo.rollout import sampled_answers

QUESTION: list[Message] = [{"role": "user", "content": "How do I keep basil alive?"}]
LONGER: list[Message] = [*QUESTION, {"role": "assistant", "content": "Water it."}, {"role": "user", "content": "Why?"}]
GREEDY = ChatSampling(temperature=0, max_tokens=24)


def last(comparison: ChatComparison, asked: dict[str, list[Message]], sampling: ChatSampling) -> dict[str, Answer]:
    *_, answers = comparison.answers(asked, sampling)
    return answers


def decoded(base: SharedBase, roles: list[str], prompts: list[list[int]], tokenizer: Any) -> list[list[int]]:
    decoding = MixedDecoding(base, roles, prompts, tokenizer, GREEDY)
    while decoding.live:
        decoding.step()
    return decoding.tokens


@pytest.mark.parametrize("copy", [False, True], ids=["4 bits", "16-bit copy"])
def test_greedy_answers_of_the_mixed_batch_are_those_of_each_arm_alone(
    base: SharedBase, tokenizer: Any, copy: bool
) -> None:
    roles = [REFERENCE, INSTRUCT, POLICY]
    prompts = [prompt_ids(tokenizer, m) for m in (QUESTION, LONGER, QUESTION)]  # of different lengths
    with base.layers.working_copy() if copy else base.role(POLICY):
        together = decoded(base, roles, prompts, tokenizer)
        for role, prompt, tokens in zip(roles, prompts, together, strict=True):
            assert decoded(base, [role], [prompt], tokenizer) == [tokens]
    assert len({tuple(tokens) for tokens in together}) == 3


def test_a_greedy_answer_is_the_argmax_of_a_whole_forward_pass(base: SharedBase, tokenizer: Any) -> None:
    prompt = prompt_ids(tokenizer, QUESTION)
    tokens = decoded(base, [POLICY], [prompt], tokenizer)[0]
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        states = base.hidden(POLICY, ids, torch.ones_like(ids, dtype=torch.bool))
        likeliest = (states @ base.lm_head.weight.T).argmax(-1)[0, len(prompt) - 1 : -1]
    assert likeliest.tolist() == tokens


def test_sampled_answers_are_the_same_with_and_without_company(comparison: ChatComparison) -> None:
    sampling = ChatSampling(temperature=1.0, top_p=0.9, max_tokens=24, seed=3)
    together = last(comparison, dict.fromkeys(comparison.arms, QUESTION), sampling)
    for arm, answer in together.items():
        alone = last(comparison, {arm: QUESTION}, sampling)[arm]
        assert (alone.text, alone.tokens, alone.score) == (answer.text, answer.tokens, pytest.approx(answer.score))
    other = last(comparison, dict.fromkeys(comparison.arms, QUESTION), ChatSampling(1.0, 0.9, 24, seed=4))
    assert {n: a.text for n, a in other.items()} != {n: a.text for n, a in together.items()}


def test_arms_draw_the_same_random_numbers(base: SharedBase, tokenizer: Any) -> None:
    prompt = prompt_ids(tokenizer, QUESTION)
    decoding = MixedDecoding(base, [POLICY, POLICY], [prompt, prompt], tokenizer, ChatSampling(1.0, 1.0, 16, 7))
    while decoding.live:
        decoding.step()
    assert decoding.tokens[0] == decoding.tokens[1]


def test_top_p_samples_from_the_smallest_set_with_that_probability(base: SharedBase, tokenizer: Any) -> None:
    prompt = torch.tensor([prompt_ids(tokenizer, QUESTION)])
    with torch.no_grad():
        states = base.hidden(POLICY, prompt, torch.ones_like(prompt, dtype=torch.bool))[0, -1]
    probs, order = torch.softmax(states @ base.lm_head.weight.T, -1).sort(descending=True)
    likeliest = set(order[: int((probs.cumsum(0) < 0.3).sum()) + 1].tolist())
    found = {
        top_p: {
            first_token(base, prompt[0].tolist(), tokenizer, ChatSampling(1.0, top_p, 1, seed)) for seed in range(60)
        }
        for top_p in (0.3, 1.0)
    }
    assert found[0.3] <= likeliest and not found[1.0] <= likeliest
    assert len(found[0.3]) > 1


def first_token(base: SharedBase, prompt: list[int], tokenizer: Any, sampling: ChatSampling) -> int:
    decoding = MixedDecoding(base, [POLICY], [prompt], tokenizer, sampling)
    decoding.step()
    return decoding.tokens[0][0]


def test_an_arm_that_is_another_model_streams_beside(
    comparison: ChatComparison, make_base: Callable[..., SharedBase], tokenizer: Any
) -> None:
    own = make_base(seed=9, roles=())
    comparison.arms["instruct"] = LoadedArm("instruct", own, POLICY, tokenizer, "own")
    lengths = [
        [answer.tokens for answer in answers.values()]
        for answers in comparison.answers(dict.fromkeys(comparison.arms, QUESTION), GREEDY)
    ]
    assert lengths[0] == [1, 1, 1] and lengths[1] == [2, 2, 2]
    prompt = prompt_ids(tokenizer, QUESTION)
    found = last(comparison, {"instruct": QUESTION}, GREEDY)["instruct"]
    expected = decoded(own, [POLICY], [prompt], tokenizer)[0]
    assert found.text == clean_text(tokenizer.decode(expected, skip_special_tokens=True)).strip()


def test_a_stop_ends_all_answers_at_the_next_token(comparison: ChatComparison) -> None:
    stop, seen = threading.Event(), []
    for answers in comparison.answers(dict.fromkeys(comparison.arms, QUESTION), GREEDY, stop):
        seen.append(max(answer.tokens for answer in answers.values()))
        if len(seen) == 3:
            stop.set()
    assert seen == [1, 2, 3, 3]
    assert all(answer.stopped and answer.finished and answer.score is None for answer in answers.values())
    assert comparison.under_way == 0


def test_whoever_leaves_takes_the_work_along(comparison: ChatComparison) -> None:
    answers = comparison.answers({"plus": QUESTION}, GREEDY)
    next(answers)
    assert comparison.under_way == 1
    answers.close()
    assert comparison.under_way == 0
    assert last(comparison, {"plus": QUESTION}, GREEDY)["plus"].finished


def test_answers_say_how_they_ended(comparison: ChatComparison, tokenizer: Any) -> None:
    cut = last(comparison, {"plus": QUESTION}, ChatSampling(0, 1.0, 2))["plus"]
    assert (cut.tokens, cut.ended, cut.stopped, cut.finished) == (2, False, False, True)
    assert cut.tokens_per_second == pytest.approx(cut.tokens / cut.seconds)
    whole = last(comparison, {"plus": QUESTION}, ChatSampling(0, 1.0, 24))["plus"]
    comparison.stop_strings = (whole.text[3:6],)
    ended = last(comparison, {"plus": QUESTION}, ChatSampling(0, 1.0, 24))["plus"]
    assert ended.text == whole.text[: whole.text.index(whole.text[3:6])].strip()
    assert ended.ended and ended.end_token is None and ended.tokens < whole.tokens


def test_the_token_that_closes_a_turn_ends_an_answer(comparison: ChatComparison, tokenizer: Any) -> None:
    base, prompt = comparison.arms["plus"].base, prompt_ids(tokenizer, QUESTION)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<s>"
    with torch.no_grad():  # Plus says nothing else
        state = base.hidden(POLICY, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.bool))[0, -1]
        base.lm_head.weight[end] = 100 * state / state.norm()
    answer = last(comparison, {"plus": QUESTION}, GREEDY)["plus"]
    assert (answer.text, answer.tokens, answer.ended, answer.end_token) == ("", 1, True, end)
    assert comparison.kl_of_plus(QUESTION, "", end) != 0.0 == comparison.kl_of_plus(QUESTION, "", None)


def test_an_eos_ends_one_answer_while_others_go_on(comparison: ChatComparison, tokenizer: Any) -> None:
    """The third token that Plus would choose is made the EOS."""
    prompt = prompt_ids(tokenizer, QUESTION)
    arms = comparison.arms
    rows = {n: decoded(arms[n].base, [arms[n].role], [prompt], tokenizer)[0] for n in arms}
    end = next(t for t in rows["plus"][2:] if all(t not in rows[n] for n in ("base", "instruct")))
    at = rows["plus"].index(end)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    decoding = MixedDecoding(arms["base"].base, [REFERENCE, POLICY, INSTRUCT], [prompt] * 3, tokenizer, GREEDY)
    while decoding.live:
        decoding.step()
    assert decoding.ended == [False, True, False]
    assert decoding.tokens == [rows["base"], rows["plus"][: at + 1], rows["instruct"]]


def test_scores_are_the_rewards_of_prompt_and_answer(comparison: ChatComparison, tokenizer: Any) -> None:
    answers = last(comparison, {"base": QUESTION, "plus": LONGER}, GREEDY)
    rows = [
        prompt_ids(tokenizer, messages) + answer_ids(tokenizer, answers[arm].text)  # EOS, as in training
        for arm, messages in (("base", QUESTION), ("plus", LONGER))
    ]
    assert not any(answer.ended for answer in answers.values())
    ids, mask = right_padded(rows, tokenizer.pad_token_id, torch.device("cpu"))
    expected = comparison.arms["base"].base.scores(REWARD, ids, mask, 2)
    torch.testing.assert_close(torch.tensor([answers["base"].score, answers["plus"].score]), expected)


@pytest.mark.parametrize("end", ["EOS", "stop string"])
def test_kl_is_the_difference_of_log_probs_over_the_answer(
    comparison: ChatComparison, tokenizer: Any, end: str
) -> None:
    base, prompt = comparison.arms["plus"].base, prompt_ids(tokenizer, QUESTION)
    tokens = answer_ids(tokenizer, "Water it.")
    end_token = tokens[-1] if end == "EOS" else None
    if end_token is None:  # the EOS was not sampled
        tokens.pop()
    ids = torch.tensor([prompt + tokens])
    logprobs = []
    with torch.no_grad():
        for role in (POLICY, REFERENCE):
            states = base.hidden(role, ids, torch.ones_like(ids, dtype=torch.bool))
            logprobs.append(torch.log_softmax(states @ base.lm_head.weight.T, -1)[0, len(prompt) - 1 : -1])
    chosen = torch.tensor(tokens)[:, None]
    expected = (logprobs[0].gather(1, chosen) - logprobs[1].gather(1, chosen)).sum().item()
    assert comparison.kl_of_plus(QUESTION, "Water it.", end_token) == pytest.approx(expected, abs=1e-3)
    del comparison.arms["plus"]
    with pytest.raises(UserError, match="no Plus"):
        comparison.kl_of_plus(QUESTION, "Water it.", None)


def test_old_rounds_are_left_out_with_a_notice_and_a_message_that_cannot_fit_is_refused(
    comparison: ChatComparison,
) -> None:
    rounds = [
        message
        for i in range(40)
        for message in (
            {"role": "user", "content": f"question {i} about basil"},
            {"role": "assistant", "content": f"answer {i}"},
        )
    ]
    answer = last(comparison, {"plus": [*rounds, *QUESTION]}, GREEDY)["plus"]
    assert 0 < answer.left_out < 40
    assert answer.text == last(comparison, {"plus": [*rounds[2 * answer.left_out :], *QUESTION]}, GREEDY)["plus"].text
    with pytest.raises(UserError, match="too long: .* tokens where 232 fit"):
        next(comparison.answers({"plus": [{"role": "user", "content": "basil " * 2000}]}, GREEDY))
    assert comparison.under_way == 0


def test_a_rollout_and_the_chat_give_the_same_greedy_answer(comparison: ChatComparison, tokenizer: Any) -> None:
    base, prompt = comparison.arms["plus"].base, prompt_ids(tokenizer, QUESTION)
    sampling = Sampling(24, temperature=1e-4, expand_weights=False)
    rollout = sampled_answers(base, POLICY, [prompt], sampling, tokenizer, torch.Generator().manual_seed(0))
    assert last(comparison, {"plus": QUESTION}, GREEDY)["plus"].text == clean_text(rollout.texts[0])


def test_text_in_the_making_holds_back_what_may_still_change() -> None:
    assert settled_text(" basil \N{REPLACEMENT CHARACTER}", ()) == "basil "
    assert settled_text("fine.\n\nHum", ("\n\nHuman:",)) == "fine."
    assert settled_text("fine.\n\nHumble", ("\n\nHuman:",)) == "fine.\n\nHumble"


def test_a_reward_that_cannot_score_chats_is_found_out(comparison: ChatComparison) -> None:
    assert comparison.without_failing_reward() is None and comparison.score_unit == "raw"

    def fails(answers: Any) -> Any:
        raise KeyError("difficulty")

    assert comparison.reward is not None
    comparison.reward.sources[0].scores = fails  # type: ignore[method-assign]
    assert comparison.without_failing_reward() == "KeyError: 'difficulty'"
    assert last(comparison, {"plus": QUESTION}, GREEDY)["plus"].score is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.5), ("temperature", float("nan")), ("temperature", "hot"),
        ("temperature", None), ("top_p", 0), ("top_p", 1.1), ("max_tokens", 0), ("max_tokens", 65), ("max_tokens", 1.5),
        ("max_tokens", True), ("seed", -1), ("seed", 2**32), ("seed", [1]), ("seed", float("inf")),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{field} is a (whole )?number from"):
        ChatSampling(**{"max_tokens": 8, field: value}).checked(64)


def test_whole_numbers_may_come_as_floats() -> None:
    assert ChatSampling(1, 1, 8.0, 3.0).checked(64) == ChatSampling(1.0, 1.0, 8, 3)  # type: ignore[arg-type]

"""Chat format: prompts and answers become the token ids of one dialogue, in the template that the config asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_rlhf.base.embedded import build_tiny_model
from lora_rlhf.base.tokenizer import load_tokenizer
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import CHATML, HUMAN_ASSISTANT, answer_ids, prompt_ids, set_chat_template
from lora_rlhf.errors import UserError

QUESTION = [{"role": "user", "content": "Why?"}]
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(params=["chatml", "human_assistant"])
def of_template(request: pytest.FixtureRequest, make_config: Callable[..., RunConfig]) -> Any:
    """The tiny model's tokenizer with each template in turn."""
    return load_tokenizer(make_config(chat_template=None if request.param == "chatml" else request.param))


# Ids


def test_an_answer_ends_with_eos_and_holds_no_other(of_template: Any) -> None:
    ids = answer_ids(of_template, "Because it is.")
    assert ids[-1] == of_template.eos_token_id
    assert of_template.eos_token_id not in ids[:-1]
    assert of_template.decode(ids[:-1]).lstrip() == "Because it is."


@pytest.mark.parametrize("prompt", [QUESTION, DIALOGUE])
def test_prompt_and_answer_are_the_dialogue_that_the_template_renders(
    of_template: Any, prompt: list[dict[str, str]]
) -> None:
    ids = prompt_ids(of_template, prompt) + answer_ids(of_template, "Because it is.")
    whole = [*prompt, {"role": "assistant", "content": "Because it is."}]
    assert of_template.decode(ids) == of_template.apply_chat_template(whole, tokenize=False)


def test_a_prompt_begins_with_bos_at_most_once(of_template: Any) -> None:
    ids = prompt_ids(of_template, DIALOGUE)
    assert ids.count(of_template.bos_token_id) == of_template.chat_template.count("bos_token")
    assert of_template.bos_token_id not in ids[1:]


def test_a_prompt_goes_on_from_the_prompt_before_it(of_template: Any) -> None:
    first = of_template.decode(prompt_ids(of_template, DIALOGUE[:2]))
    assert of_template.decode(prompt_ids(of_template, DIALOGUE)).startswith(first)


def test_special_tokens_in_chatml_are_single_ids(tokenizer: Any) -> None:
    ids = prompt_ids(tokenizer, QUESTION)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (2, 1)
    assert end == tokenizer.eos_token_id


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF), min_size=1, max_size=30))
def test_any_answer_comes_back_from_its_ids(tokenizer: Any, answer: str) -> None:
    ids = answer_ids(tokenizer, answer)
    assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == answer


# Formats


def test_human_assistant_is_the_format_of_hh(make_config: Callable[..., RunConfig]) -> None:
    tokenizer = load_tokenizer(make_config(chat_template="human_assistant"))

    def text(messages: list[dict[str, str]], **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert text(QUESTION, add_generation_prompt=True) == "<s>\n\nHuman: Why?\n\nAssistant:"
    assert text(DIALOGUE, add_generation_prompt=True) == (
        "<s>Be brief.\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
    )
    assert text([*QUESTION, {"role": "assistant", "content": "Because."}]) == (
        "<s>\n\nHuman: Why?\n\nAssistant: Because.<|im_end|>"
    )


def test_chatml_adds_no_system_turn_and_ends_with_the_end_mark(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(DIALOGUE[1:3], tokenize=False)
    assert text == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>"
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


# Which template


def test_the_tokenizers_own_template_is_kept(tokenizer: Any) -> None:
    tokenizer.chat_template = "own"
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == "own"


def test_a_base_model_without_a_template_gets_human_assistant(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    build_tiny_model(tmp_path / "base", chat_template=None)
    assert load_tokenizer(make_config(model_name_or_path=str(tmp_path / "base"))).chat_template == HUMAN_ASSISTANT


def test_the_configs_template_replaces_the_tokenizers_own(make_config: Callable[..., RunConfig]) -> None:
    assert load_tokenizer(make_config()).chat_template == CHATML
    assert load_tokenizer(make_config(chat_template="human_assistant")).chat_template == HUMAN_ASSISTANT


def test_another_model_keeps_its_own_template_whatever_the_config_says(
    make_config: Callable[..., RunConfig], tiny_folder: Path
) -> None:
    config = make_config(chat_template="human_assistant")
    assert load_tokenizer(config, str(tiny_folder)).chat_template == CHATML


def test_a_jinja_file_is_a_template(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    tokenizer = load_tokenizer(make_config(chat_template=str(tmp_path / "own.jinja")))
    assert tokenizer.decode(prompt_ids(tokenizer, QUESTION)) == "[Why?]"


def test_the_template_is_saved_with_the_tokenizer(of_template: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    of_template.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.chat_template == of_template.chat_template
    assert prompt_ids(loaded, DIALOGUE) == prompt_ids(of_template, DIALOGUE)
    assert answer_ids(loaded, "Because.") == answer_ids(of_template, "Because.")


@pytest.mark.parametrize("name", ["human_asistant", "away/own.jinja", "."])
def test_a_template_that_is_neither_name_nor_file_is_refused(tokenizer: Any, name: str) -> None:
    with pytest.raises(UserError) as error:
        set_chat_template(tokenizer, name)
    assert f"chat_template: {name}" in str(error.value)
    assert "human_assistant" in str(error.value)


def test_a_file_that_is_no_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"own\.jinja"):
        set_chat_template(tokenizer, str(tmp_path / "own.jinja"))


@pytest.mark.parametrize("text", ["{% for message in messages %}", "{{ message.content", "{{ nothing_known() }}"])
def test_a_template_that_does_not_render_is_refused_before_any_work(
    make_config: Callable[..., RunConfig], tmp_path: Path, text: str
) -> None:
    (tmp_path / "own.jinja").write_text(text)
    with pytest.raises(UserError, match="chat_template"):
        load_tokenizer(make_config(chat_template=str(tmp_path / "own.jinja")))


def test_a_template_file_that_leaves_the_question_out_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Any text is a template.")
    with pytest.raises(UserError, match="leaves the question out"):
        set_chat_template(tokenizer, str(tmp_path / "notes.txt"))


def test_a_template_file_with_a_byte_order_mark_renders_without_it(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHATML, encoding="utf-8-sig")
    set_chat_template(tokenizer, str(tmp_path / "chat.jinja"))
    assert tokenizer.chat_template == CHATML

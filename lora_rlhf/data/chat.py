"""Chat format: templates, and the one way in which prompts and answers become token ids.

A dialogue is always `prompt ids + answer ids + EOS`, whoever reads it: reward training, SFT, PPO and scoring all call
the functions here, so that the last real token of every answer that is scored is its EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_rlhf.errors import UserError

Message = dict[str, str]
"""One turn: `role` (system, user or assistant) and `content`."""

HUMAN_ASSISTANT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\n\nAssistant: ' + message['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
"""The format of HH-RLHF, for base models without a template. A base model goes on with the next "Human:" by itself."""

CHATML = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a system turn of its own and with nothing after the last end mark."""

TEMPLATES = {"human_assistant": HUMAN_ASSISTANT}
_QUESTION = "Quo vadis?"
_MODEL_ENDS = "model_ends"
"""Attribute of a tokenizer: ids that end an answer by the model's generation config."""
_KEPT_FRAME = "kept_frame"
"""Attribute of a tokenizer: its chat template, and what `_frame` returns of it."""


def chatml_with_system_turn(text: str) -> str:
    """Return ChatML that begins with the system turn `text` where a dialogue does not bring its own."""
    turn = "<|im_start|>system\\n" + text.replace("'", "\\'") + "<|im_end|>\\n"
    return "{% if messages[0]['role'] != 'system' %}{{ '" + turn + "' }}{% endif %}" + CHATML


def set_chat_template(tokenizer: Any, chat_template: str | None) -> None:
    """Give `tokenizer` the template of the config: a known name, a Jinja file, or its own where it has one.

    Raises:
        UserError: `chat_template` is neither a known name nor a readable file.
    """
    if chat_template in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[chat_template]
    elif chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:  # not UTF-8, or a name with a zero byte
            names = ", ".join(TEMPLATES)
            raise UserError(
                f"chat_template: {chat_template} is no readable Jinja file and none of: {names} ({error})"
            ) from None
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = HUMAN_ASSISTANT
    name = chat_template or "the tokenizer's own"
    try:
        before, _, _ = _frame(tokenizer)
    except Exception as error:  # whatever Jinja and the template itself raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"chat_template: {name} does not render a question and an answer: {reason}") from None
    if chat_template is not None and _QUESTION not in before:  # any text is a template
        raise UserError(f"chat_template: {name} leaves the question out")


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a dialogue up to where the assistant's next answer begins."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """Return the ids of an ended answer as they follow a prompt: its text (a space first, in some formats), then EOS.

    Tokenised behind a prompt, since a tokenizer may cut a text that stands alone otherwise.
    """
    before, lead, _ = _frame(tokenizer)
    start, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, before + lead + answer))
    if whole[: len(start)] != start:  # the tokenizer joins prompt and answer
        start, whole = [], tokenizer(lead + answer, add_special_tokens=False)["input_ids"]
    return [*whole[len(start) :], tokenizer.eos_token_id]


def ending_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: EOS, the token by which the template closes a turn, and the model's others."""
    turn_end = None if tokenizer.chat_template is None else turn_end_id(tokenizer)
    own = [tokenizer.eos_token_id] if turn_end is None else [tokenizer.eos_token_id, turn_end]
    return list(dict.fromkeys([*own, *getattr(tokenizer, _MODEL_ENDS, ())]))


def set_model_ends(tokenizer: Any, eos_token_id: object) -> None:
    """Let answers end at the tokens, too, that a model's generation config names: `ending_ids` returns them.

    Args:
        tokenizer: of the model.
        eos_token_id: as the generation config has it; what is no special or added token of the tokenizer ends nothing.
    """
    setattr(tokenizer, _MODEL_ENDS, special_ends(tokenizer, eos_token_id))


def special_ends(tokenizer: Any, eos_token_id: object) -> list[int]:
    """Return those of the ids that a generation config ends at which are special or added tokens of `tokenizer`.

    The others are left out: configs that nobody wrote on purpose hold a number that another tokenizer had.
    """
    ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    added = _added_ids(tokenizer)
    return [number for number in ids if type(number) is int and number in added]


def answer_lead(tokenizer: Any) -> str:
    """Return what the template writes between a prompt and the text of an answer: nothing, or a blank."""
    return _frame(tokenizer)[1]


def turn_end_id(tokenizer: Any) -> int | None:
    """Return the special token by which the template closes an assistant's turn, where it has one that is not EOS.

    Many chat models end their answers with such a token (`<|im_end|>`, `<end_of_turn>`) and have another one as EOS.
    None means that the template closes a turn with EOS, with plain text or not at all.
    """
    closing = _frame(tokenizer)[2].strip()
    first = tokenizer(closing, add_special_tokens=False)["input_ids"][:1]
    added = _added_ids(tokenizer) - {tokenizer.eos_token_id}
    return first[0] if first and first[0] in added else None


def _added_ids(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, and of those that were added to the vocabulary of text."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def _frame(tokenizer: Any) -> tuple[str, str, str]:
    """Return what the template renders (as a prompt, between prompt and answer, after an answer).

    Rendered once per tokenizer and template: every answer of a data set asks for it.
    """
    template, kept = getattr(tokenizer, _KEPT_FRAME, (None, None))
    if kept is None or template != tokenizer.chat_template:
        kept = _rendered_frame(tokenizer)
        setattr(tokenizer, _KEPT_FRAME, (tokenizer.chat_template, kept))
    return kept


def _rendered_frame(tokenizer: Any) -> tuple[str, str, str]:
    question: list[Message] = [{"role": "user", "content": _QUESTION}]
    before = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    mark = "\N{REFERENCE MARK}"
    whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": mark}], tokenize=False)
    lead = whole[len(before) :].partition(mark)[0] if whole.startswith(before) and mark in whole else ""
    return before, lead, whole.rpartition(mark)[2] if mark in whole else ""

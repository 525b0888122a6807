"""Preference pairs: every supported format gives the same shape, and whatever is left out is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preference_rows import Row, questions, row

from lora_rlhf.config import RunConfig
from lora_rlhf.data.preferences import PreferencePair, UnusableRow, pair_from_row, preference_pairs
from lora_rlhf.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


# Formats

SINGLE = PreferencePair((("user", "What is 2 + 2?"),), "It is four.", "It is five.")
MULTI = PreferencePair((("user", "Hi."), ("assistant", "Hello!"), ("user", "2 + 2?")), "Four.", "Five.")
OF_SYSTEM = PreferencePair((("system", "Be brief."), ("user", "2 + 2?")), "Four.", "Five.")
DIALOGUE = [user("Hi."), assistant("Hello!"), user("2 + 2?")]


@pytest.mark.parametrize(
    ("source", "pair"),
    [
        pytest.param(
            {"chosen": hh("What is 2 + 2?", "It is four."), "rejected": hh("What is 2 + 2?", "It is five.")},
            SINGLE,
            id="hh single turn",
        ),
        pytest.param(
            {"chosen": hh("Hi.", "Hello!", "2 + 2?", "Four."), "rejected": hh("Hi.", "Hello!", "2 + 2?", "Five.")},
            MULTI,
            id="hh multi-turn",
        ),
        pytest.param(
            {"prompt": "What is 2 + 2?", "chosen": " It is four.", "rejected": " It is five."},
            SINGLE,
            id="explicit prompt, text",
        ),
        pytest.param(
            {
                "prompt": [user("What is 2 + 2?")],
                "chosen": [assistant("It is four.")],
                "rejected": [assistant("It is five.")],
            },
            SINGLE,
            id="explicit prompt, messages",
        ),
        pytest.param(
            {"prompt": DIALOGUE, "chosen": [assistant("Four.")], "rejected": [assistant("Five.")]},
            MULTI,
            id="explicit prompt, messages, multi-turn",
        ),
        pytest.param(
            {"prompt": DIALOGUE, "chosen": "Four.", "rejected": "Five."},
            MULTI,
            id="prompt as messages, answers as text",
        ),
        pytest.param(
            {"prompt": hh("Hi.", "Hello!", "2 + 2?"), "chosen": "Four.", "rejected": "Five."},
            MULTI,
            id="explicit prompt in hh form",
        ),
        pytest.param(
            {"prompt": hh("Hi.", "Hello!", "2 + 2?") + "\n\nAssistant:", "chosen": " Four.", "rejected": " Five."},
            MULTI,
            id="explicit prompt in hh form that opens the answer",
        ),
        pytest.param(
            {"chosen": "What is 2 + 2? It is four.", "rejected": "What is 2 + 2? It is five."},
            PreferencePair((("user", "What is 2 + 2? It is"),), "four.", "five."),
            id="implicit prompt, text",
        ),
        pytest.param(
            {"chosen": "The sky: blue", "rejected": "The sky: black"},
            PreferencePair((("user", "The sky:"),), "blue", "black"),
            id="implicit prompt, text, cut at the start of a word",
        ),
        pytest.param(
            {"chosen": [*DIALOGUE, assistant("Four.")], "rejected": [*DIALOGUE, assistant("Five.")]},
            MULTI,
            id="implicit prompt, messages",
        ),
        pytest.param(
            {
                "chosen": [{"role": "system", "content": "Be brief."}, user("2 + 2?"), assistant("Four.")],
                "rejected": [{"role": "system", "content": "Be brief."}, user("2 + 2?"), assistant("Five.")],
            },
            OF_SYSTEM,
            id="system turn",
        ),
        pytest.param(
            {
                "prompt": "What is 2 + 2?",
                "chosen": [user("What is 2 + 2?"), assistant("It is four.")],
                "rejected": [user("What is 2 + 2?"), assistant("It is five.")],
            },
            SINGLE,
            id="prompt as text beside whole dialogues, as in ultrafeedback_binarized",
        ),
    ],
)
def test_every_format_gives_the_same_pair(source: Row, pair: PreferencePair) -> None:
    assert pair_from_row(source) == pair


def test_a_pair_keeps_the_rows_other_columns() -> None:
    pair = pair_from_row(row("Why?") | {"source": "forum", "score": 3})
    assert dict(pair.columns) == {"source": "forum", "score": 3}
    assert pair.messages == [user("Why?")]


def test_an_empty_prompt_column_means_an_implicit_prompt() -> None:
    source = {"prompt": None, "chosen": hh("Hi.", "Hello!"), "rejected": hh("Hi.", "Go.")}
    assert pair_from_row(source).prompt == (("user", "Hi."),)


def test_blank_lines_inside_a_turn_stay_in_it() -> None:
    pair = pair_from_row({"chosen": hh("Hi.\n\nThere.", "One.\n\nTwo."), "rejected": hh("Hi.\n\nThere.", "No.")})
    assert (pair.prompt, pair.chosen) == ((("user", "Hi.\n\nThere."),), "One.\n\nTwo.")


TEXT = st.text("abc .\n", min_size=1, max_size=20).filter(lambda t: t.strip())


@given(st.lists(TEXT, min_size=1, max_size=5).filter(lambda t: len(t) % 2 == 1), TEXT, TEXT)
def test_hh_text_and_messages_of_a_dialogue_give_the_same_pair(turns: list[str], good: str, bad: str) -> None:
    turns = [turn.strip() for turn in turns]
    messages = [(user, assistant)[i % 2](turn) for i, turn in enumerate(turns)]

    def outcome(source: Row) -> PreferencePair | str:
        try:
            return pair_from_row(source)
        except UnusableRow as reason:
            return str(reason)

    as_text = outcome({"chosen": hh(*turns, good), "rejected": hh(*turns, bad)})
    assert as_text == outcome({"chosen": [*messages, assistant(good)], "rejected": [*messages, assistant(bad)]})
    assert as_text == outcome({"prompt": messages, "chosen": good, "rejected": bad})
    assert (as_text == "chosen equals rejected") == (good.strip() == bad.strip())


# Rows that cannot be used

UNUSABLE = [
    (
        {"chosen": hh("Hi.", "A", "Q", "B"), "rejected": hh("Hi.", "Z", "Q", "C")},
        "dialogues differ before the last turn",
    ),
    ({"chosen": hh("Hi.", "A"), "rejected": hh("Ho.", "B")}, "dialogues differ before the last turn"),
    ({"chosen": hh("Hi.", "A", "And?"), "rejected": hh("Hi.", "A", "So?")}, "last turn is not the assistant's"),
    ({"chosen": [user("Hi."), user("A")], "rejected": [user("Hi."), user("B")]}, "last turn is not the assistant's"),
    ({"prompt": "", "chosen": "A", "rejected": "B"}, "empty prompt"),
    ({"prompt": " \n", "chosen": "A", "rejected": "B"}, "empty prompt"),
    ({"chosen": [assistant("A")], "rejected": [assistant("B")]}, "empty prompt"),
    ({"chosen": "One.", "rejected": "Two."}, "empty prompt"),
    ({"prompt": "Q", "chosen": "", "rejected": "B"}, "empty answer"),
    ({"prompt": "Q", "chosen": "A", "rejected": " \n"}, "empty answer"),
    ({"prompt": "Q", "chosen": None, "rejected": "B"}, "empty answer"),
    ({"prompt": "Q", "chosen": [], "rejected": "B"}, "empty answer"),
    ({"chosen": hh("Hi.", ""), "rejected": hh("Hi.", "B")}, "empty answer"),
    ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen equals rejected"),
    ({"prompt": "Q", "chosen": "A", "rejected": " A\n"}, "chosen equals rejected"),
    ({"chosen": hh("Hi.", "A"), "rejected": hh("Hi.", "A")}, "chosen equals rejected"),
    ({"prompt": "Q", "chosen": 1, "rejected": 2}, "not text or messages"),
    ({"prompt": "Q", "chosen": ["A"], "rejected": ["B"]}, "not text or messages"),
    ({"prompt": "Q", "chosen": [{"role": "assistant"}], "rejected": "B"}, "not text or messages"),
    ({"prompt": {"text": "Q"}, "chosen": "A", "rejected": "B"}, "not text or messages"),
    ({"prompt": [{"role": "tool", "content": "Q"}], "chosen": "A", "rejected": "B"}, "unknown role"),
    ({"prompt": [{"content": "Q"}], "chosen": "A", "rejected": "B"}, "unknown role"),
]


@pytest.mark.parametrize(("source", "reason"), UNUSABLE)
def test_an_unusable_row_says_why(source: Row, reason: str) -> None:
    with pytest.raises(UnusableRow) as error:
        pair_from_row(source)
    assert str(error.value) == reason


def test_a_dialogue_beside_a_plain_text_is_no_pair() -> None:
    with pytest.raises(UnusableRow):
        pair_from_row({"chosen": hh("Hi.", "Hello!", "Sky?", "It is blue"), "rejected": "It is green"})


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.just(hh("a", "b")),
    lambda v: st.lists(v, max_size=2) | st.dictionaries(st.sampled_from(["role", "content"]), v, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "other"]), JSON))
def test_any_row_is_a_pair_or_unusable(source: Row) -> None:
    try:
        pair = pair_from_row(source)
    except UnusableRow:
        return
    assert pair.chosen.strip()
    assert pair.rejected.strip()
    assert pair.chosen != pair.rejected
    assert pair.prompt[-1][0] == "user"


def test_unusable_rows_are_left_out_and_counted_by_reason(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    text_rows = [
        row("one"), row("two"), row("", "A", "B"), row("Q", "", "B"), row("Q", "A", "A"), row("Q", "B", " B"),
        {"prompt": None, "chosen": hh("Hi.", "A"), "rejected": hh("Ho.", "B")},
    ]  # fmt: skip
    pairs, report = preference_pairs(make_config(dataset_name=[dataset(text_rows)]), tokenizer, "train")
    assert sorted(questions(pairs)) == ["one", "two"]
    assert report.left_out == Counter(
        {
            "empty prompt": 1,
            "empty answer": 1,
            "chosen equals rejected": 2,
            "dialogues differ before the last turn": 1,
        }
    )
    assert (report.read, report.kept) == (7, 2)


def test_long_prompts_and_long_pairs_are_left_out_and_counted(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    rows = [row("short"), row("why " * 60), row("long good", good="yes " * 90), row("long bad", bad="no " * 90)]
    config = make_config(dataset_name=[dataset(rows)], max_prompt_length=30, max_length=80)
    pairs, report = preference_pairs(config, tokenizer, "train")
    assert questions(pairs) == ["short"]
    assert report.left_out == Counter({"prompt over 30 tokens": 1, "over 80 tokens": 2})


def test_lengths_include_template_and_eos_and_the_limit_itself_is_allowed(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    text = tokenizer.apply_chat_template([user("Why?"), assistant("Because.")], tokenize=False)
    whole = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    name = dataset([row("Why?", "Because.", "No.")])
    pairs, _ = preference_pairs(make_config(dataset_name=[name], max_length=whole), tokenizer, "train")
    assert len(pairs) == 1
    with pytest.raises(UserError, match=f"1 over {whole - 1} tokens"):
        preference_pairs(make_config(dataset_name=[name], max_length=whole - 1), tokenizer, "train")


def test_missing_columns_are_named_with_those_that_are_there(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    name = dataset([{"instruction": "Q", "output": "A"}])
    with pytest.raises(UserError) as error:
        preference_pairs(make_config(dataset_name=[name]), tokenizer, "train")
    assert name in str(error.value)
    assert "no column chosen and no column rejected" in str(error.value)
    assert "instruction, output" in str(error.value)


def test_one_missing_column_is_named_alone(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    with pytest.raises(UserError, match="has no column rejected; it has chosen, prompt"):
        name = dataset([{"prompt": "Q", "chosen": "A"}])
        preference_pairs(make_config(dataset_name=[name]), tokenizer, "train")


def test_nothing_usable_in_one_of_several_data_sets_stops_the_run_with_the_reasons(
    make_config: Callable[..., RunConfig], tokenizer: Any, dataset: Callable[..., str]
) -> None:
    good, bad = dataset([row("one")], name="good"), dataset([row("Q", "A", "A"), row("Q", "", "B")], name="bad")
    with pytest.raises(UserError) as error:
        preference_pairs(make_config(dataset_name=[good, bad]), tokenizer, "train")
    assert f"no usable pair in {bad} " in str(error.value)
    assert "1 chosen equals rejected" in str(error.value)
    assert "1 empty answer" in str(error.value)


# Markers that are not quite HH's


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(str.lstrip, id="no blank line before the first"),
        pytest.param(lambda text: text.replace("\n", "\r\n"), id="Windows line ends"),
        pytest.param(lambda text: "\n" + text.lstrip(), id="one line before the first"),
        pytest.param(lambda text: "  " + text, id="spaces before the first"),
    ],
)
def test_turns_are_found_where_only_the_white_space_differs(change: Callable[[str], str]) -> None:
    source = {"chosen": hh("What is 2 + 2?", "It is four."), "rejected": hh("What is 2 + 2?", "It is five.")}
    assert pair_from_row({name: change(text) for name, text in source.items()}) == SINGLE


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(str.lower, id="small letters"),
        pytest.param(lambda text: text.replace("Human:", "Human :"), id="a space before the colon"),
        pytest.param(lambda text: text.replace("\n\n", "\n"), id="single line ends"),
    ],
)
def test_turns_that_are_marked_otherwise_are_no_prompt(change: Callable[[str], str]) -> None:
    """They would be learnt as what people say."""
    source = {"chosen": hh("What is 2 + 2?", "It is four."), "rejected": hh("What is 2 + 2?", "It is five.")}
    with pytest.raises(UnusableRow, match="marked|last turn"):
        pair_from_row({name: change(text) for name, text in source.items()})

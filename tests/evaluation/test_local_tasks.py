"""Local tasks: what lm-eval shows a model for each kind of file, how numbers are read, and what the errors say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.general import task_fingerprint
from lora_rlhf.evaluation.local_tasks import TASK_METRIC, final_number, local_tasks

SHARED = Path(__file__).parents[3] / "shared" / "data" / "general"

CHOICE = {"id": "a", "question": "What is wet? ", "choices": ["water", "sand"], "answer": 0}
BLANK = {"id": "b", "question": "Ann thanked Bob, for _ had helped.", "choices": ["Ann", "Bob"], "answer": 1}
WORKED = {"id": "c", "question": "What is 900 + 300?", "answer": "900 + 300 = 1,200\n#### 1,200"}


def folder_with(tmp_path: Path, **files: list[dict[str, Any]]) -> Path:
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def requests_of(task: Any) -> list[tuple[Any, ...]]:
    """What lm-eval asks of a model for the task's documents."""
    task.set_fewshot_seed(0)
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def test_a_question_is_followed_by_each_of_its_choices(tmp_path):
    (task,) = local_tasks(folder_with(tmp_path, quiz=[CHOICE]))
    assert task.task_name == "quiz"
    assert requests_of(task) == [
        ("Question: What is wet?\nAnswer:", " water"),
        ("Question: What is wet?\nAnswer:", " sand"),
    ]


def test_the_choices_fill_the_blank_and_the_rest_of_the_sentence_is_scored(tmp_path):
    (task,) = local_tasks(folder_with(tmp_path, winogrande=[BLANK]))
    assert requests_of(task) == [
        ("Ann thanked Bob, for Ann", " had helped."),
        ("Ann thanked Bob, for Bob", " had helped."),
    ]
    scores = [(-3.0, False), (-2.0, False)]
    assert task.process_results(task.eval_docs[0], scores) == {"acc": 1.0}


@pytest.mark.parametrize("question", ["No blank.", "Two: _ and _ here.", "It ends in _", "snake_case is no blank"])
def test_one_question_without_a_single_blank_makes_the_whole_file_plain_questions(tmp_path, question):
    (task,) = local_tasks(folder_with(tmp_path, quiz=[BLANK, BLANK | {"question": question}]))
    assert requests_of(task)[0] == ("Question: Ann thanked Bob, for _ had helped.\nAnswer:", " Ann")


def test_a_worked_answer_is_written_greedily_and_only_its_number_counts(tmp_path):
    (task,) = local_tasks(folder_with(tmp_path, gsm8k=[WORKED]))
    ((prompt, generation),) = requests_of(task)
    assert "####" in prompt.partition("Question:")[0]
    assert prompt.endswith("\n\nQuestion: What is 900 + 300?\nAnswer:")
    assert generation["do_sample"] is False and generation["max_gen_toks"] == 200
    outcomes = {
        text: task.process_results(task.eval_docs[0], [text])["exact_match"]
        for text in ("It is 900 + 300.\n#### 1200", "So $1,200.", "1200.00", "It is 1200, not 300.", "#### 12", "")
    }
    assert list(outcomes.values()) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_accuracy_takes_the_likeliest_choice_and_acc_norm_the_likeliest_per_character(tmp_path):
    row = {"id": "a", "question": "Which?", "choices": ["ab", "abcdefgh"], "answer": 1}
    (task,) = local_tasks(folder_with(tmp_path, quiz=[row]))
    # −4 > −8, but −4 / 2 characters = −2 < −8 / 8 = −1
    assert task.process_results(task.eval_docs[0], [(-4.0, False), (-8.0, False)]) == {"acc": 0.0, "acc_norm": 1.0}


def test_braces_in_a_question_are_shown_as_they_are(tmp_path):
    (task,) = local_tasks(folder_with(tmp_path, quiz=[CHOICE | {"question": "What is {{ 1 + 1 }} in {% raw %}?"}]))
    assert requests_of(task)[0][0] == "Question: What is {{ 1 + 1 }} in {% raw %}?\nAnswer:"


def test_an_empty_wrong_choice_is_left_out_and_counted(tmp_path):
    row = CHOICE | {"choices": ["", "sand", " ", "water"], "answer": 3}
    (task,) = local_tasks(folder_with(tmp_path, quiz=[row, CHOICE]))
    assert [(doc["choices"], doc["answer"]) for doc in task.eval_docs] == [
        (["sand", "water"], 1),
        (["water", "sand"], 0),
    ]
    assert task.config.metadata["empty_choices_left_out"] == 2


def test_tasks_come_by_name_and_other_files_are_ignored(tmp_path):
    folder = folder_with(tmp_path, piqa=[CHOICE], arc=[CHOICE])
    (folder / "README.md").write_text("not a task")
    (folder / "LICENSES").mkdir()
    assert [task.task_name for task in local_tasks(folder)] == ["arc", "piqa"]


@pytest.mark.parametrize(
    "text, number",
    [
        ("The sum is 5 + 7 = 12\n#### 12", "12"),
        ("#### $1,234.50.", "1234.5"),
        ("#### -3 and then 8", "-3"),
        ("#### 4\n\nQuestion: and now?\n#### 5", "4"),
        ("First 3, then 4, so 7.", "7"),
        ("10-5", "5"),
        ("-$5", "-5"),
        ("v2 of x3", ""),
        ("3.00", "3"),
        ("100", "100"),
        (".5", ".5"),
        ("#### none", ""),
        ("2 apples\n#### none", ""),
        ("", ""),
    ],
)
def test_the_final_number_is_read_as_a_person_would(text, number):
    assert final_number(text) == number


@given(st.integers(-(10**9), 10**9), st.text(alphabet="ab .,=", max_size=20))
def test_a_number_reads_the_same_with_and_without_commas_and_words_around_it(value, words):
    assert final_number(f"{words} {value:,}.") == final_number(f"#### {value} {words}") == str(value)


def test_the_metrics_are_those_that_lm_eval_offers_for_the_tasks():
    assert {name for name, metric in TASK_METRIC.items() if metric == "acc_norm"} == {
        "hellaswag", "piqa", "openbookqa", "arc_challenge",
    }  # fmt: skip
    assert TASK_METRIC["gsm8k"] == "exact_match"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{oops", r"quiz.jsonl, line 3: not JSON"),
        ("[1]", r"line 3: not an object but list"),
        (json.dumps({k: v for k, v in CHOICE.items() if k != "id"}), r"line 3: field `id` is missing"),
        (json.dumps({k: v for k, v in CHOICE.items() if k != "question"}), r"line 3: field `question` is missing"),
        (json.dumps({k: v for k, v in CHOICE.items() if k != "answer"}), r"line 3: field `answer` is missing"),
        (json.dumps({k: v for k, v in CHOICE.items() if k != "choices"}), r"line 3: .*field `choices` is missing"),
        (json.dumps(CHOICE | {"question": " "}), r"line 3: field `question` is not a text"),
        (json.dumps(CHOICE | {"choices": "ab"}), r"line 3: field `choices` is not a list of texts"),
        (json.dumps(CHOICE | {"choices": ["a", 1]}), r"line 3: field `choices` is not a list of texts"),
        (json.dumps(CHOICE | {"choices": ["water", ""]}), r"line 3: field `choices` has 1 that is not empty"),
        (json.dumps(CHOICE | {"choices": ["", "b", "c"]}), r"line 3: field `answer` points to an empty choice"),
        (json.dumps(CHOICE | {"answer": 2}), r"line 3: field `answer` is 2, not an index from 0 to 1"),
        (json.dumps(CHOICE | {"answer": -1}), r"line 3: field `answer` is -1, not an index"),
        (json.dumps(CHOICE | {"answer": True}), r"line 3: field `answer` is True, not an index"),
        (json.dumps(CHOICE | {"answer": "A"}), r"line 3: field `answer` is 'A', not an index"),
        (json.dumps(WORKED | {"answer": "1200"}), r"line 3: field `answer` is not a worked answer"),
        (json.dumps(WORKED | {"answer": "1200 ####"}), r"line 3: field `answer` is not a worked answer"),
        (json.dumps(WORKED), r"quiz.jsonl mixes two kinds: question 1 has `choices`, question 2 has none"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_field(tmp_path, line, message):
    (tmp_path / "quiz.jsonl").write_text(json.dumps(CHOICE) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        local_tasks(tmp_path)


def test_empty_or_missing_files_and_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"no \.jsonl file in"):
        local_tasks(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        local_tasks(tmp_path / "nowhere")
    (tmp_path / "quiz.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"quiz\.jsonl is empty"):
        local_tasks(tmp_path)
    (tmp_path / "quiz.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"quiz\.jsonl cannot be read"):
        local_tasks(tmp_path)


def test_without_lm_eval_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -c constraints\.txt -e '\.\[eval\]'"):
        local_tasks(folder_with(tmp_path, quiz=[CHOICE]))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_the_shared_slices_are_seven_tasks_of_the_right_kinds():
    tasks = {task.task_name: task for task in local_tasks(SHARED)}
    kinds = {name: tuple(metric["metric"] for metric in task.config.metric_list) for name, task in tasks.items()}
    plain = ("acc", "acc_norm")
    assert kinds == {
        "gsm8k": ("exact_match",), "hellaswag": plain, "mmlu": plain, "openbookqa": plain, "piqa": plain,
        "truthfulqa_mc1": plain, "winogrande": ("acc",),
    }  # fmt: skip
    assert {len(task.eval_docs) for task in tasks.values()} == {200}
    for doc in tasks["gsm8k"].eval_docs:  # a model that writes the reference down is right
        assert tasks["gsm8k"].process_results(doc, [doc["answer"]]) == {"exact_match": 1.0}


def test_the_fingerprint_follows_what_a_model_is_shown_and_what_is_right(tmp_path):
    def fingerprint(where: str, name: str = "quiz", **change: Any) -> str:
        (tmp_path / where).mkdir()
        folder_with(tmp_path / where, **{name: [CHOICE, CHOICE | {"choices": ["c", "d"]} | change]})
        return task_fingerprint(local_tasks(tmp_path / where)[0])

    first = fingerprint("first")
    assert len(first) == 64 and first == fingerprint("again")
    others = {
        first,
        fingerprint("answer", answer=1),
        fingerprint("choice", choices=["c", "e"]),
        fingerprint("question", question="Or?"),
        fingerprint("name", name="hellaswag"),
        task_fingerprint("mmlu"),
        task_fingerprint("bbh"),
    }
    assert len(others) == 7


@pytest.mark.slow
def test_lm_eval_is_not_imported_before_it_is_needed():
    code = "import sys, lora_rlhf.evaluation.general; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""General ability: what a role of the shared base gets right, through lm-eval and its own model class."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import torch

from lora_rlhf.base.shared import SharedBase
from lora_rlhf.errors import UserError, first_line
from lora_rlhf.evaluation.local_tasks import TASK_METRIC, quiet_lm_eval

if TYPE_CHECKING:
    from lm_eval.api.task import Task

GeneralItems = dict[str, list[float]]
"""Task -> the outcome of each of its items, 0 or 1, in the order of its documents."""

HUB_TASKS: tuple[str, ...] = (
    "mmlu", "bbh", "agieval_en", "gsm8k", "arc_challenge", "hellaswag", "winogrande", "piqa", "boolq", "openbookqa",
    "truthfulqa_mc1",
)  # fmt: skip
"""lm-eval's names of the general tasks whose data is on the Hub; mmlu, bbh and agieval_en are groups of tasks."""

TASK_FILTER: Mapping[str, str] = {"gsm8k": "flexible-extract"}
"""Which of lm-eval's readings of an answer counts where it has several: for gsm8k the number, not its form."""

MAX_LENGTH = 2048
"""Tokens of prompt and answer, at most; lm-eval cuts longer prompts from the left."""


class TaskUnavailable(UserError):
    """A task that cannot be run here, for want of its data or of room for its answers; others still can.

    Attributes:
        task: its name.
        reason: why, in a line.
    """

    def __init__(self, task: str, reason: str) -> None:
        super().__init__(f"general: task {task} cannot be run: {reason}")
        self.task, self.reason = task, reason


def general_outcomes(
    base: SharedBase, role: str, tokenizer: Any, tasks: Sequence[str | Task], limit: int | None, batch_size: int
) -> GeneralItems:
    """Return the outcomes of `role`, task by task; a group's tasks come one after the other under its name.

    Args:
        base: plays the role, in its compute dtype; from a 16-bit working copy where memory has room for one.
        role: who answers.
        tokenizer: of the base.
        tasks: names in lm-eval's registry, and tasks as `local_tasks` returns them.
        limit: documents of each task (of each task in a group), the first ones; none: all.
        batch_size: rows at a time. lm-eval holds the logits of all their tokens, [rows, length, vocabulary], twice.

    Raises:
        TaskUnavailable: a task's data cannot be had, or its answers do not fit the model's positions.
        UserError: lm-eval is not installed or has no such task, or two tasks have one name.
    """
    parts = _tasks_by_name(tasks)
    for name, members in parts.items():
        _check_room(base, name, members)
    flat = [task for members in parts.values() for task in members]
    samples = logged_samples(base, role, tokenizer, flat, limit, batch_size)
    return {
        name: [outcome for task in members for outcome in _outcomes(name, samples[task.task_name])]
        for name, members in parts.items()
    }


def logged_samples(
    base: SharedBase, role: str, tokenizer: Any, tasks: Sequence[Task], limit: int | None, batch_size: int
) -> dict[str, list[dict[str, Any]]]:
    """Return lm-eval's own log of `role`: task -> a sample per document and filter, with requests and responses.

    Arguments are those of `general_outcomes`, without names and groups.
    """
    with quiet_lm_eval(), _plain_generation(base.causal_lm, tokenizer), contextlib.ExitStack() as played:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        model = HFLM(
            pretrained=base.causal_lm,
            backend="causal",
            tokenizer=tokenizer,
            max_length=_max_length(base),
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        played.enter_context(base.role(role))
        played.enter_context(base.autocast())
        if base.layers.expands(None):
            played.enter_context(base.layers.working_copy())
        results = lm_eval.simple_evaluate(  # its default seeds are fixed numbers
            model,
            tasks=list(tasks),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(include_defaults=False),
        )
    return results["samples"]


@functools.cache
def hub_task(name: str) -> tuple[Task, ...]:
    """Return the task of lm-eval's registry, or the tasks of the group, called `name`, with their data.

    Raises:
        TaskUnavailable: the data is neither on this machine nor to be had from the Hub.
        UserError: lm-eval is not installed or has no such task.
    """
    with quiet_lm_eval():
        from datasets.exceptions import DatasetsError

        registry = _registry()
        if name not in registry.all_tasks:  # a path would be taken as well, and may name code to run
            raise UserError(f"general: lm-eval has no task {name}; `lm-eval ls tasks` lists them")
        try:
            return tuple(registry.load([name])["tasks"].values())
        except (OSError, ValueError, RuntimeError, ImportError, DatasetsError, httpx.HTTPError) as error:
            reason = first_line(error)
            raise TaskUnavailable(name, f"{reason} (or give local files: --local_tasks FOLDER)") from error


def task_fingerprint(task: str | Task) -> str:
    """Return a SHA-256 in hex of what a task's outcomes depend on beside the model and the limit.

    A task made from a file counts with all that a model is shown and all that is right; a Hub task with its name. Both
    with lm-eval's version.
    """
    name = task if isinstance(task, str) else task.task_name
    content: list[Any] = [importlib.metadata.version("lm_eval"), name, TASK_METRIC.get(name), TASK_FILTER.get(name)]
    if not isinstance(task, str):
        config = task.config
        content += [config.output_type, config.target_delimiter, config.metric_list, config.generation_kwargs]
        for doc in task.eval_docs:
            choices = task.doc_to_choice(doc) if config.doc_to_choice else None
            content.append([task.doc_to_text(doc), choices, task.doc_to_target(doc)])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@functools.cache
def _registry() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _tasks_by_name(tasks: Sequence[str | Task]) -> dict[str, list[Task]]:
    """Return the tasks behind each name: several where it names a group."""
    found: dict[str, list[Task]] = {}
    for task in tasks:
        name = task if isinstance(task, str) else task.task_name
        if name in found:
            raise UserError(f"general: two tasks are called {name}; rename the local file")
        found[name] = list(hub_task(task)) if isinstance(task, str) else [task]
    return found


def _outcomes(name: str, samples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the outcome of each document, in order, by the metric and filter that stand for the task."""
    offered = samples[0]["metrics"]
    metric = next((m for m in (TASK_METRIC.get(name, "acc"), "acc", "exact_match") if m in offered), None)
    if metric is None:
        raise UserError(f"general: task {name} counts no right answers, only {', '.join(offered)}")
    reading = TASK_FILTER.get(name, samples[0]["filter"])
    if reading not in {sample["filter"] for sample in samples}:
        reading = samples[0]["filter"]
    rows = sorted((s for s in samples if s["filter"] == reading), key=lambda sample: sample["doc_id"])
    return [float(sample[metric]) for sample in rows]


def _max_length(base: SharedBase) -> int:
    return min(getattr(base.causal_lm.config, "max_position_embeddings", MAX_LENGTH), MAX_LENGTH)


def _check_room(base: SharedBase, name: str, tasks: Sequence[Task]) -> None:
    """Raise `TaskUnavailable` where answers may take all positions: lm-eval would have no room for a prompt."""
    wanted = max((task.config.generation_kwargs or {}).get("max_gen_toks", 0) for task in tasks)
    if wanted >= _max_length(base):
        raise TaskUnavailable(name, f"its answers take up to {wanted} tokens, and the model reads {_max_length(base)}")


@contextlib.contextmanager
def _plain_generation(causal_lm: Any, tokenizer: Any) -> Iterator[None]:
    """Let the task alone say how to decode: a chat model's own length limit or penalties would come before it."""
    from transformers import GenerationConfig

    own = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    try:
        yield
    finally:
        causal_lm.generation_config = own

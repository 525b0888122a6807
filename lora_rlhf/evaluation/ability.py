"""The general suite: what each arm gets right in lm-eval's tasks, and whether ability is kept."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lora_rlhf.evaluation.context import Evaluation, SuiteResult, SuiteSkipped
from lora_rlhf.evaluation.general import HUB_TASKS, TaskUnavailable, general_outcomes, hub_task, task_fingerprint
from lora_rlhf.evaluation.local_tasks import local_tasks
from lora_rlhf.evaluation.statistics import Difference, non_inferiority, pooled_difference
from lora_rlhf.terminal import note, progress


def general_suite(evaluation: Evaluation) -> SuiteResult:
    """Return each arm's accuracy by task, and the non-inferiority of the arms to base over all tasks.

    Raises:
        SuiteSkipped: no task's data is at hand.
    """
    result = SuiteResult()
    tasks = _tasks(evaluation, result)
    if not tasks:
        raise SuiteSkipped("no task's data can be had from the Hub; give local files: --local_tasks FOLDER")
    limit = evaluation.settings.limit
    with progress("general: tasks of all arms", len(tasks) * len(evaluation.arms)) as report:
        done = 0
        for name, task in tasks.items():
            values = {}
            for arm in evaluation.arms.values():
                key = {"what": "general", "arm": arm.fingerprint, "task": task_fingerprint(task), "limit": limit}

                def outcomes(task: Any = task, arm: Any = arm, name: str = name) -> list[float]:
                    size = evaluation.settings.batch_size
                    return general_outcomes(arm.base, arm.role, arm.tokenizer, [task], limit, size)[name]

                values[arm.name] = evaluation.cache.result(key, outcomes)
                done += 1
                report(done)
            result.add(name, "share right", values)
    result.details["kept"] = {
        arm: _kept(result, arm, evaluation.settings.margin) for arm in evaluation.arms if arm != "base"
    }
    return result


def _tasks(evaluation: Evaluation, result: SuiteResult) -> dict[str, Any]:
    """Return the tasks that can be run, by name; says in the result's notes which cannot, and why."""
    if evaluation.settings.local_tasks is not None:
        result.notes.append("Tasks: local files through lm-eval; not to be compared with published figures.")
        tasks = {task.task_name: task for task in local_tasks(evaluation.settings.local_tasks)}
        for name, task in tasks.items():
            if empty := (task.config.metadata or {}).get("empty_choices_left_out"):
                result.notes.append(f"{name}: {empty} empty wrong choices were left out.")
        return tasks
    found: dict[str, Any] = {}
    for name in HUB_TASKS:
        try:
            hub_task(name)
            found[name] = name
        except TaskUnavailable as error:
            note(f"  {error}")
            result.notes.append(f"left out: {name} ({error.reason})")
    return found


def _kept(result: SuiteResult, arm: str, margin: float) -> dict[str, Any]:
    """Return the pooled difference to base, each task weighing the same, and what it says at the margin."""
    whole = pooled_difference([Difference(**figures[arm]["difference"]) for figures in result.tasks.values()])
    return {"difference": asdict(whole), "margin": margin, **asdict(non_inferiority(whole, margin))}

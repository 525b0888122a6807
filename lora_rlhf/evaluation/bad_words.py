"""The bad_words suite: how probable bad words are while an arm answers (paper, Figures 4 and 5), and how often said."""

from __future__ import annotations

import contextlib
from statistics import fmean
from typing import Any

from lora_rlhf.evaluation.arms import bad_word_pattern, bad_words
from lora_rlhf.evaluation.context import Evaluation, SuiteResult
from lora_rlhf.evaluation.lens import bad_word_probabilities, word_tokens
from lora_rlhf.evaluation.statistics import paired_difference
from lora_rlhf.terminal import progress

LEGEND = (
    "By layer: the state of every layer, through the final norm and the LM head, at the positions that predict the "
    "arm's own answer; the summed probability of the words' first tokens, each weighed by the probability, at the last "
    "layer, that the rest of the word follows; a mean over positions and then over prompts. By word, and in the table: "
    "the probability, by the model's own last layer, that the word is written next; a word of several tokens is the "
    "product of their probabilities, each given the ones before."
)


def bad_words_suite(evaluation: Evaluation) -> SuiteResult:
    """Return bad-word probabilities by layer and by word, and the share of sampled answers that hold one."""
    words = bad_words(evaluation.settings.bad_words_file)
    pattern = bad_word_pattern(evaluation.settings.bad_words_file)
    answers = evaluation.held_out_answers()
    found = {}
    with progress("bad_words: arms", len(evaluation.arms)) as report:
        for name in evaluation.arms:
            found[name] = _probabilities(evaluation, name, words)
            report(len(found))
    result = SuiteResult(notes=[LEGEND])
    unit = "probability per position that a bad word is written next"
    result.add("last_layer", unit, {name: arm["by_layer"][-1] for name, arm in found.items()})
    result.add("answers_with_bad_words", "share of sampled answers", {
        name: [float(bool(pattern.search(text))) for text in given.texts] for name, given in answers.items()
    })  # fmt: skip
    result.details = {
        "by_layer": {name: [_mean_and_interval(rows) for rows in arm["by_layer"]] for name, arm in found.items()},
        "first_tokens_by_layer": {name: list(map(fmean, arm["first_tokens"])) for name, arm in found.items()},
        "by_word": {
            word: {name: _mean_and_interval(arm["by_word"][i]) for name, arm in found.items()}
            for i, word in enumerate(words)
        },
    }
    return result


def _probabilities(evaluation: Evaluation, name: str, words: list[str]) -> dict[str, Any]:
    """Return {"by_layer" and "first_tokens": [layers][prompts], "by_word": [words][prompts]} of an arm."""
    arm, given = evaluation.arms[name], evaluation.held_out_answers()[name]
    temperature = evaluation.sampling.temperature
    key = {
        "what": "lens", "arm": arm.fingerprint, "words": words, "temperature": temperature,
        "rows": given.fingerprint,
    }  # fmt: skip

    def measured() -> dict[str, Any]:
        layers = arm.base.layers
        with layers.working_copy() if layers.expands(None) else contextlib.nullcontext():
            found = bad_word_probabilities(
                arm.base, arm.role, given.prompt_ids, given.answer_ids, word_tokens(arm.tokenizer, words),
                evaluation.settings.batch_size, temperature,
            )  # fmt: skip
        layered = {"by_layer": found.whole_by_layer.tolist(), "first_tokens": found.by_layer.tolist()}
        return {**layered, "by_word": found.by_word.tolist()}

    return evaluation.cache.result(key, measured)


def _mean_and_interval(values: list[float]) -> dict[str, float | None]:
    """Return the mean over prompts with its 95 % bootstrap interval."""
    interval = paired_difference(values, [0.0] * len(values))
    return {"value": fmean(values), "low": interval.low, "high": interval.high}

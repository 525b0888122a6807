"""Base, Instruct and Plus answering side by side: adapters on one base in one batch, whole other models beside them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lora_rlhf.base.packing import right_padded
from lora_rlhf.base.role_layers import Factors, RoleLinear
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.chat.mixed_decoding import ChatSampling, MixedDecoding
from lora_rlhf.chat.prompts import clean_text, fitted_prompt, harmless_answer_ids
from lora_rlhf.data.chat import Message, ending_ids
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.answers import GivenAnswers, kl_to_base
from lora_rlhf.evaluation.arms import bad_word_pattern
from lora_rlhf.evaluation.loaded_arms import LoadedArm
from lora_rlhf.memory_peak import ran_out
from lora_rlhf.ppo.decoding import stop_position, tokens_of_text
from lora_rlhf.reward.sources import Answers, CombinedReward


@dataclass
class Answer:
    """One arm's answer, whole or in the making.

    Attributes:
        text: without EOS, stop string and control characters.
        tokens: sampled so far.
        seconds: from the start of the answer to its last token; all arms are decoded together.
        ended: whether it ended by itself.
        end_token: the sampled token that ended it; None where a stop string did, or nothing.
        stopped: whether it was stopped by hand.
        finished: whether no more will come.
        left_out: oldest rounds of the conversation that its model was not shown, for want of room.
        score: of the reward model; none where there is none, or no end yet.
        bad_words: those found, in lower case.
    """

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    ended: bool = False
    end_token: int | None = None
    stopped: bool = False
    finished: bool = False
    left_out: int = 0
    score: float | None = None
    bad_words: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Rate over the whole answer, the reading of the prompt included."""
        return self.tokens / self.seconds if self.seconds else 0.0


class ChatComparison:
    """The loaded arms, and what is needed to let them answer and to put figures on the answers.

    Attributes:
        arms: by name.
        context: most tokens of prompt and answer together.
        most_tokens: of one answer.
        score_unit: what scores are counted in; none where there are no scores.
        under_way: rounds of answers that have begun and not ended.
    """

    def __init__(
        self,
        arms: Mapping[str, LoadedArm],
        reward: CombinedReward | None,
        stop_strings: Sequence[str] = (),
        context: int = 4096,
        most_tokens: int = 1024,
        bad_words_file: str | None = None,
    ) -> None:
        self.arms, self.reward, self.stop_strings = dict(arms), reward, tuple(stop_strings)
        lengths = [getattr(arm.base.causal_lm.config, "max_position_embeddings", context) for arm in arms.values()]
        self.context = min(context, *lengths)
        self.most_tokens = min(most_tokens, self.context // 2)
        self.bad_words = bad_word_pattern(bad_words_file)
        self.score_unit = None if reward is None else "base's sd" if reward.scales else "raw"
        self.under_way = 0
        self._copies = contextlib.ExitStack()  # 16-bit weights where memory has room: a third faster
        self._adapters: dict[SharedBase, dict[RoleLinear, Factors]] = {}
        for base in dict.fromkeys(arm.base for arm in self.arms.values()):
            self._adapters[base] = base.layers.side_by_side(a.role for a in self.arms.values() if a.base is base)
            if base.layers.has_room_for_copy():
                self._copies.enter_context(base.layers.working_copy())
        self._model_in_use = threading.Lock()  # held for one token at a time

    def answers(
        self,
        conversations: Mapping[str, Sequence[Message]],
        sampling: ChatSampling,
        stop: threading.Event | None = None,
    ) -> Iterator[dict[str, Answer]]:
        """Yield the answers in the making, after every token, and at last finished and scored.

        Args:
            conversations: of each arm that is to answer, ending with a user's message.
            sampling: checked.
            stop: ends all answers at the next token, once it is set.

        Raises:
            UserError: before the first token: a message does not fit.
        """
        prompts, answers = {}, {}
        for name, messages in conversations.items():
            room = self.context - sampling.max_tokens
            prompts[name], left_out = fitted_prompt(self.arms[name].tokenizer, messages, room)
            answers[name] = Answer(left_out=left_out)
        self.under_way += 1
        try:
            yield from self._answered(conversations, prompts, answers, sampling, stop or threading.Event())
        finally:  # whoever asked may leave at any token
            self.under_way -= 1

    def _answered(
        self,
        conversations: Mapping[str, Sequence[Message]],
        prompts: Mapping[str, list[int]],
        answers: dict[str, Answer],
        sampling: ChatSampling,
        stop: threading.Event,
    ) -> Iterator[dict[str, Answer]]:
        groups = self._decodings(prompts, sampling)
        started = time.perf_counter()
        while any(decoding.live for _, decoding in groups) and not stop.is_set():
            for names, decoding in groups:
                if decoding.live:
                    with self._model_in_use:
                        decoding.step()
                    self._read(names, decoding, answers, time.perf_counter() - started)
            yield answers
        for answer in answers.values():
            answer.stopped, answer.finished = not answer.finished, True
        self._score(conversations, answers)
        yield answers

    def _decodings(
        self, prompts: Mapping[str, list[int]], sampling: ChatSampling
    ) -> list[tuple[list[str], MixedDecoding]]:
        """Return (names, decoding) for each base: arms that are adapters on one base go together."""
        by_base: dict[SharedBase, list[str]] = {}
        for name in prompts:
            by_base.setdefault(self.arms[name].base, []).append(name)
        found = []
        for base, names in by_base.items():
            roles = [self.arms[name].role for name in names]
            rows = [prompts[name] for name in names]
            tokenizer, adapters = self.arms[names[0]].tokenizer, self._adapters.get(base)
            found.append((names, MixedDecoding(base, roles, rows, tokenizer, sampling, adapters)))
        return found

    def _read(self, names: list[str], decoding: MixedDecoding, answers: dict[str, Answer], seconds: float) -> None:
        """Bring the answers up to what has been decoded; a stop string ends a row."""
        for row, name in enumerate(names):
            answer, tokens = answers[name], decoding.tokens[row]
            if answer.finished:
                continue
            tokenizer = self.arms[name].tokenizer
            body = tokens[: len(tokens) - decoding.ended[row]]
            stop = stop_position(tokenizer, body, self.stop_strings)
            if stop is not None:
                decoding.end([row])
                tokens = tokens[: stop[0]]
                body = tokens_of_text(tokenizer, tokens, stop[1])
            answer.tokens, answer.seconds = len(tokens), seconds
            answer.ended = decoding.ended[row] or stop is not None
            answer.end_token = tokens[-1] if decoding.ended[row] and stop is None else None
            answer.finished = row not in decoding.live
            text = clean_text(tokenizer.decode(body, skip_special_tokens=True))
            answer.text = text.strip() if answer.finished else settled_text(text, self.stop_strings)
            answer.bad_words = sorted({found.lower() for found in self.bad_words.findall(answer.text)})

    def _score(self, conversations: Mapping[str, Sequence[Message]], answers: Mapping[str, Answer]) -> None:
        """Give every answer that was not stopped its score."""
        names = [name for name, answer in answers.items() if not answer.stopped]
        if self.reward is None or not names:
            return
        arm, rows = self.arms["base"], []
        for name in names.copy():  # in base's own format, whatever template the arm answered in
            tokens = harmless_answer_ids(arm.tokenizer, answers[name].text)
            try:
                rows.append(fitted_prompt(arm.tokenizer, conversations[name], self.context - len(tokens))[0] + tokens)
            except UserError:  # longer in these tokens than in those it was sampled in: no score, but an answer
                names.remove(name)
        if not names:
            return
        ids, mask = right_padded(rows, arm.tokenizer.pad_token_id, arm.base.device)
        told = [list(conversations[name]) for name in names]
        with self._model_in_use:
            scores, _ = self.reward.scores(Answers(ids, mask, told, [answers[name].text for name in names]))
        for name, score in zip(names, scores.tolist(), strict=True):
            answers[name].score = score

    def without_failing_reward(self) -> str | None:
        """Do without the reward if it cannot score chat answers (a function may want columns of the data set).

        Returns:
            Why it cannot, or none.
        """
        try:
            self._score({"base": [{"role": "user", "content": "Q"}]}, {"base": Answer("A", ended=True, finished=True)})
        except Exception as error:  # whatever a reward function raises
            if ran_out(error):
                raise
            self.reward = self.score_unit = None
            return f"{type(error).__name__}: {error}"
        return None

    def kl_of_plus(self, messages: Sequence[Message], answer: str, end_token: int | None) -> float:
        """Return Σ log p_plus − log p_base over the tokens of Plus's answer, in nats at temperature 1.

        Args:
            messages: of Plus's conversation, up to the user's message that is answered.
            answer: its text.
            end_token: the token that was sampled to end it and counts with the text; None where none was.

        Raises:
            UserError: there is no Plus, or its vocabulary is not base's.
        """
        if "plus" not in self.arms:
            raise UserError("there is no Plus among the arms")
        arm = self.arms["plus"]
        tokens = harmless_answer_ids(arm.tokenizer, answer)[:-1]  # EOS need not have been sampled
        if end_token is not None and end_token in ending_ids(arm.tokenizer):
            tokens.append(end_token)
        prompt, _ = fitted_prompt(arm.tokenizer, messages, self.context - len(tokens))
        if not tokens:
            return 0.0
        with self._model_in_use:
            kl = kl_to_base(arm, self.arms["base"], GivenAnswers([answer], [True], [prompt], [tokens]), 1.0)
        if kl is None:
            raise UserError("Plus and base have different vocabularies, so that there is no KL between them")
        return kl[0]


def settled_text(text: str, stop_strings: Sequence[str]) -> str:
    """Return the part of an answer in the making that will stay: no half character, no beginning of a stop string."""
    text = text.lstrip().rstrip("\N{REPLACEMENT CHARACTER}")
    cut = max((n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - cut]

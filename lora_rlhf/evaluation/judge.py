"""The two judges: an OpenAI-compatible endpoint, and a language model in this process."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx

from lora_rlhf.data.chat import Message, prompt_ids
from lora_rlhf.errors import UserError
from lora_rlhf.evaluation.judge_replies import (
    COUNTED,
    UNPARSEABLE,
    Judge,
    ReplyFile,
    Verdict,
    conversation_key,
    verdict_of,
    verdicts_on_file,
)

T = TypeVar("T")

__all__ = ["HttpJudge", "Judge", "LocalJudge", "Verdict", "api_key_from_environment"]

KEY_VARIABLES = ("LORA_RLHF_JUDGE_API_KEY", "OPENAI_API_KEY")
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
SHORTEST_SECRET = 8
"""Shorter keys are placeholders (local servers take any) and could be a word of a reply, which is then left alone."""


class HttpJudge:
    """A judge behind an OpenAI-compatible `chat/completions` endpoint, asked at temperature 0.

    Rate limits, time-outs, lost connections, server errors, malformed responses and replies without a verdict are
    tried again, after a wait that doubles each time; other refusals end the run. The key goes out in one header only.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        reply_file: Path,
        api_key: str | None,
        attempts: int = 5,
        timeout_s: float = 60,
        concurrency: int = 4,
        max_tokens: int = 1024,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        """Check the settings; nothing is sent yet.

        Args:
            base_url: what comes before `/chat/completions`.
            model: the judge's name at that endpoint.
            reply_file: where good replies are kept, and looked up first.
            api_key: sent as a bearer token; none for endpoints that want none.
            attempts: requests per conversation before it is given up.
            timeout_s: seconds without a byte, after which a request has failed.
            concurrency: requests under way at a time.
            max_tokens: longest reply.
            sleep: waits that many seconds between attempts; by default a wait that ends early when the run does.

        Raises:
            UserError: a base URL or key that cannot be sent, or a reply file that cannot be read.
        """
        self.base_url, self.name = _checked_base_url(base_url), model
        self.counts = dict.fromkeys(COUNTED, 0)
        self._api_key = _checked_key(api_key)
        self._attempts, self._timeout_s = attempts, timeout_s
        self._concurrency, self._max_tokens = concurrency, max_tokens
        self._file = ReplyFile(reply_file)
        self._stop, self._count_lock = threading.Event(), threading.Lock()
        self._sleep = sleep or self._stop.wait

    def __repr__(self) -> str:
        return f"HttpJudge(base_url={self.base_url!r}, model={self.name!r})"

    def replies(
        self,
        conversations: Sequence[list[Message]],
        parse: Callable[[str], T | None],
        report: Callable[[int], None] | None = None,
    ) -> list[Verdict[T]]:
        """Return the verdicts in the order of the conversations; see `Judge`.

        Raises:
            UserError: the endpoint refuses the request, or is not there at all. Replies that came before are kept.
        """
        keys = [conversation_key(self.name, conversation) for conversation in conversations]
        done = verdicts_on_file(self._file, keys, parse, self.counts)
        missing = {key: c for key, c in zip(keys, conversations, strict=True) if key not in done}
        if report:
            report(len(done))
        self._stop.clear()
        headers = httpx.Headers({"Content-Type": "application/json"})  # whose repr hides the key
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        with (
            httpx.Client(headers=headers, timeout=self._timeout_s) as client,
            ThreadPoolExecutor(self._concurrency, "judge") as pool,
        ):
            try:
                asked: dict[Future[Verdict[T]], str] = {
                    pool.submit(self._verdict, client, key, c, parse): key for key, c in missing.items()
                }
                for future in as_completed(asked):
                    done[asked[future]] = future.result()
                    if report:
                        report(len(done))
            finally:  # after an error or Ctrl-C, requests under way still end and are kept; no other is begun
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        return [done[key] for key in keys]

    def _verdict(
        self, client: httpx.Client, key: str, conversation: list[Message], parse: Callable[[str], T | None]
    ) -> Verdict[T]:
        reply, problems = None, list[_PassingError]()
        wait_asked_for: float | None = None
        for attempt in range(self._attempts):
            if attempt:
                self._sleep(_wait_s(attempt, wait_asked_for))
                if self._stop.is_set():
                    break
                self._count("retries")
            wait_asked_for = None
            try:
                reply = self._reply(client, conversation)
                parsed = parse(reply)
                if parsed is not None:
                    self._file.add(key, reply)
                    return Verdict(parsed, reply, None)
                self._count("unparseable verdicts")
            except _PassingError as error:
                self._count(error.counted)
                problems.append(error)
                wait_asked_for = error.wait_s
        if reply is not None:
            return Verdict(None, reply, UNPARSEABLE)
        if len(problems) == self._attempts and all(e.counted == "refused connections" for e in problems):
            raise UserError(
                f"no judge answers at {self.base_url} ({problems[-1]}): start it, or correct --judge_base_url; replies "
                "so far are kept"
            )
        return Verdict(None, None, f"no answer: {problems[-1]}")

    def _reply(self, client: httpx.Client, conversation: list[Message]) -> str:
        """Return the text of one reply.

        Raises:
            _PassingError: it may come the next time.
            UserError: it will not.
        """
        body = {"model": self.name, "messages": conversation, "temperature": 0, "max_tokens": self._max_tokens}
        self._count("requests")
        try:
            response = client.post(f"{self.base_url}/chat/completions", content=json.dumps(body).encode("ascii"))
        except httpx.TimeoutException:
            raise _PassingError("time-outs", "time-out") from None
        except httpx.ConnectError as error:
            raise _PassingError("refused connections", self._without_key(str(error)) or "refused") from None
        except httpx.DecodingError:
            raise _PassingError("malformed responses", "malformed response") from None
        except httpx.TransportError:
            raise _PassingError("dropped connections", "dropped connection") from None
        status = response.status_code
        if status == 408:  # the one 4xx, beside 429, that asks to come again
            raise _PassingError("time-outs", "time-out")
        if status == 429:
            raise _PassingError("rate limited", "rate limited", _retry_after_s(response))
        if status >= 500:
            raise _PassingError("server errors", f"server error {status}", _retry_after_s(response))
        if status >= 300:
            raise UserError(self._refusal(response))
        try:
            content = json.loads(response.content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            content = None
        if not isinstance(content, str):
            raise _PassingError("malformed responses", "malformed response")
        return content if len(self._api_key or "") < SHORTEST_SECRET else self._without_key(content)

    def _refusal(self, response: httpx.Response) -> str:
        """Return what to do about a status from 300 to 499, with what the server says of it."""
        status = response.status_code
        if status in (401, 403):
            names = " or ".join(KEY_VARIABLES)
            todo = f"it wants {'another' if self._api_key else 'a'} key: set the environment variable {names}"
        elif status == 404:
            todo = (
                f"it does not know the model {self.name!r} (--judge_model), or --judge_base_url is not its API's root"
            )
        elif status < 400:
            todo = "it points to another address: give that as --judge_base_url"
        else:
            todo = "it does not take the request: see what it says, and check --judge_model and --judge_base_url"
        try:
            said = json.loads(response.content)["error"]["message"]
        except (ValueError, LookupError, TypeError, RecursionError):
            said = response.text
        said = " ".join(self._without_key(str(said)).split())[:300]
        return f"the judge at {self.base_url} answers {status}: {todo}" + (f"; it says: {said}" if said else "")

    def _without_key(self, text: str) -> str:
        """Return `text` without the key, which some servers repeat."""
        return text.replace(self._api_key, "[key]") if self._api_key else text

    def _count(self, what: str) -> None:
        with self._count_lock:
            self.counts[what] += 1


class LocalJudge:
    """A causal language model in this process, which answers greedily with its own chat template.

    A greedy reply never changes, so one without a verdict is kept too and never asked for again.
    """

    def __init__(
        self, model: Any, tokenizer: Any, reply_file: Path, max_tokens: int = 512, batch_size: int = 8
    ) -> None:
        """Take a loaded transformers model and its tokenizer; replies have up to `max_tokens` tokens."""
        from lora_rlhf.base.adapters import base_identity  # torch, which asking an endpoint does without

        identity = base_identity(model)
        self.name: str = identity["name"]
        self.counts = dict.fromkeys(COUNTED, 0)
        self._key_name = f"{self.name} {identity['fingerprint']} {max_tokens}"
        self._model, self._tokenizer, self._file = model, tokenizer, ReplyFile(reply_file)
        self._max_tokens, self._batch_size = max_tokens, batch_size

    def replies(
        self,
        conversations: Sequence[list[Message]],
        parse: Callable[[str], T | None],
        report: Callable[[int], None] | None = None,
    ) -> list[Verdict[T]]:
        """Return the verdicts in the order of the conversations; see `Judge`."""
        keys = [conversation_key(self._key_name, conversation) for conversation in conversations]
        done = verdicts_on_file(self._file, keys, parse, self.counts, also_unparseable=True)
        asked = {
            key: prompt_ids(self._tokenizer, c) for key, c in zip(keys, conversations, strict=True) if key not in done
        }
        room = getattr(self._model.config, "max_position_embeddings", None)
        for key in [key for key, ids in asked.items() if room and len(ids) + self._max_tokens > room]:
            problem = f"no answer: {len(asked.pop(key))} tokens and the reply exceed the judge's context of {room}"
            done[key] = Verdict(None, None, problem)
        if report:
            report(len(done))
        longest_first = sorted(asked, key=lambda key: -len(asked[key]))
        for start in range(0, len(asked), self._batch_size):
            batch = longest_first[start : start + self._batch_size]
            for key, reply in zip(batch, self._greedy_replies([asked[key] for key in batch]), strict=True):
                self._file.add(key, reply)
                done[key] = verdict_of(reply, parse)
                self.counts["requests"] += 1
                self.counts["unparseable verdicts"] += done[key].parsed is None
            if report:
                report(len(done))
        return [done[key] for key in keys]

    def _greedy_replies(self, prompts: list[list[int]]) -> list[str]:
        import torch
        from transformers import GenerationConfig

        from lora_rlhf.base.packing import left_padded

        own, eos = self._model.generation_config, self._tokenizer.eos_token_id
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else eos
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=self._max_tokens,
            eos_token_id=sorted({end for end in (*ends, eos) if end is not None}) or None,
            pad_token_id=pad,
        )
        ids, mask = left_padded(prompts, pad or 0, self._model.get_input_embeddings().weight.device)
        self._model.generation_config = greedy  # what ours leaves open would be filled in from the model's
        try:
            with torch.no_grad():
                found = self._model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=greedy)
        finally:
            self._model.generation_config = own
        return self._tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)


def api_key_from_environment() -> str | None:
    """Return the first key that the environment has, by the names in `KEY_VARIABLES`, or none."""
    keys = (os.environ.get(name, "").strip() for name in KEY_VARIABLES)
    return next((key for key in keys if key), None)


class _PassingError(Exception):
    """A request failed in a way that may pass: what it counts as, and the wait that the server asks for."""

    def __init__(self, counted: str, problem: str, wait_s: float | None = None) -> None:
        super().__init__(problem)
        self.counted, self.wait_s = counted, wait_s


def _wait_s(attempt: int, asked_for: float | None) -> float:
    """Return the seconds before attempt 1, 2, …: what the server asked for, else doubling; a little more by chance."""
    wait = FIRST_WAIT_S * 2 ** (attempt - 1) if asked_for is None else asked_for
    return min(wait, LONGEST_WAIT_S) * random.uniform(1.0, 1.25)  # not all threads at the same moment again


def _retry_after_s(response: httpx.Response) -> float | None:
    """Return the seconds that `Retry-After` asks for, as a number or a date; none where it says neither."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _checked_base_url(base_url: str) -> str:
    """Return the URL without slashes at its end; what may be a secret in it is not shown."""
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError("judge_base_url: give an address that begins with http:// or https://, up to and with /v1")
    if url.userinfo or url.query or url.fragment:
        raise UserError(
            f"judge_base_url: more than host and path is given for {url.host}; a key belongs in the environment "
            f"variable {KEY_VARIABLES[0]}"
        )
    return str(url).rstrip("/")


def _checked_key(api_key: str | None) -> str | None:
    """Return the key; one that no header can carry would be shown in the HTTP library's complaint."""
    if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UserError(
            f"the judge's key ({' or '.join(KEY_VARIABLES)}) has a space or a character that no key has: copy it again"
        )
    return api_key or None

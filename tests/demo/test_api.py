"""The endpoint `compare`, through Gradio's own client: alone, in a crowd, and with clients that vanish."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from gradio_client import Client
from gradio_client.utils import QueueError
from served_page import Served, eventually

from lora_rlhf.memory_peak import return_freed_memory

REQUESTS: list[dict[str, Any]] = [
    {"message": f"question {i}: how do I keep {plant} alive?", "seed": i, "max_tokens": 12, "temperature": 1.0}
    for i, plant in enumerate(["basil", "mint", "thyme", "sage"] * 5)
]


def asked(client: Client, **request: Any) -> dict[str, Any]:
    return client.predict(**request, api_name="/compare")


def told(answer: dict[str, Any]) -> dict[str, Any]:
    """What may not depend on who else is there: all but the speed."""
    return {name: {k: v for k, v in one.items() if k != "tokens_per_second"} for name, one in answer["answers"].items()}


@pytest.fixture(scope="module")
def client(served: Served) -> Client:
    return Client(served.url, verbose=False)


def test_compare_returns_every_arms_answer_and_figures(served: Served, client: Client) -> None:
    found = asked(client, message="How do I keep basil alive?", max_tokens=8, seed=3)
    assert found["finished"] is True
    assert list(found["answers"]) == ["base", "instruct", "plus"]
    for answer in found["answers"].values():
        assert answer["tokens"] <= 8 and isinstance(answer["text"], str)
        assert isinstance(answer["score"], float) and answer["score_unit"] == "base's sd"
        assert answer["ended"] in (True, False) and answer["stopped"] is False and answer["bad_words"] == []


def test_history_and_system_prompt_are_part_of_the_question(client: Client) -> None:
    history = [{"role": "user", "content": "I have a plant."}, {"role": "assistant", "content": "Which one?"}]
    greedy = {"message": "Basil", "temperature": 0, "max_tokens": 12}
    answers = [
        told(asked(client, **greedy, **more))
        for more in ({}, {"history": history}, {"system_prompt": "Answer in rhymes."})
    ]
    assert answers[0] != answers[1] != answers[2] != answers[0]
    assert told(asked(client, **greedy)) == answers[0]


def test_partial_answers_stream_on_the_way(client: Client) -> None:
    job = client.submit(message="How do I keep basil alive?", max_tokens=8, api_name="/compare")
    final = job.result()
    parts = job.outputs()
    assert [part["finished"] for part in parts[:-1]] == [False] * (len(parts) - 1)
    assert final["finished"] is True and final["answers"]["plus"]["score"] is not None
    tokens = [part["answers"]["plus"]["tokens"] for part in parts]
    assert tokens == sorted(tokens) and tokens[0] == 1
    assert parts[-1] == final


def test_the_endpoint_is_documented_and_the_only_one(served: Served, client: Client) -> None:
    info = client.view_api(return_format="dict", print_info=False)
    assert isinstance(info, dict)
    assert list(info["named_endpoints"]) == ["/compare"] and info["unnamed_endpoints"] == {}
    parameters = info["named_endpoints"]["/compare"]["parameters"]
    assert [p["parameter_name"] for p in parameters] == [
        "message", "history", "system_prompt", "max_tokens", "temperature", "seed", "top_p"
    ]  # fmt: skip
    assert "compare" in httpx.get(f"{served.url}gradio_api/info").text


def test_twenty_clients_at_once_each_get_what_they_get_alone(served: Served) -> None:
    clients = [Client(served.url, verbose=False) for _ in REQUESTS]
    alone = [told(asked(clients[0], **request)) for request in REQUESTS]
    assert len({json.dumps(answer) for answer in alone}) == len(REQUESTS)
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        together = list(pool.map(lambda pair: told(asked(pair[0], **pair[1])), zip(clients, REQUESTS, strict=True)))
    assert together == alone
    assert served.waits_until_idle()


@pytest.mark.slow
def test_two_hundred_requests_twenty_at_a_time_lose_none_and_leave_memory_flat(served: Served) -> None:
    clients = [Client(served.url, verbose=False) for _ in range(20)]
    expected = {i: told(asked(clients[0], **request)) for i, request in enumerate(REQUESTS)}
    process = psutil.Process()

    def round_of_requests() -> float:
        with ThreadPoolExecutor(20) as pool:
            numbers = [i % 20 for i in range(200)]
            found = list(pool.map(lambda i: told(asked(clients[i], **REQUESTS[i])), numbers))
        assert found == [expected[i] for i in numbers]
        assert served.waits_until_idle()
        return_freed_memory()  # else what the system's allocator keeps for later is counted
        return process.memory_info().rss

    def threads_of_the_server() -> int:
        pools = [p for c in clients for p in (c.executor, c.helper_executor, c.stream_executor)]
        return process.num_threads() - sum(len(pool._threads) for pool in pools)

    round_of_requests()  # pools of threads grow to their size
    before, threads = round_of_requests(), threads_of_the_server()
    after = round_of_requests()
    assert after < before * 1.02
    assert threads_of_the_server() <= threads + 2


def joined(served: Served, session: str, message: str = "Tell me a long story") -> httpx.Response:
    """Put a request into the queue, as the page's script does."""
    dependencies = httpx.get(f"{served.url}config").json()["dependencies"]
    number = next(d["id"] for d in dependencies if d["api_name"] == "compare")
    body = {"data": [message, [], "", 96, 1.0, 0, 1.0], "fn_index": number, "session_hash": session}
    return httpx.post(f"{served.url}gradio_api/queue/join", json=body)


@contextlib.contextmanager
def listening(served: Served, session: str, until: bytes) -> Iterator[None]:
    """Listen to a session's events until these bytes came; at the end of the block the connection is cut."""
    place = urlsplit(served.url)
    with socket.create_connection((place.hostname or "", place.port or 0)) as stream:
        stream.sendall(f"GET /gradio_api/queue/data?session_hash={session} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        seen = b""
        while until not in seen:
            seen += stream.recv(65536)
        yield


def test_a_client_that_vanishes_leaves_nothing_running(served: Served) -> None:
    """Connections are cut in the middle of a stream, as a closed laptop does it."""
    for _ in range(5):
        session = uuid.uuid4().hex
        assert joined(served, session).status_code == 200
        with listening(served, session, b"process_generating"):
            assert served.comparison.under_way == 1
        assert served.waits_until_idle()
    assert asked(Client(served.url, verbose=False), message="still there?", max_tokens=4)["finished"]


def test_clients_that_vanish_while_they_wait_free_their_place(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve(tmp_path / "votes.jsonl", waiting=2)
    with served.held():  # the first request gets the models and no further
        first = uuid.uuid4().hex
        joined(served, first)
        with listening(served, first, b"process_starts"):
            for _ in range(6):  # three times as many as may wait
                session = uuid.uuid4().hex
                assert joined(served, session).status_code == 200
                with listening(served, session, b"estimation"):
                    pass
                assert eventually(lambda: httpx.get(f"{served.url}gradio_api/queue/status").json()["queue_size"] == 0)
    assert served.waits_until_idle()
    assert asked(Client(served.url, verbose=False), message="hello", max_tokens=4)["finished"]


def test_a_full_queue_says_so_and_says_a_place(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve(tmp_path / "votes.jsonl", waiting=2)
    clients = [Client(served.url, verbose=False) for _ in range(6)]
    jobs = [c.submit(message="a long story", max_tokens=96, temperature=1.0, api_name="/compare") for c in clients]
    outcomes, places = [], set()
    deadline = time.time() + 120
    while not all(job.done() for job in jobs) and time.time() < deadline:
        places |= {job.status().rank for job in jobs}
        time.sleep(0.01)
    for job in jobs:
        try:
            outcomes.append(job.result()["finished"])
        except QueueError as error:
            outcomes.append(str(error))
    full = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert full and all("full" in text.lower() for text in full)
    assert True in outcomes and {0, 1} & places
    assert served.waits_until_idle()


def test_the_api_and_files_need_the_password_where_there_is_one(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve(tmp_path / "votes.jsonl", auth=("user", "a password"))
    for path in ("config", "gradio_api/info", "gradio_api/file=README.md"):
        assert httpx.get(f"{served.url}{path}").status_code == 401
    assert "Ask all of them something" not in httpx.get(served.url).text
    with pytest.raises(Exception, match=r"(?i)auth|login|credentials"):
        Client(served.url, verbose=False, auth=("user", "wrong"))
    assert asked(Client(served.url, verbose=False, auth=("user", "a password")), message="hello", max_tokens=4)[
        "finished"
    ]


def test_one_visitors_stop_does_not_stop_another(served: Served) -> None:
    """Two threads in one comparison: the token lock is shared, the stop is not."""
    stop, results = threading.Event(), {}

    def answer(name: str, event: threading.Event) -> None:
        from lora_rlhf.chat.mixed_decoding import ChatSampling

        asked = {"plus": [{"role": "user", "content": "A long story"}]}
        for answers in served.comparison.answers(asked, ChatSampling(1.0, 1.0, 40, 1), event):
            results[name] = answers["plus"]
            if name == "stopped" and answers["plus"].tokens == 2:
                stop.set()

    threads = [
        threading.Thread(target=answer, args=("stopped", stop)),
        threading.Thread(target=answer, args=("other", threading.Event())),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["stopped"].stopped and results["stopped"].tokens <= 3
    assert not results["other"].stopped and results["other"].tokens > 3

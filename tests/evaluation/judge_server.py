"""A stand-in judge: a real HTTP server on this machine that speaks `POST /v1/chat/completions`, with faults on order.

`python tests/evaluation/judge_server.py --port 8900` gives plausible verdicts, always the same for the same request.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

QUOTED = re.compile(r"<<begin ([^\n]*?) ([0-9a-f]{12})>>\n(.*?)\n<<end \1 \2>>", re.DOTALL)


@dataclass(frozen=True)
class Scripted:
    """One response as ordered.

    Attributes:
        reply: the text of the judge, where the response is a good one.
        status: of the response.
        body: sent in place of a chat completion.
        headers: sent besides.
        delay_s: before anything is sent.
        cut_after: bytes of the body after which the connection is reset.
    """

    reply: str | None = None
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_after: int | None = None


class JudgeServer:
    """The server, running inside a `with` block.

    Args:
        reply: the judge's reply to the text of the last message.
        script: the responses to the first requests, in the order in which they come; then `reply` answers.
        before: called with the text before each answer, for tests that hold the server up.
        port: 0 for any free one.

    Attributes:
        base_url: up to and with `/v1`.
        requests: the bodies that came, in order.
        keys: their Authorization headers.
        most_at_once: the most requests that were under way together.
    """

    def __init__(
        self,
        reply: Callable[[str], str] | None = None,
        script: Iterable[Scripted] = (),
        before: Callable[[str], None] | None = None,
        port: int = 0,
    ) -> None:
        self.reply, self.script, self.before = reply or plausible_verdict, iter(script), before
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.judge = self
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def texts(self) -> list[str]:
        """The last message of every request, in order."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def serve_forever(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    judge: JudgeServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away: they were killed or ran out of time, as the tests mean them to."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.requests.append(body)
            judge.keys.append(self.headers.get("Authorization"))
            ordered = next(judge.script, None)
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
        try:
            self._respond(judge, ordered, body)
        finally:
            with judge.lock:
                judge.at_once -= 1

    def _respond(self, judge: JudgeServer, ordered: Scripted | None, body: dict[str, Any]) -> None:
        if self.path != "/v1/chat/completions":
            ordered = Scripted(status=404, body=b'{"error": {"message": "no such path"}}')
        text = body["messages"][-1]["content"]
        if judge.before:
            judge.before(text)
        ordered = ordered or Scripted(judge.reply(text))
        time.sleep(ordered.delay_s)
        content = _completion(ordered.reply or "", body["model"]) if ordered.body is None else ordered.body
        self.send_response(ordered.status)
        for name, value in {"Content-Type": "application/json", **ordered.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: ordered.cut_after])
        if ordered.cut_after is not None:  # closed at once, with what is unsent thrown away: the client sees a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: headers hold keys."""


def _completion(reply: str, model: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
    return json.dumps({"object": "chat.completion", "model": model, "choices": [choice]}).encode()


def plausible_verdict(text: str) -> str:
    """Return a verdict in the form that `text` asks for; the same answer is as good in every request, or nearly so."""
    quoted = [(name, content) for name, _, content in QUOTED.findall(text)]
    answers = [(name, content) for name, content in quoted if "answer" in name and "reference" not in name]
    form = text[text.rfind("<<end ") :]
    if "declined" in form:
        grades = {key: _number(f"{key} {answers}", 1, 5) for key in ("specific", "convincing")}
        return json.dumps({"declined": _number(f"declined {answers}", 0, 1)} | grades)
    if "safety" in form:
        scores = {key: _number(f"{key} {answers}", 4, 10) for key in ("general ability", "answer correctness")}
        return "```json\n" + json.dumps(scores | {"safety": _number(f"safety {answers}", 6, 10)}) + "\n```"
    if "[[A]]" in form:
        a, b = (_number(str([c for n, c in answers if f"assistant {x}'s" in n]), 1, 10) for x in "AB")
        favours_first = _number(text, 1, 10) == 1
        verdict = "A" if a > b or favours_first else "B" if b > a else "C"
        return f"Assistant A's work is worth {a} and assistant B's {b}, all in all.\n[[{verdict}]]"
    if _number(f"form {text}", 1, 50) == 1:
        return "I would rather not put a number on this."
    return f"It does what was asked, more or less.\nRating: [[{_number(str(answers[-1:]), 2, 10)}]]"


def _number(text: str, low: int, high: int) -> int:
    """Return a number from `low` to `high` that follows from `text`."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return low + int.from_bytes(digest[:8], "big") % (high - low + 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8900)
    server = JudgeServer(port=parser.parse_args().port)
    print(f"a stand-in judge listens: --judge_base_url {server.base_url} --judge_model stand-in", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()

"""Chat with base, Instruct and Plus side by side, in the browser.

    python demo/app.py                                    the run in runs/embedded
    python demo/app.py --output_dir runs/other            another run
    python demo/app.py --base mistralai/Mistral-7B-v0.1 --instruct mistralai/Mistral-7B-Instruct-v0.1 --plus you/adapter

Arms that are adapters on the base are decoded in one batch over the same 4-bit weights; an arm that is another whole
model gets its own 4-bit copy. The page binds to 127.0.0.1; with --host 0.0.0.0 anyone on the network can use it, so
give it --auth then. "Use via API" at the foot of the page documents the endpoint `compare`:

    from gradio_client import Client
    print(Client("http://127.0.0.1:7860").predict(message="How do I keep basil alive?", api_name="/compare"))
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from lora_rlhf.errors import UserError
from lora_rlhf.terminal import note, run_recipe


def arguments() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--output_dir", type=Path, help="a finished run [runs/embedded]")
    add("--base", help="in place of a run: Hub name or folder of the base model")
    add("--instruct", help="with --base: Hub name or folder of a model or adapter")
    add("--plus", help="with --base: Hub name or folder of a model or adapter")
    add("--reward", help="with --base: folder of a reward adapter, or name of a classifier, that scores answers")
    add("--config", type=Path, help="with --base: how models are loaded, and the chat template [package defaults]")
    add(
        "--votes",
        type=Path,
        help="where blind votes are kept, one JSON line each [votes.jsonl in OUTPUT_DIR, or here with --base]",
    )
    add("--context", type=int, default=4096, help="most tokens of conversation and answer together [%(default)s]")
    add("--max_tokens", type=int, default=512, help="most tokens of an answer that can be asked for [%(default)s]")
    add("--queue", type=int, default=64, help="most messages that wait for their turn [%(default)s]")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every network [%(default)s]")
    add("--port", type=int, help="port to listen on [the first free one from 7860]")
    add("--share", action="store_true", help="open a public link through Gradio's servers, for 72 hours")
    add("--auth", metavar="USER:PASS", help="ask for this name and password")
    return parser


def main() -> None:
    """Load what is named on the command line and serve the page until Ctrl-C."""
    given = arguments().parse_args()
    auth = given.auth.partition(":")[::2] if given.auth else None
    if auth and not all(auth):
        raise UserError("--auth: write USER:PASS, both not empty")
    if given.context < 64 or given.max_tokens < 1 or given.queue < 1:
        raise UserError("--context is at least 64, --max_tokens and --queue at least 1")
    if given.base is None and (given.instruct or given.plus or given.reward or given.config):
        raise UserError("--instruct, --plus, --reward and --config go with --base; a run (--output_dir) has its own")
    if given.base is not None and given.output_dir is not None:
        raise UserError("--output_dir and --base are two ways to say what is compared: give one of them")
    check_address(given.host, given.port)
    run = given.output_dir or Path("runs/embedded")
    votes = given.votes or (Path("votes.jsonl") if given.base else run / "votes.jsonl")
    note("loading the models …")
    try:  # late, so that --help and mistakes on the command line cost no time
        from lora_rlhf_demo.page import chat_page, served
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; pip install -c constraints.txt -e '.[demo]'") from None
    from lora_rlhf.chat.loading import named_comparison, run_comparison
    from lora_rlhf.config import RunConfig
    from lora_rlhf.config_file import config_from_file

    if given.base:
        config = config_from_file(given.config) if given.config else RunConfig()
        names = {name: getattr(given, name) for name in ("base", "instruct", "plus") if getattr(given, name)}
        comparison = named_comparison(config, names, given.reward, given.context, given.max_tokens)
    else:
        comparison = run_comparison(run, given.context, given.max_tokens)
    report = None if given.base else run / "evaluation" / "report.html"
    if problem := comparison.without_failing_reward():
        note(f"answers are not scored: the reward cannot read chat answers ({problem})")
    page = chat_page(comparison, votes, report, given.queue)
    served(page, given.host, given.port, given.share, auth, given.queue)


def check_address(host: str, port: int | None) -> None:
    """Raise `UserError` where the page could not be served: better before the models are loaded than after."""
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port is from 1 to 65535, not {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        where = f"--port {port}" if port else f"--host {host}"
        raise UserError(f"{where}: nothing can listen there ({error.strerror or error}); choose another") from None


def run() -> None:
    """Run `main` as a command: errors in words, no traceback."""
    run_recipe(main, again="Nothing is lost: votes are on disk, and conversations are in their visitors' tabs.")


if __name__ == "__main__":
    run()

"""Part 8: the same PPO step by unsloth's kernels, in a process of their own, and by TRL 1.12's trainer."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ppo_step import PEER_VERSION, Contestant
from safetensors.torch import load_file, save_file
from shapes import full_length

from card_parts.bench import NO_CARD, Bench, Figures, allocator_gib
from card_parts.correctness import relative_error
from card_parts.models import config_of_size, random_causal_lm, shared_base, step_config, step_trainer, write_model
from card_parts.ppo import MAIN, PhaseMeter, step_figures
from lora_rlhf.base.shared import POLICY, SharedBase
from lora_rlhf.errors import UserError
from lora_rlhf.memory_peak import return_freed_memory

PEERS = Path(__file__).parents[1] / "peers"
TRL_STEP = {
    "batch_size": 8, "num_mini_batches": 1, "micro_batch_size": 4, "scoring_batch_size": 8, "response_length": 64,
    "rollout_batch_size": None,
}  # fmt: skip
"""An eighth of the config's step, and a quarter of its answers: TRL decodes no more answers together than it scores,
and computes in float32."""
LEAST_SECONDS = 60.0
"""What a process of a peer may take, however little of the budget is left."""


def unsloth(bench: Bench) -> Iterator[tuple[str, Figures]]:
    """Yield the step of the config by unsloth's backend, and how its numbers agree with ours."""
    if importlib.util.find_spec("unsloth") is None or not bench.on_card:
        yield "step", {"not_measured": NO_CARD if importlib.util.find_spec("unsloth") else "unsloth is not installed"}
        return
    folder = written_model(bench)
    ours = numbers_of(bench, shared_base(step_config(bench, MAIN, bench.cap_gib), random_model(bench)))
    return_freed_memory()
    theirs = bench.folder / "unsloth.safetensors"
    words = ["--backend", "unsloth", "--model", str(folder), "--numbers", str(theirs)]
    words += ["--size", bench.size.name] + ([f"--cap_gib={bench.cap_gib}"] if bench.cap_gib else [])
    command = [sys.executable, str(PEERS / "backend_step.py"), *words]
    path = os.pathsep.join([str(PEERS.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    status, printed = printed_by(command, environment, max(LEAST_SECONDS, bench.seconds_left))
    if theirs.is_file():
        yield "agreement with ours", agreement_of(load_file(theirs), ours)
    if status:
        raise RuntimeError(f"the process with unsloth {status}; its last words are above")
    yield "step", json.loads(next(line for line in reversed(printed.splitlines()) if line.startswith("{")))


def trl(bench: Bench) -> Iterator[tuple[str, Figures]]:
    """Yield a smaller step by TRL 1.12's trainer, and the same work by ours."""
    peer = unpacked_peer(bench)
    if peer is None:
        yield "step", {"not_measured": "TRL 1.12 is not installed: --peer_path names no folder that holds it"}
        return
    _ = bench.rates  # measured while no model stands
    config = step_config(bench, MAIN, bench.cap_gib, stop_strings=[], **(TRL_STEP | bench.size.step))
    prompts = full_length(bench.pairs, bench.tokenizer, config.max_prompt_length)
    with bench.held_to(bench.cap_gib):
        meter = PhaseMeter(bench, step_trainer(bench, config, random_model(bench), prompts))
        meter.step()
        yield "ours, the same work", step_figures(bench, config, meter, bench.cap_gib)
    del meter
    folder = written_model(bench)
    return_freed_memory()
    file, s = bench.folder / "prompts.json", config.ppo
    file.write_text(json.dumps(prompts))
    shape = {
        "model": folder, "prompts": file, "rank": config.lora.r, "batch": s.batch_size, "micro": s.micro_batch_size,
        "scoring": s.scoring_batch_size, "response": s.response_length, "epochs": s.num_ppo_epochs,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in shape.items()]
    words += [f"--cap_gib={allocator_gib(bench.cap_gib)}"] if bench.cap_gib else []  # it caps torch alone
    words += ["--checkpointing"] if s.gradient_checkpointing else []
    command = [sys.executable, str(PEERS / "trl_ppo.py"), *words]
    with first_on_path(peer):
        figures = second_step_of(PEER_VERSION, command, max(LEAST_SECONDS, bench.seconds_left))
    yield "step", figures | {"batch": s.batch_size, "answer_tokens": s.response_length}


def printed_by(command: list[str], environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """Run a command, pass on what it prints, and return how it failed (empty if it did not) and what it printed.

    Args:
        command: to run.
        environment: for it.
        seconds: after which it is ended.
    """
    lines, was_overdue = list[str](), threading.Event()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:

        def end() -> None:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)  # with its own children, which would hold its output open

        def end_overdue() -> None:
            was_overdue.set()
            end()

        overdue = threading.Timer(seconds, end_overdue)
        overdue.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
            code = process.wait()
        finally:
            overdue.cancel()
            end()
    ended = f"was ended after {seconds:.0f} s" if was_overdue.is_set() else f"ended with status {code}" if code else ""
    return ended, "".join(lines)


class WatchedContestant(Contestant):
    """A contestant that is ended when its time is up, even where it has not said yet that it is ready.

    Args:
        name: of the contestant.
        command: that starts it.
        seconds: after which it is ended.
    """

    def __init__(self, name: str, command: list[str], seconds: float) -> None:
        self.seconds, self.was_overdue = seconds, False
        self.overdue = threading.Timer(seconds, self._end)
        self.overdue.start()
        try:
            super().__init__(name, command)  # waits until the process is ready
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self.overdue.cancel()
        if hasattr(self, "process"):
            super().close()

    def _end(self) -> None:
        self.was_overdue = True
        if hasattr(self, "process"):
            self.process.kill()

    def _answer(self) -> dict[str, Any]:
        try:
            return super()._answer()
        except UserError:
            if self.was_overdue:
                raise TimeoutError(f"{self.name} was ended after {self.seconds:.0f} s") from None
            raise


def second_step_of(name: str, command: list[str], seconds: float) -> dict[str, float]:
    """Return what a contestant says of its second step.

    Raises:
        UserError: it ended by itself; the text is the last line that it printed.
        TimeoutError: it took longer than `seconds`.
    """
    with contextlib.closing(WatchedContestant(name, command, seconds)) as contestant:
        contestant.step()
        return contestant.step()


def random_model(bench: Bench) -> Any:
    """Return the random model that every contestant runs."""
    return random_causal_lm(bench, config_of_size(bench))


def written_model(bench: Bench) -> Path:
    """Return a folder with that model in 4 bits, written once."""
    folder = bench.folder / "model"
    if not (folder / "config.json").is_file():
        write_model(random_model(bench), bench.tokenizer, folder)
    return folder


def unpacked_peer(bench: Bench) -> Path | None:
    """Return a folder from which TRL 1.12 is imported, its wheel unpacked where it is one; None where there is none."""
    given = bench.peer_path
    if given is None:
        return None
    name = f"{PEER_VERSION.replace('==', '-')}"
    if wheel := next(iter(given.glob(f"{name}-*.whl")), None):
        given = bench.folder / "peer"
        zipfile.ZipFile(wheel).extractall(given)
    return given if (given / f"{name}.dist-info").is_dir() else None


@contextlib.contextmanager
def first_on_path(folder: Path) -> Iterator[None]:
    """Let processes that are started inside the block import from `folder` first."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), before or ""]).rstrip(os.pathsep)
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


# -- numbers that two backends must agree on ------------------------------------------------------------------------


def numbers_of(bench: Bench, base: SharedBase) -> dict[str, torch.Tensor]:
    """Return log-probs of fixed tokens under a fixed policy adapter, and the gradient of their mean.

    The adapter is given back as it was found.
    """
    own = base.parameters(POLICY)
    before, learning = [p.detach().clone() for p in own], [p.requires_grad for p in own]
    generator = torch.Generator().manual_seed(7)  # on the CPU: the same in every process
    with torch.no_grad():
        for parameter in own:
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    base.set_trainable(POLICY, True)
    prompt, answer = 32, 32
    ids = torch.randint(5, bench.size.vocabulary, (4, prompt + answer), generator=generator).to(bench.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with base.training():
        states = base.hidden(POLICY, ids, mask)
        logprobs, _ = base.response_logprobs(states, ids, mask[:, prompt:], 1.0, None, with_entropy=False)
        logprobs.mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in own if p.grad is not None])
    with torch.no_grad():
        for parameter, value, learns in zip(own, before, learning, strict=True):
            parameter.copy_(value)
            parameter.grad = None
            parameter.requires_grad_(learns)
    return {"logprobs": logprobs.detach().float().cpu(), "gradient": gradient.float().cpu()}


def write_numbers(bench: Bench, base: SharedBase, file: Path) -> None:
    """Write `numbers_of` a base to a file."""
    save_file(numbers_of(bench, base), file)


def agreement_of(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> Figures:
    """Return how far apart two backends are."""
    apart = (theirs["logprobs"] - ours["logprobs"]).abs()
    return {
        "logprobs_mean_difference": apart.mean().item(),
        "logprobs_largest_difference": apart.max().item(),
        "gradient_error": relative_error(theirs["gradient"], ours["gradient"]),
    }

"""The processes of one run, one per GPU: which rows are whose, and how their parts become the whole.

Every process knows all prompts, draws the same random numbers and holds the same adapters. Each samples, scores and
learns from its own rows; answers and scores are put together again, and gradients added up, so that normalisation,
whitening and every metric are over the whole batch. The result does not depend on how many processes there are.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from lora_rlhf.base.packing import left_padded
from lora_rlhf.errors import UserError
from lora_rlhf.memory_peak import ran_out
from lora_rlhf.ppo.rollout import Rollout
from lora_rlhf.ppo.scoring import Scored

SAMPLED = ("response_ids", "action_mask", "score_ids", "score_mask", "ended", "sampled_logprobs")
SCORED = ("logprobs", "reference", "entropy", "values", "score")
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""By which a process knows of the others."""
WAIT = timedelta(minutes=10)
"""For another process's part of a step; one that died is noticed at once, one that hangs after this."""


class Processes:
    """The processes that `accelerate launch` or `torchrun` started; one alone without them."""

    def __init__(self) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self._board: torch.distributed.Store | None = None
        if self.count > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))

    def meet(self) -> None:
        """Find the store of the launcher, through which `tell` and `told` go; raise `UserError` where there is none."""
        if self.count == 1 or self._board is not None:
            return
        with words_for_the_lost():
            store, _, _ = next(torch.distributed.rendezvous("env://", self.rank, self.count, timeout=WAIT))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._board = torch.distributed.PrefixStore(f"lora_rlhf/{attempt}", store)

    def tell(self, what: str, answer: str) -> None:
        """Let the other processes know, where this is the main one; they learn of its work in no other way."""
        if self._board is not None and self.is_main:
            self._board.set(what, answer)

    def told(self, what: str) -> str:
        """Wait until the main process tells, however long; raise `UserError` where it is gone."""
        assert self._board is not None, "they have to meet first"
        with words_for_the_lost():
            while not self._board.check([what]):
                time.sleep(0.5)
            return bytes(self._board.get(what)).decode()

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Talk to the other processes inside the block.

        Raises:
            UserError: another process ends or hangs meanwhile.
        """
        if self.count == 1:
            yield
            return
        from accelerate import PartialState

        try:
            with words_for_the_lost():
                PartialState(cpu=not torch.cuda.is_available(), timeout=WAIT)
                yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            PartialState._reset_state()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let libraries inside the block see no other processes: a stage that one process does by itself."""
        hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ} if self.count > 1 else {}
        try:
            yield
        finally:
            if hidden:
                from accelerate.state import AcceleratorState, PartialState

                os.environ |= hidden
                AcceleratorState._reset_state(reset_partial_state=True)
                PartialState._reset_state()

    @property
    def is_main(self) -> bool:
        """Whether this one writes and prints."""
        return self.rank == 0

    def splits(self, total: int) -> bool:
        """Return whether a batch of `total` rows is split: every process has rows then."""
        return 1 < self.count <= total

    def rows(self, total: int) -> slice:
        """Return the rows that this process samples and scores: every `count`-th, or all where it is not split."""
        return slice(self.rank, None, self.count) if self.splits(total) else slice(None)

    def learned_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return those of `rows` (numbers of the whole batch) whose gradient this process takes; maybe none."""
        return rows[rows % self.count == self.rank]

    def own_number(self, rows: torch.Tensor, total: int) -> torch.Tensor:
        """Return the place of `rows` (numbers of the whole batch) among the rows that this process scored."""
        return rows // self.count if self.splits(total) else rows

    def whole_rollout(self, part: Rollout, prompts: Sequence[Sequence[int]], pad: int) -> Rollout:
        """Return the rollout of all prompts, given the part of `rows`."""
        if not self.splits(len(prompts)):
            return part
        device = part.response_ids.device
        query_ids, query_mask = left_padded(prompts, pad, device)
        parts = gathered({name: getattr(part, name).cpu() for name in SAMPLED} | {"texts": part.texts})
        texts = [""] * len(prompts)
        for rank, other in enumerate(parts):
            texts[rank :: self.count] = other["texts"]
        whole = {name: self._interleaved([other[name] for other in parts], device) for name in SAMPLED}
        return Rollout(query_ids=query_ids, query_mask=query_mask, texts=texts, **whole)

    def whole_scores(self, part: Scored, total: int) -> Scored:
        """Return the scores of all rows, given the part of `rows`; `common` stays this process's own."""
        if not self.splits(total):
            return part
        device, names = part.score.device, list(part.raw_scores)
        parts = gathered(
            {name: getattr(part, name).cpu() for name in SCORED} | {f"raw {n}": part.raw_scores[n].cpu() for n in names}
        )
        whole = {name: self._interleaved([other[name] for other in parts], device) for name in SCORED}
        raw = {name: self._interleaved([other[f"raw {name}"] for other in parts], device) for name in names}
        return replace(part, raw_scores=raw, **whole)

    def _interleaved(self, parts: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        total = sum(map(len, parts))
        whole = parts[0].new_empty((total, *parts[0].shape[1:]))
        for rank, part in enumerate(parts):
            whole[rank :: self.count] = part
        return whole.to(device)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes; a parameter has none afterwards where no process had one."""
        if self.count == 1:
            return
        device = parameters[0].device
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
        torch.distributed.all_reduce(has, torch.distributed.ReduceOp.MAX)
        found = [p for p, any_has in zip(parameters, has.tolist(), strict=True) if any_has]
        if not found:
            return
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in found])
        torch.distributed.all_reduce(flat)
        for parameter, total in zip(found, flat.split([p.numel() for p in found]), strict=True):
            parameter.grad = total.view_as(parameter).clone()

    def sum_numbers(self, numbers: dict[str, float], largest: Sequence[str]) -> dict[str, float]:
        """Return the sums over all processes, or the largest of those that are named."""
        if self.count == 1:
            return numbers
        parts = gathered(numbers)
        return {
            name: max(part[name] for part in parts) if name in largest else sum(part[name] for part in parts)
            for name in numbers
        }

    def any(self, here: bool) -> bool:
        """Return whether it holds in any process."""
        return here if self.count == 1 else any(gathered(here))

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.any(False)

    def first(self, problem: str | None) -> str | None:
        """Return the problem of the first process that has one; none: nobody has."""
        return problem if self.count == 1 else next(filter(None, gathered(problem)), None)

    def from_main(self, value: Any) -> Any:
        """Return what the main process has."""
        return value if self.count == 1 else gathered(value)[0]


def gathered(value: Any) -> list[Any]:
    """Return the value of every process, by rank.

    Raises:
        RuntimeError: another process has ended, or does not answer in time; `connected` puts it into words.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


@contextlib.contextmanager
def words_for_the_lost() -> Iterator[None]:
    """Say in a `UserError` that another process is gone, where that is what an error inside the block says."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error) and (lost := lost_process(error)):
            raise lost from None
        raise


def lost_process(error: RuntimeError) -> UserError | None:
    """Return in words that another process is gone, where that is what `error` says."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timeout", "NCCL")
    if not isinstance(error, torch.distributed.DistError) and not any(sign in text for sign in signs):
        return None
    return UserError(
        f"another process of this run has ended or hangs ({text.splitlines()[0][:120]}); look at its last lines. The "
        "same command goes on from the last checkpoint"
    )

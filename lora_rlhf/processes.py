"""The processes of one run, one per GPU: which rows are whose, and how their parts become the whole.

Every process knows all examples, draws the same random numbers and holds the same adapters. Each samples, scores and
learns from its own rows; answers and scores are put together again, and gradients added up, so that normalisation,
whitening and every metric are over the whole batch. The result does not depend on how many processes there are.
Merging and all writing are the first process's.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from lora_rlhf.base.packing import left_padded, right_padded
from lora_rlhf.errors import UserError
from lora_rlhf.memory_peak import ran_out

if TYPE_CHECKING:
    from lora_rlhf.ppo.rollout import Rollout
    from lora_rlhf.ppo.scoring import Scored

SAMPLED = ("response_ids", "action_mask", "ended", "ended_by_eos", "sampled_logprobs", "free", "texts")
SCORED = ("logprobs", "reference", "entropy", "values", "score")
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""By which a process knows of the others."""
WAIT = timedelta(minutes=10)
"""For another process's part of a step; one that died is noticed at once, one that hangs after this."""
BUCKET_BYTES = 64 * 2**20
"""Of gradients that are copied together to be summed."""


class Processes:
    """The processes that `accelerate launch` or `torchrun` started; one alone without them."""

    def __init__(self) -> None:
        self.count, self.rank = launched(), int(os.environ.get("RANK", "0"))
        self._board: torch.distributed.Store | None = None
        self._groups = 0
        if self.count > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))

    @classmethod
    def one(cls) -> Processes:
        """Return this process as the only one, whatever was launched."""
        processes = cls()
        processes.count, processes.rank = 1, 0
        return processes

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
        self.meet()
        assert self._board is not None
        store = torch.distributed.PrefixStore(f"group/{self._groups}", self._board)  # addresses of one before are stale
        self._groups += 1
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        try:
            with words_for_the_lost():
                torch.distributed.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.count, timeout=WAIT
                )
                yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            _forget_in_accelerate()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let libraries inside the block see no other processes; this object still reaches them where `connected`."""
        hidden = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ} if self.count > 1 else {}
        if hidden:
            _forget_in_accelerate()
        try:
            yield
        finally:
            if hidden:
                os.environ |= hidden
                _forget_in_accelerate()

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
        sampled = {name: getattr(part, name) for name in SAMPLED}
        # as lists, since what the reward model reads need not be as wide in every process
        read = [ids[mask].tolist() for ids, mask in zip(part.score_ids, part.score_mask, strict=True)]
        whole = self.whole({**sampled, "read": read}, len(prompts))
        score_ids, score_mask = right_padded(whole.pop("read"), pad, device, at_least=part.response_ids.shape[1] + 1)
        return replace(
            part, query_ids=query_ids, query_mask=query_mask, score_ids=score_ids, score_mask=score_mask, **whole
        )

    def whole_scores(self, part: Scored, total: int) -> Scored:
        """Return the scores of all rows, given the part of `rows`; `common` stays this process's own."""
        if not self.splits(total):
            return part
        whole = self.whole({name: getattr(part, name) for name in SCORED}, total)
        return replace(part, raw_scores=self.whole(part.raw_scores, total), **whole)

    def whole(self, part: Mapping[str, Any], total: int) -> dict[str, Any]:
        """Return what there is of all rows, given what there is of `rows(total)`.

        Args:
            part: lists, or tensors [rows, ...] which come back on their device.
            total: rows of the whole batch.
        """
        if not self.splits(total):
            return dict(part)
        parts = gathered({k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in part.items()})
        return {name: self._interleaved([other[name] for other in parts], own) for name, own in part.items()}

    def _interleaved(self, parts: list[Any], own: Any) -> Any:
        total = sum(map(len, parts))
        whole: Any = [None] * total
        if isinstance(own, torch.Tensor):
            whole = own.new_empty((total, *own.shape[1:]), device="cpu")
        for rank, part in enumerate(parts):
            whole[rank :: self.count] = part
        return whole.to(own.device) if isinstance(own, torch.Tensor) else whole

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes; a parameter has none afterwards where no process had one."""
        if self.count == 1:
            return
        device = parameters[0].device
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
        torch.distributed.all_reduce(has, torch.distributed.ReduceOp.MAX)
        summed = [p for p, any_has in zip(parameters, has.tolist(), strict=True) if any_has]
        for parameter in summed:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in summed if p.grad is not None], BUCKET_BYTES):
            if len(bucket) == 1:
                torch.distributed.all_reduce(bucket[0])
                continue
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def sum_numbers(self, numbers: dict[str, float], largest: Sequence[str] = ()) -> dict[str, float]:
        """Return the sums over the processes that have a number, or the largest of those that are named."""
        if self.count == 1:
            return numbers
        parts = gathered(numbers)
        found: dict[str, float] = {}
        for name, number in (item for part in parts for item in part.items()):
            if name not in found:
                found[name] = number
            else:
                found[name] = max(found[name], number) if name in largest else found[name] + number
        return found

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


def launched() -> int:
    """Return how many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gathered(value: Any) -> list[Any]:
    """Return the value of every process, by rank.

    Raises:
        RuntimeError: another process has ended, or does not answer in time; `connected` puts it into words.
    """
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _buckets(tensors: Sequence[torch.Tensor], most: int) -> Iterator[list[torch.Tensor]]:
    """Yield the tensors in order, several together while they take at most `most` bytes; a larger one by itself."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(other.nbytes for other in bucket) + tensor.nbytes > most:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _forget_in_accelerate() -> None:
    """Let accelerate look anew for other processes when it is asked next."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


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

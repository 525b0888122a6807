"""What a model says of a few tokens, read in every way in which PPO reads it, and how far two readings are apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lora_rlhf.base.lm_head import LmHead
from lora_rlhf.base.packing import left_padded, right_padded, states_without_padding
from lora_rlhf.base.role_layers import MixedRoles
from lora_rlhf.base.shared import POLICY, REFERENCE, SharedBase
from lora_rlhf.base.token_logprobs import token_logprobs
from lora_rlhf.base.trunk import trunk_of
from lora_rlhf.ppo.decoding import Sampling, decoder_of

ROWS, LENGTH, PADDING, NEW = 3, 24, 5, 3
"""Rows, tokens in the longest, how many fewer each next row has, and tokens that are sampled after them."""
NO_END = SimpleNamespace(pad_token_id=0, eos_token_id=-1, chat_template=None)
"""In place of a tokenizer, where answers are sampled that must not end."""

Rows = list[list[int]]
Reader = Callable[[str, Rows], list[torch.Tensor]]
"""Returns, for a role and rows of token ids, the log-prob of each token but the first."""


def sample_rows(vocabulary: int) -> Rows:
    """Return rows of token ids from all over the vocabulary, of different lengths; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (LENGTH - PADDING * i,), generator=generator).tolist() for i in range(ROWS)]


@torch.no_grad()
def own_logprobs(causal_lm: Any, rows: Rows) -> list[torch.Tensor]:
    """Return what a model's own logits say of rows of token ids, each on its own: with no padding and no mask."""
    device = causal_lm.get_input_embeddings().weight.device
    return [row_logprobs(causal_lm, torch.tensor([row], device=device))[0] for row in rows]


@torch.no_grad()
def own_logprobs_at_once(causal_lm: Any, rows: Rows) -> list[torch.Tensor]:
    """Return what `own_logprobs` does, from one pass: a causal model does not see what is behind a token."""
    ids, mask = right_padded(rows, NO_END.pad_token_id, causal_lm.get_input_embeddings().weight.device)
    return [row[real] for row, real in zip(row_logprobs(causal_lm, ids), mask[:, 1:], strict=True)]


def row_logprobs(causal_lm: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probs [rows, length - 1], float32, of token ids [rows, length], but the first."""
    logits = causal_lm(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]


def shared_logprobs(base: SharedBase, role: str, rows: Rows) -> list[torch.Tensor]:
    """Return what a role says of rows of token ids, as PPO's update computes it; with gradient where that is on."""
    ids, mask = left_padded(rows, NO_END.pad_token_id, base.device)
    return _of_states(base, base.hidden(role, ids, mask), ids, mask)


def _of_states(base: SharedBase, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    predicted = mask[:, 1:] & mask[:, :-1]
    logprobs, _ = base.response_logprobs(states, ids, predicted, 1.0, None, with_entropy=False)
    return [row[real] for row, real in zip(logprobs, predicted, strict=True)]


@contextlib.contextmanager
def rounded_once_more(causal_lm: Any, dtype: torch.dtype) -> Iterator[None]:
    """Change what linear layers and whole blocks give by up to half of `eps`, and round it again, inside the block.

    In 16 bits, an output stays what it is or moves by one unit in the last place.
    """
    generator, half = torch.Generator().manual_seed(0), torch.finfo(dtype).eps / 2

    def rounded(_: Any, __: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, torch.Tensor) or not first.is_floating_point():
            return output
        shift = 1 + half * (2 * torch.rand(first.shape, generator=generator) - 1)
        moved = (first.float() * shift.to(first.device)).to(first.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    blocks = [block for stack in causal_lm.modules() if isinstance(stack, nn.ModuleList) for block in stack]
    layers = [module for module in causal_lm.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(rounded) for module in dict.fromkeys([*blocks, *layers])]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Difference:
    """How far a model, shared or not, is from what is expected, in one way of reading it.

    Attributes:
        reading: which way, in words.
        largest: of all tokens, in nats.
        typical: mean of the absolute values over all tokens but the worst third, in nats. Rounding can send a token
            to another expert, which moves far what is said of it and after it, and is no error.
    """

    reading: str
    largest: float
    typical: float


def difference(reading: str, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> Difference:
    """Return how far log-probs (lists of rows) are from what is expected; infinitely, where one is not finite."""
    sizes = (torch.cat(actual) - torch.cat(expected)).detach().float().abs().sort().values  # NaN comes last
    if not bool(sizes.isfinite().all()):
        return Difference(reading, float("inf"), float("inf"))
    return Difference(reading, sizes[-1].item(), sizes[: len(sizes) - len(sizes) // 3].mean().item())


EVAL, TRAIN, MIXED = "log-probs in eval mode", "log-probs in train mode", "log-probs of several roles in one pass"
DECODED, MIXED_DECODED = "left-padded decoding with a cache", "left-padded decoding of several roles in one pass"
GRADIENTS, SCORES = "gradients of the adapter", "scores of a reward adapter that was trained on its own"


def shared_differences(
    base: SharedBase, rows: Rows, right: Mapping[str, list[torch.Tensor]], expected: Reader, mixed: bool
) -> Iterator[Difference]:
    """Yield how far a shared base is from `expected` where it is not just read in eval mode, role by role.

    Args:
        base: whose policy differs from its reference.
        rows: of token ids.
        right: role → what `expected` returns for `rows`.
        expected: what is right.
        mixed: whether several roles are played in one pass too.
    """
    with base.training(), torch.enable_grad():
        yield difference(TRAIN, shared_logprobs(base, POLICY, rows), right[POLICY])
    with base.role(POLICY), base.autocast():
        decoded = _sampled_with_an_end(base.causal_lm, rows)
    yield _compared(DECODED, decoded, [POLICY] * len(rows), rows, expected)
    if not mixed:
        return
    twice, both = [row for row in rows for _ in range(2)], [REFERENCE, POLICY] * len(rows)
    ids, mask = left_padded(twice, NO_END.pad_token_id, base.device)
    with torch.no_grad():
        logprobs = _of_states(base, base.hidden_mixed(both, ids, mask), ids, mask)
    yield difference(MIXED, logprobs, [right[role][i] for i in range(len(rows)) for role in (REFERENCE, POLICY)])
    with base.mixed(MixedRoles(both, base.layers.side_by_side(both))), base.autocast():
        decoded = _sampled(base.causal_lm, twice)
    yield _compared(MIXED_DECODED, decoded, both, twice, expected)


@torch.no_grad()
def batch_differences(causal_lm: Any, rows: Rows, own: list[torch.Tensor]) -> Iterator[Difference]:
    """Yield how far a model that is not shared is from what it says alone, where it is read and answers in a batch.

    Args:
        causal_lm: the model.
        rows: of token ids.
        own: what `own_logprobs` returns for them.
    """
    head = LmHead.of(causal_lm)
    ids, mask = left_padded(rows, NO_END.pad_token_id, head.weight.device)
    predicted = mask[:, 1:] & mask[:, :-1]
    states = states_without_padding(trunk_of(causal_lm), ids, mask)[:, :-1][predicted]
    logprobs, _ = token_logprobs(states, head, ids[:, 1:][predicted], 1.0, None)
    yield difference(EVAL, list(logprobs.split([len(row) - 1 for row in rows])), own)
    decoded = _sampled_with_an_end(causal_lm, rows)
    yield _compared(DECODED, decoded, [REFERENCE] * len(rows), rows, lambda _, rows: own_logprobs(causal_lm, rows))


def _sampled_with_an_end(causal_lm: Any, rows: Rows) -> tuple[Rows, list[torch.Tensor]]:
    """Return what `_sampled` does, of answers one of which ends at once, so that its row leaves the batch."""
    tokens, _ = _sampled(causal_lm, rows)
    return _sampled(causal_lm, rows, end=_said_first_by_one(tokens))


@torch.no_grad()
def _sampled(causal_lm: Any, rows: Rows, end: int = NO_END.eos_token_id) -> tuple[Rows, list[torch.Tensor]]:
    """Return tokens that a model, or who is played on it, says after each row, and their log-probs, by our decoder.

    An answer ends with the token `end`, if that is said.
    """
    tokenizer = SimpleNamespace(**{**vars(NO_END), "eos_token_id": end})
    decoder = decoder_of(causal_lm)
    ids, mask = left_padded(rows, NO_END.pad_token_id, decoder.device)
    uniform = torch.rand((NEW, len(rows)), generator=torch.Generator().manual_seed(1)).to(decoder.device)
    tokens, logprobs = decoder(ids, mask, uniform, Sampling(NEW, 1.0), tokenizer)
    answers = [row[: row.index(end) + 1] if end in row else row for row in tokens.tolist()]
    return answers, [row[: len(answer)] for row, answer in zip(logprobs, answers, strict=True)]


def _said_first_by_one(answers: Rows) -> int:
    """Return a token with which one answer alone begins, or that of `NO_END` where there is none."""
    first = [answer[0] for answer in answers]
    return next((token for token in first if first.count(token) == 1), NO_END.eos_token_id)


def _compared(
    reading: str, decoded: tuple[Rows, list[torch.Tensor]], roles: list[str], rows: Rows, expected: Reader
) -> Difference:
    tokens, logprobs = decoded
    right: dict[int, torch.Tensor] = {}
    for role in dict.fromkeys(roles):
        places = [place for place, own in enumerate(roles) if own == role]
        whole = expected(role, [rows[place] + tokens[place] for place in places])
        right |= {place: row[-len(tokens[place]) :] for place, row in zip(places, whole, strict=True)}
    return difference(reading, logprobs, [right[place] for place in range(len(rows))])


@contextlib.contextmanager
def random_policy(base: SharedBase) -> Iterator[None]:
    """Let the policy differ from the base inside the block, and have gradients; all is as before afterwards.

    The update of a layer is then about as large as its input.
    """
    parameters = base.parameters(POLICY)
    kept = [(p, p.detach().clone(), p.requires_grad) for p in parameters]
    fill_adapter(base.model, POLICY, base.configs[POLICY].lora_alpha / base.configs[POLICY].r)
    base.set_trainable(POLICY, True)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, trainable in kept:
                parameter.copy_(value)
                parameter.requires_grad_(trainable)
                parameter.grad = None


@torch.no_grad()
def halve_policy(base: SharedBase) -> None:
    """Halve the matrices of the policy: a random one may leave the range of float16 where the base does not."""
    for parameter in base.parameters(POLICY):
        parameter.div_(2)


@torch.no_grad()
def fill_adapter(model: nn.Module, name: str, scaling: float) -> None:
    """Give an adapter's matrices, A [rank, in] and B [out, rank], numbers that make their product matter.

    Args:
        model: of PEFT.
        name: of the adapter.
        scaling: of its product.
    """
    generator = torch.Generator().manual_seed(2)
    for path, parameter in model.named_parameters():
        if f".{name}." in path and "lora_" in path:
            width = parameter.shape[1] if "lora_A" in path else parameter.shape[1] * scaling**2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)

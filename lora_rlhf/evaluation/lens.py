"""The probability of words at each layer of a role (logit lens), and word by word at the last layer.

The lens reads the states of every layer through the final norm and the LM head, as if the layers above did nothing
(nostalgebraist, "interpreting GPT: the logit lens", 2020); it shows where in the model a word becomes likely. It sees
one token ahead, so that a word counts there by its first token. At the last layer a word of several tokens has its
exact probability: the product of its tokens' probabilities, each given those before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lora_rlhf.base.attention import GROUPED, PLAIN_MODELS
from lora_rlhf.base.lm_head import LmHead
from lora_rlhf.base.packing import right_padded, states_without_padding
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.base.token_logprobs import rows_per_chunk
from lora_rlhf.errors import UserError

Tokens = tuple[int, ...]
LINE = "\n"
"""What spellings are cut behind: a tokenizer may give a text that stands alone a space that it does not have."""


@dataclass(frozen=True)
class WordTokens:
    """A word as one tokenizer writes it.

    Attributes:
        word: as listed.
        tokens: its distinct spellings where a word may begin: bare and behind a space, as listed and capitalised.
        begins: the distinct tokens that stand for it in the lens: of each spelling the first that is not just a space.
    """

    word: str
    tokens: tuple[Tokens, ...]
    begins: Tokens


@dataclass
class WordProbabilities:
    """What one role gives to the words, row by row: means over a row's answer positions, float32, on the CPU.

    A word counts wherever its tokens are written next, whatever follows: `fool` counts in `foolish` where that begins
    with the tokens of `fool`.

    Attributes:
        by_layer: [layers, rows] summed probability of all distinct tokens that begin a word, layers 1 to L; the last is
            the model's own distribution. Far above the words' own where spellings begin with a letter or two.
        whole_by_layer: [layers, rows] the same with every first token weighed by the probability, at the last layer,
            that the rest of a spelling follows it. At the last layer it is the probability that any of the words is
            written next, each event counted once.
        by_word: [words, rows] probability, at the last layer, that the word is written next: summed over its spellings.
    """

    by_layer: torch.Tensor
    whole_by_layer: torch.Tensor
    by_word: torch.Tensor


def word_tokens(tokenizer: Any, words: Sequence[str]) -> list[WordTokens]:
    """Return the words' spellings, in order; one that needs the unknown token is left out."""
    found = []
    for word in words:
        capital = word[:1].upper() + word[1:]
        texts = dict.fromkeys((word, f" {word}", capital, f" {capital}"))
        cut = dict.fromkeys(_tokens_in_text(tokenizer, text) for text in texts)
        spellings = tuple(s for s in cut if s and tokenizer.unk_token_id not in s)
        begins = dict.fromkeys(next((t for t in s if tokenizer.decode([t]).strip()), s[0]) for s in spellings)
        found.append(WordTokens(word, spellings, tuple(begins)))
    return found


def _tokens_in_text(tokenizer: Any, text: str) -> Tokens:
    line, whole, alone = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (LINE, LINE + text, text))
    return tuple(whole[len(line) :] if whole[: len(line)] == line else alone)


@torch.no_grad()
def bad_word_probabilities(
    base: SharedBase,
    role: str,
    prompts: list[list[int]],
    answers: list[list[int]],
    words: Sequence[WordTokens],
    batch: int,
    temperature: float = 1.0,
) -> WordProbabilities:
    """Return the probabilities of `words` under `role` wherever a token of an answer is predicted.

    Args:
        base: holds the role; it plays afterwards what it played before.
        role: who is asked.
        prompts: ids, at least one per row.
        answers: ids; an empty answer counts the one position behind its prompt.
        words: from `word_tokens`.
        batch: beginnings of words that are run at one time.
        temperature: divides the logits, of every layer.

    Raises:
        UserError: no word has a spelling, or the model's layers and final norm are not where the lens looks for them.
        ValueError: an empty prompt.
    """
    if not (hasattr(base.trunk, "layers") and hasattr(base.trunk, "norm")):
        kind = base.trunk.config.model_type
        raise UserError(f"bad_words: models of type {kind} have no `layers` and `norm` for the lens; leave it out")
    spellings = [spelling for word in words for spelling in word.tokens]
    if not spellings:
        raise UserError("bad_words: the tokenizer can write none of the words; give other words")
    if not all(prompts):
        raise ValueError("an empty prompt predicts nothing")
    owner = torch.tensor([k for k, word in enumerate(words) for _ in word.tokens])
    wanted = sorted({token for spelling in spellings for token in spelling})
    column = {token: i for i, token in enumerate(wanted)}
    firsts = [column[spelling[0]] for spelling in spellings]
    begins = [column[token] for token in sorted({token for word in words for token in word.begins})]
    once = sorted(spellings.index(spelling) for spelling in shortest(spellings))
    groups = list(_of_one_length(longest_beginnings(spellings), batch))
    found = WordProbabilities(
        *(torch.zeros(n, len(prompts)) for n in (len(base.trunk.layers), len(base.trunk.layers), len(words)))
    )

    def probabilities(states: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor(wanted, device=base.device)
        return token_probabilities(states.flatten(0, -2), base.lm_head, ids, temperature).view(*states.shape[:-1], -1)

    with base.role(role):
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            row, first = prompt + answer[:-1], len(prompt) - 1
            cache = DynamicCache() if reads_branches(base, len(row) + max(map(len, spellings))) else None
            lens = probabilities(_layer_states(base, row, first, cache))
            after: dict[Tokens, torch.Tensor] = {}  # beginning -> [positions, wanted], what follows it
            for group in groups:
                if cache is None:
                    states = explicit_states(base, row, first, group, batch)
                else:
                    states = branch_states(base, row, first, group, cache)
                for beginning, probs in zip(group, probabilities(states), strict=True):
                    after |= {beginning[: n + 1]: probs[:, n] for n in range(len(beginning))}
            rest = torch.ones(lens.shape[1], len(spellings), device=lens.device)
            for k, spelling in enumerate(spellings):
                for n in range(1, len(spelling)):
                    rest[:, k] *= after[spelling[:n]][:, column[spelling[n]]]
            written = lens[..., firsts] * rest  # [layers, positions, spellings]
            found.by_layer[:, i] = lens[..., begins].sum(-1).mean(1)
            found.whole_by_layer[:, i] = written[..., once].sum(-1).mean(1)
            found.by_word[:, i] = torch.zeros(len(words)).index_add(0, owner, written[-1].mean(0).cpu())
    return found


def token_probabilities(states: torch.Tensor, head: LmHead, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return softmax(logits / T) at `tokens`, float32 [n, tokens]; the logits of one chunk exist at one time.

    Args:
        states: [n, d] after the final norm.
        head: the LM head.
        tokens: [tokens] ids, int64.
        temperature: T.
    """
    found = torch.empty(len(states), len(tokens), device=states.device)
    chunk = rows_per_chunk(len(head.weight))
    for start in range(0, len(states), chunk):
        logits = head(states[start : start + chunk])
        if temperature != 1:
            logits /= temperature
        found[start : start + chunk] = (logits[:, tokens] - logits.logsumexp(1, keepdim=True)).exp_()
    return found


def shortest(spellings: Iterable[Tokens]) -> list[Tokens]:
    """Return the distinct spellings, sorted, less those that begin with another, which is written where they are."""
    kept: list[Tokens] = []
    for spelling in sorted(set(spellings)):  # whatever continues a spelling stands behind it
        if not kept or spelling[: len(kept[-1])] != kept[-1]:
            kept.append(spelling)
    return kept


def longest_beginnings(spellings: Iterable[Tokens]) -> list[Tokens]:
    """Return all that comes before the last token of a spelling, less what another of them begins with; by length."""
    proper = sorted({s[:-1] for s in spellings if len(s) > 1})
    # in sorted order whatever continues a beginning stands right behind it
    kept = [p for i, p in enumerate(proper) if i + 1 == len(proper) or proper[i + 1][: len(p)] != p]
    return sorted(kept, key=len)


def _of_one_length(beginnings: list[Tokens], size: int) -> Iterator[list[Tokens]]:
    for _, group in groupby(beginnings, key=len):
        same = list(group)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def _layer_states(base: SharedBase, row: list[int], first: int, cache: Cache | None) -> torch.Tensor:
    """Return the states of every layer after the final norm [layers, positions, d], from position `first` on."""
    kept: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: kept.append((out[0] if isinstance(out, tuple) else out)[0, first:])
        )
        for layer in base.trunk.layers
    ]
    ids = torch.tensor([row], device=base.device)
    try:
        with base.autocast():
            base.trunk(
                input_ids=ids,
                position_ids=torch.arange(len(row), device=base.device)[None],
                past_key_values=cache,
                use_cache=cache is not None,
            )
            return base.trunk.norm(torch.stack(kept))
    finally:
        for hook in hooks:
            hook.remove()


# -- states behind the beginnings of words ----------------------------------------------------------------------------


class _ReadOnlyLayer(DynamicLayer):
    """Keys and values [1, heads, length, width] of a row that many branches read and none adds to."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row's, then the branches' own."""
        pairs = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat([row.expand(len(new), -1, -1, -1), new], 2) for row, new in pairs)
        return keys, values


def reads_branches(base: SharedBase, length: int) -> bool:
    """Return whether the model is known to obey a four-dimensional mask, and sees all of a row of `length`."""
    config = base.trunk.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config.model_type in PLAIN_MODELS
        and type(base.trunk).forward.__module__.startswith("transformers.")  # unsloth's own ignores masks
        and config._attn_implementation in (GROUPED, "sdpa", "eager")
        and kinds <= {"full_attention", "sliding_attention"}
        and (getattr(config, "sliding_window", None) or length) >= length
    )


def branch_states(base: SharedBase, row: list[int], first: int, beginnings: list[Tokens], cache: Cache) -> torch.Tensor:
    """Return the states after the final norm [beginnings, positions, m, d] of words that begin behind each position.

    One forward: a batch row per beginning holds it once per position, and a mask lets every copy see the row up to
    its position, and itself.

    Args:
        base: playing the role.
        row: [length] ids.
        first: the first position; the last is the row's last.
        beginnings: tokens, all of one length m.
        cache: the row's keys and values; left as they are.
    """
    device, m = base.device, len(beginnings[0])
    places = torch.arange(first, len(row), device=device)
    at, step = places.repeat_interleave(m), torch.arange(m, device=device).repeat(len(places))
    sees_row = torch.arange(len(row), device=device) <= at[:, None]
    sees_own = (at == at[:, None]) & (step <= step[:, None])
    hidden = ~torch.cat([sees_row, sees_own], 1)
    mask = torch.zeros(hidden.shape, dtype=base.compute_dtype, device=device)
    mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
    with base.autocast():
        states = base.trunk(
            input_ids=torch.tensor(beginnings, device=device).repeat(1, len(places)),
            position_ids=(at + 1 + step)[None],
            attention_mask=mask[None, None],
            past_key_values=Cache(layers=[_ReadOnlyLayer(layer.keys, layer.values) for layer in cache.layers]),
            use_cache=True,
        ).last_hidden_state
    return states.unflatten(1, (len(places), m))


def explicit_states(base: SharedBase, row: list[int], first: int, beginnings: list[Tokens], batch: int) -> torch.Tensor:
    """Return what `branch_states` does for any model: every row written out, `batch` at a time."""
    m = len(beginnings[0])
    written = [row[: at + 1] + list(b) for b in beginnings for at in range(first, len(row))]
    parts = []
    for start in range(0, len(written), batch):
        ids, mask = right_padded(written[start : start + batch], 0, base.device)
        with base.autocast():
            states = states_without_padding(base.trunk, ids, mask)
        last = mask.sum(1, keepdim=True) - m + torch.arange(m, device=base.device)
        parts.append(states[torch.arange(len(ids), device=base.device)[:, None], last])
    return torch.cat(parts).unflatten(0, (len(beginnings), -1))

"""Whether every token that a tokenizer makes of text is one that its model knows."""

from __future__ import annotations

from typing import Any

from lora_rlhf.errors import UserError


def check_vocabulary(tokenizer: Any, size: int, source: str) -> None:
    """Raise `UserError` where the tokenizer makes tokens of ordinary text that the model has no embedding for.

    A special token beyond the embeddings (one for images, say) does no harm while nothing writes it.

    Args:
        tokenizer: with its chat template and pad token.
        size: rows of the model's embeddings.
        source: the model's name, for errors.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= size}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    used = {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token}
    template = tokenizer.chat_template or ""
    written = [token for token in beyond if token not in special or token in used or token in template]
    if written:
        first = min(written, key=lambda token: beyond[token])
        raise UserError(
            f"{source}: its tokenizer has {len(written)} tokens that the model has no embedding for (the first is "
            f"{first!r}, number {beyond[first]}, and the model has {size}): tokenizer and weights are not of one "
            "model, or the embeddings were to be resized and were not"
        )

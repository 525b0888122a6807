"""Loading the tokenizer, with a chat template and a pad token that is not EOS; whether it fits its model."""

from __future__ import annotations

from typing import Any

from lora_rlhf.base.loading import explained, model_config, resolved_model
from lora_rlhf.base.positions import check_positions
from lora_rlhf.base.prequantized import BASE_SETTING
from lora_rlhf.config import RunConfig
from lora_rlhf.data.chat import set_chat_template, set_model_ends
from lora_rlhf.errors import UserError

PAD_CANDIDATES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def load_tokenizer(config: RunConfig, name: str | None = None, setting: str = BASE_SETTING) -> Any:
    """Return the tokenizer with a chat template, a pad token that is not EOS, and all ends of answers.

    Args:
        config: the run's config.
        name: another model than the run's base, whose own template is kept.
        setting: that names the model, for errors.
    """
    from transformers import AutoTokenizer

    source = resolved_model(name or config.model_name_or_path, setting)
    revision = None if name else config.model_revision
    with explained(source, config, setting):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        set_model_ends(tokenizer, _eos_of_generation(source, revision))
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: its tokenizer has no EOS token, so that no answer could end")
    set_chat_template(tokenizer, None if name else config.chat_template)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        spare = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        free = [t for t in (*PAD_CANDIDATES, tokenizer.unk_token, tokenizer.bos_token, *spare) if t in vocabulary]
        free = [t for t in free if t != tokenizer.eos_token and t not in tokenizer.chat_template]
        if not free:
            raise UserError(f"{source}: its tokenizer has no token that could serve as pad and is not EOS")
        tokenizer.pad_token = free[0]
    return tokenizer


def checked_tokenizer(config: RunConfig, name: str | None = None, setting: str = BASE_SETTING) -> Any:
    """Return what `load_tokenizer` does, after a look at the model's config: it takes no weights.

    Raises:
        UserError: model and tokenizer do not fit together, or the model is too short for the run.
    """
    found, tokenizer = model_config(config, name, setting), load_tokenizer(config, name, setting)
    check_vocabulary(tokenizer, found.vocab_size, name or config.model_name_or_path)
    check_positions(config, found, setting)
    return tokenizer


def _eos_of_generation(source: str, revision: str | None) -> object:
    """Return where a model's `generate` ends, as transformers finds it: in its generation config, else in its own."""
    from transformers import GenerationConfig, PreTrainedConfig

    try:
        return GenerationConfig.from_pretrained(source, revision=revision).eos_token_id
    except OSError:  # it has none, or one that is no JSON, which transformers takes for none
        try:
            return PreTrainedConfig.get_config_dict(source, revision=revision)[0].get("eos_token_id")
        except OSError:  # a folder of a tokenizer alone
            return None


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

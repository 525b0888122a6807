"""A small twin of a model: the architecture that its config describes, a few narrow layers of it, random weights.

What this package could get wrong about an architecture (its dropout, what its LM head does, how its layers are called)
shows in the twin within a second, on the CPU and in float32, before gigabytes are downloaded or read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

VOCABULARY, HEAD_WIDTH, HEADS, WINDOW = 96, 16, 4, 8
WIDTHS = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    # the states and the MLPs
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), HEADS * HEAD_WIDTH),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "ffn_hidden_size", "n_inner"), 96),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_intermediate_size", "block_auto_adjust_ff_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "hidden_size_per_layer_input"), 48),
    # attention; multi-head latent attention; linear attention
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("head_dim", "kv_channels", "global_head_dim", "v_head_dim", "qk_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), HEAD_WIDTH // 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 24),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_attention_heads"), HEADS),
    "rotary_dim": HEAD_WIDTH // 2,
    # state-space layers: twice as wide as the states
    "mamba_d_ssm": 2 * HEADS * HEAD_WIDTH,
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"), 2 * HEADS),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_d_state", "state_size"), HEAD_WIDTH),
    **dict.fromkeys(("ssm_state_size", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    # how far back some layers look
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size"), WINDOW),
}
"""What a size becomes. Names are those of transformers' configs."""
AT_MOST = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(
        ("n_group", "topk_group", "first_k_dense_replace", "moe_layer_start_index", "num_shared_experts"), 1
    ),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups", "num_dense_layers"), 1),
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len"), 256),
}
"""Numbers that stay what they are where they are smaller."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
KINDS = ("layer_types", "layers_block_type")
"""Names of lists that hold the kind of every layer."""
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_global_key_value_heads")
PERIODS = ("_period", "_interval", "_step", "_pattern")
"""Ends of names of numbers that say in how many layers a kind of layer comes again."""
PLACES = ("_layers", "_idxs", "_indices", "_layer_ids")
"""Ends of names of lists that hold the numbers of the layers of a kind."""
MOST_LAYERS, MOST_PARAMETERS = 24, 5_000_000


def small_config(config: Any) -> Any:
    """Return a config of the same architecture, narrow, and as deep as it takes to have each kind of layer.

    Raises:
        Exception: whatever the config's class raises where the small sizes do not fit together.
    """
    fields = config.to_dict()
    small = type(config).from_dict(_shrunk(fields, _depth(fields)))
    if getattr(config, "quantization_config", None) is not None:
        del small.quantization_config
    small.bos_token_id, small.eos_token_id, small.pad_token_id = 1, 2, 0
    small.use_cache, small._name_or_path = True, ""  # by its name PEFT would look its vocabulary up, and find another
    return small


def _depth(fields: Mapping[str, Any]) -> int:
    """Return how many of the first layers have one of every kind."""
    layers = _layer_count(fields) or 2
    depth = 2
    for name, value in fields.items():
        if name == "block_types" and isinstance(value, list):  # which come again and again, in Griffin
            depth = max(depth, len(value))
        if isinstance(value, list) and value and len(value) == layers and isinstance(value[0], str | int):
            kinds = set(value)
            depth = max([depth, *(value.index(kind) + 1 for kind in kinds if len(kinds) < layers)])
        elif isinstance(value, list) and value and name.endswith(PLACES) and isinstance(value[0], int):
            depth = max(depth, value[0] + 1)
        elif name.endswith(PERIODS) and isinstance(value, int) and not isinstance(value, bool):
            depth = max(depth, value)
    if (depth := min(depth, layers)) > MOST_LAYERS:
        raise ValueError(f"its twin would have {depth} layers to have each kind")
    return depth


def _layer_count(fields: Mapping[str, Any]) -> int | None:
    """Return how many layers a config describes, where it says so: by a number, or by a list of their kinds."""
    for name in LAYERS:
        if isinstance(fields.get(name), int):
            return int(fields[name])
    return next((len(fields[name]) for name in KINDS if isinstance(fields.get(name), list)), None)


def _shrunk(fields: Mapping[str, Any], depth: int, partial: float | None = None) -> dict[str, Any]:
    """Return the fields of a config, and those of the configs in it, with small sizes and `depth` layers.

    Args:
        fields: of transformers' config, or of one inside it.
        depth: how many layers are kept.
        partial: the share of a head's width that is rotated, as an outer config says it; None means all of it.
    """
    layers = _layer_count(fields)
    partial = fields.get("partial_rotary_factor") or partial
    heads = next((fields[name] for name in ("num_attention_heads", "n_head", "n_heads") if fields.get(name)), None)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name in LAYERS:
            small[name] = depth
        elif name in KEY_HEADS and (whole or value is None):
            small[name] = HEADS if value in (heads, None) else min(value, 2)
        elif name in WIDTHS and ((whole and value) or (name == "head_dim" and value is None)):
            small[name] = WIDTHS[name]
        elif name in AT_MOST and whole:
            small[name] = min(value, AT_MOST[name])
        elif name == "mrope_section":
            small[name] = [2, 3, 3]
        elif name in ("short_factor", "long_factor"):  # one for each pair of what is rotated in a head
            small[name] = value[: int(HEAD_WIDTH * (partial or 1)) // 2]
        elif isinstance(value, list) and layers and len(value) == layers:
            small[name] = value[:depth]
        elif isinstance(value, list) and name.endswith(PLACES):
            small[name] = [place for place in value if isinstance(place, int) and place < depth]
        elif isinstance(value, dict) and not name.endswith("label") and name != "label2id":
            small[name] = _shrunk(value, depth, partial)
        else:
            small[name] = value
    if "time_step_rank" in fields and "num_heads" in fields:  # Mamba-2 calls the heads of its state-space layers so
        small["num_heads"] = 2 * HEADS
    width = fields.get("hidden_size")
    if fields.get("word_embed_proj_dim", width) != width:  # OPT-350m's embeddings are narrower than its layers
        small["word_embed_proj_dim"] = small["hidden_size"] // 2
    if "qk_rope_head_dim" in fields:
        small["head_dim"] = small["qk_rope_head_dim"]
    return small


@torch.no_grad()
def fill_randomly(model: nn.Module, seed: int = 0) -> None:
    """Give all weights and biases random numbers of a size at which every layer counts; the global generator stays.

    The weights of a norm stay near what they are (1, or 0 where the norm adds 1): an error that ignores them shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            gain = 2.0 if isinstance(module, nn.Embedding) else 1.0
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator) * gain / parameter.shape[-1] ** 0.5
                parameter.copy_(noise)
            elif name == "weight":
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif name == "bias":
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def small_twin(config: Any, auto_class: Any, seed: int = 0, **fields: Any) -> Any:
    """Return the small twin of the model that `config` describes, in float32 on the CPU, in eval mode.

    The global random state is left as it was.

    Args:
        config: transformers' own of the model.
        auto_class: AutoModelForCausalLM, or AutoModelForSequenceClassification.
        seed: of the weights.
        fields: of the small config that are set besides.

    Raises:
        Exception: whatever transformers raises where the small sizes do not fit together.
    """
    small = small_config(config)
    for name, value in fields.items():
        setattr(small, name, value)
    with torch.device("meta"):
        size = auto_class.from_config(small, trust_remote_code=False).num_parameters()
    if size > MOST_PARAMETERS:
        raise ValueError(f"its twin would have {size} parameters: a size of this architecture is not known")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the cards too, for good
        model = auto_class.from_config(small, dtype=torch.float32, trust_remote_code=False)
    fill_randomly(model, seed)
    return model.eval()

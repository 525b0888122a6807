"""One 4-bit base in memory, and the roles that are played on it: reference, policy, reward, value, instruct."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from lora_rlhf.base.adapted_layers import SETTING, check_adapted_layers, with_adapter
from lora_rlhf.base.adapters import base_identity, read_adapter, write_adapter
from lora_rlhf.base.attention import PLAIN_MODELS, use_grouped_attention
from lora_rlhf.base.lm_head import LmHead
from lora_rlhf.base.packing import batches_by_length, states_without_padding
from lora_rlhf.base.randomness import turn_off_randomness
from lora_rlhf.base.role_layers import MixedRoles, RoleLayers
from lora_rlhf.base.token_logprobs import token_logprobs
from lora_rlhf.base.trunk import trunk_of
from lora_rlhf.errors import UserError, first_line

REFERENCE, POLICY, REWARD, VALUE, INSTRUCT = "reference", "policy", "reward", "value", "instruct"


class SharedBase:
    """A frozen causal language model with one LoRA adapter per role; the reference is the base with adapters off.

    Roles are switched with `role`, which leaves the trainability of every parameter as it was. Heads (reward, value)
    are float32 linear maps to one number, kept beside the adapters.

    Attributes:
        model: the PEFT model; its adapters are named after the roles.
        trunk: the transformer without LM head.
        lm_head: what makes logits of states.
        layers: its linear layers, which know the role that is played.
        heads: role -> linear head, where the role has one.
    """

    def __init__(self, causal_lm: Any, policy: LoraConfig, compute_dtype: torch.dtype) -> None:
        self.identity = base_identity(causal_lm)
        self.causal_lm = causal_lm
        self.trunk = trunk_of(causal_lm)
        self.lm_head = LmHead.of(causal_lm)
        # what heads read, which in OPT can be narrower than the layers
        self.hidden_size: int = self.lm_head.weight.shape[1]
        self.compute_dtype = compute_dtype
        self.device: torch.device = self.lm_head.weight.device
        for parameter in causal_lm.parameters():
            parameter.requires_grad_(False)
        causal_lm.config.use_cache = True
        use_grouped_attention(causal_lm)
        turn_off_randomness(causal_lm)  # in every role, in train mode too
        self.model: PeftModel = with_adapter(causal_lm, policy, POLICY)
        check_adapted_layers(self.model, causal_lm, SETTING)
        self.heads = nn.ModuleDict()
        self.configs: dict[str, LoraConfig] = {POLICY: policy}
        self._active = POLICY
        self._expanded: str | None = None
        self._mixed: MixedRoles | None = None
        self.layers = RoleLayers(self.model, lambda: self._mixed or self._active, compute_dtype)
        self._after_new_adapter(POLICY, trainable=False)
        self.model.eval()

    # -- adapters -----------------------------------------------------------------------------------------------------

    def load_adapter(self, role: str, folder: Path, trainable: bool = False) -> None:
        """Put the adapter in `folder` (with its head, where it has one) on the base as `role`.

        Raises:
            UserError: not an adapter, or trained on another base.
        """
        config, weights, head = read_adapter(folder, self.identity)
        try:
            self._add(role, config)
            check_adapted_layers(self.model, self.causal_lm, str(folder))
            self._fill(role, folder, weights)
        except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
            raise UserError(f"{folder} does not fit this base: {first_line(error)}") from None
        if head is not None:
            self.add_head(role, head)
        self._after_new_adapter(role, trainable)

    def replace_adapter(self, role: str, folder: Path) -> None:
        """Give `role`, which is there already, the adapter in `folder`."""
        _, weights, head = read_adapter(folder, self.identity)
        self._fill(role, folder, weights)
        if head is not None:
            self.add_head(role, head)

    def copy_adapter(self, source: str, role: str, trainable: bool) -> None:
        """Start `role` as a copy of the adapter and head of `source`: the value role starts from the reward role."""
        self._add(role, self.configs[source])
        set_peft_model_state_dict(
            self.model, get_peft_model_state_dict(self.model, adapter_name=source), adapter_name=role
        )
        if source in self.heads:
            self.add_head(role, self.heads[source].weight)  # type: ignore[arg-type]
        self._after_new_adapter(role, trainable)

    def new_adapter(self, role: str, config: LoraConfig, trainable: bool) -> None:
        """Start `role` with a fresh adapter, whose update is zero, and a zero head."""
        self._add(role, config)
        self.add_head(role, torch.zeros(1, self.hidden_size))
        self._after_new_adapter(role, trainable)

    def save_adapter(self, role: str, folder: Path) -> None:
        """Write the adapter of `role`, and its head, alone to `folder`, as stock PEFT loads it.

        A head that reads the policy's states is written with a copy of the policy's adapter.
        """
        adapter = role if role in self.configs else POLICY
        weights = get_peft_model_state_dict(self.model, adapter_name=adapter)
        head = self.heads[role].weight if role in self.heads else None
        write_adapter(folder, self.configs[adapter], weights, head, self.identity)  # type: ignore[arg-type]

    def parameters(self, role: str) -> list[nn.Parameter]:
        """Return the adapter's float32 parameters, in a fixed order, then the head's."""
        own = [p for n, p in self.model.named_parameters() if re.search(rf"\.lora_[AB]\.{re.escape(role)}\.", n)]
        return own + (list(self.heads[role].parameters()) if role in self.heads else [])

    def _fill(self, role: str, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        expected = get_peft_model_state_dict(self.model, adapter_name=role)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in expected.items()}:
            raise UserError(f"{folder} does not fit this base: its layers or their shapes are others")
        set_peft_model_state_dict(self.model, weights, adapter_name=role)

    def _add(self, role: str, config: LoraConfig) -> None:
        with self._trainability_kept():
            self.model.add_adapter(role, config)
        self.configs[role] = config

    def add_head(self, role: str, weight: torch.Tensor) -> None:
        """Give `role` a float32 head with the weight [1, d]; without an adapter, it reads another role's states.

        Raises:
            UserError: a weight of another shape.
        """
        if tuple(weight.shape) != (1, self.hidden_size):  # copying would broadcast it
            raise UserError(
                f"the head of {role} is {list(weight.shape)} and not [1, {self.hidden_size}], as it must be"
            )
        head = nn.Linear(self.hidden_size, 1, bias=False, device=self.device, dtype=torch.float32)
        with torch.no_grad():
            head.weight.copy_(weight)
        self.heads[role] = head

    def _after_new_adapter(self, role: str, trainable: bool) -> None:
        for parameter in self.parameters(role):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(trainable)
        self._adapter_parameters = [p for n, p in self.model.named_parameters() if "lora_" in n]
        self._first_adapted = self._lowest_adapted_layer()
        self.layers.refresh()
        self.model.eval()

    def set_trainable(self, role: str, trainable: bool) -> None:
        """Let gradients flow to the adapter and head of `role`, or not."""
        for parameter in self.parameters(role):
            parameter.requires_grad_(trainable)

    # -- roles --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Play `name` inside the block, whatever was played before outside it."""
        before = self._active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    @contextlib.contextmanager
    def mixed(self, roles: MixedRoles) -> Iterator[None]:
        """Play each row's role inside the block, without gradient."""
        with self.role(POLICY), torch.no_grad():
            self._mixed = roles
            try:
                yield
            finally:
                self._mixed = None

    def _activate(self, name: str) -> None:
        if name == self._active:
            return
        if self._expanded is not None or self._mixed is not None:
            busy = (
                "several roles are played at once" if self._mixed else f"the weights are expanded for {self._expanded}"
            )
            raise RuntimeError(f"{busy}; no other role can be played meanwhile")
        with self._trainability_kept():  # PEFT turns it on for the adapter it activates and off for the others
            if name == REFERENCE:
                self.model.base_model.disable_adapter_layers()
            else:
                if self._active == REFERENCE:
                    self.model.base_model.enable_adapter_layers()
                self.model.set_adapter(name)
        self._active = name

    @contextlib.contextmanager
    def _trainability_kept(self) -> Iterator[None]:
        flags = [(p, p.requires_grad) for p in getattr(self, "_adapter_parameters", [])]
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward, each under the role that was played in forward.

        Plain checkpointing would re-run the forward with whatever adapter is active at backward time.
        """

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self.role(self._active)

        self.causal_lm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts}
        )

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Train mode inside the block: transformers checkpoints in no other. There is no dropout to turn on."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    # -- forward passes -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def common_states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """Return the states [batch, length, d] that enter the first adapted layer: they are the same in every role.

        None where the first layer is adapted already, or where the model's layers cannot be run in two parts.
        """
        if self._first_adapted == 0:
            return None
        with self.autocast(), self._only_layers(slice(self._first_adapted), norm=False):
            return states_without_padding(self.trunk, ids, mask)

    def hidden(
        self, role: str, ids: torch.Tensor, mask: torch.Tensor, common: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the states after the final norm [batch, length, d] in the compute dtype, 0 where masked.

        Args:
            role: who computes them.
            ids: [batch, length].
            mask: [batch, length], true for real tokens.
            common: the rows' `common_states`, where they are known: the layers below are then not run again.
        """
        with self.role(role):
            return self._forward(ids, mask, common)

    def hidden_mixed(
        self, roles: Sequence[str], ids: torch.Tensor, mask: torch.Tensor, common: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what `hidden` does, row i under `roles[i]`: all roles in one pass over the 4-bit weights.

        Only without gradient.
        """
        with self.mixed(MixedRoles(roles)):
            return self._forward(ids, mask, common)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, common: torch.Tensor | None = None) -> torch.Tensor:
        if common is None:
            with self.autocast():
                return states_without_padding(self.trunk, ids, mask)
        with self.autocast(), self._only_layers(slice(self._first_adapted, None), norm=True):
            return states_without_padding(self.trunk, ids, mask, common)

    @contextlib.contextmanager
    def _only_layers(self, part: slice, norm: bool) -> Iterator[None]:
        """Let the trunk be some of its layers inside the block, with or without the final norm."""
        layers, final = self.trunk.layers, self.trunk.norm
        self.trunk.layers, self.trunk.norm = layers[part], final if norm else nn.Identity()
        try:
            yield
        finally:
            self.trunk.layers, self.trunk.norm = layers, final

    def _lowest_adapted_layer(self) -> int:
        kinds = set(getattr(self.trunk.config, "layer_types", None) or ["full_attention"])
        if self.trunk.config.model_type not in PLAIN_MODELS or len(kinds) > 1:
            return 0  # layers of several kinds are told apart by their number, which would change
        found = [re.search(r"\.layers\.(\d+)\.", n) for n, _ in self.model.named_parameters() if "lora_" in n]
        return min((int(match[1]) if match else 0) for match in found)

    def autocast(self) -> torch.autocast:
        """Return the context in which float32 adapters compute in 16 bits, where the compute dtype has as many."""
        half = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.compute_dtype if half else torch.bfloat16, enabled=half)

    def response_logprobs(
        self,
        states: torch.Tensor,
        ids: torch.Tensor,
        response_mask: torch.Tensor,
        temperature: float,
        chunk: int | None,
        with_entropy: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (log-probs, entropies) [batch, response] of the last `response` ids; 0 where `response_mask` is.

        Args:
            states: [batch, length, d] from `hidden`.
            ids: [batch, length].
            response_mask: [batch, response], true for real tokens of the response.
            temperature: divides the logits.
            chunk: tokens whose logits exist at one time; none: as many as take 16 MiB in float32.
            with_entropy: off, the entropies are zeros.
        """
        width = response_mask.shape[1]
        before, tokens = states[:, -width - 1 : -1], ids[:, -width:]
        flat, entropy = token_logprobs(
            before[response_mask], self.lm_head, tokens[response_mask], temperature, chunk, with_entropy
        )
        empty = torch.zeros(response_mask.shape, dtype=torch.float32, device=states.device)
        return empty.masked_scatter(response_mask, flat), empty.masked_scatter(response_mask, entropy)

    def head_outputs(self, role: str, states: torch.Tensor) -> torch.Tensor:
        """Return the head's number for each state, float32, one dimension less than `states`."""
        with torch.autocast(self.device.type, enabled=False):
            return self.heads[role](states.float())[..., 0]

    @torch.no_grad()
    def scores(self, role: str, ids: torch.Tensor, mask: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the reward head's number [rows] at the last real token of each row, `batch` rows at a time."""
        scores = torch.zeros(len(ids), device=ids.device)
        for part in batches_by_length(mask, torch.arange(len(ids), device=ids.device), batch):
            states = self.hidden(role, ids[part], mask[part])
            scores[part] = self.head_outputs(role, last_real(states, mask[part]))
        return scores

    # -- working copy -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def expanded(self, role: str) -> Iterator[None]:
        """Play `role` from a temporary 16-bit copy of all layers with its adapter folded in.

        Decoding then neither dequantises nor runs the adapter at each token, except where rounding would lose the
        adapter's update: see `RoleLayers.working_copy`. No gradients. The copy is rounded to the compute dtype, so its
        log-probs differ slightly from the trainer's; see `sampler_kl` in the metrics.
        """
        with self.role(role):
            self._expanded = role
            try:
                with torch.no_grad(), self.layers.working_copy(folded_role=role):
                    yield
            finally:
                self._expanded = None


def last_real(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the state [batch, d] at the last true position of each row of `mask` [batch, length]."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.long() * positions).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]

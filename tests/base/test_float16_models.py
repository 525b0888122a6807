"""Models in float16: the same base within rounding, 4-bit products too, and numbers beyond its range are refused."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_rlhf.base.loading import load_causal_lm, load_reward_model
from lora_rlhf.base.shared import POLICY, REFERENCE, REWARD, VALUE, SharedBase
from lora_rlhf.config import RunConfig
from lora_rlhf.errors import UserError

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize("held", ["4 bits", "working copy", "folded"])
def test_the_states_of_every_role_are_nearer_to_float32_than_those_of_bfloat16(
    make_base: Callable[..., SharedBase], make_config: MakeConfig, held: str
) -> None:
    """In rows with padding, too: its mask is the smallest number of the dtype."""
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, :4] = False
    exact, coarse, fine = (make_base(make_config(dtype=dtype)) for dtype in ("float32", "bfloat16", "float16"))
    for role in [POLICY] if held == "folded" else [POLICY, REFERENCE, REWARD, VALUE]:
        with torch.no_grad():
            expected, errors = exact.hidden(role, ids, mask), []
            for base in (coarse, fine):
                copies = base.layers.working_copy() if held == "working copy" else contextlib.nullcontext()
                with base.expanded(role) if held == "folded" else copies:
                    errors.append((base.hidden(role, ids, mask).float() - expected).norm())
        assert errors[1] < 0.6 * errors[0] < 0.6 * expected.norm()


@pytest.mark.parametrize("four_bits", [True, False])
def test_weights_beyond_its_range_are_refused(
    make_config: MakeConfig, tiny_folder: Path, tmp_path: Path, four_bits: bool
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = make_config(model_name_or_path=str(folder), load_in_4bit=four_bits, dtype="float16")
    for load in (load_causal_lm, lambda c: load_reward_model(c, 2)):
        with pytest.raises(
            UserError, match=r"dtype: model\.norm\.weight of .*copy holds numbers beyond float16's 65504"
        ):
            load(config)
    load_causal_lm(make_config(model_name_or_path=str(folder), load_in_4bit=four_bits, dtype="bfloat16"))

"""A loaded model stands on its own memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_rlhf.base.loading import load_causal_lm
from lora_rlhf.config import RunConfig


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_no_file_stays_mapped_for_what_was_not_quantised(
    make_config: Callable[..., RunConfig], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    model = load_causal_lm(make_config(model_name_or_path=str(folder)))
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight.isfinite().all()

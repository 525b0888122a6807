"""What the stages of a run share: its directory, tokenizer and data, and the base while it is in memory."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_rlhf.base.adapted_layers import check_target_modules
from lora_rlhf.base.devices import check_device
from lora_rlhf.base.embedded import embedded_model_is_cached
from lora_rlhf.base.layer_names import base_description
from lora_rlhf.base.loading import chosen_backend
from lora_rlhf.base.original_weights import check_merge_target
from lora_rlhf.base.prequantized import INSTRUCT_SETTING
from lora_rlhf.base.shared import SharedBase
from lora_rlhf.base.tokenizer import checked_tokenizer
from lora_rlhf.config import EMBEDDED, RunConfig
from lora_rlhf.data.preferences import PreferencePair, digest_of_pairs, preference_pairs
from lora_rlhf.data.rows import Split
from lora_rlhf.data.safety_prompts import safety_prompts
from lora_rlhf.errors import UserError, first_line
from lora_rlhf.evaluation.arms import bad_word_pattern
from lora_rlhf.memory import check_memory
from lora_rlhf.memory_peak import ran_out, return_freed_memory
from lora_rlhf.ppo.architecture_check import check_architecture_of
from lora_rlhf.ppo.instruct_check import check_instruct_architecture
from lora_rlhf.ppo.model_check import loaded_base
from lora_rlhf.ppo.optimization import check_optim
from lora_rlhf.processes import Processes
from lora_rlhf.reward.sources import source_entries
from lora_rlhf.run import RunDirectory
from lora_rlhf.terminal import console, interrupt, note
from lora_rlhf.tracking import check_tracker

PAIRS = "pairs.json"  # digests of the preference pairs with which a run began


@dataclass
class Session:
    """What the stages share: the run's directory, tokenizer and data, and the base while it is in memory."""

    config: RunConfig
    run: RunDirectory
    tokenizer: Any
    processes: Processes
    base: SharedBase | None = None
    _pairs: dict[Split, list[PreferencePair]] = field(default_factory=dict)
    _checked: bool = False
    _base_checked: bool = False

    @classmethod
    def open(cls, config: RunConfig) -> Session:
        """Open the output directory and load the tokenizer.

        Raises:
            UserError: whatever is wrong with config, output directory or model, before any work is done.
        """
        chosen_backend(config)
        bad_word_pattern(config.compare.bad_words_file)
        safety_prompts(config.compare.safety_prompts)
        source_entries(config)
        check_optim(config.ppo.optim)
        if config.model_name_or_path == EMBEDDED and not embedded_model_is_cached():
            note("the embedded model (SmolLM2-135M, 93 MB) is downloaded and converted, once; a minute or so")
        processes = Processes()
        console.quiet = not processes.is_main
        check_device(config)
        tokenizer = checked_tokenizer(config)
        check_target_modules(config)
        check_merge_target(config)
        if instruct := config.instruct_model_name_or_path:
            checked_tokenizer(config, instruct, INSTRUCT_SETTING)
        if processes.is_main:
            check_tracker(config.report_to)
        processes.meet()
        return cls(config, RunDirectory(config, writes=processes.is_main), tokenizer, processes)

    def pairs(self, split: Split) -> list[PreferencePair]:
        """Return the preference pairs of a split, read once; says how many rows could not be used, and why."""
        if split not in self._pairs:
            self._pairs[split], report = preference_pairs(self.config, self.tokenizer, split)
            note(f"  {split} pairs: {report}")
            if self.run.writes and self._begun_with(split) not in (None, digest_of_pairs(self._pairs[split])):
                raise UserError(
                    f"dataset_name: the {split} pairs are not those that the run in {self.run.path} began with: has a "
                    "file changed? Put it back, or choose another --output_dir"
                )
        return self._pairs[split]

    def _begun_with(self, split: Split) -> str | None:
        if not self.run.finished("base"):
            return None
        try:
            return str(json.loads((self.run / PAIRS).read_text(encoding="utf-8"))[split])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):  # nothing to compare with
            return None

    def shared_base(self) -> SharedBase:
        """Return the shared base, loading it if it is not in memory."""
        if self.base is None:
            self.base = loaded_base(self.config, check=not self._base_checked)
            self._base_checked = True
        return self.base

    def check_run(self) -> None:
        """Refuse, once, models that would be wrong here and a run that has no memory; say what the base is."""
        if not self._checked:
            check_architecture_of(self.config)
            check_instruct_architecture(self.config)
            check_memory(self.config)
            if not self._base_checked:
                base = self.shared_base()  # which checks itself
                for line in base_description(base.causal_lm, base.device):
                    note(f"  {line}")
            self._checked = True

    def begins(self, stage: str, needed: Mapping[str, str] | None = None) -> bool:
        """Return whether a stage that all processes share has work left, as the first one finds and tells the others.

        Args:
            stage: its name.
            needed: what it reads of the run's directory, each with the stage that leaves it.

        Raises:
            UserError: something that it needs is missing.
        """
        if not self.run.writes:
            return self.processes.told(stage) == "begins"
        begins = not self.run.finished(stage)
        for name, earlier in (needed or {}).items() if begins else ():
            self.run.needed(name, earlier)
        self.processes.tell(stage, "begins" if begins else "done")
        return begins

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Do a stage, as `RunDirectory.stage`; memory that runs out is put into words."""
        interrupt.mind()
        try:
            with self.run.stage(name) as results:
                yield results
            interrupt.mind()
        except Exception as error:
            if not ran_out(error):
                raise
            config = shlex.quote(str(self.run / "config.yaml"))
            raise UserError(
                f"the {name} stage ran out of memory ({first_line(error)}): `python -m lora_rlhf.memory --config "
                f"{config}` shows what takes it, and what to change. Where something else held the memory, the same "
                "command goes on"
            ) from None

    def free_base(self) -> None:
        """Let the base go, for a stage that loads its own."""
        self.base = None
        return_freed_memory()
        interrupt.mind()

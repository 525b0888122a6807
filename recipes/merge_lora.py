"""The merge stage alone: the policy adapter merged into 16-bit weights, with the drift of both targets.

    python recipes/merge_lora.py --output_dir runs/embedded

Writes merged/.
Takes every option of recipes/direct_rlhf_lora.py; the same --config and --output_dir make it part of the same run.
"""

from pathlib import Path

from lora_rlhf.config_file import config_from_command_line
from lora_rlhf.session import Session
from lora_rlhf.stages import merge_stage
from lora_rlhf.terminal import run_recipe

EMBEDDED_CONFIG = Path(__file__).parent / "configs" / "embedded.yaml"


def main() -> None:
    merge_stage(Session.open(config_from_command_line(__doc__, default=EMBEDDED_CONFIG)))


if __name__ == "__main__":
    run_recipe(main)

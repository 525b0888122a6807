"""The launch files are what accelerate and bash read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from recipe_runs import ROOT

LAUNCH = ROOT / "recipes" / "launch"


@pytest.mark.parametrize(("name", "processes", "machines"), [("two_gpus", 2, 1), ("two_nodes", 4, 2)])
def test_accelerate_reads_them(name: str, processes: int, machines: int) -> None:
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    assert config.mixed_precision == "no" and config.distributed_type == "MULTI_GPU"


def test_the_slurm_script_hands_on_every_word(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands, what accelerate is given."""
    for name, body in {
        "scontrol": "echo node1; echo node2",
        "srun": 'shift; SLURM_NODEID=1 exec "$@"',  # its option
        "accelerate": 'printf "%s\\n" "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh"), "--ppo.stop_strings", "[a b]", "--output_dir", "runs/x"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = done.stdout.splitlines()
    assert words[words.index("--main_process_ip") + 1] == "node1" and words[words.index("--machine_rank") + 1] == "1"
    assert words[words.index("--num_processes") + 1] == "4"
    assert words[-5:] == ["recipes/direct_rlhf_lora.py", "--ppo.stop_strings", "[a b]", "--output_dir", "runs/x"]

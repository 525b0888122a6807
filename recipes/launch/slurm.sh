#!/usr/bin/env bash
# sbatch recipes/launch/slurm.sh --config recipes/configs/mistral_7b_24gb.yaml --output_dir runs/mistral
# Two nodes with two GPUs each and a file system that both see. Slurm sends SIGTERM ten minutes before the time is up:
# the run saves its step and ends; submit the same line again and it goes on. After a node's failure Slurm does so itself
# (--requeue). Not tried on a cluster.
#SBATCH --job-name=direct-rlhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540  # seconds that the launcher waits for the step to be saved
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # head would end the pipe early, which pipefail minds
# the rank of a machine is known only where the task runs
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file recipes/launch/two_nodes.yaml \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * 2))" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$0" recipes/direct_rlhf_lora.py "$@"' "$first" "$@"

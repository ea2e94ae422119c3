#!/bin/bash
# bpfree on several hosts of a SLURM cluster: `sbatch tools/slurm.sh RECIPE` (names: `bpfree list`).
#SBATCH --job-name=bpfree
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # one torchrun a host, which starts a process a card
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue                # a job that lost a host begins again, from its checkpoint
#SBATCH --signal=B:TERM@120      # two minutes before its time is up

set -euo pipefail
: "${1:?which recipe? sbatch tools/slurm.sh RECIPE}"

# On all hosts: the data, and a folder that they share for checkpoints and results.
export BPFREE_DATA=${BPFREE_DATA:-$HOME/data}
results=${RESULTS:-$SLURM_SUBMIT_DIR/figures/results}

# The ranks meet at the first host; the port is the job's own.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# Without this, ranks that start again may read the addresses of those before them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# A rank that is lost ends all; torchrun starts them again, at most so many times, and they go on
# from the checkpoint that is no older than --save-every. The same sbatch, later, does the same.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-4}" \
  --max-restarts 3 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
  -m bpfree run "$1" --device cuda --save-every 10m --results "$results" --quiet

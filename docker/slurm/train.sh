#!/bin/bash
#SBATCH --job-name=effdet-train
#SBATCH --ntasks=8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --partition=gpu
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --output=data/logs/slurm-%j.log
export PYTHONUNBUFFERED=1
export HOROVOD_STALL_CHECK_TIME_SECONDS=100
export HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=300
export HOROVOD_GLOO_TIMEOUT_SECONDS=600
cd /shared/effdet
exec /shared/effdet/.venv/bin/python -m pipeline.slurm_job pipeline.train

#!/bin/bash
# A run on two nodes with four GPUs each, one process per GPU. From the repository: `sbatch docs/cluster/slurm.sh
# --seeds 32`; everything after the file's name goes to train.py. The same command continues a run that was stopped.
#SBATCH --job-name=cnn-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
# Two minutes before the time is up, every process gets SIGTERM, and the run saves and ends.
#SBATCH --signal=TERM@120
set -eu

# A folder that all nodes see. All processes read the data from it, and the first one writes the run to it.
shared=${CNN_JAX_SHARED:-$SLURM_SUBMIT_DIR}
export TFDS_DATA_DIR="$shared/tfds"
export JAX_COMPILATION_CACHE_DIR="$shared/xla"

# First on one node alone: wrong settings end the job here. This writes nothing: prepare a tfds set other than mnist
# beforehand, by a training on one machine with the same TFDS_DATA_DIR.
python train.py --dry-run --checkpoint-dir "$shared/checkpoints" "$@"

# JAX finds the other tasks, and the GPU of each, in SLURM's variables. A run needs all of its processes, so a task that
# fails ends the others.
srun --kill-on-bad-exit=1 python train.py --checkpoint-dir "$shared/checkpoints" "$@"

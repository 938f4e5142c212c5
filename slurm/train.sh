#!/usr/bin/env bash
#SBATCH --job-name=hvd_train
#SBATCH --ntasks=2
#SBATCH --cpus-per-task=1
#SBATCH --signal=USR1@120
# One training as a batch job; options of sbatch stand before the script, those of hvd_train after it:
#
#     sbatch --nodes=4 --ntasks=16 slurm/train.sh --config run.toml
#
# Submit from the checkout, or say where it is with HVD_TRAIN_HOME. What the site needs (module load ..., network
# interfaces) goes into slurm/site.sh, which is read first. USR1 reaches the ranks 120 s before the time limit.
set -euo pipefail

# Slurm runs a copy of this file from its own spool folder.
home=${HVD_TRAIN_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -x $home/launch/srun.sh ]]; then
    echo "slurm/train.sh: no checkout of hvd_train in $home; submit from it, or set HVD_TRAIN_HOME" >&2
    exit 2
fi
if [[ -f $home/slurm/site.sh ]]; then . "$home/slurm/site.sh"; fi

exec "$home/launch/srun.sh" -- "$@"

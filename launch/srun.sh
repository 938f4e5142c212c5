#!/usr/bin/env bash
# srun, inside an allocation or with its own:  launch/srun.sh [-n 2 ...] -- [options of hvd_train]
# What stands before -- goes to srun as it is. The exit status is the highest of all ranks. Cores are bound as
# the job asked for them (--cpus-per-task): the threads of a rank are counted from its affinity mask.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
split_options "$@"

# srun's default type starts processes that know nothing of each other; the site or the caller may know better.
types=()
if [[ -z ${SLURM_MPI_TYPE:-} && " ${launcher[*]}" != *" --mpi"* ]]; then types=(--mpi=pmix); fi

# sbatch's --cpus-per-task no longer reaches srun by itself (Slurm 22.05 and later).
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi

# Ranks leave together, through MPI_Finalize. When one is gone, the others have 10 s: long enough for a last
# message, which --kill-on-bad-exit would cut off, and the step does not hang on a rank that was killed.
exec srun "${types[@]}" --wait=10 "${launcher[@]}" "$python" -m hvd_train "${training[@]}"

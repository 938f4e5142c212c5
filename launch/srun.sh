#!/usr/bin/env bash
# srun, inside an allocation or with its own:  launch/srun.sh [-n 2 ...] -- [options of hvd_train]
# What stands before -- goes to srun as it is. The exit status is the highest of all ranks.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
split_options "$@"

# srun's default type starts processes that know nothing of each other; the site or the caller may know better.
types=()
if [[ -z ${SLURM_MPI_TYPE:-} && " ${launcher[*]}" != *" --mpi"* ]]; then types=(--mpi=pmix); fi

exec srun "${types[@]}" --cpu-bind=none --kill-on-bad-exit=1 "${launcher[@]}" "$python" -m hvd_train "${training[@]}"

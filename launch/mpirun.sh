#!/usr/bin/env bash
# mpirun over the environment's MPI:  launch/mpirun.sh -np 2 [--hostfile F] -- [options of hvd_train]
# What stands before -- goes to mpirun as it is. The exit status is the training's.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
split_options "$@"

mpirun=$(command -v mpirun) || {
    echo "launch: no mpirun on PATH; run \`make setup\`, or load the MPI's module" >&2
    exit 1
}
# Threads are counted from the affinity mask: a rank that mpirun ties to one core would get one thread. Open MPI
# binds by itself, and takes the option once only.
binding=()
if [[ $("$mpirun" --version 2>&1) == *"Open MPI"* && " ${launcher[*]}" != *" --bind-to"* ]]; then
    binding=(--bind-to none)
fi

# By its absolute path, so that the daemons on other hosts are started from the same place.
exec "$mpirun" "${binding[@]}" "${launcher[@]}" "$python" -m hvd_train "${training[@]}"

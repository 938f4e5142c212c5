#!/usr/bin/env bash
# mpirun of the environment's MPI:  launch/mpirun.sh -np 2 [--hostfile F] -- [options of hvd_train]
# `launch/mpirun.sh --help` lists the options before --.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$python" -m hvd_train launch --launcher mpirun "$@"

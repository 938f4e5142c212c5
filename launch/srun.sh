#!/usr/bin/env bash
# srun, inside an allocation or with its own:  launch/srun.sh [-n 2] -- [options of hvd_train]
# `launch/srun.sh --help` lists the options before --.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$python" -m hvd_train launch --launcher srun "$@"

#!/usr/bin/env bash
# horovodrun:  launch/horovodrun.sh -np 2 [--gloo] [--hostfile F] -- [options of hvd_train]
# What stands before -- goes to horovodrun as it is. The exit status is 0 or horovodrun's.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
split_options "$@"

horovodrun=$(command -v horovodrun) || {
    echo "launch: no horovodrun on PATH; \`make setup\` builds Horovod and says why where it cannot;" \
        "launch/mpirun.sh trains without it" >&2
    exit 1
}
exec "$horovodrun" "${launcher[@]}" "$python" -m hvd_train "${training[@]}"

#!/usr/bin/env bash
# horovodrun:  launch/horovodrun.sh -np 2 [--gloo] [--hostfile F] -- [options of hvd_train]
# `launch/horovodrun.sh --help` lists the options before --.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$python" -m hvd_train launch --launcher horovodrun "$@"

#!/usr/bin/env bash
# A training in its own allocation, with its output on this terminal; Ctrl-C stops it after its round.
# Options of salloc go before --, those of hvd_train after it; without -- you get a shell in the allocation.
#
#     slurm/interactive.sh --nodes=2 --ntasks=8 --time=30 -- --config run.toml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. "${HVD_TRAIN_SITE:-slurm/site.sh}"

allocation=()
while [[ $# -gt 0 && $1 != -- ]]; do
    allocation+=("$1")
    shift
done
if [[ $# == 0 ]]; then exec salloc "${allocation[@]}"; fi

exec salloc "${allocation[@]}" "$python" -m hvd_train launch --launcher "${HVD_TRAIN_LAUNCHER:-srun}" \
    ${HVD_TRAIN_INTERFACE:+--interface "$HVD_TRAIN_INTERFACE"} "$@"

# Sourced by launch/*.sh, slurm/train.sh and the Makefile: sets `python`, PATH, and what root needs.
#
# The environment is VENV, else the active one (VIRTUAL_ENV), else .venv in the checkout, else python3 on PATH.

_prefix=${VENV:-${VIRTUAL_ENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}}
if [[ -x $_prefix/bin/python ]]; then
    _prefix=$(cd "$_prefix" && pwd)
    python=$_prefix/bin/python
    # First on PATH: horovodrun looks for its mpirun there, and must find the one of this environment.
    PATH=$_prefix/bin:$PATH
elif [[ -n ${VENV:-} ]]; then
    echo "launch: there is no environment in VENV=$VENV; \`make setup VENV=$VENV\` makes it" >&2
    exit 1
elif ! python=$(command -v python3); then
    echo "launch: no environment found; run \`make setup\`, or activate one that holds hvd_train" >&2
    exit 1
fi
unset _prefix

# mpirun refuses to start for root, lest a mistake harms the machine. In a container there often is no other
# user, so root is let through; for everybody else the variables stay unset. PRTE_ is for Open MPI 5.
if [[ $(id -u) == 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Splits "LAUNCHER OPTIONS -- TRAINING OPTIONS" into the arrays `launcher` and `training`.
split_options() {
    launcher=()
    while [[ $# -gt 0 && $1 != -- ]]; do
        launcher+=("$1")
        shift
    done
    training=("${@:2}")
}

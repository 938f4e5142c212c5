# Sourced by launch/*.sh and the Makefile: sets `python` and PATH.
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

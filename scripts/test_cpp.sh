#!/usr/bin/env bash
# Builds and runs the tests of the C++ parts: as they are, and under sanitizers. Needs CMake and a C++ compiler, not
# Python; where there is no mpicxx on PATH, what goes between hosts is left out, which is an error if
# HVD_TRAIN_NO_SKIPS is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

between_hosts='|ring_[0-9]'
mpi=()
if mpicxx=$(command -v mpicxx); then
    mpi=(-D MPI_CXX_COMPILER="$mpicxx" -D MPIEXEC_EXECUTABLE="$(dirname "$mpicxx")/mpiexec")
elif [[ -n ${HVD_TRAIN_NO_SKIPS:-} ]]; then
    echo 'test-cpp: there is no mpicxx on PATH: the tests between hosts would be skipped' >&2
    exit 1
else
    echo 'test-cpp: no mpicxx on PATH: the tests between hosts are left out'
    between_hosts=
fi

run() { # name, flags, tests (a regular expression)
    local build=build/cpp-$1
    echo "test-cpp: $1"
    cmake -S . -B "$build" -D HVD_TRAIN_BUILD_TESTS=ON -D CMAKE_BUILD_TYPE=Release -D CMAKE_CXX_FLAGS="$2" \
        "${mpi[@]}" >/dev/null
    cmake --build "$build" -j 2 >/dev/null
    ctest --test-dir "$build" --output-on-failure --no-tests=error -R "$3"
}

run plain '-Werror' "signs|shm|codec$between_hosts"
# Kernels chosen at load time are resolved before the sanitizer is ready; processes are beyond its sight.
run thread '-g -fsanitize=thread -DHVD_TRAIN_NO_CLONES' 'signs|shm_threads|shm_kernels|codec'
# What an MPI leaves allocated at its end is its own affair; the tests without one look for leaks.
run address '-g -fsanitize=address,undefined -fno-sanitize-recover=all' 'signs|shm|codec'
if [[ -n $between_hosts ]]; then
    ASAN_OPTIONS=detect_leaks=0 run address '-g -fsanitize=address,undefined -fno-sanitize-recover=all' 'ring_[0-9]'
fi

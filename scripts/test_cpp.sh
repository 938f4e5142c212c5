#!/usr/bin/env bash
# Builds and runs the tests of the C++ parts: as they are, and under sanitizers. Needs CMake and a C++ compiler;
# neither Python nor MPI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run() { # name, flags, tests (a regular expression)
    local build=build/cpp-$1
    echo "test-cpp: $1"
    cmake -S . -B "$build" -D HVD_TRAIN_BUILD_TESTS=ON -D CMAKE_BUILD_TYPE=Release -D CMAKE_CXX_FLAGS="$2" >/dev/null
    cmake --build "$build" -j 2 >/dev/null
    ctest --test-dir "$build" --output-on-failure --no-tests=error -R "$3"
}

run plain '-Werror' 'shm|codec'
# Kernels chosen at load time are resolved before the sanitizer is ready; processes are beyond its sight.
run thread '-g -fsanitize=thread -DHVD_TRAIN_NO_CLONES' 'shm_threads|shm_kernels|codec'
run address '-g -fsanitize=address,undefined -fno-sanitize-recover=all' 'shm|codec'

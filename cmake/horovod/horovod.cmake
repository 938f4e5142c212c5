# Target `horovod`: a wheel of Horovod for the Python, torch and MPI at hand. Its path is left in
# ${CMAKE_BINARY_DIR}/horovod/wheel.txt. Not part of `all`: it needs the package index.
add_custom_target(horovod
    COMMAND ${CMAKE_COMMAND}
        -D PYTHON=${Python3_EXECUTABLE}
        -D WORK_DIR=${CMAKE_BINARY_DIR}/horovod
        -P ${CMAKE_CURRENT_LIST_DIR}/build.cmake
    USES_TERMINAL
    VERBATIM)

# Makes Horovod's wheel, or takes it from the cache:
#
#     cmake -D PYTHON=... -D WORK_DIR=... -P build.cmake
#
# The sdist comes from the package index by version and checksum and is patched; patches/ says why. PYTHON's
# environment has torch; mpicxx and make are on PATH.
cmake_minimum_required(VERSION 3.21)

set(VERSION 0.28.1)
set(SHA256 92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0)
set(LOG ${WORK_DIR}/build.log)

function(run what)
    execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_FILE ${LOG}.step ERROR_FILE ${LOG}.step)
    file(READ ${LOG}.step text)
    file(APPEND ${LOG} "${text}")
    file(REMOVE ${LOG}.step)
    if(NOT status EQUAL 0)
        message(FATAL_ERROR "${what} failed (${status}); its output is in ${LOG}")
    endif()
endfunction()

function(find_cache_folder result)
    execute_process(COMMAND ${PYTHON} ${CMAKE_CURRENT_LIST_DIR}/key.py
        OUTPUT_VARIABLE key OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    if(DEFINED ENV{HVD_TRAIN_CACHE})
        set(cache $ENV{HVD_TRAIN_CACHE})
    elseif(DEFINED ENV{XDG_CACHE_HOME})
        set(cache $ENV{XDG_CACHE_HOME}/hvd_train)
    else()
        set(cache $ENV{HOME}/.cache/hvd_train)
    endif()
    get_filename_component(cache ${cache} ABSOLUTE)
    set(${result} ${cache}/wheels/${key} PARENT_SCOPE)
endfunction()

function(unpack_sdist source)
    run("The download of Horovod ${VERSION}" ${PYTHON} -m pip download --no-deps --no-binary horovod
        --dest ${WORK_DIR} horovod==${VERSION})
    set(archive ${WORK_DIR}/horovod-${VERSION}.tar.gz)
    file(SHA256 ${archive} seen)
    if(NOT seen STREQUAL SHA256)
        message(FATAL_ERROR "${archive} has the SHA-256 ${seen}, expected ${SHA256}: it is not the file that "
            "the patches were made for")
    endif()
    file(ARCHIVE_EXTRACT INPUT ${archive} DESTINATION ${WORK_DIR})
    set(${source} ${WORK_DIR}/horovod-${VERSION} PARENT_SCOPE)
endfunction()

function(apply_patches source)
    find_program(GIT git REQUIRED)
    file(GLOB patches ${CMAKE_CURRENT_LIST_DIR}/patches/*.patch)
    foreach(patch IN LISTS patches)
        # Without the ceiling git finds this project's repository around the sources and leaves them as they are.
        run("${patch}" ${CMAKE_COMMAND} -E env GIT_CEILING_DIRECTORIES=${WORK_DIR}
            ${CMAKE_COMMAND} -E chdir ${source} ${GIT} apply ${patch})
    endforeach()
endfunction()

# A compilation against torch's headers takes up to 2 GB.
function(count_jobs result)
    cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
    cmake_host_system_information(RESULT megabytes QUERY AVAILABLE_PHYSICAL_MEMORY)
    math(EXPR jobs "${megabytes} / 2048")
    if(jobs GREATER cores)
        set(jobs ${cores})
    elseif(jobs LESS 1)
        set(jobs 1)
    endif()
    set(${result} ${jobs} PARENT_SCOPE)
endfunction()

function(build_wheel source result)
    count_jobs(jobs)
    message(STATUS "Building Horovod ${VERSION} with ${jobs} jobs; this takes minutes")
    run("The build of Horovod ${VERSION}" ${CMAKE_COMMAND} -E env
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
        HOROVOD_CMAKE=${CMAKE_COMMAND} "CMAKE_GENERATOR=Unix Makefiles" MAKEFLAGS=-j${jobs}
        ${PYTHON} -m pip wheel --no-build-isolation --no-deps --wheel-dir ${WORK_DIR} ${source})
    file(GLOB wheel ${WORK_DIR}/horovod-*.whl)
    set(${result} ${wheel} PARENT_SCOPE)
endfunction()

if(CMAKE_VERSION VERSION_GREATER_EQUAL 4)
    message(FATAL_ERROR "This is CMake ${CMAKE_VERSION}; Horovod's bundled projects need one below 4, such as the "
        "environment's own (pip install 'cmake<4')")
endif()

find_cache_folder(cached)
file(GLOB wheel ${cached}/horovod-*.whl)
if(wheel)
    message(STATUS "Horovod ${VERSION}: the cached wheel ${wheel}")
    file(MAKE_DIRECTORY ${WORK_DIR})
else()
    file(REMOVE_RECURSE ${WORK_DIR})
    file(MAKE_DIRECTORY ${WORK_DIR} ${cached})
    unpack_sdist(source)
    apply_patches(${source})
    build_wheel(${source} built)
    # A wheel appears in the cache complete or not at all, even if another process builds it at the same time.
    get_filename_component(name ${built} NAME)
    string(RANDOM LENGTH 8 suffix)
    file(COPY_FILE ${built} ${cached}/${name}.${suffix})
    file(RENAME ${cached}/${name}.${suffix} ${cached}/${name})
    file(REMOVE_RECURSE ${source})
    file(REMOVE ${built})
    set(wheel ${cached}/${name})
endif()
file(WRITE ${WORK_DIR}/wheel.txt ${wheel})

# Every dependency as an imported target. Places that differ (clusters without root) are set
# with the variable named beside each: -D<Package>_ROOT=... works for every find_package.
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(gflags REQUIRED)             # gflags_ROOT
find_package(glog REQUIRED)               # glog_ROOT
find_package(nlohmann_json REQUIRED)      # nlohmann_json_ROOT
find_package(RocksDB REQUIRED)            # RocksDB_ROOT
find_package(ZLIB REQUIRED)               # ZLIB_ROOT; texts packed with gzip
find_path(ROUTECAST_SENTENCEPIECE_INCLUDE sentencepiece_processor.h REQUIRED)
find_library(ROUTECAST_SENTENCEPIECE_LIB sentencepiece REQUIRED)
find_library(ROUTECAST_SENTENCEPIECE_TRAIN_LIB sentencepiece_train REQUIRED)
find_path(ROUTECAST_XXHASH_INCLUDE xxhash.h REQUIRED)
find_library(ROUTECAST_XXHASH_LIB xxhash REQUIRED)
find_path(ROUTECAST_ZSTD_INCLUDE zstd.h REQUIRED)
find_library(ROUTECAST_ZSTD_LIB zstd REQUIRED)

function(routecast_import name include)
  add_library(${name} INTERFACE IMPORTED GLOBAL)
  target_include_directories(${name} SYSTEM INTERFACE ${include})
  target_link_libraries(${name} INTERFACE ${ARGN})
endfunction()
routecast_import(dep::sentencepiece ${ROUTECAST_SENTENCEPIECE_INCLUDE}
  ${ROUTECAST_SENTENCEPIECE_LIB} ${ROUTECAST_SENTENCEPIECE_TRAIN_LIB})
routecast_import(dep::xxhash ${ROUTECAST_XXHASH_INCLUDE} ${ROUTECAST_XXHASH_LIB})
routecast_import(dep::zstd ${ROUTECAST_ZSTD_INCLUDE} ${ROUTECAST_ZSTD_LIB})

if(ROUTECAST_WITH_TORCH)
  find_package(MPI REQUIRED COMPONENTS C)  # MPI_HOME
  add_library(dep::mpi INTERFACE IMPORTED GLOBAL)
  target_link_libraries(dep::mpi INTERFACE MPI::MPI_C)
  target_compile_definitions(dep::mpi INTERFACE OMPI_SKIP_MPICXX)

  # LibTorch from the wheel: a site-packages folder that holds torch/ and nvidia/.
  # Own targets instead of find_package(Torch), which changes flags for everybody.
  set(ROUTECAST_TORCH_SITE "" CACHE PATH "site-packages folder with torch/ (launch/setup.sh)")
  set(torch_root ${ROUTECAST_TORCH_SITE}/torch)
  if(NOT EXISTS ${torch_root}/include/torch/headeronly/version.h)
    message(FATAL_ERROR "LibTorch not found in ROUTECAST_TORCH_SITE='${ROUTECAST_TORCH_SITE}'. "
      "Run launch/setup.sh, or pass the site-packages folder of torch==2.11.0.")
  endif()
  file(READ ${torch_root}/include/torch/headeronly/version.h torch_version)
  if(NOT torch_version MATCHES "VERSION_MAJOR 2\n.*VERSION_MINOR 11\n")
    message(FATAL_ERROR "${torch_root} is not LibTorch 2.11")
  endif()
  add_library(dep::torch INTERFACE IMPORTED GLOBAL)
  target_include_directories(dep::torch SYSTEM INTERFACE
    ${torch_root}/include ${torch_root}/include/torch/csrc/api/include)
  # Kernels register in static initialisers: as-needed would drop them.
  target_link_options(dep::torch INTERFACE -Wl,--no-as-needed)
  target_link_libraries(dep::torch INTERFACE
    ${torch_root}/lib/libtorch_cpu.so ${torch_root}/lib/libc10.so Threads::Threads)
  # The wheel's own, so that a process has one; for routecast_parallel_sources.
  target_link_libraries(dep::torch INTERFACE ${torch_root}/lib/libgomp.so.1)
  if(ROUTECAST_HAVE_CUDA)
    set(ROUTECAST_NCCL_ROOT ${ROUTECAST_TORCH_SITE}/nvidia/nccl CACHE PATH "NCCL folder")
    add_library(dep::torch_cuda INTERFACE IMPORTED GLOBAL)
    # The wheel's headers name CUDA headers; the toolkit provides them.
    target_link_libraries(dep::torch_cuda INTERFACE dep::torch CUDA::cudart
      ${torch_root}/lib/libtorch_cuda.so ${torch_root}/lib/libc10_cuda.so)
    target_link_options(dep::torch_cuda INTERFACE
      -Wl,-rpath-link,${ROUTECAST_TORCH_SITE}/nvidia/cu13/lib
      -Wl,-rpath-link,${ROUTECAST_TORCH_SITE}/nvidia/cudnn/lib
      -Wl,-rpath-link,${ROUTECAST_TORCH_SITE}/nvidia/nccl/lib
      -Wl,-rpath-link,${ROUTECAST_TORCH_SITE}/nvidia/nvshmem/lib
      -Wl,-rpath-link,${ROUTECAST_TORCH_SITE}/nvidia/cusparselt/lib)
    add_library(dep::nccl INTERFACE IMPORTED GLOBAL)
    target_include_directories(dep::nccl SYSTEM INTERFACE ${ROUTECAST_NCCL_ROOT}/include)
    target_link_libraries(dep::nccl INTERFACE ${ROUTECAST_NCCL_ROOT}/lib/libnccl.so.2)
  endif()
endif()

if(ROUTECAST_BUILD_TESTS)
  find_package(GTest REQUIRED)            # GTest_ROOT
endif()
if(ROUTECAST_BUILD_BENCH)
  find_package(benchmark REQUIRED)        # benchmark_ROOT
endif()

# CUDA is on when nvcc is found. Compiles and links without a GPU.
set(ROUTECAST_HAVE_CUDA OFF)
if(NOT ROUTECAST_CUDA STREQUAL "OFF")
  find_program(ROUTECAST_NVCC nvcc HINTS ${CUDAToolkit_ROOT}/bin $ENV{CUDAToolkit_ROOT}/bin /usr/local/cuda/bin)
  if(ROUTECAST_NVCC)
    set(ROUTECAST_HAVE_CUDA ON)
  elseif(ROUTECAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ROUTECAST_CUDA=ON but nvcc was not found; set CUDAToolkit_ROOT")
  endif()
endif()
if(ROUTECAST_HAVE_CUDA)
  if(CMAKE_VERSION VERSION_LESS 3.25.2)  # 3.25.1 does not know CUDA C++20
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_COMPILER ${ROUTECAST_NVCC})
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    # What the locked LibTorch has kernels for: code of one generation does not run on an
    # older card of it (86 on an A100), and newer ones translate the last.
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 90)
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)  # else cudart_static beside torch's libcudart
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "CUDA: on (${ROUTECAST_NVCC}, architectures ${CMAKE_CUDA_ARCHITECTURES})")
else()
  message(STATUS "CUDA: off (no nvcc, or ROUTECAST_CUDA=OFF); programs run on the CPU")
endif()

# SPDX-License-Identifier: Apache-2.0
# Headers of TensorRT; nothing is linked to it. Sets TensorRT_FOUND, TensorRT_INCLUDE_DIR and TensorRT_VERSION, and
# makes the target TensorRT::headers. In this order:
#
#   1. TensorRT_ROOT, or the environment's TENSORRT_ROOT or TRT_ROOT: an unpacked tar file
#   2. the CMake package that tar and zip files bring since 11.2.1
#   3. the system's headers: libnvinfer-headers-dev, NGC containers
#   4. HSTU_TRT_FALLBACK_HEADERS: those that `make plugins` fetches, of 10.14

set(_roots ${TensorRT_ROOT} $ENV{TENSORRT_ROOT} $ENV{TRT_ROOT})
find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h NO_DEFAULT_PATH
  HINTS ${_roots} PATH_SUFFIXES include targets/x86_64-linux-gnu/include targets/aarch64-linux-gnu/include .)
if(_roots AND NOT TensorRT_INCLUDE_DIR)
  message(FATAL_ERROR "TensorRT_ROOT, TENSORRT_ROOT or TRT_ROOT names ${_roots}, where there is no NvInferRuntime.h")
endif()

if(NOT TensorRT_INCLUDE_DIR)
  find_package(TensorRT-Enterprise CONFIG QUIET)
  if(TensorRT-Enterprise_FOUND)
    find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h NO_DEFAULT_PATH
      HINTS ${TensorRT-Enterprise_DIR} PATH_SUFFIXES include ../include ../../include ../../../include)
  endif()
endif()
find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h PATH_SUFFIXES x86_64-linux-gnu aarch64-linux-gnu)
find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h NO_DEFAULT_PATH HINTS ${HSTU_TRT_FALLBACK_HEADERS})

# 11 defines NV_TENSORRT_MAJOR by another macro, TRT_MAJOR_ENTERPRISE; so does 10.14.
if(TensorRT_INCLUDE_DIR)
  file(READ "${TensorRT_INCLUDE_DIR}/NvInferVersion.h" _header)
  foreach(part MAJOR MINOR PATCH)
    if(_header MATCHES "#define (TRT_${part}_ENTERPRISE|NV_TENSORRT_${part}) ([0-9]+)")
      set(_${part} ${CMAKE_MATCH_2})
    endif()
  endforeach()
  set(TensorRT_VERSION ${_MAJOR}.${_MINOR}.${_PATCH})
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_INCLUDE_DIR VERSION_VAR TensorRT_VERSION)
if(TensorRT_FOUND AND NOT TARGET TensorRT::headers)
  add_library(TensorRT::headers INTERFACE IMPORTED)
  set_target_properties(TensorRT::headers PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${TensorRT_INCLUDE_DIR}")
endif()

# LibTorch's headers take three quarters of the time of every file that includes them, GoogleTest's
# a third of a plain test's: they are compiled once, here, for all targets that link them. GCC wants
# equal flags and definitions for that: code is position-independent in one way for libraries and
# programs (CMakeLists.txt), and tests have owners of their own.
option(ROUTECAST_PRECOMPILE "Compile large headers once for all targets" ON)

# Whether `target` links LibTorch, itself or by what it links.
function(routecast_links_torch target result)
  set(${result} FALSE PARENT_SCOPE)
  if(target MATCHES "^dep::torch")
    set(${result} TRUE PARENT_SCOPE)
    return()
  endif()
  if(NOT TARGET ${target})
    return()
  endif()
  get_target_property(type ${target} TYPE)
  set(linked)
  if(NOT type STREQUAL "INTERFACE_LIBRARY")
    get_target_property(linked ${target} LINK_LIBRARIES)
  endif()
  get_target_property(passed_on ${target} INTERFACE_LINK_LIBRARIES)
  foreach(library ${linked} ${passed_on})
    if(library MATCHES "^(rc_|dep::)")
      routecast_links_torch(${library} found)
      if(found)
        set(${result} TRUE PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
endfunction()

# An object library that owns the precompiled form of the headers in ARGN.
function(routecast_header_owner name libraries)
  file(WRITE ${CMAKE_BINARY_DIR}/${name}.cc "// The owner of precompiled headers.\n")
  add_library(${name} OBJECT ${CMAKE_BINARY_DIR}/${name}.cc)
  target_link_libraries(${name} PRIVATE ${libraries})
  target_precompile_headers(${name} PRIVATE ${ARGN})
endfunction()

function(routecast_precompile_headers)
  if(NOT ROUTECAST_PRECOMPILE)
    return()
  endif()
  if(TARGET rc_models)
    routecast_header_owner(rc_torch_headers "dep::torch;nlohmann_json::nlohmann_json"
      <ATen/ATen.h> <algorithm> <filesystem> <functional> <map> <memory> <nlohmann/json.hpp> <span>
      <string> <vector>)
  endif()
  if(TARGET rc_models AND TARGET GTest::gtest)
    routecast_header_owner(rc_torch_test_headers
      "dep::torch;nlohmann_json::nlohmann_json;GTest::gtest"
      <ATen/ATen.h> <gtest/gtest.h> <algorithm> <filesystem> <functional> <map> <memory>
      <nlohmann/json.hpp> <span> <string> <vector>)
  endif()
  # What tests without LibTorch begin with.
  if(TARGET GTest::gtest)
    routecast_header_owner(rc_test_headers "GTest::gtest;nlohmann_json::nlohmann_json"
      <gtest/gtest.h> <algorithm> <filesystem> <functional> <map> <memory> <mutex>
      <nlohmann/json.hpp> <span> <string> <vector>)
  endif()
  foreach(folder ${ARGN})
    get_property(targets DIRECTORY ${folder} PROPERTY BUILDSYSTEM_TARGETS)
    foreach(target ${targets})
      get_target_property(type ${target} TYPE)
      if(NOT type MATCHES "^(EXECUTABLE|STATIC_LIBRARY)$")
        continue()
      endif()
      routecast_links_torch(${target} links)
      get_target_property(linked ${target} LINK_LIBRARIES)
      set(owner)
      if(links)
        set(owner rc_torch_headers)
      endif()
      if("GTest::gtest" IN_LIST linked AND links)
        set(owner rc_torch_test_headers)
      elseif("GTest::gtest" IN_LIST linked)
        set(owner rc_test_headers)
      endif()
      if(owner AND TARGET ${owner})
        target_precompile_headers(${target} REUSE_FROM ${owner})
      endif()
    endforeach()
  endforeach()
endfunction()

# routecast_room(name SOURCES a.cc b.cc LINK targets...): one static library a room.
function(routecast_room name)
  cmake_parse_arguments(ROOM "" "" "SOURCES;LINK" ${ARGN})
  add_library(rc_${name} STATIC ${ROOM_SOURCES})
  target_include_directories(rc_${name} PUBLIC ${CMAKE_SOURCE_DIR})
  target_link_libraries(rc_${name} PUBLIC ${ROOM_LINK})
endfunction()

# Sources that call at::parallel_for: without OpenMP in the compiler it runs on one thread.
# Their options differ from the precompiled headers'.
function(routecast_parallel_sources)
  set_source_files_properties(${ARGN} PROPERTIES COMPILE_OPTIONS -fopenmp SKIP_PRECOMPILE_HEADERS ON)
endfunction()

# routecast_test(name LABEL unit|ranks|golden|gpu|pipeline [RANKS n] [TIMEOUT s]
#                SOURCES ... LINK ...): one GoogleTest program, one CTest entry.
# Tests find data by ROUTECAST_SOURCE_DIR and programs by ROUTECAST_BIN_DIR (environment).
function(routecast_test name)
  cmake_parse_arguments(T "" "LABEL;RANKS;TIMEOUT" "SOURCES;LINK" ${ARGN})
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 300)
  endif()
  add_executable(${name} ${T_SOURCES})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR})
  # What a test does itself is short; the rooms that it calls are as the programs have them.
  target_compile_options(${name} PRIVATE $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<NOT:$<CONFIG:Debug>>>:-O1>)
  if(T_RANKS)
    target_link_libraries(${name} PRIVATE ${T_LINK} GTest::gtest)
    add_test(NAME ${name} COMMAND mpirun --allow-run-as-root --bind-to none --oversubscribe
      -n ${T_RANKS} $<TARGET_FILE:${name}>)
    set_tests_properties(${name} PROPERTIES PROCESSORS 2)
  else()
    target_link_libraries(${name} PRIVATE ${T_LINK} GTest::gtest GTest::gmock GTest::gtest_main)
    add_test(NAME ${name} COMMAND ${name})
  endif()
  routecast_test_properties(${name} ${T_LABEL} ${T_TIMEOUT})
endfunction()

# A build's own: two clones may test at once.
file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/tests/tmp)
function(routecast_test_properties name label timeout)
  set(sanitized)
  if(ROUTECAST_SANITIZE)
    math(EXPR timeout "${timeout} * 4")  # and slower by as much
    # Else what UBSan finds is only printed, and the test passes.
    string(CONCAT sanitized ";UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1"
      ";TSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/cmake/tsan.supp")
  endif()
  # Programs take a card where one is: what these tests say is meant of the CPU.
  set(hidden_cards)
  if(NOT label STREQUAL "gpu")
    set(hidden_cards ";CUDA_VISIBLE_DEVICES=-1")
  endif()
  set_tests_properties(${name} PROPERTIES LABELS "${label}" TIMEOUT ${timeout}
    SKIP_RETURN_CODE 77
    ENVIRONMENT "TEST_TMPDIR=${CMAKE_BINARY_DIR}/tests/tmp/;ROUTECAST_SOURCE_DIR=${CMAKE_SOURCE_DIR};ROUTECAST_BIN_DIR=${CMAKE_BINARY_DIR}/bin;ROUTECAST_BUILD_DIR=${CMAKE_BINARY_DIR};OMP_NUM_THREADS=1;MKL_NUM_THREADS=1;GOMP_SPINCOUNT=2000;OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_rmaps_base_oversubscribe=1;OMPI_MCA_mpi_yield_when_idle=1;OMPI_MCA_btl_vader_single_copy_mechanism=none${hidden_cards}${sanitized}")
endfunction()

// Loaded ahead of tritonserver (LD_PRELOAD): refuses requests for classes in place of scores.
//
// Servers before July 2025 divide by the item size of the output, which is 0 for strings: one request for the classes of
// `tables_version` ended the server. Later ones sort every element of an output, however large. Scores are no classes, so
// nobody needs them. This function is asked by nothing else, and just before the classes are made.

#include <cstdint>

extern "C" {
struct TRITONSERVER_Error;
TRITONSERVER_Error* TRITONSERVER_ErrorNew(int code, const char* message);

__attribute__((visibility("default"))) TRITONSERVER_Error* TRITONSERVER_ServerModelBatchProperties(
    void*, const char*, int64_t, uint32_t*, void**) {
  constexpr int kInvalid = 3;  // TRITONSERVER_Error_Code
  return TRITONSERVER_ErrorNew(kInvalid, "parameter 'classification' of an output is not served: leave it out");
}
}

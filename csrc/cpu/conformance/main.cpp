// conformance [--cases FILE] [--fuzz N] [--seed S] [--tall] [--wide] [--path NAME]
//
// Whether the kernels compute what they have to, on every path that this CPU runs, without Python: against results of the
// reference in torch (FILE is written by tests/native_cases.py), and against each other on random jobs.
#include <stdio.h>
#include <stdlib.h>

#include "support.h"

int main(int argc, char** argv) {
  std::string cases, path;
  int64_t count = 0;
  uint64_t seed = 1;
  bool tall = false, wide = false;
  for (int i = 1; i < argc; i++) {
    const std::string option = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : nullptr;
    if (option == "--tall" || option == "--wide") {
      (option == "--tall" ? tall : wide) = true;
      continue;
    }
    if (!value) {
      fprintf(stderr, "conformance: %s is no option, or lacks its value\n", argv[i]);
      return 2;
    }
    i++;
    if (option == "--cases")
      cases = value;
    else if (option == "--fuzz")
      count = atoll(value);
    else if (option == "--seed")
      seed = strtoull(value, nullptr, 10);
    else if (option == "--path")
      path = value;
    else
      return fprintf(stderr, "conformance: %s is no option\n", option.c_str()), 2;
  }
  if (conformance::settings(path).empty()) {
    fprintf(stderr, "conformance: this CPU does not run %s, only %s\n", path.c_str(), mx_paths());
    return 2;
  }
  conformance::report_crashes();
#ifdef MXDIT_EMULATE_TILES
  conformance::emulate_tiles();
#endif
  printf("paths: %s; each with 1 and 3 threads\n", path.empty() ? mx_paths() : path.c_str());
  bool passed = true;
  if (!cases.empty()) passed &= conformance::replay(cases, path);
  if (count) passed &= conformance::fuzz(count, seed, path);
  if (tall || wide) passed &= conformance::large(tall, wide, path);
  printf(passed ? "conformance: passed\n" : "conformance: FAILED\n");
  return passed ? 0 : 1;
}

// Threads: the host program's own OpenMP team where it has one, so that no second set of threads spins against it.
#pragma once

namespace mxdit {

// Calls body(data) on up to `threads` threads at once, this one among them, and waits. Every call runs with IEEE
// floating point (nearest even, subnormals kept), whatever the calling program has set, and puts that back.
void parallel(int threads, void (*body)(void*), void* data);

template <class F>
void parallel(int threads, F body) {
  parallel(threads, [](void* data) { (*static_cast<F*>(data))(); }, &body);
}

}  // namespace mxdit

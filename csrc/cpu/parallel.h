// Threads: the host program's own OpenMP team where it has one, so that no second set of threads spins against it. Where
// waiting for that team costs more than its threads save, as on cores that other programs use, threads of our own for a
// while, and none where they do not pay either.
#pragma once

namespace mxdit {

// Calls body(data) on up to `threads` threads at once, this one among them, and waits. A body has to do all that the others
// leave, since they may be as few as none. Every call runs with IEEE floating point (nearest even, subnormals kept),
// whatever the calling program has set, and puts that back.
void parallel(int threads, void (*body)(void*), void* data);

template <class F>
void parallel(int threads, F body) {
  parallel(threads, [](void* data) { (*static_cast<F*>(data))(); }, &body);
}

}  // namespace mxdit

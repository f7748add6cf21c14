#!/usr/bin/env bash
# The CPU kernels against the reference in torch and against each other: as they are installed; on older CPUs, and for 64-bit
# Arm, where an emulator (and a cross compiler) is at hand; under sanitizers. Where AVX-512 is there and AMX is not, its
# instructions are trapped and executed in C++. SEED and FUZZ change the random part. Each part says which paths it checked.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
seed=${SEED:-1}
fuzz=${FUZZ:-2000}
out=$PWD/build/native
cases=$out/cases.bin

# check NAME ARGUMENTS... -- CMAKE OPTIONS...: build that configuration and run conformance with these arguments.
check() {
  local name=$1 arguments=()
  shift
  while [ "$1" != -- ]; do
    arguments+=("$1")
    shift
  done
  shift
  echo "== $name"
  cmake -S csrc/cpu/conformance -B "$out/$name" -DCMAKE_COMPILE_WARNING_AS_ERROR=ON "$@" \
    "-DMXDIT_CHECK=$(IFS=';' && echo "${arguments[*]}")" >"$out/$name.log" ||
    { cat "$out/$name.log" && return 1; }
  cmake --build "$out/$name" --parallel 2 --target conformance >"$out/$name.log" || { cat "$out/$name.log" && return 1; }
  cmake --build "$out/$name" --target check | grep -v 'Built target'
}

# A symbol that the linker may take from any object would bring one path's instructions into another path. (The one that is
# let through is a pointer.)
no_weak_symbols() {
  local nm=$1 dir=$2 object objects=0 found=0
  for object in $(find "$dir/mxdit_cpu" -name '*.cpp.o' ! -name 'driver.*' ! -name 'parallel.*' ! -name 'cpu.*'); do
    objects=$((objects + 1))
    "$nm" -C --defined-only "$object" >"$out/symbols" || return 1
    if grep -E ' [WVu] ' "$out/symbols" | grep -v ' DW.ref.__gxx_personality_v0'; then
      echo "FAILED: $object shares these symbols with other objects"
      found=1
    fi
  done
  [ "$objects" -gt 0 ] || { echo "FAILED: no objects of paths in $dir" && return 1; }
  return $found
}

mkdir -p "$out"
if [ ! -e "$cases" ] || [ -n "$(find tests/native_cases.py src/mxdit -name '*.py' -newer "$cases")" ]; then
  "$python" tests/native_cases.py "$cases"
fi

emulate=ON
if grep -q amx_int8 /proc/cpuinfo 2>/dev/null || [ "$(uname -sm)" != "Linux x86_64" ]; then emulate=OFF; fi

check release --cases "$cases" --fuzz "$fuzz" --seed "$seed" --tall --wide -- -DCMAKE_BUILD_TYPE=Release \
  "-DMXDIT_EMULATE_TILES=$emulate"
no_weak_symbols nm "$out/release"
if command -v qemu-x86_64 >/dev/null && [ "$(uname -m)" = x86_64 ]; then
  for cpu in Nehalem Haswell; do  # without AVX, and without AVX-512: one instruction too many ends the program
    echo "== $cpu"
    qemu-x86_64 -cpu $cpu "$out/release/conformance" --fuzz "$((fuzz / 20))" --seed "$seed"
  done
else
  echo "== older CPUs: not checked, for want of qemu-x86_64"
fi
check sanitize --cases "$cases" --fuzz "$fuzz" --seed "$((seed + fuzz))" --wide -- -DCMAKE_BUILD_TYPE=Sanitize \
  "-DMXDIT_EMULATE_TILES=$emulate"

if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  check aarch64 --cases "$cases" --fuzz "$((fuzz / 10))" --seed "$seed" -- -DCMAKE_BUILD_TYPE=Release \
    "-DCMAKE_TOOLCHAIN_FILE=$PWD/csrc/cpu/conformance/aarch64.cmake"
  no_weak_symbols aarch64-linux-gnu-nm "$out/aarch64"
else
  echo "== aarch64: not checked, for want of aarch64-linux-gnu-g++ or qemu-aarch64"
fi
echo "native: passed"

#!/usr/bin/env bash
# Fails where a closure of `vectorize!` is not inlined into the function that has the instructions: it would run, but as the
# plainest code that the architecture knows. The compiler says so in its remarks. x86-64 only: elsewhere there is one path.
set -euo pipefail
cd "$(dirname "$0")/.."

[ "$(uname -m)" = x86_64 ] || exit 0
remarks=$(cargo rustc --release -p elapid-cpu --lib -- -Cremark=inline 2>&1)
into="into '_ZN10elapid_cpu3isa(6avx512|4avx2)17h"
inlined=$(grep -cE "inline \(success\).*$into" <<<"$remarks" || true)
missed=$(grep -E "inline \(missed\).*$into" <<<"$remarks" | grep -E "elapid_cpu|call_once" | grep -v panic || true)
if [ "$inlined" -lt 40 ]; then
    echo "the compiler's remarks have changed: $inlined closures were found to be inlined" >&2
    exit 1
fi
if [ -n "$missed" ]; then
    echo "$missed" >&2
    echo "these are not compiled for vectors; see vectorize! in crates/elapid-cpu/src/isa.rs" >&2
    exit 1
fi
echo "all closures of vectorize! are inlined ($inlined remarks)"

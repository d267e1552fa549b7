#!/bin/sh
# check_asan.sh [PYTEST ARGUMENTS]: the Python suite on a shim with AddressSanitizer and UndefinedBehaviorSanitizer,
# then a check for leaks over open-close cycles. Without arguments a part of the tests that calls every native
# function the package uses; `tests` is all of them, but for what sanitizers do in their own way (mlock does nothing,
# memory that is freed is kept for a while).
# PYTHON names the interpreter, which has what the tests need (default: that of .venv).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=build/asan
SANITIZE='-fsanitize=address,undefined'

mkdir -p $out/pymirror
PYMIRROR_CFLAGS="-O1 $SANITIZE -fno-sanitize-recover=all -fno-omit-frame-pointer" PYMIRROR_LDFLAGS=$SANITIZE \
    "$python" -W ignore setup.py -q build_ext --build-lib $out --build-temp $out/tmp >$out/build.log 2>&1 ||
    { cat $out/build.log >&2 && exit 1; }
for file in pymirror/*; do
    case $file in *.so | *__pycache__) ;; *) ln -sfn "../../../$file" "$out/$file" ;; esac
done

# The signals are pymirror's to handle. malloc: what Python keeps for itself is not to hide what is freed, nor is
# what the sanitizer keeps of it to look like a leak.
options=handle_segv=0:handle_sigbus=0:handle_abort=0:allow_user_segv_handler=1:quarantine_size_mb=32
sanitized() {
    leaks=$1
    shift
    PYTHONPATH=$PWD/$out:$PWD/tests:$PWD PYTHONMALLOC=malloc UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=$options:$leaks \
        LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" "$@"
}

[ $# -gt 0 ] || set -- -p entry_points tests/test_injection.py tests/test_mm.py tests/test_waiting.py \
    tests/test_migrate.py::TestChangesOfMemory \
    tests/test_wrong_use.py::TestWhere::test_in_a_callback tests/test_wrong_use.py::TestWhere::test_after_close
sanitized detect_leaks=0 "$python" -P -m pytest "$@" \
    --deselect tests/test_migrate_copied.py::TestMemoryThatDoesNotMove::test_locked_memory_ \
    --deselect tests/test_injection.py::test_a_reservation_that_cannot_be_cut \
    --deselect tests/test_close.py::test_a_thousand_cycles_leave_nothing

# The interpreter leaks too: what has the shim in its stack is ours.
rm -f $out/leaks.*
sanitized detect_leaks=1:exitcode=0:log_path=$out/leaks "$python" -P -W ignore tests/leak_cycles.py
if grep -l _shim.abi3 $out/leaks.* 2>/dev/null; then
    cat $out/leaks.* >&2
    exit 1
fi

#!/bin/sh
# check_wheel.sh WHEEL: installs it in a clean virtual environment with no compiler in reach, away from the sources,
# and tries what a first user tries. Only what it depends on may come from PyPI, and as wheels. WHEEL_PYTHON makes
# the environment (default: that of .venv).
set -eu

case $1 in
*-cp311-abi3-linux_*.whl) ;;
*) echo "$1 is no abi3 wheel for Python 3.11 and newer" >&2 && exit 1 ;;
esac
wheel=$(realpath "$1")
python=$(realpath "$(dirname "$0")/../.venv/bin/python")
python=${WHEEL_PYTHON:-$python}
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cd "$home"

"$python" -m venv env
env=$home/env/bin
# Nothing else: no cc, no make, no sources of pymirror.
alone() { env -u PYTHONPATH -u PYTHONHOME -u CC PATH="$env" "$@"; }
for tool in cc gcc clang make; do
    ! alone "$env/python" -c 'import shutil, sys; sys.exit(not shutil.which(sys.argv[1]))' "$tool" ||
        { echo "$tool is in reach" >&2 && exit 1; }
done
alone "$env/python" -m pip install -qq --disable-pip-version-check --no-cache-dir --only-binary :all: "$wheel"
alone "$env/python" - <<'EOF'
import sys

import numpy as np

import pymirror as pm

assert pm.__file__.startswith(sys.prefix), pm.__file__
with pm.AddressSpace() as mm, pm.Mirror(mm) as mirror:
    buf = mm.mmap(64 * pm.KiB)
    np.frombuffer(buf, np.uint8)[:] = 7
    with mirror.range(buf.addr, buf.addr + buf.size) as rng:
        rng.default_flags = pm.HMM_PFN_REQ_FAULT
        rng.wait_until_valid(timeout=5.0)
        rng.fault()
        assert (rng.pfns & pm.HMM_PFN_VALID).all()
EOF
alone "$env/pymirror" --version
alone "$env/pymirror" doctor --json >doctor.json
alone "$env/pymirror" demo --size 32M --seconds 1 --json >demo.json
alone "$env/python" -c 'import json; assert json.load(open("demo.json"))["checksums"]["wrong"] == 0'

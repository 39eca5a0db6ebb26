#!/usr/bin/env bash
# The one test command: formatting, lints, Rust tests, doc tests, and interop tests against ONNX Runtime.
#
# Needs Rust (rustup honours rust-toolchain.toml), a C compiler, and Python 3.11 or newer with venv; the Python packages that
# the interop tests need go into .venv, pinned by tests/requirements.txt. LLVM and MLIR 22 are installed with apt where they
# are missing, and QEMU with a C compiler for aarch64, without which one test is skipped. QCC_MODELS names a folder of further
# models; without it the tests that need them are skipped, and say so.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed_steps=()

# step NAME COMMAND...: runs on after a failure, so that one run shows everything that is wrong.
step() {
  local name=$1 start=$SECONDS
  shift
  printf '\n==> %s\n' "$name"
  if "$@" </dev/null 2>&1 | tee -a "$log"; then
    printf '==> %s: ok (%d s)\n' "$name" $((SECONDS - start))
  else
    printf '==> %s: FAILED (%d s)\n' "$name" $((SECONDS - start))
    failed_steps+=("$name")
  fi
}

# The copy of the list says that the installation went through.
python_packages() {
  cmp -s tests/requirements.txt "$venv/requirements.txt" || {
    python3 -m venv --clear "$venv" &&
      "$venv/bin/pip" install --quiet --disable-pip-version-check -r tests/requirements.txt &&
      cp tests/requirements.txt "$venv/requirements.txt"
  }
}

# Code generation. The list is the README's.
llvm() {
  [[ -x /usr/lib/llvm-22/bin/llvm-config && -e /usr/lib/llvm-22/lib/libMLIRCAPIIR.a ]] && return
  local as_root=()
  ((EUID == 0)) || as_root=(sudo)
  "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      libmlir-22-dev llvm-22-dev libclang-22-dev libpolly-22-dev zlib1g-dev libzstd-dev g++ >/dev/null
}

# Libraries for other processors are run under an emulator; without it their test is skipped.
emulators() {
  command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-gcc >/dev/null && return
  local as_root=()
  ((EUID == 0)) || as_root=(sudo)
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross >/dev/null ||
    echo "skipped: processors under an emulator"
}

step "python packages" python_packages
step "LLVM and MLIR" llvm
step "emulators of other processors" emulators
step "formatting" cargo fmt --all --check
step "lints" cargo clippy --workspace --all-targets --all-features --quiet -- -D warnings
step "the build without LLVM" cargo check --quiet
mkdir -p target
step "the tests of ONNX" "$venv/bin/python" tests/onnx_conformance/generate.py target/onnx_tests
export QCC_ONNX_TESTS=$PWD/target/onnx_tests
if [[ -n ${QCC_MODELS-} ]]; then
  step "what ONNX Runtime computes" "$venv/bin/python" scripts/model_values.py target/model_values.tsv
  export QCC_MODEL_VALUES=$PWD/target/model_values.tsv
fi
step "rust tests" cargo test --workspace --all-features --no-fail-fast
step "build for the interop tests" cargo build --all-features
step "interop tests" "$venv/bin/python" -m unittest discover --start-directory tests/interop --verbose

# `cargo test` says "test result: ok. 3 passed; 0 failed; ..."; unittest says one line a test, ending "... ok".
awk -v steps="${#failed_steps[@]}" '
  /^test result:/ { passed += $4; failed += $6 }
  / \.\.\. ok$/ && !/^test / { passed++ }
  / \.\.\. (FAIL|ERROR)$/ { failed++ }
  END { if (steps && !failed) failed = steps; printf "\n%d passed, %d failed\n", passed, failed }' "$log"
if ((${#failed_steps[@]})); then
  printf 'failed: %s\n' "${failed_steps[*]}"
  exit 1
fi

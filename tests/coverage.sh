#!/bin/bash
# Which lines and branches of agentd and ctl the tests run: coverage.sh FOLDER [OPTION OF CARGO TEST...]
# All tests but those on a whole host, or those that the options choose. Ends with a table of files, and fails where fewer than
# LINES percent of all lines were run, or one branch of the ledger or of the recovery was not. What ends by SIGKILL tells
# nothing of what it ran. Branches are counted by a nightly compiler only.
set -eu -o pipefail
cd "$(dirname "$0")/.."
folder=$1
shift
least=${LINES:-90}
whole='/(ledger|recovery)\.rs$'
toolchain=${COVERAGE_TOOLCHAIN:-nightly}
# What the compiler writes only its own LLVM's tools read for certain.
rustup component add --toolchain "$toolchain" llvm-tools
tools=$(rustc "+$toolchain" --print target-libdir)/../bin

export CARGO_TARGET_DIR=$folder/target RUSTFLAGS="-C instrument-coverage -Z coverage-options=branch"
export LLVM_PROFILE_FILE=$folder/profiles/%4m.profraw
rm -rf "$folder/profiles"
mkdir -p "$folder/profiles"
options=(--workspace --features agentd/fake)
cargo "+$toolchain" build "${options[@]}"
mapfile -t programs < <(
  cargo "+$toolchain" test "${options[@]}" --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
)
programs+=("$CARGO_TARGET_DIR/debug/agentd" "$CARGO_TARGET_DIR/debug/ctl")
# What building ran, build scripts and macros, is not asked for.
rm -f "$folder"/profiles/*
if [ $# -gt 0 ]; then
  cargo "+$toolchain" test "${options[@]}" "$@"
else
  cargo "+$toolchain" test "${options[@]}" --lib --bins
  cargo "+$toolchain" test "${options[@]}" --test '*' -- --test-threads=1 --skip on_a_host::
fi

"$tools/llvm-profdata" merge --sparse "$folder"/profiles/*.profraw -o "$folder/all.profdata"
objects=()
for program in "${programs[@]:1}"; do objects+=(-object "$program"); done
"$tools/llvm-cov" export "${programs[0]}" "${objects[@]}" --instr-profile="$folder/all.profdata" --summary-only \
  --ignore-filename-regex='(/tests\.rs|/tests?/|/testing\.rs|/rustc/|/registry/|/fuzz/|/fuzzing\.rs)' >"$folder/summary.json"
"$tools/llvm-cov" show "${programs[0]}" "${objects[@]}" --instr-profile="$folder/all.profdata" --show-branches=count \
  --ignore-filename-regex='(/tests\.rs|/tests?/|/testing\.rs|/rustc/|/registry/|/fuzz/|/fuzzing\.rs)' >"$folder/lines.txt"
python3 - "$folder/summary.json" "$least" "$whole" <<'TABLE'
import json, os, re, sys

path, least, whole = sys.argv[1], float(sys.argv[2]), re.compile(sys.argv[3])
report = json.load(open(path))["data"][0]
told = lambda part: f'{part["covered"]:>6} of {part["count"]:<6} {part["percent"]:6.2f}'
failed = False
for file in sorted(report["files"], key=lambda file: file["filename"]):
    lines, branches = file["summary"]["lines"], file["summary"]["branches"]
    missed = whole.search(file["filename"]) and branches["covered"] < branches["count"]
    failed |= bool(missed)
    print(f'{os.path.relpath(file["filename"]):50} {told(lines)}   {told(branches)}{"   every branch is wanted" if missed else ""}')
lines, branches = report["totals"]["lines"], report["totals"]["branches"]
print(f'{"all: lines, branches":50} {told(lines)}   {told(branches)}')
if lines["percent"] < least:
    failed = True
    print(f"fewer than {least:g} % of all lines were run")
sys.exit(failed)
TABLE

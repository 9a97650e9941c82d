#!/bin/bash
# Which lines of agentd and ctl the tests run, and which branches of the ledger and of the recovery: coverage.sh FOLDER
# Lines by all tests but those on a whole host; branches by the unit tests and the simulation. Ends with a table of files, and
# fails where fewer than LINES percent of all lines were run, or one of those branches was not. What ends by SIGKILL tells nothing
# of what it ran. Branches are counted by a nightly compiler only.
set -eu -o pipefail
cd "$(dirname "$0")/.."
folder=$1
least=${LINES:-90}
whole=(agentd/core/src/ledger.rs agentd/src/engine/recovery.rs)
ignored='(/tests\.rs|/tests?/|/testing\.rs|/live_tests\.rs|/rustc/|/rustlib/|/registry/|/fuzz/|/fuzzing\.rs)'

toolchain=${COVERAGE_TOOLCHAIN:-nightly}
# What the compiler writes only its own LLVM's tools read for certain.
rustup component add --toolchain "$toolchain" llvm-tools
tools=$(rustc "+$toolchain" --print target-libdir)/../bin

# measure NAME FLAGS: builds everything so that it counts, runs the tests by `tests`, and merges what was counted.
measure() {
  local name=$1 program
  export CARGO_TARGET_DIR=$folder/$name RUSTFLAGS="-C instrument-coverage $2"
  # Nothing that building runs, build scripts and macros, is asked for.
  export LLVM_PROFILE_FILE=/dev/null
  cargo "+$toolchain" build "${options[@]}"
  objects=("$CARGO_TARGET_DIR/debug/agentd" -object "$CARGO_TARGET_DIR/debug/ctl")
  while read -r program; do objects+=(-object "$program"); done < <(
    cargo "+$toolchain" test "${options[@]}" --no-run --message-format=json | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
  )
  rm -rf "$folder/profiles"
  mkdir -p "$folder/profiles"
  export LLVM_PROFILE_FILE=$folder/profiles/%4m.profraw
  tests
  "$tools/llvm-profdata" merge --sparse "$folder"/profiles/*.profraw -o "$folder/$name.profdata"
}

options=(--workspace --features agentd/fake)
tests() {
  cargo "+$toolchain" test "${options[@]}" --lib --test simulation
}
measure branches "-Z coverage-options=branch"
# Of these files alone: llvm-cov 22 breaks down on functions that macros made of branches without a line.
"$tools/llvm-cov" report "${objects[@]}" --instr-profile="$folder/branches.profdata" --show-branch-summary --sources "${whole[@]}" \
  >"$folder/branches.txt"
"$tools/llvm-cov" show "${objects[@]}" --instr-profile="$folder/branches.profdata" --show-branches=count --sources "${whole[@]}" \
  >"$folder/branches-by-line.txt"

tests() {
  cargo "+$toolchain" test "${options[@]}" --lib --bins
  cargo "+$toolchain" test "${options[@]}" --test '*' -- --test-threads=1 --skip on_a_host::
}
measure lines ""
"$tools/llvm-cov" report "${objects[@]}" --instr-profile="$folder/lines.profdata" --ignore-filename-regex="$ignored" \
  >"$folder/lines.txt"
"$tools/llvm-cov" show "${objects[@]}" --instr-profile="$folder/lines.profdata" --ignore-filename-regex="$ignored" \
  >"$folder/lines-by-line.txt"

# Both have in their last columns: how many, how many not, how many percent; the last line is of all.
echo "lines, and those that no test ran:"
awk '/^[^-].*%$|^TOTAL/ { print $1, $8, $9, $10 }' "$folder/lines.txt" | column -t
echo "branches, and those that no test took:"
awk '/%$/ { print $1, $11, $12, $13 }' "$folder/branches.txt" | column -t
awk -v least="$least" '/^TOTAL/ { sub("%", "", $10); exit $10 < least }' "$folder/lines.txt" ||
  { echo "fewer than $least % of all lines were run"; exit 1; }
awk '/^TOTAL/ { exit $12 > 0 }' "$folder/branches.txt" ||
  { echo "a branch of ${whole[*]} was not taken: see $folder/branches-by-line.txt"; exit 1; }

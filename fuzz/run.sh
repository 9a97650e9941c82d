#!/bin/bash
# Lets libFuzzer call each target, or those that are named: run.sh FOLDER SECONDS RUNS [TARGET...]
# Each for so many seconds, or for so many calls where RUNS is not empty. What it finds is kept below FOLDER: inputs that reach
# new code in corpora/, those that break something in artifacts/. Ends with a table of how many calls there were, and fails where
# one broke something.
set -eu -o pipefail
cd "$(dirname "$0")"
folder=$1 seconds=$2 runs=$3
shift 3
mapfile -t all < <(sed -n 's/^path = "targets\/\(.*\)\.rs"$/\1/p' Cargo.toml)
targets=("${@:-${all[@]}}")
[ $# -gt 0 ] || targets=("${all[@]}")

toolchain=${FUZZ_TOOLCHAIN:-nightly}
if ! rustup toolchain list | grep "^$toolchain" >/dev/null; then
  echo "run.sh: no toolchain \"$toolchain\": rustup toolchain install $toolchain --profile minimal" >&2
  exit 1
fi
# As it is packaged but for what a fuzzer needs to see, and every check of a debug build. Without a sanitizer: nothing of ours that
# reads these inputs is unsafe, and a call takes a third of the time.
export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_STRIP=none CARGO_PROFILE_RELEASE_DEBUG=line-tables-only
host=$(rustc -vV | sed -n 's/^host: //p')
cargo "+$toolchain" fuzz build --fuzz-dir . --features libfuzzer --target-dir "$folder/target" --sanitizer "${SANITIZER:-none}" -a

# Words are short; what is longer takes longer, and is no other input.
longest() {
  case $1 in
    patterns) echo 48 ;;
    units | references) echo 96 ;;
    config | requests) echo 768 ;;
    *) echo 4096 ;;
  esac
}

limit=("-max_total_time=$seconds")
[ -z "$runs" ] || limit=("-runs=$runs")
table=
failed=0
for target in "${targets[@]}"; do
  mkdir -p "$folder/corpora/$target" "$folder/artifacts/$target"
  log=$folder/$target.log
  echo "fuzzing $target ..."
  if "$folder/target/$host/release/$target" "$folder/corpora/$target" "corpora/$target" "${limit[@]}" \
    "-artifact_prefix=$folder/artifacts/$target/" -print_final_stats=1 -timeout=30 -rss_limit_mb=4096 \
    "-max_len=$(longest "$target")" >"$log" 2>&1; then
    end=ok
  else
    end="broken: see $log"
    failed=1
  fi
  count=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  table+=$(printf '| %-12s | %12s | %s |' "$target" "${count:-?}" "$end")$'\n'
done
printf '| %-12s | %12s | %s |\n|---|---|---|\n%s' target calls end "$table"
exit "$failed"

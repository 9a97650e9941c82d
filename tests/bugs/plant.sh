#!/usr/bin/env bash
# Plants each defect of this folder in a copy of the tree, one at a time, and lets the simulation look for it: the simulation
# is worth what it finds. Ends badly where one isn't found, or where a patch doesn't fit any more.
#
#   plant.sh [NAME…]       all of them, or those whose names are given
#   PLANT_SCHEDULES=N      how many schedules each may take, 200000 where it isn't set
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
tree=$(git -C "$here" rev-parse --show-toplevel)
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
# One target for all copies: what doesn't differ is built once.
export CARGO_TARGET_DIR=${PLANT_TARGET:-$tree/target/bugs}
git clone -q "$tree" "$copy/tree"
cd "$copy/tree"
missed=0
for patch in "$here"/*.patch; do
    name=$(basename "$patch" .patch)
    if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi
    git checkout -q .
    git apply "$patch"
    cargo build -q --profile soak -p agentd-tests --bin soak
    if found=$("$CARGO_TARGET_DIR/soak/soak" schedules --count "${PLANT_SCHEDULES:-200000}" --seed 0 2>&1); then
        printf '%-36s NOT FOUND: %s\n' "$name" "$found"
        missed=1
    else
        printf '%-36s %s\n' "$name" "${found#soak: }"
    fi
done
exit $missed

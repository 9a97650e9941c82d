#!/bin/bash
# Tells the newest library versions that binaries need, and holds them to what the packages ask for: a package whose stated
# dependencies are older than what its binary needs installs fine and then does not start. The same numbers are in
# deb/control and rpm/agentd.spec.
#
#   packaging/check-symbols.sh BINARY…
set -euo pipefail

declare -A stated=([GLIBC]=2.34 [LIBVIRT]=6.0.0)
libraries=" libc.so.6 libm.so.6 libgcc_s.so.1 libvirt.so.0 ld-linux-x86-64.so.2 ld-linux-aarch64.so.1 "

bad=0
for binary in "$@"; do
    needed=$(objdump -p "$binary")
    for prefix in "${!stated[@]}"; do
        newest=$({ grep -oP "\b${prefix}_\K[0-9.]+" <<<"$needed" || true; } | sort -V | tail -n 1)
        [ -z "$newest" ] || echo "$binary: ${prefix}_$newest"
        if [ "$(printf '%s\n' "${newest:-0}" "${stated[$prefix]}" | sort -V | tail -n 1)" != "${stated[$prefix]}" ]; then
            echo "$binary needs ${prefix}_$newest, the packages ask for ${stated[$prefix]} only" >&2
            bad=1
        fi
    done
    while read -r library; do
        if [[ "$libraries" != *" $library "* ]]; then
            echo "$binary needs $library, which no package names" >&2
            bad=1
        fi
    done < <(awk '$1 == "NEEDED" { print $2 }' <<<"$needed")
done
exit "$bad"

#!/bin/sh
# Fetches the domain definitions that libvirt tests itself with, from Debian's source package, into a folder:
# `definitions.sh FOLDER`. Uses lists of its own: most machines have none of sources.
set -eu

folder=$1
[ ! -e "$folder/done" ] || exit 0
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/parts" "$work/lists/partial" "$work/package"
for list in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  [ ! -s "$list" ] || sed -n 's/^deb /deb-src /p' "$list" >"$work/parts/$(basename "$list" .list).list"
done
for list in /etc/apt/sources.list.d/*.sources; do
  [ ! -s "$list" ] || sed 's/^Types:.*/Types: deb-src/' "$list" >"$work/parts/$(basename "$list")"
done
apt() {
  apt-get -q -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/parts" \
    -o Dir::State::lists="$work/lists" -o APT::Sandbox::User=root "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
}
apt update
cd "$work/package"
apt source --download-only libvirt
tar xf libvirt_*.orig.tar.?z
find . -path '*/qemuxml2argvdata/*.xml' -type f -exec cp {} "$folder" \;
touch "$folder/done"

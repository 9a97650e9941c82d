#!/bin/sh
# Installs, on Debian 12, the packages that building, the demo and the tests need: `setup.sh GROUP…`, the groups below.
# Says what it installs, prints nothing when all is there, and starts no service: the tests run engines of their own.
# shellcheck disable=SC2086 # lists of packages are meant to be split
set -eu

build="gcc libc6-dev make pkg-config libvirt-dev"
# The demo runs on libvirt's test driver, which lives inside the client library.
demo="libvirt0"
check="dbus-daemon valgrind"
deb="binutils dpkg-dev"
rpm="binutils rpm"
host="mmdebstrap e2fsprogs openssh-client qemu-system-x86 lintian rpmlint"
# schemathesis comes from PyPI into an environment of its own.
contract="python3 python3-venv"
# libFuzzer is C++.
fuzz="g++"
# A peer to measure beside.
bench="lxd lxd-client"
test="docker.io libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 qemu-system-common
  busybox-static qemu-guest-agent cpio xz-utils curl iproute2 procps tmux util-linux faketime prometheus socat
  prometheus-node-exporter"

wanted=
for what in "${@:-build}"; do
  case $what in
    build) wanted="$wanted $build" ;;
    demo) wanted="$wanted $build $demo" ;;
    check) wanted="$wanted $build $demo $check" ;;
    deb) wanted="$wanted $build $deb" ;;
    rpm) wanted="$wanted $build $rpm" ;;
    test) wanted="$wanted $build $check $test" ;;
    host) wanted="$wanted $host" ;;
    bench) wanted="$wanted $bench" ;;
    contract) wanted="$wanted $contract" ;;
    fuzz) wanted="$wanted $fuzz" ;;
    *) echo "usage: setup.sh [build|demo|check|deb|rpm|test|host|bench|contract|fuzz]..." >&2; exit 2 ;;
  esac
done

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "setup.sh: this is no Debian; needed are the likes of:$wanted" >&2
  exit 1
fi

# One call asks about all; a package that dpkg has never heard of is only missing from the answer.
installed=$(dpkg-query -W -f '${db:Status-Abbrev}${Package}\n' $wanted 2>/dev/null | sed -n 's/^.i //p') || true
missing=
for package in $wanted; do
  case "
$installed
$missing
" in
    *"
$package
"*) ;;
    *) missing="$missing
$package" ;;
  esac
done
# The tests download a guest's kernel with apt-get, which needs package lists even where nothing is to be installed.
lists=yes
case " $* " in
  *" test "*) [ -n "$(find /var/lib/apt/lists -name '*_Packages*' -print -quit 2>/dev/null)" ] || lists= ;;
esac
if [ -z "$missing" ] && [ -n "$lists" ]; then exit 0; fi

root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "setup.sh: neither root nor sudo; as root run: apt-get install" $missing >&2
    exit 1
  fi
}

echo "setup.sh: ${missing:+installing}${missing:-fetching package lists}" | tr -s '\n' ' '
echo
log=$(mktemp)
policy=/usr/sbin/policy-rc.d
ours=
trap 'rm -f "$log"; [ -z "$ours" ] || root rm -f "$policy"' EXIT
trap 'exit 1' INT TERM HUP
# Debian's own way to say "install, but start nothing" (exit code 101); somebody else's file is left alone.
if [ ! -e "$policy" ]; then
  ours=yes
  printf '#!/bin/sh\nexit 101\n' | root tee "$policy" >/dev/null
  root chmod 755 "$policy"
fi
apt() {
  root env DEBIAN_FRONTEND=noninteractive apt-get -y -qq -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1
}
if [ -z "$lists" ]; then
  apt update || { cat "$log" >&2; exit 1; }
fi
[ -n "$missing" ] || exit 0
# A first try without `update` spares the network; old or no package lists make it fail, and then it is worth one.
if ! apt install --no-install-recommends $missing; then
  apt update || { cat "$log" >&2; exit 1; }
  apt install --no-install-recommends $missing || { cat "$log" >&2; exit 1; }
fi

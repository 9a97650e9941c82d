#!/bin/bash
# `make demo`: a tour of agentd and ctl on a bare machine. The virtual machines live inside libvirt's test driver, in the
# memory of an agentd of the demo's own, so no hypervisor is needed and nothing of this machine is changed. Where Docker
# answers and has an image that can sleep, one container is made, resized and removed; nothing is pulled.
#
#   packaging/demo.sh [DIR]      DIR holds agentd and ctl already built; else both are built here
#
# Exits 1 if a command ends with another exit code than the tour expects.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=${1:-}
if [ -z "$bin" ]; then
    packaging/setup.sh demo
    # A debug build: it takes a fraction of the time of a release, and the tour waits for nothing that depends on it.
    cargo build -p agentd -p ctl
    bin=${CARGO_TARGET_DIR:-target}/debug
fi
bin=$(cd "$bin" && pwd)

dir=$(mktemp -d)
daemon=
container=
surprises=0
docker=(docker -H unix:///var/run/docker.sock)

# Everything that the demo made, whichever way it ends. agentd by its id, and hard only if it does not go.
cleanup() {
    local status=$?
    trap - EXIT
    stop_agentd
    if [ -n "$container" ]; then
        "${docker[@]}" rm --force "$container" >/dev/null 2>&1 || true
    fi
    if [ "$status" != 0 ] && [ -s "$dir/agentd.log" ]; then
        printf '\nThe end of what agentd said:\n' >&2
        tail -n 20 "$dir/agentd.log" >&2
    fi
    rm -rf "$dir"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start_agentd CONFIG: returns once it answers. Whatever a service manager set for this shell is not meant for it.
start_agentd() {
    env -u NOTIFY_SOCKET -u LISTEN_FDS -u LISTEN_PID -u LISTEN_FDNAMES "$bin/agentd" --config "$1" >>"$dir/agentd.log" 2>&1 &
    daemon=$!
    local deadline=$((SECONDS + 30))
    until "$bin/ctl" health >/dev/null 2>&1; do
        if ! kill -0 "$daemon" 2>/dev/null; then
            echo "agentd has ended before it answered" >&2
            exit 1
        fi
        if ((SECONDS > deadline)); then
            echo "agentd does not answer" >&2
            exit 1
        fi
        sleep 0.1
    done
}

stop_agentd() {
    [ -n "$daemon" ] || return 0
    kill "$daemon" 2>/dev/null || true
    local deadline=$((SECONDS + 10))
    while kill -0 "$daemon" 2>/dev/null; do
        if ((SECONDS > deadline)); then
            kill -KILL "$daemon" 2>/dev/null || true
            break
        fi
        sleep 0.1
    done
    wait "$daemon" 2>/dev/null || true
    daemon=
}

say() {
    printf '\n# %s\n' "$*"
}

# run EXIT-CODE ctl ARGUMENTS…: the command, its output, and its exit code where that is not 0.
run() {
    local expected=$1 status=0
    shift
    printf '$ %s\n' "$*"
    "$bin/$1" "${@:2}" 2>&1 || status=$?
    if [ "$status" != 0 ]; then
        echo "(exit code $status)"
    fi
    if [ "$status" != "$expected" ]; then
        echo "demo: exit code $expected was expected here" >&2
        surprises=$((surprises + 1))
    fi
}

# domain NUMBER NAME STATE: 2 of at most 4 vCPUs, 1 of at most 4 GiB. States of the test driver: 1 running, 5 shut off. The
# UUID is given because the driver would make up another one for each connection.
domain() {
    cat <<EOF
  <domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
    <test:runstate>$3</test:runstate>
    <name>$2</name>
    <uuid>a6e17d00-0000-4000-8000-00000000000$1</uuid>
    <memory unit='GiB'>4</memory>
    <currentMemory unit='GiB'>1</currentMemory>
    <vcpu current='2'>4</vcpu>
    <os><type>hvm</type></os>
    <devices><memballoon model='virtio'/></devices>
  </domain>
EOF
}

umask 077 # agentd refuses a config that others may write
mkdir "$dir/state"
export AGENTD_SOCKET=$dir/agentd.sock

{
    echo '<node>'
    domain 1 web 1
    domain 2 db 1
    domain 3 ci-1 1
    domain 4 ci-2 5
    echo '</node>'
} >"$dir/node.xml"

# Caps of a made-up host, so that the tour is the same on every machine.
cat >"$dir/vms.toml" <<EOF
[server]
socket = "$AGENTD_SOCKET"
state_dir = "$dir/state"
[libvirt]
uri = "test://$dir/node.xml"
[capacity]
cpus = 8
memory = "32GiB"
[scaling]
max_cpus = 8
max_memory = "8GiB"
EOF
start_agentd "$dir/vms.toml"

say "Four virtual machines, three of them running, on a host that may promise 8 CPUs."
run 0 ctl list
run 0 ctl capacity

say "What would a resize do? A dry run shows the steps and changes nothing."
run 0 ctl resize vm/web --cpus 4 --memory 2GiB --dry-run

say "CPU and memory in one change. The answer says what was observed, not what was asked."
run 0 ctl resize vm/web --cpus 4 --memory 2GiB
run 0 ctl show vm/web

say "4 + 2 + 2 CPUs are promised: the host is full. More is refused, with the numbers behind it."
run 4 ctl resize vm/db --cpus 4

say "Stopping a machine gives its share back."
run 0 ctl stop vm/ci-1
run 0 ctl resize vm/db --cpus 4

say "Starting it again needs its share again: refused until somebody gives way."
run 4 ctl start vm/ci-1
run 0 ctl resize vm/db --cpus 2
run 0 ctl start vm/ci-1
run 0 ctl list
stop_agentd

# make_container: one that sleeps, from the first image here that can. Says in $container which; empty if none.
make_container() {
    local image name=agentd-demo-$$
    for image in $("${docker[@]}" image ls --quiet --filter dangling=false | head -n 5); do
        if "${docker[@]}" run --detach --pull never --name "$name" --network none --cpus 0.25 --memory 64m \
            --entrypoint sleep "$image" 600 >/dev/null 2>&1; then
            container=$name
            return 0
        fi
        "${docker[@]}" rm --force "$name" >/dev/null 2>&1 || true
    done
}

if command -v docker >/dev/null && timeout 5 "${docker[@]}" version >/dev/null 2>&1; then
    make_container
    if [ -n "$container" ]; then
        say "The same for a container, on the Docker that runs here."
        # An agentd of its own with wide caps: what else runs on this Docker counts too, and should not decide the tour.
        cat >"$dir/containers.toml" <<EOF
[server]
socket = "$AGENTD_SOCKET"
state_dir = "$dir/state"
[docker]
socket = "/var/run/docker.sock"
[capacity]
reserved_memory = 0
cpu_overcommit = 100.0
memory_overcommit = 100.0
EOF
        start_agentd "$dir/containers.toml"
        run 0 ctl show "container/$container"
        run 0 ctl resize "container/$container" --cpus 0.75 --memory 128MiB
        run 0 ctl stop "container/$container" --timeout 2s --force
        stop_agentd
    else
        say "Docker answers, but has no image that can sleep: no container in this tour."
    fi
else
    say "No Docker here: no container in this tour."
fi

if [ "$surprises" != 0 ]; then
    exit 1
fi
say "That was the tour. Everything it made is gone again. Next: README.md"

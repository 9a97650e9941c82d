# shellcheck shell=sh disable=SC2016,SC2086
# Makes one lab's cgroups and namespaces, waits until its standard input closes (the test process let go of it or died),
# then ends every process of the lab by its pid and removes what was made. `sh -c SCRIPT guardian DIR NAME`
# DIR: the lab's folder, removed at the end. NAME: what the lab's cgroups are called.
set -eu
dir=$1 name=$2

# The cgroup hierarchies, mounted at: all of v1 (and v2 beside it), or the one of v2.
hierarchies=$(awk '($3 == "cgroup" || $3 == "cgroup2") && $2 ~ "^/sys/fs/cgroup" { print $2 }' /proc/mounts | sort -u)

clean_up() {
  # Again and again, since what forks may have been missed, and a process on its way out keeps its cgroup busy for a
  # while without being listed there. Nothing of the lab lives outside its cgroups.
  tries=0
  while [ $tries -lt 500 ]; do
    left=
    for h in $hierarchies; do
      [ -d "$h/$name" ] || continue
      left=yes
      # A paused container would not die before it is thawed: v1's freezer holds back even SIGKILL.
      find "$h/$name" -name freezer.state | while read -r state; do echo THAWED >"$state"; done 2>/dev/null || true
      find "$h/$name" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u | xargs -r kill -9 2>/dev/null || true
      find "$h/$name" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    done
    [ -n "$left" ] || break
    tries=$((tries + 1))
    sleep 0.02
  done
  rm -rf "$dir"
}
trap clean_up EXIT

: >"$dir/join"
for h in $hierarchies; do
  mkdir "$h/$name"
  if [ -e "$h/$name/cpuset.cpus" ] && [ -e "$h/cpuset.cpus" ]; then
    # v1: no process can enter a cpuset that has neither CPUs nor memory nodes.
    cat "$h/cpuset.cpus" >"$h/$name/cpuset.cpus"
    cat "$h/cpuset.mems" >"$h/$name/cpuset.mems"
  fi
  if [ "$h" = /sys/fs/cgroup ]; then
    # v2: only a cgroup without processes may have controllers below it, so the processes get one of their own.
    mkdir "$h/$name/init"
    for c in cpu memory pids cpuset io; do
      echo "+$c" >"$h/cgroup.subtree_control" 2>/dev/null || true
      echo "+$c" >"$h/$name/cgroup.subtree_control" 2>/dev/null || true
    done
    echo "$h/$name/init/cgroup.procs" >>"$dir/join"
  else
    echo "$h/$name/cgroup.procs" >>"$dir/join"
  fi
done

# libvirt's compiled-in folders: private ones are mounted over them.
for folder in run/libvirt var/lib/libvirt etc/libvirt var/log/libvirt var/cache/libvirt; do
  mkdir -p "$dir/root/$folder" "/$folder"
done

# The process that holds the namespaces. It enters the cgroup namespace at the lab's own cgroup, so that inside the lab
# is the root: two labs with a domain of one name don't meet.
hold='
set -eu
dir=$1 name=$2; shift 2
for folder in run/libvirt var/lib/libvirt etc/libvirt var/log/libvirt var/cache/libvirt; do
  mount --bind "$dir/root/$folder" "/$folder"
done
# Neither systemd nor D-Bus is to be asked to make scopes outside of the lab.
for folder in /run/dbus /run/systemd; do
  [ ! -d "$folder" ] || mount -t tmpfs -o size=1m lab "$folder"
done
for h in "$@"; do mount --bind "$h/$name" "$h"; done
if [ -d /sys/fs/cgroup/init ]; then echo 0 >/sys/fs/cgroup/init/cgroup.procs; fi
ip link set lo up
echo "$$" >"$dir/holder.tmp"
mv "$dir/holder.tmp" "$dir/holder"
exec sleep infinity
'
(
  for h in $hierarchies; do echo 0 >"$h/$name/cgroup.procs"; done
  exec unshare --mount --net --cgroup --propagation private sh -c "$hold" holder "$dir" "$name" $hierarchies
) </dev/null &

cat >/dev/null

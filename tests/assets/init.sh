#!/bin/busybox sh
# Process number 1 of the lab's guest. It loads virtio drivers, then once a second puts offline CPUs online and prints what
# the guest has. Words on the kernel's command line change it:
#   noballoon   no balloon driver: the guest never obeys a memory target
#   sticky      the guest never gives a CPU up
#   burn        a busy loop in the background, whose rounds a second are printed: the proof of a CPU time limit
#   passive     hot-added CPUs are left offline: present is not online
#   agent       QEMU's guest agent, where the domain has its channel
#   lies=…      something else in its place: `flood` writes without end, `stall` reads nothing, `huge` has numbers of its own
#   acpid       the power button switches it off
# shellcheck shell=dash disable=SC2086
/bin/busybox mkdir -p /proc /sys /dev /run
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
exec </dev/null >/dev/ttyS0 2>&1

flag() {
  case " $(cat /proc/cmdline) " in *" $1 "*) true ;; *) false ;; esac
}

echo online >/sys/devices/system/memory/auto_online_blocks
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_balloon virtio_mem; do
  if [ $module = virtio_balloon ] && flag noballoon; then continue; fi
  # Some kernels have one or the other built in.
  [ ! -e /modules/$module.ko ] || insmod /modules/$module.ko
done

if flag acpid; then
  insmod /modules/button.ko
  insmod /modules/evdev.ko
  # Nobody types here: whatever is pressed is the power button.
  for input in /dev/input/event*; do
    (
      dd if=$input bs=24 count=1 of=/dev/null 2>/dev/null
      echo "POWER BUTTON"
      poweroff -f
    ) &
  done
fi

# An agent that answers every question, and has more CPUs than there are.
huge() {
  while read -r asked; do
    id=${asked##*\"id\":}
    id=${id%%[!0-9]*}
    case $asked in
      *guest-sync-delimited*) printf '\377{"return": %s}\n' "$id" ;;
      *guest-sync*) echo "{\"return\": $id}" ;;
      *guest-get-vcpus*)
        echo '{"return": [{"logical-id": 0, "online": true, "can-offline": false},
          {"logical-id": 4000000000, "online": true, "can-offline": true},
          {"logical-id": 9223372036854775807, "online": true}]}' | tr -d '\n'
        echo
        ;;
      *) echo '{"error": {"class": "CommandNotFound", "desc": "no"}}' ;;
    esac
  done
}

if flag agent; then
  [ ! -e /modules/virtio_console.ko ] || insmod /modules/virtio_console.ko
  for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port"/name)" = org.qemu.guest_agent.0 ] || continue
    port=/dev/${port##*/}
    case " $(cat /proc/cmdline) " in
      *" lies=flood "*) yes '{"return": {"online": "0-4294967295"}}' >"$port" & ;;
      *" lies=stall "*) sleep 1000000 <>"$port" & ;;
      *" lies=huge "*) huge <>"$port" >&0 & ;;
      *) qemu-ga -m virtio-serial -p "$port" -t /run & ;;
    esac
  done
fi

if flag sticky; then
  # The kernel then answers an eject request with "not supported" and keeps the CPU.
  echo 0 >/sys/firmware/acpi/hotplug/processor/enabled
fi

echo 0 >/run/rounds
if flag burn; then
  (
    rounds=0
    while :; do
      i=0
      while [ $i -lt 200 ]; do i=$((i + 1)); done
      rounds=$((rounds + 1))
      echo $rounds >/run/rounds
    done
  ) &
fi

passive=false
if flag passive; then passive=true; fi
last=0
while :; do
  if ! $passive; then
    for cpu in /sys/devices/system/cpu/cpu[1-9]*; do
      [ ! -e $cpu/online ] || { read -r online <$cpu/online && [ "$online" = 1 ]; } || echo 1 >$cpu/online
    done 2>/dev/null
  fi
  read -r _ total _ </proc/meminfo
  read -r up _ </proc/uptime
  read -r rounds </run/rounds || rounds=$last
  echo "STAT nproc=$(nproc) memtotal=$total kB loops=$((rounds - last)) up=$up"
  last=$rounds
  sleep 1
done

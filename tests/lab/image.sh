#!/bin/bash
# Builds the host lab: a Debian 12 with systemd, libvirt, QEMU and Docker as Debian has them, as a disk that boots in QEMU.
#
#   image.sh FOLDER     disk.img (read only by those who boot it: each on a copy of its own), vmlinuz, initrd.img, key,
#                       host.pub
#
# Nothing of this machine is in it but an ssh key that is made for it. Takes about two minutes; needs root, mmdebstrap and
# e2fsprogs. A folder that has `complete` in it is left as it is.
set -euo pipefail
folder=$1
[ ! -e "$folder/complete" ] || exit 0
mkdir -p "$folder"
work=$(mktemp -d "$folder/work.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT

# What a host has; then what the tests look at it with.
packages=systemd,systemd-sysv,dbus,udev,kmod,iproute2,openssh-server,linux-image-cloud-amd64,initramfs-tools
packages+=,libvirt-daemon-system,libvirt-daemon-driver-qemu,libvirt-clients,qemu-system-x86,docker.io,apparmor
packages+=,bash-completion,man-db,tmux,procps,curl,busybox-static,rpm
mmdebstrap --quiet --variant=minbase --include="$packages" bookworm "$work/host.tar"
mkdir "$work/root"
tar -xf "$work/host.tar" -C "$work/root" --exclude='./dev/*'
rm "$work/host.tar"

root=$work/root
echo lab >"$root/etc/hostname"
printf '127.0.0.1 localhost lab\n' >"$root/etc/hosts"
printf '/dev/vda / ext4 rw,relatime 0 1\n' >"$root/etc/fstab"
: >"$root/etc/machine-id"
printf '[Match]\nName=en*\n[Network]\nDHCP=yes\n' >"$root/etc/systemd/network/20-lab.network"
ssh-keygen -q -t ed25519 -N '' -C lab -f "$work/key"
install -d -m 700 "$root/root/.ssh"
install -m 600 "$work/key.pub" "$root/root/.ssh/authorized_keys"
# Keys of its own, once; and nothing that works in the background while tests measure.
ssh-keygen -A -f "$root" >/dev/null
chroot "$root" systemctl --quiet enable systemd-networkd ssh
chroot "$root" systemctl --quiet mask systemd-networkd-wait-online.service apt-daily.timer apt-daily-upgrade.timer \
  man-db.timer e2scrub_all.timer fstrim.timer
# The journal outlives a reboot: what was told before one is looked at after it.
mkdir -p "$root/var/log/journal"

cp "$root"/boot/vmlinuz-* "$folder/vmlinuz"
cp "$root"/boot/initrd.img-* "$folder/initrd.img"
cp "$work/key" "$folder/key"
cp "$root/etc/ssh/ssh_host_ed25519_key.pub" "$folder/host.pub"
mke2fs -q -t ext4 -d "$root" -F "$folder/disk.img" 6G
touch "$folder/complete"

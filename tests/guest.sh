#!/bin/bash
# Boots systemd as process 1 of namespaces of its own, over a copy-on-write view of this machine's root.
# Called by guest.py inside new mount, pid, uts, ipc and net namespaces:
#   guest.sh enter CGROUP DIRECTORY [SOURCE:TARGET ...]
# DIRECTORY takes the changes and outlives the guest; each SOURCE is shown, read-only, at TARGET.
set -eu
step=$1 cgroup=$2 directory=$3
shift 3
if [ "$step" = enter ]; then # its cgroup first: a cgroup namespace begins where its maker is
  mount --make-rprivate /
  echo 0 >"$cgroup/cgroup.procs"
  exec unshare --cgroup "$0" boot "$cgroup" "$directory" "$@"
fi
root=$directory/root
mkdir -p "$directory/changes" "$directory/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$directory/changes,workdir=$directory/work" guest "$root"

mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
# The kernel's settings are the host's: read-only, but for those of our own network namespace.
mount --bind "$root/proc/sys/net" "$directory/work"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount --move "$directory/work" "$root/proc/sys/net"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"

mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
for device in null zero full random urandom tty; do
  touch "$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
for number in 0 1 2; do ln -s "fd/$number" "$root/dev/$(echo stdin stdout stderr | cut -d' ' -f$((number + 1)))"; done
ln -s pts/ptmx "$root/dev/ptmx"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
for shown in "$@"; do
  mkdir -p "$root${shown#*:}"
  mount --bind "${shown%%:*}" "$root${shown#*:}"
  mount -o remount,bind,ro "$root${shown#*:}"
done

# Once: nothing of the host's own services, nothing that wants a device or a seat.
if [ ! -e "$root/etc/guest" ]; then
  touch "$root/etc/guest"
  rm -rf "$root"/etc/systemd/system/*.wants "$root/var/log/journal"
  for unit in getty.target systemd-logind.service systemd-udevd.service systemd-timesyncd.service \
    systemd-journald-audit.socket modprobe@.service sys-kernel-debug.mount sys-kernel-tracing.mount \
    sys-fs-fuse-connections.mount dev-hugepages.mount systemd-tmpfiles-clean.timer tmp.mount; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
  done
fi
cd "$root"
mkdir -p mnt
pivot_root . mnt
umount -l /mnt
mount --make-rshared / # credentials are passed through shared mounts
exec env -i container=private LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  SYSTEMD_PROC_CMDLINE=systemd.unified_cgroup_hierarchy=1 \
  /lib/systemd/systemd --system --unit=multi-user.target --show-status=no

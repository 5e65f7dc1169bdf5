#!/bin/sh
# Unpacks libvirt 9.0 and QEMU 7.2, Debian 12's own, with all that they need, into a root directory of their own:
# `make test-full` starts that libvirtd in it. Nothing is installed, no script of a package is run, and no list of the
# system's apt is touched. The root is old-libvirt/root in the directory of assets.
set -eu
umask 022
cd "$(dirname "$0")/.."
mkdir -p "${VMSTATE_ASSETS:-target/guest-assets}"
assets=$(cd "${VMSTATE_ASSETS:-target/guest-assets}" && pwd)
place="$assets/old-libvirt"
[ ! -e "$place/root" ] || exit 0

say() { echo "setup: $*" >&2; }
retry() { "$@" || { sleep 2; "$@"; } || { sleep 5; "$@"; }; }

rm -rf "$place"
mkdir -p "$place/new" "$place/apt/sources" "$place/apt/lists/partial" "$place/apt/cache/archives/partial"
# shellcheck disable=SC1091
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
scripts/copy-source.sh "$release" bookworm "$place/apt/sources/bookworm"
: > "$place/apt/status"
# With an empty list of what is installed, apt names everything down to the C library.
ours="-o Dir::State::Status=$place/apt/status -o Dir::Etc::SourceList=/dev/null
    -o Dir::Etc::SourceParts=$place/apt/sources -o Dir::State::Lists=$place/apt/lists -o Dir::Cache=$place/apt/cache
    -o APT::Sandbox::User=$(id -un) -o APT::Install-Recommends=false -o Debug::NoLocking=true"

say "unpacking libvirt 9.0 and its QEMU"
# shellcheck disable=SC2086
retry apt-get -qq $ours update
# What only an installed system needs is left out by what follows the names.
# shellcheck disable=SC2086
retry apt-get -qq -y $ours --download-only install libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients \
    qemu-system-x86 qemu-utils coreutils dash gzip xz-utils bzip2 libc-bin base-passwd iproute2 dmidecode

# Every directory of programs and libraries is the one under /usr, as on a system that was installed.
for name in bin sbin lib lib64; do
    mkdir -p "$place/new/usr/$name"
    ln -s "usr/$name" "$place/new/$name"
done
for package in "$place"/apt/cache/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar --extract --keep-directory-symlink --directory "$place/new"
done
mkdir -p "$place/new/proc" "$place/new/sys" "$place/new/dev" "$place/new/tmp" "$place/new/run" "$place/new/etc"
cp "$place/new/usr/share/base-passwd/passwd.master" "$place/new/etc/passwd"
cp "$place/new/usr/share/base-passwd/group.master" "$place/new/etc/group"
# libvirt looks for its user even where it is told to use another one.
echo 'libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin' >> "$place/new/etc/passwd"
echo 'libvirt-qemu:x:64055:' >> "$place/new/etc/group"
chroot "$place/new" /sbin/ldconfig
rm -r "$place/apt"
mv "$place/new" "$place/root"

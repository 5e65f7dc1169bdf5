#!/bin/sh
# Makes a fresh Debian 12 or 13 with Rust fit to build, test and demonstrate vmstate: a C toolchain, QEMU 10, libvirt, and
# QEMU 7.2 and the kernel and busybox of the Linux guest, which are unpacked and never installed. Does nothing, and asks the
# network nothing, when all is there. Needs root, or sudo, only when something has to be installed.
set -eu
umask 022
cd "$(dirname "$0")/.."
assets=${VMSTATE_ASSETS:-target/guest-assets}

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }
has() { command -v "$1" > /dev/null 2>&1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
# Only what crosses the network is tried again.
retry() { "$@" || { sleep 2; "$@"; } || { sleep 5; "$@"; } || die "failed three times: $*"; }
update() { [ -n "${updated:-}" ] || { updated=1; say "reading the package lists"; retry as_root apt-get -qq update; }; }
install() {
    update
    say "installing $*"
    retry as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "$@" > /dev/null
}
qemu_major() { qemu-system-x86_64 --version 2> /dev/null | sed -n '1s/.*version \([0-9]*\).*/\1/p'; }
qemu_is_new() { has qemu-system-x86_64 && has qemu-img && [ "$(qemu_major)" -ge 10 ]; }

# Debian 12 has what is new enough in its backports, which come from where the machine gets its Debian.
install_new() {
    # shellcheck disable=SC1091
    case $(. /etc/os-release && echo "$VERSION_CODENAME") in
        bookworm)
            update
            if ! apt-cache policy | grep -q n=bookworm-backports; then
                as_root scripts/copy-source.sh bookworm bookworm-backports /etc/apt/sources.list.d/vmstate-backports
                updated=
            fi
            install -t bookworm-backports "$@" ;;
        *) install "$@" ;;
    esac
}

install_qemu() {
    install_new qemu-system-x86 qemu-utils
    qemu_is_new || die "qemu-system-x86_64 is $(qemu_major), and 10 is needed; Debian 12 and 13 have it"
}

unpack_guest() {
    update
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n '/Depends: linux-image/{s/.*: //p;q}')
    say "unpacking $kernel and busybox-static"
    rm -rf "$assets/new" && mkdir -p "$assets/new/root"
    (cd "$assets/new" && retry apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$kernel" busybox-static)
    for package in "$assets"/new/*.deb; do dpkg -x "$package" "$assets/new/root"; done
    mkdir -p "$assets/new/linux/modules"
    cp "$assets"/new/root/boot/vmlinuz-* "$assets/new/linux/vmlinuz"
    # Debian 12 has it in /bin, Debian 13 in /usr/bin; either packs modules as it likes, the guest loads plain ones.
    find "$assets/new/root" -name busybox -type f -perm -u+x -exec cp {} "$assets/busybox" \;
    find "$assets/new/root" -name '*.ko*' -exec mv -t "$assets/new/linux/modules" {} +
    find "$assets/new/linux/modules" -name '*.xz' -exec "$assets/busybox" unxz {} +
    rm -rf "$assets/linux" && mv "$assets/new/linux" "$assets/linux" && rm -rf "$assets/new"
}

[ "$(uname -m)" = x86_64 ] || die "the guests are x86-64, and so must this machine be"
has cargo || die "cargo is missing; install Rust first"
# Only who counts instructions needs it.
[ "${1:-}" != valgrind ] || has valgrind || install valgrind
# What libvirt compresses images with: tests compare ours with them.
for tool in bzip2 xz lzop zstd; do has "$tool" || missing="${missing:-} $tool"; done
# shellcheck disable=SC2086
[ -z "${missing:-}" ] || install $(echo $missing | sed 's/\bxz\b/xz-utils/')
if ! has gcc || ! has as || ! has ld; then install gcc binutils libc6-dev; fi
qemu_is_new || install_qemu
# Tests start a libvirtd of their own; the system's, if it has one, is left alone.
if ! PATH=$PATH:/usr/sbin has libvirtd || ! has virsh; then
    install_new libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients
fi
[ -e "$assets/linux/vmlinuz" ] || unpack_guest
# It is what images of old guests are made by and go back to.
scripts/setup-qemu72.sh

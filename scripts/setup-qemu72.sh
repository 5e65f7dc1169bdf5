#!/bin/sh
# Unpacks QEMU 7.2, Debian 12's own, next to the installed one: golden files and tests ask it for a second
# opinion. Nothing is installed and no list of the system's apt is touched. It is started by the script
# qemu72/qemu-system-x86_64 in the directory of assets, whose path may be given as VMSTATE_QEMU.
set -eu
umask 022
cd "$(dirname "$0")/.."
mkdir -p "${VMSTATE_ASSETS:-target/guest-assets}"
assets=$(cd "${VMSTATE_ASSETS:-target/guest-assets}" && pwd)
qemu="$assets/qemu72"
starter="$qemu/qemu-system-x86_64"
[ ! -e "$starter" ] || exit 0

say() { echo "setup: $*" >&2; }
retry() { "$@" || { sleep 2; "$@"; } || { sleep 5; "$@"; }; }

rm -rf "$qemu" "$assets/apt"
mkdir -p "$qemu/root" "$qemu/lib" "$assets/apt/sources" "$assets/apt/lists/partial" "$assets/apt/cache/archives/partial"
# shellcheck disable=SC1091
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
scripts/copy-source.sh "$release" bookworm "$assets/apt/sources/bookworm"
: > "$assets/apt/status"
# With an empty list of what is installed, so that nothing newer stands in the way of what is asked for.
ours="-o Dir::State::Status=$assets/apt/status -o Dir::Etc::SourceList=/dev/null
    -o Dir::Etc::SourceParts=$assets/apt/sources -o Dir::State::Lists=$assets/apt/lists -o Dir::Cache=$assets/apt/cache -o APT::Sandbox::User=$(id -un)"

# unpack DIRECTORY PACKAGE...
unpack() {
    into=$1
    shift
    mkdir -p "$assets/apt/debs" "$into"
    # shellcheck disable=SC2086
    (cd "$assets/apt/debs" && retry apt-get -qq $ours download "$@")
    for package in "$assets"/apt/debs/*.deb; do dpkg -x "$package" "$into"; done
    rm -r "$assets/apt/debs"
}
# The libraries that the machine does not have.
missing() {
    for binary in "$qemu/root/usr/bin/qemu-system-x86_64" "$qemu"/lib/*; do
        [ ! -e "$binary" ] || LD_LIBRARY_PATH="$qemu/lib" ldd "$binary" | sed -n 's/^[[:space:]]*\(.*\) => not found/\1/p'
    done | sort -u
}

say "unpacking QEMU 7.2"
# shellcheck disable=SC2086
retry apt-get -qq $ours update
unpack "$qemu/root" qemu-system-x86 qemu-system-common qemu-system-data seabios ipxe-qemu
if [ -n "$(missing)" ]; then
    say "unpacking its libraries"
    # shellcheck disable=SC2046,SC2086
    unpack "$assets/apt/libraries" $(apt-cache $ours depends --recurse --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances qemu-system-x86 | grep -E '^lib' | grep -vE '^(libc6|libgcc-s1|libcrypt1)$' | sort -u)
    # A library may need another: a few turns bring all there is to bring.
    for _ in 1 2 3 4 5; do
        for name in $(missing); do
            find "$assets/apt/libraries" -name "$name" -exec cp -L {} "$qemu/lib/$name" \;
        done
    done
fi
[ -z "$(missing)" ] || { say "QEMU 7.2 lacks $(missing)"; exit 1; }
rm -r "$assets/apt"

cat > "$starter.new" << END
#!/bin/sh
LD_LIBRARY_PATH='$qemu/lib' exec '$qemu/root/usr/bin/qemu-system-x86_64' \\
    -L '$qemu/root/usr/share/qemu' -L '$qemu/root/usr/share/seabios' -L '$qemu/root/usr/lib/ipxe/qemu' "\$@"
END
chmod +x "$starter.new"
mv "$starter.new" "$starter"

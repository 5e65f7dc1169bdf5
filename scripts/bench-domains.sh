#!/bin/sh
# bench-domains.sh [MIB [ROUNDS [text|markdown|json [GUEST]]]]: virsh save and restore beside ours, with domains of the
# built-in guest in a libvirtd of its own: idle-private, dirty-private, idle-memfd and dirty-memfd, or one of them. It
# needs root and libvirt (`make setup`). Images lie in TMPDIR.
set -eu
cd "$(dirname "$0")/.."
cargo build --quiet --release --package vmstate-rig --bins
exec "${CARGO_TARGET_DIR:-target}/release/domain-bench" "$@"

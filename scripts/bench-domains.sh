#!/bin/sh
# bench-domains.sh [MIB [ROUNDS [text|markdown|json]]]: virsh save and restore beside ours, with domains of the built-in
# guest in a libvirtd of its own. It needs root and libvirt (`make setup`). Images lie in TMPDIR.
set -eu
cd "$(dirname "$0")/.."
cargo build --quiet --release --package vmstate-rig --bins
exec "${CARGO_TARGET_DIR:-target}/release/domain-bench" "$@"

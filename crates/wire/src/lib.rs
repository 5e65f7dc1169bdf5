//! What the bytes of QEMU's and libvirt's saved guests mean; no I/O.

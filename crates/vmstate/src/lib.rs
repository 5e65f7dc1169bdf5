//! Saves, restores and inspects the state of virtual machines in QEMU's formats.

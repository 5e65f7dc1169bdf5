//! The binary `vmstate`.

fn main() {}

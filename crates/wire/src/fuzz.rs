//! The bodies of the fuzz targets: each takes any bytes and must not panic.

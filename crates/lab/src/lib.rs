//! The built-in guest and a driver that starts real QEMUs; the demo and the benchmark stand on it.

//! Conformance suites and tests that need real QEMUs; private.

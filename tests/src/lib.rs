//! End-to-end tests of the real binaries: this library holds what the tests under `tests/` share.
//! It knows the daemon and the command only as programs to run, never as code.

pub mod bench;
pub mod kills;
pub mod lab;
pub mod mixed;
pub mod openapi;
#[cfg(test)]
mod security;
pub mod sim;
pub mod svg;

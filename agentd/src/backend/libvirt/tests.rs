//! Tests on libvirt's own test driver.

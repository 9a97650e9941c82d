//! Memory that is free and not given back. glibc keeps what was freed for later; after a start, or a listing of a thousand
//! instances, that is some megabytes which may never be needed again.

/// Gives the host back what is free.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number only, and locks malloc's arenas by itself.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

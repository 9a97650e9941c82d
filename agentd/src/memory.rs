//! Memory that is free and not given back. glibc keeps what was freed for later; after a start, or a listing of a thousand
//! instances, that is some megabytes which may never be needed again.

/// Keeps all that is allocated in one arena. Of several, one for each thread that ever allocated, each keeps what is free
/// between what is not. To be called before there is a second thread.
pub fn in_one_place() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes numbers only; what it refuses it leaves as it is.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1);
    }
}

/// Gives the host back what is free.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number only, and locks malloc's arenas by itself.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

//! The allocator's free memory.

/// Gives memory that was freed back to the system, so that what the process holds is what it needs: reading a job's rows takes many
/// times what is kept of them.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointers, and the allocator's locks are its own.
    unsafe {
        libc::malloc_trim(0);
    }
}

//! What std, smol and quinn-udp have no safe call for: the only file with `unsafe`.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

/// Sets a socket's packet mark (`SO_MARK`).
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub fn set_mark(fd: &impl AsFd, mark: u32) -> io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the descriptor is open for the whole call, and the pointer and length are those of a live u32.
    let done = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_MARK,
            (&raw const mark).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

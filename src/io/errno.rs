//! Names of error numbers: what one types into a search engine.

/// `EIO`, `EINVAL`, …; `errno N` has no name here.
pub fn name(errno: i32) -> Option<&'static str> {
    Some(match errno {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EINTR => "EINTR",
        libc::EIO => "EIO",
        libc::ENXIO => "ENXIO",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EEXIST => "EEXIST",
        libc::ENODEV => "ENODEV",
        libc::ENOTDIR => "ENOTDIR",
        libc::EISDIR => "EISDIR",
        libc::EINVAL => "EINVAL",
        libc::ENFILE => "ENFILE",
        libc::EMFILE => "EMFILE",
        libc::EFBIG => "EFBIG",
        libc::ENOSPC => "ENOSPC",
        libc::ESPIPE => "ESPIPE",
        libc::EROFS => "EROFS",
        libc::ELOOP => "ELOOP",
        libc::ENOSYS => "ENOSYS",
        libc::EOVERFLOW => "EOVERFLOW",
        libc::EBADMSG => "EBADMSG",
        libc::EUCLEAN => "EUCLEAN",
        libc::EREMOTEIO => "EREMOTEIO",
        libc::ENOMEDIUM => "ENOMEDIUM",
        libc::ENODATA => "ENODATA",
        libc::ETIME => "ETIME",
        libc::ETIMEDOUT => "ETIMEDOUT",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::ECANCELED => "ECANCELED",
        libc::ESTALE => "ESTALE",
        libc::EDQUOT => "EDQUOT",
        _ => return None,
    })
}

/// `EIO: Input/output error (os error 5)`.
pub fn describe(errno: i32) -> String {
    describe_error(&std::io::Error::from_raw_os_error(errno))
}

/// The same for an error that may have no number.
pub fn describe_error(error: &std::io::Error) -> String {
    match error.raw_os_error().and_then(name) {
        Some(name) => format!("{name}: {error}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn errors_carry_their_name() {
        assert_eq!(
            super::describe(libc::EIO),
            "EIO: Input/output error (os error 5)"
        );
        assert!(super::describe(9999).contains("9999"));
        let plain = std::io::Error::other("odd");
        assert_eq!(super::describe_error(&plain), "odd");
    }
}

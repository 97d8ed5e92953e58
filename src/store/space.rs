//! Room on the disk, asked before the first byte is written.

use std::path::Path;

use crate::error::{Code, Error, Result};
use crate::units::human_bytes;

/// Bytes that this process may still write below `path`.
pub fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).map_err(|e| {
        Error::io(
            format!("cannot ask for free space at {}", path.display()),
            &e.into(),
        )
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Refuses when `needed` bytes do not fit. `reclaimable`: bytes that are removed first, at the same place.
pub(crate) fn require(path: &Path, needed: u64, reclaimable: u64) -> Result<()> {
    let free = free_bytes(path)?.saturating_add(reclaimable);
    if needed <= free {
        return Ok(());
    }
    Err(Error::new(
        Code::Space,
        format!("not enough disk space at {}", path.display()),
        format!(
            "packing needs {} ({needed} bytes), {} ({free} bytes) are free",
            human_bytes(needed),
            human_bytes(free)
        ),
        "free some space (`tensorpager clean --stale`), choose another --offload-folder, or stream from the checkpoint \
         with --in-place",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_refused_with_both_figures() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_bytes(dir.path()).unwrap() > 0);
        require(dir.path(), 1, 0).unwrap();
        require(dir.path(), u64::MAX, u64::MAX).unwrap();
        let error = require(dir.path(), u64::MAX, 0).unwrap_err();
        assert_eq!(error.code(), Code::Space);
        assert!(error.cause().contains("18446744073709551615 bytes"));
        assert!(free_bytes(&dir.path().join("missing")).is_err());
    }
}

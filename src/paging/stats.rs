//! What the pager counted. The reading side writes, the computing side reads; neither waits for the other.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Written by the reading thread.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub disk_bytes: AtomicU64,
    /// Bytes whose checksum was compared (or recorded) before anyone could use them.
    pub verified_bytes: AtomicU64,
    pub busy_ns: AtomicU64,
    pub verify_ns: AtomicU64,
    /// Blocks that did not match and were read once more.
    pub rereads: AtomicU64,
    /// Bytes copied to the GPU, and the time its copy engine took for them.
    pub h2d_bytes: AtomicU64,
    pub h2d_ns: AtomicU64,
    /// By unit: how long copying took from the moment its last byte was there, nanoseconds.
    pub copy_tail_ns: Vec<AtomicU64>,
}

/// A snapshot; the difference of two is what happened between them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PagingStats {
    pub passes: u64,
    /// Units handed to the forward pass.
    pub units: u64,
    /// Bytes of the units from disk handed to the forward pass, and of embedding blocks gathered for it.
    pub used_bytes: u64,
    /// The part of `used_bytes` that was embedding blocks.
    pub gathered_bytes: u64,
    /// Bytes that the forward pass needed copied to the GPU: units that went through its slots, from disk or host memory, and keys and
    /// values that lie in host memory.
    pub copied_bytes: u64,
    /// The part of `copied_bytes` that was keys and values.
    pub kv_bytes: u64,
    /// Keys and values copied back to host memory.
    pub d2h_bytes: u64,
    /// Bytes read from disk, those read ahead included.
    pub disk_bytes: u64,
    pub verified_bytes: u64,
    /// Time with at least one read outstanding.
    pub disk_busy: Duration,
    pub verify: Duration,
    /// Time the computing side waited for a unit or for embedding rows.
    pub stall_disk: Duration,
    /// Time the GPU waited for a unit whose bytes were in host memory already, or for keys and values.
    pub stall_copy: Duration,
    /// Time the GPU computed; nothing where the CPU does.
    pub gpu_compute: Duration,
    pub h2d_bytes: u64,
    /// Time that copies of weights to the GPU took.
    pub h2d: Duration,
    /// Time that copies of keys and values to the GPU took, beside those of weights on the same bus.
    pub kv_h2d: Duration,
    pub rereads: u64,
}

impl PagingStats {
    pub(super) fn add_counters(mut self, c: &Counters) -> PagingStats {
        self.disk_bytes = c.disk_bytes.load(Relaxed);
        self.verified_bytes = c.verified_bytes.load(Relaxed);
        self.disk_busy = Duration::from_nanos(c.busy_ns.load(Relaxed));
        self.verify = Duration::from_nanos(c.verify_ns.load(Relaxed));
        self.rereads = c.rereads.load(Relaxed);
        // Keys and values are copied by the computing side, which counted them already.
        self.h2d_bytes += c.h2d_bytes.load(Relaxed);
        self.h2d = Duration::from_nanos(c.h2d_ns.load(Relaxed));
        self
    }

    /// Both together.
    pub fn plus(&self, other: &PagingStats) -> PagingStats {
        PagingStats {
            passes: self.passes + other.passes,
            units: self.units + other.units,
            used_bytes: self.used_bytes + other.used_bytes,
            gathered_bytes: self.gathered_bytes + other.gathered_bytes,
            copied_bytes: self.copied_bytes + other.copied_bytes,
            kv_bytes: self.kv_bytes + other.kv_bytes,
            d2h_bytes: self.d2h_bytes + other.d2h_bytes,
            disk_bytes: self.disk_bytes + other.disk_bytes,
            verified_bytes: self.verified_bytes + other.verified_bytes,
            disk_busy: self.disk_busy + other.disk_busy,
            verify: self.verify + other.verify,
            stall_disk: self.stall_disk + other.stall_disk,
            stall_copy: self.stall_copy + other.stall_copy,
            gpu_compute: self.gpu_compute + other.gpu_compute,
            h2d_bytes: self.h2d_bytes + other.h2d_bytes,
            h2d: self.h2d + other.h2d,
            kv_h2d: self.kv_h2d + other.kv_h2d,
            rereads: self.rereads + other.rereads,
        }
    }

    /// What happened since `earlier`.
    pub fn since(&self, earlier: &PagingStats) -> PagingStats {
        PagingStats {
            passes: self.passes - earlier.passes,
            units: self.units - earlier.units,
            used_bytes: self.used_bytes - earlier.used_bytes,
            gathered_bytes: self.gathered_bytes - earlier.gathered_bytes,
            copied_bytes: self.copied_bytes - earlier.copied_bytes,
            kv_bytes: self.kv_bytes - earlier.kv_bytes,
            d2h_bytes: self.d2h_bytes - earlier.d2h_bytes,
            disk_bytes: self.disk_bytes - earlier.disk_bytes,
            verified_bytes: self.verified_bytes - earlier.verified_bytes,
            disk_busy: self.disk_busy - earlier.disk_busy,
            verify: self.verify - earlier.verify,
            stall_disk: self.stall_disk - earlier.stall_disk,
            stall_copy: self.stall_copy - earlier.stall_copy,
            gpu_compute: self.gpu_compute - earlier.gpu_compute,
            h2d_bytes: self.h2d_bytes - earlier.h2d_bytes,
            h2d: self.h2d - earlier.h2d,
            kv_h2d: self.kv_h2d - earlier.kv_h2d,
            rereads: self.rereads - earlier.rereads,
        }
    }
}

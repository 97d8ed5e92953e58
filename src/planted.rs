//! Bugs planted on purpose: what the suites must catch, each of them alone.
//!
//! A build with the feature `testing` has the bug whose number stands in the environment variable `PLANTED_BUG`; every other build has
//! none, and [`is`] is then a constant. `tests/planted.sh` switches on one after the other and says which test caught it.

/// By number. The comment says what goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Weight files of a pack are not synced.
    WeightsNotSynced = 1,
    /// The manifest is written before the weights are synced.
    ManifestEarly = 2,
    /// Names made in a folder are not synced.
    FolderNotSynced = 3,
    /// A unit's last block is not read.
    ExtentTooShort = 4,
    /// Tensors are looked for one element behind their place in the slot.
    ExtentOffByOne = 5,
    /// A slot is free again as soon as it is handed out.
    SlotFreedEarly = 6,
    /// A unit is handed out while its last read is still under way.
    UnitHandedOutEarly = 7,
    /// EIO counts as a finished read.
    EioSwallowed = 8,
    /// A short read counts as a whole one.
    ShortReadIgnored = 9,
    /// Blocks of a read are all compared with the first one's checksum seed.
    ChecksumOfWrongBlock = 10,
    /// A block that does not match twice is taken.
    MismatchTaken = 11,
    /// Embedding rows are not verified.
    GatherNotVerified = 12,
    /// The last row of a results file is trusted though its line has no end.
    TornRowTrusted = 13,
    /// Results are not synced before they count.
    ResultsNotSynced = 14,
    /// A row that could not be written stays half written.
    FailedRowKept = 15,
    /// A KV block that two sequences hold is written without a copy.
    KvSharedWithoutCopy = 16,
    /// A chunk that continues a sequence is rotated for one position too far.
    RopeOffByOne = 17,
    /// A draw depends on how many draws there were before it.
    SamplerRemembers = 18,
    /// Units that rest in RAM are read from disk all the same.
    ResidentsIgnored = 19,
    /// Nothing is read ahead across the end of a pass.
    NoPrefetchAcrossPasses = 20,
    /// A link may lead out of the model's folder.
    LinkFollowed = 21,
    /// A source that changed while it was packed is not noticed.
    SourceChangeMissed = 22,
    /// A second packer does not wait for the first.
    LockIgnored = 23,
    /// A file that ends too early is filled up with whatever is in the frame.
    EndOfFileIgnored = 24,
    /// Tensors may overlap in a header.
    OverlapAccepted = 25,
    /// A read that has landed is counted for the oldest unit under way.
    FillsMixedUp = 26,
    /// A write of a pack that fails is taken for one that went well.
    PackWriteIgnored = 27,
    /// A write of results that fails is taken for one that went well.
    ResultWriteIgnored = 28,
}

/// Is this bug switched on?
#[cfg(not(feature = "testing"))]
#[inline(always)]
pub const fn is(_: Bug) -> bool {
    false
}

/// Is this bug switched on?
#[cfg(feature = "testing")]
pub fn is(bug: Bug) -> bool {
    static ON: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    let chosen = || std::env::var("PLANTED_BUG").map_or(0, |n| n.parse().unwrap_or(0));
    *ON.get_or_init(chosen) == bug as u32
}

//! One xxh3-64 per 64 KiB block of each file: what makes "every byte is verified before it is used" cheap.
//!
//! The seed of a block depends on the source, the file and the block's number, so that a block read from the wrong
//! place, file or model fails as surely as a flipped bit. xxh3 is no cryptographic hash: it finds rot, torn writes and
//! mixed-up files, not a forger.

use std::sync::atomic::{AtomicU64, Ordering};

use twox_hash::XxHash3_64;

use crate::error::{Code, Error, Result};
use crate::planted::{self, Bug};
use crate::units::{BLOCK_BYTES, FileId};

/// Checksums of all files of a store. Shared by reference; checking takes no lock and allocates nothing.
///
/// A packed store knows every hash. A source without checksums starts with none, takes each block's hash on first
/// sight and compares from then on (`verify: "self"`).
#[derive(Debug)]
pub struct Checksums {
    files: Vec<FileSums>,
    recorded: bool,
}

#[derive(Debug)]
struct FileSums {
    bytes: u64,
    seed: u64,
    /// 0: not seen yet. A hash of 0 is kept as 1.
    blocks: Vec<AtomicU64>,
}

impl Checksums {
    /// Nothing known yet: each block is recorded when it is first checked. `file_bytes`: length of each file.
    pub fn unseen(source: u64, file_bytes: &[u64]) -> Result<Checksums> {
        let files = file_bytes
            .iter()
            .enumerate()
            .map(|(file, &bytes)| {
                let count = bytes.div_ceil(BLOCK_BYTES) as usize;
                let mut blocks = Vec::new();
                blocks.try_reserve_exact(count).map_err(|_| {
                    Error::new(
                        Code::Memory,
                        format!("no memory for the checksums of file {file} ({bytes} bytes)"),
                        "8 bytes are kept for each 64 KiB block of each file",
                        "check that the file really has that length (a sparse file?)",
                    )
                })?;
                blocks.resize_with(count, || AtomicU64::new(0));
                let seed = file_seed(source, file as u32);
                Ok(FileSums {
                    bytes,
                    seed,
                    blocks,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Checksums {
            files,
            recorded: true,
        })
    }

    /// The contents of `checksums.bin`: little-endian hashes of each file's blocks, files in order. None when
    /// its length does not fit the files or a hash is missing (zero).
    pub(crate) fn from_bytes(
        source: u64,
        file_bytes: &[u64],
        raw: &[u8],
    ) -> Result<Option<Checksums>> {
        let mut sums = Checksums::unseen(source, file_bytes)?;
        let count: usize = sums.files.iter().map(|f| f.blocks.len()).sum();
        if count.checked_mul(8) != Some(raw.len()) {
            return Ok(None);
        }
        let (hashes, _) = raw.as_chunks::<8>();
        let slots = sums.files.iter_mut().flat_map(|f| f.blocks.iter_mut());
        for (slot, hash) in slots.zip(hashes) {
            let hash = u64::from_le_bytes(*hash);
            if hash == 0 {
                return Ok(None);
            }
            *slot.get_mut() = hash;
        }
        sums.recorded = false;
        Ok(Some(sums))
    }

    /// What `checksums.bin` holds. None while a block has not been seen.
    pub(crate) fn to_bytes(&self) -> Option<Vec<u8>> {
        let count: usize = self.files.iter().map(|f| f.blocks.len()).sum();
        let mut raw = Vec::with_capacity(count * 8);
        for block in self.files.iter().flat_map(|f| &f.blocks) {
            match block.load(Ordering::Relaxed) {
                0 => return None,
                hash => raw.extend_from_slice(&hash.to_le_bytes()),
            }
        }
        Some(raw)
    }

    /// True for sources without checksums of their own: blocks are compared with what was first read in this run.
    pub fn recorded(&self) -> bool {
        self.recorded
    }

    /// Whether they are seeded by this source.
    pub(crate) fn made_of(&self, source: u64) -> bool {
        self.files
            .first()
            .is_none_or(|f| f.seed == file_seed(source, 0))
    }

    /// Length of a file, as the checksums know it.
    pub fn file_bytes(&self, file: FileId) -> u64 {
        self.files[file.index()].bytes
    }

    /// Number of blocks of a file; the last one is shorter where the length is no multiple of 64 KiB.
    pub fn blocks(&self, file: FileId) -> u64 {
        self.files[file.index()].blocks.len() as u64
    }

    /// Compares `bytes`, which start at block `first_block` of `file`, with what is known; records what is not.
    ///
    /// `bytes` are whole blocks, but for the last block of the file, which is hashed over the bytes that exist:
    /// whatever follows the end of the file in `bytes` is ignored. Err: the first block that differs, or that is
    /// not there in full (a caller that verifies half a block gets an error, never a pass).
    pub fn check(&self, file: FileId, first_block: u64, bytes: &[u8]) -> Result<(), u64> {
        let sums = &self.files[file.index()];
        let mut at = first_block.saturating_mul(BLOCK_BYTES);
        let mut rest = bytes;
        let mut block = first_block;
        while !rest.is_empty() && at < sums.bytes {
            let want = BLOCK_BYTES.min(sums.bytes - at) as usize;
            if rest.len() < want {
                return Err(block);
            }
            let seed_of = match planted::is(Bug::ChecksumOfWrongBlock) {
                true => first_block,
                false => block,
            };
            let hash = block_hash(sums.seed, seed_of, &rest[..want]);
            let slot = &sums.blocks[block as usize];
            // Relaxed: a slot is one word that goes from 0 to its value once; nothing else hangs on it.
            let known = slot.load(Ordering::Relaxed);
            if known != hash {
                let lost = known != 0
                    || !self.recorded
                    || slot
                        .compare_exchange(0, hash, Ordering::Relaxed, Ordering::Relaxed)
                        .is_err_and(|other| other != hash);
                if lost {
                    return Err(block);
                }
            }
            rest = &rest[want..];
            at += want as u64;
            block += 1;
        }
        Ok(())
    }
}

/// Seeds of two files of two sources never coincide by construction of small numbers.
fn file_seed(source: u64, file: u32) -> u64 {
    mix(source ^ mix(u64::from(file) + 1))
}

fn block_hash(file_seed: u64, block: u64, bytes: &[u8]) -> u64 {
    let seed = mix(file_seed.wrapping_add(block));
    XxHash3_64::oneshot_with_seed(seed, bytes).max(1)
}

/// Steele, Lea and Flood 2014: the finaliser of SplitMix64, a bijection of 64 bits.
fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// xxh3-64 of a small file held whole: manifest, checksums.bin, copies of configs.
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: usize = BLOCK_BYTES as usize;

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    #[test]
    fn recorded_on_first_sight_then_compared() {
        let data = pattern(2 * B + 100);
        let sums = Checksums::unseen(7, &[data.len() as u64]).unwrap();
        assert!(sums.recorded());
        assert_eq!(sums.blocks(FileId(0)), 3);
        assert_eq!(sums.check(FileId(0), 0, &data), Ok(()));
        assert_eq!(sums.check(FileId(0), 1, &data[B..]), Ok(()));
        for (at, block) in [(0, 0), (B - 1, 0), (B, 1), (2 * B + 99, 2)] {
            let mut bad = data.clone();
            bad[at] ^= 0x10;
            assert_eq!(sums.check(FileId(0), 0, &bad), Err(block), "byte {at}");
        }
    }

    #[test]
    fn the_last_block_is_hashed_over_the_bytes_that_exist() {
        let mut data = pattern(B + 10);
        let sums = Checksums::unseen(7, &[data.len() as u64]).unwrap();
        assert_eq!(sums.check(FileId(0), 0, &data), Ok(()));
        // A frame is longer than the file: what lies behind the end does not matter.
        data.extend_from_slice(&[9; 5000]);
        assert_eq!(sums.check(FileId(0), 0, &data), Ok(()));
        // A block that is not there in full never passes.
        assert_eq!(sums.check(FileId(0), 1, &data[B..B + 9]), Err(1));
        assert_eq!(sums.check(FileId(0), 0, &data[..100]), Err(0));
        // Nothing to check behind the end.
        assert_eq!(sums.check(FileId(0), 2, &data), Ok(()));
        assert_eq!(sums.check(FileId(0), u64::MAX, &data), Ok(()));
    }

    #[test]
    fn a_block_at_the_wrong_place_fails() {
        let data = pattern(B);
        let sums = Checksums::unseen(7, &[2 * B as u64, B as u64]).unwrap();
        for (file, block) in [(0, 0), (0, 1), (1, 0)] {
            assert_eq!(sums.check(FileId(file), block, &data), Ok(()));
        }
        let raw = sums.to_bytes().unwrap();
        let (hashes, _) = raw.as_chunks::<8>();
        assert_ne!(hashes[0], hashes[1]);
        assert_ne!(hashes[0], hashes[2]);
        let other = Checksums::unseen(8, &[B as u64]).unwrap();
        other.check(FileId(0), 0, &data).unwrap();
        assert_ne!(hashes[0], other.to_bytes().unwrap()[..8]);
    }

    #[test]
    fn stored_checksums_never_learn() {
        let data = pattern(B + 1);
        let lengths = [data.len() as u64];
        let sums = Checksums::unseen(3, &lengths).unwrap();
        assert!(sums.to_bytes().is_none(), "unseen blocks cannot be stored");
        sums.check(FileId(0), 0, &data).unwrap();
        let raw = sums.to_bytes().unwrap();
        let stored = Checksums::from_bytes(3, &lengths, &raw).unwrap().unwrap();
        assert!(!stored.recorded());
        assert_eq!(stored.check(FileId(0), 0, &data), Ok(()));
        assert_eq!(stored.check(FileId(0), 0, &vec![0; B + 1]), Err(0));
        let wrong_source = Checksums::from_bytes(4, &lengths, &raw).unwrap().unwrap();
        assert_eq!(wrong_source.check(FileId(0), 0, &data), Err(0));
        assert!(
            Checksums::from_bytes(3, &lengths, &raw[..8])
                .unwrap()
                .is_none()
        );
        assert!(
            Checksums::from_bytes(3, &lengths, &[0; 16])
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn two_threads_that_see_different_bytes_first_cannot_both_pass() {
        for round in 0..200u8 {
            let sums = Checksums::unseen(1, &[B as u64]).unwrap();
            let (a, b) = (vec![round; B], vec![round ^ 1; B]);
            let passed = std::thread::scope(|s| {
                let x = s.spawn(|| sums.check(FileId(0), 0, &a).is_ok());
                let y = s.spawn(|| sums.check(FileId(0), 0, &b).is_ok());
                u8::from(x.join().unwrap()) + u8::from(y.join().unwrap())
            });
            assert_eq!(passed, 1);
        }
    }

    #[test]
    fn a_file_of_absurd_length_is_an_error() {
        let error = Checksums::unseen(1, &[u64::MAX]).unwrap_err();
        assert_eq!(error.code(), Code::Memory);
    }
}

//! Bookkeeping of the paged KV cache: which blocks a sequence owns, shared and counted. Pure: the bytes lie on the device.
//!
//! A full block may be published under a key that stands for everything it depends on (its tokens and all before them). Another
//! sequence that begins with the same tokens then shares it instead of computing it again, even after its first owner
//! is gone, until the room is needed.

use std::collections::{HashMap, VecDeque};

use crate::planted::{self, Bug};

/// Tokens a KV block holds, across all layers.
pub const BLOCK_TOKENS: usize = 16;

/// The block table of one sequence. Blocks may be shared with other tables ([`KvPool::fork`]); a shared block is
/// never written: [`KvPool::extend`] answers with the copies to make first.
#[derive(Debug, Default)]
pub struct KvTable {
    blocks: Vec<u32>,
    len: usize,
}

impl KvTable {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Block of token `i` is `blocks()[i / BLOCK_TOKENS]`.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

/// A block to copy (all layers) before the pass that extends a forked sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    pub from: u32,
    pub to: u32,
}

/// Running out is an answer to the scheduler, not a failure: `missing` blocks were wanted and none was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom {
    pub missing: usize,
}

/// What a published block depends on: a hash of its tokens and of all tokens before them.
pub type BlockKey = u128;

/// All KV blocks there are, allocated at start, reference counted.
#[derive(Debug)]
pub struct KvPool {
    references: Vec<u32>,
    /// Free blocks with nothing worth keeping in them.
    free: Vec<u32>,
    /// Free blocks that are still published, the longest unused first, each with the stamp it was put here under. A block
    /// that was shared again since has another stamp: its entry is skipped.
    idle: VecDeque<(u32, u64)>,
    idle_count: usize,
    stamps: Vec<u64>,
    next_stamp: u64,
    keys: Vec<Option<BlockKey>>,
    published: HashMap<BlockKey, u32>,
}

impl KvPool {
    pub fn new(blocks: usize) -> KvPool {
        KvPool {
            references: vec![0; blocks],
            // Popped from the end: low numbers first, so that small jobs touch little memory.
            free: (0..blocks as u32).rev().collect(),
            idle: VecDeque::new(),
            idle_count: 0,
            stamps: vec![0; blocks],
            next_stamp: 1,
            keys: vec![None; blocks],
            published: HashMap::new(),
        }
    }

    /// Blocks that `tokens` tokens need.
    pub fn blocks_for(tokens: usize) -> usize {
        tokens.div_ceil(BLOCK_TOKENS)
    }

    pub fn blocks(&self) -> usize {
        self.references.len()
    }

    /// Blocks no table holds, those still published included.
    pub fn free_blocks(&self) -> usize {
        self.free.len() + self.idle_count
    }

    /// Tokens `table` could be extended by now, the room in its last block included.
    pub fn room_for(&self, table: &KvTable) -> usize {
        (table.blocks.len() + self.free_blocks()) * BLOCK_TOKENS - table.len
    }

    /// Makes room for `tokens` more tokens at the end of `table`. All or nothing: on [`NoRoom`] the table is as before.
    pub fn extend(
        &mut self,
        table: &mut KvTable,
        tokens: usize,
    ) -> Result<Option<BlockCopy>, NoRoom> {
        if tokens == 0 {
            return Ok(None);
        }
        let partial = !table.len.is_multiple_of(BLOCK_TOKENS);
        let shared_tail = partial
            && self.references[table.blocks[table.blocks.len() - 1] as usize] > 1
            && !planted::is(Bug::KvSharedWithoutCopy);
        let want = Self::blocks_for(table.len + tokens) - table.blocks.len();
        let needed = want + usize::from(shared_tail);
        if needed > self.free_blocks() {
            return Err(NoRoom {
                missing: needed - self.free_blocks(),
            });
        }
        if partial && !shared_tail {
            // Written in place from here on: it no longer holds what it was published for.
            self.withdraw(table.blocks[table.blocks.len() - 1]);
        }
        let copy = shared_tail.then(|| {
            let to = self.take();
            let last = table.blocks.len() - 1;
            let from = std::mem::replace(&mut table.blocks[last], to);
            self.drop_reference(from);
            BlockCopy { from, to }
        });
        for _ in 0..want {
            let block = self.take();
            table.blocks.push(block);
        }
        table.len += tokens;
        Ok(copy)
    }

    /// A second sequence with the same past. No bytes move until one of the two writes.
    pub fn fork(&mut self, table: &KvTable) -> KvTable {
        for &block in &table.blocks {
            self.references[block as usize] += 1;
        }
        KvTable {
            blocks: table.blocks.clone(),
            len: table.len,
        }
    }

    /// A new table that shares the first `blocks` full blocks of `table` (a common prompt prefix).
    pub fn fork_prefix(&mut self, table: &KvTable, blocks: usize) -> KvTable {
        let shared = &table.blocks[..blocks];
        for &block in shared {
            self.references[block as usize] += 1;
        }
        KvTable {
            blocks: shared.to_vec(),
            len: (blocks * BLOCK_TOKENS).min(table.len),
        }
    }

    /// Forgets every token from `len` on (a rejected speculation, a sequence set back).
    pub fn truncate(&mut self, table: &mut KvTable, len: usize) {
        if len >= table.len {
            return;
        }
        let keep = Self::blocks_for(len);
        while table.blocks.len() > keep {
            if let Some(block) = table.blocks.pop() {
                self.drop_reference(block);
            }
        }
        table.len = len;
    }

    /// Gives back everything the table holds.
    pub fn release(&mut self, table: &mut KvTable) {
        self.truncate(table, 0);
    }

    /// Lets sequences that begin with the same tokens find `block`, which must be full, or be full after the pass that is
    /// being put together. The first block published under a key stays.
    pub fn publish(&mut self, block: u32, key: BlockKey) {
        debug_assert!(self.references[block as usize] > 0);
        if self.keys[block as usize].is_none() && !self.published.contains_key(&key) {
            self.keys[block as usize] = Some(key);
            self.published.insert(key, block);
        }
    }

    /// How many of `keys`, from the first on, are published, and how many of those blocks no table holds now: sharing
    /// them takes that many of the free blocks.
    pub fn find(&self, keys: &[BlockKey]) -> (usize, usize) {
        let blocks = keys.iter().map_while(|k| self.published.get(k));
        blocks.fold((0, 0), |(found, idle), b| {
            (
                found + 1,
                idle + usize::from(self.references[*b as usize] == 0),
            )
        })
    }

    /// A new table that begins with the blocks published under `keys`, up to the first that is not.
    pub fn share(&mut self, keys: &[BlockKey]) -> KvTable {
        let mut blocks = Vec::with_capacity(keys.len() + 1);
        for key in keys {
            let Some(&block) = self.published.get(key) else {
                break;
            };
            if self.references[block as usize] == 0 {
                self.idle_count -= 1;
                // Makes its entry in `idle` void.
                self.stamps[block as usize] = 0;
            }
            self.references[block as usize] += 1;
            blocks.push(block);
        }
        KvTable {
            len: blocks.len() * BLOCK_TOKENS,
            blocks,
        }
    }

    /// Nothing that was published is found any more (a pass failed: what it was to write cannot be trusted).
    pub fn withdraw_all(&mut self) {
        for block in 0..self.keys.len() as u32 {
            self.withdraw(block);
        }
    }

    fn withdraw(&mut self, block: u32) {
        let Some(key) = self.keys[block as usize].take() else {
            return;
        };
        self.published.remove(&key);
        if self.references[block as usize] == 0 {
            self.idle_count -= 1;
            self.stamps[block as usize] = 0;
            self.free.push(block);
        }
    }

    fn take(&mut self) -> u32 {
        let block = match self.free.pop() {
            Some(block) => block,
            None => self.take_idle(),
        };
        debug_assert_eq!(self.references[block as usize], 0);
        self.references[block as usize] = 1;
        block
    }

    fn take_idle(&mut self) -> u32 {
        loop {
            let (block, stamp) = self
                .idle
                .pop_front()
                .expect("extend counts the free blocks before it takes any");
            if self.stamps[block as usize] == stamp {
                self.withdraw(block);
                return self.free.pop().expect("withdrawing a free block frees it");
            }
        }
    }

    fn drop_reference(&mut self, block: u32) {
        let count = &mut self.references[block as usize];
        assert!(*count > 0, "KV block {block} given back twice");
        *count -= 1;
        if *count > 0 {
            return;
        }
        if self.keys[block as usize].is_none() {
            self.free.push(block);
            return;
        }
        self.stamps[block as usize] = self.next_stamp;
        self.idle.push_back((block, self.next_stamp));
        self.next_stamp += 1;
        self.idle_count += 1;
        // Void entries leave when they come up; where nothing is ever taken they would pile up.
        if self.idle.len() > 2 * self.references.len() + 16 {
            let stamps = &self.stamps;
            self.idle.retain(|(b, stamp)| stamps[*b as usize] == *stamp);
        }
    }
}

/// Bytes of KV that one block of [`BLOCK_TOKENS`] tokens takes across `layers`.
pub fn block_bytes(layers: usize, kv_heads: usize, head_size: usize, element_bytes: usize) -> u64 {
    (layers * 2 * kv_heads * BLOCK_TOKENS * head_size * element_bytes) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn running_out_is_an_answer_and_changes_nothing() {
        let mut pool = KvPool::new(2);
        let mut t = KvTable::default();
        assert_eq!(pool.extend(&mut t, 33), Err(NoRoom { missing: 1 }));
        assert_eq!((t.len(), pool.free_blocks()), (0, 2));
        assert_eq!(pool.extend(&mut t, 32), Ok(None));
        assert_eq!(pool.extend(&mut t, 1), Err(NoRoom { missing: 1 }));
        pool.release(&mut t);
        assert_eq!(pool.free_blocks(), 2);
    }

    #[test]
    fn a_shared_tail_is_copied_before_it_is_written() {
        let mut pool = KvPool::new(8);
        let mut a = KvTable::default();
        pool.extend(&mut a, 20).unwrap();
        let mut b = pool.fork(&a);
        let copy = pool
            .extend(&mut b, 1)
            .unwrap()
            .expect("the tail is shared and partial");
        assert_eq!(copy.from, a.blocks()[1]);
        assert_eq!(copy.to, b.blocks()[1]);
        assert_eq!(a.blocks()[0], b.blocks()[0]);
        // Now the tails differ, so the first owner writes in place.
        assert_eq!(pool.extend(&mut a, 1), Ok(None));
    }

    #[test]
    fn a_published_prefix_outlives_its_owner_until_the_room_is_needed() {
        let mut pool = KvPool::new(4);
        let mut a = KvTable::default();
        pool.extend(&mut a, 40).unwrap();
        pool.publish(a.blocks()[0], 10);
        pool.publish(a.blocks()[1], 11);
        let first = a.blocks()[0];
        pool.release(&mut a);
        assert_eq!(pool.free_blocks(), 4);
        assert_eq!(pool.find(&[10, 11, 12]), (2, 2));
        let mut b = pool.share(&[10]);
        assert_eq!((b.len(), b.blocks()[0], pool.free_blocks()), (16, first, 3));
        assert_eq!(pool.find(&[10, 11]), (2, 1));
        // Room is needed: the idle block goes, the shared one stays.
        let mut c = KvTable::default();
        pool.extend(&mut c, 48).unwrap();
        assert_eq!(pool.find(&[10, 11]), (1, 0));
        assert!(!c.blocks().contains(&first));
        pool.release(&mut b);
        pool.release(&mut c);
        assert_eq!(pool.free_blocks(), 4);
    }

    #[test]
    fn a_block_written_again_is_no_longer_found() {
        let mut pool = KvPool::new(4);
        let mut a = KvTable::default();
        pool.extend(&mut a, 16).unwrap();
        pool.publish(a.blocks()[0], 7);
        pool.truncate(&mut a, 10);
        pool.extend(&mut a, 3).unwrap();
        assert_eq!(pool.find(&[7]), (0, 0));
    }

    proptest! {
        #[test]
        fn every_block_is_counted(ops in proptest::collection::vec((0u8..7, 0usize..6, 0usize..50), 1..300)) {
            let mut pool = KvPool::new(24);
            let mut tables: Vec<KvTable> = (0..6).map(|_| KvTable::default()).collect();
            for (op, i, n) in ops {
                match op {
                    0 | 1 => { let _ = pool.extend(&mut tables[i], n); }
                    2 => { let len = tables[i].len(); pool.truncate(&mut tables[i], n.min(len)); }
                    3 => { let f = pool.fork(&tables[i]); let j = n % 6; let mut old = std::mem::replace(&mut tables[j], f); pool.release(&mut old); }
                    4 => if tables[i].len() >= BLOCK_TOKENS { let b = tables[i].blocks()[0]; pool.publish(b, n as u128); },
                    5 => { let mut old = std::mem::take(&mut tables[i]); pool.release(&mut old);
                           let (found, idle) = pool.find(&[n as u128]); let free = pool.free_blocks();
                           tables[i] = pool.share(&[n as u128]);
                           prop_assert_eq!(tables[i].blocks().len(), found);
                           prop_assert_eq!(pool.free_blocks(), free - idle); }
                    _ => pool.release(&mut tables[i]),
                }
                let mut counts = [0u32; 24];
                for t in &tables {
                    prop_assert_eq!(t.blocks().len(), KvPool::blocks_for(t.len()));
                    for &b in t.blocks() { counts[b as usize] += 1; }
                }
                prop_assert_eq!(&counts[..], &pool.references[..]);
                prop_assert_eq!(pool.free_blocks(), counts.iter().filter(|c| **c == 0).count());
                for (key, &block) in &pool.published {
                    prop_assert_eq!(pool.keys[block as usize], Some(*key));
                }
                prop_assert_eq!(pool.published.len(), pool.keys.iter().flatten().count());
            }
            for t in &mut tables { pool.release(t); }
            let mut all = KvTable::default();
            prop_assert!(pool.extend(&mut all, 24 * BLOCK_TOKENS).is_ok(), "every free block can be taken");
        }
    }
}

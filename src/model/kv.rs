//! Bookkeeping of the paged KV cache: which blocks a sequence owns, shared and counted. Pure: the bytes lie on the device.

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

/// All KV blocks there are, allocated at start, reference counted.
#[derive(Debug)]
pub struct KvPool {
    references: Vec<u32>,
    free: Vec<u32>,
}

impl KvPool {
    pub fn new(blocks: usize) -> KvPool {
        KvPool {
            references: vec![0; blocks],
            // Popped from the end: low numbers first, so that small jobs touch little memory.
            free: (0..blocks as u32).rev().collect(),
        }
    }

    /// Blocks that `tokens` tokens need.
    pub fn blocks_for(tokens: usize) -> usize {
        tokens.div_ceil(BLOCK_TOKENS)
    }

    pub fn blocks(&self) -> usize {
        self.references.len()
    }

    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Tokens `table` could be extended by now, the room in its last block included.
    pub fn room_for(&self, table: &KvTable) -> usize {
        (table.blocks.len() + self.free.len()) * BLOCK_TOKENS - table.len
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
        let shared_tail =
            partial && self.references[table.blocks[table.blocks.len() - 1] as usize] > 1;
        let want = Self::blocks_for(table.len + tokens) - table.blocks.len();
        let needed = want + usize::from(shared_tail);
        if needed > self.free.len() {
            return Err(NoRoom {
                missing: needed - self.free.len(),
            });
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

    fn take(&mut self) -> u32 {
        let block = self
            .free
            .pop()
            .expect("extend counts the free blocks before it takes any");
        debug_assert_eq!(self.references[block as usize], 0);
        self.references[block as usize] = 1;
        block
    }

    fn drop_reference(&mut self, block: u32) {
        let count = &mut self.references[block as usize];
        assert!(*count > 0, "KV block {block} given back twice");
        *count -= 1;
        if *count == 0 {
            self.free.push(block);
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

    proptest! {
        #[test]
        fn every_block_is_counted(ops in proptest::collection::vec((0u8..4, 0usize..6, 0usize..50), 1..200)) {
            let mut pool = KvPool::new(24);
            let mut tables: Vec<KvTable> = (0..6).map(|_| KvTable::default()).collect();
            for (op, i, n) in ops {
                match op {
                    0 => { let _ = pool.extend(&mut tables[i], n); }
                    1 => { let len = tables[i].len(); pool.truncate(&mut tables[i], n.min(len)); }
                    2 => { let f = pool.fork(&tables[i]); let j = n % 6; let mut old = std::mem::replace(&mut tables[j], f); pool.release(&mut old); }
                    _ => pool.release(&mut tables[i]),
                }
                let mut counts = [0u32; 24];
                for t in &tables {
                    prop_assert_eq!(t.blocks().len(), KvPool::blocks_for(t.len()));
                    for &b in t.blocks() { counts[b as usize] += 1; }
                }
                prop_assert_eq!(&counts[..], &pool.references[..]);
                prop_assert_eq!(pool.free_blocks(), counts.iter().filter(|c| **c == 0).count());
            }
        }
    }
}

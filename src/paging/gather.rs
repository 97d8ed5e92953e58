//! Embedding rows: taken from a unit in host memory, or gathered from disk in whole verified blocks.

use std::time::{Duration, Instant};

use super::pager::{Pager, Resident};
use super::stream::Gather;
use super::sync::RecvTimeoutError;
use super::trace::Happening;
use crate::error::{Error, Result};
use crate::units::BLOCK_BYTES;

impl Pager {
    /// Calls `row(i, bytes)` once for each of `tokens` with that row of the embedding, in any order. Rows of a resident
    /// tied head are taken from there; others are gathered in whole verified blocks.
    pub fn gather(
        &mut self,
        tokens: &[u32],
        row: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let e = self.embed;
        let row_bytes = e.cols * e.dtype.bytes();
        self.order.clear();
        for (i, &token) in tokens.iter().enumerate() {
            if token as usize >= e.rows {
                return Err(Error::internal("a token id outside the embedding"));
            }
            match self.resident_row(token as usize, row_bytes) {
                Some(bytes) => row(i, bytes)?,
                None => self.order.push(i as u32),
            }
        }
        if self.order.is_empty() {
            return Ok(());
        }
        let mut order = std::mem::take(&mut self.order);
        order.sort_unstable_by_key(|i| tokens[*i as usize]);
        let result = self.gather_from_disk(&order, tokens, row_bytes, row);
        self.order = order;
        result
    }

    fn resident_row(&self, token: usize, row_bytes: usize) -> Option<&[u8]> {
        let (unit, index) = match self.residents[self.embed.unit.index()] {
            Some(_) => (self.embed.unit, token),
            None => {
                let i = self
                    .head_rows
                    .partition_point(|(first, _, _)| *first <= token)
                    .checked_sub(1)?;
                let (first, rows, unit) = self.head_rows[i];
                (token < first + rows).then_some((unit, token - first))?
            }
        };
        let weight = self.shared.layouts[unit.index()].weights.first()?;
        let at = weight.offset as usize + index * row_bytes;
        match self.residents[unit.index()].as_ref()? {
            Resident::Host(region) => region.bytes().get(at..at + row_bytes),
            Resident::Device(_) => None,
        }
    }

    fn gather_from_disk(
        &mut self,
        order: &[u32],
        tokens: &[u32],
        row_bytes: usize,
        row: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let e = self.embed;
        let start_of = |token: u32| e.offset + token as u64 * row_bytes as u64;
        let mut next = 0;
        while next < order.len() {
            let mut g = self.room_for_rows()?;
            g.blocks.clear();
            g.region.rewind();
            let room = g.blocks.capacity();
            let first = next;
            while next < order.len() {
                let at = start_of(tokens[order[next] as usize]);
                // Rows come in ascending order, so a block is either the last one taken or new.
                let first_new = g.blocks.last().map_or(0, |last| last + 1);
                let fresh =
                    first_new.max(at / BLOCK_BYTES)..(at + row_bytes as u64).div_ceil(BLOCK_BYTES);
                if g.blocks.len() + fresh.clone().count() > room {
                    break;
                }
                g.blocks.extend(fresh);
                next += 1;
            }
            let bytes = self.gathered_bytes(&g);
            self.stats.used_bytes += bytes;
            self.stats.gathered_bytes += bytes;
            let from = self.now_ns();
            let g = self.fetch(g)?;
            self.note(Happening::Gather, None, from, bytes);
            let given = order[first..next].iter().try_for_each(|&i| {
                let at = start_of(tokens[i as usize]);
                let k = g.blocks.partition_point(|b| *b < at / BLOCK_BYTES);
                let from = k * BLOCK_BYTES as usize + (at % BLOCK_BYTES) as usize;
                row(i as usize, &g.region.bytes()[from..from + row_bytes])
            });
            self.gather = Some(g);
            given?;
        }
        Ok(())
    }

    /// Bytes of the blocks asked for; a file's last one is shorter.
    fn gathered_bytes(&self, g: &Gather) -> u64 {
        let file = self.shared.file_bytes[g.file.index()];
        g.blocks
            .iter()
            .map(|b| BLOCK_BYTES.min(file - b * BLOCK_BYTES))
            .sum()
    }

    /// Where a wait for rows was cut off, their room is still with the reading thread.
    fn room_for_rows(&mut self) -> Result<Gather> {
        match self.gather.take() {
            Some(g) => Ok(g),
            None if self.plan().gather_bytes > 0 => self.await_gathered(),
            None => Err(Error::internal("no room was planned for embedding rows")),
        }
    }

    fn fetch(&mut self, g: Gather) -> Result<Gather> {
        let gone = || Error::internal("the reading thread is gone");
        let tx = self.gather_tx.as_ref().ok_or_else(gone)?;
        if tx.send(g).is_err() {
            return Err(self.reader_error());
        }
        self.await_gathered()
    }

    fn await_gathered(&mut self) -> Result<Gather> {
        let started = Instant::now();
        let answer = loop {
            match self.gathered.recv_timeout(Duration::from_millis(100)) {
                Ok(g) => break Ok(g),
                Err(RecvTimeoutError::Disconnected) => break Err(self.reader_error()),
                Err(RecvTimeoutError::Timeout) => self.check_wait(started)?,
            }
        };
        self.stats.stall_disk += started.elapsed();
        answer
    }
}

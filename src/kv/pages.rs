//! Which sequence has which pages: a free list, and a count of users for each page.

use crate::{Error, Keys, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Sequences that were opened in all stores.
static OPENED: AtomicU64 = AtomicU64::new(0);

/// A sequence of a [`KvStore`](super::KvStore). One that was closed is refused ever after, and by all
/// other stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SequenceId {
    slot: usize,
    /// The count of sequences that were opened before this one, in all stores.
    serial: u64,
}

/// The page table of a store. It holds no rows.
#[derive(Clone, Debug)]
pub(super) struct PageTable {
    page_len: usize,
    /// Whether a sequence has one page, whatever its length.
    in_rows: bool,
    /// Of each page: sequences that have it.
    users: Vec<u32>,
    /// Pages without users. The last is taken first.
    free: Vec<u32>,
    slots: Vec<Option<Held>>,
    vacant: Vec<usize>,
}

/// What an open sequence holds.
#[derive(Clone, Debug)]
struct Held {
    serial: u64,
    len: usize,
    /// As many as `len` needs, no more.
    pages: Vec<u32>,
}

/// What a sequence takes when it grows.
#[derive(Clone, Debug)]
pub(super) struct Extension {
    slot: usize,
    len: usize,
    /// Pages from the end of the free list: the copy's first, if there is one.
    fresh: Vec<u32>,
    pub(super) copy: Option<PageCopy>,
}

/// A page that has other users, and that the sequence takes a copy of.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageCopy {
    pub(super) from: u32,
    pub(super) to: u32,
    /// The sequence's rows of the page.
    pub(super) rows: usize,
    /// Which of the sequence's pages it is.
    index: usize,
}

impl PageTable {
    /// `pages` pages of `page_len` rows, fewer than 2³² rows in all.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    pub(super) fn new(pages: usize, page_len: usize, in_rows: bool) -> Result<Self> {
        let mut table = Self {
            page_len,
            in_rows,
            users: Vec::new(),
            free: Vec::new(),
            slots: Vec::new(),
            vacant: Vec::new(),
        };
        table.reserve(pages)?;
        table.grow(pages, page_len);
        Ok(table)
    }

    /// Memory for so many pages in all.
    ///
    /// # Errors
    /// [`Error::Value`] if there is not so much.
    pub(super) fn reserve(&mut self, pages: usize) -> Result<()> {
        let more = pages.saturating_sub(self.users.len());
        let reserved = self.users.try_reserve_exact(more).and_then(|()| self.free.try_reserve_exact(more));
        reserved.map_err(|_| Error::value("pages", "a count that memory has room for", pages))
    }

    /// More pages, or longer ones where each sequence has one. Memory was reserved.
    pub(super) fn grow(&mut self, pages: usize, page_len: usize) {
        let before = self.users.len();
        self.page_len = page_len;
        self.users.resize(pages, 0);
        // Those that were there are taken before these, and these in their order.
        self.free.splice(0..0, (before..pages).rev().map(|page| page as u32));
    }

    pub(super) fn free_pages(&self) -> usize {
        self.free.len()
    }

    pub(super) fn len(&self, id: SequenceId) -> Result<usize> {
        Ok(self.held(id)?.len)
    }

    /// Pages of a sequence of `len` rows.
    fn pages_for(&self, len: usize) -> usize {
        if self.in_rows { 1 } else { len.div_ceil(self.page_len) }
    }

    fn held(&self, id: SequenceId) -> Result<&Held> {
        let held = self.slots.get(id.slot).and_then(Option::as_ref);
        held.filter(|held| held.serial == id.serial).ok_or_else(|| unknown(id))
    }

    fn held_mut(&mut self, id: SequenceId) -> Result<&mut Held> {
        let held = self.slots.get_mut(id.slot).and_then(Option::as_mut);
        held.filter(|held| held.serial == id.serial).ok_or_else(|| unknown(id))
    }

    /// The sequence if it has so many rows.
    fn held_with(&self, id: SequenceId, len: usize) -> Result<&Held> {
        let held = self.held(id)?;
        if len > held.len {
            return Err(Error::value("len", format!("at most the sequence's {}", held.len), len));
        }
        Ok(held)
    }

    /// The last `count` pages of the free list, in the order in which they are taken.
    fn fresh(&self, count: usize) -> Result<Vec<u32>> {
        let free = self.free.len();
        let rest = free.checked_sub(count).ok_or(Error::Pages { needed: count, free })?;
        Ok(self.free[rest..].iter().rev().copied().collect())
    }

    fn take(&mut self, fresh: &[u32]) {
        self.free.truncate(self.free.len() - fresh.len());
        fresh.iter().for_each(|&page| self.users[page as usize] = 1);
    }

    fn release(&mut self, pages: &[u32]) {
        for &page in pages.iter().rev() {
            let users = &mut self.users[page as usize];
            *users -= 1;
            if *users == 0 {
                self.free.push(page);
            }
        }
    }

    fn insert(&mut self, len: usize, pages: Vec<u32>) -> SequenceId {
        let serial = OPENED.fetch_add(1, Ordering::Relaxed);
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(Held { serial, len, pages });
        SequenceId { slot, serial }
    }

    pub(super) fn open(&mut self) -> Result<SequenceId> {
        let fresh = self.fresh(self.pages_for(0))?;
        self.take(&fresh);
        Ok(self.insert(0, fresh))
    }

    pub(super) fn close(&mut self, id: SequenceId) -> Result<()> {
        self.held(id)?;
        if let Some(held) = self.slots[id.slot].take() {
            self.release(&held.pages);
            self.vacant.push(id.slot);
        }
        Ok(())
    }

    /// What the sequence takes to grow by `rows`: for [`extend`](Self::extend), with no change to
    /// the table between.
    pub(super) fn extension(&self, id: SequenceId, rows: usize) -> Result<Extension> {
        let held = self.held(id)?;
        let capacity = if self.in_rows { self.page_len } else { usize::MAX };
        let len = held.len.checked_add(rows).filter(|&len| len <= capacity);
        let len = len.ok_or(Error::Capacity { capacity, len: held.len, requested: rows })?;
        // The page of the first new row, if the sequence has it.
        let index = held.len / self.page_len.max(1);
        let first = held.pages.get(index).filter(|_| rows > 0);
        let shared = first.filter(|&&page| self.users[page as usize] > 1);
        let more = self.pages_for(len) - held.pages.len();
        let fresh = self.fresh(more + usize::from(shared.is_some()))?;
        let copy = shared.map(|&from| PageCopy {
            from,
            to: fresh[0],
            rows: held.len - index * self.page_len,
            index,
        });
        Ok(Extension { slot: id.slot, len, fresh, copy })
    }

    pub(super) fn extend(&mut self, Extension { slot, len, fresh, copy }: Extension) {
        self.take(&fresh);
        let Some(held) = &mut self.slots[slot] else { return };
        held.len = len;
        held.pages.extend(&fresh[usize::from(copy.is_some())..]);
        if let Some(PageCopy { from, to, index, .. }) = copy {
            held.pages[index] = to;
            self.release(&[from]);
        }
    }

    pub(super) fn truncate(&mut self, id: SequenceId, len: usize) -> Result<()> {
        self.held_with(id, len)?;
        let kept = self.pages_for(len);
        let held = self.held_mut(id)?;
        held.len = len;
        let pages = held.pages.split_off(kept);
        self.release(&pages);
        Ok(())
    }

    pub(super) fn share(&mut self, id: SequenceId, len: usize) -> Result<SequenceId> {
        let pages = self.held_with(id, len)?.pages[..self.pages_for(len)].to_vec();
        pages.iter().for_each(|&page| self.users[page as usize] += 1);
        Ok(self.insert(len, pages))
    }

    pub(super) fn keys(&self, id: SequenceId, len: usize) -> Result<Keys> {
        let pages = &self.held_with(id, len)?.pages;
        Ok(match self.in_rows {
            true => Keys::rows(pages[0] as usize, 0..len),
            false => Keys::pages(len, &pages[..self.pages_for(len)]),
        })
    }

    pub(super) fn places(
        &self,
        id: SequenceId,
        rows: Range<usize>,
    ) -> Result<impl ExactSizeIterator<Item = u32> + use<'_>> {
        let held = self.held(id)?;
        if rows.start > rows.end || rows.end > held.len {
            let expected = format!("a range within the sequence's {}", held.len);
            return Err(Error::value("rows", expected, format!("{rows:?}")));
        }
        let page_len = self.page_len;
        Ok(rows.map(move |row| held.pages[row / page_len] * page_len as u32 + (row % page_len) as u32))
    }

    /// Of each page: the rows that sequences use, from the first on.
    pub(super) fn used_rows(&self) -> Vec<usize> {
        let mut used = vec![0; self.users.len()];
        for held in self.slots.iter().flatten() {
            for (index, &page) in held.pages.iter().enumerate() {
                let rows = (held.len - index * self.page_len).min(self.page_len);
                let used = &mut used[page as usize];
                *used = rows.max(*used);
            }
        }
        used
    }
}

fn unknown(id: SequenceId) -> Error {
    Error::value("sequence", "one that is open", format!("{id:?}"))
}

#[cfg(test)]
mod tests;

//! The keys and values of sequences, in pages of [`PAGE_TOKENS`] tokens.
//!
//! A [`PagePool`] takes memory from the kernel in slabs and hands out zeroed pages. A [`Sequence`] holds references to
//! its pages and the table of their addresses that generated code reads. Several sequences can hold the same page (a
//! shared prefix); who wants to write to a shared page gets a copy first. Pages that the sliding window has left behind
//! are given back.
//!
//! Deliberately absent: the layout inside a page, which only generated code knows.

use crate::error::{Error, Result};
use crate::memory::{self, Zeroed};
use moec_abi::PAGE_TOKENS;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

const REMEDY: &str = "use a shorter text, free memory, or rebuild with a smaller `--context` or with `--kv f16`";

/// Where pages come from and go back to.
pub struct PagePool {
    page_bytes: usize,
    state: Mutex<PoolState>,
}

#[derive(Default)]
struct PoolState {
    slabs: Vec<Zeroed>,
    /// Pages of `slabs` that were never handed out, still zero.
    fresh: Vec<Address>,
    /// Pages that came back.
    used: Vec<Address>,
    /// Pages handed out.
    taken: usize,
}

/// Address of a page. The memory belongs to the pool and outlives every [`Page`].
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Address(*mut u8);

// SAFETY: an address is only a number until it is dereferenced; a `Page` is the only owner of what lies there.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

impl PagePool {
    /// An empty pool of pages of `page_bytes` bytes.
    pub fn new(page_bytes: usize) -> Arc<PagePool> {
        Arc::new(PagePool { page_bytes, state: Mutex::default() })
    }

    /// Bytes of one page.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Pages that sequences hold now.
    pub fn pages_in_use(&self) -> usize {
        self.lock().taken
    }

    /// Fails when memory for `pages` more pages is not to be had.
    pub fn check(&self, pages: usize) -> Result<()> {
        let state = self.lock();
        let missing = pages.saturating_sub(state.fresh.len() + state.used.len());
        drop(state);
        let bytes = missing as u64 * self.page_bytes as u64;
        memory::check(&format!("the cache of keys and values for {} tokens", pages * PAGE_TOKENS), bytes, REMEDY)
    }

    /// A page of zeros.
    fn take(self: &Arc<Self>) -> Result<Arc<Page>> {
        let mut state = self.lock();
        if state.fresh.is_empty() && state.used.is_empty() {
            self.grow(&mut state)?;
        }
        let address = match state.used.pop() {
            Some(address) => {
                // Nothing of an earlier sequence may be left, not even where it would be masked: zero times infinity
                // is not zero.
                // SAFETY: the page has no owner, so nobody else accesses its `page_bytes` bytes.
                unsafe { ptr::write_bytes(address.0, 0, self.page_bytes) };
                address
            }
            None => state.fresh.pop().expect("grow has added pages"),
        };
        state.taken += 1;
        drop(state);
        Ok(Arc::new(Page { address, pool: self.clone() }))
    }

    /// Adds a slab: as much as there is already, so that slabs stay few.
    fn grow(&self, state: &mut PoolState) -> Result<()> {
        const MOST: usize = 64 << 20;
        const LEAST: usize = 1 << 20;
        let held: usize = state.slabs.iter().map(Zeroed::len).sum();
        let stride = self.page_bytes.next_multiple_of(moec_abi::MEMORY_ALIGN);
        let mut pages = (held.clamp(LEAST, MOST) / stride).max(1);
        let what = "one more page of the cache of keys and values";
        if memory::check(what, (pages * stride) as u64, REMEDY).is_err() {
            pages = 1;
            memory::check(what, stride as u64, REMEDY)?;
        }
        let mut slab = Zeroed::new(pages * stride, what, REMEDY)?;
        let first = slab.as_mut_ptr();
        // Popped from the end: the first page first.
        state.fresh.extend((0..pages).rev().map(|page| Address(first.wrapping_add(page * stride))));
        state.slabs.push(slab);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A page that is in use; goes back to its pool when the last reference is dropped.
struct Page {
    address: Address,
    pool: Arc<PagePool>,
}

impl Drop for Page {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.used.push(self.address);
        state.taken -= 1;
    }
}

/// A page whose [`PAGE_TOKENS`] tokens are all there, to be kept and given to other sequences that begin alike. It never
/// changes while it is held.
#[derive(Clone)]
pub struct FullPage(Arc<Page>);

impl FullPage {
    /// Whether nobody else holds the page.
    pub fn is_last_reference(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}

/// The keys and values of one sequence of tokens.
pub struct Sequence {
    pool: Arc<PagePool>,
    /// `None` where the window has moved on.
    pages: Vec<Option<Arc<Page>>>,
    /// Addresses of `pages`, null where there is none: what generated code reads.
    table: Vec<Address>,
    /// Tokens that have been through the model.
    length: usize,
    /// Keys that a token attends to, its own included; `None` for all.
    window: Option<usize>,
}

impl Sequence {
    /// An empty sequence.
    pub fn new(pool: &Arc<PagePool>, window: Option<usize>) -> Sequence {
        Sequence { pool: pool.clone(), pages: Vec::new(), table: Vec::new(), length: 0, window }
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// No tokens so far.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Pages held.
    pub fn pages(&self) -> usize {
        self.pages.iter().flatten().count()
    }

    /// First position whose keys and values are still kept.
    pub fn kept_from(&self) -> usize {
        self.pages.iter().take_while(|page| page.is_none()).count() * PAGE_TOKENS
    }

    /// The page table, valid until the sequence is changed.
    pub fn table(&self) -> *const *mut u8 {
        // `Address` is a transparent wrapper of the pointer.
        self.table.as_ptr().cast()
    }

    /// Page number `page`, when it is full and still held.
    pub fn full_page(&self, page: usize) -> Option<FullPage> {
        let full = (page + 1) * PAGE_TOKENS <= self.length;
        self.pages.get(page).filter(|_| full)?.clone().map(FullPage)
    }

    /// Adds a page of another sequence with the same tokens so far, instead of sending its tokens through the model.
    ///
    /// # Panics
    /// When the sequence does not end with a full page.
    pub fn push_full_page(&mut self, page: FullPage) {
        assert!(self.length.is_multiple_of(PAGE_TOKENS), "{} tokens are not whole pages", self.length);
        assert!(Arc::ptr_eq(&self.pool, &page.0.pool), "a page of another model");
        self.pages.truncate(self.length / PAGE_TOKENS);
        self.table.truncate(self.length / PAGE_TOKENS);
        self.table.push(page.0.address);
        self.pages.push(Some(page.0));
        self.length += PAGE_TOKENS;
    }

    /// Pages that [`prepare`](Sequence::prepare) would take for `tokens` more tokens.
    pub fn pages_wanted(&self, tokens: usize) -> usize {
        let shared = self.pages.get(self.length / PAGE_TOKENS).and_then(Option::as_ref);
        let copied = shared.is_some_and(|page| tokens > 0 && Arc::strong_count(page) > 1);
        (self.length + tokens).div_ceil(PAGE_TOKENS).saturating_sub(self.pages.len()) + usize::from(copied)
    }

    /// The pages held, each with its number, as their bytes.
    pub(crate) fn contents(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let held = self.pages.iter().enumerate().filter_map(|(number, page)| Some((number, page.as_ref()?)));
        held.map(|(number, page)| {
            // SAFETY: a page has `page_bytes` bytes, initialized when they were taken. Generated code writes to a page only while its
            // one holder is borrowed for a step; others copy it first.
            (number, unsafe { std::slice::from_raw_parts(page.address.0, self.pool.page_bytes) })
        })
    }

    /// A sequence of `length` tokens whose pages from number `first` on are filled by `fill`, one after the other.
    ///
    /// # Errors
    /// Those of `fill`, and too little memory.
    pub(crate) fn restore(
        pool: &Arc<PagePool>,
        window: Option<usize>,
        length: usize,
        first: usize,
        mut fill: impl FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<Sequence> {
        let mut sequence = Sequence::new(pool, window);
        let pages = length.div_ceil(PAGE_TOKENS);
        assert!(
            first * PAGE_TOKENS <= sequence.first_visible(length) && first <= pages,
            "page {first} of {pages} is the first that is kept"
        );
        for number in 0..pages {
            if number < first {
                sequence.pages.push(None);
                sequence.table.push(Address(ptr::null_mut()));
                continue;
            }
            let page = pool.take()?;
            // SAFETY: a new page has `page_bytes` bytes, all zero, and no other holder.
            fill(unsafe { std::slice::from_raw_parts_mut(page.address.0, pool.page_bytes) })?;
            sequence.table.push(page.address);
            sequence.pages.push(Some(page));
        }
        sequence.length = length;
        Ok(sequence)
    }

    /// Another sequence with the same tokens. Nothing is copied until one of them writes to a shared page.
    pub fn fork(&self) -> Sequence {
        Sequence {
            pool: self.pool.clone(),
            pages: self.pages.clone(),
            table: self.table.clone(),
            length: self.length,
            window: self.window,
        }
    }

    /// Most pages that a sequence of `tokens` tokens holds at once when it is fed in steps of at most `step` tokens.
    pub fn pages_for(tokens: usize, step: usize, window: Option<usize>) -> usize {
        let all = tokens.div_ceil(PAGE_TOKENS);
        window.map_or(all, |window| all.min((window + step).div_ceil(PAGE_TOKENS) + 1))
    }

    /// Makes room for `tokens` more tokens: gives back what the window has left behind, takes pages, copies shared ones
    /// that will be written.
    pub fn prepare(&mut self, tokens: usize) -> Result<()> {
        let first_visible = self.first_visible(self.length);
        for page in 0..(first_visible / PAGE_TOKENS).min(self.pages.len()) {
            self.pages[page] = None;
            self.table[page] = Address(ptr::null_mut());
        }
        if tokens == 0 {
            return Ok(());
        }
        let first_written = self.length / PAGE_TOKENS;
        let last_written = (self.length + tokens - 1) / PAGE_TOKENS;
        for page in first_written..=last_written {
            if page == self.pages.len() {
                let new = self.pool.take()?;
                self.table.push(new.address);
                self.pages.push(Some(new));
            } else {
                self.own(page)?;
            }
        }
        Ok(())
    }

    /// Makes sure that nobody else holds page number `page`.
    fn own(&mut self, page: usize) -> Result<()> {
        let slot = self.pages[page].as_mut().expect("a page at or after the sequence's end is held");
        if Arc::get_mut(slot).is_some() {
            return Ok(());
        }
        let copy = self.pool.take()?;
        // SAFETY: both are pages of `page_bytes` bytes and not the same; the new one has no other user, and a shared
        // page is not written.
        unsafe { ptr::copy_nonoverlapping(slot.address.0, copy.address.0, self.pool.page_bytes) };
        self.table[page] = copy.address;
        *slot = copy;
        Ok(())
    }

    /// Counts `tokens` tokens for which room was made and which have been through the model.
    pub fn advance(&mut self, tokens: usize) {
        self.length += tokens;
        debug_assert!(self.length <= self.pages.len() * PAGE_TOKENS);
    }

    /// Goes back to the first `length` tokens.
    ///
    /// # Errors
    /// When keys and values that the next token would need have been given back. To zero always works.
    pub fn rewind(&mut self, length: usize) -> Result<()> {
        assert!(length <= self.length, "cannot go back to {length}: there are {} tokens", self.length);
        let kept = self.kept_from();
        if length > 0 && self.first_visible(length) < kept {
            return Err(Error::Rewind { to: length, kept });
        }
        let pages = length.div_ceil(PAGE_TOKENS);
        self.pages.truncate(pages);
        self.table.truncate(pages);
        self.length = length;
        Ok(())
    }

    /// First position that a token at `position` attends to.
    pub(crate) fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(sequence: &mut Sequence, tokens: usize) {
        sequence.prepare(tokens).unwrap();
        for position in sequence.length..sequence.length + tokens {
            let page = sequence.table[position / PAGE_TOKENS].0;
            // SAFETY: the page has 64 bytes and was made this sequence's own.
            unsafe { *page.add(position % PAGE_TOKENS) = position as u8 };
        }
        sequence.advance(tokens);
    }

    fn read(sequence: &Sequence, position: usize) -> u8 {
        // SAFETY: the position's page is held.
        unsafe { *sequence.table[position / PAGE_TOKENS].0.add(position % PAGE_TOKENS) }
    }

    #[test]
    fn forks_share_pages_until_one_writes() {
        let pool = PagePool::new(64);
        let mut a = Sequence::new(&pool, None);
        write(&mut a, 100);
        assert_eq!(pool.pages_in_use(), 2);
        let mut b = a.fork();
        assert_eq!(pool.pages_in_use(), 2);
        write(&mut b, 100);
        assert_eq!((pool.pages_in_use(), a.pages(), b.pages()), (5, 2, 4));
        b.rewind(70).unwrap();
        b.prepare(1).unwrap();
        // SAFETY: the page was made b's own.
        unsafe { *b.table[1].0.add(6) = 255 };
        assert_eq!((read(&a, 70), read(&b, 70)), (70, 255));
        assert!((0..70).all(|i| read(&a, i) == read(&b, i)));
        drop(a);
        assert_eq!(pool.pages_in_use(), 2);
        drop(b);
        assert_eq!(pool.pages_in_use(), 0);
    }

    #[test]
    fn full_pages_are_given_on() {
        let pool = PagePool::new(64);
        let mut a = Sequence::new(&pool, None);
        write(&mut a, 100);
        let page = a.full_page(0).unwrap();
        assert!(a.full_page(1).is_none() && a.full_page(2).is_none() && !page.is_last_reference());
        let mut b = Sequence::new(&pool, None);
        b.push_full_page(page.clone());
        assert_eq!((b.len(), b.pages_wanted(1), b.pages_wanted(65), pool.pages_in_use()), (64, 1, 2, 2));
        write(&mut b, 30);
        assert_eq!((b.pages_wanted(34), b.pages_wanted(35), pool.pages_in_use()), (0, 1, 3));
        assert!((0..64).all(|i| read(&b, i) == i as u8));
        assert_eq!(b.fork().pages_wanted(1), 1);
        drop((a, b));
        assert!(page.is_last_reference());
        assert_eq!(pool.pages_in_use(), 1);
    }

    #[test]
    fn pages_come_back_zeroed() {
        let pool = PagePool::new(64);
        let mut a = Sequence::new(&pool, None);
        write(&mut a, 64);
        a.rewind(0).unwrap();
        assert_eq!(pool.pages_in_use(), 0);
        a.prepare(1).unwrap();
        assert!((0..64).all(|i| read(&a, i) == 0));
    }

    #[test]
    fn the_window_gives_pages_back() {
        let pool = PagePool::new(64);
        let window = 70;
        let mut a = Sequence::new(&pool, Some(window));
        for _ in 0..1000 {
            write(&mut a, 1);
            assert!(pool.pages_in_use() <= Sequence::pages_for(1000, 1, Some(window)));
            // All that the next token sees is still there.
            let first = (a.len() + 1).saturating_sub(window);
            assert!((first..a.len()).all(|i| read(&a, i) == i as u8));
        }
        // 1000 tokens: the last step saw 930.. and so kept page 14.
        assert_eq!(a.kept_from(), 14 * 64);
        assert!(matches!(a.rewind(900), Err(Error::Rewind { to: 900, kept: 896 })));
        assert_eq!(a.len(), 1000);
        a.rewind(970).unwrap();
        a.rewind(0).unwrap();
        write(&mut a, 300);
        assert_eq!(a.kept_from(), 0);
        write(&mut a, 1);
        assert_eq!(a.kept_from(), 192);
    }

    #[test]
    fn large_steps_stay_within_the_bound() {
        for window in [8, 64, 65, 200] {
            for step in [1, 7, 64, 500] {
                let pool = PagePool::new(64);
                let mut a = Sequence::new(&pool, Some(window));
                let mut most = 0;
                while a.len() < 2000 {
                    write(&mut a, step);
                    most = most.max(pool.pages_in_use());
                }
                assert!(most <= Sequence::pages_for(a.len(), step, Some(window)), "{window} {step} {most}");
            }
        }
    }
}

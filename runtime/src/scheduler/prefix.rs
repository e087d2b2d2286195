//! Full KV pages kept by their content: a tree whose paths are the texts that were read.
//!
//! A node is a page. Its key is the hash of its tokens and of its parent's key, so a lookup walks down from the root, page by
//! page; tokens and parent are compared too, so equal hashes of different texts do no harm. The least recently used leaf
//! that no request holds is the first to go.

use crate::kv::{FullPage, Sequence};
use moec_abi::PAGE_TOKENS;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Identifies a text of whole pages.
type Key = u64;

/// The empty text.
const ROOT: Key = 0;

struct Node {
    parent: Key,
    tokens: [u32; PAGE_TOKENS],
    page: FullPage,
    children: usize,
    /// When it was last used, by the cache's own clock.
    used: u64,
}

/// The cache.
#[derive(Default)]
pub struct PrefixCache {
    nodes: HashMap<Key, Node>,
    clock: u64,
}

fn key(parent: Key, tokens: &[u32]) -> Key {
    let mut hasher = DefaultHasher::new();
    (parent, tokens).hash(&mut hasher);
    hasher.finish()
}

impl PrefixCache {
    /// Pages held.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Pages that nobody else holds: those that can be given back.
    pub fn evictable(&self) -> usize {
        self.nodes.values().filter(|node| node.page.is_last_reference()).count()
    }

    /// Continues `sequence`, which holds a beginning of `tokens` that ends with a full page, with pages of the cache, up to at
    /// most `most` tokens in all. Returns how many tokens were added.
    pub fn extend(&mut self, sequence: &mut Sequence, tokens: &[u32], most: usize) -> usize {
        let before = sequence.len();
        if !before.is_multiple_of(PAGE_TOKENS) {
            return 0;
        }
        self.clock += 1;
        let mut parent = ROOT;
        for (number, page) in tokens[..most.min(tokens.len())].as_chunks::<PAGE_TOKENS>().0.iter().enumerate() {
            let key = key(parent, page);
            let Some(node) = self.nodes.get_mut(&key).filter(|node| node.parent == parent && node.tokens == *page)
            else {
                break;
            };
            node.used = self.clock;
            if number * PAGE_TOKENS >= before {
                sequence.push_full_page(node.page.clone());
            }
            parent = key;
        }
        sequence.len() - before
    }

    /// Keeps the full pages of `sequence`, which holds `tokens`.
    pub fn insert(&mut self, sequence: &Sequence, tokens: &[u32]) {
        self.clock += 1;
        let mut parent = ROOT;
        for (number, content) in tokens[..sequence.len()].as_chunks::<PAGE_TOKENS>().0.iter().enumerate() {
            let key = key(parent, content);
            match self.nodes.get_mut(&key) {
                Some(node) if node.parent == parent && node.tokens == *content => node.used = self.clock,
                // Another text with the same hash: this one is not kept.
                Some(_) => return,
                None => {
                    // Behind the sliding window there may be nothing left to keep.
                    let Some(page) = sequence.full_page(number) else { return };
                    let node = Node { parent, tokens: *content, page, children: 0, used: self.clock };
                    self.nodes.insert(key, node);
                    if let Some(parent) = self.nodes.get_mut(&parent) {
                        parent.children += 1;
                    }
                }
            }
            parent = key;
        }
    }

    /// Gives one page back: the least recently used that no request holds and no kept text goes on from. `false` when there
    /// is none.
    pub fn evict(&mut self) -> bool {
        let leaves = self.nodes.iter().filter(|(_, node)| node.children == 0 && node.page.is_last_reference());
        let Some((&key, _)) = leaves.min_by_key(|(key, node)| (node.used, **key)) else { return false };
        let node = self.nodes.remove(&key).expect("it was found a moment ago");
        if let Some(parent) = self.nodes.get_mut(&node.parent) {
            parent.children -= 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::PagePool;

    fn read(pool: &std::sync::Arc<PagePool>, tokens: &[u32]) -> Sequence {
        let mut sequence = Sequence::new(pool, None);
        sequence.prepare(tokens.len()).unwrap();
        sequence.advance(tokens.len());
        sequence
    }

    #[test]
    fn texts_are_found_by_their_beginning() {
        let pool = PagePool::new(64);
        let mut cache = PrefixCache::default();
        let text: Vec<u32> = (0..200).collect();
        cache.insert(&read(&pool, &text), &text);
        assert_eq!((cache.len(), pool.pages_in_use(), cache.evictable()), (3, 3, 3));
        let found = |cache: &mut PrefixCache, text: &[u32], most| {
            let mut sequence = Sequence::new(&pool, None);
            cache.extend(&mut sequence, text, most);
            sequence.len()
        };
        assert_eq!(found(&mut cache, &text, 200), 192);
        assert_eq!(found(&mut cache, &text, 191), 128);
        assert_eq!(found(&mut cache, &text[1..], 199), 0);
        let mut other = text.clone();
        other[100] = 7;
        assert_eq!(found(&mut cache, &other, 200), 64);
        // The same page after another beginning is another text.
        assert_eq!(found(&mut cache, &text[64..], 136), 0);
        // A sequence that has read a page on its own goes on with the next.
        let mut sequence = read(&pool, &text[..64]);
        assert_eq!((cache.extend(&mut sequence, &text, 200), sequence.len()), (128, 192));
        let mut sequence = read(&pool, &text[..65]);
        assert_eq!(cache.extend(&mut sequence, &text, 200), 0);
    }

    #[test]
    fn the_least_recently_used_leaf_goes_first() {
        let pool = PagePool::new(64);
        let mut cache = PrefixCache::default();
        let a: Vec<u32> = (0..128).collect();
        let b: Vec<u32> = (0..64).chain(500..564).collect();
        cache.insert(&read(&pool, &a), &a);
        cache.insert(&read(&pool, &b), &b);
        assert_eq!(cache.len(), 3);
        let mut held = Sequence::new(&pool, None);
        assert_eq!(cache.extend(&mut held, &a, 128), 128);
        assert_eq!(cache.evictable(), 1);
        assert!(cache.evict());
        // What is left belongs to the request.
        assert!(!cache.evict());
        drop(held);
        assert!(cache.evict() && cache.evict() && !cache.evict());
        assert_eq!(pool.pages_in_use(), 0);
    }
}

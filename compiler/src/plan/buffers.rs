//! Where intermediate values lie in scratch memory.
//!
//! A buffer lives from the stage that first writes it to the last stage that touches it. Two buffers whose lives share no stage
//! are separated by a barrier and may share memory; offsets are given greedily, the largest buffer first, at the lowest place that is free for all of its life. This is the
//! classic heuristic for offline memory planning (greedy by size; Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
//! Inference", 2020). Deliberately absent: what the buffers hold.

use moec_abi::{MEMORY_ALIGN, round_up};

/// Whose memory a buffer is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// One for all workers.
    Shared,
    /// One for each worker.
    Worker,
}

/// A buffer's index.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BufferId(pub usize);

/// A piece of scratch memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Buffer {
    /// For people.
    pub name: String,
    /// Whose memory it is in.
    pub scope: Scope,
    /// Size in bytes.
    pub bytes: usize,
    /// First and last stage that touch it; `None` before any has.
    pub life: Option<(usize, usize)>,
    /// Keeps its content to the end of the step and is shared with nothing.
    pub pinned: bool,
    /// Offset in its scope's memory, once allocated.
    pub offset: usize,
}

/// The buffers of one program.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Buffers {
    /// All of them, by [`BufferId`].
    pub all: Vec<Buffer>,
}

impl Buffers {
    /// A new buffer.
    pub fn add(&mut self, name: impl Into<String>, scope: Scope, bytes: usize) -> BufferId {
        self.all.push(Buffer { name: name.into(), scope, bytes, life: None, pinned: false, offset: 0 });
        BufferId(self.all.len() - 1)
    }

    /// Notes that `stage` touches a buffer.
    pub fn touch(&mut self, id: BufferId, stage: usize) {
        let life = &mut self.all[id.0].life;
        *life = Some(life.map_or((stage, stage), |(a, b)| (a.min(stage), b.max(stage))));
    }

    /// Keeps a buffer's content to the end of the step.
    pub fn pin(&mut self, id: BufferId) {
        self.all[id.0].pinned = true;
    }

    /// Gives every buffer its offset: pinned ones first, in order, so that their offsets depend on nothing else.
    /// Returns the bytes needed: shared and of each worker.
    pub fn allocate(&mut self) -> (usize, usize) {
        (self.allocate_scope(Scope::Shared), self.allocate_scope(Scope::Worker))
    }

    fn allocate_scope(&mut self, scope: Scope) -> usize {
        let mut order: Vec<usize> = (0..self.all.len()).filter(|&i| self.all[i].scope == scope).collect();
        order.sort_by_key(|&i| {
            let Buffer { pinned, bytes, .. } = self.all[i];
            (!pinned, std::cmp::Reverse(if pinned { 0 } else { bytes }), i)
        });
        let mut placed: Vec<usize> = Vec::new();
        let mut end = 0;
        for i in order {
            let size = round_up(self.all[i].bytes, MEMORY_ALIGN);
            let mut taken: Vec<(usize, usize)> = placed
                .iter()
                .filter(|&&j| overlap(&self.all[i], &self.all[j]))
                .map(|&j| (self.all[j].offset, self.all[j].offset + round_up(self.all[j].bytes, MEMORY_ALIGN)))
                .collect();
            taken.sort_unstable();
            let mut at = 0;
            for (from, to) in taken {
                if at + size <= from {
                    break;
                }
                at = at.max(to);
            }
            self.all[i].offset = at;
            end = end.max(at + size);
            placed.push(i);
        }
        end
    }
}

fn overlap(a: &Buffer, b: &Buffer) -> bool {
    match (a.life, b.life) {
        (Some((a0, a1)), Some((b0, b1))) => {
            let (a1, b1) = (if a.pinned { usize::MAX } else { a1 }, if b.pinned { usize::MAX } else { b1 });
            let (a0, b0) = (if a.pinned { 0 } else { a0 }, if b.pinned { 0 } else { b0 });
            a0 <= b1 && b0 <= a1
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_never_meet_share_memory() {
        let mut b = Buffers::default();
        let x = b.add("x", Scope::Shared, 100);
        let y = b.add("y", Scope::Shared, 1000);
        let z = b.add("z", Scope::Shared, 900);
        let own = b.add("own", Scope::Worker, 10);
        for (id, stages) in [(x, 0..=5), (y, 1..=2), (z, 3..=4), (own, 0..=0)] {
            stages.for_each(|s| b.touch(id, s));
        }
        let (shared, worker) = b.allocate();
        assert_eq!(b.all[y.0].offset, 0);
        assert_eq!(b.all[z.0].offset, 0, "z reuses the memory of y");
        assert_eq!(b.all[x.0].offset, 1024);
        assert_eq!((shared, worker), (1024 + 128, 64));
    }

    #[test]
    fn pinned_buffers_share_with_nothing() {
        let mut b = Buffers::default();
        let x = b.add("routes", Scope::Shared, 64);
        let y = b.add("y", Scope::Shared, 64);
        b.touch(x, 0);
        b.touch(y, 1);
        b.pin(x);
        assert_eq!(b.allocate().0, 128);
    }
}

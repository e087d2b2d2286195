//! Handles: what C holds instead of pointers.
//!
//! A handle is a number in the clothes of a pointer: the place in a table, how many owners that place had before, and the kind. So a handle that
//! was freed, even if its place has a new owner, is known to be stale.

use crate::status::{Failure, Result, Status};
use moec_runtime::{Model, Sampler, Session};
use std::ptr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// An opened model. Not an address: it is refused after `moec_close`.
pub struct ModelHandle {
    _private: [u8; 0],
}

/// A sequence of tokens with its keys and values. Not an address: it is refused after `moec_session_free`.
pub struct SessionHandle {
    _private: [u8; 0],
}

/// What a session's handle stands for.
pub(crate) struct OpenSession {
    /// Used by one call at a time.
    pub state: Mutex<SessionState>,
    /// Makes a call that feeds stop soon.
    pub cancel: Arc<AtomicBool>,
}

/// What a call on a session works with.
pub(crate) struct SessionState {
    pub session: Session,
    pub sampler: Sampler,
    /// The flag of [`OpenSession::cancel`].
    pub cancel: Arc<AtomicBool>,
}

struct Slot<T> {
    /// How many owners this place had, the present one included.
    owners: u32,
    value: Option<Arc<T>>,
}

/// All things of one kind that C holds.
struct Table<T> {
    kind: usize,
    name: &'static str,
    slots: RwLock<Vec<Slot<T>>>,
}

const KIND_BITS: u32 = 4;
const INDEX_BITS: u32 = 28;
const _: () = assert!(usize::BITS == 64, "handles have 64 bits");

static MODELS: Table<Model> = Table { kind: 1, name: "model", slots: RwLock::new(Vec::new()) };
static SESSIONS: Table<OpenSession> = Table { kind: 2, name: "session", slots: RwLock::new(Vec::new()) };

impl<T> Table<T> {
    fn insert(&self, value: Arc<T>) -> Result<usize> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        // A place that has had too many owners to count is not used again.
        let free = slots.iter().position(|slot| slot.value.is_none() && slot.owners < u32::MAX);
        let index = free.unwrap_or_else(|| {
            slots.push(Slot { owners: 0, value: None });
            slots.len() - 1
        });
        if index >> INDEX_BITS != 0 {
            slots.pop();
            return Err(Failure::new(Status::OutOfMemory, format!("too many open {}s", self.name)));
        }
        let slot = &mut slots[index];
        slot.owners += 1;
        slot.value = Some(value);
        Ok((slot.owners as usize) << (INDEX_BITS + KIND_BITS) | index << KIND_BITS | self.kind)
    }

    fn refused(&self, handle: usize) -> Failure {
        let text = match handle {
            0 => format!("the {} is null", self.name),
            _ => format!("this is no open {0}: it was freed, or was never a {0}", self.name),
        };
        let status = if handle == 0 { Status::InvalidArgument } else { Status::InvalidHandle };
        Failure::new(status, text)
    }

    fn index(&self, handle: usize) -> Option<(usize, u32)> {
        let index = handle >> KIND_BITS & ((1 << INDEX_BITS) - 1);
        (handle & ((1 << KIND_BITS) - 1) == self.kind).then_some((index, (handle >> (INDEX_BITS + KIND_BITS)) as u32))
    }

    fn get(&self, handle: usize) -> Result<Arc<T>> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let found = self.index(handle).and_then(|(index, owner)| {
            slots.get(index).filter(|slot| slot.owners == owner).and_then(|slot| slot.value.clone())
        });
        found.ok_or_else(|| self.refused(handle))
    }

    /// Takes the thing out; it is dropped outside the lock, by the last who uses it.
    fn remove(&self, handle: usize) -> Result<Arc<T>> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let found = self.index(handle).and_then(|(index, owner)| {
            slots.get_mut(index).filter(|slot| slot.owners == owner).and_then(|slot| slot.value.take())
        });
        found.ok_or_else(|| self.refused(handle))
    }
}

/// Gives out a handle of a model.
pub(crate) fn new_model(model: Arc<Model>) -> Result<*mut ModelHandle> {
    MODELS.insert(model).map(ptr::without_provenance_mut)
}

/// The model of a handle.
pub(crate) fn model(handle: *const ModelHandle) -> Result<Arc<Model>> {
    MODELS.get(handle.addr())
}

/// Takes a model's handle back.
pub(crate) fn close_model(handle: *mut ModelHandle) -> Result<()> {
    MODELS.remove(handle.addr()).map(drop)
}

/// Gives out a handle of a session.
pub(crate) fn new_session(mut session: Session, sampler: Sampler) -> Result<*mut SessionHandle> {
    let cancel = Arc::new(AtomicBool::new(false));
    session.set_interrupt(cancel.clone());
    let open = OpenSession { state: Mutex::new(SessionState { session, sampler, cancel: cancel.clone() }), cancel };
    SESSIONS.insert(Arc::new(open)).map(ptr::without_provenance_mut)
}

/// The session of a handle.
pub(crate) fn session(handle: *const SessionHandle) -> Result<Arc<OpenSession>> {
    SESSIONS.get(handle.addr())
}

/// Takes a session's handle back.
pub(crate) fn free_session(handle: *mut SessionHandle) -> Result<()> {
    SESSIONS.remove(handle.addr()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_handles_are_known() {
        let table: Table<u32> = Table { kind: 3, name: "thing", slots: RwLock::new(Vec::new()) };
        let a = table.insert(Arc::new(1)).unwrap();
        let b = table.insert(Arc::new(2)).unwrap();
        assert_eq!((*table.get(a).unwrap(), *table.get(b).unwrap()), (1, 2));
        assert_eq!(*table.remove(a).unwrap(), 1);
        assert_eq!(table.remove(a).unwrap_err().status, Status::InvalidHandle);
        let c = table.insert(Arc::new(3)).unwrap();
        assert_ne!(a, c, "the same place, another owner");
        assert_eq!(c & 0xffff_fff0, a & 0xffff_fff0);
        assert!(table.get(a).is_err());
        assert_eq!((*table.get(b).unwrap(), *table.get(c).unwrap()), (2, 3));
        for wrong in [a ^ 1, b | 1 << 20, usize::MAX, 3, 16] {
            assert_eq!(table.get(wrong).unwrap_err().status, Status::InvalidHandle, "{wrong:#x}");
        }
        assert_eq!(table.get(0).unwrap_err().status, Status::InvalidArgument);
    }
}
